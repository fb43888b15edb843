"""Seconds that a token takes: the roofline of a device under a runtime, as pure arithmetic.

    seconds = max(weights / (bandwidth x eta), unpacking)
            + (states / states_share + cache / cache_share) / (bandwidth x eta) + layers x layer_s
    unpacking = number of weights x unpack / peak

`eta` is the share of the theoretical bandwidth that reading weights reaches, `layer_s` what each layer costs on top
(kernel launches, synchronisation). States and keys and values are read by kernels that reach a smaller share. `unpack`
is how many operations kernels spend on each weight, at the peak of a GPU: it counts where arithmetic is scarce beside
bandwidth, or kernels are poor. Both overlap, so that the maximum is a smooth one. Reading a prompt is arithmetic:
operations / (peak x compute), or reading the weights once where that takes longer.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace

import msgspec

NINETY = 1.645
"""Standard deviations on each side of a normal distribution's mean that hold 90 % of it."""
SHARPNESS = 4
"""Power of the norm that stands for a maximum of two times."""
_ROUNDS = 12


class Range(msgspec.Struct, frozen=True):
    """An estimate, and the interval that nine of ten figures are expected in."""

    low: float
    mid: float
    high: float


@dataclass(frozen=True)
class Moved:
    """Bytes that one decoded token reads or writes; k_quant: most weights are in GGML's K layouts.

    operation_s: seconds of one operation for each weight at the GPU's peak, 0 where that is not known.
    """

    weights: float
    states: float
    cache: float
    k_quant: bool = False
    operation_s: float = 0.0


@dataclass(frozen=True)
class Shares:
    """What all devices have in common.

    states, cache: share of `eta` that kernels of states and of attention reach, in logarithms with the deviation of the
    latter; k_quant: what K layouts add to the logit of eta; figure_sd: deviation of the logarithm of one figure from
    what its device and runtime do on average.
    """

    states: float
    cache: float
    cache_sd: float
    k_quant: float
    figure_sd: float


