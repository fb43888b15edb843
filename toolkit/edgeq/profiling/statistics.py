"""What samples say: median, its interval, and how far the figures can be trusted."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from edgeq.profiles import Gaps, Spread

_RESAMPLES = 2000
STEADY = 0.02
COMPARABLE = 5
_GRADES = (("A", STEADY), ("B", 0.05))


def spread(samples: Sequence[float]) -> Spread:
    """Median with its 95 % percentile-bootstrap interval, drawn with a fixed seed (Efron & Tibshirani 1993)."""
    values = np.asarray(samples, np.float64)
    draws = np.random.default_rng(0).integers(0, values.size, (_RESAMPLES, values.size))
    low, high = np.quantile(np.median(values[draws], axis=1), [0.025, 0.975])
    return Spread(
        median=float(np.median(values)),
        low=float(low),
        high=float(high),
        cv=float(values.std(ddof=1) / values.mean()) if values.size > 1 else None,
        samples=tuple(float(value) for value in values),
    )


def settled(samples: Sequence[float]) -> bool:
    """Whether the 95 % interval lies within 2 % of the median on both sides."""
    found = spread(samples)
    return max(found.high - found.median, found.median - found.low) <= STEADY * found.median


def gaps(seconds: Sequence[float]) -> Gaps:
    """Percentiles of the time between tokens."""
    p50, p90, p99 = np.quantile(np.asarray(seconds, np.float64), [0.5, 0.9, 0.99])
    return Gaps(p50=float(p50), p90=float(p90), p99=float(p99), max=float(max(seconds)))


def grade(spreads: Sequence[Spread], unthrottled: bool) -> str:
    """A: every coefficient of variation <= 2 % and surely no throttling; B: <= 5 %; C: reported, not comparable.

    Fewer than `COMPARABLE` samples of a figure are C.
    """
    if any(len(found.samples) < COMPARABLE for found in spreads):
        return "C"
    cvs = [found.cv for found in spreads]
    for letter, limit in _GRADES:
        if all(cv is not None and cv <= limit for cv in cvs) and (letter != "A" or unthrottled):
            return letter
    return "C"
