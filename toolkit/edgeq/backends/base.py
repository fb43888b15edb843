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
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.recipe import Layout, Recipe
from edgeq.target import Target

Progress = Callable[[str, int, int], None]
DRAFT = 7
"""Most tokens that a session can be asked to take back: what a draft may hold."""


@dataclass(frozen=True)
class CacheRanges:
    """Largest magnitudes of keys, at any rotation, and of values: float32 [layers with attention, heads, head size]."""

    keys: NDArray[np.float32]
    values: NDArray[np.float32]


@dataclass(frozen=True)
class Job:
    """One build: which checkpoint, how quantized, for which device, for how many tokens of context.

    kept: folder of the solutions that a walk found, for a calibrated recipe; cache: what calibration saw, where the
    backend calibrates_cache.
    """

    checkpoint: Checkpoint
    recipe: Recipe
    target: Target
    context: int
    progress: Progress
    kept: Path | None = None
    cache: CacheRanges | None = None

    def solution(self, name: str) -> Solution | BlockSolution:
        """Quantized form of one matrix; raises what `solve` raises."""
        return Solutions(self.checkpoint, self.recipe, self.kept)(name)


class Drafter(Protocol):
    """What guesses the next tokens."""

    def guess(self, found: Sequence[int], most: int) -> Sequence[int]:
        """At most `most` tokens that may follow when `found` is put behind all the tokens of earlier calls."""
        ...


class Session(Protocol):
    """A loaded bundle: token ids in, token ids and logits out.

    Either asked for a whole text at once by `generate` and `logits`, or led step by step by `begin`, `advance` and
    `rewind`; the former forget what the latter did.
    """

    @property
    def placement(self) -> tuple[Placement, ...]:
        """What lives on which device, as the engine itself reports it."""
        ...

    @property
    def one_way(self) -> str | None:
        """Why it cannot be led step by step and take tokens back; None when it can."""
        ...

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation of `ids`: the first `next` is the prefill, each further one a decode step."""
        ...

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        ...

    def drafter(self) -> Drafter | None:
        """The model's own for the text that begins next, such as a multi-token-prediction head; None without one."""
        ...

    def begin(self, tokens: int) -> None:
        """Forget everything, and have room for `tokens` tokens; raises UsageFault when the context has not."""
        ...

    def advance(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Run tokens after those already seen: logits after the last `keep`, [keep, vocabulary], valid until the next.

        `keep` is 1 for any number of tokens, or len(ids) for at most DRAFT + 1.
        """
        ...

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens, at most DRAFT and fewer than the last `advance` kept logits of."""
        ...

    def close(self) -> None:
        """Release the engine's memory."""
        ...


class Backend(Protocol):
    """A toolchain: satisfied by a module with tools, build and load, and what has to be known before they are called.

    ENGINE: the packages that run its bundles. MIXED: layouts that may lie side by side in one bundle, by their words.
    SIZED: whether `beside_bytes` is all that it writes beside matrices, which it writes as the recipe says.
    """

    ENGINE: tuple[str, ...]
    MIXED: tuple[str, ...]
    SIZED: bool

    def provider(self, target: Target) -> str:
        """API that runs a target's bundles: "cpu", "cuda", "metal", "vulkan", ..."""
        ...

    def scale_bits(self, recipe: Recipe) -> int:
        """Bits that it stores for the scale of a plain group."""
        ...

    def activation_group(self, target: Target, layout: Layout) -> int:
        """Inputs that share a scale where matrices of a layout read them rounded to 8 bits.

        More than there are: all of them; 0: they are read as floats.
        """
        ...

    def calibrates_cache(self, recipe: Recipe) -> bool:
        """Whether it keeps a recipe's keys and values in scales that calibration finds, `Job.cache`."""
        ...

    def beside_bytes(self, job: Job) -> int:
        """Predicted bytes of what `build` writes beside the matrices that recipes quantize."""
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
