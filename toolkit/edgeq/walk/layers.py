"""One step of the walk: solve a layer's matrices, and advance both models' states through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
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
from edgeq.walk.layered import Layered
from edgeq.walk.moments import moments, stages
from edgeq.walk.states import States

_ROWS = 1024


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
    with exact.layer(index), quantized.layer(index):
        if recipe.calibrated:
            for names in stages(quantized, index, states.quantized_calibration[0]):
                _solve(exact, quantized, recipe, solutions, states, weights, names)
        else:
            for name in quantized.matrices(index):
                quantized.replace(name, solutions.values(name))
        for model, held, calibration in (
            (exact, states.exact_held, states.exact_calibration),
            (quantized, states.quantized_held, states.quantized_calibration),
        ):
            model.advance(index, held)
            model.advance(index, calibration)
    states.layer += 1


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
    curved = gptq.curvature(second)
    for name in names:
        solved = _matrix(quantized, checkpoint, recipe, name, curved, cross)
        solutions.keep(solved)
        quantized.replace(name, solved.dequantize())


def _matrix(
    model: Layered, checkpoint: Checkpoint, recipe: Recipe, name: str, curved: gptq.Curvature, cross: Any
) -> Any:
    """Solution of one matrix, rows in parallel; raises GateFailed when it is not the matrix any more."""
    layout = layout_of(checkpoint.model, recipe, name)
    outputs, inputs = checkpoint.model.tensors()[name]

    def rows(start: int) -> tuple[Any, float, float]:
        weights = checkpoint.rows(name, start, min(start + _ROWS, outputs))
        wanted = weights if cross is None else gptq.compensated(weights, cross, curved)
        made = gptq.quantize(wanted, curved, layout, name)
        require_finite(made, weights, recipe)
        lost = gptq.error(wanted, made.dequantize(), curved.hessian)
        return made, lost, gptq.error(wanted, np.zeros_like(wanted), curved.hessian)

    parts, lost, total = zip(*model.parallel(rows, range(0, outputs, _ROWS)), strict=True)
    limit = worst_loss(layout, inputs)
    if not sum(lost) <= limit**2 * sum(total):
        raise GateFailed(
            f"{name}: quantizing to {layout.bits} bits lost {math.sqrt(sum(lost) / sum(total)):.1%} of its output",
            why=f"{layout.bits} bits in groups of {layout.group} lose at most {limit:.1%} of a real one's.",
            run="download the checkpoint again, or choose a recipe with more bits",
        )
    return joined(parts)
