from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from edgeq.profiles import Phase
from edgeq.profiling import memory

_MIB = 1 << 20
_TOUCH = """
import json
from edgeq.profiling import memory
assert memory.reset() is None
before = memory.read()
block = bytearray(b"x") * (64 << 20)
held = memory.read()
del block
after_free = memory.read()
memory.reset()
print(json.dumps([phase.rss_bytes for phase in (before, held, after_free, memory.read())]))
"""


def _status(folder: Path, text: str) -> Path:
    (folder / "status").write_text(text)
    return folder


def test_read_takes_the_kernels_counters(tmp_path: Path) -> None:
    root = _status(tmp_path, "Name:\tedgeq\nVmHWM:\t    2048 kB\nRssAnon:\t 1024 kB\nRssFile:\t 512 kB\n")
    assert memory.read(root) == Phase(rss_bytes=2 * _MIB, anonymous_bytes=_MIB, file_bytes=_MIB // 2)


@pytest.mark.parametrize("text", ["", "VmHWM:\n", "VmHWM: many kB\n", "VmHWM: -4 kB\n", "VmHWM: 4\n", "no colon"])
def test_garbage_is_null(tmp_path: Path, text: str) -> None:
    assert memory.read(_status(tmp_path, text)) == memory.NOTHING


def test_absent_files_are_null_with_a_reason(tmp_path: Path) -> None:
    root = tmp_path / "none"
    assert memory.read(root) == memory.NOTHING
    reason = memory.reset(root)
    assert reason is not None
    assert "cannot be reset" in reason


def test_highest_ignores_what_is_unknown() -> None:
    one = Phase(rss_bytes=5, anonymous_bytes=None, file_bytes=1)
    other = Phase(rss_bytes=3, anonymous_bytes=2, file_bytes=None)
    assert memory.highest(one, other) == Phase(rss_bytes=5, anonymous_bytes=2, file_bytes=1)
    assert memory.highest(memory.NOTHING, memory.NOTHING) == memory.NOTHING


@pytest.mark.skipif(memory.read().rss_bytes is None or memory.reset() is not None, reason="this system keeps no peak")
def test_peak_of_a_process_that_touches_64_mib() -> None:
    done = subprocess.run([sys.executable, "-c", _TOUCH], capture_output=True, text=True, check=True)
    before, held, after_free, after_reset = json.loads(done.stdout)
    assert held - before == pytest.approx(64 * _MIB, rel=0.01)
    assert after_free == pytest.approx(held, rel=0.01)
    assert after_reset < held - 60 * _MIB
