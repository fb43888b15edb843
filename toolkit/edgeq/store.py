"""Folders that appear whole or not at all: staged beside their place, made durable, renamed into it."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeq.bundle import MANIFEST
from edgeq.errors import DiskFault, UsageFault

_RESERVE = 64 << 20


@contextlib.contextmanager
def staging(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Empty folder that becomes `out` when the block ends well, and is removed when it does not.

    An older bundle at `out` is replaced; anything else there is refused with UsageFault. Raises DiskFault when
    `needed_bytes` do not fit, and OSError (see `errors.from_system`) when the disk fills or the place is read-only.
    """
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageFault(f"{out} exists and is not a bundle", why="edgeq never overwrites it.", run="choose another -o")
    out.parent.mkdir(parents=True, exist_ok=True)
    free, needed_bytes = shutil.disk_usage(out.parent).free, needed_bytes + _RESERVE
    if free < needed_bytes:
        raise DiskFault(
            f"{out.parent}: {free / 1e9:.2f} GB free, the build needs about {needed_bytes / 1e9:.2f} GB",
            run="free some space, or choose another disk with -o",
        )
    folder = Path(tempfile.mkdtemp(prefix=f".{out.name}.", dir=out.parent))
    try:
        yield folder
        _commit(folder, out)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _commit(folder: Path, out: Path) -> None:
    """Make every file durable, then put the folder in its place (fsync files, folders, rename, fsync the parent)."""
    folder.chmod(0o755)
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)
    old = None
    if out.exists():
        old = Path(tempfile.mkdtemp(prefix=f".{out.name}.old.", dir=out.parent))
        out.rename(old / "bundle")
    folder.rename(out)
    _sync(out.parent)
    if old is not None:
        shutil.rmtree(old, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
