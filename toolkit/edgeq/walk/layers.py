"""One step of the walk: solve a layer's matrices, and advance both models' states through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import GateFailed
from edgeq.quantize import gptq
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solve import joined, require_finite, worst_loss
from edgeq.recipe import Recipe
from edgeq.size import layout_of
from edgeq.walk import head
from edgeq.walk.layered import Layered
from edgeq.walk.moments import moments, stages
from edgeq.walk.states import States

PIECE = 1 << 22
"""Weights that a thread solves at a time."""
TABLE_DAMPING = 0.1


def step(
    exact: Layered,
    quantized: Layered,
    recipe: Recipe,
    solutions: Solutions,
    states: States,
    weights: NDArray[np.float32] | None,
) -> None:
    """Move `states` one layer on. A calibrated recipe's matrices are solved on the way and kept in `solutions`.

    weights: of each calibration token, [windows, length]; None: all alike.
    """
    index = states.layer
    with ExitStack() as stack:
        if not recipe.guided:
            with exact.layer(index):
                exact.advance(index, states.exact_held)
        else:
            stack.enter_context(exact.layer(index))
        stack.enter_context(quantized.layer(index))
        if recipe.calibrated:
            for names in stages(quantized, index, states.quantized_calibration[0]):
                _solve(exact, quantized, recipe, solutions, states, weights, names)
        else:
            for name in quantized.matrices(index):
                quantized.replace(name, solutions.values(name))
        if recipe.guided:
            exact.advance(index, states.exact_held)
            exact.advance(index, states.exact_calibration)
        quantized.advance(index, states.quantized_held)
        quantized.advance(index, states.quantized_calibration)
    states.layer += 1


def solve_output(model: Layered, recipe: Recipe, solutions: Solutions, states: NDArray[np.float32]) -> None:
    """Solve the output layer for what it reads, states [windows, length, hidden] after the last layer; keep it.

    A tied table's rows are read by tokens too, where every input counts alike: so the second moments get a large part
    of their mean.
    """
    import torch

    name = head.output(model.checkpoint)
    if layout_of(model.checkpoint.model, recipe, name).is_float:
        return

    def curved(windows: NDArray[np.float32]) -> gptq.Curvature:
        second: Any = torch.zeros(states.shape[2], states.shape[2])
        for window in windows:
            read = model.final_norm(torch.from_numpy(window))
            second.addmm_(read.T, read)
        second.div_(states.shape[0] * states.shape[1])
        if model.checkpoint.model.tied:
            second.diagonal().add_(TABLE_DAMPING * second.diagonal().mean())
        return gptq.curvature(second)

    (found,) = model.parallel(curved, [states])
    solutions.keep(_matrix(model, model.checkpoint, recipe, name, found, None))


def _solve(
    exact: Layered,
    quantized: Layered,
    recipe: Recipe,
    solutions: Solutions,
    states: States,
    weights: NDArray[np.float32] | None,
    names: Sequence[str],
) -> None:
    """Solve the matrices of one stage, which read the same, and put them into the quantized model's layer."""
    checkpoint, index = exact.checkpoint, states.layer
    second, cross = moments(
        names[0],
        index,
        (exact, states.exact_calibration) if recipe.guided else None,
        (quantized, states.quantized_calibration),
        weights,
    )
    (curved,) = quantized.parallel(gptq.curvature, [second])  # in a thread of one core: the same bits everywhere
    for name in names:
        solved = _matrix(quantized, checkpoint, recipe, name, curved, cross)
        solutions.keep(solved)
        quantized.replace(name, solved.dequantize())


def _matrix(
    model: Layered,
    checkpoint: Checkpoint,
    recipe: Recipe,
    name: str,
    curved: gptq.Curvature,
    cross: Any,
) -> Any:
    """Solution of one matrix, rows in parallel; raises GateFailed when it is not the matrix any more."""
    layout = layout_of(checkpoint.model, recipe, name)
    outputs, inputs = checkpoint.model.tensors()[name]
    at_once = PIECE // inputs

    def rows(start: int) -> tuple[Any, float, float]:
        weights = checkpoint.rows(name, start, min(start + at_once, outputs))
        wanted = weights if cross is None else gptq.compensated(weights, cross, curved)
        made = gptq.quantize(wanted, curved, layout, name)
        require_finite(made, weights, recipe)
        lost = gptq.error(wanted, made.dequantize(), curved.hessian)
        return made, lost, gptq.error(wanted, np.zeros_like(wanted), curved.hessian)

    parts, lost, total = zip(*model.parallel(rows, range(0, outputs, at_once)), strict=True)
    limit = worst_loss(layout, inputs)
    if not sum(lost) <= limit**2 * sum(total):
        raise GateFailed(
            f"{name}: quantizing to {layout.bits} bits lost {math.sqrt(sum(lost) / sum(total)):.1%} of its output",
            why=f"{layout.bits} bits in groups of {layout.group} lose at most {limit:.1%} of a real one's.",
            run="download the checkpoint again, or choose a recipe with more bits",
        )
    return joined(parts)
