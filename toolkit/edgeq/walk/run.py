"""The walk: a layer at a time, the float model and the quantized one side by side over the same windows.

It yields the reference, the quantized matrices and their loss, and holds one layer of each model, hidden states and
second moments; never a whole model.
"""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq import accuracy
from edgeq.accuracy import Reference, likeliest
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput
from edgeq.quantize.kept import Rows, Solutions
from edgeq.quantize.solve import stored_exactly
from edgeq.recipe import Recipe
from edgeq.size import is_quantized
from edgeq.walk import gradients, head, layers, tuning, windows
from edgeq.walk.layered import Layered, give_back
from edgeq.walk.states import States
from edgeq.walk.windows import Held

LOGITS = 1 << 25
"""Logits that are held at once, of all windows together, of each model."""
FORMAT = 5
"""Counts changes of what a walk, or sensitivities, find: what another edgeq has kept is not gone on with."""
_WEIGHTS = "weights.npy"


@dataclass(frozen=True)
class Walked:
    """What a walk found: the reference, the loss of the quantized weights alone (KL, nats per token), the solutions."""

    reference: Reference
    weights_only: float
    solutions: Solutions


def reference(checkpoint: Checkpoint, held: Held, progress: Progress) -> Reference:
    """The float model's predictions over a text; raises CorruptInput when they are not finite."""
    parts = [_recorded(checkpoint, held, group, found) for group, found in _exact(checkpoint, held.windows, progress)]
    return _joined(held, parts, checkpoint.model.vocab)


def logits(checkpoint: Checkpoint, tokens: Sequence[int], progress: Progress) -> NDArray[np.float32]:
    """The float model's logits [tokens, vocabulary] of one text."""
    ((_, found),) = _exact(checkpoint, np.array([tokens], np.int32), progress)
    one: NDArray[np.float32] = found[0]
    return one


