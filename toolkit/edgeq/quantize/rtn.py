"""Round to nearest: each group's largest weights set its scale, every weight goes to its nearest code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


def quantize(
    weights: NDArray[np.float32], bits: int, group: int, *, symmetric: bool = True
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Codes, scales and zero points of a matrix [outputs, inputs], as `Solution` describes them.

    The grid of a group is that of `grid`, and halves, which weights of few bits often give, go to the larger code, as
    in GGML's Q4_0.
    """
    outputs, inputs = weights.shape
    grouped = weights.reshape(outputs, inputs // group, group)
    scales, zero_points = grid(grouped, bits, symmetric=symmetric)
    return codes(grouped, scales, zero_points, bits).reshape(outputs, inputs), scales, zero_points


def grid(grouped: NDArray[np.float32], bits: int, *, symmetric: bool) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales, float32 [outputs, groups], and zero points, uint8 alike, that clip no weight of [outputs, groups, group].

    Symmetric: the zero point is the middle code. The scale is that of the weight of largest magnitude, whose sign
    takes the one code that has no mirror image (-2**(bits-1)), as in GGML's Q4_0; so the grid spans
    [-2**(bits-1), 2**(bits-1) - 1]. Errors are half a step at most, and up to one step for a weight that nearly mirrors
    the largest. Asymmetric: the grid spans the group's weights and zero, which is a code of its own; errors are up to
    one step, since a zero point is whole.

    Scales are float16 values, so that formats with 16-bit scales hold the same solution; subnormal ones are rounded up,
    since rounding them down would clip. Infinite where a scale is beyond float16, NaN where a weight is.
    """
    if symmetric:
        middle = 1 << (bits - 1)
        largest = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
        scales = to_float16(largest * np.float32(-1 / middle))
        return scales, np.full(scales.shape, middle, np.uint8)
    lowest, highest = np.minimum(grouped.min(axis=2), 0), np.maximum(grouped.max(axis=2), 0)
    return spanning(lowest, highest, bits)


def spanning(
    lowest: NDArray[np.float32], highest: NDArray[np.float32], bits: int
) -> tuple[NDArray[np.float32], NDArray[np.uint8]]:
    """Scales and zero points of grids from `lowest` <= 0 to `highest` >= 0, which have any one shape."""
    with np.errstate(over="ignore", invalid="ignore"):
        scales = to_float16((highest - lowest) * np.float32(1 / ((1 << bits) - 1)))
        zero_points = np.rint(-lowest * inverse(scales))
    return scales, np.nan_to_num(np.clip(zero_points, 0, (1 << bits) - 1), copy=False).astype(np.uint8)


def codes(
    grouped: NDArray[np.float32], scales: NDArray[np.float32], zero_points: NDArray[np.uint8], bits: int
) -> NDArray[np.uint8]:
    """Nearest codes, uint8 [outputs, groups, group], of grouped weights; those of a scale that is not finite are 0."""
    with np.errstate(invalid="ignore"):
        found = grouped * inverse(scales)[:, :, None]
    found += (zero_points + np.float32(0.5))[:, :, None]
    np.clip(found, 0, (1 << bits) - 1, out=found)
    if not np.isfinite(scales).all():
        np.nan_to_num(found, copy=False)
    return found.astype(np.uint8)


def inverse(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """1 / scales, and 0 for a scale of 0."""
    return np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)


def to_float16(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest float16 values, as float32; subnormal ones rounded away from zero."""
    with np.errstate(over="ignore"):
        found = scales.astype(np.float16)
    short = (np.abs(scales) < _SMALLEST_NORMAL) & (np.abs(found) < np.abs(scales))
    found[short] = np.nextafter(found[short], np.copysign(np.float16(np.inf), found[short]))
    return found.astype(np.float32)
