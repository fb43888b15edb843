"""The one interface between edgeq and an engine: tools, build, load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle import Bundle
from edgeq.checkpoint import Checkpoint
from edgeq.recipe import Recipe
from edgeq.target import Target

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Job:
    """One build: which checkpoint, how quantized, for which device, for how many tokens of context."""

    checkpoint: Checkpoint
    recipe: Recipe
    target: Target
    context: int
    progress: Progress


class Session(Protocol):
    """A loaded bundle: token ids in, token ids and logits out."""

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation of `ids`: the first `next` is the prefill, each further one a decode step."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        ...

    def close(self) -> None:
        """Release the engine's memory."""
        ...


class Backend(Protocol):
    """A toolchain: satisfied by a module with these functions, its provider's name, and the packages that run it."""

    PROVIDER: str
    ENGINE: tuple[str, ...]

    def tools(self) -> tuple[str, ...]:
        """Names and versions of what builds; raises MissingTool with the line that installs it."""
        ...

    def build(self, job: Job, out: Path) -> None:
        """Write what the engine needs into the folder `out`, beside tokenizer and template."""
        ...

    def load(self, folder: Path, bundle: Bundle) -> Session:
        """Session of a built folder; raises MissingTool when the engine is absent, BackendFault when it fails."""
        ...
