"""Sessions led step by step: what taking tokens back must not leave behind."""

from __future__ import annotations

import platform
from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq import speculation
from edgeq.backends.base import DRAFT, Session
from edgeq.machine import this_machine

ROOM = 200
rows_add_alike = pytest.mark.skipif(
    platform.machine() == "x86_64" and "avx512_vnni" not in this_machine().isa,
    reason="without AVX-512 VNNI ONNX Runtime adds one row in another order than several",
)


def straight(session: Session, prompt: Sequence[int], ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits after each of some tokens, run one by one behind a prompt."""
    session.begin(ROOM)
    session.advance(prompt)
    return np.stack([session.advance([token])[-1].copy() for token in ids])


def with_detours(session: Session, prompt: Sequence[int], ids: Sequence[int]) -> NDArray[np.float32]:
    """The same logits, behind drafts of every length of which a growing part is right."""
    session.begin(ROOM)
    session.advance(prompt)
    found: list[NDArray[np.float32]] = []
    wrong = [(token + 1) % 256 for token in ids]
    for turn in range(len(ids)):
        length = DRAFT - turn % (DRAFT + 1)
        right = min(turn % 3, length, len(ids) - len(found) - 1)
        start = len(found)
        draft = [*ids[start + 1 : start + 1 + right], *wrong[:length]][:length]
        logits = session.advance([ids[start], *draft], 1 + length).copy()
        session.rewind(length - right)
        found += list(logits[: right + 1])
        if len(found) == len(ids):
            break
    return np.stack(found)


def assert_same_or_tied(session: Session, prompt: Sequence[int], tokens: int, tie: float) -> bool:
    """Whether prompt lookup gives the tokens of plain decoding; where not, the first other one is as likely.

    tie: most that the two logits may differ by.
    """
    plain = list(session.generate(prompt, tokens))
    guessed = list(speculation.generate(session, prompt, tokens, "lookup"))
    assert len(guessed) == tokens
    if guessed == plain:
        return True
    place = next(n for n in range(tokens) if plain[n] != guessed[n])
    after = straight(session, prompt, plain[:place])[-1] if place else session.logits(prompt)[-1]
    assert abs(after[plain[place]] - after[guessed[place]]) <= tie
    return False
