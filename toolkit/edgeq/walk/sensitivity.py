"""How much each matrix's rounding costs, in nats: measured on the float model's gradients, no quantized model is run.

Rounding W to W + D changes a token's log-likelihood, for y drawn from the prediction, by about g . (D x), where x is
what the matrix reads and g the gradient at what it writes; half of the mean square of that is the KL divergence
(Fisher's information, to the second order). Errors at different tokens count as independent, so that of keys and
values, which attention sums, is underestimated; so do those of queries, keys and values of one layer. An engine that
rounds x to x + e before it multiplies changes it by g . (W e) besides.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput
from edgeq.model import Model
from edgeq.quantize.kept import Rows
from edgeq.quantize.mix import Option
from edgeq.quantize.solve import quantized
from edgeq.recipe import Layout
from edgeq.size import TABLES, is_quantized
from edgeq.walk import gradients, head
from edgeq.walk.layered import Layered

APART = 8
"""Of so many tokens in a row one is enough: windows differ by more."""
_ROWS, _TOKENS, _AT_ONCE = 4096, 64, 512
_LARGEST_CODE, _SMALLEST = 127, 1e-30
_DAMPING = 0.1
_SEED = 21


def units(model: Model) -> dict[str, list[str]]:
    """Matrices that must have one layout together, under the name of the first: queries, keys and values of a layer."""
    found: dict[str, list[str]] = {}
    for name in filter(is_quantized, model.tensors()):
        first = name.replace("k_proj", "q_proj").replace("v_proj", "q_proj")
        found.setdefault(first, []).append(name)
    return found


def measure(
    checkpoint: Checkpoint,
    layouts: Mapping[str, Sequence[Layout]],
    activation_groups: Mapping[Layout, int],
    scale_bits: int,
    tokens: NDArray[np.int32],
    folder: Path,
    progress: Progress,
    *,
    feedback: bool,
) -> dict[str, list[Option]]:
    """Options of every unit for the layouts that it may have, losses measured over token windows [count, length].

    Matrices are looked at at one token of `APART`. Rounding is that of clipped grids; of each layout, inputs are
    rounded to 8 bits in groups of so many, 0 for none. `folder` is for a file of the states between layers, 2 bytes a
    value. feedback: matrices of layers will be fitted to what they read, which leaves the share that `left_over` says.
    Raises CorruptInput when the float model's own states are not finite.
    """
    import torch

    together = units(checkpoint.model)
    losses: dict[tuple[str, Layout], float] = {}
    activations: dict[tuple[str, int], float] = {}
    groups = {first: sorted({activation_groups[each] for each in found} - {0}) for first, found in layouts.items()}
    model = Layered(checkpoint)
    try:
        states = head.embed(head.exact(checkpoint, head.TABLE), tokens)
        between = gradients.forwards(model, states, folder, progress)
        if not np.isfinite(states).all():
            raise CorruptInput("the checkpoint's own states are not finite", run="download the checkpoint again")
        slopes = head.slopes(model, states, _SEED)
        for layer in gradients.backwards(model, slopes, between, progress, watch=APART):
            for first in filter(layer.read.__contains__, together):
                seen = {name: (torch.cat(layer.read[name]), torch.cat(layer.written[name])) for name in together[first]}
                share = left_over(model, seen[first][0]) if feedback else 1.0
                for layout in layouts[first]:
                    losses[first, layout] = share * sum(_loss(model, name, layout, *seen[name]) for name in seen)
                for group in groups[first]:
                    activations[first, group] = sum(
                        _change(model, rounding_error(read, group), written, head.exact(checkpoint, name))
                        for name, (read, written) in seen.items()
                    )
        final = np.concatenate([each[window % APART :: APART] for window, each in enumerate(states)])
        for name in filter(together.__contains__, TABLES):
            for layout in layouts[name]:
                losses[name, layout] = _table_loss(model, name, layout, tokens, slopes, final)
            for group in groups[name]:
                activations[name, group] = _output_activations_loss(model, name, group, final)
    finally:
        model.close()
    return {
        first: [
            Option(layout, stored, losses[first, layout], activations.get((first, activation_groups[layout]), 0.0))
            for layout, stored in found.items()
        ]
        for first, found in sizes(checkpoint.model, layouts, scale_bits).items()
    }


def sizes(model: Model, layouts: Mapping[str, Sequence[Layout]], scale_bits: int) -> dict[str, dict[Layout, int]]:
    """Bytes of every unit in each of the layouts that it may have."""
    shapes = model.tensors()
    return {
        first: {layout: sum(_bytes(shapes[name], layout, scale_bits) for name in names) for layout in layouts[first]}
        for first, names in units(model).items()
    }


def left_over(model: Layered, read: Any) -> float:
    """Share of rounding's loss that error feedback leaves, as GPTQ's, of a matrix that reads a tensor [tokens, inputs].

    Feedback leaves of each input's error what the inputs after it cannot make up for: the sum of the pivots of
    the second moments, factored from the last input to the first, where without it is that of their diagonal (QuIP,
    https://arxiv.org/abs/2307.13304, theorem 1). Here among half as many inputs at a time as there are tokens; a pivot
    that n inputs explain over N tokens is N / (N - n) of what is found. A tenth of the mean is added to the diagonal:
    those few tokens want more than GPTQ's hundredth.
    """
    import torch

    tokens, inputs = read.shape
    together = max(1, tokens // 2)

    def sums(start: int) -> tuple[float, float]:
        part = read[:, start : start + together].flip(1)
        second = part.T @ part / tokens
        second.diagonal().add_(_DAMPING * second.diagonal().mean() + _SMALLEST)
        pivots = torch.linalg.cholesky_ex(second).L.diagonal().square()
        pivots *= tokens / (tokens - torch.arange(len(pivots)))
        return float(pivots.sum()), float(second.diagonal().sum())

    left, whole = zip(*model.parallel(sums, range(0, inputs, together)), strict=True)
    share: float = sum(left) / sum(whole)
    return min(share, 1.0)


def _loss(model: Layered, name: str, layout: Layout, read: Any, written: Any) -> float:
    """KL divergence that one layout of one matrix of a layer costs, in nats per token."""
    return _change(model, read, written, lambda rows: _lost(model.checkpoint, name, layout, rows))


def _change(model: Layered, read: Any, written: Any, rows: Rows) -> float:
    """KL divergence of adding a product to what a matrix writes, where its gradients are `written` [tokens, outputs].

    The product is that of `read` [tokens, inputs] and `rows` [outputs, inputs].
    """
    import torch

    outputs = written.shape[1]

    def change(start: int) -> Any:
        here = slice(start, min(start + _ROWS, outputs))
        return (written[:, here] * (read @ torch.from_numpy(rows(here)).T)).sum(1)

    return _divergence(sum(model.parallel(change, range(0, outputs, _ROWS))).numpy())


def rounding_error(values: Any, group: int) -> Any:
    """What rounding values, a tensor [tokens, inputs], to 8 bits changes.

    One scale for each `group` of inputs, or for all where that is more: their largest magnitude becomes the code 127.
    """
    parts = values.reshape(len(values), -1, min(group, values.shape[1]))
    steps = parts.abs().amax(2, keepdim=True).clamp(min=_SMALLEST) / _LARGEST_CODE
    return ((parts / steps).round() * steps - parts).reshape(values.shape)


def _table_loss(
    model: Layered,
    name: str,
    layout: Layout,
    tokens: NDArray[np.int32],
    slopes: NDArray[np.float32],
    final: NDArray[np.float32],
) -> float:
    """KL divergence that one layout of a table costs: of the rows that are looked up, and of the logits it makes."""
    checkpoint = model.checkpoint

    def lost(which: slice | NDArray[np.intp]) -> NDArray[np.float32]:
        return _lost(checkpoint, name, layout, which)

    loss = 0.0
    if name == head.TABLE:
        changes = (slopes * head.embed(lost, tokens)).sum(axis=2, dtype=np.float64)
        loss += _divergence(changes)
    if name == head.output(checkpoint):
        exact = head.exact(checkpoint, name)
        loss += _spread((head.logits(model, each, exact), head.logits(model, each, lost)) for each in _pieces(final))
    return loss


def _output_activations_loss(model: Layered, name: str, group: int, final: NDArray[np.float32]) -> float:
    """KL divergence of rounding what the output layer reads to 8 bits; nothing for a table that only embeds."""
    if name != head.output(model.checkpoint):
        return 0.0
    exact = head.exact(model.checkpoint, name)
    read = (head.normed(model, each) for each in _pieces(final))
    return _spread(
        (head.products(model, each, exact), head.products(model, rounding_error(each, group), exact)) for each in read
    )


def _pieces(states: NDArray[np.float32]) -> Iterator[NDArray[np.float32]]:
    """States of some tokens at a time."""
    return (states[start : start + _AT_ONCE] for start in range(0, len(states), _AT_ONCE))


def _divergence(changes: NDArray[Any]) -> float:
    """Mean of c^2 / 2 over changes c of a log-likelihood, of |c| - 1/2 beyond 1: a few tokens change too much."""
    size = np.abs(changes.astype(np.float64))
    return float(np.where(size < 1, size * size / 2, size - 0.5).mean())


def _spread(pieces: Iterable[tuple[NDArray[np.float32], NDArray[np.float32]]]) -> float:
    """Half the variance of changes of logits under the prediction: KL to the second order.

    pieces: logits and their changes, both [tokens, vocabulary].
    """
    found = []
    for scores, changes in pieces:
        for start in range(0, len(scores), _TOKENS):
            here = slice(start, start + _TOKENS)
            chances = np.exp(scores[here] - scores[here].max(axis=1, keepdims=True))
            chances /= chances.sum(axis=1, keepdims=True)
            mean = (chances * changes[here]).sum(axis=1, dtype=np.float64)
            found.append((chances * np.square(changes[here])).sum(axis=1, dtype=np.float64) - np.square(mean))
        del scores, changes
    return float(np.concatenate(found).mean()) / 2


def _lost(checkpoint: Checkpoint, name: str, layout: Layout, which: slice | NDArray[np.intp]) -> NDArray[np.float32]:
    """What rounding to a layout changes of some rows."""
    weights = head.exact(checkpoint, name)(which)
    return quantized(weights, layout.of(weights.shape[1]), "mse", name).dequantize() - weights


def _bytes(shape: tuple[int, ...], layout: Layout, scale_bits: int) -> int:
    return int(math.prod(shape) * layout.of(shape[1]).stored_bits(scale_bits)) // 8
