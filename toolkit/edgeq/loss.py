"""What quantization cost: the loss of one bundle against its reference, as profiles keep it."""

from __future__ import annotations

import msgspec


class Interval(msgspec.Struct, frozen=True):
    """A value with its 95 % interval, bootstrapped over windows."""

    value: float
    low: float
    high: float


class Flips(msgspec.Struct, frozen=True):
    """Next tokens that only the reference predicts (`lost`), only the bundle (`gained`), exact McNemar `p`."""

    lost: int
    gained: int
    p: float


class Accuracy(msgspec.Struct, frozen=True, kw_only=True):
    """Loss against the reference: KL divergence in nats per token, perplexities, agreement from 0 to 1."""

    reference: str
    tokens: int
    text_sha256: str
    perplexity_reference: float
    perplexity: float
    ln_ratio: Interval
    kl_mean: float
    kl_low: float
    kl_high: float
    kl_p50: float
    kl_p99: float
    kl_max: float
    top1_agreement: float
    flips: Flips
