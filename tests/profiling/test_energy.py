from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path

import pytest

from edgeq.profiling import energy
from edgeq.profiling.energy import Meter, Sensor


def _sysfs(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def _rapl(root: Path, counter: str) -> Path:
    zone = "class/powercap/intel-rapl:0/"
    core = "class/powercap/intel-rapl:0:0/"
    files = {"name": "package-0\n", "max_energy_range_uj": "262143328850\n", "energy_uj": counter}
    return _sysfs(root, {zone + name: text for name, text in files.items()} | {core + "name": "core\n"})


def _meter(values: Sequence[tuple[float, ...]], wraps_j: tuple[float, ...], step_s: float) -> Meter:
    readings: Iterator[tuple[float, ...]] = iter(values)
    clock = iter(step_s * tick for tick in range(len(values)))
    meter = Meter(Sensor("fake", "all", lambda: next(readings), wraps_j), lambda: next(clock))
    for _ in values[1:]:
        meter.tick()
    return meter


def test_counter_wraps(tmp_path: Path) -> None:
    joules, reason = _meter([(90.0, 0.0), (99.0, 1.0), (4.0, 2.0)], (100.0, 100.0), 1.0).per_token(8)
    assert joules == pytest.approx((14 + 2) / 8)
    assert reason is None


def test_power_is_integrated_by_trapezoids() -> None:
    watts = [(5.0 + (tick % 2) * 2,) for tick in range(201)]
    joules, _ = _meter(watts, (), 0.01).per_token(4)
    assert joules == pytest.approx(6.0 * 2.0 / 4)


def test_fewer_than_100_updates_say_nothing() -> None:
    assert _meter([(1.0,), (2.0,)], (100.0,), 0.05).per_token(1) == (None, "50 sensor updates, 100 needed")
    assert _meter([(5.0,)] * 500, (), 0.01).per_token(1) == (None, "0 sensor updates, 100 needed")


def test_updates_of_a_counter_add_up_over_ticks_shorter_than_one() -> None:
    values = [(0.1 * tick,) for tick in range(1001)]
    assert _meter(values, (1e9,), 0.0005).per_token(10)[0] == pytest.approx(10.0)


def test_a_stuck_counter_says_nothing() -> None:
    assert _meter([(5.0,)] * 3, (100.0,), 1.0).per_token(1) == (None, "the sensor counted nothing")


def test_rapl_counts_packages_only(tmp_path: Path) -> None:
    sensor, reason = energy.find(_rapl(tmp_path, "2500000\n"))
    assert sensor is not None
    assert (sensor.name, sensor.read(), sensor.wraps_j, reason) == ("RAPL", (2.5,), (262143.32885,), None)


@pytest.mark.parametrize("counter", ["", "much", "-5"])
def test_a_bad_counter_is_a_reason(tmp_path: Path, counter: str) -> None:
    sensor, reason = energy.find(_rapl(tmp_path, counter))
    assert sensor is None
    assert "RAPL" in (reason or "")


def test_jetson_total_rail_is_found_by_its_name(tmp_path: Path) -> None:
    rails = {"in1_label": "VDD_IN\n", "in1_input": "5000\n", "curr1_input": "1200\n", "in2_label": "VDD_CPU_GPU_CV\n"}
    sensor, _ = energy.find(_sysfs(tmp_path, {f"class/hwmon/hwmon3/{name}": text for name, text in rails.items()}))
    assert sensor is not None
    assert (sensor.name, sensor.read(), sensor.wraps_j) == ("INA3221 VDD_IN", (6.0,), ())


def test_no_sensor_is_a_reason(tmp_path: Path) -> None:
    assert energy.find(tmp_path) == (None, "no energy sensor in sysfs")
