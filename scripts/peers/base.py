"""What a peer is to bench_peers: a module with a few names, and one program beside it."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple, Protocol

import proofs
from edgeq.machine import physical_cores

_VERSIONS = "import sys, json, importlib.metadata as m; print(json.dumps({n: m.version(n) for n in sys.argv[1:]}))"


class Unavailable(Exception):
    """A side that cannot be had here, with the reason: its figures are null."""


def reason(said: str) -> str:
    """Why a program failed: the last line that names an error, else its last one; progress bars come after both."""
    errors = [line for line in said.splitlines() if re.match(r"[\w.]*(Error|Exception|Fault|Tool)\b", line)]
    return errors[-1] if errors else proofs.last_line(said)


class Peer(Protocol):
    """A peer, satisfied by a module.

    NAME for tables, FOLDER with its program, PACKAGES whose versions are reported; RECIPES that the loss is compared
    for and SPEED, those that are documented as the fastest, each a name with words for its program; HOWS in which its
    arithmetic can be had.

    `program.py` in the folder makes an artifact from a checkpoint and calibration windows, and runs it: a serving.main.
    """

    @property
    def NAME(self) -> str: ...  # noqa: N802

    @property
    def FOLDER(self) -> Path: ...  # noqa: N802

    @property
    def PACKAGES(self) -> tuple[str, ...]: ...  # noqa: N802

    @property
    def RECIPES(self) -> Mapping[str, tuple[str, ...]]: ...  # noqa: N802

    @property
    def SPEED(self) -> Mapping[str, tuple[str, ...]]: ...  # noqa: N802

    @property
    def HOWS(self) -> tuple[str, ...]: ...  # noqa: N802

    def python(self) -> Path:
        """Python of the peer's environment, made the first time; raises Unavailable with the reason."""
        ...


class Side(NamedTuple):
    """A peer with one of its recipes."""

    peer: Peer
    recipe: str
    words: tuple[str, ...]

    def __str__(self) -> str:
        return f"{self.peer.NAME} {self.recipe}"

    def make(self, checkpoint: Path, calibration: Path, out: Path) -> None:
        """Write the artifact; raises Unavailable with the program's last words."""
        made = subprocess.run(
            self.making(checkpoint, calibration, out), env=self.environment(), capture_output=True, text=True
        )
        if made.returncode:
            raise Unavailable(reason(made.stderr))

    def making(self, checkpoint: Path, calibration: Path, out: Path) -> list[str]:
        """Command that writes an artifact."""
        return [*self._command("make"), str(checkpoint), str(calibration), str(out), *self.words]

    def run(self, artifact: Path, how: str) -> list[str]:
        """Command that serves an artifact."""
        return [*self._command("run"), str(artifact), how, str(physical_cores())]

    def environment(self) -> dict[str, str]:
        """Variables of its children: the same number of threads for all sides, and nothing from a hub."""
        ours = self.peer.python() == Path(sys.executable)
        paths = [proofs.ROOT / "scripts", *([proofs.ROOT / "toolkit"] if ours else [])]
        offline = {"HF_HUB_OFFLINE": "1", "HF_DATASETS_OFFLINE": "1", "ORT_DISABLE_TELEMETRY": "1"}
        threads = {"OMP_NUM_THREADS": str(physical_cores())}
        return {**os.environ, **offline, **threads, "PYTHONPATH": os.pathsep.join(map(str, paths))}

    def _command(self, what: str) -> list[str]:
        return [str(self.peer.python()), "-P", str(self.peer.FOLDER / "program.py"), what]


def versions(peer: Peer) -> dict[str, str]:
    """Versions of a peer's packages in its environment."""
    command = [str(peer.python()), "-c", _VERSIONS, *peer.PACKAGES]
    found: dict[str, str] = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    return found


def virtual_environment(name: str, requirements: Path, probe: str) -> Path:
    """Python of an environment in the user's cache, made once from a complete list of pinned packages.

    The list is installed as it stands, without what its packages ask for beyond it: torch stays the one that is wanted.
    Raises Unavailable where the index has no such package, or when `import probe` fails afterwards.
    """
    key = (requirements.read_text(encoding="utf-8"), sys.version)
    folder = proofs.cache(f"peer-{name}", *key)

    def make(out: Path) -> None:
        python = str(out / "bin" / "python")
        with tempfile.TemporaryDirectory() as elsewhere:
            for command in (
                [sys.executable, "-m", "venv", str(out)],
                [python, "-m", "pip", "install", "--quiet", "--no-deps", "--requirement", str(requirements)],
                [python, "-c", f"import {probe}"],
            ):
                made = subprocess.run(command, capture_output=True, text=True, cwd=elsewhere)
                if made.returncode:
                    raise Unavailable(f"{name}'s environment: {reason(made.stderr)}")

    return proofs.once(folder, make) / "bin" / "python"
