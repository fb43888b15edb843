"""The gated delta rule on a processor, states in place."""

from __future__ import annotations

import math
from functools import cache
from typing import Any

from tvm import tirx
from tvm.script import tirx as T

from edgeq.backends.mlc.cpu.lanes import LANES, at, spread

_VECTORS = 4


@cache
def kernel(key_heads: int, value_heads: int, key_size: int, value_size: int) -> Any:
    """What `mlc.delta.kernel` does: a task for each value head and up to 64 columns of its state."""
    each = value_heads // key_heads
    lanes = math.gcd(value_size, LANES)
    vectors = math.gcd(value_size // lanes, _VECTORS)
    wide = lanes * vectors
    batch, n = tirx.Var("batch", "int64"), tirx.Var("n", "int64")

    def forget(held: Any, total: Any, i: Any, decay: Any, k: Any) -> None:
        """State of one key fades; what it says of the key is added to `total`."""
        for vector in range(vectors):
            place, sums = [at(i * wide + vector * lanes, lanes)], [at(vector * lanes, lanes)]
            T.buffer_store(held, T.BufferLoad(held, place) * spread(decay, lanes), place)
            T.buffer_store(total, T.BufferLoad(total, sums) + T.BufferLoad(held, place) * spread(k, lanes), sums)

    def correct(held: Any, total: Any, out: Any, i: Any, k: Any, q: Any) -> None:
        """What the key should have said, less what it said, is learnt; the query's answer is added to `out`."""
        for vector in range(vectors):
            place, sums = [at(i * wide + vector * lanes, lanes)], [at(vector * lanes, lanes)]
            T.buffer_store(held, T.BufferLoad(held, place) + T.BufferLoad(total, sums) * spread(k, lanes), place)
            T.buffer_store(out, T.BufferLoad(out, sums) + T.BufferLoad(held, place) * spread(q, lanes), sums)

    def clear(sums: Any) -> None:
        for vector in range(vectors):
            T.buffer_store(sums, spread(T.float32(0), lanes), [at(vector * lanes, lanes)])

    def copy(held: Any, to: Any, buffer: Any, index: Any) -> None:
        *before, last = index
        for vector in range(vectors):
            value = T.BufferLoad(buffer, [*before, at(last + vector * lanes, lanes)])
            T.buffer_store(held, value, [at(to + vector * lanes, lanes)])

    def keep(buffer: Any, index: Any, held: Any, start: Any) -> None:
        *before, last = index
        for vector in range(vectors):
            value = T.BufferLoad(held, [at(start + vector * lanes, lanes)])
            T.buffer_store(buffer, value, [*before, at(last + vector * lanes, lanes)])

    def miss(total: Any, v: Any, place: Any, t: Any, beta: Any) -> None:
        for vector in range(vectors):
            index = [at(vector * lanes, lanes)]
            value = T.BufferLoad(v, [place[0], t, place[1], at(place[2] + vector * lanes, lanes)])
            T.buffer_store(total, (value - T.BufferLoad(total, index)) * spread(beta, lanes), index)

    @T.prim_func(s_tir=True)
    def scan(
        var_q: T.handle, var_k: T.handle, var_v: T.handle, var_d: T.handle, var_b: T.handle, var_s: T.handle,
        var_o: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.match_buffer(var_q, (batch, n, key_heads, key_size), "float32")
        k = T.match_buffer(var_k, (batch, n, key_heads, key_size), "float32")
        v = T.match_buffer(var_v, (batch, n, value_heads, value_size), "float32")
        decay = T.match_buffer(var_d, (batch, n, value_heads), "float32")
        beta = T.match_buffer(var_b, (batch, n, value_heads), "float32")
        state = T.match_buffer(var_s, (batch, value_heads, key_size, value_size), "float32")
        out = T.match_buffer(var_o, (batch, n, value_heads, value_size), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for task in T.parallel(batch * value_heads * (value_size // wide)):
                held = T.alloc_buffer((key_size * wide,), "float32")
                total = T.alloc_buffer((wide,), "float32")
                sums = T.alloc_buffer((wide,), "float32")
                place = T.alloc_buffer((3,), "int64")
                place[0] = task // (value_heads * (value_size // wide))
                place[1] = task // (value_size // wide) % value_heads
                place[2] = task % (value_size // wide) * wide
                for i in T.serial(key_size):
                    copy(held, i * wide, state, (place[0], place[1], i, place[2]))
                for t in T.serial(n):
                    clear(total)
                    clear(sums)
                    for i in T.serial(key_size):
                        forget(held, total, i, decay[place[0], t, place[1]], k[place[0], t, place[1] // each, i])
                    miss(total, v, place, t, beta[place[0], t, place[1]])
                    for i in T.serial(key_size):
                        correct(
                            held,
                            total,
                            sums,
                            i,
                            k[place[0], t, place[1] // each, i],
                            q[place[0], t, place[1] // each, i],
                        )
                    keep(out, (place[0], t, place[1], place[2]), sums, 0)
                for i in T.serial(key_size):
                    keep(state, (place[0], place[1], i, place[2]), held, i * wide)

    return scan
