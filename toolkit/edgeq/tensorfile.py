"""One safetensors file: its header, checked in full; its values, read in pieces.

The format is a little-endian 64-bit header length, a JSON header, then the data without gaps
(https://github.com/huggingface/safetensors#format). Files are read, never mapped: a file that is
cut short while it is in use is then an error, not a crash.
"""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

from edgeq.errors import CorruptInput, DiskFault, PermissionRefused

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

JSON_CAP = 2 << 20
PIECE = 1 << 19
_WIDTHS = {
    **dict.fromkeys(("F64", "I64", "U64"), 8),
    **dict.fromkeys(("F32", "I32", "U32"), 4),
    **dict.fromkeys(("F16", "BF16", "I16", "U16"), 2),
    **dict.fromkeys(("BOOL", "I8", "U8", "F8_E4M3", "F8_E5M2"), 1),
}
_AGAIN = "copy or download the checkpoint again"


@dataclass(frozen=True)
class Entry:
    """A tensor in a file: its spelling there, dtype in safetensors' words, shape, and first byte in the file."""

    file: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def values(self) -> int:
        """Number of values."""
        return math.prod(self.shape)

    @property
    def width(self) -> int:
        """Bytes of one value."""
        return _WIDTHS[self.dtype]

    @property
    def stop(self) -> int:
        """First byte in the file after the tensor."""
        return self.offset + self.values * self.width


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn what the system says while `path` is read into CorruptInput, PermissionRefused or DiskFault."""
    try:
        yield
    except (FileNotFoundError, IsADirectoryError, NotADirectoryError) as error:
        raise CorruptInput(f"{path}: missing", run=_AGAIN) from error
    except PermissionError as error:
        raise PermissionRefused(f"{path}: may not be read", run="give yourself the right to read it") from error
    except OSError as error:
        raise DiskFault(f"{path}: cannot be read", why=str(error)) from error


def read_capped(path: Path, cap: int) -> bytes:
    """Content of a small regular file; raises CorruptInput when it is missing or holds more than `cap` bytes."""
    if not path.is_file():
        raise CorruptInput(f"{path}: missing", run=_AGAIN)
    with reading(path), path.open("rb") as stream:
        raw = stream.read(cap + 1)
    if len(raw) > cap:
        raise CorruptInput(f"{path}: larger than {cap >> 20} MiB", why="A file of this kind is much smaller.")
    return raw


def strict_object(raw: bytes, where: str) -> dict[str, Any]:
    """JSON object in UTF-8; raises CorruptInput for duplicate keys, NaN, deep nesting and anything else."""
    try:
        found = json.loads(raw.decode("utf-8"), object_pairs_hook=_unique, parse_constant=_no_constant)
    except (ValueError, RecursionError) as error:
        raise CorruptInput(f"{where}: not valid JSON", why=str(error)[:200], run=_AGAIN) from error
    if not isinstance(found, dict):
        raise CorruptInput(f"{where}: not a JSON object", run=_AGAIN)
    return found


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        key = Counter(key for key, _ in pairs).most_common(1)[0][0]
        raise ValueError(f"duplicate key {key[:100]!r}")
    return found


def _no_constant(word: str) -> NoReturn:
    raise ValueError(f"{word} is not a JSON number")


def read_header(path: Path) -> dict[str, Entry]:
    """Every tensor of a safetensors file by its name, from the header alone.

    Raises CorruptInput when the file is missing, cut short or longer than it says, when the header is not strict
    JSON of at most 2 MiB, or when the tensors overlap, leave a gap or do not match their dtype and shape.
    """
    if not path.is_file():
        raise CorruptInput(f"{path}: missing", run=_AGAIN)
    with reading(path), path.open("rb") as stream:
        size = path.stat().st_size
        length = int.from_bytes(stream.read(8), "little")
        if size < 8 or length > min(size - 8, JSON_CAP):
            raise CorruptInput(
                f"{path}: not a whole safetensors file",
                why=f"Its header claims {length} bytes; the file holds {size}, and a header at most {JSON_CAP}.",
                run=_AGAIN,
            )
        raw = stream.read(length)
    header = strict_object(raw, f"{path} (header)")
    _check_metadata(path, header.pop("__metadata__", {}))
    entries = [_entry(path, name, fields, 8 + length) for name, fields in header.items()]
    _check_cover(path, entries, 8 + length, size)
    return {entry.name: entry for entry in entries}


def _check_metadata(path: Path, metadata: object) -> None:
    if not isinstance(metadata, dict) or not all(isinstance(text, str) for text in metadata.values()):
        raise CorruptInput(f"{path}: __metadata__ is not an object of strings", run=_AGAIN)


def _entry(path: Path, name: str, fields: object, base: int) -> Entry:
    if len(name) > 256 or not isinstance(fields, Mapping) or set(fields) != {"dtype", "shape", "data_offsets"}:
        raise CorruptInput(f"{path}: the header's entry {name[:100]!r} is not a tensor", run=_AGAIN)
    dtype, shape, offsets = fields["dtype"], fields["shape"], fields["data_offsets"]
    if not isinstance(dtype, str) or dtype not in _WIDTHS:
        raise CorruptInput(f"{path}: tensor {name!r} has an unknown dtype", why=f"Known: {', '.join(_WIDTHS)}.")
    if not _sizes(shape) or len(shape) > 8:
        raise CorruptInput(f"{path}: tensor {name!r} has no valid shape", run=_AGAIN)
    if not _sizes(offsets) or len(offsets) != 2:
        raise CorruptInput(f"{path}: tensor {name!r} has no valid data_offsets", run=_AGAIN)
    start, stop = offsets
    entry = Entry(path, name, dtype, tuple(shape), base + start)
    if base + stop != entry.stop:
        raise CorruptInput(
            f"{path}: tensor {name!r} holds {stop - start} bytes",
            why=f"{dtype} of shape {list(shape)} needs {entry.stop - entry.offset}.",
            run=_AGAIN,
        )
    return entry


def _sizes(found: object) -> bool:
    return isinstance(found, list) and all(type(size) is int and 0 <= size < 1 << 48 for size in found)


def _check_cover(path: Path, entries: list[Entry], base: int, size: int) -> None:
    expected = base
    for entry in sorted(entries, key=lambda entry: (entry.offset, entry.stop)):
        if entry.offset != expected:
            fault = "overlaps the one before it" if entry.offset < expected else "leaves a gap before it"
            raise CorruptInput(f"{path}: tensor {entry.name!r} {fault}", run=_AGAIN)
        expected = entry.stop
    if expected != size:
        state = "cut short" if size < expected else "longer than its header says"
        raise CorruptInput(f"{path}: {state}", why=f"It holds {size} bytes instead of {expected}.", run=_AGAIN)


def pieces(entry: Entry, start: int, stop: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """Values `start` to `stop` as unsigned integers of their width, with the position of each piece in the tensor.

    Each piece holds at most 2^19 values and is valid until the next one: they share one buffer.
    Raises CorruptInput when the file ends before its tensor, PermissionRefused or DiskFault when it cannot be read.
    """
    import numpy as np

    buffer = np.empty(min(PIECE, stop - start), np.dtype(f"<u{entry.width}"))
    with reading(entry.file), entry.file.open("rb", buffering=0) as stream:
        stream.seek(entry.offset + start * entry.width)
        for at in range(start, stop, PIECE):
            piece = buffer[: min(PIECE, stop - at)]
            _fill(stream, piece.data.cast("B"), entry)
            yield at, piece


def _fill(stream: Any, wanted: memoryview, entry: Entry) -> None:
    while wanted:
        count = stream.readinto(wanted)
        if not count:
            raise CorruptInput(f"{entry.file}: cut short inside tensor {entry.name!r}", run=_AGAIN)
        wanted = wanted[count:]


def read_float32(entry: Entry, start: int, stop: int) -> NDArray[np.float32]:
    """Values `start` to `stop` of a BF16, F16 or F32 tensor as a flat float32 copy."""
    import numpy as np

    found = np.empty(stop - start, np.float32)
    for at, piece in pieces(entry, start, stop):
        part = found[at - start : at - start + len(piece)]
        if entry.dtype == "BF16":
            bits = part.view(np.uint32)
            bits[:] = piece
            bits <<= 16
        else:
            part[:] = piece.view(np.dtype(f"<f{entry.width}"))
    return found
