from __future__ import annotations

from pathlib import Path

import pytest

from edgeq.profiling import health
from edgeq.profiling.health import Reading


def _sysfs(root: Path, files: dict[str, str]) -> Path:
    for name, text in files.items():
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(text)
    return root


def test_hottest_sensor_fastest_clock_all_throttle_events(tmp_path: Path) -> None:
    root = _sysfs(
        tmp_path,
        {
            "class/thermal/thermal_zone0/temp": "41500\n",
            "class/hwmon/hwmon0/temp1_input": "52000\n",
            "devices/system/cpu/cpu0/cpufreq/scaling_cur_freq": "2400000\n",
            "devices/system/cpu/cpu1/cpufreq/scaling_cur_freq": "1500000\n",
            "devices/system/cpu/cpu0/thermal_throttle/core_throttle_count": "3\n",
            "class/hwmon/hwmon1/oc1_event_cnt": "2\n",
        },
    )
    assert health.read(root) == Reading(52.0, 2_400_000_000, 5)
    assert health.read(root).reason is None


@pytest.mark.parametrize("text", ["", "hot", "-274000", "999999999"])
def test_garbage_is_null_with_a_reason(tmp_path: Path, text: str) -> None:
    found = health.read(_sysfs(tmp_path, {"class/thermal/thermal_zone0/temp": text}))
    assert found == Reading(None, None, None)
    assert found.reason == "no readable temperature, clock, throttle counter in sysfs"


@pytest.mark.parametrize(("before", "after", "events"), [(3, 5, 2), (5, 3, None), (None, 3, None), (3, None, None)])
def test_events_between(before: int | None, after: int | None, events: int | None) -> None:
    assert health.events_between(Reading(None, None, before), Reading(None, None, after)) == events
