"""What the profiling parent and its children tell each other: one JSON document a line."""

from __future__ import annotations

import msgspec

from edgeq.loss import Accuracy
from edgeq.profiles import Energy, Phase, Placement, Repetition


class ColdJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Load the bundle once, its files out of the page cache."""

    folder: str


class FirstJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Load the bundle and produce one token; the child was started with empty kernel caches."""

    folder: str


class SpeedJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Load the bundle, then time it: prompt lengths, tokens to decode, and depths to decode at."""

    folder: str
    prompts: tuple[int, ...]
    tokens: int
    depths: tuple[int, ...]
    repetitions: int


class AccuracyJob(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Compare the bundle with the recorded reference at a path."""

    folder: str
    reference: str


class Progress(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """`done` of `total` steps of the work called `label`, and the peak so far."""

    label: str
    done: int
    total: int
    peak_rss_bytes: int | None


class Fault(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """An error of edgeq, by the name of its class."""

    kind: str
    what: str
    why: str
    run: str


class Cold(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Seconds of a cold load, or the reason why it was not cold; where the layers went."""

    seconds: float | None
    placement: tuple[Placement, ...]
    reason: str | None


class First(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Seconds until the first token of a process that had to compile every kernel that it needed."""

    seconds: float


class Timed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """One repetition, made on the prompt of its `attempt`: its first token, the seconds between its tokens, if any.

    tokenization_s: from the prompt's text to its ids and from the first token to text; null when not measured.
    """

    repetition: Repetition
    attempt: int
    first_token: int
    gaps_s: tuple[float, ...]
    tokenization_s: float | None


class Guessed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """One continuation of a text decoded plainly and with guessed tokens, and whether all tokens were the `same`."""

    method: str
    text: str
    plain: Timed
    drafted: Timed
    same: bool


class Speed(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """What one process measured: load time, every repetition, and the peak memory of each phase.

    guessed: every repetition of speculation; none where `guessed_reason` says why.
    """

    warm_s: float
    placement: tuple[Placement, ...]
    repetitions: tuple[Timed, ...]
    peak_rss_bytes: int | None
    load: Phase
    prefill: Phase
    decode: Phase
    memory_reason: str | None
    energy: Energy
    health_reason: str | None
    guessed: tuple[Guessed, ...]
    guessed_reason: str | None


class Loss(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True, tag=True):
    """Result of the comparison with the reference."""

    accuracy: Accuracy


Job = ColdJob | FirstJob | SpeedJob | AccuracyJob
Answer = Cold | First | Speed | Loss | Fault
