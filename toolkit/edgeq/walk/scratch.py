"""Arrays in files, so that they take no memory of the process and a full disk is an error before they are used."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import CorruptInput

_ZEROS = 1 << 24


def unnamed(folder: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """Zeros in a file of a folder that goes when the array does; raises OSError when the disk has no room."""
    with tempfile.TemporaryFile(dir=folder) as stream:
        _reserve(stream, int(np.prod(shape)) * np.dtype(dtype).itemsize)
        return np.memmap(stream, dtype, "r+", shape=shape)


def kept(
    path: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32, *, begun: bool
) -> np.memmap[Any, Any]:
    """Zeros in a new file, or what one that was begun holds.

    Raises OSError when the disk has no room, CorruptInput when what was begun has another size.
    """
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    if not begun:
        with path.open("wb") as stream:
            _reserve(stream, size)
    elif not path.is_file() or path.stat().st_size != size:
        raise damaged(path.parent, f"{path.name} has not {size} bytes")
    return np.memmap(path, dtype, "r+", shape=shape)


def damaged(folder: Path, why: str) -> CorruptInput:
    """Error for a folder whose files are not what a walk kept there."""
    return CorruptInput(f"{folder}: not what a walk kept", why=why, run="edgeq build ... again, from the start")


def moved(folder: Path, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """Values in such a file; raises OSError when the disk has no room."""
    found: NDArray[np.float32] = unnamed(folder, values.shape)
    found[:] = values
    return found


def copied(path: Path, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of an array in an .npy file, to be changed there; raises OSError when the disk has no room."""
    with path.open("wb") as stream:
        header = {"descr": "<f4", "fortran_order": False, "shape": values.shape}
        np.lib.format.write_array_header_1_0(stream, header)
        _reserve(stream, values.nbytes)
    copy: NDArray[np.float32] = np.load(path, mmap_mode="r+")
    copy[:] = values
    return copy


def mark(path: Path, number: int) -> None:
    """Write a number into a file in one step."""
    put(path, str(number).encode())


def put(path: Path, content: bytes) -> None:
    """Write a file in one step: what was there stays until the new content is whole."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(content)
    partial.replace(path)


def _reserve(stream: IO[bytes], size: int) -> None:
    """Room for so many bytes more in a file: in the mapped one a full disk would end the process."""
    stream.flush()
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(stream.fileno(), stream.tell(), size)
        return
    for start in range(0, size, _ZEROS):  # macOS
        stream.write(bytes(min(_ZEROS, size - start)))
    stream.flush()
