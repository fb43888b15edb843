"""Folders that appear whole or not at all: staged beside their place, made durable, renamed into it."""

from __future__ import annotations

import contextlib
import ctypes
import errno
import hashlib
import os
import platform
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path

from edgeq import bundle
from edgeq.bundle import MANIFEST
from edgeq.errors import BackendFault, Busy, DiskFault, EdgeqError, Interrupted, MissingTool, OutOfMemory, UsageFault

_RESERVE = 64 << 20
_TRIES = 100
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2  # linux/fcntl.h, linux/fs.h


@contextlib.contextmanager
def staging(out: Path, needed_bytes: int) -> Iterator[Path]:
    """Empty folder that becomes `out` when the block ends well, and is removed, new parents too, when it does not.

    An older bundle at `out` is replaced; anything else there, or beside its files, is refused with UsageFault. Raises
    DiskFault when `needed_bytes` do not fit, and OSError (see `errors.from_system`) when the disk fills or the place is
    read-only.
    """
    out = out.resolve()
    _refuse_foreign(out)
    present = next(filter(Path.exists, out.parents))
    _remove_left(present)
    require_room(present, needed_bytes)
    with parent_of(out) as parent, scratch(parent) as folder:
        yield folder
        _refuse_foreign(out)
        _commit(folder, out)


@contextlib.contextmanager
def parent_of(out: Path) -> Iterator[Path]:
    """The folder that a place is in, made with its own parents; those that were made go when they end up empty."""
    out = out.resolve()
    missing = [parent for parent in out.parents if not parent.exists()]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        yield out.parent
    finally:
        with contextlib.suppress(OSError):
            for parent in missing:
                parent.rmdir()


@contextlib.contextmanager
def scratch(parent: Path) -> Iterator[Path]:
    """Empty folder that is removed when the block ends; one whose process was killed is removed by the next here."""
    _remove_left(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{_own_prefix()}{os.getpid()}.", dir=parent))
    handle = _lock(folder)
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)
        if handle is not None:
            os.close(handle)


@contextlib.contextmanager
def resumable(parent: Path, key: str) -> Iterator[Path]:
    """Folder for work that may be stopped: the same one for the same key, until a block ends otherwise than stopped.

    A second process with the same key gets a folder of its own. Files that were being written when it was stopped, of
    the suffix .partial, are gone.
    """
    folder = parent / f".edgeq.walk.{key}"
    with contextlib.suppress(OSError):
        folder.mkdir(exist_ok=True)
    handle = _lock(folder)
    if handle is None:
        with scratch(parent) as own:
            yield own
        return
    try:
        for partial in folder.rglob("*.partial"):
            partial.unlink()
        yield folder
    except (Interrupted, OutOfMemory, DiskFault, BackendFault, MissingTool, OSError, MemoryError) as stop:
        with contextlib.suppress(OSError):
            folder.rmdir()  # which leaves anything that was found
        if isinstance(stop, Interrupted) and folder.is_dir():
            raise Interrupted(f"{stop}; the same command goes on from what is done") from stop
        raise
    except BaseException:
        shutil.rmtree(folder, ignore_errors=True)
        raise
    else:
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(handle)


def require_room(folder: Path, needed_bytes: int) -> None:
    """Raise DiskFault when so many more bytes do not fit the disk of a folder."""
    free = shutil.disk_usage(folder).free
    if free < needed_bytes + _RESERVE:
        raise DiskFault(
            f"{folder}: {free / 1e9:.2f} GB free, the build needs about {(needed_bytes + _RESERVE) / 1e9:.2f} GB more",
            run="free some space, or choose another disk with -o",
        )


def require_rest(folder: Path, needed_bytes: int) -> None:
    """The same for what a folder's own files lack of so many bytes."""
    require_room(folder, needed_bytes - sum(path.stat().st_size for path in folder.rglob("*")))


def _own_prefix() -> str:
    """How folders begin that processes of this machine make for themselves; their numbers follow."""
    return f".edgeq.{hashlib.sha256(platform.node().encode()).hexdigest()[:8]}."


def _remove_left(parent: Path) -> None:
    """Remove the folders of this machine's processes that are gone.

    Either sign of life keeps a folder: the process's number, which another container may not know, or the lock, which
    some file systems do not keep.
    """
    import psutil

    for folder in parent.glob(f"{_own_prefix()}*.*"):
        with contextlib.suppress(ValueError, OverflowError):  # a name that only looks like one of ours
            if not psutil.pid_exists(int(folder.name.split(".")[3])) and (handle := _lock(folder)) is not None:
                shutil.rmtree(folder, ignore_errors=True)
                os.close(handle)


def _lock(folder: Path) -> int | None:
    """Handle that locks a folder until it is closed; None where that cannot be had, or the folder is gone."""
    import fcntl

    handle = None
    try:
        handle = os.open(folder, os.O_RDONLY)
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if folder.stat().st_ino == os.fstat(handle).st_ino:
            return handle
    except OSError:
        pass
    if handle is not None:
        os.close(handle)
    return None


def _refuse_foreign(out: Path) -> None:
    if out.exists() and not (out / MANIFEST).is_file() and (not out.is_dir() or any(out.iterdir())):
        raise UsageFault(f"{out} exists and is not a bundle", why="edgeq never overwrites it.", run="choose another -o")
    if (out / MANIFEST).is_file() and (strange := _strangers(out)):
        raise UsageFault(
            f"{out / strange[0]} is not part of the bundle there",
            why="Replacing the bundle would delete it.",
            run="move the file elsewhere, or choose another -o",
        )


def _strangers(out: Path) -> list[str]:
    """Files in an older bundle's folder that its manifest does not name; none where it cannot be read."""
    present = {path.relative_to(out).as_posix() for path in out.rglob("*") if path.is_symlink() or not path.is_dir()}
    try:
        recorded = {file.path for file in bundle.read(out).files}
    except EdgeqError:
        return []
    return sorted(present - recorded - {MANIFEST})


def _commit(folder: Path, out: Path) -> None:
    """Make every file durable, then put the folder in its place (fsync files, folders, rename, fsync the parent)."""
    folder.chmod(0o755)
    for path in sorted(folder.rglob("*"), reverse=True):
        _sync(path)
    _sync(folder)
    _place(folder, out)
    _sync(out.parent)


def _place(folder: Path, out: Path) -> None:
    """Rename a folder into its place; what was there comes out under the folder's name.

    `out` is whole at every moment, also when several builds end at once.
    """
    for _ in range(_TRIES):
        try:
            if not out.exists():
                folder.rename(out)
            elif not _exchange(folder, out):
                _exchange_slowly(folder, out)
            return
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.EEXIST, errno.ENOTEMPTY):
                raise
    raise Busy(f"{out}: other builds keep replacing it", run="try again when they are done")


def _exchange(one: Path, other: Path) -> bool:
    """Swap the names of two folders in one step; False where the system or the file system cannot."""
    try:
        call = ctypes.CDLL(None, use_errno=True).renameat2
    except (AttributeError, OSError):
        return False
    if call(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP):
        return False
    raise OSError(code, os.strerror(code), str(other))


def _exchange_slowly(one: Path, other: Path) -> None:
    """Swap the names of two folders in three steps; a kill between them leaves the older one beside its place."""
    spare = Path(tempfile.mkdtemp(prefix=".edgeq.", dir=other.parent))
    try:
        other.rename(spare)
        one.rename(other)
        spare.rename(one)
    finally:
        if not other.exists():
            spare.rename(other)
        shutil.rmtree(spare, ignore_errors=True)


def _sync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
