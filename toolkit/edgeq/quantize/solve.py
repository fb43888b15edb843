"""Quantize a checkpoint's matrices one at a time, by streaming rows; knows recipes, knows no engine."""

from __future__ import annotations

import os
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageFault
from edgeq.quantize import rtn
from edgeq.quantize.solution import Solution
from edgeq.recipe import Recipe
from edgeq.size import TABLES

PIECE = 1 << 22


def solve(checkpoint: Checkpoint, recipe: Recipe, name: str) -> Solution:
    """Quantized form of one matrix of a checkpoint.

    Holds the codes (one byte a weight) and about 4 million float32 weights per thread. Raises UsageFault when the
    recipe's group does not divide the matrix's inputs.
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

    def piece(start: int) -> None:
        rows = slice(start, min(start + step, outputs))
        weights = checkpoint.rows(name, rows.start, rows.stop)
        codes[rows], scales[rows], zero_points[rows] = rtn.quantize(weights, bits, recipe.group)

    with ThreadPoolExecutor(os.cpu_count()) as pool:
        list(pool.map(piece, range(0, outputs, step)))
    return Solution(name, bits, recipe.group, codes, scales, zero_points)
