"""edgeq's build step for a backend: edgeq_write.py CHECKPOINT RECIPE BACKEND OUT."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeq import backends, detect, recipe
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint


def write(checkpoint: Checkpoint, name: str, out: Path, backend: str = "llamacpp") -> None:
    """Write what a backend's engine needs for a recipe into the folder `out`."""
    job = Job(checkpoint, recipe.parse(name), detect.resolve("host"), checkpoint.model.context, lambda *_: None)
    backends.get(backend).build(job, out)


if __name__ == "__main__":
    write(Checkpoint.open(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[4]), sys.argv[3])
