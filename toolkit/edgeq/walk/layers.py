"""One step of the walk: solve a layer's matrices, and advance both models' states through it."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import CorruptInput, GateFailed
from edgeq.quantize import gptq
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solve import joined, require_finite, worst_loss
from edgeq.recipe import Recipe
from edgeq.size import layout_of
from edgeq.walk import head
from edgeq.walk.layered import Layered, give_back
from edgeq.walk.moments import moments, recorded, stages
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
    read: dict[str, NDArray[np.float32]] = {}
    with exact.layer(index):
        exact.advance(index, states.exact_held)
        if recipe.guided:
            assert solutions.folder is not None
            firsts = [names[0] for names in stages(exact, index, states.exact_calibration[0])]
            read = recorded(exact, index, firsts, states.exact_calibration, solutions.folder)
    with quantized.layer(index):
        if recipe.calibrated:
            for names in stages(quantized, index, states.quantized_calibration[0]):
                _solve(quantized, recipe, solutions, states, weights, names, read.pop(names[0], None))
        else:
            for name in quantized.matrices(index):
                quantized.replace(name, solutions.values(name))
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

    def moments(windows: NDArray[np.float32]) -> Any:
        second: Any = torch.zeros(states.shape[2], states.shape[2])
        for window in windows:
            read = model.final_norm(torch.from_numpy(window))
            second.addmm_(read.T, read)
        second.div_(states.shape[0] * states.shape[1])
        if model.checkpoint.model.tied:
            second.diagonal().add_(TABLE_DAMPING * second.diagonal().mean())
        return second

    (second,) = model.parallel(moments, [states])
    solutions.keep(_matrix(model, recipe, name, _curved(model, second, name), None))


def _solve(
    model: Layered,
    recipe: Recipe,
    solutions: Solutions,
    states: States,
    weights: NDArray[np.float32] | None,
    names: Sequence[str],
    exact: NDArray[np.float32] | None,
) -> None:
    """Solve the matrices of one stage, which read the same, and put them into the quantized model's layer.

    exact: what they read in the float model. What the layers before have lost is summed as one matrix passes it on
    where that is smaller.
    """
    import torch

    give_back()
    outputs, inputs = model.checkpoint.model.tensors()[names[0]]
    through = None
    if exact is not None and len(names) == 1 and outputs < inputs:
        through = torch.from_numpy(model.checkpoint.tensor(names[0]))
    second, missed = moments(model, states.layer, names[0], states.quantized_calibration, exact, through, weights)
    del through
    curved = _curved(model, second, names[0])
    for name in names:
        solved = _matrix(model, recipe, name, curved, missed)
        solutions.keep(solved)
        model.replace(name, solved.dequantize())


def _curved(model: Layered, second: Any, name: str) -> gptq.Curvature:
    """Curvature of second moments, found in a thread of one core: the same bits everywhere."""
    import torch

    try:
        (curved,) = model.parallel(gptq.curvature, [second])
    except torch.linalg.LinAlgError as error:
        raise CorruptInput(
            f"what {name} reads is not finite, or all zero", why=str(error), run="download the checkpoint again"
        ) from error
    return curved


def _matrix(model: Layered, recipe: Recipe, name: str, curved: gptq.Curvature, missed: Any) -> Any:
    """Solution of one matrix, rows in parallel; raises GateFailed when it is not the matrix any more.

    missed: second result of `moments`, [outputs, inputs] when it was found through this matrix; None: nothing.
    """
    import torch

    checkpoint = model.checkpoint
    layout = layout_of(checkpoint.model, recipe, name)
    outputs, inputs = checkpoint.model.tensors()[name]
    at_once = PIECE // inputs

    def rows(start: int) -> tuple[Any, float, float]:
        weights = checkpoint.rows(name, start, min(start + at_once, outputs))
        wanted = weights
        if missed is not None:
            less = missed[start : start + at_once] if len(missed) < inputs else torch.from_numpy(weights) @ missed
            wanted = gptq.compensated(weights, less, curved)
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
