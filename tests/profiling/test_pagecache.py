from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeq.profiling import pagecache


def test_evicts_or_says_why_not(tmp_path: Path) -> None:
    (tmp_path / "weights").write_bytes(os.urandom(1 << 20))
    (tmp_path / "empty").touch()
    reason = pagecache.evict(tmp_path)
    assert reason is None or "page cache" in reason
    assert len((tmp_path / "weights").read_bytes()) == 1 << 20


def test_a_system_without_the_call_says_so(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fadvise", raising=False)
    assert pagecache.evict(tmp_path) == "this system cannot drop files from its page cache"
