"""Quantize a checkpoint's matrices one at a time, by streaming rows; knows recipes, knows no engine."""

from __future__ import annotations

import math
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import GateFailed, UnsupportedModel, UsageFault
from edgeq.machine import physical_cores
from edgeq.quantize import rtn
from edgeq.quantize.solution import Solution
from edgeq.recipe import Recipe
from edgeq.size import TABLES

PIECE = 1 << 22
_LARGEST_ERROR = 4.0


def solve(checkpoint: Checkpoint, recipe: Recipe, name: str) -> Solution:
    """Quantized form of one matrix of a checkpoint.

    Holds the codes (one byte a weight) and some 30 MB per thread. Raises UsageFault when the
    recipe's group does not divide the matrix's inputs, UnsupportedModel when a scale is beyond float16, and GateFailed
    when the result is not the matrix any more: its error, root mean square over that of the weights, is above
    4 / 2**bits. (A step is 2**(1 - bits) of a group's largest weight and the error a step / sqrt(12), so 4 leaves room
    for weights of any likely shape.)
    """
    outputs, inputs = checkpoint.model.tensors()[name]
    if inputs % recipe.group:
        raise UsageFault(
            f"{recipe}: group {recipe.group} does not divide the {inputs} inputs of {name}",
            run="choose a recipe with a smaller group, for example g32",
        )
    bits = recipe.table_bits if name in TABLES else recipe.bits
    codes = np.empty((outputs, inputs), np.uint8)
    scales = np.empty((outputs, inputs // recipe.group), np.float32)
    zero_points = np.empty(scales.shape, np.uint8)
    step = max(1, PIECE // inputs)

    def piece(start: int) -> tuple[float, float]:
        rows = slice(start, min(start + step, outputs))
        weights = checkpoint.rows(name, rows.start, rows.stop)
        codes[rows], scales[rows], zero_points[rows] = rtn.quantize(weights, bits, recipe.group)
        if not np.isfinite(scales[rows]).all():
            raise UnsupportedModel(
                f"{name}: weights up to {np.abs(weights).max():.3g} are too large for {recipe}",
                why="Their scales are beyond float16.",
                run="edgeq build ... --recipe w16",
            )
        made = Solution(name, bits, recipe.group, codes[rows], scales[rows], zero_points[rows]).dequantize()
        return float(np.square(weights - made).sum()), float(np.square(weights).sum())

    with ThreadPoolExecutor(physical_cores()) as pool:
        errors = list(pool.map(piece, range(0, outputs, step)))
    lost, total = (math.fsum(each) for each in zip(*errors, strict=True))
    if not lost <= (_LARGEST_ERROR / 2**bits) ** 2 * total:
        raise GateFailed(
            f"{name}: quantizing to {bits} bits lost {math.sqrt(lost / total):.1%} of the matrix",
            why=f"{bits} bits in groups of {recipe.group} lose at most {_LARGEST_ERROR / 2**bits:.1%} of a real one.",
            run="download the checkpoint again, or choose a recipe with more bits",
        )
    return Solution(name, bits, recipe.group, codes, scales, zero_points)


def rounded(checkpoint: Checkpoint, recipe: Recipe, name: str) -> NDArray[np.float32]:
    """What a recipe makes of one matrix, as float32 [outputs, inputs]."""
    if recipe.bits != 16:
        return solve(checkpoint, recipe, name).dequantize()
    return checkpoint.tensor(name).astype(half(checkpoint, name)).astype(np.float32)


def half(checkpoint: Checkpoint, name: str) -> np.dtype[Any]:
    """The 16-bit type that w16 stores a matrix in: the checkpoint's own, bfloat16 where that is wider."""
    import ml_dtypes

    return np.dtype(np.float16 if checkpoint.dtype(name) == "F16" else ml_dtypes.bfloat16)
