"""Quantized matrices as no engine spells them: every backend packs the same solution."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from edgeq.recipe import Layout


@dataclass(frozen=True)
class Solution:
    """One quantized matrix: w[o, i] = (codes[o, i] - zero_points[o, g]) * scales[o, g] with g = i // group.

    codes: uint8 [outputs, inputs], 0 to 2**bits - 1, in the checkpoint's own order of inputs;
    scales: float32 [outputs, groups]; zero_points: uint8 [outputs, groups] (2**(bits - 1) everywhere when symmetric).
    `inputs` must be a multiple of `group`.
    """

    name: str
    bits: int
    group: int
    codes: NDArray[np.uint8]
    scales: NDArray[np.float32]
    zero_points: NDArray[np.uint8]

    @property
    def symmetric(self) -> bool:
        """Whether every zero point is the middle code."""
        return bool((self.zero_points == 1 << (self.bits - 1)).all())

    def in_groups(self, group: int) -> Solution:
        """The same matrix in smaller groups, which must divide this one's: scales and zero points are repeated."""
        each = self.group // group
        scales, zero_points = np.repeat(self.scales, each, axis=1), np.repeat(self.zero_points, each, axis=1)
        return replace(self, group=group, scales=scales, zero_points=zero_points)

    def dequantize(self) -> NDArray[np.float32]:
        """Float32 matrix [outputs, inputs] that the codes stand for."""
        outputs, inputs = self.codes.shape
        weights = self.codes.reshape(outputs, -1, self.group).astype(np.float32)
        weights -= self.zero_points[:, :, None]
        weights *= self.scales[:, :, None]
        return weights.reshape(outputs, inputs)


@dataclass(frozen=True)
class BlockSolution:
    """One matrix in a GGML layout: w[o, i] = levels[codes[o, i]] * step - minimum, both of the group of i.

    step = super_scales * scales and minimum = super_minimums * minimums: float16 values per block of inputs, held as
    float32 [outputs, blocks], times small integers per group, int16 [outputs, groups]. codes: uint8 [outputs, inputs]
    in the checkpoint's own order of inputs; levels: float32 [number of codes].
    """

    name: str
    layout: Layout
    levels: NDArray[np.float32]
    codes: NDArray[np.uint8]
    scales: NDArray[np.int16]
    minimums: NDArray[np.int16]
    super_scales: NDArray[np.float32]
    super_minimums: NDArray[np.float32]

    @property
    def bits(self) -> int:
        """Bits of a code."""
        return self.layout.bits

    def dequantize(self) -> NDArray[np.float32]:
        """Float32 matrix [outputs, inputs] that the codes stand for."""
        outputs, inputs = self.codes.shape
        each = self.layout.block // self.layout.group
        steps = np.repeat(self.super_scales, each, axis=1) * self.scales
        weights = self.levels[self.codes].reshape(outputs, -1, self.layout.group)
        weights *= steps[:, :, None]
        weights -= (np.repeat(self.super_minimums, each, axis=1) * self.minimums)[:, :, None]
        return weights.reshape(outputs, inputs)
