"""An 8-bit cache: its scales hold what the model computes, and decoding with it stays near the float32 one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import GENERATIONS, Build, quiet
from edgeq import backends, bundle, planning
from edgeq.backends.base import CacheRanges, Job
from edgeq.backends.onnx import keyvalues, weights
from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageFault
from edgeq.recipe import parse

IDS = [(7 * n + 3) % 256 for n in range(90)]
RECIPE = "w16-kv8"


def cached(checkpoint: Checkpoint, ids: list[int]) -> list[tuple[np.ndarray, np.ndarray]]:
    """Rotated keys and values [heads, tokens, size] of each layer with attention, by transformers."""
    import torch

    from edgeq import transformer

    with torch.inference_mode():
        model = transformer.instantiate(checkpoint, lambda _: True)
        past = model(input_ids=torch.tensor([ids]), use_cache=True).past_key_values
    kept = [layer for layer in past.layers if getattr(layer, "keys", None) is not None]
    return [(layer.keys[0].numpy(), layer.values[0].numpy()) for layer in kept]


@pytest.mark.parametrize("generation", GENERATIONS)
def test_ranges_bound_keys_at_every_position_and_are_the_values_own(tiny: Build, generation: str) -> None:
    checkpoint = Checkpoint.open(tiny(generation))
    found = keyvalues.calibrated(checkpoint, np.array([IDS], np.int32), quiet)
    layers = cached(checkpoint, IDS)
    assert len(found.keys) == len(found.values) == len(layers)
    for keys, values, (rotated, kept) in zip(found.keys, found.values, layers, strict=True):
        assert (keys >= abs(rotated).max(axis=1) - 1e-5).all()
        np.testing.assert_allclose(values, abs(kept).max(axis=1), rtol=1e-5)


def test_sampled_texts_are_the_same_in_every_build(tiny: Build) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    first, second = (keyvalues.calibrated(checkpoint, None, quiet) for _ in range(2))
    np.testing.assert_array_equal(first.keys, second.keys)
    np.testing.assert_array_equal(first.values, second.values)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_bundle_with_an_8_bit_cache_decodes_nearly_as_without(built: Build, generation: str) -> None:
    small, whole = (
        backends.get("onnx").load(folder, bundle.read(folder))
        for folder in (built(generation, RECIPE), built(generation, "w16"))
    )
    np.testing.assert_allclose(small.logits(IDS), whole.logits(IDS), atol=0.05)
    tokens = list(small.generate(IDS, 12))
    scored = small.logits(IDS + tokens)[len(IDS) - 1 : -1]
    assert (scored.max(axis=1) - scored[np.arange(12), tokens] < 0.05).all()


@pytest.mark.parametrize("generation", GENERATIONS)
def test_the_states_are_a_quarter_as_large(built: Build, generation: str) -> None:
    import onnx_ir as ir

    for graph in (weights.MODEL, weights.SCORER):
        model = ir.load(built(generation, RECIPE) / graph).graph
        states = [value for value in (*model.inputs, *model.outputs) if value.name.split(".")[-1] in ("key", "value")]
        assert states
        assert {value.dtype for value in states} == {ir.DataType.INT8}


def test_given_ranges_take_the_place_of_calibration(tiny: Build, tmp_path: Path) -> None:
    import onnx_ir as ir

    checkpoint, plan = Checkpoint.open(tiny("3")), planning.plan(str(tiny("3")), target="x86-avx2", recipe_name=RECIPE)
    shape = (2, checkpoint.model.kv_heads, checkpoint.model.head_dim)
    ranges = CacheRanges(np.full(shape, 3, np.float32), np.full(shape, 5, np.float32))
    backends.get("onnx").build(Job(checkpoint, plan.recipe, plan.target, 256, quiet, cache=ranges), tmp_path)
    node = next(node for node in ir.load(tmp_path / weights.MODEL).graph if node.op_type == "GroupQueryAttention")
    for index, largest in ((12, 3), (13, 5)):
        scales = node.inputs[index].const_value.numpy()
        assert scales.shape == (shape[1], 1, shape[2])
        assert (127 * scales > largest).all()


def test_a_channel_that_is_always_zero_has_a_scale_that_divides() -> None:
    np.testing.assert_array_equal(keyvalues.scales(np.zeros((1, 2), np.float32)), [[[1, 1]]])


def test_no_provider_but_the_processor_gets_an_8_bit_cache(built_for: Build) -> None:
    with pytest.raises(UsageFault, match="on processors only"):
        built_for("webgpu", "3", "w4g32-e8-rtn-kv8")


def test_a_float16_cache_is_refused_with_the_recipe_that_works(tiny: Build) -> None:
    with pytest.raises(UsageFault) as caught:
        backends.get("onnx").check(Checkpoint.open(tiny("3")).model, parse("w4g32-e8-rtn-kv16"))
    assert "--recipe w4g32-e8-rtn-kv8" in str(caught.value)
