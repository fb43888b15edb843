"""The gate: a bundle is loaded, run and compared with its float32 reference before anyone may use it."""

from __future__ import annotations

import platform
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from edgeq import accuracy
from edgeq.accuracy import Losses, Reference
from edgeq.backends.base import Progress, Session
from edgeq.bundle import Gate
from edgeq.errors import BackendFault, GateFailed

Scorer = Callable[[Sequence[int]], NDArray[np.float32]]
"""Logits [tokens, vocabulary] of a text."""
ENGINE_SHARE = 0.25
ENGINE_FLOOR = 0.002
DECODING_FLOOR = 0.2


def check(
    reference: Reference,
    session: Session,
    max_loss: float,
    weights_only: float,
    progress: Progress,
    exact: Scorer | None = None,
) -> Gate:
    """Gate's result for a loaded bundle.

    It passes with finite logits, a mean KL divergence <= `max_loss` (nats per token) that is also explained by the
    quantized weights (`weights_only`, plus a quarter and 0.002 for the engine's own arithmetic: small errors add up as
    their squares, and 8-bit activations are finer than 4-bit weights), and sound decoding: tokens that scoring calls
    the likeliest too, within 0.2 nats, and a continuation that repeats one phrase only where the recorded one does, or
    where the float model, `exact`, would write it too or repeats one itself.
    Raises BackendFault when the logits have another shape than was asked for.
    """
    losses: list[Losses] = []
    for index, window in enumerate(reference.windows):
        progress("gate", index, len(reference.windows))
        logits = session.logits(window.tolist())
        if logits.shape != (len(window), reference.vocab):
            raise BackendFault(
                f"the engine gave logits of shape {list(logits.shape)}",
                why=f"{len(window)} tokens of a vocabulary of {reference.vocab} were asked for.",
            )
        if not np.isfinite(logits).all():
            return Gate.failed(f"window {index}: logits are not finite", weights_only, max_loss, reference.text_sha256)
        losses.append(accuracy.compare(reference, index, logits))
    found = accuracy.summarize(reference, losses)
    reason = None
    if not found.kl_mean <= max_loss:  # a NaN must not pass
        reason = f"KL divergence {found.kl_mean:.4f} nats per token is above the limit of {max_loss:g}"
    elif not found.kl_mean <= weights_only * (1 + ENGINE_SHARE) + ENGINE_FLOOR:
        reason = (
            f"KL divergence {found.kl_mean:.4f}, but the quantized weights alone lose only {weights_only:.4f} nats per "
            "token: the engine does not run the weights that were quantized"
        )
    else:
        reason = _decoding_fault(reference, session, exact)
    progress("gate", len(reference.windows), len(reference.windows))
    return Gate(
        passed=reason is None,
        kl_mean=found.kl_mean,
        kl_weights_only=weights_only,
        top1_agreement=found.top1_agreement,
        perplexity_reference=found.perplexity_reference,
        perplexity=found.perplexity,
        reason=reason,
        max_loss=max_loss,
        tokens=found.tokens,
        text_sha256=reference.text_sha256,
        ran_on=platform.machine(),
    )


def require(result: Gate, what: str, run: str) -> None:
    """Raise GateFailed when a gate did not pass."""
    if not result.passed:
        raise GateFailed(f"{what}: {result.reason}", why="The accuracy gate refused it.", run=run)


def decoded(reference: Reference, session: Session) -> list[int]:
    """Tokens that a session goes on with after the reference's first `PROMPT` tokens."""
    return list(session.generate(reference.windows[0, : accuracy.PROMPT].tolist(), accuracy.CONTINUATION))


def _decoding_fault(reference: Reference, session: Session, exact: Scorer | None) -> str | None:
    """What is wrong with greedy decoding, which may run other kernels or another graph than scoring does."""
    prompt, ours = reference.windows[0, : accuracy.PROMPT].tolist(), decoded(reference, session)
    shortfall = _shortfall(session.logits(prompt + ours), ours)
    if not shortfall <= DECODING_FLOOR:
        return f"decoded tokens score {shortfall:.2f} nats below the likeliest: decoding and scoring disagree"
    if not accuracy.loops(ours) or accuracy.loops(reference.continuation.tolist()):
        return None
    if exact is not None and _writes_loops(exact, prompt, ours):
        return None
    return "greedy decoding repeats one phrase, the float32 reference does not"


def _writes_loops(exact: Scorer, prompt: list[int], ours: list[int]) -> bool:
    """Whether the float model would write what a bundle wrote, or repeats a phrase of its own."""
    shortfall = _shortfall(exact(prompt + ours), ours)
    if not shortfall > DECODING_FLOOR:
        return shortfall <= DECODING_FLOOR
    written = list(prompt)
    for _ in ours:
        written.append(int(exact(written)[-1].argmax()))
    return accuracy.loops(written[len(prompt) :])


def _shortfall(logits: NDArray[np.float32], last: list[int]) -> float:
    """Mean of what the last tokens score below the likeliest ones, in nats, by logits of all tokens."""
    scored = logits[-len(last) - 1 : -1]
    return float((scored.max(axis=1) - scored[np.arange(len(last)), last]).mean())
