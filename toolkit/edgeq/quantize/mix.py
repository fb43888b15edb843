"""Which layout for which matrix: the least loss within a size, or the least size within a loss."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

from edgeq.recipe import Layout


@dataclass(frozen=True)
class Option:
    """One layout of some matrices: their bytes, and the KL divergences (nats per token) that it is predicted to cost.

    loss: of their rounding; activations: of the engine's rounding of what they read.
    """

    layout: Layout
    bytes: int
    loss: float
    activations: float = 0.0

    @property
    def cost(self) -> float:
        """Both divergences."""
        return self.loss + self.activations


def added(options: Sequence[Option]) -> Option:
    """One layout of all the matrices of some options."""
    return Option(
        options[0].layout,
        sum(each.bytes for each in options),
        sum(each.loss for each in options),
        sum(each.activations for each in options),
    )


class Choice(NamedTuple):
    """Option of each unit, their bytes and predicted costs in all."""

    options: dict[str, Option]
    bytes: int
    cost: float

    @property
    def loss(self) -> float:
        """What of the cost is of the weights alone."""
        return sum(option.loss for option in self.options.values())


def choose(units: Mapping[str, Sequence[Option]], max_bytes: float, max_loss: float) -> Choice:
    """Options, one for each unit, by the greedy rule for the multiple-choice knapsack.

    From each unit's smallest option, steps along the lower convex hulls of cost over bytes, the steepest first
    (Kellerer, Pferschy, Pisinger 2004, Knapsack Problems, 11.2), until the cost is at most `max_loss`, or no further
    step fits `max_bytes`. Where the last one saved more than was needed, steps before it are taken back, the least
    steep first. The result is larger than `max_bytes` when the smallest options are, and may lose more than
    `max_loss`: the caller looks.
    """
    hulls = {name: _hull(options) for name, options in units.items()}
    chosen = {name: hull[0] for name, hull in hulls.items()}
    steps = sorted(
        (_slope(before, after), name, index)
        for name, hull in hulls.items()
        for index, (before, after) in enumerate(itertools.pairwise(hull))
    )
    total, cost = sum(each.bytes for each in chosen.values()), sum(each.cost for each in chosen.values())
    closed = set[str]()
    taken: list[tuple[str, Option, Option]] = []
    for _, name, index in steps:
        before, after = hulls[name][index], hulls[name][index + 1]
        if cost <= max_loss:
            break
        if name in closed or total + after.bytes - before.bytes > max_bytes:
            closed.add(name)
            continue
        chosen[name] = after
        taken.append((name, before, after))
        total, cost = total + after.bytes - before.bytes, cost + after.cost - before.cost
    for name, before, after in reversed(taken):
        if chosen[name] is after and cost + before.cost - after.cost <= max_loss:
            chosen[name] = before
            total, cost = total + before.bytes - after.bytes, cost + before.cost - after.cost
    return Choice(chosen, total, cost)


def hedged(units: Mapping[str, Sequence[Option]], others: Mapping[str, Sequence[Option]]) -> dict[str, list[Option]]:
    """Options that cost the mean of what they do on one text and on another, for those who will read a third.

    What a text costs in all differs more than how that divides: the other's costs are multiplied so that the median of
    the losses is the same.
    """
    pairs = {name: list(zip(options, others[name], strict=True)) for name, options in units.items()}
    ratios = [one.loss / other.loss for options in pairs.values() for one, other in options if other.loss]
    scale = statistics.median(ratios) if ratios else 0.0

    def mean(one: float, other: float) -> float:
        return (one + scale * other) / 2

    return {
        name: [
            replace(one, loss=mean(one.loss, other.loss), activations=mean(one.activations, other.activations))
            for one, other in options
        ]
        for name, options in pairs.items()
    }


def _hull(options: Sequence[Option]) -> list[Option]:
    """Options on the lower convex hull of cost over bytes, smallest first."""
    hull: list[Option] = []
    for option in sorted(options, key=lambda each: (each.bytes, each.cost)):
        if hull and option.cost >= hull[-1].cost:
            continue
        while len(hull) > 1 and _slope(hull[-2], hull[-1]) >= _slope(hull[-2], option):
            hull.pop()
        hull.append(option)
    return hull


def _slope(before: Option, after: Option) -> float:
    """Cost that a byte changes; negative."""
    return (after.cost - before.cost) / (after.bytes - before.bytes)
