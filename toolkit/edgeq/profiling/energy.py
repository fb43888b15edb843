"""Energy counters and power rails in sysfs, read between tokens of a pass of its own that no speed comes from."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

_SYS = Path("/sys")
_LEAST_UPDATES = 100
_RAPL_UPDATE_S = 0.001  # Intel SDM volume 3B, 16.10: energy status is updated about every millisecond
_TOTAL_RAIL = "VDD_IN"


@dataclass(frozen=True)
class Sensor:
    """Counters of joules that wrap at `wraps_j`, or readings of watts where there are no `wraps_j`; summed."""

    name: str
    scope: str
    read: Callable[[], tuple[float, ...]]
    wraps_j: tuple[float, ...]


class Meter:
    """Joules since it was made, advanced by `tick`; raises OSError or ValueError when the sensor fails."""

    def __init__(self, sensor: Sensor, clock: Callable[[], float] = time.perf_counter) -> None:
        self._sensor, self._clock = sensor, clock
        self._at, self._values = clock(), sensor.read()
        self._joules, self._updates = 0.0, 0.0

    def tick(self) -> None:
        """Add what was used since the last tick."""
        at, values = self._clock(), self._sensor.read()
        if self._sensor.wraps_j:
            for before, value, wrap in zip(self._values, values, self._sensor.wraps_j, strict=True):
                self._joules += value - before if value >= before else value - before + wrap
            self._updates += (at - self._at) / _RAPL_UPDATE_S
        else:
            self._joules += (at - self._at) * (sum(values) + sum(self._values)) / 2
            self._updates += values != self._values
        self._at, self._values = at, values

    @property
    def suffices(self) -> bool:
        """Whether the sensor was updated often enough for a figure."""
        return self._updates >= _LEAST_UPDATES

    def per_token(self, tokens: int) -> tuple[float | None, str | None]:
        """Joules per token, or the reason why the sensor's updates do not suffice to say."""
        if not self.suffices:
            return None, f"{int(self._updates)} sensor updates, {_LEAST_UPDATES} needed"
        if self._joules <= 0:
            return None, "the sensor counted nothing"
        return self._joules / tokens, None


def find(root: Path = _SYS) -> tuple[Sensor | None, str | None]:
    """Sensor of the widest scope that this machine lets us read, or the reason why there is none."""
    reasons = []
    for sensor in (_ina3221(root), _rapl(root)):
        if sensor is None:
            continue
        try:
            if min(sensor.read()) >= 0:
                return sensor, None
            reasons.append(f"{sensor.name} reads below zero")
        except (OSError, ValueError) as error:
            reasons.append(f"{sensor.name} cannot be read: {error}")
    return None, "; ".join(reasons) or "no energy sensor in sysfs"


def _rapl(root: Path) -> Sensor | None:
    """Package counters of Intel and AMD processors (Linux powercap, intel-rapl:N)."""
    zones = [zone for zone in sorted(root.glob("class/powercap/intel-rapl:*")) if _text(zone / "name")[:7] == "package"]
    limits = [_text(zone / "max_energy_range_uj") for zone in zones]
    if not zones or not all(limit.isdecimal() for limit in limits):
        return None
    return Sensor(
        name="RAPL",
        scope="processor packages, idle power included",
        read=lambda: tuple(int((zone / "energy_uj").read_text()) / 1e6 for zone in zones),
        wraps_j=tuple(int(limit) / 1e6 for limit in limits),
    )


def _ina3221(root: Path) -> Sensor | None:
    """Total rail of a Jetson module (Orin NX and Nano name it VDD_IN; AGX Orin has no total)."""
    labels = [path for path in sorted(root.glob("class/hwmon/hwmon*/in*_label")) if _text(path) == _TOTAL_RAIL]
    if not labels:
        return None
    number = labels[0].name.removeprefix("in").removesuffix("_label")
    volts, amperes = labels[0].with_name(f"in{number}_input"), labels[0].with_name(f"curr{number}_input")
    return Sensor(
        name=f"INA3221 {_TOTAL_RAIL}",
        scope="module, idle power included",
        read=lambda: (int(volts.read_text()) * int(amperes.read_text()) / 1e6,),
        wraps_j=(),
    )


def _text(path: Path) -> str:
    try:
        return path.read_text().strip()
    except (OSError, UnicodeDecodeError):
        return ""
