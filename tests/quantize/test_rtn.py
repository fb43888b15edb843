from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from edgeq.quantize import rtn
from edgeq.quantize.solution import Solution

GROUPS = (16, 32, 64, 128)


def solve(weights: NDArray[np.float32], bits: int, group: int) -> Solution:
    return Solution("w", bits, group, *rtn.quantize(weights, bits, group))


def errors_in_steps(weights: NDArray[np.float32], found: Solution) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Each weight and its error, in steps of its group; a group without a step has no error either."""
    steps = np.repeat(found.scales.astype(np.float64), found.group, axis=1)
    errors = np.abs(weights.astype(np.float64) - found.dequantize())
    assert (errors[steps == 0] == 0).all()
    whole = np.where(steps == 0, 1.0, steps)
    return weights / whole, errors / np.abs(whole)


def check(weights: NDArray[np.float32], bits: int, group: int) -> Solution:
    """Everything that holds for any weights: range, float16 scales, symmetry, bounds of the error."""
    found = solve(weights, bits, group)
    outputs, inputs = weights.shape
    middle = 1 << (bits - 1)
    assert found.codes.dtype == found.zero_points.dtype == np.uint8
    assert found.codes.shape == weights.shape
    assert found.codes.max() < 1 << bits
    assert found.scales.dtype == np.float32
    assert found.scales.shape == found.zero_points.shape == (outputs, inputs // group)
    assert (found.scales == found.scales.astype(np.float16)).all()
    assert found.symmetric
    positions, errors = errors_in_steps(weights, found)
    slack = 1 / 2**bits
    mirrored = positions > middle - 0.5
    assert errors[~mirrored].max(initial=0) <= 0.5 + slack
    assert (errors[mirrored] <= positions[mirrored] - (middle - 1) + slack).all()
    assert errors.max() <= 1 + middle * 2**-11 + slack
    return found


@st.composite
def matrices(draw: Any) -> tuple[NDArray[np.float32], int]:
    """Up to three rows of up to three groups, any float32 whose scale is within float16."""
    group = draw(st.sampled_from(GROUPS))
    shape = (draw(st.integers(1, 3)), group * draw(st.integers(1, 3)))
    size = draw(st.sampled_from([1e-9, 1e-6, 1e-3, 1.0, 1e3, 9e4]))
    weights = draw(arrays.arrays(np.float32, shape, elements=st.floats(-size, size).map(np.float32)))
    return weights, group


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from([2, 4, 8]))
def test_any_weights_are_within_the_bounds(drawn: tuple[NDArray[np.float32], int], bits: int) -> None:
    weights, group = drawn
    check(weights, bits, group)


@settings(max_examples=100, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 4, 8]), st.sampled_from(GROUPS), st.integers(-35, 14))
def test_weights_of_any_size_are_within_the_bounds(seed: int, bits: int, group: int, power: int) -> None:
    weights = np.random.default_rng(seed).standard_normal((4, 2 * group)).astype(np.float32) * np.float32(2.0**power)
    check(weights, bits, group)


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("outlier", [1000.0, -1000.0, 1e5, -1e5])
def test_an_outlier_is_kept_exactly_enough_and_spoils_its_own_group_only(bits: int, outlier: float) -> None:
    weights = np.random.default_rng(0).normal(0, 0.05, (2, 64)).astype(np.float32)
    alone = check(weights, bits, 32)
    weights[0, 40] = outlier
    found = check(weights, bits, 32)
    assert found.dequantize()[0, 40] == pytest.approx(outlier, rel=2**-11)
    assert found.codes[0, 40] == 0
    np.testing.assert_array_equal(found.codes[:, :32], alone.codes[:, :32])
    np.testing.assert_array_equal(found.codes[1], alone.codes[1])


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_groups_of_zeros_stay_zero(bits: int) -> None:
    weights = np.zeros((2, 64), np.float32)
    weights[1, 32:] = -0.0
    weights[0, 3] = 0.7
    found = check(weights, bits, 32)
    assert (found.dequantize()[weights == 0] == 0).all()
    assert (found.scales[1] == 0).all()
    assert (found.codes[1] == 1 << (bits - 1)).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_weights_on_the_grid_are_kept_exactly(bits: int) -> None:
    middle = 1 << (bits - 1)
    weights = (np.resize(np.arange(-middle, middle), (1, max(16, 2 * middle))) / 4).astype(np.float32)
    for signed in (weights, -weights):
        found = check(signed, bits, 16)
        whole = Solution("w", bits, signed.size, *rtn.quantize(signed, bits, signed.size))
        np.testing.assert_array_equal(whole.dequantize(), signed)
        assert np.abs(found.dequantize() - signed).max() <= 0.25


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_the_sign_of_the_largest_weight_takes_the_code_without_a_mirror_image(bits: int, sign: int) -> None:
    weights = np.zeros((1, 16), np.float32)
    weights[0, 5] = sign
    found = check(weights, bits, 16)
    assert found.codes[0, 5] == 0
    assert found.scales[0, 0] == -sign / (1 << (bits - 1))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_tiny_weights_are_not_lost(bits: int) -> None:
    weights = np.full((1, 16), 3e-8, np.float32)
    weights[0, ::2] *= -1
    found = check(weights, bits, 16)
    assert found.scales[0, 0] != 0
    assert found.dequantize().any()


def test_a_scale_beyond_float16_is_infinite() -> None:
    weights = np.zeros((2, 16), np.float32)
    weights[1, 0] = 1e9
    _, scales, _ = rtn.quantize(weights, 4, 16)
    assert np.isinf(scales[1, 0])
    assert scales[0, 0] == 0


def test_each_group_is_quantized_on_its_own() -> None:
    weights = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    whole = solve(weights, 4, 32)
    for row in range(3):
        for group in range(4):
            columns = slice(32 * group, 32 * group + 32)
            part = solve(weights[row : row + 1, columns].copy(), 4, 32)
            np.testing.assert_array_equal(part.codes[0], whole.codes[row, columns])
            assert part.scales[0, 0] == whole.scales[row, group]


def test_the_weights_themselves_are_not_changed() -> None:
    weights = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    before = weights.copy()
    rtn.quantize(weights, 4, 16)
    np.testing.assert_array_equal(weights, before)


def slowly(weights: NDArray[np.float32], bits: int, group: int) -> tuple[list[list[Any]], ...]:
    """Codes, scales and zero points of asymmetric groups, one weight after another."""
    top = (1 << bits) - 1
    codes: list[list[Any]] = []
    scales: list[list[Any]] = []
    zero_points: list[list[Any]] = []
    for row in weights:
        codes.append([])
        scales.append([])
        zero_points.append([])
        for start in range(0, len(row), group):
            part = [*map(np.float32, row[start : start + group])]
            lowest, highest = min(*part, np.float32(0)), max(*part, np.float32(0))
            scale = np.float32(np.float16((highest - lowest) * np.float32(1 / top)))
            inverse = np.float32(1) / scale if scale else np.float32(0)
            zero = int(min(max(np.rint(-lowest * inverse), 0), top))
            codes[-1] += [int(min(max(np.floor(each * inverse + np.float32(zero + 0.5)), 0), top)) for each in part]
            scales[-1].append(float(scale))
            zero_points[-1].append(zero)
    return codes, scales, zero_points


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 4, 8]), st.sampled_from(GROUPS), st.sampled_from([-2, 0, 0.5, 2]))
def test_asymmetric_groups_are_those_of_the_plain_loops(seed: int, bits: int, group: int, mean: float) -> None:
    weights = np.random.default_rng(seed).normal(mean, 1, (2, 2 * group)).astype(np.float32)
    codes, scales, zero_points = rtn.quantize(weights, bits, group, symmetric=False)
    wanted = slowly(weights, bits, group)
    assert (codes.tolist(), scales.tolist(), zero_points.tolist()) == wanted


@settings(max_examples=100, deadline=None)
@given(matrices(), st.sampled_from([2, 4, 8]))
def test_asymmetric_errors_are_within_a_step(drawn: tuple[NDArray[np.float32], int], bits: int) -> None:
    weights, group = np.where(np.abs(drawn[0]) < 1e-30, np.float32(0), drawn[0]), drawn[1]
    found = Solution("w", bits, group, *rtn.quantize(weights, bits, group, symmetric=False))
    _, errors = errors_in_steps(weights, found)
    assert errors.max() <= 1 + (1 << bits) * 2**-11 + 2**-bits
    assert (found.dequantize()[weights == 0] == 0).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("sign", [1, -1])
def test_asymmetric_groups_of_one_sign_use_every_code(bits: int, sign: int) -> None:
    top = (1 << bits) - 1
    weights = (sign * np.resize(np.arange(top + 1), 256)).astype(np.float32).reshape(1, -1)
    found = Solution("w", bits, 256, *rtn.quantize(weights, bits, 256, symmetric=False))
    np.testing.assert_array_equal(found.dequantize(), weights)
    assert found.zero_points.tolist() == [[0 if sign > 0 else top]]
    assert np.unique(found.codes).tolist() == [*range(top + 1)]


@pytest.mark.parametrize("symmetric", [True, False])
@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_stays_so(value: float, bits: int, symmetric: bool) -> None:
    weights = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    weights[1, 40] = value
    codes, scales, zero_points = rtn.quantize(weights, bits, 32, symmetric=symmetric)
    assert np.isfinite(scales).tolist() == [[True, True], [True, False]]
    assert codes.max() < 1 << bits
    assert zero_points.max() < 1 << bits
