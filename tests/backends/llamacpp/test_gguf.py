from __future__ import annotations

import dataclasses
from pathlib import Path

import numpy as np
import pytest

import edgeq
from checkpoints import CHAT_TEMPLATE, Build, quiet
from edgeq import backends, recipe, target
from edgeq.backends.base import Job
from edgeq.backends.llamacpp import gguf, tensors
from edgeq.backends.onnx import weights
from edgeq.checkpoint import Checkpoint
from edgeq.errors import UnsupportedModel
from edgeq.quantize.solve import rounded
from edgeq.size import is_quantized
from gguf_files import dequantized, in_file_order, reader

GENERATIONS = ("2.5", "3", "3.5")


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize(
    "name", ["w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn", "q4_1-eiq4_nl-rtn", "q5_1-eq5_0-rtn", "w4g32-e16-mse"]
)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_matrix_dequantizes_to_its_solution(
    packed: Build, tiny: Build, generation: str, name: str, tied: bool
) -> None:
    checkpoint = Checkpoint.open(tiny(generation, tied=tied))
    model, stored = checkpoint.model, dequantized(reader(packed(generation, name, tied=tied)))
    for each in filter(is_quantized, model.tensors()):
        solution = rounded(checkpoint, recipe.parse(name), each)
        np.testing.assert_array_equal(stored[tensors.gguf_name(model, each)], in_file_order(model, each, solution))
    assert ("output.weight" in stored) is not tied


def test_onnx_packs_the_same_solution(packed: Build, built: Build, tiny: Build) -> None:
    import onnx_ir as ir

    name = "model.layers.1.mlp.down_proj.weight"
    graph = ir.load(built("3", "w4g32-e8-rtn") / weights.MODEL).graph
    codes = graph.initializers[f"{name}.codes"].const_value.numpy()
    scales = graph.initializers[f"{name}.scales"].const_value.numpy()
    halves = np.stack([codes & 15, codes >> 4], axis=-1).reshape(*scales.shape, 32).astype(np.float32)
    onnx = ((halves - 8) * scales[:, :, None]).reshape(len(scales), -1)
    np.testing.assert_array_equal(dequantized(reader(packed("3", "w4g32-e8-rtn")))["blk.1.ffn_down.weight"], onnx)


FLOATS = [
    *(("w16", "bf16", "BF16", 0.0), ("w16", "f16", "F16", 0.0), ("w16", "f32", "BF16", 2**-8)),
    *(("f16", "bf16", "F16", 0.0), ("bf16", "f16", "BF16", 2**-8), ("f32", "bf16", "F32", 0.0)),
]


@pytest.mark.parametrize(("name", "dtype", "kind", "error"), FLOATS)
def test_float_matrices_are_the_checkpoints_own_values(
    packed: Build, tiny: Build, name: str, dtype: str, kind: str, error: float
) -> None:
    checkpoint = Checkpoint.open(tiny("3", dtype=dtype))
    found = reader(packed("3", name, dtype=dtype))
    kinds = {each.name: each.tensor_type.name for each in found.tensors}
    assert kinds["token_embd.weight"] == kinds["blk.0.ffn_up.weight"] == kind
    assert kinds["blk.0.attn_norm.weight"] == "F32"
    own = checkpoint.tensor("model.layers.0.mlp.up_proj.weight")
    np.testing.assert_allclose(dequantized(found)["blk.0.ffn_up.weight"], own, rtol=error, atol=1e-7 if error else 0)


def test_metadata_says_what_llama_cpp_asks_for(packed: Build) -> None:
    found = reader(packed("3.5", "w4g32-e8-rtn"))
    said = {name: field.contents() for name, field in found.fields.items()}
    assert said["general.architecture"] == "qwen35"
    assert said["qwen35.full_attention_interval"] == 4
    assert said["qwen35.rope.dimension_count"] == 8
    assert said["qwen35.rope.dimension_sections"] == [2, 1, 1, 0]
    assert said["qwen35.ssm.state_size"] == 32
    assert said["qwen35.ssm.inner_size"] == 128
    assert (said["qwen35.ssm.group_count"], said["qwen35.ssm.time_step_rank"]) == (2, 4)
    assert (said["tokenizer.ggml.model"], said["tokenizer.ggml.pre"]) == ("gpt2", "qwen35")
    assert len(said["tokenizer.ggml.tokens"]) == len(said["tokenizer.ggml.token_type"]) == 288
    assert said["tokenizer.ggml.merges"] == ["Ā Ā"]
    assert said["tokenizer.chat_template"] == CHAT_TEMPLATE
    assert {name: said[name] for name in said if name.startswith("edgeq.")} == {
        "edgeq.version": edgeq.__version__,
        "edgeq.recipe": "w4g32-e8-rtn",
    }


def test_value_heads_are_dealt_out_in_turn(tiny: Build) -> None:
    model = Checkpoint.open(tiny("3.5")).model
    layer = "model.layers.0.linear_attn."
    assert [start for start, _ in tensors.row_runs(model, f"{layer}A_log")] == [0, 2, 1, 3]
    assert list(tensors.row_runs(model, f"{layer}in_proj_qkv.weight"))[:3] == [(0, 128), (128, 160), (192, 224)]
    order = tensors.columns(model, f"{layer}out_proj.weight")
    assert order is not None
    assert order[::32].tolist() == [0, 64, 32, 96]
    assert tensors.columns(model, "model.layers.3.self_attn.o_proj.weight") is None


def test_layers_in_another_pattern_are_refused(tiny: Build, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny("3.5"))
    types = ("full_attention", "linear_attention", "linear_attention", "linear_attention")
    odd = dataclasses.replace(checkpoint, model=dataclasses.replace(checkpoint.model, layer_types=types))
    with pytest.raises(UnsupportedModel, match="not every 1th layer"):
        backends.get("llamacpp").check(odd.model, recipe.parse("w16"))
    with pytest.raises(UnsupportedModel, match="not every 1th layer"):
        gguf.write(Job(odd, recipe.parse("w16"), target.load("x86-avx2"), 256, quiet), tmp_path)


@pytest.mark.parametrize("kind", ["full_attention", "linear_attention"])
def test_layers_of_one_kind_are_refused_before_llama_cpp_aborts(tiny: Build, kind: str) -> None:
    model = dataclasses.replace(Checkpoint.open(tiny("3.5")).model, layer_types=(kind,) * 4)
    with pytest.raises(UnsupportedModel, match=f"all 4 layers are of one kind, {kind}"):
        backends.get("llamacpp").check(model, recipe.parse("w16"))


def test_weights_beyond_float16_are_refused_where_a_recipe_asks_for_it(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    monkeypatch.setattr(Checkpoint, "rows", lambda *_: np.full((2, 64), 7e4, np.float32))
    job = Job(checkpoint, recipe.parse("f16"), target.load("x86-avx2"), 256, quiet)
    with pytest.raises(UnsupportedModel, match=r"weights up to 7e\+04 are too large for f16\nNext: .*bf16"):
        gguf.write(job, tmp_path)


def test_the_same_checkpoint_gives_the_same_bytes(tiny: Build, packed: Build, tmp_path: Path) -> None:
    job = Job(Checkpoint.open(tiny("3")), recipe.parse("w4g32-e8-rtn"), target.load("x86-avx2"), 256, quiet)
    gguf.write(job, tmp_path)
    assert (tmp_path / gguf.MODEL).read_bytes() == (packed("3", "w4g32-e8-rtn") / gguf.MODEL).read_bytes()
