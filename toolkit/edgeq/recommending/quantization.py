"""What a recipe costs a model, as a share of what it scores: measured where a profile is, else from published losses.

A published ladder gives the loss of one model by bits per weight; published losses of one method at several sizes give
the power of the number of parameters by which losses grow as models shrink. Between rungs the logarithm of the loss is
interpolated; below the last one it goes on to a published model of few bits, and past that with the same slope. A
model's loss is the mean over its matrices by their weights, each by its own layout, so that a table in 8 bits counts.

Methods that fit layers of 4 bits to a text are counted to lose less than plain rounding: by what published GPTQ loses
against the ladder, carried to its bits, of another benchmark and other models. Those that are better than GPTQ get no
more credit, and the upper end of the interval has none. What an 8-bit cache costs is not counted.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import cache
from statistics import fmean, geometric_mean
from typing import NamedTuple

import msgspec

from edgeq import data
from edgeq.loss import Accuracy
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.size import is_quantized, layout_of

_FILE = "losses.toml"
_FITTED, _FITTED_BITS = "GPTQ int4", 4
_SCALE_BITS = 16
_MOST = 0.95
_SIGMAS = 1.96


class Loss(msgspec.Struct, frozen=True, kw_only=True):
    """Share of its quality that quantization costs, 0 to 1, with its 95 % interval.

    evidence: "measured", of the likelihood of the next token on the profile's text; "published", of benchmark scores,
    carried over to this model; "none", weights in the checkpoint's own type. kl_mean: measured, nats per token.
    """

    value: float
    low: float
    high: float
    evidence: str
    basis: str
    kl_mean: float | None = None


class Rung(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Score of the ladder's model under one layout."""

    layout: str
    bits_per_weight: float
    score: float


class Ladder(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model under many layouts."""

    model: str
    benchmark: str
    parameters: int
    float_score: float
    source: str
    rungs: tuple[Rung, ...]


class Sized(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Scores of one model, as floats and quantized; `quantized` of its parameters are, tables are not."""

    parameters: int
    quantized: int
    float_score: float
    score: float

    @property
    def lost(self) -> float:
        """Share of the score that is lost."""
        return 1 - self.score / self.float_score


class Sizes(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One layout on models of many sizes."""

    layout: str
    bits_per_weight: float
    benchmark: str
    source: str
    models: tuple[Sized, ...]


class FewBits(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One model in fewer bits than any rung of the ladder."""

    model: str
    layout: str
    parameters: int
    bits_per_weight: float
    perplexity_ratio: float
    source: str


class Published(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Contents of `losses.toml`."""

    ladder: Ladder
    sizes: tuple[Sizes, ...]
    few_bits: FewBits


class Law(NamedTuple):
    """Loss of a layout at the ladder's size, by bits per weight; the power of the size; factor of the 95 % interval."""

    points: tuple[tuple[float, float], ...]
    power: float
    spread: float
    parameters: int


def published() -> Published:
    """The shipped losses."""
    return data.read_toml(data.folder("recommending") / _FILE, Published)


@cache
def law() -> Law:
    """Ladder, power and spread that the published losses give."""
    found = published()
    rows = [[(math.log(one.parameters), math.log(one.lost)) for one in sizes.models] for sizes in found.sizes]
    centred = [_centred(row) for row in rows]
    power = sum(x * y for row in centred for x, y in row) / sum(x * x for row in centred for x, _ in row)
    off = [y - power * x for row in centred for x, y in row]
    free = len(off) - len(rows) - 1
    spread = math.exp(_SIGMAS * math.sqrt(sum(value**2 for value in off) / free))
    ladder, few = found.ladder, found.few_bits
    points = [(rung.bits_per_weight, 1 - rung.score / ladder.float_score) for rung in ladder.rungs]
    lost = (1 - 1 / few.perplexity_ratio) * (ladder.parameters / few.parameters) ** power
    return Law(tuple(sorted([*points, (few.bits_per_weight, lost)])), power, spread, ladder.parameters)


@cache
def fitted() -> tuple[float, ...]:
    """What GPTQ loses of what the ladder says of plain rounding in as many bits, for each of the published models."""
    known = law()
    (gptq,) = (each for each in published().sizes if each.layout == _FITTED)
    rounded = [
        one.quantized / one.parameters * _at(gptq.bits_per_weight) * (one.parameters / known.parameters) ** known.power
        for one in gptq.models
    ]
    return tuple(one.lost / lost for one, lost in zip(gptq.models, rounded, strict=True))


def estimated(model: Model, recipe: Recipe) -> Loss:
    """Loss of a recipe on a model, from published losses of others."""
    weights = {name: math.prod(shape) for name, shape in model.tensors().items() if is_quantized(name)}
    total, known = model.parameters, law()
    bits = {name: layout_of(model, recipe, name) for name in weights}
    if all(layout.is_float for layout in bits.values()):
        return Loss(value=0.0, low=0.0, high=0.0, evidence="none", basis="weights are not quantized")
    scale = (total / known.parameters) ** known.power / total
    credit = geometric_mean(fitted())
    rounded = value = 0.0
    for name, count in weights.items():
        if not bits[name].is_float:
            lost = count * _at(bits[name].stored_bits(_SCALE_BITS)) * scale
            credited = recipe.calibrated and bits[name].bits == _FITTED_BITS and name.startswith("model.layers.")
            rounded, value = rounded + lost, value + lost * (credit if credited else 1.0)
    basis = f"{published_names()}, x (parameters / {known.parameters / 1e9:.1f} B)^{known.power:.2f}"
    if value < rounded:
        least, most = min(fitted()), max(fitted())
        basis += f", layers x {credit:.2f} [{least:.2f}, {most:.2f}] as GPTQ of three Qwen2 models"
    return Loss(
        value=min(value, _MOST),
        low=min(value / known.spread, _MOST),
        high=min(rounded * known.spread, _MOST),
        evidence="published",
        basis=basis,
    )


def measured(accuracy: Accuracy) -> Loss:
    """Loss that a profile measured: how much less likely the text's next tokens became."""
    ratio = accuracy.ln_ratio
    low, value, high = (max(0.0, 1 - math.exp(-each)) for each in (ratio.low, ratio.value, ratio.high))
    return Loss(
        value=value,
        low=low,
        high=high,
        evidence="measured",
        basis=f"perplexity {accuracy.perplexity_reference:.3f} -> {accuracy.perplexity:.3f}, {accuracy.tokens} tokens",
        kl_mean=accuracy.kl_mean,
    )


@cache
def published_names() -> str:
    """Which published losses are carried over, as words."""
    ladder = published().ladder
    return f"{ladder.benchmark} of {ladder.model} by bits per weight ({ladder.source})"


@cache
def _at(bits: float) -> float:
    """Loss of the ladder's model at so many bits per weight."""
    points = law().points
    upper = next((index for index, (known, _) in enumerate(points) if known >= bits), len(points) - 1)
    upper = max(upper, 1)
    (left, low), (right, high) = points[upper - 1], points[upper]
    slope = (math.log(high) - math.log(low)) / (right - left)
    return low * math.exp(slope * (bits - left))


def _centred(row: Sequence[tuple[float, float]]) -> list[tuple[float, float]]:
    middle, level = fmean(x for x, _ in row), fmean(y for _, y in row)
    return [(x - middle, y - level) for x, y in row]
