"""edgeq's build step for llama.cpp: edgeq_write.py CHECKPOINT RECIPE OUT."""

from __future__ import annotations

import sys
from pathlib import Path

from edgeq import detect, recipe
from edgeq.backends import llamacpp
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint


def write(checkpoint: Checkpoint, name: str, out: Path) -> None:
    """Write `out`/model.gguf of a recipe."""
    job = Job(checkpoint, recipe.parse(name), detect.resolve("host"), checkpoint.model.context, lambda *_: None)
    llamacpp.build(job, out)


if __name__ == "__main__":
    write(Checkpoint.open(Path(sys.argv[1])), sys.argv[2], Path(sys.argv[3]))
