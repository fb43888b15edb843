"""What a runtime reaches on a device: the target's own calibration, else what is pooled for its API."""

from __future__ import annotations

import functools
import math

import msgspec

from edgeq import data
from edgeq.errors import UsageFault
from edgeq.estimating.speed import NINETY, Rate, Shares, logit
from edgeq.target import Calibration, Target

ANY = "any"
_SPELLINGS = {"llama.cpp": "llamacpp", "trt-edge-llm": "tensorrt-edge-llm"}


class Pooled(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """`rates.toml`, as `scripts/refit` writes it: what all devices share, and calibrations by API and runtime.

    cache: of `speed.Shares` by runtime, its deviation beside it; `any` stands for runtimes without figures.
    """

    states: float
    k_quant: float
    figure_sd: float
    cache: dict[str, tuple[float, float]]
    pooled: dict[str, dict[str, Calibration]]


@functools.cache
def pooled() -> Pooled:
    """The shipped file."""
    return data.read_toml(data.folder("estimating") / "rates.toml", Pooled)


def runtimes() -> tuple[str, ...]:
    """Runtimes that speeds are estimated for, sorted."""
    return tuple(sorted({name for found in pooled().pooled.values() for name in found} - {ANY}))


def canonical(runtime: str) -> str:
    """Name that a runtime's figures are kept under; raises UsageFault for one without any."""
    name = _SPELLINGS.get(runtime.lower(), runtime.lower())
    if name not in runtimes():
        raise UsageFault(
            f"{runtime!r} is neither a backend nor a runtime with published figures",
            why=data.near(runtime, runtimes()),
            run="edgeq estimate ... --backend llamacpp",
        )
    return name


def api_of(target: Target, runtime: str) -> str:
    """API that a runtime uses on a target, where no published figure says otherwise."""
    if runtime == "onnx":
        return target.onnx.provider
    if runtime == "mlc":
        return "cpu" if target.code_generator == "llvm" else target.code_generator
    return target.api


def find(target: Target, runtime: str) -> Rate:
    """Rate of a runtime on a target; a target that was not fitted gets what is pooled for its API."""
    if runtime in target.calibration:
        return as_rate(target.calibration[runtime], runtime)
    by_runtime = pooled().pooled.get(api_of(target, runtime), pooled().pooled[ANY])
    return as_rate(by_runtime.get(runtime, by_runtime[ANY]), runtime)


def as_rate(found: Calibration, runtime: str) -> Rate:
    """The distribution that a calibration writes down."""
    shared = pooled()
    cache, cache_sd = shared.cache.get(runtime, shared.cache[ANY])
    return Rate(
        logit_eta=logit(found.eta),
        eta_sd=(logit(found.eta_interval[1]) - logit(found.eta_interval[0])) / 2 / NINETY,
        log_layer_s=math.log(found.layer_s),
        layer_sd=_deviation(found.layer_s_interval),
        correlation=found.correlation,
        log_compute=math.log(found.compute),
        compute_sd=_deviation(found.compute_interval),
        unpack=found.unpack or 0.0,
        unpack_sd=_deviation(found.unpack_interval) if found.unpack_interval else 0.0,
        shares=Shares(math.log(shared.states), math.log(cache), cache_sd, shared.k_quant, shared.figure_sd),
        source=found.source,
    )


def _deviation(interval: tuple[float, float]) -> float:
    return math.log(interval[1] / interval[0]) / 2 / NINETY
