"""The backend that needs nothing: fixed tokens and known logits, so that all above it is tested without an engine.

Its logits favour `(id + 1) % vocabulary` after each `id` by `FAVOUR`; greedy decoding counts upwards.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Job
from edgeq.bundle import Bundle
from edgeq.errors import BackendFault
from edgeq.model import Model
from edgeq.profiles import Placement
from edgeq.recipe import Layout, Recipe
from edgeq.target import Target

ENGINE: tuple[str, ...] = ()
MIXED: tuple[str, ...] = ()
SIZED = False
FAVOUR = 5.0
_FILE = "null.json"


class _Vocabulary(msgspec.Struct):
    vocab: Annotated[int, msgspec.Meta(ge=1)]


class NullSession:
    """Session whose every answer is known beforehand."""

    placement = (Placement(provider="null", device="null", layers=1, bytes=None),)
    one_way: str | None = None

    def __init__(self, vocab: int) -> None:
        self.vocab = vocab

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Count upwards from the last id."""
        for step in range(1, tokens + 1):
            yield (ids[-1] + step) % self.vocab

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Zeros [len(ids), vocabulary] with `FAVOUR` at each id's successor."""
        found = np.zeros((len(ids), self.vocab), np.float32)
        found[np.arange(len(ids)), (np.asarray(ids) + 1) % self.vocab] = FAVOUR
        return found

    def drafter(self) -> None:
        """The model brings none here."""

    def begin(self, tokens: int) -> None:
        """Nothing to forget, and room for everything."""

    def advance(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Logits [keep, vocabulary] after the last ids, which depend on nothing before them."""
        return self.logits(ids[-keep:])

    def rewind(self, count: int) -> None:
        """Nothing to forget."""

    def close(self) -> None:
        """Nothing to release."""


def provider(target: Target) -> str:  # noqa: ARG001
    """No device at all."""
    return "null"


def scale_bits(recipe: Recipe) -> int:  # noqa: ARG001
    """As float32; it stores none."""
    return 32


def activation_group(target: Target, layout: Layout) -> int:  # noqa: ARG001
    """Matrices read floats."""
    return 0


def calibrates_cache(recipe: Recipe) -> bool:  # noqa: ARG001
    """There is no cache."""
    return False


def beside_bytes(job: Job) -> int:  # noqa: ARG001
    """Nothing."""
    return 0


def check(model: Model, recipe: Recipe) -> None:
    """Every recipe is as good as another."""


def tools(target: Target) -> tuple[str, ...]:  # noqa: ARG001
    """The null backend itself."""
    return ("null 1",)


def build(job: Job, out: Path) -> None:
    """Write the vocabulary's size."""
    (out / _FILE).write_bytes(msgspec.json.encode(_Vocabulary(job.checkpoint.model.vocab)))
    job.progress("null", 1, 1)


def load(folder: Path, bundle: Bundle) -> NullSession:  # noqa: ARG001
    """Session of the vocabulary that `build` wrote."""
    try:
        return NullSession(msgspec.json.decode((folder / _FILE).read_bytes(), type=_Vocabulary).vocab)
    except (OSError, msgspec.DecodeError) as error:
        raise BackendFault(f"{folder / _FILE}: cannot be read", why=str(error)) from error
