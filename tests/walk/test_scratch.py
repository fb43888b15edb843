from __future__ import annotations

import errno
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from edgeq.walk import scratch


def test_an_array_in_a_file_leaves_nothing_behind(tmp_path: Path) -> None:
    found = scratch.unnamed(tmp_path, (3, 4, 5))
    assert found.dtype == np.float32
    assert not found.any()
    found[1] = 2
    assert found.sum() == 40
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("shape", [(3, 4), (0, 4)])
@pytest.mark.parametrize("fallocate", [True, False])
def test_a_copy_changes_and_what_it_was_made_of_does_not(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, shape: tuple[int, ...], fallocate: bool
) -> None:
    if not fallocate:
        monkeypatch.delattr(os, "posix_fallocate")
    values = np.ones(shape, np.float32)
    copy = scratch.copied(tmp_path / "copy.npy", values)
    copy += 1
    copy.flush()  # type: ignore[attr-defined]
    assert (values == 1).all()
    np.testing.assert_array_equal(np.load(tmp_path / "copy.npy"), values + 1)


def test_a_full_disk_is_an_error_before_the_array_is_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "full")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(OSError, match="full"):
        scratch.unnamed(tmp_path, (8, 8))
    with pytest.raises(OSError, match="full"):
        scratch.copied(tmp_path / "copy.npy", np.ones((8, 8), np.float32))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="there is no /dev/full, a disk that is always full")
def test_without_fallocate_a_full_disk_is_one_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delattr(os, "posix_fallocate")
    with Path("/dev/full").open("wb", buffering=0) as stream, pytest.raises(OSError, match="No space"):
        scratch._reserve(stream, 100)
