"""How much each matrix's rounding costs, in nats: measured on the float model's gradients, no quantized model is run.

Rounding W to W + D changes a token's log-likelihood, for y drawn from the prediction, by about g . (D x), where x is
what the matrix reads and g the gradient at what it writes; half of the mean square of that is the KL divergence
(Fisher's information, to the second order). Errors at different tokens count as independent, so that of keys and
values, which attention sums, is underestimated; so do those of queries, keys and values of one layer. An engine that
rounds x to x + e before it multiplies changes it by g . (W e) besides.

A few tokens have most of the loss, those where |x| and |g| are large, and D x is made at some tokens alone: what is
found there is taken relative to |x| |g|, which is known of all (a ratio estimator: Cochran 1977, Sampling Techniques,
6). On the demos the loss of a matrix came out as exactly as with D x at every other token.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from numpy.typing import NDArray

from edgeq import recipe
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput
from edgeq.model import Model
from edgeq.quantize.kept import Rows
from edgeq.quantize.mix import Option
from edgeq.quantize.solve import quantized
from edgeq.recipe import Layout
from edgeq.size import TABLES, is_quantized
from edgeq.walk import gradients, head, scratch, table_loss
from edgeq.walk.gradients import Backward
from edgeq.walk.layered import Layered, give_back
from edgeq.walk.stepped import Stepped

APART = 8
"""Of so many tokens in a row one is enough: windows differ by more."""
_PIECE = 1 << 20  # weights that a thread rounds at once
_LARGEST_CODE, _SMALLEST = 127, 1e-30
_DAMPING = 0.1
_SEED = 21
_COSTS = "costs.json"


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
    texts: Sequence[NDArray[np.int32]],
    folder: Path,
    progress: Progress,
    *,
    feedback: bool,
) -> list[dict[str, list[Option]]]:
    """Options of every unit for the layouts that it may have, with the losses on each of some texts.

    Texts are token windows [count, length], all of one length; matrices are looked at at one token of `APART`. Rounding
    is that of clipped grids; of each layout, inputs are rounded to 8 bits in groups of so many, 0 for none. `folder`
    keeps states, gradients and what was found: a measurement of the same that was stopped goes on there after the last
    finished layer. feedback: matrices of layers will be fitted to what they read, which leaves the share that
    `left_over` says. Raises CorruptInput when the float model's own states are not finite, or `folder` is damaged.
    """
    tokens = np.concatenate(texts)
    model = Layered(checkpoint)
    costs = _Costs(model, layouts, activation_groups, [text.shape for text in texts])
    try:
        states, between = gradients.kept_forwards(model, tokens, folder, progress)
        if not np.isfinite(states).all():
            raise CorruptInput("the checkpoint's own states are not finite", run="download the checkpoint again")
        back = Stepped(folder, "back", states.shape, lambda: head.slopes(model, states, _SEED))
        give_back()
        if back.done:
            costs.load(folder, back.done)
        for layer in gradients.kept_backwards(model, back, between, progress, watch=APART):
            give_back()
            costs.of_layer(layer, feedback=feedback)
            costs.save(folder)
        final = np.concatenate([each[window % APART :: APART] for window, each in enumerate(states)])
        costs.of_tables(final, tokens, back.values)
    finally:
        model.close()
    stored = sizes(checkpoint.model, layouts, scale_bits)
    return [
        {
            first: [Option(layout, size, *costs.at(text, first, layout)) for layout, size in found.items()]
            for first, found in stored.items()
        }
        for text in range(len(texts))
    ]


class _Kept(msgspec.Struct, frozen=True):
    """Costs as their file has them: of a unit's layouts, by name, and groups of activations, on each text."""

    losses: list[tuple[str, str, list[float]]]
    activations: list[tuple[str, int, list[float]]]


