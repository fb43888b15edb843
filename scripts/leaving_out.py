"""How well rates predict figures that they were not fitted to."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.estimating import speed
from edgeq.estimating.published import Row
from edgeq.estimating.speed import Rate
from fitting import Rates, place_of


@dataclass(frozen=True)
class Checked:
    """A row, what was predicted without its device and runtime, and the anchor that was then allowed, if any."""

    row: Row
    predicted: speed.Range
    anchor: Row | None = None

    @property
    def error(self) -> float:
        """Relative error of the predicted tokens per second."""
        return abs(self.predicted.mid / self.row.decode_tokens_per_s - 1)

    @property
    def covered(self) -> bool:
        """Whether the stated interval holds the figure."""
        return self.predicted.low <= self.row.decode_tokens_per_s <= self.predicted.high


def leave_one_out(rates: Rates) -> tuple[list[Checked], list[Checked]]:
    """All rows of one device, API and runtime at a time, predicted from the others; then with each one as anchor."""
    alone, anchored = [], []
    compute = rates.fit_compute(rates.fitted)
    for place in dict.fromkeys(map(place_of, rates.rows)):
        own = [row for row in rates.rows if place_of(row) == place]
        others = np.array([place_of(row) != place for row in rates.rows]) * rates.fitted
        rate = rates.rate(rates.fit(others), compute, place)
        alone += [Checked(row, predict(rates, rate, row)) for row in own]
        for anchor in own:
            known = anchored_at(rates, rate, anchor)
            anchored += [Checked(row, predict(rates, known, row), anchor) for row in own if row is not anchor]
    return alone, anchored


def predict(rates: Rates, rate: Rate, row: Row) -> speed.Range:
    """Tokens per second of a row by a rate."""
    return rate.decode(rates.moved(row), row.layers, rates.published.bandwidth(row.host))


def anchored_at(rates: Rates, rate: Rate, row: Row) -> Rate:
    """A rate once a row is known."""
    bandwidth = rates.published.bandwidth(row.host)
    return rate.measured(1 / row.decode_tokens_per_s, rates.moved(row), row.layers, bandwidth)


def quantile(values: Sequence[float], share: float) -> float:
    """Linear interpolation between the order statistics."""
    return float(np.quantile(values, share))


def table(alone: Sequence[Checked], anchored: Sequence[Checked]) -> list[str]:
    """Lines for people: every row predicted without its device and runtime, and both summaries."""
    lines = [f"{'error':>6} {'published':>9} {'estimate':>24}  row, worst first"]
    for each in sorted(alone, key=lambda checked: -checked.error):
        row, guess = each.row, each.predicted
        interval = f"{guess.mid:.1f} [{guess.low:.1f}, {guess.high:.1f}]"
        words = f"{row.host} {row.api} {row.runtime} {row.model} {row.quantization} at {row.depth}, trust {row.trust}"
        mark = "" if each.covered else ", outside the interval"
        lines.append(f"{each.error:6.1%} {row.decode_tokens_per_s:9.1f} {interval:>24}  {words}{mark}")
    for name, found in (("leave-one-out by device, API and runtime", alone), ("with one anchor", anchored)):
        errors = [each.error for each in found]
        covered = sum(each.covered for each in found) / len(found)
        lines.append(
            f"{name}: {len(found)} predictions, median error {quantile(errors, 0.5):.1%}, 90th percentile "
            f"{quantile(errors, 0.9):.1%}, interval covers {covered:.1%}"
        )
    return lines
