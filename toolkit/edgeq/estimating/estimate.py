"""Does a model fit a device, and how fast would it be there? Pure functions of shapes, recipe and target."""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, replace

import msgspec

from edgeq import size, sources
from edgeq.errors import UsageFault
from edgeq.estimating import anchors, doubts, memory, published, rates
from edgeq.estimating.speed import Moved, Range, Rate
from edgeq.model import Model
from edgeq.profiles import Profile
from edgeq.recipe import Recipe, parse
from edgeq.target import Figure, Target

PROMPT = 512
"""Tokens of the prompt that `prefill_tokens_per_s` and `first_token_s` are about, less in a smaller context."""
LOWER_BOUND_SD = math.log(2)
"""Deviation of the logarithm of a peak that is a lower bound: matrix units have two to four times the others' rate."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `edgeq estimate`: bytes, tokens per second, seconds; null where unknown, the reason beside it.

    context: tokens that the cache has room for; depth: those in it when decode is estimated. max_context: the most
    that fit, at most `model_context`, the model's own. memory_reason: why `fits` is null, or what it assumes.
    first_token_s: of a prompt of `prompt` tokens. basis: which data and which formula.
    """

    model: str
    target: str
    recipe: str
    backend: str
    context: int
    depth: int
    prompt: int
    weights_bytes: int
    kv_cache_bytes: int
    state_bytes: int
    runtime_bytes: int
    total_bytes: int
    usable_bytes: int | None
    fits: bool | None
    max_context: int | None
    model_context: int
    memory_reason: str | None
    prefill_tokens_per_s: Range | None
    prefill_reason: str | None
    decode_tokens_per_s: Range | None
    decode_reason: str | None
    first_token_s: float | None
    first_token_reason: str | None
    basis: str


def estimate(
    model: Model,
    name: str,
    recipe: Recipe,
    target: Target,
    backend: str,
    *,
    context: int,
    depth: int = 0,
    weights_bytes: int | None = None,
    anchor: Profile | None = None,
) -> Estimate:
    """Bytes and speed of a model under a recipe on a target, run by a backend or another runtime of published figures.

    depth: tokens in the cache when decode is estimated. weights_bytes: of a file that exists already. anchor: what was
    measured of any model on that device and backend, which the estimate follows. Raises UsageFault for an anchor of
    another device or backend, or of a model that is neither in the catalogue nor a demo, and for an unknown runtime.
    """
    held = memory.widened(model, recipe, target, backend).held
    found = memory.needed(model, recipe, backend, context=context, weights_bytes=weights_bytes, widened=held)
    device = _Device.of(target, rates.canonical(backend))
    unsure = doubts.of(target, rates.canonical(backend), device.rate.source) if anchor is None else []
    if anchor is not None:
        device = device.anchored(_checked(anchor, target, backend), target)
    work = _Work(model, moved(model, recipe, target, backend, found.weights_bytes, depth), min(PROMPT, context))
    decode, decode_reason = device.decode(work)
    prefill, prefill_reason = device.prefill(work)
    fits, memory_reason = _fits(found, target)
    usable = memory.usable_bytes(target)
    return Estimate(
        model=name,
        target=target.name,
        recipe=str(recipe),
        backend=backend,
        context=context,
        depth=depth,
        prompt=work.prompt,
        weights_bytes=found.weights_bytes,
        kv_cache_bytes=found.kv_cache_bytes,
        state_bytes=found.state_bytes,
        runtime_bytes=found.runtime_bytes,
        total_bytes=found.total_bytes,
        usable_bytes=usable,
        fits=fits,
        max_context=None if usable is None else memory.largest_context(model, found, usable),
        model_context=model.context,
        memory_reason=memory_reason,
        prefill_tokens_per_s=prefill,
        prefill_reason=prefill_reason,
        decode_tokens_per_s=decode,
        decode_reason=decode_reason,
        first_token_s=None if prefill is None else work.prompt / prefill.mid,
        first_token_reason=prefill_reason,
        basis="; ".join([device.basis(work), *unsure]),
    )


def moved(model: Model, recipe: Recipe, target: Target, backend: str, weights_bytes: int, depth: int) -> Moved:
    """Bytes that one decoded token moves after `depth` others; a table that is only looked up is not read.

    weights_bytes: of the file, which an engine may widen. States are read and written, keys and values of all earlier
    tokens are read.
    """
    used = 1 - _looked_up(model, recipe, backend)
    peak = _peak(target, backend)
    on_gpu = published.processor(rates.api_of(target, backend)) == "gpu"
    return Moved(
        weights=weights_bytes * used + memory.widened(model, recipe, target, backend).read,
        states=2 * memory.recurrent_bytes(model),
        cache=memory.cache_bytes_per_token(model, recipe, backend) * depth,
        k_quant=recipe.body.is_ggml and recipe.body.name.endswith("_k"),
        operation_s=model.parameters * used / peak.value if peak and on_gpu else 0.0,
    )


def _peak(target: Target, backend: str) -> Figure | None:
    """Peak arithmetic of the processor that a backend uses."""
    part = target.cpu if rates.api_of(target, backend) == "cpu" else target.gpu
    return part.fp16_flop_per_s if part else None


def _looked_up(model: Model, recipe: Recipe, backend: str) -> float:
    """Share of the weights that a token does not read."""
    table = memory.table_bytes(model, recipe, backend)
    return table / size.weight_bytes(model, recipe, memory.scale_bits(recipe, backend)) if table else 0.0


