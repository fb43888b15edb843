"""Solutions as GGML's blocks. Plain ones are blocks of 32 weights with a 16-bit scale:

    Q4_0    float16 d, 16 bytes of codes     w = (code - 8) * d
    Q8_0    float16 d, 32 signed bytes       w = code * d

A byte of a 4-bit block holds the code of input i in its lower half and that of input i + 16 in its upper half.
"""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.llamacpp.limits import BLOCK, PLAIN
from edgeq.errors import UsageFault
from edgeq.quantize import ggml
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.recipe import Layout


def format_of(layout: Layout) -> str:
    """GGML's name of a layout of codes."""
    return layout.name.upper() if layout.is_ggml else PLAIN[layout]


def pack(solution: Solution | BlockSolution, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Bytes [outputs, bytes of a row] that dequantize to exactly the solution, or to some rows of it.

    Raises UsageFault when a plain solution has zero points, for which Q4_0 and Q8_0 have no room.
    """
    if isinstance(solution, BlockSolution):
        return ggml.pack(solution, rows)
    scales = solution.scales[rows]
    if (solution.zero_points[rows] != 1 << (solution.bits - 1)).any():
        raise UsageFault(
            f"{solution.name}: llama.cpp cannot hold this solution",
            why="Its plain blocks have no zero points.",
            run=f"choose a symmetric recipe, for example w{solution.bits}g{BLOCK}-e8-rtn",
        )
    codes = solution.codes[rows].reshape(*scales.shape, BLOCK)
    if solution.bits == 8:
        stored = codes ^ np.uint8(0x80)
    else:
        stored = codes[:, :, : BLOCK // 2] | np.left_shift(codes[:, :, BLOCK // 2 :], 4, dtype=np.uint8)
    header = np.ascontiguousarray(scales, "<f2").view(np.uint8).reshape(*scales.shape, 2)
    return np.concatenate([header, stored], axis=2).reshape(len(scales), -1)
