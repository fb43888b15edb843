from __future__ import annotations

import statistics as standard

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edgeq.profiling import statistics

_SAMPLES = st.lists(st.floats(0.001, 1e6), min_size=1, max_size=30)


@settings(deadline=None)
@given(_SAMPLES)
def test_spread_brackets_the_median_and_keeps_the_samples(samples: list[float]) -> None:
    found = statistics.spread(samples)
    assert found.median == pytest.approx(standard.median(samples))
    assert min(samples) <= found.low <= found.median * (1 + 1e-12)
    assert found.median * (1 - 1e-12) <= found.high <= max(samples)
    assert found.samples == tuple(samples)
    assert found == statistics.spread(samples)


def test_cv_is_the_sample_deviation_over_the_mean() -> None:
    assert statistics.spread([9.0, 10.0, 11.0]).cv == pytest.approx(0.1)
    assert statistics.spread([9.0]).cv is None


def test_settled_needs_a_narrow_interval() -> None:
    assert statistics.settled([100, 101, 100, 99, 100])
    assert not statistics.settled([100, 120, 80, 99, 100])


def test_gaps_are_percentiles() -> None:
    found = statistics.gaps([float(one) for one in range(101)])
    assert (found.p50, found.p90, found.p99, found.max) == (50, 90, 99, 100)


@pytest.mark.parametrize(
    ("samples", "unthrottled", "letter"),
    [
        ([100.0, 101, 99, 100, 100], True, "A"),
        ([100.0, 101, 99, 100, 100], False, "B"),
        ([100.0, 104, 96, 100, 100], True, "B"),
        ([100.0, 120, 80, 100, 100], True, "C"),
        ([100.0, 100, 100, 100], True, "C"),
    ],
)
def test_grade(samples: list[float], unthrottled: bool, letter: str) -> None:
    steady = statistics.spread([100.0] * 5)
    assert statistics.grade([steady, statistics.spread(samples)], unthrottled) == letter
