"""The timed part of a profile: warm up, then repeat every configuration in a random order until it can be trusted."""

from __future__ import annotations

import itertools
import random
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from edgeq.backends.base import Session
from edgeq.errors import BackendFault
from edgeq.profiles import Phase, Repetition
from edgeq.profiling import contention, health, memory, statistics
from edgeq.profiling.messages import Timed

_WARM_UP_TOKENS = 17
_WARM_UPS = 5
_WARM_UP_SEED = 1 << 20
_MOST_ATTEMPTS = 3
_LONGER_S = 60.0
_PLAIN_SHARE = 15 / 16  # of the vocabulary: what is above may be control tokens


@dataclass(frozen=True)
class Configuration:
    """A prefill of `tokens`, or `tokens` decoded after a prompt of `depth` (1 token at depth 0)."""

    phase: str
    tokens: int
    depth: int

    @property
    def prompt(self) -> int:
        """Tokens that are read before the first one is written."""
        return self.tokens if self.phase == "prefill" else max(self.depth, 1)


class Stopwatch:
    """Times a session from outside and keeps the peak memory of each phase."""

    def __init__(self, session: Session, vocab: int) -> None:
        self.session, self.vocab = session, vocab
        self.peaks: dict[str, Phase] = {"prefill": memory.NOTHING, "decode": memory.NOTHING}

    def run(self, configuration: Configuration, attempt: int) -> Timed:
        """Repetition of a configuration, on a prompt that depends on the attempt."""
        ids = prompt_ids(self.vocab, configuration.prompt, attempt)
        if configuration.phase == "prefill":
            before = self.state()
            first, seconds = self.prefill(ids, 1)[1:]
            return self.timed(configuration, attempt, before, seconds, (), first)
        stream, first, _ = self.prefill(ids, configuration.tokens)
        before = self.state()
        gaps = self.decode(stream, configuration.tokens)
        return self.timed(configuration, attempt, before, sum(gaps), gaps, first)

    def prefill(self, ids: Sequence[int], tokens: int) -> tuple[Iterator[int], int, float]:
        """Stream after its first token, that token, and the seconds that it took."""
        memory.reset()
        start = time.perf_counter()
        stream = self.session.generate(ids, tokens)
        first = next(stream, None)
        seconds = time.perf_counter() - start
        self._note("prefill")
        if first is None:
            raise BackendFault("the backend wrote no token", run="edgeq verify BUNDLE")
        return stream, first, seconds

    def decode(self, stream: Iterator[int], tokens: int, each: Callable[[], None] | None = None) -> tuple[float, ...]:
        """Seconds of each further token until `tokens` are written; `each` is called after every one."""
        memory.reset()
        stamps = [time.perf_counter()]
        for _ in stream:
            stamps.append(time.perf_counter())
            if each is not None:
                each()
        self._note("decode")
        if len(stamps) != tokens:
            raise BackendFault(f"the backend wrote {len(stamps)} of {tokens} tokens", run="edgeq verify BUNDLE")
        return tuple(after - before for before, after in itertools.pairwise(stamps))

    def _note(self, phase: str) -> None:
        self.peaks[phase] = memory.highest(self.peaks[phase], memory.read())

    def state(self) -> tuple[health.Reading, contention.Snapshot]:
        """The machine's, before something is timed."""
        return health.read(), contention.snapshot()

    def timed(
        self,
        configuration: Configuration,
        attempt: int,
        before: tuple[health.Reading, contention.Snapshot],
        seconds: float,
        gaps: tuple[float, ...],
        first: int,
    ) -> Timed:
        """What took `seconds` since `before`: a prefill, or so many tokens after the first, in steps of `gaps`."""
        disturbed = contention.between(before[1], contention.snapshot())
        after = health.read()
        repetition = Repetition(
            phase=configuration.phase,
            tokens=configuration.tokens,
            depth=configuration.depth,
            seconds=seconds,
            tokens_per_s=(configuration.tokens - (configuration.phase == "decode")) / seconds,
            wait=disturbed.wait,
            steal=disturbed.steal,
            throttled=disturbed.throttled,
            temperature_c=after.temperature_c,
            clock_hz=after.clock_hz,
            throttle_events=health.events_between(before[0], after),
            valid=disturbed.reason is None,
            reason=disturbed.reason,
        )
        return Timed(repetition=repetition, attempt=attempt, first_token=first, gaps_s=gaps, tokenization_s=None)


def prompt_ids(vocab: int, tokens: int, attempt: int) -> list[int]:
    """Random ids of ordinary tokens, the same for the same arguments."""
    generator = np.random.default_rng((vocab, tokens, attempt))
    return [int(token) for token in generator.integers(0, max(int(vocab * _PLAIN_SHARE), 1), tokens)]


def warm_up(watch: Stopwatch, prompt: int, tokens: int) -> None:
    """One full prompt and 16 decoded tokens (fewer where `tokens` are), until two passes differ by less than 5 %."""
    tokens, last = min(tokens, _WARM_UP_TOKENS), 0.0
    for attempt in range(_WARM_UPS):
        stream, _, prefill_s = watch.prefill(prompt_ids(watch.vocab, prompt, _WARM_UP_SEED + attempt), tokens)
        seconds = prefill_s + sum(watch.decode(stream, tokens))
        if abs(seconds - last) < 0.05 * seconds:
            return
        last = seconds


def repeat(
    watch: Stopwatch,
    configurations: Sequence[Configuration],
    repetitions: int,
    say: Callable[[int, int], None],
) -> list[Timed]:
    """Every attempt, in the order that it was made.

    Rounds over all configurations, shuffled with a fixed seed, go on until each has enough valid repetitions and an
    interval within 2 %, at most three times as many attempts, and at most 60 s after the first `repetitions` rounds.
    """
    shuffled = random.Random(0)
    done: list[Timed] = []
    open_ones, deadline = list(configurations), float("inf")
    for attempt in range(_MOST_ATTEMPTS * repetitions):
        if attempt == repetitions:
            deadline = time.perf_counter() + _LONGER_S
        shuffled.shuffle(open_ones)
        for configuration in open_ones:
            if time.perf_counter() > deadline:
                return done
            done.append(watch.run(configuration, attempt))
            say(len(done), max(repetitions * len(configurations), len(done)))
        if attempt + 1 >= repetitions:
            open_ones = [one for one in open_ones if not _settled(one, done, repetitions)]
    return done


def _settled(configuration: Configuration, done: Sequence[Timed], repetitions: int) -> bool:
    valid = [one.repetition for one in done if one.repetition.valid]
    key = (configuration.phase, configuration.tokens, configuration.depth)
    speeds = [one.tokens_per_s for one in valid if (one.phase, one.tokens, one.depth) == key]
    return len(speeds) >= repetitions and statistics.settled(speeds)
