"""The Qwen models that edgeq knows by name: one TOML file each in `catalog/`."""

from __future__ import annotations

import dataclasses
import datetime
from typing import Any, Literal

import msgspec

from edgeq import data
from edgeq.errors import UsageFault
from edgeq.model import Model, read_config

Thinking = Literal["never", "default-off", "default-on", "always"]


class Scores(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Published results of one mode: benchmark and score, and where they were published."""

    source: str
    values: dict[str, int | float]


class Entry(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One model: `hub` is the instruct checkpoint that people run, `base` the one it was trained from.

    `context` counts the tokens that it handles without stretching; `parameters` are the text model's, a tied table
    once, `vision_parameters` those that come on top. `config` is its `config.json`. `scores` are by mode; two models
    compare only where mode and benchmark are the same.
    """

    name: str
    title: str
    hub: str
    base: str | None = None
    generation: Literal["2.5", "3", "3.5"]
    released: datetime.date
    license: str
    license_note: str | None = None
    commercial: bool
    context: int
    thinking: Thinking
    modality: tuple[Literal["text", "image", "video"], ...]
    parameters: int
    vision_parameters: int | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...]
    config: dict[str, Any]
    scores: dict[str, Scores]

    @property
    def model(self) -> Model:
        """Shapes that `config` describes, with the context of `context`: some configurations name a stretched one."""
        return dataclasses.replace(read_config(self.config), context=self.context)


def entries() -> tuple[Entry, ...]:
    """All models, by generation and then by size."""
    return tuple(sorted(map(_read, _files()), key=_rank))


def names() -> tuple[str, ...]:
    """Names of all models, by generation and then by size."""
    return tuple(entry.name for entry in entries())


def load(name: str) -> Entry:
    """Model by its name or its hub id, in any case; raises UsageFault when the catalogue has neither."""
    wanted = name.lower()
    if wanted in _files():
        return _read(wanted)
    for entry in map(_read, _files()):
        if entry.hub.lower() == wanted:
            return entry
    raise UsageFault(f"{name!r} is not in the catalogue", why=data.near(name, _files()), run="edgeq models list")


def _files() -> list[str]:
    return [path.stem for path in data.folder("catalog").glob("*.toml")]


def _read(name: str) -> Entry:
    return data.read_toml(data.folder("catalog") / f"{name}.toml", Entry)


def _rank(entry: Entry) -> tuple[float, int, datetime.date, str]:
    return float(entry.generation), entry.parameters, entry.released, entry.name
