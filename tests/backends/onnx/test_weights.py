from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from checkpoints import Build
from edgeq import model
from edgeq.backends.onnx import weights
from edgeq.checkpoint import Checkpoint
from edgeq.quantize.solution import Solution
from edgeq.quantize.solve import solve
from edgeq.recipe import parse
from edgeq.size import TABLES, is_quantized

GENERATIONS = ("2.5", "3", "3.5")
NEW = ("w2g32-e8-mse", "w2ag64-e8-mse", "w4ag16-e4-mse", "w8ag32-e8-rtn", "w4agcol-e8-mse", "w8gcol-e4-rtn")
TABLE_OF_FLOATS = "w4g32-e16-rtn"


def each_generation(*recipes: str) -> pytest.MarkDecorator:
    """Every recipe in every generation; rarer layouts of the two that have Qwen3.5's attention alone are slow."""
    cases = [(generation, recipe) for recipe in recipes for generation in GENERATIONS]
    rare = [case for case in cases if case[0] != "3.5" and case[1] in (*NEW, TABLE_OF_FLOATS)]
    return pytest.mark.parametrize(
        ("generation", "recipe"),
        [pytest.param(*case, marks=[pytest.mark.slow] if case in rare else []) for case in cases],
    )


def initializers(folder: object) -> dict[str, np.ndarray]:
    import onnx_ir as ir

    graph = ir.load(f"{folder}/{weights.MODEL}").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    """Codes [rows, codes], one after another, of bytes [rows, ...]."""
    rows = packed.reshape(len(packed), -1).tolist()
    return np.array(
        [[byte >> place & (1 << bits) - 1 for byte in row for place in range(0, 8, bits)] for row in rows], np.uint8
    )


def test_four_bit_codes_are_packed_with_the_earlier_input_in_the_lower_bits() -> None:
    packed = weights.pack(np.array([[1, 2, 15, 0]], np.uint8), 4)
    assert packed.tolist() == [[0x21, 0x0F]]


def test_two_bit_codes_are_four_to_a_byte() -> None:
    packed = weights.pack(np.array([[1, 2, 3, 0, 3, 1]], np.uint8), 2)
    assert packed.tolist() == [[0b00_11_10_01, 0b00_00_01_11]]


