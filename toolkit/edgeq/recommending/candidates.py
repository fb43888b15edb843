"""All candidates for a target: models of the catalogue x recipes of the target x its backends, measured rows first."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

from edgeq import backends, profiles, recipe
from edgeq.catalog import Entry
from edgeq.estimating import anchors
from edgeq.estimating.estimate import PROMPT, Estimate, estimate
from edgeq.estimating.speed import Range
from edgeq.model import Model
from edgeq.profiles import Profile
from edgeq.recipe import Recipe
from edgeq.recommending import ordering, quantization
from edgeq.recommending.document import Candidate, Thinking
from edgeq.recommending.quantization import Loss
from edgeq.target import Target


def find(target: Target, context: int, *, recipes: Iterable[str] = (), engines: Iterable[str] = ()) -> list[Candidate]:
    """Every combination that a backend of the target can hold; `recipes` and `engines` replace the target's own.

    A row that was measured on the target stands in place of its estimate, and its speed scales the estimates of the
    same backend.
    """
    rows = anchors.measured_rows(target)
    nearest = anchors.by_backend(rows.values())
    own = [backends.canonical(name) for name in engines or target.backends]
    seen = [] if engines else [row.backend for row in rows.values()]
    found = []
    for entry in ordering.of_catalogue().entries.values():
        model = entry.model
        measured = [] if recipes else [key[1] for key in rows if key[0] == entry.name]
        wanted = [recipe.parse(name) for name in dict.fromkeys([*(recipes or target.recipes), *measured])]
        losses = {each: quantization.estimated(model, each) for each in {replace(each, kv_bits=32) for each in wanted}}
        for backend in dict.fromkeys([*own, *seen]):
            for each in wanted:
                loss = losses[replace(each, kv_bits=32)]
                if row := rows.get((entry.name, str(each), backend)):
                    found.append(_measured(entry, model, each, row, target, context, loss))
                elif backend in own and not each.mixed and backends.holds(backend, model, each, target):
                    found.append(_estimated(entry, model, each, target, backend, context, nearest.get(backend), loss))
    found += [_unknown(row, context) for key, row in rows.items() if key[0] not in ordering.of_catalogue().entries]
    return found


def _estimated(
    entry: Entry,
    model: Model,
    wanted: Recipe,
    target: Target,
    backend: str,
    context: int,
    anchor: Profile | None,
    loss: Loss,
) -> Candidate:
    depth = context // 2
    found = estimate(model, entry.name, wanted, target, backend, context=context, depth=depth, anchor=anchor)
    return _candidate(
        entry,
        wanted,
        backend,
        context=context,
        depth=depth,
        weights_bytes=found.weights_bytes,
        memory_bytes=found.total_bytes,
        decode=found.decode_tokens_per_s,
        prefill=found.prefill_tokens_per_s,
        loss=loss,
        evidence="estimated",
        basis=found.basis,
        unknown=_unknown_speed(found),
    )


def _unknown_speed(found: Estimate) -> str | None:
    reasons = dict.fromkeys(reason for reason in (found.decode_reason, found.prefill_reason) if reason)
    return "; ".join(reasons) or None


def _measured(
    entry: Entry, model: Model, wanted: Recipe, row: Profile, target: Target, context: int, estimated: Loss
) -> Candidate:
    decode = min(row.decode, key=lambda one: abs(one.depth - context // 2))
    carried = _carried(model, wanted, row, decode, target, context)
    prefill = min(row.prefill, key=lambda one: (one.depth, abs(one.tokens - PROMPT)))
    seen = max(decode.depth + decode.tokens, prefill.depth + prefill.tokens)
    per_token = row.memory.kv_cache_bytes_per_token or model.kv_bytes_per_token(wanted.kv_bits // 8)
    peak = row.memory.peak_rss_bytes
    if peak is not None:
        peak += row.memory.device_peak_bytes or 0
    loss = quantization.measured(row.accuracy) if row.accuracy else estimated
    return _candidate(
        entry,
        wanted,
        row.backend,
        context=context,
        depth=context // 2 if carried else decode.depth,
        measured_depth=decode.depth if carried else None,
        weights_bytes=row.bundle.bytes,
        memory_bytes=None if peak is None else peak + per_token * max(0, context - seen),
        decode=carried or _range(decode.tokens_per_s),
        prefill=_range(prefill.tokens_per_s),
        loss=loss,
        evidence="measured",
        basis=f"measured on {target.name} with {', '.join(row.tools)}, grade {row.grade}"
        + (f"; decoding carried from {decode.depth} tokens in the cache by the estimate" if carried else ""),
    )


def _carried(
    model: Model, wanted: Recipe, row: Profile, decode: profiles.Decode, target: Target, context: int
) -> Range | None:
    """Speed with half the context in the cache: the measured one, times what the estimate that follows it says.

    None where it was measured there, and where no estimate is possible.
    """
    depth = context // 2
    if abs(depth - decode.depth) <= decode.tokens:
        return None
    there, here = (
        estimate(model, row.model, wanted, target, row.backend, context=context, depth=each, anchor=row)
        for each in (min(decode.depth, context), depth)
    )
    if there.decode_tokens_per_s is None or here.decode_tokens_per_s is None:
        return None
    scale, found = decode.tokens_per_s.median / there.decode_tokens_per_s.mid, here.decode_tokens_per_s
    return Range(found.low * scale, found.mid * scale, found.high * scale)


def _candidate(
    entry: Entry,
    wanted: Recipe,
    backend: str,
    *,
    context: int,
    depth: int,
    weights_bytes: int,
    memory_bytes: int | None,
    decode: Range | None,
    prefill: Range | None,
    loss: Loss,
    evidence: str,
    basis: str,
    unknown: str | None = None,
    measured_depth: int | None = None,
) -> Candidate:
    quality = ordering.of_catalogue().quality(entry.name)
    prompt = min(PROMPT, context)
    return Candidate(
        model=entry.name,
        hub=entry.hub,
        generation=entry.generation,
        recipe=str(wanted),
        backend=backend,
        context=context,
        depth=depth,
        weights_bytes=weights_bytes,
        memory_bytes=memory_bytes,
        decode_tokens_per_s=decode,
        prefill_tokens_per_s=prefill,
        first_token_s=_seconds(prompt, prefill),
        quality=quality,
        loss=loss,
        score=None if quality is None else quality.score * (1 - loss.value),
        thinking=_thinking(entry, decode),
        evidence=evidence,
        basis=basis,
        unknown=unknown,
        measured_depth=measured_depth,
        license=entry.license,
        commercial=entry.commercial,
    )


def _unknown(row: Profile, context: int) -> Candidate:
    """A measured row of a model that the catalogue does not know: nobody has published what it scores."""
    decode, prefill = row.decode[0], row.prefill[0]
    loss = quantization.measured(row.accuracy) if row.accuracy else None
    return Candidate(
        model=row.model,
        hub=None,
        generation=row.generation,
        recipe=row.recipe,
        backend=row.backend,
        context=context,
        depth=decode.depth,
        weights_bytes=row.bundle.bytes,
        memory_bytes=row.memory.peak_rss_bytes,
        decode_tokens_per_s=_range(decode.tokens_per_s),
        prefill_tokens_per_s=_range(prefill.tokens_per_s),
        first_token_s=None,
        quality=None,
        loss=loss or Loss(value=0, low=0, high=1, evidence="none", basis="not measured"),
        score=None,
        thinking=None,
        evidence="measured",
        basis=f"measured with {', '.join(row.tools)}, grade {row.grade}",
        license=None,
        commercial=None,
    )


def _thinking(entry: Entry, decode: Range | None) -> Thinking | None:
    if entry.thinking == "never":
        return None
    direct = next((entry.scores[mode].values for mode in ("non_thinking", "instruct") if mode in entry.scores), {})
    return Thinking(
        always=entry.thinking == "always",
        published=ordering.thinking(entry),
        direct_score=direct.get(ordering.SCALE),
        seconds_per_1000_tokens=_seconds(1000, decode),
    )


def _seconds(tokens: int, rate: Range | None) -> Range | None:
    return None if rate is None else Range(tokens / rate.high, tokens / rate.mid, tokens / rate.low)


def _range(spread: profiles.Spread) -> Range:
    return Range(spread.low, spread.median, spread.high)
