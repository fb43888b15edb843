"""Matrices in tiles of 16 rows, times activations that are rounded to 8 bits in groups of 32.

Products are summed in integers over 32 inputs, then scaled: sum of scale * x scale * sum (code - middle) * x.
"""

from __future__ import annotations

from functools import cache
from typing import Any

import tvm
from tvm import tirx
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from edgeq.backends.mlc.cpu.lanes import LANES, Dot, Pairs, at, call, dot, is_one, prefetch, spread, tokens
from edgeq.backends.mlc.packing import BLOCK, middle

_BYTE = 8
_ALL_BYTES = 0x01010101
_SMALLEST = 1e-37  # scale with a finite inverse
_WORDS = BLOCK // 4  # of activations in a block
_AHEAD = 32  # lines of a cache, 2 KB: processors fetch ahead by themselves too, but stop where pages end


def matmul(x: Tensor, words: Tensor, scales: Tensor, bits: int) -> Tensor:
    """x [1, n, inputs] times the transpose of a matrix in tiles, float32 [1, n, outputs].

    words: uint32 [outputs / 16, inputs / 32, bits, 16]; scales [outputs / 16, groups, 16].
    """
    _, n, inputs = x.shape
    outputs = int(words.shape[0]) * LANES
    rounded = op.tensor_ir_op(
        _rounding(int(inputs), middle(bits), one=is_one(n)),
        "rounded",
        [x],
        [
            Tensor.placeholder([n, int(inputs) // 4], "int32"),
            Tensor.placeholder([n, int(inputs) // BLOCK], "float32"),
            Tensor.placeholder([n, int(inputs) // BLOCK], "int32"),
        ],
    )
    how = dot(tvm.target.Target.current(allow_none=False))
    groups, kind = int(scales.shape[1]), str(scales.dtype)
    product = _product(how, int(inputs), outputs, bits, groups, kind, one=is_one(n))
    out = Tensor.placeholder([1, n, outputs], "float32")
    return op.tensor_ir_op(product, f"matmul_{bits}_bits", [*rounded, words, scales], out)


def take(words: Tensor, scales: Tensor, ids: Tensor, bits: int) -> Tensor:
    """Rows `ids` int32 [n] of a matrix in tiles, float32 [n, inputs]."""
    inputs = int(words.shape[1]) * BLOCK
    out = Tensor.placeholder([ids.shape[0], inputs], "float32")
    tiles, blocks, groups = int(words.shape[0]), int(words.shape[1]), int(scales.shape[1])
    rows = _rows(tiles, blocks, bits, groups, str(scales.dtype))
    return op.tensor_ir_op(rows, f"take_{bits}_bits", [words, scales, ids], out)


@cache
def _rounding(inputs: int, zero: int, *, one: bool) -> Any:
    """x to words of four int8, scales, and for each group the integer that its products begin with: -zero * sum."""
    count, loop = tokens(one=one)

    @T.prim_func(s_tir=True, private=True)
    def rounded(var_x: T.handle, var_q: T.handle, var_s: T.handle, var_b: T.handle) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        x = T.match_buffer(var_x, (1, count, inputs), "float32")
        q = T.match_buffer(var_q, (count, inputs // 4), "int32")
        s = T.match_buffer(var_s, (count, inputs // BLOCK), "float32")
        b = T.match_buffer(var_b, (count, inputs // BLOCK), "int32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in loop(count):
                scale = T.alloc_buffer((2,), "float32")
                whole = T.alloc_buffer((LANES,), "int32")
                total = T.alloc_buffer((LANES,), "int32")
                for block in T.serial(inputs // BLOCK):
                    scale[0] = _largest(x[0, t, at(block * BLOCK)], x[0, t, at(block * BLOCK + LANES)]) * T.float32(
                        1 / 127
                    )
                    scale[1] = T.if_then_else(scale[0] < T.float32(_SMALLEST), T.float32(0), T.float32(1) / scale[0])
                    s[t, block] = scale[0]
                    total[at(0)] = spread(T.int32(0))
                    for half in T.unroll(2):
                        whole[at(0)] = _rint(x[0, t, at(block * BLOCK + half * LANES)] * spread(scale[1]))
                        total[at(0)] = total[at(0)] + whole[at(0)]
                        q[t, at(block * _WORDS + half * 4, 4)] = T.reinterpret(
                            "int32x4", T.Cast("int8x16", whole[at(0)])
                        )
                    b[t, block] = call("llvm.vector.reduce.add", "int32", total[at(0)]) * T.int32(-zero)

    return rounded


def _largest(low: Any, high: Any) -> Any:
    """The largest magnitude in two vectors, NaN for an infinity. Bits of magnitudes are ordered as they are."""
    words = f"int32x{LANES}"
    low, high = (T.reinterpret(words, each) & spread(T.int32(0x7FFFFFFF)) for each in (low, high))
    found = call("llvm.vector.reduce.smax", "int32", T.max(low, high))
    return T.reinterpret("float32", T.if_then_else(found < T.int32(0x7F800000), found, T.int32(0x7FC00000)))


def _rint(x: Any) -> Any:
    return T.Cast(f"int32x{LANES}", call("llvm.nearbyint", f"float32x{LANES}", x))


@cache
def _product(how: Dot, inputs: int, outputs: int, bits: int, groups: int, dtype: str, *, one: bool) -> Any:
    """Rows in parallel, unpacked once for `how.tokens` tokens: a vector of them, or for one token a tile."""
    count, _ = tokens(one=one)
    together = 1 if one else how.tokens
    blocks, lanes = inputs // BLOCK, how.lanes
    each = blocks // groups
    many = LANES if one else lanes
    parts = range(0, many, lanes)

    def fetch(w: Any, row: Any, block: Any) -> None:
        """What is read next, where weights are read once and memory is what is waited for."""
        if one:
            for word in range(bits):
                prefetch(w, row // LANES, block + _AHEAD // bits, word, 0)

    def unpack(codes: Any, w: Any, row: Any, block: Any) -> None:
        """Codes of a block, a vector for each word of activations."""
        for word in range(_WORDS):
            packed = w[row // LANES, block, word % bits, at(row % LANES, many)]
            mask = spread(T.uint32(((1 << bits) - 1) * _ALL_BYTES), many)
            only = packed if bits == _BYTE else packed >> spread(T.uint32(word // bits * bits), many) & mask
            T.buffer_store(codes, only, [at(word * many, many)])

    def add(acc: Any, codes: Any, q: Any, s: Any, b: Any, c: Any, place: Any, t: Any, row: Any, block: Any) -> None:
        """Add a block's products to one token's sums, at `place`."""
        for part in parts:
            pairs = [(codes[at(word * many + part, lanes)], q[t, block * _WORDS + word]) for word in range(_WORDS)]
            sums = _sums(how, bits, b[t, block], pairs)
            scales = c[row // LANES, block // each, at(row % LANES + part, lanes)]
            scale = T.Cast(f"float32x{lanes}", scales) * spread(s[t, block], lanes)
            index = [at(place * many + part, lanes)]
            T.buffer_store(acc, T.BufferLoad(acc, index) + T.Cast(f"float32x{lanes}", sums) * scale, index)

    @T.prim_func(s_tir=True, private=True)
    def product(
        var_q: T.handle, var_s: T.handle, var_b: T.handle, var_w: T.handle, var_c: T.handle, var_y: T.handle
    ) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        q = T.match_buffer(var_q, (count, inputs // 4), "int32")
        s = T.match_buffer(var_s, (count, blocks), "float32")
        b = T.match_buffer(var_b, (count, blocks), "int32")
        w = T.match_buffer(var_w, (outputs // LANES, blocks, bits, LANES), "uint32")
        c = T.match_buffer(var_c, (outputs // LANES, groups, LANES), dtype)
        y = T.match_buffer(var_y, (1, count, outputs), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for piece in T.parallel(outputs // many):
                codes = T.alloc_buffer((_WORDS * many,), "uint32")
                acc = T.alloc_buffer((together * many,), "float32")
                for first in T.serial((count + (together - 1)) // together):
                    for t in T.unroll(together):
                        acc[at(t * many, many)] = spread(T.float32(0), many)
                    for block in T.serial(blocks):
                        fetch(w, piece * many, block)
                        unpack(codes, w, piece * many, block)
                        for t in T.unroll(together):
                            add(acc, codes, q, s, b, c, t, T.min(first * together + t, count - 1), piece * many, block)
                    for t in T.unroll(together):
                        if first * together + t < count:
                            y[0, first * together + t, at(piece * many, many)] = acc[at(t * many, many)]

    return product


def _sums(how: Dot, bits: int, start: Any, pairs: Pairs) -> Any:
    """Products of a block, summed in integers; codes that are too wide for the processor in two halves."""
    start = spread(start, how.lanes)
    if bits <= how.bits:
        return how.add(start, pairs)
    nibble, half = spread(T.uint32(0x0F * _ALL_BYTES), how.lanes), spread(T.uint32(4), how.lanes)
    low = how.add(start, [(code & nibble, x) for code, x in pairs])
    high = how.add(spread(T.int32(0), how.lanes), [(code >> half & nibble, x) for code, x in pairs])
    return low + (high << spread(T.int32(4), how.lanes))


@cache
def _rows(tiles: int, blocks: int, bits: int, groups: int, dtype: str) -> Any:
    count = tirx.Var("count", "int64")

    def value(w: Any, c: Any, row: Any, i: Any) -> Any:
        tile, lane, word = row // LANES, row % LANES, i % BLOCK // 4
        packed = w[tile, i // BLOCK, word % bits, lane]
        shift = T.Cast("uint32", word // bits * bits + i % 4 * _BYTE)
        code = packed >> shift & T.uint32((1 << bits) - 1)
        scale = T.Cast("float32", c[tile, i // BLOCK // (blocks // groups), lane])
        return (T.Cast("float32", code) - T.float32(middle(bits))) * scale

    @T.prim_func(s_tir=True, private=True)
    def rows(var_w: T.handle, var_c: T.handle, var_ids: T.handle, var_x: T.handle) -> None:
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        w = T.match_buffer(var_w, (tiles, blocks, bits, LANES), "uint32")
        c = T.match_buffer(var_c, (tiles, groups, LANES), dtype)
        ids = T.match_buffer(var_ids, (count,), "int32")
        x = T.match_buffer(var_x, (count, blocks * BLOCK), "float32")
        with T.sblock("root"):
            T.reads()
            T.writes()
            for t in T.serial(count):
                for i in T.serial(blocks * BLOCK):
                    x[t, i] = value(w, c, ids[t], i)

    return rows
