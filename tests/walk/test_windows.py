from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from checkpoints import Build, quiet
from edgeq import data
from edgeq.checkpoint import Checkpoint
from edgeq.recipe import parse
from edgeq.walk import run, windows

VOCAB = 1000


@pytest.mark.parametrize(
    ("count", "more"), [(1, 1), (8, 1), (9, 2), (windows.FITTED, windows.WITH_DRAWN - windows.FITTED)]
)
def test_for_every_eight_windows_of_a_text_or_fewer_there_is_one_of_random_tokens(count: int, more: int) -> None:
    text = np.zeros((count, 512), np.int32)
    found = windows.with_drawn(text, VOCAB)
    assert found.dtype == np.int32
    assert found.shape == (count + more, 512)
    assert (found[:count] == text).all()
    for window in found[count:]:
        assert 0 <= window.min() <= window.max() < VOCAB
        assert len(np.unique(window)) > 300
    assert (windows.with_drawn(text, VOCAB) == found).all()


@pytest.mark.parametrize(("count", "more"), [(1, 1), (4, 1), (5, 2), (100, windows.SENSED - windows.FITTED)])
def test_sensitivities_are_measured_on_a_text_and_on_a_quarter_as_many_windows_of_random_tokens(
    count: int, more: int
) -> None:
    text = np.arange(count * 512, dtype=np.int32).reshape(count, 512)
    read, drawn = windows.sensed(text, VOCAB)
    assert (read == windows.fitted(text)).all()
    assert drawn.shape == (more, 512)
    assert 0 <= drawn.min() <= drawn.max() < VOCAB


@pytest.mark.parametrize("name", ["w4g32-e8-gptq", "w4g32-e8-guided", "w4g32-e8-tuned"])
def test_matrices_are_fitted_to_random_tokens_too(
    tiny: Build, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    held = windows.quick(checkpoint, data.held_out(), 64)
    text = windows.windows(checkpoint.folder, data.held_out(), 16, 32, checkpoint.model.vocab)
    seen: list[np.ndarray] = []
    begin = run._begin

    def note(*given: Any) -> Any:
        seen.append(given[-1])
        return begin(*given)

    monkeypatch.setattr(run, "_begin", note)
    run.quantize(checkpoint, parse(name), held, text, tmp_path, quiet)
    assert len(seen) == 1
    assert (seen[0] == windows.with_drawn(text, checkpoint.model.vocab)).all()
    assert len(seen[0]) == 18
