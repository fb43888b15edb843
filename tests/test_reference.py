from __future__ import annotations

import pytest

from checkpoints import Build, quiet
from edgeq import accuracy, data, reference
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault
from edgeq.recipe import parse

TEXT = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")[:6000]


def test_windows_are_spread_from_the_start_of_a_text_to_its_end(tiny: Build) -> None:
    found = reference.windows(tiny("3"), TEXT, 5, 64, 288)
    assert found.shape == (5, 64)
    assert bytes(found[0].tolist()).decode() == TEXT[:64]
    assert bytes(found[-1].tolist()).decode() == TEXT[-64:]


def test_a_text_that_fills_no_window_is_refused_with_its_length(tiny: Build) -> None:
    with pytest.raises(UsageFault, match="the text has 5 tokens"):
        reference.windows(tiny("3"), "short", 8, 128, 288)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tiny: Build) -> None:
    with pytest.raises(CorruptInput, match="the model has 50"):
        reference.windows(tiny("3"), TEXT, 8, 128, 50)


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_sixteen_bits_of_a_sixteen_bit_checkpoint_lose_nothing_and_four_lose_something(
    tiny: Build, generation: str
) -> None:
    checkpoint = Checkpoint.open(tiny(generation))
    recorded, nothing = reference.quick(checkpoint, parse("w16"), TEXT, 256, quiet)
    same, something = reference.quick(checkpoint, parse("w4g32-e8-rtn"), TEXT, 256, quiet)
    assert nothing == 0.0
    assert something > 1e-4
    assert recorded.exact
    assert recorded.windows.shape == (reference.QUICK_WINDOWS, reference.LENGTH)
    assert len(recorded.continuation) == accuracy.CONTINUATION
    assert (recorded.log_probs == same.log_probs).all()


def test_a_float32_checkpoint_loses_what_bfloat16_cannot_hold(tiny: Build) -> None:
    loss = reference.quick(Checkpoint.open(tiny("3", dtype="f32")), parse("w16"), TEXT, 256, quiet)[1]
    assert 0 < loss < 1e-3
