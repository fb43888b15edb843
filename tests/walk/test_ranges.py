"""Ranges of a cache: those of a whole transformers model, found with one layer in memory."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest

from checkpoints import GENERATIONS, VOCAB, Build, quiet
from edgeq import transformer
from edgeq.checkpoint import Checkpoint
from edgeq.walk.ranges import cache_ranges

WINDOWS = np.random.default_rng(5).integers(0, VOCAB, (3, 70)).astype(np.int32)


def whole(checkpoint: Checkpoint) -> tuple[np.ndarray, np.ndarray]:
    """The same from what transformers caches, where keys are rotated: pairs of channels have kept their length."""
    import torch

    with torch.inference_mode():
        model = transformer.instantiate(checkpoint, lambda _: True)
        past = model(input_ids=torch.from_numpy(WINDOWS.astype(np.int64)), use_cache=True).past_key_values
        pairs = len(model.model.rotary_emb.inv_freq)
    kept = [layer for layer in past.layers if getattr(layer, "keys", None) is not None]
    keys, values = (abs(torch.stack([getattr(layer, name) for layer in kept])).numpy() for name in ("keys", "values"))
    lengths = np.hypot(keys[..., :pairs], keys[..., pairs : 2 * pairs])
    keys[..., :pairs] = keys[..., pairs : 2 * pairs] = lengths
    return keys.max(axis=(1, 3)), values.max(axis=(1, 3))


@pytest.mark.parametrize("generation", GENERATIONS)
def test_ranges_are_those_of_a_whole_model(tiny: Build, generation: str) -> None:
    checkpoint = Checkpoint.open(tiny(generation))
    keys, values = whole(checkpoint)
    found = cache_ranges(checkpoint, WINDOWS, quiet)
    assert found.keys.dtype == found.values.dtype == np.float32
    np.testing.assert_allclose(found.keys, keys, rtol=1e-5)
    np.testing.assert_allclose(found.values, values, rtol=1e-5)


def test_each_layer_is_read_once_and_nothing_stays(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    instantiate, tensor = transformer.instantiate, Checkpoint.tensor
    models: list[Any] = []
    read: list[str] = []

    def watched(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> Any:
        assert not any(map(wanted, checkpoint.model.tensors()))
        models.append(instantiate(checkpoint, wanted))
        return models[-1]

    def noted(self: Checkpoint, name: str) -> np.ndarray:
        layer = ".".join(name.split(".")[:3])
        held = {each for each, weights in models[0].named_parameters() if not weights.is_meta}
        assert all(each.startswith(f"{layer}.") for each in held)
        read.append(name)
        return tensor(self, name)

    monkeypatch.setattr(transformer, "instantiate", watched)
    monkeypatch.setattr(Checkpoint, "tensor", noted)
    cache_ranges(checkpoint, WINDOWS, quiet)
    assert read == [name for name in checkpoint.model.tensors() if ".layers." in name]
    assert all(weights.is_meta for weights in models[0].parameters())
