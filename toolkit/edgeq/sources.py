"""Where a model comes from: a bundled demo, a folder, a catalogue name or a hub id."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq import catalog, data
from edgeq.bundle import MANIFEST, Source
from edgeq.errors import UsageFault
from edgeq.model import Model, read_config
from edgeq.tensorfile import JSON_CAP, read_capped, strict_object

if TYPE_CHECKING:
    from edgeq.checkpoint import Checkpoint

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
        return _short(self.name)

    def source(self, checkpoint: Checkpoint) -> Source:
        """Record for the bundle, every file with its digest."""
        return Source(self.kind, self.name, self.revision, checkpoint.files())


def find(model: str, *, offline: bool) -> Origin:
    """Folder of a demo name, a path, a catalogue name or a hub id (`owner/name[@revision]`), downloading if needed.

    Raises UsageFault when nothing is called so, and what `hub.download` raises.
    """
    if (local := _local(model)) is not None:
        return local
    from edgeq import hub

    found = hub.download(*_on_hub(model), offline)
    return Origin("hub", found.repo, found.folder, found.revision)


def here(model: str) -> Path:
    """Folder of what `find` would find, as far as it is on this machine, and its digests not checked.

    Raises what `find` raises offline.
    """
    if (local := _local(model)) is not None:
        return local.folder
    from edgeq import hub

    return hub.cached(*_on_hub(model))


def shape(name: str, *, offline: bool) -> tuple[str, Model]:
    """Short name and shape of what `find` would find, without weights.

    Read from the headers of a folder, from the catalogue for its names, and from `config.json` alone for a hub id.
    Raises UsageFault when nothing is called so, and what `Checkpoint.open`, `hub.config` and `read_config` raise.
    """
    if (local := _local(name)) is not None:
        from edgeq.checkpoint import Checkpoint

        return local.short_name, Checkpoint.open(local.folder).model
    return _elsewhere(name, offline)


def configured(name: str, *, offline: bool) -> tuple[str, Model]:
    """Short name and shape of what `shape` knows, from `config.json` alone: a folder needs no weights.

    What the catalogue has needs no network, by its hub id either.

    Raises what `shape` raises.
    """
    if (local := _local(name)) is not None:
        path = local.folder / "config.json"
        return local.short_name, read_config(strict_object(read_capped(path, JSON_CAP), str(path)))
    known = next((each for each in catalog.entries() if each.hub.lower() == name.lower()), None)
    return _elsewhere(known.name if known else name, offline)


def _elsewhere(name: str, offline: bool) -> tuple[str, Model]:
    """Short name and shape of a catalogue name or a hub id."""
    if name.lower() in catalog.names():
        entry = catalog.load(name)
        return entry.name, entry.model
    from edgeq import hub

    repo, revision = _on_hub(name)
    return _short(repo), read_config(hub.config(repo, revision, offline))


def _local(model: str) -> Origin | None:
    """Origin of a demo or a folder; None for any other word."""
    if model in DEMOS:
        return Origin("demo", model, data.folder("demo") / model)
    folder = _folder(model)
    if folder is not None and (folder / MANIFEST).is_file() and not (folder / "config.json").is_file():
        raise UsageFault(
            f"{model} is a bundle, not a checkpoint",
            why="It is built already.",
            run=f"edgeq profile {model}, or the same command with the model that it was built from",
        )
    return None if folder is None else Origin("folder", _readable(folder.name), folder)


def _on_hub(model: str) -> tuple[str, str | None]:
    """Repository and revision of a catalogue name or a hub id; raises UsageFault for any other word."""
    if model.lower() in catalog.names():
        return catalog.load(model).hub, None
    if _is_file(model):
        folder = data.readable(Path(model).parent)
        raise UsageFault(f"{model} is a file", why="A checkpoint is a folder.", run=f"the same command with {folder}")
    if match := _HUB_ID.fullmatch(model):
        return match["repo"], match["revision"]
    raise UsageFault(
        f"{model!r} is no folder, demo, catalogue name or hub id",
        why=data.near(model, (*DEMOS, *catalog.names())),
        run="edgeq models list",
    )


def _short(name: str) -> str:
    return Path(name).name.lower() or "model"


def _folder(model: str) -> Path | None:
    try:
        path = Path(model).expanduser()
        return path.resolve() if model and path.is_dir() else None
    except (RuntimeError, ValueError):
        return None


def _is_file(model: str) -> bool:
    try:
        return Path(model).expanduser().is_file()
    except (RuntimeError, ValueError):
        return False


def _readable(name: str) -> str:
    """A file name as UTF-8 can hold it: bytes that are none become replacement characters."""
    return name.encode("utf-8", "surrogateescape").decode("utf-8", "replace")
