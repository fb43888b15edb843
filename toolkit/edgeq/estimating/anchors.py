"""What was measured on a target, and which of it estimates follow."""

from __future__ import annotations

import functools
from collections.abc import Iterable
from pathlib import Path

import msgspec

from edgeq import catalog, data, profiles
from edgeq.profiles import Profile
from edgeq.target import Target

SMALLEST_BYTES = 100_000_000

Key = tuple[str, str, str]
"""Model, recipe, backend."""


def measured_rows(target: Target) -> dict[Key, Profile]:
    """Valid profiles of a target: shipped ones, then those in `./profiles`, which `edgeq profile --save` writes.

    A model that the catalogue has is named as there.
    """
    rows = {}
    for folder in (data.folder("profiles"), Path("profiles")):
        for path in sorted((folder / target.name).glob("*.json")):
            row = profiles.read(path)
            if row.valid:
                name = catalogue_name(row.model) or row.model
                rows[name, row.recipe, row.backend] = msgspec.structs.replace(row, model=name)
    return rows


def by_backend(rows: Iterable[Profile]) -> dict[str, Profile]:
    """For each backend the measured row of the largest catalogue model: small bundles say nothing about bandwidth."""
    known = [row for row in rows if row.bundle.bytes >= SMALLEST_BYTES and catalogue_name(row.model)]
    return {row.backend: row for row in sorted(known, key=lambda row: row.bundle.bytes)}


@functools.cache
def catalogue_name(model: str) -> str | None:
    """Catalogue's name of a model that a profile names by it or by the last part of its hub id; None for others."""
    for entry in catalog.entries():
        if model in (entry.name, entry.hub.rpartition("/")[2].lower()):
            return entry.name
    return None
