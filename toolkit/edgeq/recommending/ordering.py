"""One order of models from published scores: models are compared only where benchmark and mode are the same.

A score becomes its log odds. Each benchmark in each mode has a level, each model a strength, and a score is the sum of
the two; a benchmark that one model alone publishes says nothing. Strengths are the least squares over all shared
benchmarks, with Huber's weights, so that a benchmark that disagrees with all others counts less. Models without a
benchmark in common are compared through those that share one with both, as ratings of chess players are, and no cycle
of noisy comparisons can arise.

Scores of answering directly (Qwen2.5's instruct models never think: their scores are such), of thinking and of base
models are different benchmarks here, so a level takes up what thinking adds. A model with scores of thinking alone has
a place too, and a wider interval for it. Strengths are shown as what they mean on `SCALE`.

Sources: Bradley and Terry 1952 (one strength from paired comparisons); Huber 1964 (weights).
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from statistics import fmean, median, variance

import msgspec

from edgeq import catalog
from edgeq.catalog import Entry

SCALE = "MMLU-Redux"
DIRECT, THINKING, BASE = "direct", "thinking", "base"
_MODES = {"instruct": DIRECT, "non_thinking": DIRECT, "thinking": THINKING, "base": BASE}
_EXTREME = 1.0  # points from 0 and 100, where log odds would run away
_HUBER = 1.345
_EXACT = 0.01  # log odds: scores are published to a tenth of a point
_SIGMAS = 1.96
_ROUNDS = 30

Benchmark = tuple[str, str]
"""Mode and name."""


class Quality(msgspec.Struct, frozen=True, kw_only=True):
    """What a model scores when it answers directly, on the scale of `benchmark`, with its 95 % interval.

    score: by all benchmarks that it shares with other models, `compared_on` many; published: the model's own figure on
    that benchmark; inferred: why the score does not come from direct answers, or null.
    """

    score: float
    low: float
    high: float
    benchmark: str
    mode: str
    published: float | None
    compared_on: int
    source: str
    inferred: str | None


class ThinkingScore(msgspec.Struct, frozen=True, kw_only=True):
    """What a model scores on `benchmark` after thinking, as published."""

    score: float
    benchmark: str
    source: str


@dataclass(frozen=True)
class Order:
    """Strengths of models in log odds, their covariance, and the log odds that strength 0 has on the scale."""

    strengths: dict[str, float]
    covariance: dict[str, dict[str, float]]
    level: float
    transfer: float
    entries: dict[str, Entry]

    def quality(self, name: str) -> Quality | None:
        """Quality of a model; None when it shares no benchmark with another."""
        if name not in self.strengths:
            return None
        entry, own = self.entries[name], _scores(self.entries[name])
        direct = self._answers(name)
        half = _SIGMAS * math.sqrt(self.covariance[name][name] + (0 if direct else self.transfer))
        strength = self.strengths[name] + self.level
        others = [_scores(other) for other in self.entries.values() if other.name != name]
        return Quality(
            score=_points(strength),
            low=_points(strength - half),
            high=_points(strength + half),
            benchmark=SCALE,
            mode=DIRECT,
            published=own.get((DIRECT, SCALE)),
            compared_on=sum(any(key in scores for scores in others) for key in own),
            source="; ".join(sorted({entry.scores[mode].source for mode in entry.scores if mode in _MODES})),
            inferred=None if direct else "no scores of direct answers are published: inferred from those of thinking",
        )

    def alike(self, one: str, other: str) -> bool:
        """Whether benchmarks do not tell two models apart: 0 is inside the 95 % interval of their difference."""
        cov = self.covariance
        square = cov[one][one] + cov[other][other] - 2 * cov[one][other]
        if self._answers(one) != self._answers(other):
            square += self.transfer
        return abs(self.strengths[one] - self.strengths[other]) <= _SIGMAS * math.sqrt(max(square, 0.0))

    def _answers(self, name: str) -> bool:
        """Whether scores of a model's direct answers are published."""
        return any(mode == DIRECT for mode, _ in _scores(self.entries[name]))

    def compared(self, one: str, other: str) -> str:
        """The benchmarks that two models share, with both scores of the first ones, as words."""
        mine, theirs = _scores(self.entries[one]), _scores(self.entries[other])
        shared = {mode: [name for kind, name in mine if kind == mode and (mode, name) in theirs] for mode in _WORDS}
        for mode, names in shared.items():
            if names:
                names.sort(key=lambda name: name != SCALE)
                pairs = [f"{name} {mine[mode, name]:g} against {theirs[mode, name]:g}" for name in names[:2]]
                more = f" and {len(names) - 2} more" if len(names) > 2 else ""
                return f"{', '.join(pairs)}{more}, {_WORDS[mode]}"
        return "no benchmark in common, compared through other models"


_WORDS = {DIRECT: "answering directly", THINKING: "thinking", BASE: "base models"}


def thinking(entry: Entry) -> ThinkingScore | None:
    """A model's published score of thinking on the scale's benchmark."""
    scores = entry.scores.get("thinking")
    if scores is None or SCALE not in scores.values:
        return None
    return ThinkingScore(score=scores.values[SCALE], benchmark=SCALE, source=scores.source)


