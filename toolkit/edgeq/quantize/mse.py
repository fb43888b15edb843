"""Clipped grids: of some scales for each group, the one whose nearest codes leave the least squared error."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeq.quantize import rtn

_COARSE = (1.0, 0.9, 0.8, 0.65, 0.5, 0.35)
_FINE = (1.04, 0.96)

Grouped = NDArray[np.float32]


def quantize(
    weights: NDArray[np.float32],
    bits: int,
    group: int,
    *,
    symmetric: bool = True,
    importance: NDArray[np.float32] | None = None,
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Codes, scales and zero points of a matrix [outputs, inputs], as `Solution` describes them, on grids by `grid`.

    importance: weight of each input's squared error, float32 [inputs]; all alike without it.
    """
    outputs, inputs = weights.shape
    grouped = weights.reshape(outputs, inputs // group, group)
    weighed = None if importance is None else importance.reshape(-1, group)
    scales, zero_points = grid(grouped, bits, symmetric=symmetric, importance=weighed)
    return rtn.codes(grouped, scales, zero_points, bits).reshape(outputs, inputs), scales, zero_points


def grid(
    grouped: Grouped, bits: int, *, symmetric: bool, importance: NDArray[np.float32] | None = None
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales, float32 [outputs, groups] of float16 values, and zero points, uint8 alike, of [outputs, groups, group].

    importance: weight of each input's squared error, float32 [groups, group] or what broadcasts to it. The start is the
    grid that clips nothing (`rtn.grid`), and what replaces it is better: smaller grids, for the symmetric one of either
    sign, then grids close to the best one, then the scale that is best for the codes in the sense of least squares.
    A scale that is not finite stays so.
    """
    search = _Search(grouped, bits, importance, *rtn.grid(grouped, bits, symmetric=symmetric))
    for scales, zero_points in _shrunk(grouped, bits, search.scales, symmetric=symmetric):
        search.offer(scales, zero_points)
    for factor in _FINE:
        search.offer(rtn.to_float16(search.scales * np.float32(factor)), search.zero_points)
    if not symmetric:
        for step in (1, -1):
            moved = search.zero_points.astype(np.int16) + step
            search.offer(search.scales, np.clip(moved, 0, (1 << bits) - 1).astype(np.uint8))
    for _ in range(2):
        search.offer(search.fitted(), search.zero_points)
    return search.scales, search.zero_points


def _shrunk(
    grouped: Grouped, bits: int, scales: NDArray[np.float32], *, symmetric: bool
) -> Iterator[tuple[NDArray[np.float32], NDArray[np.uint8]]]:
    """Grids that clip more and more of each group."""
    if symmetric:
        middle, start = 1 << (bits - 1), scales.copy()
        zero_points = np.full(scales.shape, middle, np.uint8)
        for factor in _COARSE:
            if factor < 1:
                yield rtn.to_float16(start * np.float32(factor)), zero_points
            yield rtn.to_float16(start * np.float32(-factor * middle / (middle - 1))), zero_points
    else:
        lowest, highest = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
        for factor in _COARSE[1:]:
            yield rtn.spanning(lowest * np.float32(factor), highest * np.float32(factor), bits)


class _Search:
    """The best grid so far of each group, and its error."""

    def __init__(
        self,
        grouped: Grouped,
        bits: int,
        importance: NDArray[np.float32] | None,
        scales: NDArray[np.float32],
        zero_points: NDArray[np.uint8],
    ) -> None:
        self._grouped, self._importance, self._top = grouped, importance, (1 << bits) - 1
        self._steps, self._lost = np.empty_like(grouped), np.empty_like(grouped)
        self.scales, self.zero_points = scales, zero_points
        self._errors = self._error(scales, zero_points)

    def offer(self, scales: NDArray[np.float32], zero_points: NDArray[np.uint8]) -> None:
        """Take other grids where they are better."""
        errors = self._error(scales, zero_points)
        better = errors < self._errors
        for kept, new in ((self.scales, scales), (self.zero_points, zero_points), (self._errors, errors)):
            np.copyto(kept, new, where=better)

    def fitted(self) -> NDArray[np.float32]:
        """Scales that are best for the codes of the present ones: sum(w q) / sum(q^2), where q is a code less zero."""
        steps = self._nearest(self.scales, self.zero_points)
        weighed = steps if self._importance is None else steps * self._importance
        above = np.einsum("ogi,ogi->og", weighed, self._grouped)
        below = np.einsum("ogi,ogi->og", weighed, steps)
        with np.errstate(invalid="ignore", over="ignore"):
            return rtn.to_float16(np.divide(above, below, out=self.scales.copy(), where=below > 0))

    def _nearest(self, scales: NDArray[np.float32], zero_points: NDArray[np.uint8]) -> Grouped:
        with np.errstate(invalid="ignore"):
            np.multiply(self._grouped, rtn.inverse(scales)[:, :, None], out=self._steps)
        np.rint(self._steps, out=self._steps)
        zero = zero_points.astype(np.float32)[:, :, None]
        return np.clip(self._steps, -zero, self._top - zero, out=self._steps)

    def _error(self, scales: NDArray[np.float32], zero_points: NDArray[np.uint8]) -> NDArray[np.float32]:
        with np.errstate(invalid="ignore", over="ignore"):
            np.multiply(self._nearest(scales, zero_points), scales[:, :, None], out=self._lost)
            self._lost -= self._grouped
            weighed = self._lost if self._importance is None else self._lost * self._importance
            lost: NDArray[np.float32] = np.einsum("ogi,ogi->og", weighed, self._lost)
        return lost
