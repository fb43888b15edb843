"""Losses and speeds as tables: one row for each side."""

from __future__ import annotations

from collections.abc import Sequence

from rich.table import Table

from edgeq.units import show_bytes
from peers import figures
from peers.loss import Loss
from peers.serving import AS_RUN, WEIGHTS_ONLY
from peers.speed import Speed
from peers.texts import TEXTS

_HOWS = {AS_RUN: "", WEIGHTS_ONLY: ", weights only"}


def losses(found: Sequence[Loss]) -> Table:
    """KL divergence of each side of each model, for each text and way to run."""
    columns = [(text, how) for text in TEXTS for how in _HOWS]
    table = Table(
        "model", "side", "bits/weight", *(f"{text}{_HOWS[how]}" for text, how in columns), box=None, pad_edge=False
    )
    for model, side in dict.fromkeys((each.model, each.side) for each in found):
        of_side = [each for each in found if (each.model, each.side) == (model, side)]
        cells = {(each.text, each.how): f"{figures.mean(each.windows):.6f}" for each in of_side if each.kl}
        first = of_side[0]
        if first.bits is None:
            table.add_row(model, side, "null", first.reason)
        else:
            table.add_row(model, side, f"{first.bits:.3f}", *(cells.get(column, "") for column in columns))
    return table


def speeds(found: Sequence[Speed]) -> Table:
    """Medians of each side of one model."""
    names = ("model", "side", "decode tok/s", "prefill tok/s", "weights", "peak memory", "anonymous", "share", "flags")
    table = Table(*names, box=None, pad_edge=False)
    for each in found:
        flags = " ".join(each.words)
        if not each.decode:
            table.add_row(each.model, each.side, "null", each.reason, *[""] * 4, flags)
            continue
        medians = [f"{figures.median(samples):.1f}" for samples in (each.decode, each.prefill)]
        sizes = [_size(size) for size in (each.weights_bytes, each.peak_rss_bytes, each.anonymous_bytes)]
        table.add_row(each.model, each.side, *medians, *sizes, f"{each.share:.0%}", flags)
    return table


def _size(size: int | None) -> str:
    return "null" if size is None else show_bytes(size)
