from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any

import msgspec
import pytest

from edgeq.backends.null import NullSession
from edgeq.errors import BackendFault
from edgeq.profiling import contention, rows, speculating
from edgeq.profiling.contention import Contention
from edgeq.profiling.messages import Guessed
from edgeq.profiling.repetitions import Stopwatch

_WINDOWS = [list(range(n, n + 40)) for n in range(3)]


class _Counter(NullSession):
    """Null session that counts its steps; `slip` makes plain decoding end otherwise."""

    def __init__(self, slip: int = 0) -> None:
        super().__init__(300)
        self.slip, self.plain, self.led = slip, 0, 0

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        self.plain += 1
        *most, last = super().generate(ids, tokens)
        yield from [*most, last + self.slip]

    def begin(self, tokens: int) -> None:
        self.led += 1


def _calm(monkeypatch: pytest.MonkeyPatch, waits: Sequence[float] = (0.0,)) -> None:
    each = iter(range(1 << 20))
    monkeypatch.setattr(
        contention, "between", lambda before, after: Contention(waits[next(each) % len(waits)], None, None, 0.0)
    )


def _measure(session: NullSession, written: int = 16, repetitions: int = 3) -> tuple[Guessed, ...]:
    watch = Stopwatch(session, session.vocab)
    return speculating.measure(watch, _WINDOWS, 100, written, repetitions, lambda count, total: None)


def test_a_repeating_prompt_reads_its_passage_two_and_a_half_times() -> None:
    assert speculating.prompt("repeating", list(range(100)), 10) == [0, 1, 2, 3, 0, 1, 2, 3, 0, 1]
    assert speculating.prompt("ordinary", list(range(100)), 10) == list(range(10))
    assert [len(speculating.prompt(text, range(1000), 1000)) for text in speculating.TEXTS] == [128, 128]
    assert [speculating.prompt(text, range(1000), 1) for text in speculating.TEXTS] == [[0], [0]]


def test_both_ways_take_turns_on_each_text(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch)
    session = _Counter()
    done = _measure(session)
    assert [one.text for one in done] == ["repeating", "ordinary"] * 3
    assert (session.plain, session.led) == (6, 6)
    assert all(one.same for one in done)
    assert {len(one.plain.gaps_s) for one in done} == {15}
    assert {one.plain.repetition.tokens for one in done} == {16}


def test_tokens_are_counted_not_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    """The null model counts upwards: a prompt that begins again is followed by what stood there before."""
    _calm(monkeypatch)
    repeating, ordinary = rows.speculation(_measure(_Counter()), 3)
    assert (repeating.text, repeating.prompt, repeating.tokens, repeating.method) == (
        "repeating",
        40,
        16,
        "prompt lookup",
    )
    assert repeating.tokens_per_step > 1
    assert ordinary.tokens_per_step == 1
    one = _measure(_Counter())[0].drafted
    assert one.repetition.tokens_per_s == pytest.approx(15 / sum(one.gaps_s))
    assert len(one.gaps_s) < 15


def test_no_more_is_written_than_is_needed_to_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch)
    assert {one.plain.repetition.tokens for one in _measure(_Counter(), written=500)} == {64}


def test_disturbed_continuations_are_repeated_three_times_at_most(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch, (0.3, 0.0))
    done = _measure(_Counter())
    assert len(done) == 3 * 3 * 2
    row = rows.speculation(done, 3)[0]
    assert (row.valid, row.reason) == (False, "0 of 9 continuations were undisturbed, 3 are wanted")
    assert len(row.tokens_per_s.samples) == 9


def test_enough_undisturbed_are_a_valid_row_of_their_own(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch, (0.0, 0.0, 0.0, 0.0, 0.3, 0.0, 0.0, 0.0))
    row = rows.speculation(_measure(_Counter()), 3)[0]
    assert (row.valid, row.reason, len(row.tokens_per_s.samples)) == (True, None, 3)


def test_the_time_is_bounded_but_for_the_first_round(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch)
    monkeypatch.setattr(speculating, "_LONGEST_S", -1.0)
    done = _measure(_Counter())
    assert len(done) == 2
    assert rows.speculation(done, 3)[0].reason == "1 of 1 continuations were undisturbed, 3 are wanted"


def test_other_tokens_are_counted(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch)
    done = _measure(_Counter(slip=1))
    assert [row.same for row in rows.speculation(done, 3)] == [0, 0]
    mixed = [msgspec.structs.replace(one, same=number > 1) for number, one in enumerate(done)]
    assert [row.same for row in rows.speculation(mixed, 3)] == [pytest.approx(2 / 3)] * 2


def test_a_backend_that_stops_early_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    class Short(NullSession):
        def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
            return super().generate(ids, tokens - 3)

    with pytest.raises(BackendFault, match="13 of 16 tokens"):
        _measure(Short(300))


class _Headed(_Counter):
    """Has a head of its own, which knows what this model does."""

    def drafter(self) -> Any:
        class Head:
            def guess(self, found: Sequence[int], most: int) -> list[int]:
                return [(found[-1] + n) % 300 for n in range(1, most + 1)]

        return Head()


def test_a_head_is_measured_beside_lookup_with_the_same_plain_decoding(monkeypatch: pytest.MonkeyPatch) -> None:
    _calm(monkeypatch)
    session = _Headed()
    done = _measure(session)
    assert (session.plain, session.led) == (6, 12)
    found = {(row.method, row.text): row for row in rows.speculation(done, 3)}
    assert set(found) == {(method, text) for method in speculating.METHODS.values() for text in speculating.TEXTS}
    head, lookup = found["prediction head", "ordinary"], found["prompt lookup", "ordinary"]
    assert head.tokens_per_step > 3 > lookup.tokens_per_step == 1
    assert head.plain_tokens_per_s == lookup.plain_tokens_per_s
    assert all(row.same == 1 for row in found.values())