class _Costs:
    """What layouts, and groups of activations, cost each unit on some texts, of so many windows and tokens in each."""

    def __init__(
        self,
        model: Layered,
        layouts: Mapping[str, Sequence[Layout]],
        activation_groups: Mapping[Layout, int],
        texts: Sequence[tuple[int, int]],
    ) -> None:
        self._model, self._layouts, self._activation_groups = model, layouts, activation_groups
        self._windows = [count for count, _ in texts]
        self._tokens = [count * length for count, length in texts]
        self._seen = list(_seen(texts))
        self._units = units(model.checkpoint.model)
        self._losses: dict[tuple[str, Layout], NDArray[np.float64]] = {}
        self._activations: dict[tuple[str, int], NDArray[np.float64]] = {}

    def at(self, text: int, first: str, layout: Layout) -> tuple[float, float]:
        """What rounding to a layout costs a unit on one text, and what rounding its activations does."""
        group = self._activation_groups[layout]
        activations = self._activations[first, group][text] if group else 0.0
        return float(self._losses[first, layout][text]), float(activations)

    def save(self, folder: Path) -> None:
        """Keep what was found so far, in one step."""
        losses = [(first, layout.name, cost.tolist()) for (first, layout), cost in self._losses.items()]
        activations = [(first, group, cost.tolist()) for (first, group), cost in self._activations.items()]
        scratch.put(folder / _COSTS, msgspec.json.encode(_Kept(losses, activations)))

    def load(self, folder: Path, done: int) -> None:
        """Take what `save` kept; raises CorruptInput when that is not of the last `done` layers."""
        try:
            kept = msgspec.json.decode((folder / _COSTS).read_bytes(), type=_Kept)
        except (FileNotFoundError, ValueError) as error:
            raise scratch.damaged(folder, f"{_COSTS}: {error}") from error
        self._losses = {(first, recipe.layout(name)): np.array(cost) for first, name, cost in kept.losses}
        self._activations = {(first, group): np.array(cost) for first, group, cost in kept.activations}
        names = {name for index in range(self._model.count)[-done:] for name in self._model.matrices(index)}
        if missing := names & self._units.keys() - {first for first, _ in self._losses}:
            raise scratch.damaged(folder, f"{_COSTS} has not {min(missing)}")

    def of_layer(self, layer: Backward, *, feedback: bool) -> None:
        """Find what the units of a layer cost, from what they read and the gradients at what they write."""
        for first in [first for first in self._units if first in layer.read]:
            seen = {name: (layer.read.pop(name), layer.written.pop(name)) for name in self._units[first]}
            parts = seen[first][0].split(self._seen)
            share = np.array([left_over(self._model, each) if feedback else 1.0 for each in parts])
            self._of_unit(first, seen, layer.sizes, share)

    def _of_unit(
        self, first: str, seen: Mapping[str, tuple[Any, Any]], sizes: Mapping[str, Any], share: NDArray[np.float64]
    ) -> None:
        model, checkpoint = self._model, self._model.checkpoint

        def cost(changes: Iterable[NDArray[np.float32]]) -> NDArray[np.float64]:
            """What changes by each of the matrices cost."""
            costs = np.zeros(len(share))
            for name, each in zip(seen, changes, strict=True):
                costs += self._mean(each, sizes[name])
            return costs

        for layout in self._layouts[first]:
            changes = (_change(model, *both, _lost(checkpoint, name, layout)) for name, both in seen.items())
            self._losses[first, layout] = share * cost(changes)
        for group in self._groups(first):
            changes = (
                _change(model, rounding_error(read, group), written, head.exact(checkpoint, name))
                for name, (read, written) in seen.items()
            )
            self._activations[first, group] = cost(changes)

    def of_tables(self, final: NDArray[np.float32], tokens: NDArray[np.int32], slopes: NDArray[np.float32]) -> None:
        """Find what the tables cost, from states after the last layer at the tokens that are seen, and gradients.

        The gradients are those at what the first layer reads, for all tokens.
        """
        model, checkpoint = self._model, self._model.checkpoint
        for name in filter(self._units.__contains__, TABLES):
            lost = [_lost(checkpoint, name, layout) for layout in self._layouts[name]]
            rounding = [partial(rounding_error, group=group) for group in self._groups(name)]
            costs = np.zeros((len(lost) + len(rounding), len(self._seen)))
            if name == head.output(checkpoint):
                read = head.normed(model, final)
                found = table_loss.divergences(model, head.exact(checkpoint, name), lost, read, rounding)
                costs += [[each.mean() for each in _parts(change, self._seen)] for change in found]
            if name == head.TABLE:
                for place, rows in enumerate(lost):
                    changes = _divergence(table_loss.looked_up(model, rows, tokens, slopes))
                    costs[place] += [each.mean() for each in _parts(changes, self._windows)]
            for layout, cost in zip(self._layouts[name], costs, strict=False):
                self._losses[name, layout] = cost
            for group, cost in zip(self._groups(name), costs[len(lost) :], strict=True):
                self._activations[name, group] = cost

    def _mean(self, changes: NDArray[np.float32], sizes: Any) -> NDArray[np.float64]:
        """Mean divergence of each text by changes at the tokens that are seen, and sizes [windows, length] at all."""
        seen = np.concatenate([each[window % APART :: APART] for window, each in enumerate(sizes.numpy())])
        every = sizes.numpy().reshape(-1)
        relative = np.divide(_divergence(changes), seen, out=np.zeros(len(seen)), where=seen > 0)
        squares = [np.square(each, dtype=np.float64).mean() for each in _parts(every, self._tokens)]
        parts = zip(_parts(relative, self._seen), _parts(seen, self._seen), squares, strict=True)
        return np.array([loss.mean() * square / (size.mean() or 1.0) for loss, size, square in parts])

    def _groups(self, first: str) -> list[int]:
        return sorted({self._activation_groups[layout] for layout in self._layouts[first]} - {0})


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


