"""What every child process does that holds a side's model: answer its parent, line by line, until stdin ends.

Needs numpy alone, so that it runs in any peer's environment.
"""

from __future__ import annotations

import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

AS_RUN, WEIGHTS_ONLY = "as run", "weights only"


class Engine(Protocol):
    """A loaded model.

    weights_bytes: of all weights that it stores, with their scales; read_bytes: of those that a decoded token reads in
    full, so without a table that only gives rows.
    """

    weights_bytes: int
    read_bytes: int

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        ...

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Seconds from the start of the prompt until each token of a greedy continuation."""
        ...


Make = Callable[..., None]
"""Writes an artifact: checkpoint folder, token windows (.npy file, int32 [windows, length]), folder, words."""
Open = Callable[[Path, str, int], Engine]
"""Loads an artifact: folder, AS_RUN or WEIGHTS_ONLY, threads."""


def main(make: Make, load: Open) -> None:
    """The two programs of a side: `make CHECKPOINT CALIBRATION OUT WORDS...`, `run ARTIFACT HOW THREADS`."""
    what, *words = sys.argv[1:]
    if what == "make":
        checkpoint, calibration, out = map(Path, words[:3])
        make(checkpoint, calibration, out, *words[3:])
    else:
        artifact, how, threads = words
        _serve(lambda: load(Path(artifact), how, int(threads)))


def _serve(load: Callable[[], Engine]) -> None:
    """Load the model, say its bytes, then answer requests; what libraries print goes to stderr.

    `{"windows": FILE, "logits": FILE}` writes logits [windows, length, vocabulary] of token windows [windows, length];
    `{"ids": [...], "tokens": N}` is answered with the moments.
    """
    replies = os.fdopen(os.dup(sys.stdout.fileno()), "w")
    os.dup2(sys.stderr.fileno(), sys.stdout.fileno())
    engine = load()
    answer: dict[str, object] = {"weights_bytes": engine.weights_bytes, "read_bytes": engine.read_bytes}
    while True:
        print(json.dumps(answer), file=replies, flush=True)
        line = sys.stdin.readline()
        if not line:
            return
        request = json.loads(line)
        if "windows" in request:
            found = [engine.logits(window.tolist()) for window in np.load(request["windows"])]
            np.save(request["logits"], np.stack(found))
            answer = {}
        else:
            answer = {"moments": engine.moments(request["ids"], request["tokens"])}


def moments(tokens: Iterator[int]) -> list[float]:
    """Seconds until each token of a continuation that starts when the first is asked for."""
    started = time.perf_counter()
    return [time.perf_counter() - started for _ in tokens]
