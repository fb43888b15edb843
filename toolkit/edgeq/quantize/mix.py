"""Which layout for which matrix: the least loss within a size, or the least size within a loss."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from edgeq.recipe import Layout


@dataclass(frozen=True)
class Option:
    """One layout of some matrices: their bytes, and the KL divergence (nats per token) that it is predicted to cost."""

    layout: Layout
    bytes: int
    loss: float


class Choice(NamedTuple):
    """Option of each unit, their bytes and predicted losses in all."""

    options: dict[str, Option]
    bytes: int
    loss: float


def choose(units: Mapping[str, Sequence[Option]], max_bytes: float, max_loss: float) -> Choice:
    """Options, one for each unit, by the greedy rule for the multiple-choice knapsack.

    From each unit's smallest option, steps along the lower convex hulls of loss over bytes, the steepest first
    (Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, 11.2), until the loss is at most `max_loss`, or no further
    step fits `max_bytes`. Greedy is exact but for the last step. The result is larger than `max_bytes` when the
    smallest options are, and may lose more than `max_loss`: the caller looks.
    """
    hulls = {name: _hull(options) for name, options in units.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    steps = sorted(
        (_slope(before, after), name, index)
        for name, hull in hulls.items()
        for index, (before, after) in enumerate(itertools.pairwise(hull))
    )
    total, loss = sum(each.bytes for each in chosen.values()), sum(each.loss for each in chosen.values())
    closed = set[str]()
    for _, name, index in steps:
        before, after = hulls[name][index], hulls[name][index + 1]
        if loss <= max_loss:
            break
        if name in closed or total + after.bytes - before.bytes > max_bytes:
            closed.add(name)
            continue
        chosen[name] = after
        total, loss = total + after.bytes - before.bytes, loss + after.loss - before.loss
    return Choice(chosen, total, loss)


def _hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of loss over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bytes, each.loss)):
        if hull and option.loss >= hull[-1].loss:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Loss that a byte changes; negative."""
    return (after.loss - before.loss) / (after.bytes - before.bytes)
