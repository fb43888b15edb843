from __future__ import annotations

import re
import tomllib

import numpy as np
import pytest

import calibrations
import leaving_out
from edgeq import target
from edgeq.estimating import published
from fitting import Rates, effects, place_of, row_effects
from leaving_out import Checked, quantile

_NUMBER = re.compile(r"-?\d+\.?\d*(?:e-?\d+)?")


@pytest.fixture(scope="module")
def rates() -> Rates:
    return calibrations.rates()


@pytest.fixture(scope="module")
def checked() -> tuple[list[Checked], list[Checked]]:
    return leaving_out.leave_one_out(calibrations.rates_of_rows())


def test_committed_calibrations_are_what_refit_writes(rates: Rates) -> None:
    for path, text in calibrations.files(rates).items():
        kept = path.read_text(encoding="utf-8")
        assert _NUMBER.sub("", kept) == _NUMBER.sub("", text), path
        numbers = [[float(word) for word in _NUMBER.findall(each)] for each in (kept, text)]
        assert numbers[0] == pytest.approx(numbers[1], rel=0.02), path


def test_refit_changes_calibrations_and_nothing_else(rates: Rates) -> None:
    for path, text in calibrations.files(rates).items():
        if path.parent.name == "targets":
            before, after = tomllib.loads(path.read_text(encoding="utf-8")), tomllib.loads(text)
            before.pop("calibration", None)
            after.pop("calibration", None)
            assert before == after


def test_tables_in_the_middle_of_a_file_are_replaced() -> None:
    table = '[calibration.mlx]\neta = 0.5\nsource = "x [y]"\n'
    text = f'name = "a"\n\n{table}\n[match]\nisa = []\n\n{table}'
    assert calibrations.without_tables(text) == 'name = "a"\n\n[match]\nisa = []\n'


@pytest.mark.slow
def test_figures_predicted_without_their_device_and_runtime(checked: tuple[list[Checked], list[Checked]]) -> None:
    """Reached: 9.2 % and 31.3 %."""
    errors = [each.error for each in checked[0]]
    assert len(errors) == 101
    assert quantile(errors, 0.5) <= 0.12
    assert quantile(errors, 0.9) <= 0.35
    assert sum(each.covered for each in checked[0]) / len(errors) >= 0.85


@pytest.mark.slow
def test_figures_predicted_with_one_anchor(checked: tuple[list[Checked], list[Checked]]) -> None:
    errors = [each.error for each in checked[1]]
    assert quantile(errors, 0.5) <= 0.06
    assert quantile(errors, 0.9) <= 0.22
    assert sum(each.covered for each in checked[1]) / len(errors) >= 0.85


@pytest.mark.slow
def test_a_fifth_that_is_left_out_is_predicted_once_for_each_of_five_ways_to_cut() -> None:
    rates = calibrations.rates_of_rows()
    found = leaving_out.others(rates)["a fifth"]
    assert len(found) == leaving_out.FIFTHS * len(rates.rows)
    own = leaving_out.left_out(rates, [place_of(row) for row in rates.rows])
    alone = {id(each.row): each.error for each in own}
    assert np.mean([each.error for each in found]) < np.mean(list(alone.values()))


def test_a_held_back_row_does_not_reach_its_own_prediction() -> None:
    rates = calibrations.rates_of_rows()
    place = place_of(rates.rows[0])
    others = rates.fitted * [place_of(row) != place for row in rates.rows]
    before = rates.fit(others)
    rates.log_s[0] += 3
    assert before.mode == pytest.approx(rates.fit(others).mode)


def test_slopes_are_those_of_the_seconds() -> None:
    rates = calibrations.rates_of_rows()
    mode = rates.fit(rates.fitted).mode
    _, slopes = rates.seconds(mode)
    for name in ("eta all ", "layer all ", "unpack kernels llamacpp opencl", "states", "cache llamacpp"):
        step = np.zeros_like(mode)
        step[rates.index.columns[name]] = 1e-5
        expected = (np.log(rates.seconds(mode + step)[0]) - np.log(rates.seconds(mode - step)[0])) / 2e-5
        assert slopes[:, rates.index.columns[name]] == pytest.approx(expected, abs=1e-6), name


def test_what_another_processor_computed_is_of_that_processor() -> None:
    rows = published.read().rows
    row = next(row for row in rows if row.computed_on)
    found = row_effects(row, published.read())
    assert ("api", "cpu") in found
    assert ("own", " ".join(place_of(row))) in found
    plain = rows[0]
    assert row_effects(plain, published.read()) == effects(place_of(plain), published.read())


def test_unpacking_is_written_where_kernels_have_figures_on_gpus_of_a_known_peak() -> None:
    adreno = target.load("snapdragon-8-gen-3-phone").calibration
    assert adreno["llamacpp"].unpack is not None
    assert adreno["llamacpp"].unpack > 50
    assert adreno["mlc"].unpack is None
    assert target.load("raspberry-pi-5-8gb").calibration["llamacpp"].unpack is None
    fast = target.load("apple-m4-max").calibration["llamacpp"].unpack
    assert fast is not None
    assert fast < 40


def test_the_fit_finds_the_rates_that_made_the_figures() -> None:
    rates = calibrations.rates_of_rows()
    truth = rates.fit(rates.fitted)
    seconds, _ = rates.seconds(truth.mode)
    rates.log_s[:] = np.log(seconds)
    again = rates.fit(rates.fitted)
    found, _ = rates.seconds(again.mode)
    assert found == pytest.approx(seconds, rel=0.12)


def test_rates_are_written_for_backends_and_for_runtimes_with_figures() -> None:
    found = calibrations.places(target.load("iphone-17-pro"))
    assert set(found) == {"llamacpp", "mlc", "coreml", "litert", "coreai", "mnn"}
    assert found["coreml"] == ("iphone-17-pro", "ane", "coreml")
    assert calibrations.places(target.load("amd-strix-halo-128gb"))["llamacpp"][1] == "vulkan"
    assert calibrations.places(target.load("snapdragon-x-elite-laptop"))["llamacpp"][1] == "opencl"
    assert calibrations.places(target.load("web-browser")) == {}


def test_outside_rows_are_compared_and_never_fitted(rates: Rates) -> None:
    outside = [number for number, row in enumerate(published.read().rows) if row.outside]
    assert [number for number, used in enumerate(rates.fitted) if not used] == outside
    assert len(outside) == 1


def test_a_runtime_without_figures_follows_what_was_measured_beside_it() -> None:
    device = target.load("raspberry-pi-5-8gb")
    like, onnx, mlc = (device.calibration[name] for name in ("llamacpp", "onnx", "mlc"))
    assert onnx.eta == pytest.approx(like.eta * 0.96, rel=0.02)
    assert onnx.layer_s == pytest.approx(like.layer_s / 0.96, rel=0.02)
    assert (mlc.eta, mlc.layer_s, mlc.compute) == (like.eta, like.layer_s, like.compute)
