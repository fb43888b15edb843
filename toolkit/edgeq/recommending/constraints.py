"""Which constraints a candidate misses: one is met only by the unfavourable end of an interval, else "marginal"."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import NamedTuple

from edgeq import data
from edgeq.errors import UsageFault
from edgeq.estimating import memory
from edgeq.estimating.speed import Range
from edgeq.recommending import ordering
from edgeq.recommending.document import Candidate, Constraints
from edgeq.units import show_bytes

LICENSES = ("open", "any")
CAPABILITIES = ("vision", "video", "thinking")
EVIDENCE = ("measured", "estimated", "any")
NEVER = math.inf


class Miss(NamedTuple):
    """A constraint that is missed: its name, by what factor (infinite: no change of degree helps), and one sentence."""

    constraint: str
    factor: float
    reason: str


def check(wanted: Constraints) -> None:
    """Raise UsageFault for words and numbers that mean nothing."""
    _known("--license", wanted.license or "any", LICENSES)
    _known("--evidence", wanted.evidence, EVIDENCE)
    for word in wanted.capability:
        _known("--capability", word, CAPABILITIES)
    numbers = {
        "--min-tps": wanted.min_tps,
        "--max-ttft": wanted.max_ttft_s,
        "--max-memory": wanted.max_memory_bytes,
        "--max-loss": wanted.max_loss,
    }
    for option, value in numbers.items():
        if value is not None and not 0 < value < math.inf:
            raise UsageFault(
                f"{option} {value:g} is not possible",
                why="It must be above 0, and finite.",
                run=f"edgeq recommend ... without {option}",
            )
    if wanted.max_loss is not None and wanted.max_loss > 1:
        raise UsageFault(
            f"--max-loss {wanted.max_loss:g} is not possible",
            why="It is a share of the quality, 1 at most.",
            run=f"edgeq recommend ... --max-loss {wanted.max_loss / 100:g}" if wanted.max_loss <= 100 else "",
        )


def missed(candidate: Candidate, wanted: Constraints, usable_bytes: int | None) -> list[Miss]:
    """Constraints that a candidate misses on a device with so many usable bytes (None: unknown)."""
    return [
        *_kind(candidate, wanted),
        *_memory(candidate, wanted, usable_bytes),
        *_speed(candidate, wanted),
        *_first_token(candidate, wanted),
        *_loss(candidate, wanted),
    ]


def _kind(candidate: Candidate, wanted: Constraints) -> Iterator[Miss]:
    if candidate.quality is None:
        yield Miss("quality", NEVER, f"no scores of {candidate.model} are published: its quality is unknown")
    if wanted.evidence not in ("any", candidate.evidence):
        yield Miss("evidence", NEVER, f"{candidate.evidence}, not {wanted.evidence}")
    if wanted.license == "open" and not candidate.commercial:
        yield Miss("license", NEVER, f"{candidate.license or 'unknown licence'}: not for commercial use")
    if candidate.hub is None:
        return
    entry = ordering.of_catalogue().entries[candidate.model]
    able = {
        "vision": "image" in entry.modality,
        "video": "video" in entry.modality,
        "thinking": entry.thinking != "never",
    }
    for word in wanted.capability:
        if not able[word]:
            yield Miss("capability", NEVER, f"no {word}")
    if candidate.context > entry.context:
        reason = f"reads {entry.context} tokens at most, {candidate.context} are wanted"
        yield Miss("context", candidate.context / entry.context, reason)


def _memory(candidate: Candidate, wanted: Constraints, usable: int | None) -> Iterator[Miss]:
    needs, limit = candidate.memory_bytes, wanted.max_memory_bytes
    if usable is None and limit is None:
        yield Miss("memory", 1.0, "whether it fits is unknown: the target does not say how much memory it has")
    for name, room in (("memory", usable), ("max-memory", limit)):
        if room is None:
            continue
        if needs is None:
            yield Miss(name, 1.0, "the memory that it needs was not measured")
            continue
        most = needs if candidate.evidence == "measured" else needs * memory.MEMORY_ERROR
        if most > room:
            word, whose = "" if needs > room else "marginal: ", "usable" if name == "memory" else "allowed"
            size = f"{_about(candidate)}{show_bytes(needs)}"
            if needs <= room:
                size += f" and up to {memory.MEMORY_ERROR - 1:.0%} more"
            yield Miss(name, most / room, f"{word}needs {size}, {show_bytes(room)} are {whose}")


def _speed(candidate: Candidate, wanted: Constraints) -> Iterator[Miss]:
    if wanted.min_tps is None:
        return
    speed = candidate.decode_tokens_per_s
    if speed is None:
        yield Miss("min-tps", NEVER, f"its speed is unknown: {_why_unknown(candidate)}")
    elif speed.low < wanted.min_tps:
        word = "marginal" if speed.high >= wanted.min_tps else "slow"
        yield Miss(
            "min-tps", wanted.min_tps / speed.low, f"{word}: {_rate(candidate, speed)}, {wanted.min_tps:g} are wanted"
        )


def _first_token(candidate: Candidate, wanted: Constraints) -> Iterator[Miss]:
    if wanted.max_ttft_s is None:
        return
    wait = candidate.first_token_s
    if wait is None:
        yield Miss("max-ttft", NEVER, f"its time to the first token is unknown: {_why_unknown(candidate)}")
    elif wait.high > wanted.max_ttft_s:
        word = "marginal" if wait.low <= wanted.max_ttft_s else "slow"
        seconds = f"first token after {_about(candidate)}{wait.mid:.1f} [{wait.low:.1f}, {wait.high:.1f}] s"
        yield Miss("max-ttft", wait.high / wanted.max_ttft_s, f"{word}: {seconds}, {wanted.max_ttft_s:g} s are allowed")


def _loss(candidate: Candidate, wanted: Constraints) -> Iterator[Miss]:
    loss = candidate.loss
    if wanted.max_loss is None or loss.high <= wanted.max_loss:
        return
    word = "marginal" if loss.low <= wanted.max_loss else "lossy"
    about = "" if loss.evidence == "measured" else "~"
    lost = f"quantization costs {about}{loss.value:.1%} [{loss.low:.1%}, {loss.high:.1%}] of its quality"
    yield Miss("max-loss", loss.high / wanted.max_loss, f"{word}: {lost}, {wanted.max_loss:.1%} are allowed")


def _why_unknown(candidate: Candidate) -> str:
    return candidate.unknown or "it was not measured"


def _rate(candidate: Candidate, speed: Range) -> str:
    return f"{'' if candidate.exact_speed else '~'}{speed.mid:.1f} [{speed.low:.1f}, {speed.high:.1f}] tokens/s"


def _about(candidate: Candidate) -> str:
    return "" if candidate.evidence == "measured" else "~"


def _known(option: str, word: str, words: tuple[str, ...]) -> None:
    if word not in words:
        raise UsageFault(
            f"{option} {word!r} is not known",
            why=data.near(word, words),
            run=f"edgeq recommend ... {option} {' or '.join(words)}",
        )
