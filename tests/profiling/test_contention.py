from __future__ import annotations

from pathlib import Path

import pytest

from edgeq.profiling import contention
from edgeq.profiling.contention import Contention, Snapshot


def _write(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)


def _proc(root: Path, threads: dict[str, str], cpu: str = "cpu 10 0 5 100 0 0 0 1 0 0\ncpu0 1\n") -> Path:
    for thread, counters in threads.items():
        _write(root / "self/task" / thread / "schedstat", counters)
    _write(root / "stat", cpu)
    return root


def test_wait_and_steal_between_two_snapshots(tmp_path: Path) -> None:
    before = contention.snapshot(_proc(tmp_path / "1", {"7": "1000 100 3", "8": "500 0 1"}), tmp_path)
    later = _proc(tmp_path / "2", {"7": "1700 300 4", "9": "100 0 1"}, "cpu 20 0 10 120 0 0 0 6 0 0\n")
    found = contention.between(before, contention.snapshot(later, tmp_path))
    assert found.wait == pytest.approx(200 / 1000)
    assert found.steal == pytest.approx(5 / 20)
    assert found.throttled is None
    assert found.reason == "20% waited for a core, 25% stolen"


def test_quota_of_any_group_above_counts(tmp_path: Path) -> None:
    proc, groups = _proc(tmp_path / "proc", {}), tmp_path / "groups"
    _write(proc / "self/cgroup", "0::/a/b\n")
    _write(groups / "a/b/cpu.stat", "usage_usec 5\nthrottled_usec 0\n")
    _write(groups / "a/cpu.stat", "throttled_usec 2000000\n")
    assert contention.snapshot(proc, groups).throttled_s == 2.0


@pytest.mark.parametrize(("threads", "cpu"), [({}, ""), ({"7": "x y z"}, "cpu a b"), ({"7": "1 2"}, "cpu 1 2 3")])
def test_garbage_and_absence_are_null(tmp_path: Path, threads: dict[str, str], cpu: str) -> None:
    one = contention.snapshot(_proc(tmp_path, threads, cpu), tmp_path)
    found = contention.between(one, one)
    assert (found.wait, found.steal, found.throttled, found.reason) == (None, None, None, None)


def test_counters_that_go_back_are_null() -> None:
    before = Snapshot(0.0, {"7": (100, 100)}, (50, 9), 3.0, 0.0)
    after = Snapshot(1.0, {"7": (900, 50)}, (60, 2), 1.0, 0.0)
    found = contention.between(before, after)
    assert (found.wait, found.steal, found.throttled) == (None, None, None)


@pytest.mark.parametrize(
    ("found", "word"),
    [
        (Contention(0.05, None, None, 0.0), "waited"),
        (Contention(0.0, 0.5, None, 0.0), "stolen"),
        (Contention(0.0, 0.0, 0.5, 0.0), "quota"),
        (Contention(0.0, 0.0, 0.0, 30.0), "slept for 30.0 s"),
    ],
)
def test_disturbed_repetitions_say_by_what(found: Contention, word: str) -> None:
    assert word in (found.reason or "")


def test_a_little_of_everything_is_not_a_reason() -> None:
    assert Contention(0.049, 0.049, 0.049, 0.04).reason is None
