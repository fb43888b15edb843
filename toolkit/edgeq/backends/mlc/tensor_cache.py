"""Weights as MLC's tensor cache: `tensor-cache.json` and shards of raw bytes, which TVM's runtime reads.

Every tensor is stored `raw`, as it is; MLC's own converter rounds float32 to bfloat16.
"""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import CorruptInput

INDEX = "tensor-cache.json"
_SHARD = "params_shard_{}.bin"
_SHARD_BYTES = 1 << 25  # the reader holds a whole shard beside the tensors; MLC's own size
_PIECE = 1 << 24


class Writer:
    """Writes tensors one after another; the index is written last, when nothing failed."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._shards: list[dict[str, Any]] = []
        self._records: list[dict[str, Any]] = []
        self._pending: list[bytes] = []
        self._filled = 0

    def __enter__(self) -> Writer:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is None:
            self._close_shard()
            total = sum(shard["nbytes"] for shard in self._shards)
            parameters = sum(len(shard["records"]) for shard in self._shards)
            index = {"metadata": {"ParamSize": parameters, "ParamBytes": total}, "records": self._shards}
            (self._folder / INDEX).write_text(json.dumps(index, indent=1) + "\n", encoding="utf-8")

    def add(self, name: str, values: NDArray[Any]) -> None:
        """Append one tensor under the name that the library gives it."""
        size = values.nbytes
        if self._filled and self._filled + size > _SHARD_BYTES:
            self._close_shard()
        self._records.append(
            {
                "name": name,
                "shape": list(values.shape),
                "dtype": str(values.dtype),
                "format": "raw",
                "nbytes": size,
                "byteOffset": self._filled,
            }
        )
        self._pending.append(np.ascontiguousarray(values).tobytes())
        self._filled += size

    def _close_shard(self) -> None:
        if not self._records:
            return
        name = _SHARD.format(len(self._shards))
        digest = hashlib.md5(usedforsecurity=False)
        with (self._folder / name).open("wb") as file:
            for part in self._pending:
                digest.update(part)
                file.write(part)
        self._shards.append(
            {
                "dataPath": name,
                "format": "raw-shard",
                "nbytes": self._filled,
                "records": self._records,
                "md5sum": digest.hexdigest(),
            }
        )
        self._records, self._pending, self._filled = [], [], 0


def records(folder: Path) -> dict[str, dict[str, Any]]:
    """Record of each tensor by its name: shape, dtype, nbytes, byteOffset in the file dataPath.

    Raises CorruptInput when the index does not hold, or a tensor is not wholly in a file of the folder.
    """
    path = folder / INDEX
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["records"]
        held = [(each, shard) for shard in shards for each in shard["records"]]
        odd = [each["name"] for each, shard in held if not _lies_in(each, shard)]
        odd += [each["dataPath"] for each in shards if not _is_whole(folder, each["dataPath"], each["nbytes"])]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptInput(f"{path}: not the index of a tensor cache", why=str(error)) from error
    if odd:
        raise CorruptInput(f"{path}: {odd[0]} is not where the index says", run="edgeq build ... again")
    return {each["name"]: each | {"dataPath": shard["dataPath"]} for each, shard in held}


def _lies_in(record: Mapping[str, Any], shard: Mapping[str, Any]) -> bool:
    """Whether a tensor has the bytes that its shape needs, within its shard: the runtime reads without looking."""
    size, start = math.prod(record["shape"]) * np.dtype(record["dtype"]).itemsize, record["byteOffset"]
    raw = (record["format"], shard["format"]) == ("raw", "raw-shard") and min(record["shape"], default=1) > 0
    return raw and record["nbytes"] == size and 0 <= start <= shard["nbytes"] - size


def _is_whole(folder: Path, name: str, size: int) -> bool:
    """Whether a shard is a file of the folder itself, of its size."""
    return Path(name).name == name and (folder / name).is_file() and (folder / name).stat().st_size == size


def read(folder: Path, record: Mapping[str, Any]) -> NDArray[Any]:
    """Values of one tensor by its record."""
    dtype, shape = np.dtype(record["dtype"]), tuple(record["shape"])
    count = math.prod(shape)
    return np.fromfile(folder / record["dataPath"], dtype, count, offset=record["byteOffset"]).reshape(shape)


def check(folder: Path) -> None:
    """Raise CorruptInput, naming the file, when a shard is missing or its MD5 is not the one in the index."""
    path = folder / INDEX
    try:
        shards = json.loads(path.read_text(encoding="utf-8"))["records"]
        wanted = {folder / shard["dataPath"]: shard["md5sum"] for shard in shards}
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise CorruptInput(f"{path}: not the index of a tensor cache", why=str(error)) from error
    for shard, digest in wanted.items():
        if not shard.is_file():
            raise CorruptInput(f"{shard}: missing", why=f"{INDEX} names it.", run="edgeq build ... again")
        found = hashlib.md5(usedforsecurity=False)
        with shard.open("rb") as file:
            while piece := file.read(_PIECE):
                found.update(piece)
        if found.hexdigest() != digest:
            raise CorruptInput(f"{shard}: damaged, its MD5 differs from the index", run="edgeq build ... again")
