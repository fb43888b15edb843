"""Arrays in files, so that they take no memory of the process and a full disk is an error before they are used."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

_ZEROS = 1 << 24


def unnamed(folder: Path, shape: tuple[int, ...], dtype: type[np.generic] = np.float32) -> NDArray[Any]:
    """Zeros in a file of a folder that goes when the array does; raises OSError when the disk has no room."""
    size = int(np.prod(shape)) * np.dtype(dtype).itemsize
    with tempfile.TemporaryFile(dir=folder) as stream:
        _reserve(stream.fileno(), size)
        return np.memmap(stream, dtype, "r+", shape=shape)


def copied(path: Path, values: NDArray[np.float32]) -> NDArray[np.float32]:
    """A copy of an array in an .npy file, to be changed there; raises OSError when the disk has no room."""
    found = np.lib.format.open_memmap(path, "w+", values.dtype, values.shape)
    with path.open("r+b") as stream:
        stream.seek(0, os.SEEK_END)
        _reserve(stream.fileno(), stream.tell())
    found[:] = values
    copy: NDArray[np.float32] = found
    return copy


def _reserve(handle: int, size: int) -> None:
    """Room for a file: a full disk would end the process in the mapped one."""
    if size and hasattr(os, "posix_fallocate"):
        os.posix_fallocate(handle, 0, size)
        return
    for start in range(0, size, _ZEROS):  # macOS
        os.pwrite(handle, bytes(min(_ZEROS, size - start)), start)
