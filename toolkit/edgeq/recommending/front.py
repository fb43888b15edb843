"""Which of the eligible candidates is chosen, and why each other one is not.

None on the front is beaten in quality, speed and memory at once. Estimates do not rank engines: of candidates that
differ in their backend alone, measured ones are considered, else the one whose backend the target names first.

The choice is the best balance of quality and waiting: points of quality after quantization, less one for each
`SECONDS_PER_POINT` that reading a prompt and writing an answer take; of equals the first in the target's order. What
writes more slowly than people read, for all that is known, is taken only where nothing is faster. Where no speed is
known, candidates are weighed as if weights were read at `SLOW_BYTES_PER_S`.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from edgeq.estimating.estimate import PROMPT
from edgeq.recommending import ordering
from edgeq.recommending.document import Candidate
from edgeq.units import show_bytes

ANSWER = 256
"""Tokens of the answer that waiting is counted for; a model that always thinks writes `THOUGHTS` before it."""
THOUGHTS = 1000
SECONDS_PER_POINT = 2.0
READING_TOKENS_PER_S = 5.0
"""238 words a minute (Brysbaert 2019, mean of silent reading of English) of some 1.3 tokens each."""
SLOW_BYTES_PER_S = 10e9
"""A small board's: 60 % of the 17 GB/s in targets/raspberry-pi-5-8gb.toml."""
RULE = (
    f"the best balance: one point of quality weighs as much as {SECONDS_PER_POINT:g} s of reading a prompt and writing "
    f"{ANSWER} tokens; what is slower than people read ({READING_TOKENS_PER_S:g} tokens/s) even at the upper end of "
    "its interval only where nothing is faster; of equals the first in the target's order"
)
CAUTION = f"out of caution, as if weights were read at {SLOW_BYTES_PER_S / 1e9:g} GB/s, a small board's rate"


def timed(candidates: Sequence[Candidate]) -> list[Candidate]:
    """Candidates with the seconds of an answer.

    Where the time to read a prompt is known for some, it counts for all: what is unknown is as slow as writing. Where
    it is known for none, the seconds are of writing alone.
    """
    prompt = any(each.first_token_s for each in candidates if each.quality)
    return [
        msgspec.structs.replace(each, answer_s=seconds, answer_without_prompt=seconds is not None and not prompt)
        for each in candidates
        for seconds in [_answer_s(each, prompt)]
    ]


def marked(eligible: Sequence[Candidate]) -> list[Candidate]:
    """Candidates, given in the target's order of backends, with those considered and those on the front marked."""
    first: dict[tuple[str, str], Candidate] = {}
    for each in sorted(eligible, key=lambda each: each.evidence != "measured"):
        first.setdefault((each.model, each.recipe), each)
    considered = [each.evidence == "measured" or first[each.model, each.recipe] is each for each in eligible]
    rivals = [each for each, meant in zip(eligible, considered, strict=True) if meant]
    return [
        msgspec.structs.replace(
            each, considered=meant, front=meant and not any(_beats(other, each) for other in rivals)
        )
        for each, meant in zip(eligible, considered, strict=True)
    ]


def balance(candidate: Candidate) -> float:
    """Points of quality, less those that waiting costs."""
    return (candidate.score or 0.0) - _waiting(candidate) / SECONDS_PER_POINT


def choose(eligible: Sequence[Candidate]) -> Candidate:
    """The best balance on the front; of equals the first, in the target's order."""
    return max((each for each in eligible if each.front), key=_rank)


def why_chosen(chosen: Candidate, eligible: Sequence[Candidate]) -> tuple[str, ...]:
    """Reasons for the choice, and what to know before it is used."""
    quality, loss = chosen.quality, chosen.loss
    assert quality is not None
    scale = f"the scale of {quality.benchmark} answering directly"
    words = [
        f"{_why_best(chosen)} of {len(eligible)} that meet all constraints: {_points(chosen)} and {_wait(chosen)}",
        f"quality: {quality.score:.1f} [{quality.low:.1f}, {quality.high:.1f}] on {scale}, by {quality.compared_on} "
        "benchmarks that it shares with other models",
        f"quantization costs {_lost(chosen)} of it [{loss.low:.1%}, {loss.high:.1%}]",
    ]
    if quality.inferred:
        words.append(quality.inferred)
    best = max(eligible, key=lambda each: each.score or 0.0)
    if best.model != chosen.model and ordering.of_catalogue().alike(chosen.model, best.model):
        words.append(f"published scores do not tell it from {best.model}, the best of all that fit")
    if chosen.thinking and chosen.thinking.seconds_per_1000_tokens:
        wait = chosen.thinking.seconds_per_1000_tokens
        words.append(f"{_thoughts(chosen)}: ~{wait.mid:.0f} s for each 1000 tokens of thinking here")
    if not chosen.commercial:
        words.append(f"{chosen.license}: not for commercial use; --license open leaves it out")
    return tuple(words)


