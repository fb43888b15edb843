from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from edgeq.backends.mlc import packing
from edgeq.errors import UsageFault
from edgeq.quantize.solution import Solution

FIRST_GROUP = [
    *(-7.0, 7.0, 0.0, 0.5, 1.5, -0.5, -1.5, 2.5),
    *(1.0, 2.0, 3.0, 4.0, 5.0, 6.0, -1.0, -2.0),
    *(-3.0, -4.0, -5.0, -6.0, -6.4, 6.6, 0.2, -0.2),
    *(3.5, -3.5, 4.5, -4.5, 5.5, -5.5, 6.5, -6.5),
]
FIRST_WORDS = [0xA66887E0, 0x56DCBA98, 0x77E11234, 0x0E2C2C4A]
"""Codes of the group, eight to a word from the right: 0 14 7 8 8 6 6 10, 8 9 10 11 12 13 6 5, ..."""
MIRRORED_WORDS = [0x4886670E, 0x98123456, 0x770DDCBA, 0xE0C2C2A4]
"""The same of the group with all signs changed: each code is 14 less the other."""


def round_as_mlc(weights: NDArray[np.float32], dtype: type) -> tuple[NDArray[np.uint8], NDArray[Any]]:
    """Codes and scales of MLC's plain rounding to 4 bits in groups of 32, scales in the model's type."""
    grouped: NDArray[Any] = weights.reshape(len(weights), -1, 32).astype(dtype)
    scales = (np.abs(grouped).max(axis=2) / dtype(7)).astype(dtype)
    codes = np.clip(np.rint(grouped / scales[:, :, None] + dtype(7)), 0, 14)
    return codes.astype(np.uint8).reshape(weights.shape), scales


def solution_of(codes: NDArray[np.uint8], scales: NDArray[Any], bits: int = 4) -> Solution:
    """The solution that stands for MLC's codes and scales."""
    mirrored = np.uint8((1 << bits) - 1) - codes
    zero_points = np.full(scales.shape, 1 << (bits - 1), np.uint8)
    group = codes.shape[1] // scales.shape[1]
    return Solution("w", bits, group, mirrored, -scales.astype(np.float32), zero_points)


def values(words: NDArray[np.uint32], scales: NDArray[np.float32], bits: int, group: int) -> list[list[float]]:
    """What MLC's kernels make of words and scales, one element after another."""
    zero, each = (1 << (bits - 1)) - 1, 32 // bits
    return [
        [
            float(np.float32((int(row[i // each]) >> (i % each * bits) & (1 << bits) - 1) - zero) * scale[i // group])
            for i in range(len(row) * each)
        ]
        for row, scale in zip(words, scales, strict=True)
    ]


def test_words_and_scales_are_those_of_mlcs_own_rounding() -> None:
    group = np.array(FIRST_GROUP, np.float32)
    weights = np.stack([np.concatenate([group, -group / 4]), np.concatenate([-group * 2, group])])
    words, scales = packing.pack(solution_of(*round_as_mlc(weights, np.float32)))
    assert words.tolist() == [FIRST_WORDS + MIRRORED_WORDS, MIRRORED_WORDS + FIRST_WORDS]
    assert scales.tolist() == [[1.0, 0.25], [2.0, 1.0]]
    assert (words.dtype.name, scales.dtype.name) == ("uint32", "float32")


def test_float16_scales_are_those_of_mlcs_own_rounding() -> None:
    weights = np.full((1, 32), 0.3, np.float32)
    weights[0, 3] = -1.0
    codes, scales = round_as_mlc(weights, np.float16)
    words, found = packing.pack(solution_of(codes, scales))
    assert words.tolist() == [[0x99990999, 0x99999999, 0x99999999, 0x99999999]]
    assert found.astype(np.float16).view(np.uint16).tolist() == [[0x3092]]
    assert found[0, 0] == np.float32(np.float16(1) / np.float16(7))


def test_eight_bit_codes_are_four_to_a_word() -> None:
    codes = np.array([[0, 1, 254, 255, 127, 128, 3, 2]], np.uint8)
    zero_points = np.full((1, 1), 128, np.uint8)
    words, scales = packing.pack(Solution("w", 8, 8, codes, np.full((1, 1), 0.5, np.float32), zero_points))
    assert words.tolist() == [[0x0001FEFF, 0xFDFC7F80]]
    assert scales.tolist() == [[-0.5]]


def test_two_bit_codes_are_sixteen_to_a_word() -> None:
    codes = np.array([[0, 1, 2, 3] * 4], np.uint8)
    zero_points = np.full((1, 1), 2, np.uint8)
    words, scales = packing.pack(Solution("w", 2, 16, codes, np.full((1, 1), 0.5, np.float32), zero_points))
    assert words.tolist() == [[0b00_01_10_11_00_01_10_11_00_01_10_11_00_01_10_11]]
    assert scales.tolist() == [[-0.5]]


def test_a_group_that_is_no_power_of_two_has_its_scale_in_runs_that_are() -> None:
    random = np.random.default_rng(0)
    codes, scales = random.integers(0, 16, (2, 96)).astype(np.uint8), random.random((2, 1)).astype(np.float32)
    solution = Solution("w", 4, 96, codes, scales, np.full((2, 1), 8, np.uint8))
    words, found = packing.pack(solution)
    np.testing.assert_array_equal(found, -np.repeat(scales, 3, axis=1))
    np.testing.assert_array_equal(packing.dequantize(words, found, 4), solution.dequantize())


@st.composite
def solutions(draw: Any) -> Solution:
    """Up to three rows of up to three groups, of any codes and scales, also none, negative and tiny ones."""
    bits, group = draw(st.sampled_from([2, 4, 8])), draw(st.sampled_from([16, 32, 64]))
    outputs, groups = draw(st.integers(1, 3)), draw(st.integers(1, 3))
    codes = draw(arrays.arrays(np.uint8, (outputs, group * groups), elements=st.integers(0, (1 << bits) - 1)))
    sizes = st.floats(-65504, 65504, width=16)
    scales = draw(arrays.arrays(np.float32, (outputs, groups), elements=sizes))
    return Solution("w", bits, group, codes, scales, np.full((outputs, groups), 1 << (bits - 1), np.uint8))


@settings(max_examples=100, deadline=None)
@given(solutions())
def test_any_symmetric_solution_is_packed_without_loss(solution: Solution) -> None:
    words, scales = packing.pack(solution)
    outputs, inputs = solution.codes.shape
    assert words.shape == (outputs, inputs * solution.bits // 32)
    wanted = solution.dequantize()
    assert values(words, scales, solution.bits, solution.group) == wanted.tolist()
    np.testing.assert_array_equal(packing.dequantize(words, scales, solution.bits), wanted)


@pytest.mark.parametrize(("bits", "recipe"), [(4, "w4g32-e8-rtn"), (8, "w8g32-e8-rtn")])
def test_zero_points_are_refused_with_the_tensors_name_and_a_recipe(bits: int, recipe: str) -> None:
    zero_points = np.full((1, 2), 1 << (bits - 1), np.uint8)
    zero_points[0, 1] += 1
    crooked = Solution("layer", bits, 32, np.zeros((1, 64), np.uint8), np.ones((1, 2), np.float32), zero_points)
    with pytest.raises(UsageFault, match="layer: MLC's layout cannot hold") as raised:
        packing.pack(crooked)
    assert recipe in raised.value.run
