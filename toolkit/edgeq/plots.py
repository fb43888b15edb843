"""Figures in plain text, for a terminal or a log."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeq.recommending.document import Candidate, Recommendation

_WIDTH, _HEIGHT = 64, 16
_BESIDE, _NARROWEST = 10, 24
_CHOSEN, _OTHER = "*", "."
_LETTERS = "abcdefghijklmnopqrstuvwxyz"


def front(document: Recommendation, columns: int = _BESIDE + _WIDTH) -> str:
    """Quality over decoded tokens per second (logarithmic) of what meets all constraints, in a terminal's columns.

    The front has letters, the choice a star, all others a dot; nothing to draw is said in words.
    """
    points = [
        each for each in document.candidates if each.verdict != "rejected" and each.decode_tokens_per_s and each.score
    ]
    if not points:
        return "nothing to draw: no candidate that meets all constraints has a known speed and quality"
    width = min(_WIDTH, max(_NARROWEST, columns - _BESIDE))
    across = _Axis([math.log(_speed(each)) for each in points], width)
    up = _Axis([each.score or 0.0 for each in points], _HEIGHT)
    grid = [[" "] * width for _ in range(_HEIGHT)]
    legend: list[str] = []
    for each in sorted(points, key=lambda point: (point.verdict == "chosen", point.front)):
        mark = _OTHER
        if each.verdict == "chosen":
            mark = _CHOSEN
        elif each.front:
            mark = _LETTERS[len(legend) % len(_LETTERS)]
        if mark != _OTHER:
            about = "" if each.exact_speed else "~"
            legend.append(f"{mark} {each.title}: {about}{_speed(each):.1f} tokens/s, quality ~{each.score:.1f}")
        grid[_HEIGHT - 1 - up.place(each.score or 0.0)][across.place(math.log(_speed(each)))] = mark
    labels = {0: f"{up.high:.0f}", _HEIGHT - 1: f"{up.low:.0f}"}
    rows = [f"{labels.get(index, ''):>8} |{''.join(row).rstrip()}" for index, row in enumerate(grid)]
    left, right = f"{math.exp(across.low):.1f}", f"{math.exp(across.high):.1f} tokens/s"
    return "\n".join(
        [
            " quality",
            *rows,
            f"{'':8} +{'-' * width}",
            f"{'':{_BESIDE}}{left}{right:>{width - len(left)}}",
            *reversed(legend),
        ]
    )


class _Axis:
    """Values from low to high on so many places."""

    def __init__(self, values: list[float], places: int) -> None:
        self.low, self.high, self.places = min(values), max(values), places

    def place(self, value: float) -> int:
        """Place of a value, counted from 0."""
        span = self.high - self.low
        return round((value - self.low) / span * (self.places - 1)) if span else 0


def _speed(candidate: Candidate) -> float:
    assert candidate.decode_tokens_per_s is not None
    return candidate.decode_tokens_per_s.mid
