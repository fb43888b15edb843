"""Round to nearest: each group's largest weight sets its scale, every weight goes to its nearest code."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

_SMALLEST_NORMAL = float(np.finfo(np.float16).smallest_normal)


def quantize(
    weights: NDArray[np.float32], bits: int, group: int
) -> tuple[NDArray[np.uint8], NDArray[np.float32], NDArray[np.uint8]]:
    """Codes, scales and zero points of a matrix [outputs, inputs], as `Solution` describes them.

    Symmetric: the zero point is the middle code. The scale is that of the weight of largest magnitude, whose sign
    takes the one code that has no mirror image (-2**(bits-1)), as in GGML's Q4_0; so the grid spans
    [-2**(bits-1), 2**(bits-1) - 1]. Halves, which weights of few bits often give, go to the larger code, as there.
    Errors are half a step at most, and up to one step for a weight that nearly mirrors the largest. Scales are float16
    values, so that formats with 16-bit scales hold the same solution; subnormal ones are rounded up, since rounding
    them down would clip. Infinite where a scale is beyond float16.
    """
    outputs, inputs = weights.shape
    middle = 1 << (bits - 1)
    grouped = weights.reshape(outputs, inputs // group, group)
    largest = np.take_along_axis(grouped, np.abs(grouped).argmax(axis=2)[:, :, None], axis=2)[:, :, 0]
    scales = _to_float16(largest * np.float32(-1 / middle))
    inverse = np.divide(1.0, scales, out=np.zeros_like(scales), where=scales != 0)
    codes = grouped * inverse[:, :, None]
    codes += np.float32(middle + 0.5)
    np.clip(codes, 0, 2 * middle - 1, out=codes)
    zero_points = np.full(scales.shape, middle, np.uint8)
    return codes.astype(np.uint8).reshape(outputs, inputs), scales, zero_points


def _to_float16(scales: NDArray[np.float32]) -> NDArray[np.float32]:
    """Nearest float16 values, subnormal ones rounded away from zero."""
    with np.errstate(over="ignore"):
        found = scales.astype(np.float16)
    short = (np.abs(scales) < _SMALLEST_NORMAL) & (np.abs(found) < np.abs(scales))
    found[short] = np.nextafter(found[short], np.copysign(np.float16(np.inf), found[short]))
    return found.astype(np.float32)
