"""Sensitivities that were measured, kept in the user's cache: a choice for another budget then takes seconds."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgeq import recipe
from edgeq.quantize.mix import Option


class _Kept(msgspec.Struct, frozen=True):
    """An option as its file has it."""

    layout: str
    bytes: int
    loss: float
    activations: float


def find(key: str) -> dict[str, list[Option]] | None:
    """Options of each unit that were kept under a key; None when there are none, or they cannot be read."""
    try:
        found = msgspec.json.decode(_path(key).read_bytes(), type=dict[str, list[_Kept]])
    except (OSError, ValueError):
        return None
    return {
        first: [Option(recipe.layout(each.layout), each.bytes, each.loss, each.activations) for each in options]
        for first, options in found.items()
    }


def keep(key: str, options: Mapping[str, Sequence[Option]]) -> None:
    """Keep options under a key, where the cache can be written to."""
    path = _path(key)
    kept = {
        first: [_Kept(each.layout.name, each.bytes, each.loss, each.activations) for each in found]
        for first, found in options.items()
    }
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    with contextlib.suppress(OSError):
        path.parent.mkdir(parents=True, exist_ok=True)
        partial.write_bytes(msgspec.json.encode(kept))
        partial.replace(path)


def _path(key: str) -> Path:
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache, "edgeq", "sensitivities", f"{key}.json")