@cache
def of_catalogue() -> Order:
    """Order of all models of the catalogue."""
    return order(catalog.entries())


def order(entries: Sequence[Entry]) -> Order:
    """Order of models by their published scores."""
    table: dict[Benchmark, dict[str, float]] = {}
    for entry in entries:
        for key, score in _scores(entry).items():
            table.setdefault(key, {})[entry.name] = _log_odds(score)
    table = {key: row for key, row in table.items() if len(row) > 1}
    names = [entry.name for entry in entries if any(entry.name in row for row in table.values())]
    weights = {key: dict.fromkeys(row, 1.0) for key, row in table.items()}
    before = dict.fromkeys(names, math.inf)
    for _ in range(_ROUNDS):
        matrix, right = _equations(table, weights, names)
        inverse = _inverse(matrix)
        strengths = {name: _dot(row, right) for name, row in zip(names, inverse, strict=True)}
        residuals = _residuals(table, weights, strengths)
        usual = max(_EXACT, 1.4826 * median(abs(value) for row in residuals.values() for value in row.values()))
        weights = {
            key: {name: min(1.0, _HUBER * usual / max(abs(value), 1e-9)) for name, value in row.items()}
            for key, row in residuals.items()
        }
        if all(abs(strengths[name] - before[name]) < _EXACT / 100 for name in names):
            break
        before = strengths
    free = sum(map(len, table.values())) - len(table) - len(names) + 1
    squares = sum(weights[key][name] * value**2 for key, row in residuals.items() for name, value in row.items())
    noise = squares / max(free, 1)
    covariance = {
        name: {other: noise * value for other, value in zip(names, row, strict=True)}
        for name, row in zip(names, inverse, strict=True)
    }
    scale = (DIRECT, SCALE)
    level = _mean({name: table[scale][name] - strengths[name] for name in table[scale]}, weights[scale])
    return Order(strengths, covariance, level, _transfer(residuals), {entry.name: entry for entry in entries})


def _scores(entry: Entry) -> dict[Benchmark, float]:
    return {
        (_MODES[mode], name): float(value)
        for mode, scores in entry.scores.items()
        if mode in _MODES
        for name, value in scores.values.items()
    }


def _log_odds(score: float) -> float:
    share = min(max(score, _EXTREME), 100 - _EXTREME) / 100
    return math.log(share / (1 - share))


def _points(log_odds: float) -> float:
    return 100 / (1 + math.exp(-log_odds))


Table = dict[Benchmark, dict[str, float]]


def _equations(table: Table, weights: Table, names: Sequence[str]) -> tuple[list[list[float]], list[float]]:
    """Normal equations of the strengths, levels eliminated; the strengths' sum is held at 0."""
    place = {name: index for index, name in enumerate(names)}
    matrix = [[1 / len(names)] * len(names) for _ in names]
    right = [0.0] * len(names)
    for key, row in table.items():
        weight, mean = weights[key], _mean(row, weights[key])
        total = sum(weight.values())
        for name, value in row.items():
            right[place[name]] += weight[name] * (value - mean)
            matrix[place[name]][place[name]] += weight[name]
            for other in row:
                matrix[place[name]][place[other]] -= weight[name] * weight[other] / total
    return matrix, right


def _residuals(table: Table, weights: Table, strengths: dict[str, float]) -> Table:
    found = {}
    for key, row in table.items():
        over = {name: value - strengths[name] for name, value in row.items()}
        level = _mean(over, weights[key])
        found[key] = {name: value - level for name, value in over.items()}
    return found


def _transfer(residuals: Table) -> float:
    """Variance of how much more thinking adds to one model than to another, over models with both kinds of scores."""
    means: dict[str, dict[bool, list[float]]] = {}
    for (mode, _), row in residuals.items():
        for name, value in row.items():
            means.setdefault(name, {}).setdefault(mode == THINKING, []).append(value)
    gains = [fmean(kinds[True]) - fmean(kinds[False]) for kinds in means.values() if len(kinds) == 2]
    return variance(gains) if len(gains) > 1 else 0.0


def _mean(values: dict[str, float], weights: dict[str, float]) -> float:
    return sum(weights[name] * value for name, value in values.items()) / sum(weights[name] for name in values)


def _dot(left: Sequence[float], right: Sequence[float]) -> float:
    return sum(one * other for one, other in zip(left, right, strict=True))


def _inverse(matrix: Sequence[Sequence[float]]) -> list[list[float]]:
    """Inverse of a positive definite matrix, by Gauss and Jordan."""
    size = len(matrix)
    rows = [[*row, *(float(index == column) for column in range(size))] for index, row in enumerate(matrix)]
    for column in range(size):
        pivot = rows[column][column]
        rows[column] = [value / pivot for value in rows[column]]
        for index in range(size):
            if index != column and (factor := rows[index][column]):
                rows[index] = [value - factor * own for value, own in zip(rows[index], rows[column], strict=True)]
    return [row[size:] for row in rows]
