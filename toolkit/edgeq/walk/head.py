"""Both ends of a model, the table and the output layer, some rows at a time."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.quantize.kept import Rows
from edgeq.walk.layered import Layered

TABLE = "model.embed_tokens.weight"
_ROWS = 8192
_AT_ONCE = 4


def output(checkpoint: Checkpoint) -> str:
    """Name of the matrix that makes logits: the table where they are tied."""
    return TABLE if checkpoint.model.tied else "lm_head.weight"


def exact(checkpoint: Checkpoint, name: str) -> Rows:
    """Function to rows of a matrix as the checkpoint has them."""

    def rows(which: slice | NDArray[np.intp]) -> NDArray[np.float32]:
        if isinstance(which, slice):
            return checkpoint.rows(name, which.start, which.stop)
        return np.concatenate([checkpoint.rows(name, row, row + 1) for row in which.tolist()])

    return rows


def embed(table: Rows, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Rows of the table for tokens [windows, length]: [windows, length, hidden]."""
    found, places = np.unique(tokens, return_inverse=True)
    return table(found.astype(np.intp))[places.reshape(tokens.shape)]


def logits(model: Layered, hidden: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
    """Logits [length, vocabulary] of states [length, hidden] after the last layer, by the rows of an output layer."""
    return products(model, normed(model, hidden), rows)


def normed(model: Layered, hidden: NDArray[np.float32]) -> Any:
    """What the output layer reads (torch.Tensor), for states [length, hidden] after the last layer."""
    import torch

    with torch.no_grad():
        return model.final_norm(torch.from_numpy(hidden))


def products(model: Layered, read: Any, rows: Rows) -> NDArray[np.float32]:
    """What an output layer makes, [length, vocabulary], of what it reads, a tensor [length, hidden]."""
    import torch

    vocab = model.checkpoint.model.vocab
    found = np.empty((len(read), vocab), np.float32)

    def part(start: int) -> None:
        here = slice(start, min(start + _ROWS, vocab))
        found[:, here] = (read @ torch.from_numpy(rows(here)).T).numpy()

    model.parallel(part, range(0, vocab, _ROWS))
    return found


def slopes(model: Layered, hidden: NDArray[np.float32], seed: int) -> NDArray[np.float32]:
    """Gradients of log p(y) with respect to states [windows, length, hidden] after the last layer.

    y is drawn at each token from the model's own prediction.
    """
    found = np.empty_like(hidden)
    rows = exact(model.checkpoint, output(model.checkpoint))
    for window, states in enumerate(hidden):
        slope = _chances(logits(model, states, rows))
        drawn = _drawn(slope, np.random.default_rng((seed, window)))
        np.negative(slope, out=slope)
        slope[np.arange(len(slope)), drawn] += 1
        found[window] = _before_norm(model, states, _times(model, slope, rows))
    return found


def divergence_slopes(
    model: Layered, exact_hidden: NDArray[np.float32], hidden: NDArray[np.float32], exact_rows: Rows, rows: Rows
) -> tuple[NDArray[np.float32], list[float]]:
    """Gradients of the mean KL divergence from a float model's predictions, with respect to another's states.

    Both are states [windows, length, hidden] after the last layer, each with the rows of its output layer. Beside the
    gradients the mean divergence of each window, nats per token.
    """
    found, lost = np.empty_like(hidden), []
    for window, (wanted, states) in enumerate(zip(exact_hidden, hidden, strict=True)):
        slope, chances = _logarithms(logits(model, states, rows)), _logarithms(logits(model, wanted, exact_rows))
        apart = chances - slope
        np.exp(chances, out=chances)
        lost.append(float(np.einsum("ij,ij->", chances, apart)) / len(apart))
        del apart
        np.exp(slope, out=slope)
        slope -= chances
        slope /= hidden.shape[0] * hidden.shape[1]
        found[window] = _before_norm(model, states, _times(model, slope, rows))
    return found, lost


def _logarithms(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Logarithms of the probabilities of logits [n, vocabulary], in their place."""
    scores -= scores.max(axis=1, keepdims=True)
    for row in scores:
        row -= np.log(np.exp(row).sum())
    return scores


def _chances(scores: NDArray[np.float32]) -> NDArray[np.float32]:
    """Probabilities of logits [n, vocabulary], in their place."""
    scores -= scores.max(axis=1, keepdims=True)
    np.exp(scores, out=scores)
    scores /= scores.sum(axis=1, keepdims=True)
    return scores


def _drawn(chances: NDArray[np.float32], rng: np.random.Generator) -> list[int]:
    """One index from each row of chances."""
    sums = (np.cumsum(row, dtype=np.float64) for row in chances)
    return [
        int(np.searchsorted(upto, mark * upto[-1], side="right"))
        for upto, mark in zip(sums, rng.random(len(chances)), strict=True)
    ]


def _times(model: Layered, slope: NDArray[np.float32], rows: Rows) -> NDArray[np.float32]:
    """Gradient with respect to the normed states, for one with respect to logits [length, vocabulary]."""
    import torch

    def part(start: int) -> Any:
        here = slice(start, min(start + _ROWS, slope.shape[1]))
        return torch.from_numpy(slope[:, here]) @ torch.from_numpy(rows(here))

    total = np.zeros((len(slope), model.checkpoint.model.hidden), np.float32)
    starts = range(0, slope.shape[1], _ROWS)
    for first in range(0, len(starts), _AT_ONCE):
        for found in model.parallel(part, starts[first : first + _AT_ONCE]):
            total += found.numpy()
    return total


def _before_norm(model: Layered, states: NDArray[np.float32], slope: NDArray[np.float32]) -> NDArray[np.float32]:
    """Gradient before the final norm, for one after it."""
    import torch

    before = torch.from_numpy(states.copy()).requires_grad_(True)
    (found,) = torch.autograd.grad(model.final_norm(before), before, torch.from_numpy(slope))
    slope_before: NDArray[np.float32] = found.numpy()
    return slope_before
