"""What runtimes reach on devices, fitted to published figures: a hierarchical model of `estimating.speed`'s roofline.

The logit of eta and the logarithm of layer_s are each a sum of effects: of all, of the API, of the engine, of the
runtime, of the family of processors, of the device, and of a runtime on a device. Each effect has a normal prior around
0, so that what few figures say is shrunk towards what is alike. Errors of ln(seconds) follow Student's t with three
degrees of freedom, which single odd rows pull on little. The posterior's mode is found by reweighted Gauss-Newton
steps, its covariance is that of the last one (Laplace's approximation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.estimating import speed
from edgeq.estimating.published import Published, Row, is_k_quant, processor
from edgeq.estimating.speed import Moved, Rate, Shares

Floats = NDArray[np.float64]
Place = tuple[str, str, str]
"""Host, API and runtime."""

ENGINES = {"ollama": "llamacpp"}
"""Runtimes that are built on another one."""
NOISE = {"A": 0.06, "B": 0.09, "C": 0.20}
"""Deviation of ln(seconds) that is left once device and runtime are known, by how much a row is trusted."""
FIGURE_SD = 0.08
ETA = {"all": 0.6, "api": 0.6, "engine": 0.4, "runtime": 0.1, "family": 0.6, "device": 0.4, "own": 0.3}
LAYER = {"all": 0.7, "api": 0.5, "engine": 1.0, "runtime": 0.2, "family": 0.3, "device": 0.2, "own": 0.2}
COMPUTE = {"all": 0.5, "api": 0.3, "engine": 0.3, "runtime": 0.1, "family": 0.4, "device": 0.3, "own": 0.2}
"""Deviations of the effects."""
CENTRE = {"eta": 1.0, "layer": math.log(8e-5), "compute": math.log(0.35), "cache": math.log(0.3), "k_quant": 0.0}
SHARE_SD = {"cache": 0.5, "k_quant": 0.3}
PREFILL_NOISE = 0.25
_FREEDOM = 3
_ROUNDS, _LARGEST_STEP, _DAMPING, _DONE = 100, 0.7, 0.5, 1e-4  # whole steps circle around the mode


def effects(place: Place, published: Published) -> list[tuple[str, str]]:
    """Kind and name of each effect that counts at a place."""
    host, api, runtime = place
    kind = processor(api)
    family = published.family(host, kind)
    engine = ENGINES.get(runtime, runtime)
    found = [("all", ""), ("api", api), ("engine", engine), ("runtime", runtime)]
    found += [("family", f"{kind} {family}")] if family else []
    return [*found, ("device", f"{kind} {host}"), ("own", " ".join(place))]


def place_of(row: Row) -> Place:
    """Where a row was measured."""
    return row.host, row.api, row.runtime


class Index:
    """Columns of parameters by name, each with its prior's centre and deviation."""

    def __init__(self) -> None:
        self.columns: dict[str, int] = {}
        self.centre: list[float] = []
        self.deviation: list[float] = []

    def add(self, name: str, centre: float, deviation: float) -> int:
        """Column of a parameter, which is made when it is new."""
        if name not in self.columns:
            self.columns[name] = len(self.centre)
            self.centre.append(centre)
            self.deviation.append(deviation)
        return self.columns[name]


@dataclass(frozen=True)
class Fit:
    """Posterior mode and covariance of all parameters."""

    mode: Floats
    covariance: Floats


