"""Does a model fit a device, and how fast would it be there? Pure functions of shapes, recipe and target."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import msgspec

from edgeq.estimating import memory, rates, speed
from edgeq.estimating.speed import Range, Rate
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.target import Target

if TYPE_CHECKING:
    from edgeq.profiles import Profile

PROMPT = 512
"""Tokens of the prompt that `prefill_tokens_per_s` and `first_token_s` are about, less in a smaller context."""


class Estimate(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `edgeq estimate`: bytes, tokens per second, seconds; null where unknown, the reason beside it.

    context: tokens that the cache has room for; depth: those in it when decode is estimated. max_context: the most that
    fit. basis: which data and which formula.
    """

    model: str
    target: str
    recipe: str
    backend: str
    context: int
    depth: int
    weights_bytes: int
    kv_cache_bytes: int
    state_bytes: int
    runtime_bytes: int
    total_bytes: int
    usable_bytes: int | None
    fits: bool | None
    max_context: int | None
    memory_reason: str | None
    prefill_tokens_per_s: Range | None
    prefill_reason: str | None
    decode_tokens_per_s: Range | None
    decode_reason: str | None
    first_token_s: float | None
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

    depth: tokens in the cache when decode is estimated. weights_bytes: of a file that exists already. anchor: a profile
    of any model on that device and backend, which all rates are scaled by.
    """
    found = memory.needed(model, recipe, backend, context=context, weights_bytes=weights_bytes)
    usable = memory.usable_bytes(target)
    rate = rates.find(target, backend)
    decode, decode_reason = _decode(model, recipe, target, backend, found, depth, rate)
    prefill, prefill_reason = _prefill(model, recipe, target, backend, found, min(PROMPT, context), rate)
    return Estimate(
        model=name,
        target=target.name,
        recipe=str(recipe),
        backend=backend,
        context=context,
        depth=depth,
        weights_bytes=found.weights_bytes,
        kv_cache_bytes=found.kv_cache_bytes,
        state_bytes=found.state_bytes,
        runtime_bytes=found.runtime_bytes,
        total_bytes=found.total_bytes,
        usable_bytes=usable,
        fits=None if usable is None else found.total_bytes <= usable,
        max_context=None if usable is None else memory.largest_context(model, found, usable),
        memory_reason=None if usable is not None else f"{target.name} does not say what share of its memory is usable",
        prefill_tokens_per_s=prefill,
        prefill_reason=prefill_reason,
        decode_tokens_per_s=decode,
        decode_reason=decode_reason,
        first_token_s=None if prefill is None else min(PROMPT, context) / prefill.mid,
        basis=rate.source,
    )


def _decode(
    model: Model, recipe: Recipe, target: Target, backend: str, found: memory.Needed, depth: int, rate: Rate
) -> tuple[Range | None, str | None]:
    bandwidth = target.memory.bandwidth_bytes_per_s
    if bandwidth is None:
        return None, f"the memory bandwidth of {target.name} is not known"
    moved = found.weights_bytes - memory.table_bytes(model, recipe, backend)
    moved += 2 * memory.recurrent_bytes(model) + math.ceil(found.cache_bytes_per_token * depth)
    return speed.around(1 / speed.decode_s(moved, model.layers, bandwidth.value, rate), rate.interval), None


def _prefill(
    model: Model, recipe: Recipe, target: Target, backend: str, found: memory.Needed, tokens: int, rate: Rate
) -> tuple[Range | None, str | None]:
    bandwidth, peak = target.memory.bandwidth_bytes_per_s, target.gpu.fp16_flop_per_s if target.gpu else None
    if bandwidth is None:
        return None, f"the memory bandwidth of {target.name} is not known"
    if peak is None:
        return None, f"the peak arithmetic of {target.name} is not known"
    weights = found.weights_bytes - memory.table_bytes(model, recipe, backend)
    operations = 2.0 * (model.parameters - model.vocab * model.hidden) * tokens
    seconds = speed.prefill_s(operations, weights, model.layers, bandwidth.value, peak.value, rate)
    return speed.around(tokens / seconds, rate.compute_interval), None
