"""GGML's layouts beyond one scale for each group: rounded by ggml itself, taken apart, and put together again.

A block's bytes (ggml's `ggml-common.h`), d and m being float16:

    q4_1      d m      16 bytes of codes                                w = d * code + m
    q5_0      d        4 bytes of fifth bits, 16 of codes               w = d * (code - 16)
    q5_1      d m      the same                                         w = d * code + m
    iq4_nl    d        16 bytes of codes                                w = d * levels[code]
    iq4_xs    d        6 bytes of scales, 128 of codes                  w = d * (scale - 32) * levels[code]
    q2_k               16 bytes of scales, 64 of codes, d m             w = d * scale * code - m * minimum
    q3_k               32 bytes of third bits, 64 of codes, 12 of scales, d     w = d * (scale - 32) * (code - 4)
    q4_k      d m      12 bytes of scales, 128 of codes                 w = d * scale * code - m * minimum
    q5_k      d m      12 bytes of scales, 32 of fifth bits, 128 codes  the same
    q6_k               128 bytes of codes, 64 of upper bits, 16 of scales, d    w = d * scale * (code - 32)
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import MissingTool, UnsupportedModel, UsageFault
from edgeq.quantize.solution import BlockSolution
from edgeq.recipe import Layout

Bytes = NDArray[Any]

_UNEVEN = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
_LEVELS = {
    "iq4_nl": _UNEVEN,
    "iq4_xs": _UNEVEN,
    "q5_0": np.arange(-16, 16, dtype=np.float32),
    "q3_k": np.arange(-4, 4, dtype=np.float32),
    "q6_k": np.arange(-32, 32, dtype=np.float32),
}


def quantize(weights: NDArray[np.float32], layout: Layout, importance: NDArray[np.float32] | None = None) -> Bytes:
    """Rows [outputs, bytes] of a matrix as ggml rounds it; needs llama-cpp-python's library.

    importance: weight of each input's squared error, float32 [inputs]; ggml's own guess from the weights without it.
    Raises MissingTool where the library is absent, UsageFault when the block does not divide the inputs: ggml would cut
    the rest off; UnsupportedModel for weights or importances that are not finite: ggml would make them so.
    """
    try:
        import llama_cpp
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingTool(f"rounding to {layout.name} is done by ggml", run="pip install 'edgeq[llamacpp]'") from error
    from gguf import GGMLQuantizationType

    outputs, inputs = weights.shape
    if inputs % layout.block:
        raise UsageFault(f"{layout.name}: blocks of {layout.block} do not divide {inputs} inputs")
    for values in (weights, importance):
        if values is not None and not np.isfinite(values).all():
            raise UnsupportedModel(f"{layout.name}: weights are not finite", run="download the checkpoint again")
    weights = np.ascontiguousarray(weights)
    if importance is not None:
        importance = np.ascontiguousarray(importance, np.float32)
        assert importance.shape == (inputs,)
    packed = np.empty((outputs, inputs // layout.block * layout.bits_of_block // 8), np.uint8)
    chunk = llama_cpp.llama_cpp._lib.ggml_quantize_chunk
    chunk.restype = ctypes.c_size_t
    chunk.argtypes = [ctypes.c_int, *[ctypes.c_void_p] * 2, *[ctypes.c_int64] * 3, ctypes.c_void_p]
    kind = GGMLQuantizationType[layout.name.upper()]
    given = None if importance is None else importance.ctypes.data
    written = chunk(kind, weights.ctypes.data, packed.ctypes.data, 0, outputs, inputs, given)
    assert written == packed.nbytes
    return packed


def unpack(packed: Bytes, layout: Layout, name: str) -> BlockSolution:
    """Solution that rows of bytes stand for."""
    outputs = len(packed)
    parts = _READ[layout.name](packed.reshape(outputs, -1, layout.bits_of_block // 8))
    return BlockSolution(
        name=name,
        layout=layout,
        levels=_LEVELS.get(layout.name, np.arange(1 << layout.bits, dtype=np.float32)),
        codes=parts.codes.reshape(outputs, -1),
        scales=parts.scales.astype(np.int16).reshape(outputs, -1),
        minimums=parts.minimums.astype(np.int16).reshape(outputs, -1),
        super_scales=parts.d.astype(np.float32),
        super_minimums=parts.m.astype(np.float32),
    )


def pack(solution: BlockSolution, rows: slice = slice(None)) -> Bytes:
    """Rows [outputs, bytes] that dequantize to exactly the solution, or to some rows of it."""
    d = solution.super_scales[rows].astype(np.float16)
    parts = _Parts(
        codes=solution.codes[rows].reshape(*d.shape, -1),
        scales=solution.scales[rows].reshape(*d.shape, -1),
        minimums=solution.minimums[rows].reshape(*d.shape, -1),
        d=d,
        m=solution.super_minimums[rows].astype(np.float16),
    )
    return np.concatenate(_WRITE[solution.layout.name](parts), axis=2).reshape(len(d), -1)


class _Parts(NamedTuple):
    """Blocks taken apart, each array [outputs, blocks, ...]."""

    codes: Bytes
    scales: NDArray[Any]
    minimums: NDArray[Any]
    d: NDArray[np.float16]
    m: NDArray[np.float16]


def _read_q4_1(blocks: Bytes) -> _Parts:
    return _one_step(_halves(blocks[:, :, 4:], 16), blocks[:, :, :2], blocks[:, :, 2:4])


def _write_q4_1(parts: _Parts) -> list[Bytes]:
    return [_bytes(parts.d), _bytes(-parts.m), _joined(parts.codes, 16)]


def _read_q5_0(blocks: Bytes) -> _Parts:
    return _one_step(_halves(blocks[:, :, 6:], 16) | _fifth(blocks[:, :, 2:6]), blocks[:, :, :2])


def _write_q5_0(parts: _Parts) -> list[Bytes]:
    return [_bytes(parts.d), _spread(parts.codes >> 4, 8, 1), _joined(parts.codes & 15, 16)]


def _read_q5_1(blocks: Bytes) -> _Parts:
    return _one_step(_halves(blocks[:, :, 8:], 16) | _fifth(blocks[:, :, 4:8]), blocks[:, :, :2], blocks[:, :, 2:4])


def _write_q5_1(parts: _Parts) -> list[Bytes]:
    return [_bytes(parts.d), _bytes(-parts.m), _spread(parts.codes >> 4, 8, 1), _joined(parts.codes & 15, 16)]


def _fifth(packed: Bytes) -> Bytes:
    """Fifth bits of codes, the first code's lowest."""
    return _rows(packed[:, :, :, None] >> np.arange(8, dtype=np.uint8) & 1) << np.uint8(4)