def _change(model: Layered, read: Any, written: Any, rows: Rows) -> NDArray[np.float32]:
    """Change of each token's log-likelihood when a product is added to what a matrix writes.

    The gradients there are `written` [tokens, outputs], the product is that of `read` [tokens, inputs] and `rows`
    [outputs, inputs].
    """
    import torch

    outputs, step = written.shape[1], max(1, _PIECE // read.shape[1])

    def change(start: int) -> Any:
        here = slice(start, min(start + step, outputs))
        return (written[:, here] * (read @ torch.from_numpy(rows(here)).T)).sum(1)

    changes: NDArray[np.float32] = sum(model.parallel(change, range(0, outputs, step))).numpy()
    return changes


def rounding_error(values: Any, group: int) -> Any:
    """What rounding values, a tensor [tokens, inputs], to 8 bits changes.

    One scale for each `group` of inputs, or for all where that is more: their largest magnitude becomes the code 127.
    """
    parts = values.reshape(len(values), -1, min(group, values.shape[1]))
    steps = parts.abs().amax(2, keepdim=True).clamp(min=_SMALLEST) / _LARGEST_CODE
    return (parts / steps).round_().mul_(steps).sub_(parts).reshape(values.shape)


def _divergence(changes: NDArray[Any]) -> NDArray[np.float64]:
    """c^2 / 2 for changes c of a log-likelihood, |c| - 1/2 beyond 1: a few tokens change too much."""
    size = np.abs(changes.astype(np.float64))
    return np.where(size < 1, size * size / 2, size - 0.5)


def _seen(texts: Sequence[tuple[int, int]]) -> Iterator[int]:
    """Tokens of each text, of so many windows and tokens in each, that matrices are looked at at."""
    first = 0
    for count, length in texts:
        yield sum(len(range(window % APART, length, APART)) for window in range(first, first + count))
        first += count


def _parts(values: NDArray[Any], counts: Sequence[int]) -> list[NDArray[Any]]:
    """Values of each text, of which there are so many one after the other."""
    return np.split(values, np.cumsum(counts)[:-1])


def _lost(checkpoint: Checkpoint, name: str, layout: Layout) -> Rows:
    """Function to what rounding to a layout changes of some rows of a matrix."""

    def rows(which: slice | NDArray[np.intp]) -> NDArray[np.float32]:
        weights = head.exact(checkpoint, name)(which)
        return quantized(weights, layout.of(weights.shape[1]), "mse", name).dequantize() - weights

    return rows


def _bytes(shape: tuple[int, ...], layout: Layout, scale_bits: int) -> int:
    return int(math.prod(shape) * layout.of(shape[1]).stored_bits(scale_bits)) // 8
