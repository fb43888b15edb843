from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints import Build
from edgeq.checkpoint import Checkpoint
from edgeq.walk import table_loss
from edgeq.walk.layered import Layered

VOCAB, HIDDEN, TOKENS = 2500, 16, 40


@pytest.fixture
def model(tiny: Build) -> Any:
    opened = Layered(Checkpoint.open(tiny("3")))
    opened.checkpoint = SimpleNamespace(model=SimpleNamespace(vocab=VOCAB))  # type: ignore[assignment]
    yield opened
    opened.close()


@pytest.mark.parametrize("loud", [1, 4])
def test_logits_a_part_at_a_time_cost_what_they_do_together(model: Any, loud: float) -> None:
    import torch

    random = np.random.default_rng(1)
    table = random.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    table[2400:] *= loud
    lost = [random.normal(0, 0.01 * (place + 1), table.shape).astype(np.float32) for place in range(2)]
    read = random.normal(size=(TOKENS, HIDDEN)).astype(np.float32)
    rounded = (0.02 * np.sin(read)).astype(np.float32)
    found = table_loss.divergences(
        model,
        table.__getitem__,
        [each.__getitem__ for each in lost],
        torch.from_numpy(read),
        [lambda values: 0.02 * values.sin()],
    )
    logits = read.astype(np.float64) @ table.T
    chances = np.exp(logits - logits.max(1, keepdims=True))
    chances /= chances.sum(1, keepdims=True)
    for mine, changes in zip(found, [*(read @ each.T for each in lost), rounded @ table.T], strict=True):
        mean = (chances * changes).sum(1, keepdims=True)
        np.testing.assert_allclose(mine, (chances * (changes - mean) ** 2).sum(1) / 2, rtol=2e-3, atol=1e-6)


def test_looked_up_rows_change_each_token_by_their_own_gradient(model: Any) -> None:
    random = np.random.default_rng(2)
    lost = random.normal(size=(VOCAB, HIDDEN)).astype(np.float32)
    tokens = random.integers(0, VOCAB, (3, 7)).astype(np.int32)
    slopes = random.normal(size=(3, 7, HIDDEN)).astype(np.float32)
    found = table_loss.looked_up(model, lost.__getitem__, tokens, slopes)
    np.testing.assert_allclose(found, np.einsum("wth,wth->wt", lost[tokens], slopes), rtol=1e-4, atol=1e-5)
