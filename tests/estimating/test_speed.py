from __future__ import annotations

import math
from dataclasses import replace

import pytest

from edgeq.estimating.speed import Moved, Rate, Shares, around, logit, longest

SHARES = Shares(states=math.log(0.25), cache=math.log(0.2), cache_sd=0.3, k_quant=-0.2, figure_sd=0.08)
RATE = Rate(logit(0.8), 0.4, math.log(1e-4), 0.5, 0.0, math.log(0.3), 0.4, SHARES, "made up")
WEIGHTS = Moved(weights=2e9, states=0.0, cache=0.0)


def test_the_roofline() -> None:
    assert RATE.decode_s(WEIGHTS, 30, 100e9) == pytest.approx(2e9 / (100e9 * 0.8) + 30 * 1e-4)
    whole = Moved(weights=2e9, states=1e8, cache=3e8)
    assert RATE.decode_s(whole, 30, 100e9) == pytest.approx((2e9 + 1e8 / 0.25 + 3e8 / 0.2) / (100e9 * 0.8) + 30 * 1e-4)


def test_k_layouts_take_longer() -> None:
    assert RATE.decode_s(Moved(2e9, 0, 0, k_quant=True), 30, 100e9) > RATE.decode_s(WEIGHTS, 30, 100e9)


def test_unpacking_counts_where_arithmetic_is_scarce() -> None:
    poor = replace(RATE, unpack=80.0, unpack_sd=0.3)
    reading, operations = 2e9 / (100e9 * 0.8), 4e9 / 1e12
    scarce, plenty = (replace(WEIGHTS, operation_s=4e9 / peak) for peak in (1e12, 1e15))
    assert poor.decode_s(scarce, 0, 100e9) == pytest.approx(80 * operations, rel=0.01)
    assert poor.decode_s(plenty, 0, 100e9) == pytest.approx(reading, rel=1e-6)
    assert (poor.unpacks_longer(scarce, 100e9), poor.unpacks_longer(plenty, 100e9)) == (True, False)
    assert RATE.decode_s(scarce, 0, 100e9) == pytest.approx(reading)


def test_what_unpacking_takes_is_as_uncertain_as_its_operations() -> None:
    poor = replace(RATE, unpack=80.0, unpack_sd=0.3)
    found = poor.decode(replace(WEIGHTS, operation_s=4e9 / 1e12), 0, 100e9)
    assert math.log(found.high / found.mid) == pytest.approx(1.645 * math.hypot(0.3, 0.08), rel=0.05)


def test_what_decodes_slower_unpacks_slower() -> None:
    assert replace(RATE, unpack=20.0).scaled(0.5, 1.0, "made up").unpack == 40.0


def test_a_maximum_of_two_times_is_smooth() -> None:
    assert longest(3.0, 0.0) == pytest.approx(3.0)
    assert 3.0 < longest(3.0, 3.0) < 4.0


def test_the_interval_holds_the_middle_and_grows_with_the_cache() -> None:
    short, long = (RATE.decode(Moved(2e9, 0, cache), 30, 100e9) for cache in (0.0, 2e9))
    assert short.low < short.mid < short.high
    assert long.high / long.low > short.high / short.low


def test_a_measurement_moves_the_estimate_of_the_same_model_to_it() -> None:
    seconds = 2 * RATE.decode_s(WEIGHTS, 30, 100e9)
    known = RATE.measured(seconds, WEIGHTS, 30, 100e9)
    assert known.decode_s(WEIGHTS, 30, 100e9) == pytest.approx(seconds, rel=0.3)
    before, after = RATE.decode(WEIGHTS, 30, 100e9), known.decode(WEIGHTS, 30, 100e9)
    assert after.high / after.low < before.high / before.low


def test_a_large_model_says_more_of_bandwidth_and_a_small_one_of_layers() -> None:
    large, small = Moved(20e9, 0, 0), Moved(1e8, 0, 0)
    for moved, mostly_eta in ((large, True), (small, False)):
        known = RATE.measured(1.3 * RATE.decode_s(moved, 30, 100e9), moved, 30, 100e9)
        eta, layer = (RATE.logit_eta - known.logit_eta) / 0.4, (known.log_layer_s - RATE.log_layer_s) / 0.5
        assert (eta > layer) == mostly_eta
        assert eta > 0
        assert layer > 0


def test_prefill_is_arithmetic_until_reading_the_weights_takes_longer() -> None:
    assert RATE.prefill(4e12, 10e12, WEIGHTS, 30, 100e9).mid == pytest.approx(10e12 * 0.3 / 4e12)
    assert RATE.prefill(1e6, 10e12, WEIGHTS, 30, 100e9).mid == pytest.approx(1 / RATE.decode_s(WEIGHTS, 30, 100e9))


def test_ranges_are_factors() -> None:
    found = around(10.0, 0.1)
    assert found.mid / found.low == pytest.approx(found.high / found.mid)
