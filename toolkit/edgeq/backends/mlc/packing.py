"""Solutions as MLC's words: codes of one row side by side in uint32, the first in the lowest bits.

    2 bits    w = (code - 1) * scale      sixteen codes to a word
    4 bits    w = (code - 7) * scale      eight codes to a word
    8 bits    w = (code - 127) * scale    four codes to a word

Scales of groups lie beside them. MLC's own rounding leaves the last code unused, its kernels do not: a solution whose
middle is one higher fits with codes mirrored and scales negated, (15 - c - 7) * -s = (c - 8) * s.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import UsageFault
from edgeq.quantize.solution import Solution
from edgeq.recipe import run_of

WORD = 32
BLOCK, ROWS = 32, 16
"""Inputs of a block, and rows of a tile, as processors read them."""


def middle(bits: int) -> int:
    """Code that stands for zero."""
    return (1 << (bits - 1)) - 1


def pack(solution: Solution) -> tuple[NDArray[np.uint32], NDArray[np.float32]]:
    """Words [outputs, inputs * bits / 32] and scales [outputs, groups] that dequantize to exactly the solution.

    A column has its scale once for each run of inputs (`recipe.run_of`).
    Raises UsageFault when the solution has zero points, for which the layout has no room.
    """
    if not solution.symmetric:
        raise UsageFault(
            f"{solution.name}: MLC's layout cannot hold this solution",
            why="It has no zero points.",
            run=f"choose a symmetric recipe, for example w{solution.bits}g32-e8-rtn",
        )
    solution = solution.in_groups(run_of(solution.group))
    mirrored = np.uint8((1 << solution.bits) - 1) - solution.codes
    return words(mirrored, solution.bits), -solution.scales


def words(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint32]:
    """Codes [outputs, inputs] below 2**bits as words [outputs, inputs * bits / 32]; a word's codes must fill it."""
    while bits < 8:
        codes, bits = codes[:, ::2] | codes[:, 1::2] << np.uint8(bits), 2 * bits
    return np.ascontiguousarray(codes).view("<u4")


def dequantize(packed: NDArray[np.uint32], scales: NDArray[np.float32], bits: int) -> NDArray[np.float32]:
    """Float32 matrix [outputs, inputs] that words and scales stand for."""
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    codes = (packed[:, :, None] >> shifts) & np.uint32((1 << bits) - 1)
    grouped = codes.reshape(*scales.shape, -1).astype(np.float32) - np.float32(middle(bits))
    return (grouped * scales[:, :, None]).reshape(len(packed), -1)


def in_tiles(values: NDArray[Any], shape: Sequence[int]) -> NDArray[Any]:
    """Words [outputs, inputs * bits / 32] or scales [outputs, groups] as a processor reads them, 16 rows side by side.

    shape: [outputs / 16, inputs / 32, bits, 16] of words, whose word `j` of a block has codes of the inputs 4 j to
    4 j + 3 in its four bytes, from the lowest bits on, and beside each of them the one 4 * bits inputs further, and so
    on; [outputs / 16, groups, 16] of scales.
    """
    if len(shape) == 3:
        return np.ascontiguousarray(values.reshape(-1, ROWS, values.shape[1]).transpose(0, 2, 1))
    tiles, blocks, bits, _ = shape
    each = 8 // bits
    shifts = np.arange(0, WORD, bits, dtype=np.uint32)
    found = np.empty((tiles, blocks, bits, ROWS), np.uint32)
    for tile in range(tiles):
        rows = values[tile * ROWS : (tile + 1) * ROWS, :, None]
        codes = (rows >> shifts & np.uint32((1 << bits) - 1)).astype(np.uint8)
        parts = codes.reshape(ROWS, blocks, each, bits, 4).transpose(2, 1, 3, 0, 4)
        together = np.zeros(parts.shape[1:], np.uint8)
        for part, own in enumerate(parts):
            together |= own << np.uint8(part * bits)
        found[tile] = together.view("<u4")[..., 0]
    return found


def in_rows(values: NDArray[Any]) -> NDArray[Any]:
    """Words or scales in tiles as GPUs read them, [outputs, inputs * bits / 32] or [outputs, groups]."""
    if values.ndim == 3:
        return np.ascontiguousarray(values.transpose(0, 2, 1)).reshape(-1, values.shape[1])
    tiles, blocks, bits, _ = values.shape
    bytes_ = np.ascontiguousarray(values).view(np.uint8).reshape(tiles, blocks, bits, ROWS, 4)
    parts = [bytes_ >> np.uint8(shift) & np.uint8((1 << bits) - 1) for shift in range(0, 8, bits)]
    codes = np.stack(parts).transpose(1, 4, 2, 0, 3, 5)
    return words(np.ascontiguousarray(codes).reshape(tiles * ROWS, blocks * BLOCK), bits)
