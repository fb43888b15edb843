"""Attention over keys and values in one piece: one sequence, in blocks of 16 positions, four at a time.

Keys are [kv heads, blocks, size, 16], a lane to each position, so that scores need no sums across lanes; values are
[kv heads, blocks, 16, size]. Both are float32 or float16, all arithmetic is float32.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from functools import cache, reduce
from typing import Any

import numpy as np
import tvm
from tvm import tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from edgeq.backends.mlc.cpu.lanes import LANES, at, call, dot, exponential, is_one, kind, spread, tokens

_BLOCKS = 4
_SPAN = _BLOCKS * LANES  # positions that one largest score is sought of
_STREAMS = 8  # sums of one token, which waits for memory: more than registers hold, since that reads it faster
_HIDDEN = -1e30


class Cache:
    """Keys and values of each layer, and the tokens before: int32 [1].

    Does what a paged cache does, by the same name; a layer's tensors are overwritten in place.
    """

    def __init__(self, past: Tensor, tensors: Sequence[Tensor], theta: float, rotated: int) -> None:
        self._past, self._tensors = past, list(tensors)
        self._frequencies = Tensor.from_const(
            1 / np.float32(theta) ** (np.arange(0, rotated, 2, dtype=np.float32) / np.float32(rotated))
        )
        self._angles: Tensor | None = None

    def attention_with_fused_qkv(self, slot: int, qkv: Tensor, heads: int, scale: float) -> Tensor:
        """Outputs [1, n, heads, size] of queries, keys and values side by side, [1, n, heads + 2 kv heads, size].

        Queries and keys are rotated in their first sizes (Su et al. 2021, arXiv:2104.09864), keys and values stored.
        """
        _, n, _, size = qkv.shape
        keys, values = self._tensors[2 * slot : 2 * slot + 2]
        kv_heads, half, stored = int(keys.shape[0]), int(self._frequencies.shape[0]), str(keys.dtype)
        if self._angles is None:
            out = Tensor.placeholder([n, 2, half], "float32")
            self._angles = op.tensor_ir_op(
                _turning(half, one=is_one(n)), "angles", [self._past, self._frequencies], out
            )
        shape = Tensor.placeholder([1, n, heads, size], "float32")
        given = [op.astype(qkv, "float32"), self._angles, self._past, keys, values]
        like = [Tensor.placeholder(each.shape, stored) for each in (keys, values)]
        store = _storing(heads, kv_heads, int(size), half, stored, one=is_one(n))
        queries, keys, values = op.tensor_ir_inplace_op(store, "store", given, [-1, 3, 4], [shape, *like])
        self._tensors[2 * slot : 2 * slot + 2] = [keys, values]
        room = _STREAMS if is_one(n) else dot(tvm.target.Target.current(allow_none=False)).tokens
        attend = _attending(room, heads, kv_heads, int(size), stored, scale, one=is_one(n))
        return op.astype(op.tensor_ir_op(attend, "attend", [queries, self._past, keys, values], shape), qkv.dtype)


@cache
def _turning(half: int, *, one: bool) -> Any:
    """Cosines and sines of each token's angles."""
    count, _ = tokens(one=one)

    @T.prim_func(s_tir=True, private=True)
    def angles(var_p: T.handle, var_f: T.handle, var_a: T.handle) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        past = T.match_buffer(var_p, (1,), "int32")
        frequency = T.match_buffer(var_f, (half,), "float32")
        angle = T.match_buffer(var_a, (count, 2, half), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in T.serial(count):
                for i in T.serial(half):
                    angle[t, 0, i] = T.cos(T.Cast("float32", T.Cast("int32", t) + past[0]) * frequency[i])
                    angle[t, 1, i] = T.sin(T.Cast("float32", T.Cast("int32", t) + past[0]) * frequency[i])

    return angles


@cache
def _storing(heads: int, kv_heads: int, size: int, half: int, dtype: str, *, one: bool) -> Any:
    count, loop = tokens(one=one)
    blocks = tirx.Var("blocks", "int64")
    lanes, rest = math.gcd(half, LANES), math.gcd(size, LANES)

    def turn(head: Any, qkv: Any, angle: Any, t: Any, source: Any, i: Any) -> None:
        """`lanes` sizes of both halves."""
        first, second = (qkv[0, t, source, at(part * half + i, lanes)] for part in (0, 1))
        cosine, sine = (angle[t, part, at(i, lanes)] for part in (0, 1))
        T.buffer_store(head, first * cosine - second * sine, [at(i, lanes)])
        T.buffer_store(head, second * cosine + first * sine, [at(half + i, lanes)])

    @T.prim_func(s_tir=True, private=True)
    def store(
        var_qkv: T.handle, var_a: T.handle, var_p: T.handle, var_k: T.handle, var_v: T.handle, var_q: T.handle
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        qkv = T.match_buffer(var_qkv, (1, count, heads + 2 * kv_heads, size), "float32")
        angle = T.match_buffer(var_a, (count, 2, half), "float32")
        past = T.match_buffer(var_p, (1,), "int32")
        k = T.match_buffer(var_k, (kv_heads, blocks, size, LANES), dtype)
        v = T.match_buffer(var_v, (kv_heads, blocks, LANES, size), dtype)
        q = T.match_buffer(var_q, (1, count, heads, size), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for source in loop(heads + kv_heads):
                head = T.alloc_buffer((size,), "float32")
                place = T.alloc_buffer((1,), "int32")
                for t in T.serial(count):
                    place[0] = past[0] + T.Cast("int32", t)
                    for i in T.serial(half // lanes):
                        turn(head, qkv, angle, t, source, i * lanes)
                    for i in T.serial(2 * half, size):
                        head[i] = qkv[0, t, source, i]
                    if source < heads:
                        for i in T.serial(size // rest):
                            q[0, t, source, at(i * rest, rest)] = head[at(i * rest, rest)]
                    else:
                        for i in T.serial(size):
                            k[source - heads, place[0] // LANES, i, place[0] % LANES] = T.Cast(dtype, head[i])
                        for i in T.serial(size // rest):
                            v[source - heads, place[0] // LANES, place[0] % LANES, at(i * rest, rest)] = T.Cast(
                                kind(dtype, rest), qkv[0, t, source + kv_heads, at(i * rest, rest)]
                            )

    return store


@cache
def _attending(room: int, heads: int, kv_heads: int, size: int, dtype: str, scale: float, *, one: bool) -> Any:
    """A task for each kv head and a few tokens: softmax is carried along spans (Dao et al. 2022, arXiv:2205.14135).

    A number is summed in the same order however many tokens there are, so that what was drafted is checked bit by bit;
    `room` sums of 16 lanes run side by side, since additions wait for each other.
    """
    count, _ = tokens(one=one)
    blocks = tirx.Var("blocks", "int64")
    each = heads // kv_heads
    together = 1 if one else max(1, room // each)
    queries = together * each
    side = max(1, room // queries)
    near = math.gcd(_BLOCKS, side)  # blocks of keys
    wide = math.gcd(size, LANES)
    sums = math.gcd(size // wide, side)  # parts of values

    def load(buffer: Any, index: Sequence[Any], lanes: int) -> Any:
        return T.Cast(kind("float32", lanes), T.BufferLoad(buffer, [*index[:-1], at(index[-1], lanes)]))

    def token(first: Any, row: int) -> Any:
        return T.min(first + row // each, count - 1)

    def clear(best: Any, total: Any) -> None:
        for row in range(queries):
            T.buffer_store(best, T.float32(_HIDDEN), [row])
            T.buffer_store(total, spread(T.float32(0)), [at(row * LANES)])

    def multiply(q: Any, k: Any, dots: Any, head: Any, first: Any, block: Any, last: Any, i: Any) -> None:
        for part in range(near):
            keys = load(k, (head, T.min(block + part, last), i, 0), LANES)
            for row in range(queries):
                place = [at((part * queries + row) * LANES)]
                value = q[0, token(first, row), head * each + row % each, i]
                T.buffer_store(dots, T.BufferLoad(dots, place) + keys * spread(value), place)

    def score(dots: Any, scores: Any, past: Any, first: Any, block: Any) -> None:
        for part in range(near):
            position = T.Ramp(T.Cast("int32", (block + part) * LANES), 1, LANES)
            for row in range(queries):
                seen = position <= spread(past[0] + T.Cast("int32", token(first, row)))
                scaled = T.BufferLoad(dots, [at((part * queries + row) * LANES)]) * spread(T.float32(scale))
                value = T.Select(seen, scaled, spread(T.float32(_HIDDEN)))
                T.buffer_store(scores, value, [at(row * _SPAN + (block + part) % _BLOCKS * LANES)])

    def weigh(scores: Any, best: Any, total: Any, fade: Any) -> None:
        """Scores to weights beside the largest so far; `fade` is what earlier ones are worth beside it."""
        every = [at(0, queries)]
        T.buffer_store(fade, T.BufferLoad(best, every), every)
        places = [[[at(row * _SPAN + block * LANES)] for block in range(_BLOCKS)] for row in range(queries)]
        for row in range(queries):
            highest = reduce(T.max, (T.BufferLoad(scores, place) for place in places[row]))
            found = call("llvm.vector.reduce.fmax", "float32", highest)
            T.buffer_store(best, T.max(best[row], found), [row])
        worth = exponential(T.BufferLoad(fade, every) - T.BufferLoad(best, every), queries)
        T.buffer_store(fade, worth, every)
        for row in range(queries):
            sum_of = [at(row * LANES)]
            T.buffer_store(total, T.BufferLoad(total, sum_of) * spread(fade[row]), sum_of)
            for place in places[row]:
                T.buffer_store(scores, exponential(T.BufferLoad(scores, place) - spread(best[row])), place)
                T.buffer_store(total, T.BufferLoad(total, sum_of) + T.BufferLoad(scores, place), sum_of)

    def fold(mixed: Any, out: Any, fade: Any, i: Any) -> None:
        for part in range(sums):
            for row in range(queries):
                value = out[at(row * size + i + part * wide, wide)] * spread(fade[row], wide)
                T.buffer_store(mixed, value, [at((part * queries + row) * wide, wide)])

    def mix(
        mixed: Any, scores: Any, v: Any, head: Any, block: Any, place: Any, i: Any, rows: Iterable[int] = range(queries)
    ) -> None:
        for part in range(sums):
            values = load(v, (head, block + place // LANES, place % LANES, i + part * wide), wide)
            for row in rows:
                index = [at((part * queries + row) * wide, wide)]
                value = T.BufferLoad(mixed, index) + values * spread(scores[row * _SPAN + place], wide)
                T.buffer_store(mixed, value, index)

    def mix_seen(
        mixed: Any, scores: Any, v: Any, head: Any, block: Any, place: Any, i: Any, past: Any, first: Any
    ) -> None:
        """The same where some tokens are too early: what they must not see may be infinite."""
        for row in range(queries):
            seen = block * LANES + place <= T.Cast("int64", past[0]) + token(first, row)
            with T.If(seen), T.Then():
                mix(mixed, scores, v, head, block, place, i, [row])

    def back(mixed: Any, out: Any, i: Any) -> None:
        for part in range(sums):
            for row in range(queries):
                value = T.BufferLoad(mixed, [at((part * queries + row) * wide, wide)])
                T.buffer_store(out, value, [at(row * size + i + part * wide, wide)])

    @T.prim_func(s_tir=True, private=True)
    def attend(var_q: T.handle, var_p: T.handle, var_k: T.handle, var_v: T.handle, var_y: T.handle) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.match_buffer(var_q, (1, count, heads, size), "float32")
        past = T.match_buffer(var_p, (1,), "int32")
        k = T.match_buffer(var_k, (kv_heads, blocks, size, LANES), dtype)
        v = T.match_buffer(var_v, (kv_heads, blocks, LANES, size), dtype)
        y = T.match_buffer(var_y, (1, count, heads, size), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for task in T.parallel(kv_heads * ((count + (together - 1)) // together)):
                first = T.alloc_buffer((1,), "int64")
                end = T.alloc_buffer((1,), "int64")
                ends = T.alloc_buffer((2,), "int64")  # in a span: of what all tokens see, and of all
                best = T.alloc_buffer((queries,), "float32")
                fade = T.alloc_buffer((queries,), "float32")
                total = T.alloc_buffer((queries * LANES,), "float32")
                dots = T.alloc_buffer((queries * near * LANES,), "float32")
                scores = T.alloc_buffer((queries * _SPAN,), "float32")
                mixed = T.alloc_buffer((queries * sums * wide,), "float32")
                out = T.alloc_buffer((queries * size,), "float32")
                first[0] = T.Cast("int64", task // kv_heads * together)
                end[0] = T.Cast("int64", past[0]) + T.min(first[0] + together, count)
                clear(best, total)
                for i in T.serial(queries * size // wide):
                    out[at(i * wide, wide)] = spread(T.float32(0), wide)
                for span in T.serial((end[0] + (_SPAN - 1)) // _SPAN):
                    for some in T.serial(_BLOCKS // near):
                        block = span * _BLOCKS + some * near
                        for row in T.unroll(queries * near):
                            dots[at(row * LANES)] = spread(T.float32(0))
                        for i in T.serial(size):
                            multiply(q, k, dots, task % kv_heads, first[0], block, (end[0] - 1) // LANES, i)
                        score(dots, scores, past, first[0], block)
                    weigh(scores, best, total, fade)
                    ends[1] = T.min(_SPAN, end[0] - span * _SPAN)
                    ends[0] = T.max(0, T.min(ends[1], T.Cast("int64", past[0]) + first[0] + 1 - span * _SPAN))
                    for i in T.serial(size // (wide * sums)):
                        fold(mixed, out, fade, i * wide * sums)
                        for place in T.serial(ends[0]):
                            mix(mixed, scores, v, task % kv_heads, span * _BLOCKS, place, i * wide * sums)
                        for place in T.serial(ends[0], ends[1]):
                            mix_seen(
                                mixed,
                                scores,
                                v,
                                task % kv_heads,
                                span * _BLOCKS,
                                place,
                                i * wide * sums,
                                past,
                                first[0],
                            )
                        back(mixed, out, i * wide * sums)
                for row in T.unroll(queries):
                    if first[0] + row // each < count:
                        for i in T.serial(size // wide):
                            y[0, first[0] + row // each, task % kv_heads * each + row % each, at(i * wide, wide)] = out[
                                at(row * size + i * wide, wide)
                            ] / spread(
                                call("llvm.vector.reduce.fadd", "float32", T.float32(0), total[at(row * LANES)]), wide
                            )

    return attend
