"""An 8-bit cache: its scales hold what calibration saw, and decoding with it stays near the float32 one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from checkpoints import GENERATIONS, Build, quiet
from edgeq import backends, building, bundle, planning
from edgeq.backends.base import CacheRanges, Job
from edgeq.backends.onnx import keyvalues, weights
from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageFault
from edgeq.recipe import parse

IDS = [(7 * n + 3) % 256 for n in range(90)]
RECIPE = "w16-kv8"


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


def test_scales_hold_what_calibration_saw(tiny: Build, tmp_path: Path) -> None:
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


@pytest.mark.slow
@pytest.mark.parametrize("name", ["demo-qwen2.5", "demo-qwen3", "demo-qwen3.5"])
def test_the_demos_pass_the_gate_calibrated_with_their_own_text(tmp_path: Path, name: str) -> None:
    plan = planning.plan(name, target="x86-avx2", backend="onnx", recipe_name=RECIPE, context=256, out=tmp_path / "out")
    made = building.build(plan, quiet)
    assert made.gate.kl_mean is not None
    assert made.gate.kl_mean < 1e-4
    record = bundle.read(plan.out).calibration
    assert record is not None
    assert (record.source, record.tokens) == ("bundled", 32 * 512)


def test_a_text_can_be_given_for_the_cache_of_a_recipe_that_needs_none_for_weights(tiny: Build, tmp_path: Path) -> None:
    text = tmp_path / "mine.txt"
    text.write_text("The cache holds what was read before. " * 50, encoding="utf-8")
    words = {"target": "x86-avx2", "recipe_name": "w8g32-e8-rtn-kv8", "calibration_text": str(text), "context": 256}
    plan = planning.plan(str(tiny("3")), backend="onnx", out=tmp_path / "out", **words)  # type: ignore[arg-type]
    building.build(plan, quiet)
    record = bundle.read(plan.out).calibration
    assert record is not None
    assert (record.source, record.sha256) == (str(text), bundle.sha256(text))
    with pytest.raises(UsageFault, match="has no use for w8g32-e8-rtn-kv8"):
        planning.plan(str(tiny("3")), backend="null", **words)  # type: ignore[arg-type]


def test_a_channel_that_is_always_zero_has_a_scale_that_divides() -> None:
    np.testing.assert_array_equal(keyvalues.scales(np.zeros((1, 2), np.float32)), [[[1, 1]]])


def test_no_provider_but_the_processor_is_planned_an_8_bit_cache_for() -> None:
    words = {"target": "steam-deck-oled", "recipe_name": "w4g32-e8-rtn-kv8", "backend": "onnx", "offline": True}
    with pytest.raises(UsageFault, match="on processors only") as caught:
        planning.plan("demo-qwen3", **words)  # type: ignore[arg-type]
    assert "webgpu" in caught.value.why
    assert caught.value.run.endswith("--recipe w4g32-e8-rtn, or --backend llamacpp")


def test_a_float16_cache_is_refused_with_the_recipe_that_works(tiny: Build) -> None:
    with pytest.raises(UsageFault) as caught:
        backends.get("onnx").check(Checkpoint.open(tiny("3")).model, parse("w4g32-e8-rtn-kv16"))
    assert "--recipe w4g32-e8-rtn-kv8" in str(caught.value)