@settings(max_examples=50, deadline=None)
@given(st.integers(0, 2**32), st.sampled_from([2, 4, 8]), st.integers(1, 3), st.integers(1, 40))
def test_any_codes_are_packed_without_loss(seed: int, bits: int, rows: int, columns: int) -> None:
    codes = np.random.default_rng(seed).integers(0, 1 << bits, (rows, columns)).astype(np.uint8)
    packed = weights.pack(codes, bits)
    assert packed.shape == (rows, -(-columns * bits // 8))
    found = unpacked(packed, bits)
    np.testing.assert_array_equal(found[:, :columns], codes)
    assert not found[:, columns:].any()


def test_eight_bit_codes_are_bytes_already() -> None:
    codes = np.arange(4, dtype=np.uint8)[None]
    assert weights.pack(codes, 8) is codes


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_every_matrix_of_the_checkpoint_reaches_the_graph_once(built: Build, generation: str, tied: bool) -> None:
    """What `sources` says of the builder's names covers exactly the tensors that a recipe quantizes."""
    from edgeq.bundle import read

    shape = model.read_config(read(built(generation, "w4g32-e8-rtn", tied=tied)).config)
    kinds = {
        "full_attention": ("attn.qkv_proj", "attn.o_proj"),
        "linear_attention": ("linear_attn.qkv_proj", "linear_attn.z_proj", "linear_attn.out_proj"),
    }
    names = ["lm_head.MatMul.weight"] + ([] if tied else [TABLES[0]])
    for layer, kind in enumerate(shape.layer_types):
        for part in (*kinds[kind], "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj"):
            names.append(f"model.layers.{layer}.{part}.MatMul.weight")
    found = [source for name in names for source in weights.sources(name, shape)]
    assert sorted(found) == sorted(filter(is_quantized, shape.tensors()))


@each_generation("w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn", *NEW)
def test_packed_bytes_dequantize_to_the_solution(built: Build, tiny: Build, generation: str, recipe: str) -> None:
    checkpoint, stored = Checkpoint.open(tiny(generation)), initializers(built(generation, recipe))
    for name in ("model.layers.1.mlp.down_proj.weight", TABLES[0]):
        solution = solve(checkpoint, parse(recipe), name)
        assert isinstance(solution, Solution)
        codes = unpacked(stored[f"{name}.codes"], solution.bits).reshape(solution.codes.shape)
        np.testing.assert_array_equal(codes, solution.codes)
        np.testing.assert_array_equal(stored[f"{name}.scales"], solution.scales)
        assert (f"{name}.zeros" in stored) is not solution.symmetric
        if not solution.symmetric:
            groups = solution.scales.shape[1]
            zeros = unpacked(stored[f"{name}.zeros"], solution.bits)
            np.testing.assert_array_equal(zeros[:, :groups], solution.zero_points)


def test_a_column_that_is_no_power_of_two_is_stored_in_runs_that_are(tiny: Build, built_odd: Build) -> None:
    name, folder = "model.layers.0.mlp.down_proj.weight", built_odd("w4gcol-e8-mse")
    stored, solution = initializers(folder), solve(Checkpoint.open(folder.parent), parse("w4gcol-e8-mse"), name)
    assert isinstance(solution, Solution)
    assert (solution.group, solution.scales.shape) == (96, (64, 1))
    assert stored[f"{name}.codes"].shape == (64, 3, 16)
    np.testing.assert_array_equal(stored[f"{name}.scales"], np.repeat(solution.scales, 3, axis=1))


@each_generation(*NEW, TABLE_OF_FLOATS)
def test_logits_are_those_of_the_dequantized_weights(
    built: Build,
    quantized: Callable[[str, str, list[int]], np.ndarray],
    tmp_path: Path,
    generation: str,
    recipe: str,
) -> None:
    """Exactly with float32 activations; the kernels that bundles use round activations to 8 bits too."""
    import onnx_ir as ir

    from edgeq.backends import onnx
    from edgeq.bundle import read

    ids, folder = [*range(40, 72)], tmp_path / "bundle"
    shutil.copytree(built(generation, recipe), folder)
    wanted = quantized(generation, recipe, ids)
    for limit, level in ((0.06, None), (5e-4, 0)):
        if level is not None:
            model = ir.load(folder / weights.SCORER)
            for node in model.graph:
                if node.op_type == "MatMulNBits":
                    node.attributes.add(ir.AttrInt64("accuracy_level", level))
            ir.save(model, folder / weights.SCORER)
        session = onnx.load(folder, read(folder))
        found = session.logits(ids)
        session.close()
        assert np.sqrt(np.square(found - wanted).mean() / np.square(wanted).mean()) < limit


def test_two_bits_without_a_kernel_are_refused_with_the_nearest_recipe() -> None:
    from checkpoints import config_of
    from edgeq.backends import onnx
    from edgeq.errors import UsageFault

    shape = model.read_config(config_of("3"))
    for name, near in (("w2ag16-e8-mse", "w2ag32-e8-mse"), ("w2gcol-e16-rtn", "w2g128-e16-rtn")):
        with pytest.raises(UsageFault, match="no fast kernel") as caught:
            onnx.check(shape, parse(name))
        assert caught.value.run.endswith(f"--recipe {near}")
        onnx.check(shape, parse(near))


def test_a_tied_table_is_stored_once_for_lookup_and_output(built: Build) -> None:
    import onnx_ir as ir

    folder = built("3", "w4g32-e8-rtn")
    graph = ir.load(folder / weights.MODEL).graph
    table, codes = (graph.initializers[f"{TABLES[0]}.{part}"].const_value for part in ("table", "codes"))
    assert (table.offset, table.length) == (codes.offset, codes.length)


@pytest.mark.parametrize(("dtype", "kind"), [("bf16", "BFLOAT16"), ("f16", "FLOAT16")])
def test_sixteen_bit_weights_are_the_checkpoints_own_bytes(built: Build, tiny: Build, dtype: str, kind: str) -> None:
    import onnx_ir as ir

    name = "model.layers.0.mlp.up_proj.weight"
    checkpoint = Checkpoint.open(tiny("3", dtype=dtype))
    stored = ir.load(built("3", "w16", dtype=dtype) / weights.MODEL).graph.initializers[name].const_value
    assert stored.dtype.name == kind
    np.testing.assert_array_equal(stored.numpy().astype(np.float32), checkpoint.tensor(name))


@each_generation("w16", "w8g32-e8-rtn", "w4g32-e4-rtn", *NEW, TABLE_OF_FLOATS)
def test_predicted_bits_per_weight_are_those_of_the_file(built: Build, generation: str, recipe: str) -> None:
    """Second views of the table, rotary caches and the convolution's bias of zeros are the graph's, not the model's."""
    from edgeq.bundle import read

    folder = built(generation, recipe)
    made = read(folder)
    added = ("table", "cache", "conv1d.bias")
    held = sum(array.nbytes for name, array in initializers(folder).items() if not any(part in name for part in added))
    shape = model.read_config(made.config)
    assert 8 * held / shape.parameters == pytest.approx(made.bits_per_weight, rel=0.02)