def _one_step(codes: Bytes, d: Bytes, m: Bytes | None = None) -> _Parts:
    """Parts of blocks that have one step, and one minimum or none."""
    ones, step = np.ones((*codes.shape[:2], 1), np.uint8), _float16(d)
    if m is None:
        return _Parts(codes, ones, 0 * ones, step, np.zeros_like(step))
    return _Parts(codes, ones, ones, step, -_float16(m))


def _read_iq4_nl(blocks: Bytes) -> _Parts:
    return _one_step(_halves(blocks[:, :, 2:], 16), blocks[:, :, :2])


def _write_iq4_nl(parts: _Parts) -> list[Bytes]:
    return [_bytes(parts.d), _joined(parts.codes, 16)]


def _read_iq4_xs(blocks: Bytes) -> _Parts:
    """Scales have 6 bits: the lower four of a pair in a byte, the upper two of all eight in 16 bits."""
    d, upper = _float16(blocks[:, :, :2]), blocks[:, :, 2:4, None] >> np.arange(0, 8, 2, dtype=np.uint8) & 3
    lower = blocks[:, :, 4:8, None] >> np.array([0, 4], np.uint8) & 15
    scales = (_rows(lower) | _rows(upper) << 4).astype(np.int16) - 32
    return _Parts(_halves(blocks[:, :, 8:], 16), scales, 0 * scales, d, np.zeros_like(d))


