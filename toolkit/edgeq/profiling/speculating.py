"""The speed of speculation beside that of plain decoding, on text where it may pay and on text where it may not.

The text is the held-out one that the bundle's reference carries. `ordinary` continues a passage of it; `repeating` a
shorter passage that is read two and a half times, so that the model may go on repeating it.
"""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator, Sequence

from edgeq import speculation
from edgeq.errors import BackendFault
from edgeq.profiling import rows
from edgeq.profiling.messages import Guessed, Timed
from edgeq.profiling.repetitions import Configuration, Stopwatch

TEXTS = ("repeating", "ordinary")
METHODS = {"lookup": "prompt lookup", "head": "prediction head"}
_PROMPT = 128
_TOKENS = 64
_REPEATS = 2.5
_LONGEST_S = 60.0


def prompt(text: str, window: Sequence[int], tokens: int) -> list[int]:
    """The `tokens` tokens of a window to be continued, or fewer where it is shorter."""
    tokens = min(tokens, len(window), _PROMPT)
    passage = window[: tokens if text == "ordinary" else max(int(tokens / _REPEATS), 1)]
    return [int(token) for token in itertools.islice(itertools.cycle(passage), tokens)]


def measure(
    watch: Stopwatch,
    windows: Sequence[Sequence[int]],
    tokens: int,
    written: int,
    repetitions: int,
    say: Callable[[int, int], None],
) -> tuple[Guessed, ...]:
    """Repetitions of all ways to decode, in turn, each on a window of its own: prompt of `tokens`, `written` decoded.

    At most 64 tokens are decoded after a prompt of at most 128. Rounds go on until each text has enough undisturbed
    repetitions, at most three times as many, and end 60 s after the start but for the first.
    """
    done: list[Guessed] = []
    written, deadline = min(written, _TOKENS), time.perf_counter() + _LONGEST_S
    ways = [way for way in METHODS if way != "head" or watch.session.drafter()]
    for attempt in range(3 * repetitions):
        for text in TEXTS:
            ids = prompt(text, windows[attempt % len(windows)], tokens)
            done += _each(watch, ways, text, ids, written, attempt)
        say(min(attempt + 1, repetitions), repetitions)
        valid = [(one.method, one.text) for one in done if rows.undisturbed(one)]
        if min(valid.count((METHODS[way], text)) for way in ways for text in TEXTS) >= repetitions:
            break
        if time.perf_counter() > deadline:
            break
    return tuple(done)


def _each(
    watch: Stopwatch, ways: Sequence[str], text: str, ids: Sequence[int], written: int, attempt: int
) -> Iterator[Guessed]:
    """One repetition of plain decoding and of each way to guess, in another order each time."""

    def steps(way: str | None) -> Iterator[Sequence[int]]:
        if way is None:
            return ([token] for token in watch.session.generate(ids, written))
        return speculation.steps(watch.session, ids, written, speculation.drafter(watch.session, way))

    order = [None, *ways]
    start = attempt % len(order)
    found = {way: _timed(watch, steps(way), len(ids), written, attempt) for way in order[start:] + order[:start]}
    plain, expected = found[None]
    for way in ways:
        drafted, tokens = found[way]
        yield Guessed(method=METHODS[way], text=text, plain=plain, drafted=drafted, same=tokens == expected)


def _timed(
    watch: Stopwatch, steps: Iterator[Sequence[int]], depth: int, written: int, attempt: int
) -> tuple[Timed, list[int]]:
    """The steps after the prefill, timed, and all tokens."""
    tokens = list(next(steps))
    before, stamps = watch.state(), [time.perf_counter()]
    for step in steps:
        stamps.append(time.perf_counter())
        tokens += step
    if len(tokens) != written:
        raise BackendFault(f"the backend wrote {len(tokens)} of {written} tokens", run="edgeq verify BUNDLE")
    gaps = tuple(after - earlier for earlier, after in itertools.pairwise(stamps))
    configuration = Configuration("decode", written, depth)
    return watch.timed(configuration, attempt, before, sum(gaps), gaps, tokens[0]), tokens
