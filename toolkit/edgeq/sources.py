"""Where a model comes from: a bundled demo, a folder, a catalogue name or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from edgeq import catalog, data, hub
from edgeq.bundle import Source
from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageFault

DEMOS = ("demo-qwen2.5", "demo-qwen3", "demo-qwen3.5")
_HUB_ID = re.compile(r"(?P<repo>[A-Za-z0-9][\w.-]*/[\w.-]+)(@(?P<revision>[\w./-]+))?")


@dataclass(frozen=True)
class Origin:
    """A checkpoint's folder and how it was named: `kind` is demo, folder or hub."""

    kind: str
    name: str
    folder: Path
    revision: str | None = None

    @property
    def short_name(self) -> str:
        """Name for files and tables: the last part, lower case."""
        return Path(self.name).name.lower() or "model"

    def source(self, checkpoint: Checkpoint) -> Source:
        """Record for the bundle, every file with its digest."""
        return Source(self.kind, self.name, self.revision, checkpoint.files())


def find(model: str, *, offline: bool) -> Origin:
    """Folder of a demo name, a path, a catalogue name or a hub id (`owner/name[@revision]`), downloading if needed.

    Raises UsageFault when nothing is called so, and what `hub.download` raises.
    """
    if model in DEMOS:
        return Origin("demo", model, data.folder("demo") / model)
    if (folder := _folder(model)) is not None:
        return Origin("folder", _readable(folder.name), folder)
    if model.lower() in catalog.names():
        model = catalog.load(model).hub
    if match := _HUB_ID.fullmatch(model):
        found = hub.download(match["repo"], match["revision"], offline)
        return Origin("hub", found.repo, found.folder, found.revision)
    raise UsageFault(
        f"{model!r} is no folder, demo, catalogue name or hub id",
        why=data.near(model, (*DEMOS, *catalog.names())),
        run="edgeq models list",
    )


def _folder(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path.resolve() if model and path.is_dir() else None
    except (RuntimeError, ValueError):
        return None


def _readable(name: str) -> str:
    """A file name as UTF-8 can hold it: bytes that are none become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
