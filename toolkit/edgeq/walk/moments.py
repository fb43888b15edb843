"""What a layer's matrices read: which of them read the same, and its second moments over calibration windows."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.walk import scratch
from edgeq.walk.layered import Layered

_ROWS = 1024
AT_ONCE = 4
"""Windows whose inputs are held together."""


class _Reached(Exception):
    """Carries the input of a module out of a run that needs to go no further."""

    def __init__(self, values: Any) -> None:
        self.values = values


def stages(model: Layered, index: int, window: NDArray[np.float32]) -> list[list[str]]:
    """Names of a loaded layer's matrices in the order of the forward pass, those that read one tensor together."""
    import torch

    found: list[tuple[Any, list[str]]] = []

    def note(name: str, values: Any) -> None:
        if found and found[-1][0] is values:
            found[-1][1].append(name)
        else:
            found.append((values, [name]))

    hooks = [
        model.linear(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name in model.matrices(index)
    ]
    model.parallel(lambda hidden: model.run(index, torch.from_numpy(hidden)), [window])
    for hook in hooks:
        hook.remove()
    return [names for _, names in found]


def recorded(
    model: Layered, index: int, names: Sequence[str], states: NDArray[np.float32], folder: Path
) -> dict[str, NDArray[np.float32]]:
    """What some matrices of a loaded layer read while it advances states [windows, length, hidden], which it replaces.

    Arrays [windows, length, inputs] in files of `folder` that go with them.
    """
    import torch

    found = {name: scratch.unnamed(folder, (*states.shape[:2], model.linear(name).in_features)) for name in names}
    windows: dict[int, int] = {}

    def note(name: str, values: Any) -> None:
        found[name][windows[threading.get_ident()]] = values[0].numpy()

    def step(window: int) -> None:
        windows[threading.get_ident()] = window
        states[window] = model.run(index, torch.from_numpy(states[window])).numpy()

    hooks = [
        model.linear(name).register_forward_pre_hook(lambda _, inputs, name=name: note(name, inputs[0]))
        for name in names
    ]
    try:
        model.parallel(step, range(len(states)))
    finally:
        for hook in hooks:
            hook.remove()
    return found


def moments(
    model: Layered,
    index: int,
    name: str,
    states: NDArray[np.float32],
    exact: NDArray[np.float32] | None = None,
    through: Any = None,
    weights: NDArray[np.float32] | None = None,
) -> tuple[Any, Any]:
    """Means of w q q^T and of w P (x - q) q^T over all tokens, float32 [inputs, inputs] and [rows of P, inputs].

    q is what one matrix reads in the quantized model, given with its loaded layer's states [windows, length, hidden];
    x is what it reads in the float model, `exact` [windows, length, inputs]: the second mean is None without it.
    through: P, a tensor [any, inputs]; the identity without. weights: w of each token, [windows, length]; 1 without.
    """
    import torch

    inputs = model.linear(name).in_features
    second: Any = torch.zeros(inputs, inputs)
    missed: Any = None if exact is None else torch.zeros(inputs if through is None else len(through), inputs)
    for start in range(0, len(states), AT_ONCE):
        group = range(start, min(start + AT_ONCE, len(states)))
        read = _inputs(model, states, index, name, group)
        less = [] if exact is None else _less(model, [exact[window] for window in group], read, through)
        if weights is not None:
            for values, window in zip([*read, *less], [*group, *group], strict=False):
                values *= torch.from_numpy(np.sqrt(weights[window]))[:, None]
        _add(model, second, read, read)
        if less:
            _add(model, missed, less, read)
    count = states.shape[0] * states.shape[1]
    return second.div_(count), None if missed is None else missed.div_(count)


def _less(model: Layered, exact: Sequence[NDArray[np.float32]], read: Sequence[Any], through: Any) -> list[Any]:
    """What some windows read less than in the float model, as a matrix passes it on."""
    import torch

    def less(pair: tuple[NDArray[np.float32], Any]) -> Any:
        missing = torch.from_numpy(pair[0]) - pair[1]
        return missing if through is None else missing @ through.T

    return model.parallel(less, list(zip(exact, read, strict=True)))


def _add(model: Layered, total: Any, left: Sequence[Any], right: Sequence[Any]) -> None:
    """Add the products left^T right of several windows to a total, some rows in each thread."""

    def add(rows: slice) -> None:
        for one, other in zip(left, right, strict=True):
            total[rows].addmm_(one[:, rows].T, other)

    model.parallel(add, [slice(start, min(start + _ROWS, len(total))) for start in range(0, len(total), _ROWS)])


def _inputs(model: Layered, states: NDArray[np.float32], index: int, name: str, windows: Sequence[int]) -> list[Any]:
    """What one matrix reads in some windows, tensors [length, inputs] of their own."""
    import torch

    def read(window: int) -> Any:
        try:
            model.run(index, torch.from_numpy(states[window]))
        except _Reached as reached:
            return reached.values[0].clone()
        raise AssertionError("the layer ran without its matrix")

    hook = model.linear(name).register_forward_pre_hook(_leave)
    try:
        return model.parallel(read, windows)
    finally:
        hook.remove()


def _leave(_: Any, inputs: Sequence[Any]) -> None:
    raise _Reached(inputs[0])
