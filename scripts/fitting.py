"""What runtimes reach on devices, fitted to published figures: a hierarchical model of `estimating.speed`'s roofline.

The logit of eta and the logarithm of layer_s are each a sum of effects: of all, of the API, of the engine, of the
runtime, of the family of processors, of the device, and of a runtime on a device; of CPUs without a dot product of
integers, and of runtimes by the maker of the processor, which cost less for each layer. The logarithm of unpack has one
of the engine's kernels for the API and one of a runtime on a device. Each effect has a normal prior, around 0 but for
what documentation says, so that what few figures say is shrunk towards what is alike. Errors of ln(seconds) follow
Student's t with three degrees of freedom, which single odd rows pull on little. The posterior's mode is found by
reweighted Gauss-Newton steps, its covariance is that of the last one (Laplace's approximation).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from edgeq.estimating.published import Published, Row, is_k_quant, processor
from edgeq.estimating.speed import SHARPNESS, Moved, Rate, Shares

Floats = NDArray[np.float64]
Place = tuple[str, str, str]
"""Host, API and runtime."""

ENGINES = {"ollama": "llamacpp"}
"""Runtimes that are built on another one."""
NOISE = {"A": 0.06, "B": 0.09, "C": 0.20}
"""Deviation of ln(seconds) that is left once device and runtime are known, by how much a row is trusted."""
FIGURE_SD = 0.08
ETA = {"all": 0.6, "api": 0.6, "engine": 0.4, "runtime": 0.1, "family": 0.6, "dot": 0.5, "device": 0.4, "own": 0.3}
LAYER = {"all": 0.7, "api": 0.5, "engine": 1.0, "runtime": 0.2, "maker": 0.7, "family": 0.3, "device": 0.2, "own": 0.2}
UNPACK = {"kernels": 1.5, "own": 0.3}
COMPUTE = {"all": 0.5, "api": 0.3, "engine": 0.3, "runtime": 0.1, "family": 0.4, "device": 0.3, "own": 0.2}
"""Deviations of the effects."""
CENTRE = {
    "eta all": 1.0,
    "eta dot": -0.7,
    "layer all": math.log(8e-5),
    "unpack kernels": math.log(20),
    "compute all": math.log(0.35),
    "cache": math.log(0.3),
    "k_quant": 0.0,
}
"""Of effects that are not around 0. A Cortex-A72 writes at a quarter of its bandwidth, a Cortex-A76 at more than half
(targets' `memory.measured`). A weight of 4 bits takes about ten instructions to load, mask, shift, convert, scale and
add, each in the time of a multiply-add, which a peak counts twice."""
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
    found += [("kernels", f"{engine} {api}")]
    found += [("maker", "")] if runtime in published.traits.makers else []
    found += [("family", f"{kind} {family}")] if family else []
    found += [("dot", "")] if kind == "cpu" and host in published.traits.without_dot_product else []
    return [*found, ("device", f"{kind} {host}"), ("own", " ".join(place))]


def row_effects(row: Row, published: Published) -> list[tuple[str, str]]:
    """The same for a row, whose matrices another processor of the host may have computed."""
    if row.computed_on is None:
        return effects(place_of(row), published)
    return [*effects((row.host, row.computed_on, row.runtime), published), ("own", " ".join(place_of(row)))]


def place_of(row: Row) -> Place:
    """Where a row was measured."""
    return row.host, row.api, row.runtime


class Index:
    """Columns of parameters by name, each with its prior's centre and deviation."""

    def __init__(self) -> None:
        self.columns: dict[str, int] = {}
        self.centre: list[float] = []
        self.deviation: list[float] = []

    def add(self, name: str, centre: float, deviation: float) -> None:
        """A parameter, unless it is known."""
        if name not in self.columns:
            self.columns[name] = len(self.centre)
            self.centre.append(centre)
            self.deviation.append(deviation)

    def add_effects(self, quantity: str, deviations: dict[str, float], found: Iterable[tuple[str, str]]) -> None:
        """Those effects that count for a quantity."""
        for kind, name in found:
            if kind in deviations:
                self.add(f"{quantity} {kind} {name}", CENTRE.get(f"{quantity} {kind}", 0.0), deviations[kind])

    def vector(self, quantity: str, found: Iterable[tuple[str, str]]) -> Floats:
        """1 for each parameter that a quantity is the sum of."""
        vector = np.zeros(len(self.centre))
        names = (f"{quantity} {kind} {name}" for kind, name in found)
        vector[[self.columns[name] for name in names if name in self.columns]] = 1
        return vector


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
        self.peaks = [peak(row.host, row.api) for row in self.rows]
        self.engines = sorted({ENGINES.get(place[2], place[2]) for place in self.places})
        measured = [row_effects(row, published) for row in self.rows]
        for found in [*measured, *(effects(place, published) for place in self.places)]:
            self.index.add_effects("eta", ETA, found)
            self.index.add_effects("layer", LAYER, found)
            self.compute.add_effects("compute", COMPUTE, found)
        tuned = {
            ("kernels", f"{ENGINES.get(row.runtime, row.runtime)} {row.api}") for row in self.rows if self.peak(row)
        }
        for place in self.places:
            if tuned.intersection(found := effects(place, published)):
                self.index.add_effects("unpack", UNPACK, found)
        for engine in self.engines:
            self.index.add(f"cache {engine}", CENTRE["cache"], SHARE_SD["cache"])
        self.index.add("states", CENTRE["cache"], SHARE_SD["cache"])
        self.index.add("k_quant", CENTRE["k_quant"], SHARE_SD["k_quant"])
        self.eta, self.layer, self.unpack = (
            np.array([self.index.vector(quantity, found) for found in measured])
            for quantity in ("eta", "layer", "unpack")
        )
        self.cache = np.zeros_like(self.eta)
        for number, row in enumerate(self.rows):
            self.eta[number, self.index.columns["k_quant"]] = is_k_quant(row.quantization)
            self.cache[number, self.index.columns[f"cache {ENGINES.get(row.runtime, row.runtime)}"]] = 1
        bandwidth = np.array([published.bandwidth(row.host) for row in self.rows])
        moves = [self.moved(row) for row in self.rows]
        self.weights = np.array([each.weights for each in moves]) / bandwidth
        self.states = np.array([each.states for each in moves]) / bandwidth
        self.keys = np.array([each.cache for each in moves]) / bandwidth
        self.operation_s = np.array([each.operation_s for each in moves])
        self.layers = np.array([row.layers for row in self.rows], dtype=float)
        self.log_s = -np.log([row.decode_tokens_per_s for row in self.rows])
        self.noise = np.array([NOISE[row.trust] for row in self.rows])
        self.fitted = np.array([not row.outside for row in self.rows], dtype=float)

    def peak(self, row: Row) -> float | None:
        """Peak arithmetic of the GPU that a row ran on, where it is known."""
        return self.peaks[self.rows.index(row)] if processor(row.api) == "gpu" else None

    def moved(self, row: Row) -> Moved:
        """What a token of a row moves and unpacks."""
        peak = self.peak(row)
        operation_s = row.weights / peak if peak else 0.0
        k_quant = is_k_quant(row.quantization)
        return Moved(row.weights_bytes, row.state_bytes, row.mean_kv_bytes, k_quant, operation_s)

    def seconds(self, mode: Floats) -> tuple[Floats, Floats]:
        """Seconds of each row, and the slopes of their logarithms."""
        eta = 1 / (1 + np.exp(-self.eta @ mode))
        column = self.index.columns["states"]
        weights, keys = self.weights / eta, self.keys / eta / np.exp(self.cache @ mode)
        unpacking = self.operation_s * np.exp(self.unpack @ mode)
        matrices = (weights**SHARPNESS + unpacking**SHARPNESS) ** (1 / SHARPNESS)
        unpacked = matrices * (unpacking / matrices) ** SHARPNESS
        states = self.states / eta / np.exp(mode[column])
        overhead = self.layers * np.exp(self.layer @ mode)
        total = matrices + keys + states + overhead
        slopes = ((matrices - unpacked + keys + states) / total * (eta - 1))[:, None] * self.eta
        slopes += (overhead / total)[:, None] * self.layer - (keys / total)[:, None] * self.cache
        slopes += (unpacked / total)[:, None] * self.unpack
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
            (self.compute.vector("compute", row_effects(row, self.published)), math.log(row.prefill_flop_per_s / peak))
            for row, peak, weight in zip(self.rows, self.peaks, used, strict=True)
            if weight and peak and row.prefill_flop_per_s
        ]
        vectors, values = (np.array(part) for part in zip(*known, strict=True))
        return _normal(self.compute, vectors, values, np.full(len(known), PREFILL_NOISE**2))

    def rate(self, fit: Fit, compute: Fit, place: Place, source: str = "") -> Rate:
        """What the fit says of one place; where other processors computed its rows, of these."""
        own = (row_effects(row, self.published) for row in self.rows if place_of(row) == place)
        found = next(own, effects(place, self.published))
        eta, layer, unpack = (self.index.vector(quantity, found) for quantity in ("eta", "layer", "unpack"))
        share = self.compute.vector("compute", found)
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
            unpack=math.exp(unpack @ fit.mode) if unpack.any() else 0.0,
            unpack_sd=math.sqrt(unpack @ fit.covariance @ unpack),
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


def _normal(index: Index, slopes: Floats, values: Floats, variance: Floats) -> Fit:
    """Posterior of parameters whose `slopes` times them are `values` with an error of `variance`.

    Solved in the space of the rows, which are fewer than the parameters.
    """
    centre, prior = np.array(index.centre), np.array(index.deviation) ** 2
    spread = slopes * prior
    gain = np.linalg.solve(spread @ slopes.T + np.diag(variance), spread)
    mode = centre + gain.T @ (values - slopes @ centre)
    return Fit(np.asarray(mode, dtype=np.float64), np.asarray(np.diag(prior) - gain.T @ spread, dtype=np.float64))
