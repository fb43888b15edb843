"""What every side loses on the demo checkpoints, through one computation: sides hand over logits and bytes."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeq import sources
from edgeq.checkpoint import Checkpoint
from peers import figures, texts
from peers.base import Side, Unavailable
from peers.figures import Goal, Row
from peers.llamacpp import files, reorder
from peers.served import Served
from peers.serving import AS_RUN, WEIGHTS_ONLY

FOUR_BITS = ("llama.cpp Q4_K_M", "OpenVINO int4", "genai builder int4")
GGUF = ("llama.cpp Q4_K_M imatrix",)
LEARNED = ("AutoRound w4",)
BEST, OTHER_TEXT, OF_GGUF, OF_LEARNED = (Goal("ratio", "at most", limit) for limit in (0.3, 0.5, 0.25, 0.8))
BITS_APART = 0.02
"""Bits per weight that are no difference: vectors in 16 or 32 bits, a checkpoint's odd ends."""


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """KL divergence of one side from the float32 model, nats per token, by order of hidden units and window.

    `bits` for each of the model's weights with their scales, a tied table counted once even where an artifact holds it
    a second time for its rows; `bytes` that the artifact really stores. Without `kl`, the reason.
    """

    model: str
    text: str
    how: str
    side: str
    bits: float | None = None
    bytes: int | None = None
    kl: tuple[tuple[float, ...], ...] = ()
    reason: str = ""

    @property
    def windows(self) -> tuple[float, ...]:
        """Divergence on each window, the mean over the orders."""
        return tuple(np.mean(self.kl, axis=0).tolist())


def measure(sides: Sequence[Side], models: Iterable[str], folder: Path, orders: int, windows: int) -> Iterator[Loss]:
    """Losses of all sides on every text; a side that cannot be had gives one without figures."""
    for model in models:
        checkpoint = Checkpoint.open(sources.find(model, offline=True).folder)
        with files.scratch(folder) as scratch:
            known = {}
            for text in texts.TEXTS:
                tokens = texts.windows(checkpoint, text, windows)
                np.save(scratch / f"{text}.npy", tokens)
                known[text] = texts.reference(checkpoint, tokens)
            np.save(scratch / "calibration.npy", texts.calibration_windows(checkpoint))
            shuffled = [_plain(reorder.write(checkpoint, seed, scratch / f"order-{seed}")) for seed in range(orders)]
            for side in sides:
                print(f"bench_peers: {model}, {side}: loss", file=sys.stderr)
                yield from _side(side, model, shuffled, known, scratch)


def _plain(checkpoint: Checkpoint) -> Checkpoint:
    """Checkpoint without its chat template, which edgeq would put the calibration text of a folder into."""
    (checkpoint.folder / "chat_template.jinja").unlink(missing_ok=True)
    return checkpoint


def _side(
    side: Side, model: str, shuffled: Sequence[Checkpoint], known: dict[str, NDArray[np.float32]], scratch: Path
) -> Iterator[Loss]:
    found: dict[tuple[str, str], list[tuple[float, ...]]] = {}
    size = counted = 0
    try:
        for checkpoint in shuffled:
            with files.scratch(scratch) as out:
                side.make(checkpoint.folder, scratch / "calibration.npy", out)
                for how in side.peer.HOWS:
                    with Served(side.run(out, how), side.environment()) as served:
                        size = served.weights_bytes
                        counted = served.read_bytes if checkpoint.model.tied else size
                        for text, reference in known.items():
                            logits = served.logits(scratch / f"{text}.npy", scratch)
                            found.setdefault((text, how), []).append(tuple(divergence(reference, logits).tolist()))
    except Unavailable as missing:
        yield Loss(model=model, text="", how="", side=str(side), reason=str(missing))
        return
    bits = 8 * counted / shuffled[0].model.parameters
    for (text, how), samples in found.items():
        yield Loss(model=model, text=text, how=how, side=str(side), bits=bits, bytes=size, kl=tuple(samples))


def divergence(reference: NDArray[np.float32], found: NDArray[np.float32]) -> NDArray[np.float64]:
    """Mean KL divergence of each window, nats per token, over the whole vocabulary in float64.

    Of logits [windows, length, vocabulary]. Terms p log(p/q) - p + q are never negative, and their sum is the KL
    divergence of two distributions.
    """
    means = []
    for one, other in zip(reference, found, strict=True):
        log_p, log_q = (_log_softmax(logits.astype(np.float64)) for logits in (one, other))
        p = np.exp(log_p)
        means.append((p * (log_p - log_q) - p + np.exp(log_q)).sum(axis=1).mean())
    return np.array(means)


def _log_softmax(logits: NDArray[np.float64]) -> NDArray[np.float64]:
    shifted = logits - logits.max(axis=1, keepdims=True)
    found: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return found


def goals(losses: Sequence[Loss]) -> Iterator[Row]:
    """Each of edgeq's losses against the best peer of each goal that spends at least as many bits.

    As run is compared with as run; learned rounding, which has no engine, with weights only. Where every peer of a goal
    spends fewer bits, or none could be had, there is no row.
    """
    for ours in losses:
        if not (ours.side.startswith("edgeq ") and ours.kl):
            continue
        held_out = ours.text == texts.HELD_OUT
        wanted: list[tuple[tuple[str, ...], Goal]] = (
            [(FOUR_BITS, BEST if held_out else OTHER_TEXT)] if ours.how == AS_RUN else []
        )
        if ours.how == AS_RUN and ours.side.endswith("@llamacpp"):
            wanted.append((GGUF, OF_GGUF if held_out else OTHER_TEXT))
        if ours.how == WEIGHTS_ONLY and held_out:
            wanted.append((LEARNED, OF_LEARNED))
        for names, goal in wanted:
            if best := rival(ours, losses, names):
                yield Row(
                    part=f"loss {ours.model}, {ours.text} text, {ours.how}",
                    what=f"{ours.side} against {best.side}",
                    unit="nats",
                    edgeq=ours.windows,
                    peer=best.windows,
                    middle="mean",
                    goal=goal,
                )


def rival(ours: Loss, losses: Iterable[Loss], names: tuple[str, ...]) -> Loss | None:
    """Lowest loss, in the same circumstances, of the peers whose names begin so and that spend no fewer bits."""
    able = [
        each
        for each in losses
        if each.kl
        and each.side.startswith(names)
        and (each.model, each.text, each.how) == (ours.model, ours.text, ours.how)
        and (each.bits or 0) >= (ours.bits or 0) - BITS_APART
    ]
    return min(able, key=lambda each: figures.mean(each.windows), default=None)
