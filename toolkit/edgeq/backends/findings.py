"""What backends look for on a machine: one answer each, and engines asked where they can do no harm."""

from __future__ import annotations

import signal
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple


class Finding(NamedTuple):
    """One answer; `passed` is None where nothing can be said, `remedy` says what to do unless it passed."""

    name: str
    passed: bool | None
    expected: str
    observed: str
    remedy: str


def show(path: Path | None, root: Path) -> str:
    """A path below `root`, as people of that machine know it."""
    return "none found" if path is None else f"/{path.relative_to(root)}"


def ask(command: Sequence[str], seconds: float, engine: str) -> tuple[bytes, str]:
    """Last line that a process prints, and what is wrong with it, in words; a library may end the process it is in."""
    try:
        done = subprocess.run(command, capture_output=True, timeout=seconds, check=False)
    except subprocess.TimeoutExpired:
        return b"", f"{engine} does not answer within {seconds:g} s"
    if done.returncode < 0:
        return b"", f"loading {engine} ends with {signal.Signals(-done.returncode).name}"
    if done.returncode:
        last = done.stderr.decode(errors="replace").strip().rpartition("\n")[2]
        return b"", last or f"loading {engine} exits with {done.returncode}"
    return done.stdout.strip().rpartition(b"\n")[2], ""
