"""Seconds that a token takes: the roofline of a device under a runtime, as pure arithmetic."""

from __future__ import annotations

from dataclasses import dataclass

import msgspec


class Range(msgspec.Struct, frozen=True):
    """An estimate with the interval that nine of ten figures are expected in."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Rate:
    """What a runtime reaches on a device: `eta`, share of the bandwidth; `layer_s`, seconds that each layer costs on top.

    interval: factor, above 1, that 90 % of the figures are within; compute: share of the peak arithmetic that reading a
    prompt reaches, with `compute_interval` likewise; source: where they come from.
    """

    eta: float
    layer_s: float
    interval: float
    compute: float
    compute_interval: float
    source: str


def decode_s(moved_bytes: float, layers: int, bandwidth: float, rate: Rate) -> float:
    """Seconds of one decoded token that moves so many bytes: bytes / (bandwidth x eta) + layers x layer_s."""
    return moved_bytes / (bandwidth * rate.eta) + layers * rate.layer_s


def prefill_s(operations: float, weight_bytes: float, layers: int, bandwidth: float, peak: float, rate: Rate) -> float:
    """Seconds of one chunk of a prompt: its arithmetic, or reading the weights once where that takes longer."""
    return max(operations / (peak * rate.compute), decode_s(weight_bytes, layers, bandwidth, rate))


def around(mid: float, interval: float) -> Range:
    """Range of a figure within a factor."""
    return Range(mid / interval, mid, mid * interval)
