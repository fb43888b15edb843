"""What a layer's matrices read: which of them read the same, and its second moments over calibration windows."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

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


def moments(
    name: str,
    index: int,
    exact: tuple[Layered, NDArray[np.float32]] | None,
    quantized: tuple[Layered, NDArray[np.float32]],
    weights: NDArray[np.float32] | None = None,
) -> tuple[Any, Any]:
    """Means of w q q^T and of w (x - q) q^T over all tokens, float32 tensors [inputs, inputs].

    x and q are the inputs of one matrix in the float model and in the quantized one; each model is given with its
    loaded layer's hidden states [windows, length, hidden]. The second mean is None where the float model is not given.
    weights: w of each token, [windows, length]; 1 without.
    """
    import torch

    states = quantized[1]
    inputs = quantized[0].linear(name).in_features
    second: Any = torch.zeros(inputs, inputs)
    cross: Any = torch.zeros(inputs, inputs) if exact else None
    blocks = [slice(start, min(start + _ROWS, inputs)) for start in range(0, inputs, _ROWS)]
    for start in range(0, len(states), AT_ONCE):
        group = range(start, min(start + AT_ONCE, len(states)))
        read = _inputs(*quantized, index, name, group)
        missing = (
            [wanted - found for wanted, found in zip(_inputs(*exact, index, name, group), read, strict=True)]
            if exact
            else []
        )
        if weights is not None:
            for each, window in zip([*read, *missing], [*group, *group], strict=False):
                each *= torch.from_numpy(np.sqrt(weights[window]))[:, None]

        def add(rows: slice, read: Sequence[Any] = read, missing: Sequence[Any] = missing) -> None:
            for found in read:
                second[rows].addmm_(found[:, rows].T, found)
            for found, less in zip(read, missing, strict=False):
                cross[rows].addmm_(less[:, rows].T, found)

        quantized[0].parallel(add, blocks)
    count = states.shape[0] * states.shape[1]
    return second.div_(count), cross.div_(count) if exact else None


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
