"""What each scale is multiplied by while all are tuned together, and how it is kept where a walk may be stopped."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.quantize.kept import Solutions
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.quantize.solve import PIECE, part
from edgeq.walk.layered import Layered
from edgeq.walk.stepped import Stepped

Quantized = TypeVar("Quantized", bound=Solution | BlockSolution)
_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.99, 1e-12


class Factors:
    """Logarithms of factors, one for each scale of each matrix, with Adam's moments (https://arxiv.org/abs/1412.6980).

    epoch: passes over the text that they have seen, of which `folder` keeps the last. A GGML layout's factors are of
    the scales and minimums of whole blocks, its small integers stay. Raises CorruptInput when what was kept cannot be
    read.
    """

    def __init__(self, solutions: Solutions, names: Sequence[str], folder: Path) -> None:
        self._places, total = dict[str, tuple[int, tuple[int, ...]]](), 0
        for name in names:
            parts = _scales(solutions(name))
            shape = (len(parts), *next(iter(parts.values())).shape)
            self._places[name] = total, shape
            total += math.prod(shape)
        self._kept = Stepped(folder, "tuning", (3, total), lambda: np.zeros((3, total), np.float32))
        self._values = self._kept.values

    @property
    def epoch(self) -> int:
        """Passes over the text that were finished."""
        return self._kept.done

    @property
    def names(self) -> list[str]:
        """Matrices that have factors."""
        return list(self._places)

    @contextmanager
    def passing(self) -> Iterator[None]:
        """A pass over the text: what it finds is kept when the block ends well."""
        with self._kept.step() as self._values:
            yield

    def applied(self, solution: Quantized) -> Quantized:
        """A solution with its scales multiplied."""
        factors = np.exp(self._of(solution.name)[0])
        parts = _scales(solution).items()
        return replace(solution, **{field: each * factor for (field, each), factor in zip(parts, factors, strict=True)})

    def move(
        self,
        model: Layered,
        solution: Solution | BlockSolution,
        inputs: Any,
        slopes: Any,
        rate: float,
        step: int,
    ) -> None:
        """One step of Adam, the `step`th from 1, against the gradient.

        solution: with its factors; inputs, slopes: what the matrix reads, and the gradient at what it writes, tensors
        [tokens, inputs] and [tokens, outputs]. A weight is its scale times something, so the gradient
        of the scale's logarithm is the sum over its weights of the gradient of each times what the scale gives to it.
        """
        values, first, second = self._of(solution.name)
        rows = max(1, PIECE // inputs.shape[1])

        def some(start: int) -> None:
            here = slice(start, start + rows)
            of_weights = (slopes[:, here].T @ inputs).numpy()
            for index, given in enumerate(_given(part(solution, here))):
                of_scales = (of_weights * given).reshape(*first[index, here].shape, -1).sum(axis=2)
                first[index, here] += (1 - _DECAY) * (of_scales - first[index, here])
                second[index, here] += (1 - _SQUARE_DECAY) * (np.square(of_scales) - second[index, here])
                deviation = np.sqrt(second[index, here] / (1 - _SQUARE_DECAY**step)) + _TINY
                values[index, here] -= rate / (1 - _DECAY**step) * first[index, here] / deviation

        model.parallel(some, range(0, slopes.shape[1], rows))

    def _of(self, name: str) -> NDArray[np.float32]:
        """Factors of one matrix and their moments, [3, kinds of scales, outputs, columns]."""
        start, shape = self._places[name]
        return self._values[:, start : start + math.prod(shape)].reshape(3, *shape)


def _scales(solution: Solution | BlockSolution) -> dict[str, NDArray[np.float32]]:
    """Fields of a solution that hold floats."""
    if isinstance(solution, BlockSolution):
        return {"super_scales": solution.super_scales, "super_minimums": solution.super_minimums}
    return {"scales": solution.scales}


def _given(solution: Solution | BlockSolution) -> list[NDArray[np.float32]]:
    """What each of `_scales` gives to the weights, [outputs, inputs]: their sum is the matrix."""
    if isinstance(solution, BlockSolution):
        nothing = np.zeros_like(solution.super_scales)
        kinds = [replace(solution, super_minimums=nothing), replace(solution, super_scales=nothing)]
        return [kind.dequantize() for kind in kinds]
    return [solution.dequantize()]
