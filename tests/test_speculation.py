from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq import speculation
from edgeq.backends.base import DRAFT, Drafter
from edgeq.backends.null import NullSession
from edgeq.errors import UsageFault
from edgeq.speculation import Lookup

VOCAB = 50


class Remembering(NullSession):
    """Null session that knows which tokens it has seen, and refuses what the interface does not allow.

    Its next token depends on all of them, so that one that was not taken back changes what follows.
    """

    def __init__(self, context: int = 1000) -> None:
        super().__init__(VOCAB)
        self.context, self.seen, self.kept, self.steps = context, list[int](), 0, list[int]()

    def after(self, seen: Sequence[int]) -> int:
        return (sum(seen) * 7 + len(seen)) % self.vocab

    def generate(self, ids: Sequence[int], tokens: int):  # type: ignore[no-untyped-def]
        text = list(ids)
        for _ in range(tokens):
            text.append(self.after(text))
            yield text[-1]

    def begin(self, tokens: int) -> None:
        if tokens > self.context:
            raise UsageFault("too long")
        self.room, self.seen, self.kept, self.steps = tokens, [], 0, []

    def advance(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        assert keep == 1 or keep == len(ids) <= DRAFT + 1
        start = len(self.seen)
        self.seen += ids
        assert len(self.seen) <= self.room
        self.kept = keep
        self.steps.append(len(ids))
        found = np.zeros((keep, self.vocab), np.float32)
        for row in range(keep):
            end = start + len(ids) - keep + row + 1
            found[row, self.after(self.seen[:end])] = 1
        return found

    def rewind(self, count: int) -> None:
        assert 0 <= count < max(self.kept, 1)
        del self.seen[len(self.seen) - count :]
        self.kept = 0


class Oracle:
    """Drafts what will come, but for a token that is wrong every so often: every=1 is never right, 0 always."""

    def __init__(self, session: Remembering, every: int) -> None:
        self.session, self.every, self.text = session, every, list[int]()

    def guess(self, found: Sequence[int], most: int) -> list[int]:
        self.text += found
        right = list(self.session.generate(self.text, most))
        place = len(self.text)
        wrong = [self.every and not (place + n) % self.every for n in range(most)]
        return [(token + 1) % VOCAB if bad else token for token, bad in zip(right, wrong, strict=True)]


class Silent:
    """Never drafts."""

    def guess(self, found: Sequence[int], most: int) -> list[int]:
        return []


def joined(session: Remembering, ids: Sequence[int], tokens: int, drafter: Drafter) -> list[int]:
    return [token for step in speculation.steps(session, ids, tokens, drafter) for token in step]


@pytest.mark.parametrize("every", [0, 1, 2, 3, 5, 9])
@pytest.mark.parametrize("tokens", [0, 1, 2, 3, 50])
def test_tokens_are_those_of_plain_decoding_whatever_is_drafted(every: int, tokens: int) -> None:
    session = Remembering()
    wanted = list(session.generate([3, 1], tokens))
    assert joined(session, [3, 1], tokens, Oracle(session, every)) == wanted


@given(st.lists(st.integers(0, 3), min_size=1, max_size=30), st.integers(1, 40), st.integers(2, 6))
def test_lookup_never_changes_the_tokens(ids: list[int], tokens: int, vocab: int) -> None:
    session = Remembering()
    session.vocab = vocab
    assert list(speculation.generate(session, ids, tokens, "lookup")) == list(session.generate(ids, tokens))


def test_a_drafter_that_is_never_right_costs_no_draft() -> None:
    session = Remembering()
    joined(session, [3], 20, Oracle(session, 1))
    assert session.steps == [1] * 20


def test_a_drafter_that_says_nothing_is_plain_decoding() -> None:
    session = Remembering()
    assert joined(session, [3], 20, Silent()) == list(session.generate([3], 20))
    assert session.steps == [1] * 20


def test_drafts_grow_while_they_are_right_up_to_the_most() -> None:
    session = Remembering()
    joined(session, [3], 41, Oracle(session, 0))
    assert session.steps[:6] == [1, 1, 2, 4, 8, 8]
    assert sum(session.steps) - 1 == 40  # nothing drafted in vain


def test_a_draft_shrinks_to_what_was_right_of_it() -> None:
    session = Remembering()
    found = [len(step) for step in speculation.steps(session, [3], 60, Oracle(session, 20))]
    assert 1 < min(found[4:-1]) < 8
    assert max(found) == 8


@pytest.mark.parametrize("tokens", range(1, 24))
def test_no_token_is_asked_for_beyond_the_last(tokens: int) -> None:
    session = Remembering(context=2 + tokens)
    assert len(joined(session, [3, 1], tokens, Oracle(session, 0))) == tokens
    assert len(session.seen) == 2 + tokens - 1


def test_a_text_longer_than_the_context_is_refused_before_anything_runs() -> None:
    session = Remembering(context=20)
    with pytest.raises(UsageFault):
        next(speculation.generate(session, [1] * 10, 11, "lookup"))


def test_a_session_that_cannot_go_back_decodes_plainly() -> None:
    session = Remembering()
    session.one_way = "no way back"
    assert list(speculation.generate(session, [1, 2], 9, "lookup")) == list(session.generate([1, 2], 9))
    assert session.steps == []


def test_lookup_prefers_the_longest_run_and_its_latest_place() -> None:
    assert Lookup().guess([1, 2, 3, 9, 8, 3, 7, 7, 1, 2, 3], 2) == [9, 8]
    assert Lookup().guess([3, 9, 5, 3, 7, 5, 3], 1) == [7]
    assert Lookup().guess([5, 1, 6, 1], 1) == [6]


def test_lookup_reads_on_into_its_own_guess() -> None:
    assert Lookup().guess([1, 2, 1], 5) == [2, 1, 2, 1, 2]
    assert Lookup().guess([4, 4], 3) == [4, 4, 4]


def test_lookup_knows_nothing_of_a_new_token() -> None:
    assert Lookup().guess([1, 2, 3], 4) == []
    assert Lookup().guess([], 4) == []


def test_lookup_remembers_earlier_calls() -> None:
    whole, parts = Lookup(), Lookup()
    text = [1, 2, 3, 1, 2, 4, 1, 2]
    parts.guess(text[:4], 3)
    parts.guess(text[4:5], 3)
    assert parts.guess(text[5:], 3) == whole.guess(text, 3) == [4, 1, 2]
