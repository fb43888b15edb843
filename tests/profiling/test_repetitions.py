from __future__ import annotations

from collections.abc import Iterator, Sequence

import pytest

from edgeq.backends.null import NullSession
from edgeq.errors import BackendFault
from edgeq.profiling import contention, repetitions
from edgeq.profiling.contention import Contention
from edgeq.profiling.repetitions import Configuration, Stopwatch

_VOCAB = 300
_BOTH = [Configuration("prefill", 16, 0), Configuration("decode", 8, 0), Configuration("decode", 8, 5)]


class _Recorder(NullSession):
    """Null session that remembers what it was asked, and writes at most `most` tokens."""

    def __init__(self, most: int = 1 << 20) -> None:
        super().__init__(_VOCAB)
        self.asked: list[tuple[tuple[int, ...], int]] = []
        self.most = most

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        self.asked.append((tuple(ids), tokens))
        return super().generate(ids, min(tokens, self.most))


def _disturb(monkeypatch: pytest.MonkeyPatch, wait: float) -> None:
    monkeypatch.setattr(contention, "between", lambda before, after: Contention(wait, None, None, 0.0))


def _silent(done: int, total: int) -> None:
    assert done <= total


def test_every_repetition_has_its_own_prompt_of_plain_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _disturb(monkeypatch, 0.0)
    session = _Recorder()
    done = repetitions.repeat(Stopwatch(session, _VOCAB), _BOTH, 3, _silent)
    assert len(session.asked) == len(done) >= 9
    assert len({ids for ids, _ in session.asked if len(ids) == 16}) == sum(len(ids) == 16 for ids, _ in session.asked)
    assert {len(ids) for ids, _ in session.asked} == {16, 1, 5}
    assert all(0 <= one < _VOCAB * 15 // 16 for ids, _ in session.asked for one in ids)


def test_order_is_shuffled_by_round_and_the_same_every_time(monkeypatch: pytest.MonkeyPatch) -> None:
    _disturb(monkeypatch, 0.0)
    orders = []
    for _ in range(2):
        done = repetitions.repeat(Stopwatch(_Recorder(), _VOCAB), _BOTH, 4, _silent)
        orders.append([(one.attempt, one.repetition.phase, one.repetition.depth) for one in done[:12]])
    assert orders[0] == orders[1]
    rounds = [orders[0][start : start + 3] for start in range(0, 12, 3)]
    assert [{attempt for attempt, _, _ in one} for one in rounds] == [{0}, {1}, {2}, {3}]
    assert len({tuple(one[1:] for one in each) for each in rounds}) > 1


def test_contended_repetitions_are_repeated_three_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    _disturb(monkeypatch, 0.3)
    done = repetitions.repeat(Stopwatch(_Recorder(), _VOCAB), _BOTH, 2, _silent)
    assert len(done) == 3 * 2 * len(_BOTH)
    assert {(one.repetition.valid, one.repetition.reason) for one in done} == {(False, "30% waited for a core")}


def test_decode_is_timed_between_its_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    _disturb(monkeypatch, 0.0)
    one = Stopwatch(_Recorder(), _VOCAB).run(Configuration("decode", 8, 5), 0)
    assert len(one.gaps_s) == 7
    assert one.repetition.seconds == sum(one.gaps_s)
    assert one.repetition.tokens_per_s == pytest.approx(7 / one.repetition.seconds)


def test_peaks_are_kept_by_phase() -> None:
    watch = Stopwatch(_Recorder(), _VOCAB)
    repetitions.warm_up(watch, 16, 8)
    assert list(watch.peaks) == ["prefill", "decode"]


@pytest.mark.parametrize(("most", "words"), [(0, "no token"), (3, "3 of 8 tokens")])
def test_a_backend_that_stops_early_is_a_fault(most: int, words: str) -> None:
    with pytest.raises(BackendFault, match=words):
        repetitions.repeat(Stopwatch(_Recorder(most), _VOCAB), _BOTH[1:], 1, _silent)
