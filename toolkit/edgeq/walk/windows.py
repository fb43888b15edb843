"""Windows of texts: held out, on which losses are measured, those that matrices are fitted to, and random tokens."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.accuracy import TOP_K
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault

LENGTH = 128
QUICK_WINDOWS = 8
FULL_WINDOWS = 48
FULL_TOP_K = 4096
FITTED = 32
"""Windows of a calibration text that matrices are fitted to."""
_TEXT_PER_DRAWN = 8
WITH_DRAWN = FITTED + -(-FITTED // _TEXT_PER_DRAWN)
"""The same, with those of random tokens."""
_SENSED_PER_DRAWN = 4
SENSED = FITTED + -(-FITTED // _SENSED_PER_DRAWN)
"""Windows of both kinds that sensitivities are measured on."""
_SEED = 21


@dataclass(frozen=True)
class Held:
    """Token windows, int32 [count, length], of a text, and how many of each position's likeliest tokens are kept."""

    windows: NDArray[np.int32]
    sha256: str
    keep: int


def quick(checkpoint: Checkpoint, text: str, longest: int) -> Held:
    """Windows for the reference that a bundle carries, of at most `longest` tokens."""
    return _held(checkpoint, text, QUICK_WINDOWS, min(LENGTH, longest), TOP_K)


def full(checkpoint: Checkpoint, text: str) -> Held:
    """Windows of much of a text, more kept than in `quick`."""
    return _held(checkpoint, text, FULL_WINDOWS, LENGTH, FULL_TOP_K)


def _held(checkpoint: Checkpoint, text: str, count: int, length: int, keep: int) -> Held:
    vocab = checkpoint.model.vocab
    found = windows(checkpoint.folder, text, count, length, vocab)
    return Held(found, hashlib.sha256(text.encode()).hexdigest(), min(keep, vocab))


def windows(folder: Path, text: str, count: int, length: int, vocab: int) -> NDArray[np.int32]:
    """Token windows [count, length] spread evenly over a text, by the tokenizer of `folder`.

    Fewer when the text is short; raises UsageFault when it does not fill one, CorruptInput when the tokenizer
    is damaged or gives ids beyond the model's vocabulary.
    """
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    except Exception as error:
        raise CorruptInput(f"{folder / 'tokenizer.json'}: cannot tokenize", why=str(error)) from error
    if max(ids, default=0) >= vocab:
        raise CorruptInput(f"{folder / 'tokenizer.json'}: gives token {max(ids)}, the model has {vocab}")
    count = min(count, len(ids) // length)
    if count == 0:
        raise UsageFault(f"the text has {len(ids)} tokens", why=f"The accuracy check needs at least {length}.")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int32)


def fitted(windows: NDArray[np.int32]) -> NDArray[np.int32]:
    """Those of some windows, spread over them, that matrices are fitted to: `FITTED` at most."""
    found: NDArray[np.int32] = windows[np.linspace(0, len(windows) - 1, min(FITTED, len(windows))).astype(int)]
    return found


def drawn(count: int, length: int, vocab: int) -> NDArray[np.int32]:
    """Windows [count, length] of random tokens, each as likely as any other: of no kind that a checkpoint learnt."""
    return np.random.default_rng(_SEED).integers(0, vocab, (count, length), np.int32)


def with_drawn(windows: NDArray[np.int32], vocab: int) -> NDArray[np.int32]:
    """Windows of a text and, for every eight of them or fewer, one of random tokens.

    What is fitted to one kind of text alone loses more on others.
    """
    count, length = windows.shape
    return np.concatenate([windows, drawn(-(-count // _TEXT_PER_DRAWN), length, vocab)])


def sensed(windows: NDArray[np.int32], vocab: int) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Windows of a text that sensitivities are measured on, and of random tokens, whose losses vary less."""
    read = fitted(windows)
    count, length = read.shape
    return read, drawn(-(-count // _SENSED_PER_DRAWN), length, vocab)