def _checked(anchor: Profile, target: Target, backend: str) -> Profile:
    if anchor.target != target.name or anchor.backend != rates.canonical(backend):
        raise UsageFault(
            f"the anchor was measured with {anchor.backend} on {anchor.target}",
            why=f"It says nothing about {backend} on {target.name}.",
            run=f"edgeq estimate ... --target {anchor.target} --backend {anchor.backend}",
        )
    return anchor


@functools.cache
def _shape(name: str) -> Model:
    """Shape of a model that a profile names."""
    return sources.configured(anchors.catalogue_name(name) or name, offline=True)[1]


def _fits(found: memory.Needed, target: Target) -> tuple[bool | None, str | None]:
    usable = memory.usable_bytes(target)
    if usable is None:
        return None, f"the memory of {target.name} is not known"
    return found.total_bytes <= usable, memory.assumed_share(target)


@dataclass(frozen=True)
class _Work:
    model: Model
    moved: Moved
    prompt: int

    @property
    def operations(self) -> float:
        """Multiplications and additions of reading the prompt: two for each weight but the tables', and attention."""
        model = self.model
        tables = model.vocab * model.hidden * (1 if model.tied else 2)
        attention = 2 * self.prompt * model.full_attention_layers * model.heads * model.head_dim
        return self.prompt * (2.0 * (model.parameters - tables) + attention)


@dataclass(frozen=True)
class _Device:
    """A target under a runtime: bandwidth in bytes per second, peak in operations per second, null where unknown.

    follows: the bandwidth is what an anchor's speed implies.
    """

    name: str
    rate: Rate
    bandwidth: float | None
    peak: float | None
    measured: str | None = None
    follows: bool = False

    @classmethod
    def of(cls, target: Target, backend: str) -> _Device:
        bandwidth = target.memory.bandwidth_bytes_per_s
        peak, rate = _peak(target, backend), rates.find(target, backend)
        if peak and "lower bound" in peak.source:
            rate = replace(rate, compute_sd=math.hypot(rate.compute_sd, LOWER_BOUND_SD))
        return cls(target.name, rate, bandwidth.value if bandwidth else None, peak.value if peak else None)

    def anchored(self, anchor: Profile, target: Target) -> _Device:
        """The same after a profile was seen: each of its decode figures, then its prompts.

        The first figure of a bundle that is not too small stands for an unknown bandwidth.
        """
        found, model, weights = self, _shape(anchor.model), anchor.bundle.bytes
        wanted = parse(anchor.recipe)
        for row in anchor.decode:
            seconds = 1 / row.tokens_per_s.median
            read = moved(model, wanted, target, anchor.backend, weights, row.depth + row.tokens // 2)
            if found.bandwidth is None and weights >= anchors.SMALLEST_BYTES:
                found = replace(found, bandwidth=found.rate.bandwidth(seconds, read, model.layers), follows=True)
            if found.bandwidth is not None:
                found = replace(found, rate=found.rate.measured(seconds, read, model.layers, found.bandwidth))
        for prompt in anchor.prefill:
            if prompt.depth == 0:
                work = _Work(model, moved(model, wanted, target, anchor.backend, weights, 0), prompt.tokens)
                found = found._read(work, prompt.tokens / prompt.tokens_per_s.median)
        return replace(found, measured=f"{anchor.model} {anchor.recipe}")

    def _read(self, work: _Work, seconds: float) -> _Device:
        """The same after a prompt was seen to take so long; an unknown peak becomes what was reached."""
        if self.peak is None:
            return replace(self, peak=work.operations / seconds, rate=replace(self.rate, log_compute=0.0))
        return replace(self, rate=replace(self.rate, log_compute=math.log(work.operations / seconds / self.peak)))

    def decode(self, work: _Work) -> tuple[Range | None, str | None]:
        if self.bandwidth is None:
            return None, self._unknown_bandwidth()
        return self.rate.decode(work.moved, work.model.layers, self.bandwidth), None

    def prefill(self, work: _Work) -> tuple[Range | None, str | None]:
        if self.bandwidth is None:
            return None, self._unknown_bandwidth()
        if self.peak is None:
            return None, f"the peak arithmetic of {self.name} is not known"
        runs = self.rate.prefill(work.operations, self.peak, work.moved, work.model.layers, self.bandwidth)
        return Range(*(work.prompt * each for each in (runs.low, runs.mid, runs.high))), None

    def _unknown_bandwidth(self) -> str:
        so_far = f", and {self.measured} is too small to tell it" if self.measured else ""
        return (
            f"the memory bandwidth of {self.name} is not known{so_far}: edgeq profile BUNDLE --save there measures it"
        )

    def basis(self, work: _Work) -> str:
        """Which data, and the formula with its numbers."""
        rate, shares = self.rate, self.rate.shares
        words = ([f"measured there: {self.measured}"] if self.measured else []) + [rate.source]
        if self.bandwidth is not None:
            reached = f"({self.bandwidth / 1e9:g} GB/s x {rate.eta:.2f})"
            if self.follows:
                words.append("the bandwidth is the anchor's")
                reached = f"{self.bandwidth * rate.eta / 1e9:.3g} GB/s"
            words.append(
                f"decode = (weights + states / {math.exp(shares.states):.2f} + cache / {math.exp(shares.cache):.2f})"
                f" / {reached} + {work.model.layers} layers x {rate.layer_s * 1e6:.0f} us"
            )
            if rate.unpacks_longer(work.moved, self.bandwidth):
                words.append(f"unpacking the weights takes longer than reading: {rate.unpack:.0f} operations on each")
        if self.bandwidth is not None and self.peak is not None:
            words.append(f"prefill = operations / ({self.peak / 1e12:.3g} TFLOP/s x {math.exp(rate.log_compute):.2f})")
        return "; ".join(words)
