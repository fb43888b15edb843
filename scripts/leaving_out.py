"""How well rates predict figures that they were not fitted to."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.estimating import speed
from edgeq.estimating.published import Row
from edgeq.estimating.speed import Rate
from fitting import Rates, place_of

FIFTHS = 5


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


def left_out(rates: Rates, groups: Sequence[Hashable]) -> list[Checked]:
    """All rows of one group at a time, predicted from the others; `groups` has one for each row."""
    compute, found = rates.fit_compute(rates.fitted), list[Checked]()
    for group in dict.fromkeys(groups):
        fit = rates.fit(np.array([each != group for each in groups]) * rates.fitted)
        for row in (row for row, each in zip(rates.rows, groups, strict=True) if each == group):
            found.append(Checked(row, predict(rates, rates.rate(fit, compute, place_of(row)), row)))
    return found


def leave_one_out(rates: Rates) -> tuple[list[Checked], list[Checked]]:
    """All rows of one device, API and runtime at a time, predicted from the others; then with each one as anchor."""
    alone, anchored = left_out(rates, [place_of(row) for row in rates.rows]), []
    compute = rates.fit_compute(rates.fitted)
    for place in dict.fromkeys(map(place_of, rates.rows)):
        own = [row for row in rates.rows if place_of(row) == place]
        others = np.array([place_of(row) != place for row in rates.rows]) * rates.fitted
        rate = rates.rate(rates.fit(others), compute, place)
        for anchor in own:
            known = anchored_at(rates, rate, anchor)
            anchored += [Checked(row, predict(rates, known, row), anchor) for row in own if row is not anchor]
    return alone, anchored


def others(rates: Rates) -> dict[str, list[Checked]]:
    """What is predicted when more is left out, or a random fifth of the rows, five times over."""
    rows = rates.rows
    found = {
        "device": left_out(rates, [row.host for row in rows]),
        "runtime": left_out(rates, [row.runtime for row in rows]),
        "API": left_out(rates, [row.api for row in rows]),
    }
    fifths = (np.random.default_rng(seed).permutation(len(rows)) % FIFTHS for seed in range(FIFTHS))
    return found | {"a fifth": [each for groups in fifths for each in left_out(rates, groups.tolist())]}


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


def table(alone: Sequence[Checked], anchored: Sequence[Checked], more: Mapping[str, Sequence[Checked]]) -> list[str]:
    """Lines for people: every row predicted without its device and runtime, and what all that was left out comes to."""
    lines = [f"{'error':>6} {'published':>9} {'estimate':>24}  row, worst first"]
    for each in sorted(alone, key=lambda checked: -checked.error):
        row, guess = each.row, each.predicted
        interval = f"{guess.mid:.1f} [{guess.low:.1f}, {guess.high:.1f}]"
        words = f"{row.host} {row.api} {row.runtime} {row.model} {row.quantization} at {row.depth}, trust {row.trust}"
        mark = "" if each.covered else ", outside the interval"
        lines.append(f"{each.error:6.1%} {row.decode_tokens_per_s:9.1f} {interval:>24}  {words}{mark}")
    summaries = {"device, API and runtime": alone, "the same, with one anchor": anchored, **more}
    for name, found in summaries.items():
        errors = [each.error for each in found]
        covered = sum(each.covered for each in found) / len(found)
        lines.append(
            f"left out {name}: {len(found)} predictions, median error {quantile(errors, 0.5):.1%}, 90th percentile "
            f"{quantile(errors, 0.9):.1%}, interval covers {covered:.1%}"
        )
    return lines
