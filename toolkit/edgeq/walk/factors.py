"""What each scale is multiplied by while all are tuned together, and how it is kept where a walk may be stopped."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import CorruptInput
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.quantize.solve import PIECE, part
from edgeq.walk import scratch
from edgeq.walk.layered import Layered

Quantized = TypeVar("Quantized", bound=Solution | BlockSolution)
_EPOCH = "tuning.json"
_DECAY, _SQUARE_DECAY, _TINY = 0.9, 0.99, 1e-12


class Factors:
    """Logarithms of factors, one for each scale of each matrix, with Adam's moments (https://arxiv.org/abs/1412.6980).

    epoch: passes over the text that they have seen. A GGML layout's factors are of the scales and minimums of whole
    blocks, its small integers stay.
    """

    def __init__(self, solutions: Solutions, names: Sequence[str]) -> None:
        self.epoch, self._places, total = 0, dict[str, tuple[int, tuple[int, ...]]](), 0
        for name in names:
            parts = _scales(solutions(name))
            shape = (len(parts), *next(iter(parts.values())).shape)
            self._places[name] = total, shape
            total += math.prod(shape)
        self._values: NDArray[np.float32] = np.zeros((3, total), np.float32)

    @property
    def names(self) -> list[str]:
        """Matrices that have factors."""
        return list(self._places)

    def load(self, folder: Path) -> None:
        """Go on with what `save` kept, if anything; raises CorruptInput when it cannot be read."""
        if not (folder / _EPOCH).is_file():
            return
        try:
            self.epoch = int((folder / _EPOCH).read_text())
            values: NDArray[np.float32] = np.load(_path(folder, self.epoch), mmap_mode="c")
            self._values = values.reshape(self._values.shape)
        except (ValueError, TypeError, EOFError, FileNotFoundError) as error:
            raise CorruptInput(
                f"{folder}: not the factors that tuning kept",
                why=str(error),
                run="edgeq build ... again, from the start",
            ) from error

    def begin(self, folder: Path) -> None:
        """Begin a pass: changes go to a file of their own, what `save` kept stays as it is."""
        self._values = scratch.copied(_path(folder, self.epoch + 1), self._values)

    def save(self, folder: Path) -> None:
        """Keep what a pass found, in one step."""
        assert isinstance(self._values, np.memmap)
        self._values.flush()
        self.epoch += 1
        scratch.mark(folder / _EPOCH, self.epoch)

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


def _path(folder: Path, epoch: int) -> Path:
    return folder / f"tuning.{epoch % 2}.npy"