@dataclass(frozen=True)
class Rate:
    """What a runtime reaches on a device, as far as it is known: a normal distribution of logit(eta) and ln(layer_s).

    compute: ln of the share of the peak arithmetic that reading a prompt reaches, with its deviation; unpack:
    operations on each weight, 0 where they are not known, with the deviation of their logarithm.
    """

    logit_eta: float
    eta_sd: float
    log_layer_s: float
    layer_sd: float
    correlation: float
    log_compute: float
    compute_sd: float
    shares: Shares
    source: str
    unpack: float = 0.0
    unpack_sd: float = 0.0

    @property
    def eta(self) -> float:
        """Middle share of the bandwidth."""
        return _sigmoid(self.logit_eta)

    @property
    def layer_s(self) -> float:
        """Middle seconds of a layer."""
        return math.exp(self.log_layer_s)

    def unpacks_longer(self, moved: Moved, bandwidth: float) -> bool:
        """Whether unpacking the weights takes longer than reading them."""
        weights, unpacking, *_ = self._parts(moved, 0, bandwidth)
        return unpacking > weights

    def decode_s(self, moved: Moved, layers: int, bandwidth: float) -> float:
        """Seconds of one decoded token."""
        weights, unpacking, rest, cache, overhead = self._parts(moved, layers, bandwidth)
        return longest(weights, unpacking) + rest + cache + overhead

    def decode(self, moved: Moved, layers: int, bandwidth: float) -> Range:
        """Tokens per second of decoding."""
        to_eta, to_layer, unexplained = self._slopes(moved, layers, bandwidth)
        variance = (to_eta * self.eta_sd) ** 2 + (to_layer * self.layer_sd) ** 2 + unexplained
        variance += 2 * to_eta * to_layer * self.correlation * self.eta_sd * self.layer_sd
        return around(1 / self.decode_s(moved, layers, bandwidth), math.sqrt(variance))

    def bandwidth(self, seconds: float, moved: Moved, layers: int) -> float:
        """Bandwidth at which a token takes `seconds`, if at least half of them are not the layers' overhead."""
        weights, _, rest, cache, overhead = self._parts(moved, layers, 1.0)
        return (weights + rest + cache) / max(seconds - overhead, seconds / 2)

    def prefill(self, operations: float, peak: float, moved: Moved, layers: int, bandwidth: float) -> Range:
        """Runs per second of a chunk of a prompt that takes so many operations and reads the weights once."""
        arithmetic = operations / (peak * math.exp(self.log_compute))
        reading = self.decode_s(replace(moved, cache=0.0), layers, bandwidth)
        return around(1 / max(arithmetic, reading), self.compute_sd)

    def measured(self, seconds: float, moved: Moved, layers: int, bandwidth: float) -> Rate:
        """The rate once a token of some model was seen to take `seconds`: an iterated Kalman step in logarithms.

        What eta and layer_s take of the difference is what each was uncertain about.
        """
        covariance = self.correlation * self.eta_sd * self.layer_sd
        found = self
        for _ in range(_ROUNDS):
            to_eta, to_layer, unexplained = found._slopes(moved, layers, bandwidth)
            along_eta = to_eta * self.eta_sd**2 + to_layer * covariance
            along_layer = to_eta * covariance + to_layer * self.layer_sd**2
            total = to_eta * along_eta + to_layer * along_layer + unexplained
            missed = math.log(seconds / found.decode_s(moved, layers, bandwidth))
            missed += to_eta * (found.logit_eta - self.logit_eta) + to_layer * (found.log_layer_s - self.log_layer_s)
            found = replace(
                self,
                logit_eta=self.logit_eta + along_eta / total * missed,
                log_layer_s=self.log_layer_s + along_layer / total * missed,
            )
        eta_sd = math.sqrt(self.eta_sd**2 - along_eta**2 / total)
        layer_sd = math.sqrt(self.layer_sd**2 - along_layer**2 / total)
        left = (covariance - along_eta * along_layer / total) / (eta_sd * layer_sd)
        return replace(found, eta_sd=eta_sd, layer_sd=layer_sd, correlation=max(-1.0, min(1.0, left)))

    def scaled(self, decode: float, prefill: float, source: str) -> Rate:
        """The rate of what decodes and reads prompts at so much of this one's speed."""
        return replace(
            self,
            logit_eta=logit(self.eta * decode),
            log_layer_s=self.log_layer_s - math.log(decode),
            log_compute=self.log_compute + math.log(prefill),
            unpack=self.unpack / decode,
            source=source,
        )

    def _parts(self, moved: Moved, layers: int, bandwidth: float) -> tuple[float, float, float, float, float]:
        """Seconds for reading weights, for unpacking them, for states, for the cache, and for layers."""
        reached = bandwidth * self._eta(moved)
        states, cache = moved.states / math.exp(self.shares.states), moved.cache / math.exp(self.shares.cache)
        unpacking = self.unpack * moved.operation_s
        return moved.weights / reached, unpacking, states / reached, cache / reached, layers * self.layer_s

    def _eta(self, moved: Moved) -> float:
        return _sigmoid(self.logit_eta + (self.shares.k_quant if moved.k_quant else 0.0))

    def _slopes(self, moved: Moved, layers: int, bandwidth: float) -> tuple[float, float, float]:
        """Slopes of ln(seconds) along logit(eta) and ln(layer_s), and its variance by all else that is uncertain."""
        weights, unpacking, states, cache, overhead = self._parts(moved, layers, bandwidth)
        matrices = longest(weights, unpacking)
        total = matrices + states + cache + overhead
        unpacked = matrices * (unpacking / matrices) ** SHARPNESS
        unexplained = (unpacked / total * self.unpack_sd) ** 2 + (cache / total * self.shares.cache_sd) ** 2
        along_eta = -(matrices - unpacked + states + cache) / total * (1 - self._eta(moved))
        return along_eta, overhead / total, unexplained + self.shares.figure_sd**2


def longest(one: float, other: float) -> float:
    """A smooth maximum of two times that overlap."""
    return float((one**SHARPNESS + other**SHARPNESS) ** (1 / SHARPNESS))


def around(mid: float, deviation: float) -> Range:
    """Range of a figure whose logarithm has a standard deviation."""
    factor = math.exp(NINETY * deviation)
    return Range(mid / factor, mid, mid * factor)


def logit(share: float) -> float:
    """ln(share / (1 - share))."""
    return math.log(share / (1 - share))


def _sigmoid(value: float) -> float:
    return 1 / (1 + math.exp(-value))
