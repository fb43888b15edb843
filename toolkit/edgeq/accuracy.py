"""How far a bundle is from its float32 reference, token by token.

The reference is kept as the log-probabilities of its `k` likeliest tokens at each position, the rest as one
tail: exact when `k` is the vocabulary, otherwise a lower bound of the KL divergence (the data-processing
inequality: merging outcomes never raises it).
"""

from __future__ import annotations

import io
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import CorruptInput
from edgeq.loss import Accuracy, Flips, Interval

TOP_K = 1024
PROMPT = 32
CONTINUATION = 32
_RESAMPLES = 2000
_TINY = 1e-30


@dataclass(frozen=True)
class Reference:
    """Float32 predictions over windows of a text.

    windows: int32 [count, length]; ids: uint32 and log_probs: float32 [count, length - 1, k], likeliest first;
    next_log_probs: float32 [count, length - 1], of the token that the text goes on with;
    continuation: int32, what the bundle that it was recorded for wrote after the first `PROMPT` tokens of the first
    window; empty before.
    """

    windows: NDArray[np.int32]
    ids: NDArray[np.uint32]
    log_probs: NDArray[np.float32]
    next_log_probs: NDArray[np.float32]
    continuation: NDArray[np.int32]
    text_sha256: str
    vocab: int

    @property
    def exact(self) -> bool:
        """Whether every token's probability is kept."""
        return bool(self.ids.shape[2] == self.vocab)

    def describe(self) -> str:
        """Precision and completeness of the reference, for reports."""
        kept = "all" if self.exact else f"{self.ids.shape[2]} likeliest"
        return f"transformers float32, {kept} of {self.vocab} log-probabilities"


@dataclass(frozen=True)
class Losses:
    """Per-token comparison of one window, each array [length - 1]."""

    kl: NDArray[np.float64]
    agree: NDArray[np.bool_]
    nll_reference: NDArray[np.float64]
    nll: NDArray[np.float64]
    right_reference: NDArray[np.bool_]
    right: NDArray[np.bool_]


def log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float32]:
    """Log-probabilities of logits [n, vocabulary]."""
    shifted: NDArray[np.float32] = logits - logits.max(axis=1, keepdims=True)
    total = np.exp(shifted).sum(axis=1, keepdims=True, dtype=np.float64)
    shifted -= np.log(total).astype(np.float32)
    return shifted


def likeliest(
    logits: NDArray[np.float32], k: int
) -> tuple[NDArray[np.uint32], NDArray[np.float32], NDArray[np.float32]]:
    """Ids and log-probabilities of the `k` likeliest tokens at each row, likeliest first, and all log-probabilities."""
    log_probs = log_softmax(logits)
    if k < log_probs.shape[1]:
        ids = np.sort(np.argpartition(log_probs, -k, axis=1)[:, -k:], axis=1)
    else:
        ids = np.broadcast_to(np.arange(k), log_probs.shape)
    kept = np.take_along_axis(log_probs, ids, axis=1)
    order = np.argsort(-kept, axis=1, kind="stable")
    ids = np.take_along_axis(ids, order, axis=1)
    return ids.astype(np.uint32), np.take_along_axis(kept, order, axis=1), log_probs


def compare(reference: Reference, window: int, logits: NDArray[np.float32]) -> Losses:
    """Loss of a bundle's logits [length, vocabulary] on one window of the reference."""
    following = reference.windows[window, 1:]
    ids, kept = reference.ids[window].astype(np.int64), reference.log_probs[window].astype(np.float64)
    log_probs = log_softmax(logits[: len(following)]).astype(np.float64)
    ours = np.take_along_axis(log_probs, ids, axis=1)
    kl = _divergence(kept, ours).sum(axis=1)
    if not reference.exact:
        tail_reference, tail = (np.log(np.maximum(1 - np.exp(part).sum(axis=1), _TINY)) for part in (kept, ours))
        kl += _divergence(tail_reference, tail)
    top_reference, top = ids[:, 0], log_probs.argmax(axis=1)
    return Losses(
        kl=kl,
        agree=top == top_reference,
        nll_reference=-reference.next_log_probs[window].astype(np.float64),
        nll=-np.take_along_axis(log_probs, following[:, None].astype(np.int64), axis=1)[:, 0],
        right_reference=top_reference == following,
        right=top == following,
    )


def _divergence(log_p: NDArray[np.float64], log_q: NDArray[np.float64]) -> NDArray[np.float64]:
    """Terms p log(p/q) - p + q: never negative, and their sum is the KL divergence of two distributions.

    Rounding of the logarithms enters squared, so a model compared with itself gives less than 1e-12.
    """
    p, q = np.exp(log_p), np.exp(log_q)
    terms: NDArray[np.float64] = p * (log_p - log_q) - p + q
    return terms


