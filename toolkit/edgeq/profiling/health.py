"""Temperature, clock and throttling of the machine, from sysfs; what a machine does not show is null."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SYS = Path("/sys")
_TEMPERATURES = ("class/thermal/thermal_zone*/temp", "class/hwmon/hwmon*/temp*_input")
_CLOCKS = ("devices/system/cpu/cpu[0-9]*/cpufreq/scaling_cur_freq",)
_THROTTLES = (
    "devices/system/cpu/cpu[0-9]*/thermal_throttle/*_throttle_count",
    "class/hwmon/hwmon*/oc*_event_cnt",
)


@dataclass(frozen=True)
class Reading:
    """Hottest sensor in degrees Celsius, fastest core's clock in Hz, throttle events since boot."""

    temperature_c: float | None
    clock_hz: int | None
    throttle_events: int | None

    @property
    def reason(self) -> str | None:
        """Which figures this machine does not show, or null."""
        named = {
            "temperature": self.temperature_c,
            "clock": self.clock_hz,
            "throttle counter": self.throttle_events,
        }
        absent = [name for name, value in named.items() if value is None]
        return f"no readable {', '.join(absent)} in sysfs" if absent else None


def read(root: Path = _SYS) -> Reading:
    """State of the machine now; values that no such sensor can have are left out."""
    temperatures = _values(root, _TEMPERATURES, lambda value: -40_000 <= value <= 150_000)
    clocks = _values(root, _CLOCKS, lambda value: 0 < value < 20_000_000)
    events = _values(root, _THROTTLES, lambda value: value >= 0)
    return Reading(
        temperature_c=max(temperatures) / 1000 if temperatures else None,
        clock_hz=max(clocks) * 1000 if clocks else None,
        throttle_events=sum(events) if events else None,
    )


def events_between(before: Reading, after: Reading) -> int | None:
    """Throttle events from one reading to the next; null when not counted or when the counter went back."""
    if before.throttle_events is None or after.throttle_events is None:
        return None
    events = after.throttle_events - before.throttle_events
    return events if events >= 0 else None


def _values(root: Path, patterns: tuple[str, ...], plausible: Callable[[int], bool]) -> list[int]:
    found = []
    for pattern in patterns:
        for path in root.glob(pattern):
            try:
                value = int(path.read_text())
            except (OSError, ValueError):
                continue
            if plausible(value):
                found.append(value)
    return found