def _write_iq4_xs(parts: _Parts) -> list[Bytes]:
    scales = (parts.scales + 32).astype(np.uint8)
    upper, lower = _spread(scales >> 4, 4, 2), _spread(scales & 15, 2, 4)
    return [_bytes(parts.d), upper, lower, _joined(parts.codes, 16)]


def _read_q2_k(blocks: Bytes) -> _Parts:
    scales, codes = blocks[:, :, :16], _quarters(blocks[:, :, 16:80])
    return _Parts(codes, scales & 15, scales >> 4, _float16(blocks[:, :, 80:82]), _float16(blocks[:, :, 82:]))


def _write_q2_k(parts: _Parts) -> list[Bytes]:
    scales = (parts.scales | parts.minimums << 4).astype(np.uint8)
    return [scales, _joined_quarters(parts.codes), _bytes(parts.d), _bytes(parts.m)]


def _read_q3_k(blocks: Bytes) -> _Parts:
    """Scales have 6 bits: lower four as halves of 8 bytes, upper two as quarters of 4."""
    third = blocks[:, :, None, :32] >> np.arange(8, dtype=np.uint8)[:, None] & 1
    lower, upper = blocks[:, :, 96:104], blocks[:, :, None, 104:108] >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3
    scales = (_halves(lower, 8) | _rows(upper) << 4).astype(np.int16) - 32
    d = _float16(blocks[:, :, 108:])
    return _Parts(_quarters(blocks[:, :, 32:96]) | _rows(third) << 2, scales, 0 * scales, d, np.zeros_like(d))


