"""What the verify_* scripts share: Debian packages, the cache folder, skipping, and the record of what was proven."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Literal, NoReturn

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

ROOT = Path(__file__).resolve().parent.parent
SAVED = ROOT / "tests" / "proofs"
State = Literal["executed", "compiled", "unchecked"]
"""Strongest first: it ran; a compiler of the API took it; it was made, and there was no such compiler."""
SKIPPED = 77
"""Exit code of a script that could not run here, as in automake: its last line on stderr says why."""


@dataclass(frozen=True)
class Proof:
    """One API and generation: `state` is what really happened here, `how` on what, `figures` what was measured."""

    api: str
    engine: str
    generation: str
    state: State
    how: str
    figures: dict[str, float] = field(default_factory=dict)


def skip(reason: str) -> NoReturn:
    """Leave with exit code 77, which `scripts/test` lists as a skip with this reason."""
    print(f"{Path(sys.argv[0]).name}: skipped: {reason}", file=sys.stderr)
    sys.exit(SKIPPED)


def need(*packages: str) -> None:
    """Install Debian packages that are missing, as root; skip where that cannot be done."""
    missing = [name for name in packages if not _installed(name)]
    if not missing:
        return
    if shutil.which("apt-get") is None:
        skip(f"needs {', '.join(missing)}, and this system has no apt-get")
    if os.geteuid() != 0:
        skip(f"needs packages; next: sudo apt-get install {' '.join(missing)}")
    print(f"{Path(sys.argv[0]).name}: apt-get install {' '.join(missing)}", file=sys.stderr)
    environment = {**os.environ, "DEBIAN_FRONTEND": "noninteractive"}
    install = ["apt-get", "install", "--yes", "--quiet", "--no-install-recommends", *missing]
    for command in (["apt-get", "update", "--quiet"], install):
        made = subprocess.run(command, env=environment, capture_output=True, text=True)
        if made.returncode:
            skip(f"{' '.join(command)} failed: {made.stderr.strip().splitlines()[-1:] or made.returncode}")


def cache(name: str, *key: str) -> Path:
    """Folder in the user's cache for something slow to make, `key` being the versions and flags that made it."""
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    digest = hashlib.sha256("\0".join(key).encode()).hexdigest()[:12]
    return home / "edgeq" / f"{name}-{digest}"


def once(folder: Path, make: Callable[[Path], None]) -> Path:
    """A folder that `make` fills the first time, beside its place and renamed, so that no half of it is ever found."""
    if not folder.is_dir():
        print(f"{Path(sys.argv[0]).name}: making {folder}, once", file=sys.stderr)
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(dir=folder.parent, prefix=f"{folder.name}.") as staging:
            made = Path(staging) / "made"
            made.mkdir()
            make(made)
            try:
                made.rename(folder)
            except OSError:
                if not folder.is_dir():  # else another run was faster
                    raise
    return folder


def fetch(*command: str, cwd: Path | None = None) -> None:
    """Run a command that a machine without package indexes cannot run: skip with its last words when it fails."""
    made = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if made.returncode:
        skip(f"{Path(command[0]).name} failed: {last_line(made.stderr)}")


def last_line(text: str) -> str:
    """Last line that says something."""
    return (text.strip().splitlines() or ["it gave no reason"])[-1]


def debian_version(package: str) -> str:
    """Version of an installed Debian package."""
    query = ["dpkg-query", "--show", "--showformat=${Version}", package]
    return subprocess.run(query, capture_output=True, text=True, check=True).stdout


def dequantized_logits(model: str, recipe_name: str, ids: NDArray[np.int32]) -> NDArray[np.float32]:
    """Float32 logits [len(ids), vocabulary] of transformers over the values that a recipe's weights stand for.

    `model` is one of the demo checkpoints. What an engine's logits are away from these is the engine's own arithmetic.
    """
    import numpy as np
    import torch

    from edgeq import recipe, sources, transformer
    from edgeq.checkpoint import Checkpoint
    from edgeq.quantize.solve import rounded
    from edgeq.size import is_quantized

    checkpoint = Checkpoint.open(sources.find(model, offline=True).folder)
    with torch.inference_mode():
        reference = transformer.instantiate(checkpoint, lambda _: True)
        for name in filter(is_quantized, checkpoint.model.tensors()):
            matrix = rounded(checkpoint, recipe.parse(recipe_name), name)
            reference.get_parameter(name).data = torch.from_numpy(matrix)
        tokens = torch.from_numpy(ids[None].astype(np.int64))
        logits: NDArray[np.float32] = reference(input_ids=tokens).logits[0].numpy()
    return logits


def divergence(wanted: NDArray[np.float32], found: NDArray[np.float32]) -> float:
    """Mean KL divergence, nats per token, of the predictions of two arrays of logits [tokens, vocabulary]."""
    import numpy as np

    from edgeq import accuracy

    log_p, log_q = (accuracy.log_softmax(logits).astype(np.float64) for logits in (wanted, found))
    terms = np.exp(log_p) * (log_p - log_q) - np.exp(log_p) + np.exp(log_q)  # never negative; -p + q sum to 0
    return float(terms.sum(axis=1).mean())


def record(proofs: Sequence[Proof], versions: dict[str, str], save: bool) -> None:
    """Write what was proven to the cache folder, and into tests/proofs for README's table when `save`."""
    name = f"{Path(sys.argv[0]).name.removeprefix('verify_')}.json"
    text = json.dumps({"versions": versions, "proofs": [asdict(proof) for proof in proofs]}, indent=1) + "\n"
    for folder in (cache("proofs"), *([SAVED] if save else [])):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(text, encoding="utf-8")


def _installed(package: str) -> bool:
    query = ["dpkg-query", "--show", "--showformat=${Status}", package]
    if shutil.which(query[0]) is None:
        return False
    return subprocess.run(query, capture_output=True, text=True).stdout == "install ok installed"