class Rates:
    """The model of one set of figures; `places` are those that rates are wanted for, with figures or without."""

    def __init__(self, published: Published, places: Iterable[Place], peak: Callable[[str, str], float | None]) -> None:
        self.published, self.rows = published, published.rows
        self.places = list(dict.fromkeys([*map(place_of, self.rows), *places]))
        self.index, self.compute = Index(), Index()
        self.engines = sorted({ENGINES.get(place[2], place[2]) for place in self.places})
        for place in self.places:
            for kind, name in effects(place, published):
                whole = kind == "all"
                self.index.add(f"eta {kind} {name}", CENTRE["eta"] if whole else 0.0, ETA[kind])
                self.index.add(f"layer {kind} {name}", CENTRE["layer"] if whole else 0.0, LAYER[kind])
                self.compute.add(f"{kind} {name}", CENTRE["compute"] if whole else 0.0, COMPUTE[kind])
        for engine in self.engines:
            self.index.add(f"cache {engine}", CENTRE["cache"], SHARE_SD["cache"])
        self.index.add("states", CENTRE["cache"], SHARE_SD["cache"])
        self.index.add("k_quant", CENTRE["k_quant"], SHARE_SD["k_quant"])
        size = len(self.index.centre)
        self.eta, self.layer, self.cache = (np.zeros((len(self.rows), size)) for _ in range(3))
        for number, row in enumerate(self.rows):
            for kind, name in effects(place_of(row), published):
                self.eta[number, self.index.columns[f"eta {kind} {name}"]] = 1
                self.layer[number, self.index.columns[f"layer {kind} {name}"]] = 1
            self.eta[number, self.index.columns["k_quant"]] = is_k_quant(row.quantization)
            self.cache[number, self.index.columns[f"cache {ENGINES.get(row.runtime, row.runtime)}"]] = 1
        bandwidth = np.array([published.bandwidth(row.host) for row in self.rows])
        self.weights = np.array([row.weights_bytes for row in self.rows]) / bandwidth
        self.states = np.array([row.state_bytes for row in self.rows]) / bandwidth
        self.keys = np.array([row.mean_kv_bytes for row in self.rows]) / bandwidth
        self.layers = np.array([row.layers for row in self.rows], dtype=float)
        self.log_s = -np.log([row.decode_tokens_per_s for row in self.rows])
        self.noise = np.array([NOISE[row.trust] for row in self.rows])
        self.fitted = np.array([not row.outside for row in self.rows], dtype=float)
        self.peaks = [peak(row.host, row.api) for row in self.rows]

    def seconds(self, mode: Floats) -> tuple[Floats, Floats]:
        """Seconds of each row, and the slopes of their logarithms."""
        eta = 1 / (1 + np.exp(-self.eta @ mode))
        column = self.index.columns["states"]
        weights, keys = self.weights / eta, self.keys / eta / np.exp(self.cache @ mode)
        states = self.states / eta / np.exp(mode[column])
        overhead = self.layers * np.exp(self.layer @ mode)
        total = weights + keys + states + overhead
        slopes = ((weights + keys + states) / total * (eta - 1))[:, None] * self.eta
        slopes += (overhead / total)[:, None] * self.layer - (keys / total)[:, None] * self.cache
        slopes[:, column] -= states / total
        return total, slopes

    def fit(self, used: Floats) -> Fit:
        """Posterior of the rows that `used` is 1 for; the others count for nothing."""
        rows = used > 0
        mode = np.array(self.index.centre)
        for _ in range(_ROUNDS):
            total, slopes = self.seconds(mode)
            missed = self.log_s - np.log(total)
            variance = (_FREEDOM + (missed / self.noise) ** 2) / (_FREEDOM + 1) * self.noise**2
            found = _normal(self.index, slopes[rows], (missed + slopes @ mode)[rows], variance[rows])
            step = found.mode - mode
            largest = float(np.abs(step).max())
            mode = mode + step * min(_DAMPING, _LARGEST_STEP / largest)
            if largest < _DONE:
                break
        return Fit(mode, found.covariance)

    def fit_compute(self, used: Floats) -> Fit:
        """Posterior of ln(compute), which is linear."""
        known = [
            (self._vector(self.compute, "", place_of(row)), math.log(row.prefill_flop_per_s / peak))
            for row, peak, weight in zip(self.rows, self.peaks, used, strict=True)
            if weight and peak and row.prefill_flop_per_s
        ]
        vectors, values = (np.array(part) for part in zip(*known, strict=True))
        return _normal(self.compute, vectors, values, np.full(len(known), PREFILL_NOISE**2))

    def rate(self, fit: Fit, compute: Fit, place: Place, source: str = "") -> Rate:
        """What the fit says of one place."""
        eta, layer = self._vector(self.index, "eta ", place), self._vector(self.index, "layer ", place)
        share = self._vector(self.compute, "", place)
        eta_sd, layer_sd = (math.sqrt(each @ fit.covariance @ each) for each in (eta, layer))
        return Rate(
            logit_eta=float(eta @ fit.mode),
            eta_sd=eta_sd,
            log_layer_s=float(layer @ fit.mode),
            layer_sd=layer_sd,
            correlation=float(eta @ fit.covariance @ layer) / eta_sd / layer_sd,
            log_compute=float(share @ compute.mode),
            compute_sd=math.sqrt(share @ compute.covariance @ share + PREFILL_NOISE**2),
            shares=self.shares(fit, place[2]),
            source=source,
        )

    def shares(self, fit: Fit, runtime: str) -> Shares:
        """What all devices have in common under a runtime."""
        cache = self.index.columns[f"cache {ENGINES.get(runtime, runtime)}"]
        return Shares(
            states=float(fit.mode[self.index.columns["states"]]),
            cache=float(fit.mode[cache]),
            cache_sd=math.sqrt(fit.covariance[cache, cache]),
            k_quant=float(fit.mode[self.index.columns["k_quant"]]),
            figure_sd=FIGURE_SD,
        )

    def _vector(self, index: Index, prefix: str, place: Place) -> Floats:
        vector = np.zeros(len(index.centre))
        for kind, name in effects(place, self.published):
            vector[index.columns[f"{prefix}{kind} {name}"]] = 1
        return vector


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
        alone += [Checked(row, predict(rate, row, rates.published)) for row in own]
        for anchor in own:
            known = anchored_at(rate, anchor, rates.published)
            anchored += [Checked(row, predict(known, row, rates.published), anchor) for row in own if row is not anchor]
    return alone, anchored


def predict(rate: Rate, row: Row, published: Published) -> speed.Range:
    """Tokens per second of a row by a rate."""
    return rate.decode(moved(row), row.layers, published.bandwidth(row.host))


def anchored_at(rate: Rate, row: Row, published: Published) -> Rate:
    """A rate once a row is known."""
    return rate.measured(1 / row.decode_tokens_per_s, moved(row), row.layers, published.bandwidth(row.host))


def moved(row: Row) -> Moved:
    """What a token of a row moves."""
    return Moved(row.weights_bytes, row.state_bytes, row.mean_kv_bytes, is_k_quant(row.quantization))


def _normal(index: Index, slopes: Floats, values: Floats, variance: Floats) -> Fit:
    """Posterior of parameters whose `slopes` times them are `values` with an error of `variance`.

    Solved in the space of the rows, which are fewer than the parameters.
    """
    centre, prior = np.array(index.centre), np.array(index.deviation) ** 2
    spread = slopes * prior
    gain = np.linalg.solve(spread @ slopes.T + np.diag(variance), spread)
    mode = centre + gain.T @ (values - slopes @ centre)
    return Fit(np.asarray(mode, dtype=np.float64), np.asarray(np.diag(prior) - gain.T @ spread, dtype=np.float64))


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
