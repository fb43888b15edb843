from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.errors import CorruptInput
from edgeq.walk.stepped import Stepped

SHAPE = (2, 3)


def ones() -> NDArray[np.float32]:
    return np.ones(SHAPE, np.float32)


def never() -> NDArray[np.float32]:
    pytest.fail("begun again")


def test_steps_add_up_and_are_found_again(tmp_path: Path) -> None:
    first = Stepped(tmp_path, "one", SHAPE, ones)
    assert (first.done, first.values.tolist()) == (0, ones().tolist())
    for step in range(1, 4):
        with first.step() as values:
            values += 1
        again = Stepped(tmp_path, "one", SHAPE, never)
        assert (first.done, again.done) == (step, step)
        assert (first.values == 1 + step).all()
        assert (again.values == 1 + step).all()
    assert (Stepped(tmp_path, "other", SHAPE, ones).values == 1).all()


def test_a_step_that_is_stopped_leaves_what_was_there_before(tmp_path: Path) -> None:
    kept = Stepped(tmp_path, "one", SHAPE, ones)
    with kept.step() as values:
        values *= 5

    def stopped() -> None:
        with kept.step() as values:
            values *= 7
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        stopped()
    for found in (kept, Stepped(tmp_path, "one", SHAPE, never)):
        assert (found.done, (found.values == 5).all()) == (1, True)


def test_values_of_another_shape_are_not_gone_on_with(tmp_path: Path) -> None:
    Stepped(tmp_path, "one", SHAPE, ones)
    with pytest.raises(CorruptInput, match="not what a walk kept"):
        Stepped(tmp_path, "one", (2, 4), never)
