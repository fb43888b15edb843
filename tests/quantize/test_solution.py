from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from edgeq.quantize.solution import Solution


def solution(zero_points: NDArray[np.uint8], bits: int = 4) -> Solution:
    codes = np.array([[0, 8, 15, 9], [1, 2, 3, 4]], np.uint8)
    scales = np.array([[0.5, -2.0], [1.0, 4.0]], np.float32)
    return Solution("w", bits, 2, codes, scales, zero_points)


def test_a_weight_is_its_code_less_the_zero_point_times_the_scale_of_its_group() -> None:
    found = solution(np.array([[8, 8], [0, 3]], np.uint8)).dequantize()
    assert found.dtype == np.float32
    assert found.tolist() == [[-4.0, 0.0, -14.0, -2.0], [1.0, 2.0, 0.0, 4.0]]


def test_codes_below_the_zero_point_do_not_wrap_around() -> None:
    found = solution(np.full((2, 2), 255, np.uint8), bits=8).dequantize()
    assert found[0].tolist() == [-127.5, -123.5, 480.0, 492.0]


def test_symmetric_means_the_middle_code_everywhere() -> None:
    middle = np.full((2, 2), 8, np.uint8)
    assert solution(middle).symmetric
    assert not solution(middle, bits=8).symmetric
    middle[1, 1] = 7
    assert not solution(middle).symmetric


def test_in_smaller_groups_it_is_the_same_matrix() -> None:
    whole = solution(np.array([[8, 8], [0, 3]], np.uint8))
    small = whole.in_groups(1)
    assert (small.group, small.scales.shape, small.zero_points.shape) == (1, (2, 4), (2, 4))
    assert small.dequantize().tolist() == whole.dequantize().tolist()
    assert whole.in_groups(2).scales.tolist() == whole.scales.tolist()
