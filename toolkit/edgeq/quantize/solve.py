"""Quantize a checkpoint's matrices one at a time, by streaming rows; knows recipes, knows no engine."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import GateFailed, UnsupportedModel, UsageFault
from edgeq.machine import physical_cores
from edgeq.quantize import ggml, mse, rtn
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.recipe import Layout, Recipe
from edgeq.size import layout_of

PIECE = 1 << 18
"""Weights at a time: temporaries of this size stay in the processor's cache and in memory that is not given back."""
_LARGEST_ERROR, _LOST = 4.0, 0.9


def solve(checkpoint: Checkpoint, recipe: Recipe, name: str) -> Solution | BlockSolution:
    """Quantized form of one matrix of a checkpoint, by a recipe of codes.

    Holds the codes (one byte a weight) and some 5 MB per thread. Raises UsageFault when the
    recipe's group does not divide the matrix's inputs, UnsupportedModel when a scale is beyond float16, and GateFailed
    when the result is not the matrix any more: its error, root mean square over that of the weights, is above
    4 / 2**bits, twice that with one scale for a row, or above 0.9. (A step is 2**(1 - bits) of a group's largest weight
    and the error a step / sqrt(12), so 4 leaves room for weights of any likely shape; the largest weight of a row is
    larger. Zeros instead of the matrix have the error 1.)
    """
    outputs, inputs = checkpoint.model.tensors()[name]
    layout = layout_of(checkpoint.model, recipe, name)
    if inputs % layout.block:
        raise UsageFault(
            f"{recipe}: group {layout.block} does not divide the {inputs} inputs of {name}",
            run="choose a recipe with a smaller group, for example g32",
        )
    step = max(1, PIECE // inputs)

    def piece(start: int) -> tuple[Solution | BlockSolution, float, float]:
        weights = checkpoint.rows(name, start, min(start + step, outputs))
        made = _quantized(weights, layout, recipe.method, name)
        require_finite(made, weights, recipe)
        values = made.dequantize()
        return made, float(np.square(weights - values).sum()), float(np.square(weights).sum())

    lost = total = 0.0
    with ThreadPoolExecutor(physical_cores()) as pool:
        starts = range(0, outputs, step)
        for start, (made, loss, square) in zip(starts, pool.map(piece, starts), strict=True):
            if start == 0:
                whole = _with_rows(made, outputs)
            for field in _arrays(made):
                getattr(whole, field)[start : start + step] = getattr(made, field)
            lost, total = lost + loss, total + square
    limit = worst_loss(layout, inputs)
    if not lost <= limit**2 * total:
        raise GateFailed(
            f"{name}: quantizing to {layout.bits} bits lost {math.sqrt(lost / total):.1%} of the matrix",
            why=f"{layout.bits} bits in groups of {layout.group} lose at most {limit:.1%} of a real one.",
            run="download the checkpoint again, or choose a recipe with more bits",
        )
    return whole


def worst_loss(layout: Layout, inputs: int) -> float:
    """Largest root mean square of an error, relative to what it is an error of, that a layout may leave of a matrix."""
    largest: float = _LARGEST_ERROR / 2**layout.bits * (2 if layout.group == inputs else 1)
    return min(_LOST, largest)


def require_finite(made: Solution | BlockSolution, weights: NDArray[np.float32], recipe: Recipe) -> None:
    """Raise UnsupportedModel when a solution of some weights is not finite."""
    if not all(np.isfinite(getattr(made, field)).all() for field in _arrays(made)):
        raise UnsupportedModel(
            f"{made.name}: weights up to {np.abs(weights).max():.3g} are too large for {recipe}",
            why="Their scales are beyond float16.",
            run="edgeq build ... --recipe w16",
        )


def rounded(checkpoint: Checkpoint, recipe: Recipe, name: str) -> NDArray[np.float32]:
    """What a recipe makes of one matrix, as float32 [outputs, inputs]."""
    if not layout_of(checkpoint.model, recipe, name).is_float:
        return solve(checkpoint, recipe, name).dequantize()
    return as_float(checkpoint, recipe, name, checkpoint.tensor(name)).astype(np.float32)


def as_float(checkpoint: Checkpoint, recipe: Recipe, name: str, values: NDArray[np.float32]) -> NDArray[Any]:
    """Values of a matrix in a recipe's type of floats; raises UnsupportedModel when that cannot hold them."""
    with np.errstate(over="ignore"):
        stored = values.astype(float_type(checkpoint, recipe, name))
    if not np.isfinite(stored).all():
        raise UnsupportedModel(
            f"{name}: weights up to {np.abs(values).max():.3g} are too large for {recipe}",
            run="edgeq build ... --recipe bf16",
        )
    return stored


def float_type(checkpoint: Checkpoint, recipe: Recipe, name: str) -> np.dtype[Any]:
    """Type that a recipe stores a matrix of floats in; w16: the checkpoint's own, bfloat16 where that is wider."""
    import ml_dtypes

    own = "f16" if checkpoint.dtype(name) == "F16" else "bf16"
    layout = layout_of(checkpoint.model, recipe, name)
    wanted = own if layout.name == "w16" else layout.name
    types: dict[str, Any] = {"f16": np.float16, "bf16": ml_dtypes.bfloat16, "f32": np.float32}
    found: np.dtype[Any] = np.dtype(types[wanted])
    return found


def stored_exactly(checkpoint: Checkpoint, recipe: Recipe, name: str) -> bool:
    """Whether a recipe keeps every value of a matrix."""
    layout = layout_of(checkpoint.model, recipe, name)
    own = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}[checkpoint.dtype(name)]
    return layout.name == "f32" or (layout.is_float and float_type(checkpoint, recipe, name).name == own)


def part(solution: Solution | BlockSolution, rows: slice | NDArray[np.intp]) -> Solution | BlockSolution:
    """Some rows of a solution."""
    return _with(solution, {field: getattr(solution, field)[rows] for field in _arrays(solution)})


def joined(parts: Sequence[Solution | BlockSolution]) -> Solution | BlockSolution:
    """Solution with the rows of several, one below the other."""
    fields = _arrays(parts[0])
    return _with(parts[0], {field: np.concatenate([getattr(each, field) for each in parts]) for field in fields})


def _quantized(weights: NDArray[np.float32], layout: Layout, method: str, name: str) -> Solution | BlockSolution:
    if layout.is_ggml:
        return ggml.unpack(ggml.quantize(weights, layout), layout, name)
    quantize = rtn.quantize if method == "rtn" else mse.quantize
    made = quantize(weights, layout.bits, layout.group, symmetric=layout.symmetric)
    return Solution(name, layout.bits, layout.group, *made)


def _with_rows(made: Solution | BlockSolution, outputs: int) -> Solution | BlockSolution:
    """Room for a solution like another one, with so many outputs."""
    like: dict[str, NDArray[Any]] = {field: getattr(made, field) for field in _arrays(made)}
    return _with(made, {field: np.empty((outputs, *rows.shape[1:]), rows.dtype) for field, rows in like.items()})


def _with(made: Solution | BlockSolution, arrays: dict[str, Any]) -> Solution | BlockSolution:
    return dataclasses.replace(made, **arrays)


def _arrays(made: Solution | BlockSolution) -> list[str]:
    """Fields of a solution that have a row for each output."""
    return [field.name for field in dataclasses.fields(made) if getattr(getattr(made, field.name), "ndim", 0) == 2]
