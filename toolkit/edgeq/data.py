"""Where shipped data lives, and how documents are read: strictly, unknown fields refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterable
from pathlib import Path
from typing import TypeVar

import msgspec

from edgeq.errors import CorruptInput

Document = TypeVar("Document")
_PACKAGE = Path(__file__).parent
_CHECKOUT = _PACKAGE.parent.parent


def folder(name: str) -> Path:
    """Folder of shipped data: inside the installed package, else at the top of the checkout."""
    installed = _PACKAGE / name
    return installed if installed.is_dir() else _CHECKOUT / name


def held_out() -> str:
    """The text that losses are measured on by default; nothing is ever fitted to it."""
    return (folder("demo") / "heldout.txt").read_text(encoding="utf-8")


def read_toml(path: Path, kind: type[Document]) -> Document:
    """Document in a TOML file; raises CorruptInput with file and field when it does not match `kind`."""
    try:
        return msgspec.toml.decode(path.read_bytes(), type=kind)
    except (ValueError, RecursionError) as error:
        raise CorruptInput(f"{path}: not a valid {kind.__name__} file", why=str(error)) from error


def read_json(path: Path, kind: type[Document]) -> Document:
    """Document in a JSON file; raises CorruptInput with file and field when it does not match `kind`."""
    try:
        return msgspec.json.decode(path.read_bytes(), type=kind)
    except (ValueError, RecursionError) as error:
        raise CorruptInput(f"{path}: not a valid {kind.__name__} file", why=str(error)) from error


def readable(path: Path) -> str:
    """A path as UTF-8 can hold it: bytes that are none become replacement characters."""
    return str(path).encode("utf-8", "surrogateescape").decode("utf-8", "replace")


def to_json(document: object) -> bytes:
    """JSON text of a document, two-space indented, keys in their declared order, with a final newline."""
    return msgspec.json.format(msgspec.json.encode(document), indent=2) + b"\n"


def near(name: str, known: Iterable[str]) -> str:
    """Sentence that suggests the known names nearest to `name`, or else names all."""
    names = sorted(known)
    return suggested(name, names) or f"Known: {', '.join(names)}."


def suggested(name: str, known: Iterable[str]) -> str:
    """Sentence that suggests the known names nearest to `name`; empty when none is near."""
    close = difflib.get_close_matches(name.lower(), sorted(known), n=3, cutoff=0.4)
    return f"Did you mean {' or '.join(close)}?" if close else ""
