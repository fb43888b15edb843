"""What a bug in a quantizer or a packer does to the demo checkpoints, and that the gate sees each."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import cast

import numpy as np
import pytest

from checkpoints import quiet
from edgeq import accuracy, backends, building, bundle, gate, planning
from edgeq.backends.base import Job
from edgeq.backends.onnx import weights
from edgeq.errors import GateFailed
from edgeq.quantize.solution import Solution
from edgeq.quantize.solve import solve
from edgeq.sources import DEMOS

pytestmark = pytest.mark.slow
RECIPE = "w4g32-e8-rtn"
QUERIES = {"demo-qwen2.5": 1, "demo-qwen3": 1, "demo-qwen3.5": 3}


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    @cache
    def make(model: str) -> Path:
        out = tmp_path_factory.mktemp("demo") / model
        building.build(planning.plan(model, target="x86-avx2", recipe_name=RECIPE, out=out, context=256), quiet)
        return out

    return make


class Stored:
    """One initializer of a bundle's copy, changed in the file."""

    def __init__(self, folder: Path, name: str) -> None:
        import onnx_ir as ir

        tensor = ir.load(folder / weights.MODEL).graph.initializers[name].const_value
        kind = np.uint8 if name.endswith(".codes") else np.float32
        shape = tuple(tensor.shape)
        self.values = np.memmap(folder / weights.DATA, kind, "r+", tensor.offset, shape)


def zeroed_layer(folder: Path, model: str) -> None:
    """Every matrix of one layer's MLP is zero, as from a writer that skipped it."""
    for part in ("gate_proj", "up_proj", "down_proj"):
        Stored(folder, f"model.layers.1.mlp.{part}.weight.scales").values[:] = 0


def swapped_queries_and_keys(folder: Path, model: str) -> None:
    """The first query heads' rows and the keys' rows have changed places in the fused matrix."""
    made = bundle.read(folder)
    config = made.config
    rows = int(str(config["num_attention_heads"])) * int(str(config["head_dim"]))
    rows *= 2 if made.generation == "3.5" else 1
    keys = int(str(config["num_key_value_heads"])) * int(str(config["head_dim"]))
    for part in ("codes", "scales"):
        values = Stored(folder, f"model.layers.{QUERIES[model]}.self_attn.qkv_proj.weight.{part}").values
        first = values[:keys].copy()
        values[:keys] = values[rows : rows + keys]
        values[rows : rows + keys] = first


def wrong_scale(folder: Path, model: str) -> None:
    """One matrix has scales of twice their size, as from a grid of one bit less."""
    Stored(folder, "model.layers.1.mlp.down_proj.weight.scales").values[:] *= 2


@pytest.mark.parametrize("damage", [zeroed_layer, swapped_queries_and_keys, wrong_scale])
@pytest.mark.parametrize("model", DEMOS)
def test_the_gate_catches_damage(
    demo: Callable[[str], Path], tmp_path: Path, model: str, damage: Callable[[Path, str], None]
) -> None:
    folder = Path(shutil.copytree(demo(model), tmp_path / "damaged"))
    damage(folder, model)
    made = bundle.read(folder)
    session = backends.get("onnx").load(folder, made)
    reference = accuracy.load(folder / bundle.REFERENCE)
    found = gate.check(reference, session, made.gate.max_loss, made.gate.kl_weights_only, quiet)
    assert made.gate.passed
    assert not found.passed, f"KL {found.kl_mean} against {made.gate.kl_mean}"
    assert "KL divergence" in str(found.reason)


@pytest.mark.parametrize("model", DEMOS)
def test_damage_to_the_graph_that_decodes_alone_is_caught_too(
    demo: Callable[[str], Path], tmp_path: Path, model: str
) -> None:
    import onnx_ir as ir

    folder = Path(shutil.copytree(demo(model), tmp_path / "damaged"))
    graph = ir.load(folder / weights.MODEL)
    nodes = {node.name: node for node in graph.graph}
    lookup = next(node for node in graph.graph if node.op_type == "GatherBlockQuantized")
    nodes["/lm_head/prune/Gather"].replace_input_with(0, lookup.outputs[0])
    ir.save(graph, folder / weights.MODEL)
    made = bundle.read(folder)
    session = backends.get("onnx").load(folder, made)
    reference = accuracy.load(folder / bundle.REFERENCE)
    found = gate.check(reference, session, made.gate.max_loss, made.gate.kl_weights_only, quiet)
    assert not found.passed
    assert found.kl_mean == pytest.approx(made.gate.kl_mean)


@pytest.mark.parametrize("model", DEMOS)
def test_the_undamaged_demo_is_far_below_its_limit(demo: Callable[[str], Path], model: str) -> None:
    made = bundle.read(demo(model)).gate
    assert made.kl_mean is not None
    assert made.kl_mean < made.max_loss / 2


def test_a_build_with_a_broken_packer_fails_with_4_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(job: Job, name: str) -> Solution:
        found = cast(Solution, solve(job.checkpoint, job.recipe, name))
        if "down_proj" in found.name:
            found.scales[:] *= 2
        return found

    monkeypatch.setattr(Job, "solution", broken)
    plan = planning.plan("demo-qwen3", target="x86-avx2", recipe_name=RECIPE, out=tmp_path / "out", context=256)
    with pytest.raises(GateFailed) as caught:
        building.build(plan, quiet)
    assert caught.value.exit_code == 4
    assert not plan.out.exists()
