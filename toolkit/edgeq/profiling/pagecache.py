"""Files out of the page cache, so that a load reads them from the disk."""

from __future__ import annotations

import ctypes
import mmap
import os
from pathlib import Path


def evict(folder: Path) -> str | None:
    """Drop a folder's files from the page cache; the reason when the system keeps some of them there."""
    if not hasattr(os, "posix_fadvise"):
        return "this system cannot drop files from its page cache"
    resident = 0
    for path in sorted(folder.rglob("*")):
        if path.is_file() and path.stat().st_size:
            with path.open("rb") as stream:
                os.fsync(stream.fileno())
                os.posix_fadvise(stream.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                resident += _resident_pages(stream.fileno())
    return f"{resident} pages of the bundle stay in the page cache" if resident else None


def _resident_pages(file: int) -> int:
    """Pages of a file in the page cache (mincore(2)); all of them where the system does not tell."""
    libc = ctypes.CDLL(None, use_errno=True)
    with mmap.mmap(file, 0, access=mmap.ACCESS_COPY) as mapped:
        pages = -(-len(mapped) // mmap.PAGESIZE)
        states = (ctypes.c_ubyte * pages)()
        start = ctypes.c_char.from_buffer(mapped)
        failed = libc.mincore(ctypes.c_void_p(ctypes.addressof(start)), ctypes.c_size_t(len(mapped)), states)
        del start
    return pages if failed else sum(state & 1 for state in states)