def why_lost(loser: Candidate, chosen: Candidate, eligible: Sequence[Candidate]) -> str:
    """Why an eligible candidate is not the choice, in one line."""
    if not loser.considered:
        twins = [
            each for each in eligible if (each.model, each.recipe) == (loser.model, loser.recipe) and each.considered
        ]
        twin = max(twins, key=_rank)
        why = "was measured" if twin.evidence == "measured" else "is named first for this device, neither was measured"
        return f"{twin.backend} {why}: {_difference(loser, twin)}"
    if not loser.front:
        better = [each for each in eligible if each.front and _beats(each, loser)]
        winner = chosen if chosen in better else max(better, key=_rank)
        virtues = "good and small" if loser.answer_s is None else "good, fast and small"
        return f"{winner.title} is at least as {virtues}: {_difference(loser, winner)}"
    return f"{_why_worse(loser, chosen)}: {_difference(loser, chosen)}"


def _why_best(chosen: Candidate) -> str:
    if chosen.answer_s is None:
        return f"speed unknown: the best balance {CAUTION},"
    return "nothing writes as fast as people read: the fastest" if _too_slow(chosen) else "best balance"


def _why_worse(loser: Candidate, chosen: Candidate) -> str:
    if loser.answer_s is None:
        if chosen.answer_s is not None:
            return "speed unknown"
        smaller = loser.weights_bytes > chosen.weights_bytes
        return f"speed unknown: {'the smaller one' if smaller else 'worse balance'} {CAUTION}"
    if _too_slow(loser):
        return "slower still" if _too_slow(chosen) else "writes more slowly than people read"
    if _rank(loser) == _rank(chosen):
        return "the same balance, and the target's order names it later"
    return "worse balance of quality and waiting"


def _difference(loser: Candidate, winner: Candidate) -> str:
    """Quality, waiting and memory of two candidates, the first one's first, and what the quality comes from."""
    words = [
        f"{_points(loser)} against ~{winner.score:.1f}",
        f"{_wait(loser)} against {_seconds(winner)}",
        f"{_memory(loser)} against {_memory(winner)}",
    ]
    if loser.model != winner.model:
        alike = ordering.of_catalogue().alike(loser.model, winner.model)
        words.append(
            ("about equal as floats; " if alike else "") + ordering.of_catalogue().compared(loser.model, winner.model)
        )
    elif abs(loser.loss.value - winner.loss.value) > 1e-6:
        words.append(f"quantization costs it {_lost(loser)} against {_lost(winner)}")
    return "; ".join(words)


def _points(candidate: Candidate) -> str:
    return f"~{candidate.score:.1f} points"


def _memory(candidate: Candidate) -> str:
    return _about(candidate.evidence == "measured") + show_bytes(candidate.memory_bytes)


def _lost(candidate: Candidate) -> str:
    return f"{_about(candidate.loss.evidence != 'published')}{candidate.loss.value:.1%}"


def _wait(candidate: Candidate) -> str:
    return f"{_seconds(candidate)} for an answer"


def _seconds(candidate: Candidate) -> str:
    if candidate.answer_s is None:
        return "unknown time"
    least = "at least " if candidate.answer_without_prompt else ""
    return f"{least}{_about(candidate.exact_speed)}{candidate.answer_s:.0f} s"


def _thoughts(candidate: Candidate) -> str:
    thinking = candidate.thinking
    assert thinking is not None
    if thinking.always:
        return "always thinks before it answers"
    if thinking.published and thinking.direct_score is not None:
        both = (
            f"{thinking.published.benchmark} {thinking.published.score:g} thinking, {thinking.direct_score:g} directly"
        )
        return f"can think, --no-think answers directly ({both})"
    return "can think, --no-think answers directly"


def _answer_s(candidate: Candidate, prompt: bool) -> float | None:
    speed = candidate.decode_tokens_per_s
    if speed is None:
        return None
    thoughts = THOUGHTS if candidate.thinking and candidate.thinking.always else 0
    wait = candidate.first_token_s
    reading = (wait.mid if wait else min(PROMPT, candidate.context) / speed.mid) if prompt else 0.0
    return reading + (ANSWER + thoughts) / speed.mid


def _rank(candidate: Candidate) -> tuple[bool, bool, float]:
    """By what the best of several is found."""
    slow = _too_slow(candidate)
    return candidate.answer_s is not None, not slow, -_waiting(candidate) if slow else balance(candidate)


def _waiting(candidate: Candidate) -> float:
    known = candidate.answer_s
    return ANSWER * candidate.weights_bytes / SLOW_BYTES_PER_S if known is None else known


def _too_slow(candidate: Candidate) -> bool:
    """Whether all of the interval is below what people read; an unknown speed is not."""
    speed = candidate.decode_tokens_per_s
    return speed is not None and speed.high < READING_TOKENS_PER_S


def _beats(one: Candidate, other: Candidate) -> bool:
    """Whether one candidate is as good as another in quality, speed and memory, and better in one of them."""
    mine, theirs = _figures(one), _figures(other)
    return all(left >= right for left, right in zip(mine, theirs, strict=True)) and mine != theirs


def _figures(candidate: Candidate) -> tuple[float, float, float]:
    speed, memory = candidate.answer_s, candidate.memory_bytes
    return candidate.score or 0.0, -speed if speed is not None else -1e9, -memory if memory is not None else -1e18


def _about(exact: bool) -> str:
    return "" if exact else "~"
