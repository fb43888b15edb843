"""How much of the machine somebody else took while a repetition ran."""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

_PROC, _CGROUPS = Path("/proc"), Path("/sys/fs/cgroup")
_LIMIT = 0.05
_STEAL = 7


@dataclass(frozen=True)
class Snapshot:
    """Counters at one moment: (run, wait) in ns of each thread, CPU ticks (busy, stolen), and seconds."""

    at: float
    threads: Mapping[str, tuple[int, int]]
    ticks: tuple[int, int] | None
    throttled_s: float | None
    suspended_s: float


@dataclass(frozen=True)
class Contention:
    """Shares from 0 to 1 of the time between two snapshots, null where the system does not count; seconds asleep."""

    wait: float | None
    steal: float | None
    throttled: float | None
    suspended_s: float

    @property
    def reason(self) -> str | None:
        """Why a repetition must not count, or null when it may."""
        if self.suspended_s > _LIMIT:
            return f"the machine slept for {self.suspended_s:.1f} s"
        shares = {"waited for a core": self.wait, "stolen": self.steal, "throttled by a CPU quota": self.throttled}
        over = [f"{share:.0%} {what}" for what, share in shares.items() if share is not None and share >= _LIMIT]
        return ", ".join(over) or None


def snapshot(proc: Path = _PROC, cgroups: Path = _CGROUPS) -> Snapshot:
    """Counters of this process's threads, of all cores and of the process's control groups."""
    return Snapshot(time.perf_counter(), _threads(proc), _ticks(proc), _throttled(proc, cgroups), _suspended())


def between(before: Snapshot, after: Snapshot) -> Contention:
    """What happened from one snapshot to the next; a thread that ended in between is not seen."""
    start = {name: before.threads.get(name, (0, 0)) for name in after.threads}
    run = sum(after.threads[name][0] - start[name][0] for name in start)
    wait = sum(after.threads[name][1] - start[name][1] for name in start)
    steal = throttled = None
    if before.ticks and after.ticks:
        steal = _share(after.ticks[1] - before.ticks[1], after.ticks[0] - before.ticks[0])
    if before.throttled_s is not None and after.throttled_s is not None:
        throttled = _share(after.throttled_s - before.throttled_s, after.at - before.at)
    return Contention(_share(wait, run + wait), steal, throttled, after.suspended_s - before.suspended_s)


def _share(part: float, whole: float) -> float | None:
    return min(part / whole, 1.0) if whole > 0 and part >= 0 else None


def _threads(proc: Path) -> dict[str, tuple[int, int]]:
    found = {}
    for path in (proc / "self" / "task").glob("*/schedstat"):
        words = _read(path).split()
        if len(words) == 3 and all(word.isdecimal() for word in words):
            found[path.parent.name] = (int(words[0]), int(words[1]))
    return found


def _ticks(proc: Path) -> tuple[int, int] | None:
    words = _read(proc / "stat").partition("\n")[0].split()[1:]
    if len(words) <= _STEAL or not all(word.isdecimal() for word in words):
        return None
    user, nice, system, _idle, _iowait, irq, softirq, steal = (int(word) for word in words[: _STEAL + 1])
    return user + nice + system + irq + softirq + steal, steal


def _throttled(proc: Path, cgroups: Path) -> float | None:
    """Seconds, of the group that was throttled most: a quota may sit on any group above the process."""
    own = next((line[3:] for line in _read(proc / "self" / "cgroup").splitlines() if line.startswith("0::")), None)
    if own is None:
        return None
    group = cgroups / own.strip("/")
    found = []
    for folder in (group, *group.parents):
        for line in _read(folder / "cpu.stat").splitlines():
            name, _, value = line.partition(" ")
            if name == "throttled_usec" and value.isdecimal():
                found.append(int(value) / 1e6)
        if folder == cgroups:
            break
    return max(found, default=None)


def _suspended() -> float:
    boot = getattr(time, "CLOCK_BOOTTIME", None)
    return time.clock_gettime(boot) - time.clock_gettime(time.CLOCK_MONOTONIC) if boot is not None else 0.0


def _read(path: Path) -> str:
    try:
        return path.read_text()
    except (OSError, UnicodeDecodeError):
        return ""