def summarize(reference: Reference, losses: Sequence[Losses]) -> Accuracy:
    """One row over all windows; the intervals resample windows, since tokens of one text are not independent."""
    kl = np.concatenate([loss.kl for loss in losses])
    nll_reference = np.array([loss.nll_reference.mean() for loss in losses])
    nll = np.array([loss.nll.mean() for loss in losses])
    right_reference = np.concatenate([loss.right_reference for loss in losses])
    right = np.concatenate([loss.right for loss in losses])
    lost, gained = int((right_reference & ~right).sum()), int((right & ~right_reference).sum())
    kl_low, kl_high = interval(np.array([loss.kl.mean() for loss in losses]))
    low, high = interval(nll - nll_reference)
    return Accuracy(
        reference=reference.describe(),
        tokens=kl.size,
        text_sha256=reference.text_sha256,
        perplexity_reference=float(np.exp(nll_reference.mean())),
        perplexity=float(np.exp(nll.mean())),
        ln_ratio=Interval(float((nll - nll_reference).mean()), low, high),
        kl_mean=float(kl.mean()),
        kl_low=kl_low,
        kl_high=kl_high,
        kl_p50=float(np.quantile(kl, 0.5)),
        kl_p99=float(np.quantile(kl, 0.99)),
        kl_max=float(kl.max()),
        top1_agreement=float(np.concatenate([loss.agree for loss in losses]).mean()),
        flips=Flips(lost, gained, mcnemar(lost, gained)),
    )


def interval(values: NDArray[np.float64]) -> tuple[float, float]:
    """95 % percentile-bootstrap interval of a mean, with a fixed seed (Efron & Tibshirani 1993)."""
    draws = np.random.default_rng(0).integers(0, values.size, (_RESAMPLES, values.size))
    low, high = np.quantile(values[draws].mean(axis=1), [0.025, 0.975])
    return float(low), float(high)


def mcnemar(lost: int, gained: int) -> float:
    """Two-sided exact p-value that flips both ways are equally likely (McNemar 1947, binomial form)."""
    total, fewer = lost + gained, min(lost, gained)
    tail = sum(math.comb(total, n) for n in range(fewer + 1))
    return float(min(1.0, 2 * tail / 2**total))


def loops(tokens: Sequence[int]) -> bool:
    """Whether a continuation ends in one phrase of at most 8 tokens said at least 4 times."""
    for period in range(1, 9):
        tail = list(tokens[-4 * period :])
        if len(tail) == 4 * period and tail == tail[:period] * 4:
            return True
    return False


def save(reference: Reference, path: Path) -> None:
    """Write a reference as one .npz file."""
    buffer = io.BytesIO()
    np.savez(
        buffer,
        windows=reference.windows,
        ids=reference.ids,
        log_probs=reference.log_probs,
        next_log_probs=reference.next_log_probs,
        continuation=reference.continuation,
        text_sha256=np.array(reference.text_sha256),
        vocab=np.array(reference.vocab),
    )
    path.write_bytes(buffer.getvalue())


def load(path: Path) -> Reference:
    """Reference that `save` wrote; raises CorruptInput when it is damaged."""
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as arrays:
            found = Reference(
                windows=arrays["windows"],
                ids=arrays["ids"],
                log_probs=arrays["log_probs"],
                next_log_probs=arrays["next_log_probs"],
                continuation=arrays["continuation"],
                text_sha256=str(arrays["text_sha256"]),
                vocab=int(arrays["vocab"]),
            )
        _check(found)
    except Exception as error:
        raise CorruptInput(f"{path}: not a recorded reference", why=str(error)) from error
    return found


def _check(found: Reference) -> None:
    """Raise ValueError when the arrays do not fit together, as `compare` takes for granted."""
    count, length = found.windows.shape
    kept = found.ids.shape[-1]
    if count < 1 or length < 2 or not 1 <= kept <= found.vocab:
        raise ValueError(f"{count} windows of {length} tokens, {kept} of {found.vocab} log-probabilities")
    positions = (count, length - 1)
    for name, shape in (("ids", (*positions, kept)), ("log_probs", (*positions, kept)), ("next_log_probs", positions)):
        if getattr(found, name).shape != shape:
            raise ValueError(f"{name} has shape {getattr(found, name).shape} instead of {shape}")
    for name, tokens in (("windows", found.windows), ("ids", found.ids), ("continuation", found.continuation)):
        if tokens.dtype.kind not in "iu" or (tokens.size and not 0 <= tokens.min() <= tokens.max() < found.vocab):
            raise ValueError(f"{name} holds something else than tokens of a vocabulary of {found.vocab}")
    for name in ("log_probs", "next_log_probs"):
        if not np.isfinite(getattr(found, name)).all():
            raise ValueError(f"{name} is not finite")
