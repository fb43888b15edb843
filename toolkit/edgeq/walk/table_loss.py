"""What rounding a table costs each token: the rows that are looked up, and the logits that it makes."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.quantize.kept import Rows
from edgeq.walk import head
from edgeq.walk.layered import Layered

_ROWS = 512


def looked_up(model: Layered, lost: Rows, tokens: NDArray[np.int32], slopes: NDArray[np.float32]) -> NDArray[Any]:
    """What a change of the table's rows changes of log-likelihoods, at each of the tokens [windows, length].

    lost: the change of some rows; slopes: gradients at what the first layer reads, [windows, length, hidden].
    """

    def changes(window: int) -> NDArray[np.float64]:
        found: NDArray[np.float64] = (slopes[window] * head.embed(lost, tokens[window])).sum(axis=1, dtype=np.float64)
        return found

    return np.stack(model.parallel(changes, range(len(tokens))))


def divergences(
    model: Layered,
    exact: Rows,
    lost: Sequence[Rows],
    read: Any,
    rounding: Sequence[Callable[[Any], Any]],
) -> NDArray[np.float64]:
    """KL divergences to the second order, half the variance of what changes of logits, under the prediction.

    They are [changes, tokens]: of each of `lost`, a change of the output layer's rows, then of each of `rounding`, a
    change of what it reads, a tensor [tokens, hidden]. Rows are gone through once, some at a time, without a token's
    logits in memory: sums are kept relative to the largest logit so far, as in an online softmax
    (https://arxiv.org/abs/1805.02867).
    """
    import torch

    vocab = model.checkpoint.model.vocab
    rounded = [change(read) for change in rounding]

    def part(start: int) -> tuple[Any, Any]:
        here = slice(start, min(start + _ROWS, vocab))
        rows = torch.from_numpy(exact(here)).T
        chances = read @ rows
        top = chances.max(1).values
        chances.sub_(top[:, None]).exp_()
        sums = [chances.sum(1)]
        for changes in (*(read @ torch.from_numpy(each(here)).T for each in lost), *(each @ rows for each in rounded)):
            weighed = chances * changes
            sums += weighed.sum(1), weighed.mul_(changes).sum(1)
        return top.double(), torch.stack(sums).double()

    tops, sums = map(torch.stack, zip(*model.parallel(part, range(0, vocab, _ROWS)), strict=True))
    total = (sums * (tops - tops.max(0).values).exp()[:, None]).sum(0)
    mean, square = (total[1:] / total[0]).unflatten(0, (-1, 2)).unbind(1)
    found: NDArray[np.float64] = ((square - mean.square()) / 2).numpy()
    return found