def _exact(
    checkpoint: Checkpoint, windows: NDArray[np.int32], progress: Progress
) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Windows, and their logits [windows, length, vocabulary] by the float model."""
    with ExitStack() as stack:
        model = _open(stack, checkpoint)
        states = head.embed(head.exact(checkpoint, head.TABLE), windows)
        model.through(states, "reference", progress)
        yield from _logits(model, states, head.exact(checkpoint, head.output(checkpoint)))


def quantize(
    checkpoint: Checkpoint,
    recipe: Recipe,
    held: Held,
    text: NDArray[np.int32] | None,
    folder: Path | None,
    progress: Progress,
) -> Walked:
    """Reference, and a solution of every matrix under a recipe with the loss of all of them.

    text: token windows [count, length] of another text, for a calibrated recipe, which is fitted to random tokens too
    (`windows.with_drawn`), and whose `folder` keeps what is done: a walk that was stopped goes on there after the last
    finished layer. Raises CorruptInput as `reference` does, and what solving raises.
    """
    solutions = Solutions(checkpoint, recipe, folder)
    names = [name for name in checkpoint.model.tensors() if is_quantized(name)]
    if all(stored_exactly(checkpoint, recipe, name) for name in names):
        return Walked(reference(checkpoint, held, progress), 0.0, solutions)
    read = None if text is None else windows.fitted(text)
    fitted = None if read is None else windows.with_drawn(read, checkpoint.model.vocab)
    with ExitStack() as stack:
        exact, quantized = _open(stack, checkpoint), _open(stack, checkpoint)
        states = States.load(folder) if folder else None
        weights = None
        if recipe.guided:
            assert read is not None
            assert fitted is not None
            assert folder is not None
            weights = _token_weights(exact, recipe, solutions, fitted, len(read), folder, progress)
        states = states or _begin(checkpoint, recipe, solutions, held, fitted)
        while states.layer < exact.count:
            progress("layers", states.layer, exact.count)
            if folder is not None:
                states = states.copied(folder)
            layers.step(exact, quantized, recipe, solutions, states, None if weights is None else weights[states.layer])
            if folder is not None:
                states.save(folder)
        progress("layers", exact.count, exact.count)
        if recipe.tuned:
            assert text is not None
            solutions = tuning.tune(exact, solutions, text, progress)
            states.quantized_held = head.embed(solutions.rows(head.TABLE), held.windows)
            tuned = _open(stack, checkpoint, solutions)
            tuned.through(states.quantized_held, "tuned", progress)
        return _ended(exact, quantized, held, states, solutions, progress)


def _open(stack: ExitStack, checkpoint: Checkpoint, solutions: Solutions | None = None) -> Layered:
    model = Layered(checkpoint, solutions.values if solutions else None)
    stack.callback(model.close)
    return model


def _begin(
    checkpoint: Checkpoint, recipe: Recipe, solutions: Solutions, held: Held, fitted: NDArray[np.int32] | None
) -> States:
    tables = (head.exact(checkpoint, head.TABLE), solutions.rows(head.TABLE))
    exact_held, quantized_held = (head.embed(table, held.windows) for table in tables)
    if fitted is None or not recipe.calibrated:
        return States(0, exact_held, quantized_held, exact_held[:0], quantized_held[:0])
    exact, quantized = (head.embed(table, fitted) for table in tables)
    return States(0, exact_held, quantized_held, exact if recipe.guided else exact[:0], quantized)


def _token_weights(
    model: Layered,
    recipe: Recipe,
    solutions: Solutions,
    fitted: NDArray[np.int32],
    text: int,
    folder: Path,
    progress: Progress,
) -> NDArray[np.float32]:
    """Weights of calibration tokens, whose first `text` windows are of a text.

    On the way the output layer is solved, for the float model's last states.
    """
    kept, passes = folder / _WEIGHTS, folder / "gradients"
    if not kept.is_file():
        passes.mkdir(exist_ok=True)
        found, states = gradients.token_weights(model, fitted, text, passes, progress)
        layers.solve_output(model, recipe, solutions, states)
        partial = kept.with_suffix(".partial")
        with partial.open("wb") as stream:
            np.save(stream, found)
        partial.replace(kept)
    shutil.rmtree(passes, ignore_errors=True)
    try:
        weights: NDArray[np.float32] = np.load(kept, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise CorruptInput(
            f"{kept}: not the weights that a walk kept", why=str(error), run="edgeq build ... again, from the start"
        ) from error
    return weights


def _ended(
    exact: Layered, quantized: Layered, held: Held, states: States, solutions: Solutions, progress: Progress
) -> Walked:
    """Logits of both models a group of windows at a time, and what they say."""
    name = head.output(exact.checkpoint)
    parts: list[Reference] = []
    losses = []
    sides = (
        _logits(exact, states.exact_held, head.exact(exact.checkpoint, name)),
        _logits(quantized, states.quantized_held, solutions.rows(name)),
    )
    for (group, theirs), (_, found) in zip(*sides, strict=True):
        progress("logits", group.start, len(held.windows))
        part = _recorded(exact.checkpoint, held, group, theirs)
        losses += [accuracy.compare(part, window, logits) for window, logits in enumerate(found)]
        parts.append(part)
    progress("logits", len(held.windows), len(held.windows))
    record = _joined(held, parts, exact.checkpoint.model.vocab)
    return Walked(record, accuracy.summarize(record, losses).kl_mean, solutions)


def _logits(model: Layered, states: NDArray[np.float32], rows: Rows) -> Iterator[tuple[slice, NDArray[np.float32]]]:
    """Windows, and their logits [windows, length, vocabulary], as many at once as memory is meant for."""
    count, length, _ = states.shape
    vocab = model.checkpoint.model.vocab
    at_once = max(1, LOGITS // (length * vocab))
    for start in range(0, count, at_once):
        give_back()
        group = slice(start, min(start + at_once, count))
        found = head.logits(model, states[group].reshape(-1, states.shape[2]), rows)
        yield group, found.reshape(-1, length, vocab)


def _recorded(checkpoint: Checkpoint, held: Held, group: slice, logits: NDArray[np.float32]) -> Reference:
    """Reference of some windows."""
    if not np.isfinite(logits).all():
        raise CorruptInput("the checkpoint's own float32 logits are not finite", run="download the checkpoint again")
    windows = held.windows[group]
    ids, log_probs, following = [], [], []
    for window, scores in zip(windows, logits, strict=True):
        found, kept, everything = likeliest(scores[:-1], held.keep)
        ids.append(found)
        log_probs.append(kept)
        following.append(np.take_along_axis(everything, window[1:, None].astype(np.int64), axis=1)[:, 0])
    nothing = np.empty(0, np.int32)
    vocab = checkpoint.model.vocab
    return Reference(windows, np.stack(ids), np.stack(log_probs), np.stack(following), nothing, held.sha256, vocab)


def _joined(held: Held, parts: list[Reference], vocab: int) -> Reference:
    ids, log_probs, following = (
        np.concatenate([getattr(part, field) for part in parts]) for field in ("ids", "log_probs", "next_log_probs")
    )
    return Reference(held.windows, ids, log_probs, following, np.empty(0, np.int32), held.sha256, vocab)
