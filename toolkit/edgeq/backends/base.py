"""The one interface between edgeq and an engine: tools, build, load."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from edgeq.bundle import Bundle, Compiled
from edgeq.checkpoint import Checkpoint
from edgeq.model import Model
from edgeq.profiles import Placement
from edgeq.recipe import Recipe
from edgeq.target import Target

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class CacheRanges:
    """Largest magnitudes of keys, at any rotation, and of values: float32 [layers with attention, heads, head size]."""

    keys: NDArray[np.float32]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One build: which checkpoint, how quantized, for which device, for how many tokens of context.

    `cache` is what calibration saw, for caches that need it; None: the backend calibrates its own.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    target: Target
    context: int
    progress: Progress
    cache: CacheRanges | None = None


class Session(Protocol):
    """A loaded bundle: token ids in, token ids and logits out."""

    @property
    def placement(self) -> tuple[Placement, ...]:
        """What lives on which device, as the engine itself reports it."""
        ...

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
    """A toolchain: satisfied by a module with tools, build and load, and what has to be known before they are called.

    ENGINE: the packages that run its bundles.
    """

    ENGINE: tuple[str, ...]

    def provider(self, target: Target) -> str:
        """API that runs a target's bundles: "cpu", "cuda", "metal", "vulkan", ..."""
        ...

    def scale_bits(self, recipe: Recipe) -> int:
        """Bits that it stores for the scale of a plain group."""
        ...

    def check(self, model: Model, recipe: Recipe) -> None:
        """Raise UsageFault, with a recipe that works, when the engine cannot hold one."""
        ...

    def tools(self, target: Target) -> tuple[str, ...]:
        """Names and versions of what builds; raises MissingTool with the line that installs it on the target."""
        ...

    def build(self, job: Job, out: Path) -> Compiled | None:
        """Write what the engine needs into the folder `out`, beside tokenizer and template; say what was compiled."""
        ...

    def load(self, folder: Path, bundle: Bundle) -> Session:
        """Session of a built folder; raises MissingTool when the engine is absent, BackendFault when it fails."""
        ...
