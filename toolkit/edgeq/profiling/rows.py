"""From timed repetitions to the figures of a profile: what counts, how it spreads, whether it can be trusted."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from typing import TypeVar

from edgeq.profiles import Decode, Health, Placement, Prefill, Repetition, Speculation, Spread
from edgeq.profiling import statistics
from edgeq.profiling.messages import Guessed, Timed

Number = TypeVar("Number", int, float)


def counting(done: Sequence[Timed], phase: str, wanted: int) -> list[list[Timed]]:
    """Repetitions that count, one list for each configuration of a phase, shallow and short ones first.

    The undisturbed ones; all of them where fewer than `wanted` are undisturbed.
    """
    made: dict[tuple[int, int], list[Timed]] = {}
    for one in done:
        if one.repetition.phase == phase:
            made.setdefault((one.repetition.depth, one.repetition.tokens), []).append(one)
    return [valid if len(valid := _valid(made[key])) >= wanted else made[key] for key in sorted(made)]


def _valid(done: Iterable[Timed]) -> list[Timed]:
    return [one for one in done if one.repetition.valid]


def prefill(groups: Sequence[Sequence[Timed]]) -> tuple[Prefill, ...]:
    """Row of each prompt length."""
    return tuple(
        Prefill(tokens=group[0].repetition.tokens, depth=group[0].repetition.depth, tokens_per_s=_tokens_per_s(group))
        for group in groups
    )


def decode(groups: Sequence[Sequence[Timed]]) -> tuple[Decode, ...]:
    """Row of each depth."""
    return tuple(
        Decode(
            tokens=group[0].repetition.tokens,
            depth=group[0].repetition.depth,
            tokens_per_s=_tokens_per_s(group),
            gap_s=statistics.gaps([gap for one in group for gap in one.gaps_s]),
        )
        for group in groups
    )


def speculation(done: Sequence[Guessed], wanted: int) -> tuple[Speculation, ...]:
    """Row of each method and text."""
    found = []
    for method, text in sorted({(one.method, one.text) for one in done}, reverse=True):
        made = [one for one in done if (one.method, one.text) == (method, text)]
        valid = [one for one in made if undisturbed(one)]
        group = valid if len(valid) >= wanted else made
        few = f"{len(valid)} of {len(made)} continuations were undisturbed, {wanted} are wanted"
        first, steps = group[0].drafted.repetition, sum(len(one.drafted.gaps_s) for one in group)
        found.append(
            Speculation(
                method=method,
                text=text,
                prompt=first.depth,
                tokens=first.tokens,
                tokens_per_s=_tokens_per_s([one.drafted for one in group]),
                plain_tokens_per_s=_tokens_per_s([one.plain for one in group]),
                tokens_per_step=(first.tokens - 1) * len(group) / steps,
                same=sum(one.same for one in group) / len(group),
                valid=len(valid) >= wanted,
                reason=None if len(valid) >= wanted else few,
            )
        )
    return tuple(found)


def undisturbed(one: Guessed) -> bool:
    """Whether a continuation was, in both ways of writing it."""
    return one.plain.repetition.valid and one.drafted.repetition.valid


def _tokens_per_s(group: Sequence[Timed]) -> Spread:
    return statistics.spread([one.repetition.tokens_per_s for one in group])


def first_token(groups: Sequence[Sequence[Timed]], tokens: int) -> tuple[Spread, str]:
    """Seconds to the first token of a prompt of `tokens`, and what they start from: "text" or "ids"."""
    group = next(group for group in groups if group[0].repetition.tokens == tokens)
    spread = statistics.spread([one.repetition.seconds + (one.tokenization_s or 0.0) for one in group])
    return spread, "ids" if group[0].tokenization_s is None else "text"


def health(done: Sequence[Timed], reason: str | None) -> Health:
    """Worst state of the machine over all repetitions, those that do not count too."""
    made = [one.repetition for one in done]
    wait = _over(max, (one.wait for one in made))
    uncounted = "no run-queue wait (schedstat)" if wait is None else None
    return Health(
        wait=wait,
        steal=_over(max, (one.steal for one in made)),
        temperature_c=_over(max, (one.temperature_c for one in made)),
        clock_hz=_over(min, (one.clock_hz for one in made)),
        throttle_events=_over(sum, (one.throttle_events for one in made)),
        reason="; ".join(part for part in (uncounted, reason) if part) or None,
        repetitions=tuple(made),
    )


def _over(figure: Callable[[list[Number]], Number], values: Iterable[Number | None]) -> Number | None:
    known = [value for value in values if value is not None]
    return figure(known) if known else None


def verdict(
    groups: Sequence[Sequence[Timed]], done: Sequence[Timed], wanted: int, placement: Sequence[Placement], provider: str
) -> tuple[bool, str, tuple[str, ...]]:
    """Whether each configuration has `wanted` undisturbed repetitions, the grade, and reasons for less than A.

    Not valid either when a layer ran elsewhere than on the `provider` that the bundle is made for. What ran on a device
    that the processor imitates has grade C: its speed is no device's.
    """
    total = sum(place.layers for place in placement)
    if left := total - sum(place.layers for place in placement if place.provider == provider):
        return False, "C", (f"{left} of {total} layers did not run on {provider}, which the bundle is made for",)
    disturbed = [one.repetition for one in done if not one.repetition.valid]
    if any(len(_valid(group)) < wanted for group in groups):
        why = f"contended: {len(disturbed)} of {len(done)} repetitions were disturbed, the last: {disturbed[-1].reason}"
        return False, "C", (why,)
    events = _over(sum, (one.repetition.throttle_events for one in done))
    spreads = {_name(group[0].repetition): _tokens_per_s(group) for group in groups}
    reasons = [f"{events} throttle events"] if events else []
    if events is None:
        reasons.append("throttling cannot be seen here")
    for name, spread in spreads.items():
        if (count := len(spread.samples)) < statistics.COMPARABLE:
            reasons.append(f"{name}: {count} repetitions; {statistics.COMPARABLE} are needed to compare")
        elif spread.cv is not None and spread.cv > statistics.STEADY:
            reasons.append(f"{name} varies by {spread.cv:.1%}")
    if imitated := [place.device for place in placement if place.software]:
        return True, "C", (f"{imitated[0]} is no real device: its speed says nothing", *reasons)
    return True, statistics.grade(list(spreads.values()), events == 0), tuple(reasons)


def _name(one: Repetition) -> str:
    return f"prefill of {one.tokens}" if one.phase == "prefill" else f"decode at depth {one.depth}"
