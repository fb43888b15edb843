from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq.quantize import mse, rtn
from edgeq.quantize.solution import Solution

BITS = [2, 4, 8]
both = pytest.mark.parametrize("symmetric", [True, False])


def errors(weights: NDArray[np.float32], made: Any, bits: int, group: int) -> NDArray[np.float64]:
    """Squared error of each weight, float64."""
    found = Solution("w", bits, group, *made).dequantize()
    squares: NDArray[np.float64] = np.square(found.astype(np.float64) - weights)
    return squares


def by_group(squares: NDArray[np.float64], group: int) -> NDArray[np.float64]:
    found: NDArray[np.float64] = squares.reshape(len(squares), -1, group).sum(axis=2)
    return found


def slow_best(group: NDArray[np.float32], bits: int, *, symmetric: bool) -> float:
    """Least squared error of one group on any of very many grids, one after another."""
    top, best, size = (1 << bits) - 1, np.inf, float(np.abs(group).max())
    zeros = [1 << (bits - 1)] if symmetric else [*range(top + 1)]
    for zero in zeros:
        for scale in np.geomspace(0.2, 2, 150) * size / max(zero, top - zero):
            for signed in (scale, -scale):
                codes = np.clip(np.rint(group / signed) + zero, 0, top)
                best = min(best, float(np.square((codes - zero) * signed - group).sum()))
    return best


@both
@pytest.mark.parametrize("bits", [2, 4])
def test_grids_are_close_to_the_best_of_very_many(bits: int, symmetric: bool) -> None:
    weights = np.random.default_rng(5).normal(0, 0.05, (6, 64)).astype(np.float32)
    weights[3] = np.abs(weights[3])
    weights[4, 5] = 1
    found = by_group(errors(weights, mse.quantize(weights, bits, 32, symmetric=symmetric), bits, 32), 32)
    best = [[slow_best(row[at : at + 32], bits, symmetric=symmetric) for at in (0, 32)] for row in weights]
    assert found.sum() <= 1.06 * np.sum(best)


@settings(max_examples=60, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    bits=st.sampled_from(BITS),
    group=st.sampled_from([16, 32, 128]),
    symmetric=st.booleans(),
    power=st.integers(-30, 9),  # beyond, 2 bits of the largest weights want a scale beyond float16
    tail=st.sampled_from([1.5, 3, 30]),
)
def test_no_group_is_worse_than_by_plain_rounding(
    seed: int, bits: int, group: int, symmetric: bool, power: int, tail: float
) -> None:
    weights = np.random.default_rng(seed).standard_t(tail, (3, 2 * group)).clip(-100, 100).astype(np.float32)
    weights *= np.float32(2.0**power)
    made, plain = (
        by_group(errors(weights, each.quantize(weights, bits, group, symmetric=symmetric), bits, group), group)
        for each in (mse, rtn)
    )
    assert (made <= plain * (1 + 1e-4) + 1e-300).all()


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 2**32), bits=st.sampled_from(BITS), symmetric=st.booleans())
def test_codes_scales_and_zero_points_are_what_a_solution_holds(seed: int, bits: int, symmetric: bool) -> None:
    weights = np.random.default_rng(seed).normal(0.3, 1, (3, 96)).astype(np.float32)
    codes, scales, zero_points = mse.quantize(weights, bits, 48, symmetric=symmetric)
    assert [made.dtype.name for made in (codes, scales, zero_points)] == ["uint8", "float32", "uint8"]
    assert (codes.shape, scales.shape, zero_points.shape) == ((3, 96), (3, 2), (3, 2))
    assert max(codes.max(), zero_points.max()) < 1 << bits
    assert (scales == scales.astype(np.float16)).all()
    assert not symmetric or (zero_points == 1 << (bits - 1)).all()


@both
@pytest.mark.parametrize("bits", BITS)
def test_groups_of_zeros_and_grids_that_fit_are_kept_exactly(bits: int, symmetric: bool) -> None:
    middle = 1 << (bits - 1)
    grid = np.resize(np.arange(-middle, middle), 256) / 4
    weights = np.stack([np.zeros_like(grid), grid, -grid]).astype(np.float32)
    made = Solution("w", bits, 256, *mse.quantize(weights, bits, 256, symmetric=symmetric))
    np.testing.assert_array_equal(made.dequantize(), weights)


@both
def test_each_group_is_searched_on_its_own(symmetric: bool) -> None:
    """So pieces and threads do not matter."""
    weights = np.random.default_rng(0).standard_normal((3, 128)).astype(np.float32)
    whole = mse.quantize(weights, 4, 32, symmetric=symmetric)
    for row in range(3):
        for group in range(4):
            columns = slice(32 * group, 32 * group + 32)
            codes, scales, zero_points = mse.quantize(
                weights[row : row + 1, columns].copy(), 4, 32, symmetric=symmetric
            )
            np.testing.assert_array_equal(codes[0], whole[0][row, columns])
            assert scales[0, 0] == whole[1][row, group]
            assert zero_points[0, 0] == whole[2][row, group]


@both
@pytest.mark.parametrize("bits", [2, 4])
def test_important_inputs_lose_less(bits: int, symmetric: bool) -> None:
    weights = np.random.default_rng(1).normal(0, 0.05, (64, 64)).astype(np.float32)
    importance = np.ones(64, np.float32)
    importance[5::8] = 100
    plain, weighed = (
        errors(weights, mse.quantize(weights, bits, 32, symmetric=symmetric, importance=given_importance), bits, 32)
        for given_importance in (None, importance)
    )
    assert weighed[:, 5::8].sum() < 0.8 * plain[:, 5::8].sum()
    assert (weighed * importance).sum() < (plain * importance).sum()
    even = mse.quantize(weights, bits, 32, symmetric=symmetric, importance=np.full(64, 2, np.float32))
    assert errors(weights, even, bits, 32).sum() == pytest.approx(plain.sum(), rel=1e-3)


@both
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf, 1e9])
def test_what_is_not_finite_or_too_large_stays_so(value: float, symmetric: bool) -> None:
    weights = np.random.default_rng(0).standard_normal((2, 64)).astype(np.float32)
    weights[1, 40] = value
    _, scales, _ = mse.quantize(weights, 4, 32, symmetric=symmetric)
    assert np.isfinite(scales).tolist() == [[True, True], [True, False]]


def test_weights_are_not_changed() -> None:
    weights = np.random.default_rng(0).standard_normal((2, 32)).astype(np.float32)
    before = weights.copy()
    mse.quantize(weights, 4, 16)
    np.testing.assert_array_equal(weights, before)
