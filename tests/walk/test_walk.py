from __future__ import annotations

import pytest

from checkpoints import Build, quiet
from edgeq import data
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault
from edgeq.recipe import parse
from edgeq.walk import run, windows

TEXT = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")[:6000]


def test_windows_are_spread_from_the_start_of_a_text_to_its_end(tiny: Build) -> None:
    found = windows.windows(tiny("3"), TEXT, 5, 64, 288)
    assert found.shape == (5, 64)
    assert bytes(found[0].tolist()).decode() == TEXT[:64]
    assert bytes(found[-1].tolist()).decode() == TEXT[-64:]


def test_a_text_that_fills_no_window_is_refused_with_its_length(tiny: Build) -> None:
    with pytest.raises(UsageFault, match="the text has 5 tokens"):
        windows.windows(tiny("3"), "short", 8, 128, 288)


def test_a_tokenizer_that_knows_more_than_the_model_is_refused(tiny: Build) -> None:
    with pytest.raises(CorruptInput, match="the model has 50"):
        windows.windows(tiny("3"), TEXT, 8, 128, 50)


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_sixteen_bits_of_a_sixteen_bit_checkpoint_lose_nothing_and_four_lose_something(
    tiny: Build, generation: str
) -> None:
    checkpoint = Checkpoint.open(tiny(generation))
    held = windows.quick(checkpoint, TEXT, 224)
    exact = run.quantize(checkpoint, parse("w16"), held, None, None, quiet)
    lossy = run.quantize(checkpoint, parse("w4g32-e8-rtn"), held, None, None, quiet)
    assert exact.weights_only == 0.0
    assert lossy.weights_only > 1e-4
    assert exact.reference.exact
    assert exact.reference.windows.shape == (windows.QUICK_WINDOWS, windows.LENGTH)
    assert (exact.reference.log_probs == lossy.reference.log_probs).all()


def test_a_float32_checkpoint_loses_what_bfloat16_cannot_hold(tiny: Build) -> None:
    checkpoint = Checkpoint.open(tiny("3", dtype="f32"))
    held = windows.quick(checkpoint, TEXT, 224)
    assert 0 < run.quantize(checkpoint, parse("w16"), held, None, None, quiet).weights_only < 1e-3