def _write_q3_k(parts: _Parts) -> list[Bytes]:
    third = (parts.codes >> 2).reshape(*parts.d.shape, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    scales = (parts.scales + 32).astype(np.uint8)
    upper = (scales >> 4).reshape(*parts.d.shape, 4, 4) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return [
        np.bitwise_or.reduce(third, axis=2),
        _joined_quarters(parts.codes & 3),
        _joined(scales & 15, 8),
        np.bitwise_or.reduce(upper, axis=2),
        _bytes(parts.d),
    ]


def _read_q4_k(blocks: Bytes) -> _Parts:
    return _read_scales(blocks, _halves(blocks[:, :, 16:], 32))


def _write_q4_k(parts: _Parts) -> list[Bytes]:
    return [*_write_scales(parts), _joined(parts.codes, 32)]


def _read_q5_k(blocks: Bytes) -> _Parts:
    fifth = blocks[:, :, 16:48, None] >> np.arange(8, dtype=np.uint8) & 1
    return _read_scales(blocks, _halves(blocks[:, :, 48:], 32) | _rows(fifth.swapaxes(2, 3)) << 4)


def _write_q5_k(parts: _Parts) -> list[Bytes]:
    fifth = (parts.codes >> 4).reshape(*parts.d.shape, 8, 32) << np.arange(8, dtype=np.uint8)[:, None]
    return [*_write_scales(parts), np.bitwise_or.reduce(fifth, axis=2), _joined(parts.codes & 15, 32)]


def _read_scales(blocks: Bytes, codes: Bytes) -> _Parts:
    """Eight scales and eight minimums of 6 bits: the upper two bits of the last four lie above the first four."""
    first, second, rest = (blocks[:, :, start : start + 4] for start in (4, 8, 12))
    scales = np.concatenate([first & 63, rest & 15 | first >> 2 & 48], axis=2)
    minimums = np.concatenate([second & 63, rest >> 4 | second >> 2 & 48], axis=2)
    return _Parts(codes, scales, minimums, _float16(blocks[:, :, :2]), _float16(blocks[:, :, 2:4]))


def _write_scales(parts: _Parts) -> list[Bytes]:
    scales, minimums = parts.scales.astype(np.uint8), parts.minimums.astype(np.uint8)
    first, second = (each[:, :, :4] | each[:, :, 4:] >> 4 << 6 for each in (scales, minimums))
    return [_bytes(parts.d), _bytes(parts.m), first, second, scales[:, :, 4:] & 15 | minimums[:, :, 4:] << 4]


def _read_q6_k(blocks: Bytes) -> _Parts:
    scales, d = blocks[:, :, 192:208].view(np.int8), _float16(blocks[:, :, 208:])
    return _Parts(
        _halves(blocks[:, :, :128], 64) | _quarters(blocks[:, :, 128:192]) << 4, scales, 0 * scales, d, np.zeros_like(d)
    )


def _write_q6_k(parts: _Parts) -> list[Bytes]:
    scales = parts.scales.astype(np.int8).view(np.uint8)
    return [_joined(parts.codes & 15, 64), _joined_quarters(parts.codes >> 4), scales, _bytes(parts.d)]


def _halves(blocks: Bytes, width: int) -> Bytes:
    """Codes of 4 bits: of each run of `width` bytes all lower halves, then all upper ones."""
    runs = blocks.reshape(*blocks.shape[:2], -1, 1, width)
    return _rows(np.concatenate([runs & 15, runs >> 4], axis=3))


def _joined(codes: Bytes, width: int) -> Bytes:
    runs = codes.reshape(*codes.shape[:2], -1, 2, width)
    return _rows(runs[:, :, :, 0] | runs[:, :, :, 1] << 4)


def _quarters(blocks: Bytes) -> Bytes:
    """Codes of 2 bits: of each run of 32 bytes all lowest quarters, then all second ones, and so on."""
    runs = blocks.reshape(*blocks.shape[:2], -1, 1, 32)
    return _rows(runs >> np.arange(0, 8, 2, dtype=np.uint8)[:, None] & 3)


def _joined_quarters(codes: Bytes) -> Bytes:
    runs = codes.reshape(*codes.shape[:2], -1, 4, 32) << np.arange(0, 8, 2, dtype=np.uint8)[:, None]
    return _rows(np.bitwise_or.reduce(runs, axis=3))


def _spread(values: Bytes, each: int, bits: int) -> Bytes:
    """Small numbers side by side in bytes, `each` of so many `bits`, the first in the lowest."""
    runs = values.reshape(*values.shape[:2], -1, each) << np.arange(0, 8, bits, dtype=np.uint8)
    spread: Bytes = np.bitwise_or.reduce(runs, axis=3)
    return spread


def _rows(values: Bytes) -> Bytes:
    """All that belongs to one block on one axis: [outputs, blocks, n]."""
    return values.reshape(*values.shape[:2], -1)


def _float16(pairs: Bytes) -> NDArray[np.float16]:
    return np.ascontiguousarray(pairs).view("<f2")[..., 0]


def _bytes(values: NDArray[np.float16]) -> Bytes:
    return values.astype("<f2")[..., None].view(np.uint8)


_READ = {
    "q2_k": _read_q2_k,
    "q3_k": _read_q3_k,
    "iq4_xs": _read_iq4_xs,
    "q4_1": _read_q4_1,
    "q5_0": _read_q5_0,
    "q5_1": _read_q5_1,
    "iq4_nl": _read_iq4_nl,
    "q4_k": _read_q4_k,
    "q5_k": _read_q5_k,
    "q6_k": _read_q6_k,
}
_WRITE = {
    "q2_k": _write_q2_k,
    "q3_k": _write_q3_k,
    "iq4_xs": _write_iq4_xs,
    "q4_1": _write_q4_1,
    "q5_0": _write_q5_0,
    "q5_1": _write_q5_1,
    "iq4_nl": _write_iq4_nl,
    "q4_k": _write_q4_k,
    "q5_k": _write_q5_k,
    "q6_k": _write_q6_k,
}
