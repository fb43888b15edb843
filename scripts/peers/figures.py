"""A figure of edgeq and of a peer, as it was measured: samples are kept, everything that a table shows follows."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Literal

import msgspec
import numpy as np
from numpy.typing import NDArray
from rich.table import Table

from edgeq.units import show_bytes

_RESAMPLES = 2000
_COLUMNS = ("what", "edgeq", "peer", "ratio", "95 % interval", "goal", "verdict", "load")


class Goal(msgspec.Struct, frozen=True):
    """A limit of the ratio of edgeq to the peer, or of edgeq's own figure."""

    of: Literal["ratio", "edgeq"]
    kind: Literal["at most", "at least"]
    limit: float

    def holds(self, value: float) -> bool:
        """Whether a value keeps the limit; NaN does not."""
        return value <= self.limit if self.kind == "at most" else value >= self.limit


class Row(msgspec.Struct, frozen=True, kw_only=True):
    """Samples of both sides in `unit` (B, s, tok/s, nats or count), taken in pairs.

    Medians count, or means where `middle` says so; `load` is the load average at each pair.
    """

    part: str
    what: str
    unit: str
    edgeq: tuple[float, ...]
    peer: tuple[float, ...]
    middle: Literal["median", "mean"] = "median"
    goal: Goal | None = None
    load: tuple[float, ...] = ()
    note: str = ""


class Ratio(msgspec.Struct, frozen=True):
    """Ratio of edgeq to the peer and its 95 % percentile-bootstrap interval over the pairs."""

    value: float
    low: float
    high: float


def middle(row: Row, samples: Sequence[float]) -> float:
    """Median or mean, as the row wants it."""
    return median(samples) if row.middle == "median" else mean(samples)


def mean(samples: Sequence[float]) -> float:
    """Mean of samples."""
    return float(np.mean(samples))


def median(samples: Sequence[float]) -> float:
    """Median of samples."""
    return float(np.median(samples))


def ratio(row: Row) -> Ratio:
    """Median of the paired ratios, or the ratio of the means."""
    edgeq, peer = np.array(row.edgeq, np.float64), np.array(row.peer, np.float64)
    divide: Callable[..., NDArray[np.float64]] = _of_medians if row.middle == "median" else _of_means
    draws = np.random.default_rng(0).integers(0, edgeq.size, (_RESAMPLES, edgeq.size))
    low, high = np.quantile(divide(edgeq[draws], peer[draws]), [0.025, 0.975])
    return Ratio(float(divide(edgeq, peer)), float(low), float(high))


def _of_medians(edgeq: NDArray[np.float64], peer: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.median(edgeq / peer, axis=-1))


def _of_means(edgeq: NDArray[np.float64], peer: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(edgeq.mean(axis=-1) / peer.mean(axis=-1))


def verdict(row: Row) -> str:
    """`met`, `missed`, or `within noise` where a ratio misses its limit and the limit lies within its interval."""
    if row.goal is None:
        return ""
    if row.goal.of == "edgeq":
        return "met" if row.goal.holds(middle(row, row.edgeq)) else "missed"
    found = ratio(row)
    if row.goal.holds(found.value):
        return "met"
    return "within noise" if row.goal.holds(found.low) or row.goal.holds(found.high) else "missed"


def table(rows: Sequence[Row], peer: str = "peer", edgeq: str = "edgeq") -> Table:
    """All rows, the parts apart, under the two sides' names."""
    names = {"peer": peer, "edgeq": edgeq}
    shown = Table(*(names.get(name, name) for name in _COLUMNS), box=None, pad_edge=False)
    for before, row in zip([None, *rows], rows, strict=False):
        if before is None or before.part != row.part:
            shown.add_row(f"[bold]{row.part}", *[""] * (len(_COLUMNS) - 1))
        shown.add_row(*_cells(row))
    return shown


def _cells(row: Row) -> list[str]:
    found = ratio(row)
    several = len(row.edgeq) > 1
    return [
        row.what,
        show(middle(row, row.edgeq), row.unit),
        show(middle(row, row.peer), row.unit),
        f"{found.value:.4f}",
        f"{found.low:.4f} to {found.high:.4f}" if several else "",
        _goal(row),
        verdict(row),
        _range(row.load),
    ]


def _goal(row: Row) -> str:
    if row.goal is None:
        return ""
    limit = f"{row.goal.limit:g}x" if row.goal.of == "ratio" else show(row.goal.limit, row.unit)
    return f"{row.goal.kind} {limit}"


def _range(load: Sequence[float]) -> str:
    if not load:
        return ""
    return f"{min(load):.1f}" if len(load) == 1 else f"{min(load):.1f} to {max(load):.1f}"


def show(value: float, unit: str) -> str:
    """A figure with its unit."""
    if unit == "B":
        return show_bytes(int(value))
    if unit == "count":
        return f"{value:.0f}"
    return f"{value:.3g} {unit}" if value < 100 else f"{value:.0f} {unit}"
