from __future__ import annotations

import numpy as np
import pytest

from checkpoints import Build
from edgeq import model
from edgeq.backends.onnx import weights
from edgeq.checkpoint import Checkpoint
from edgeq.quantize.solve import solve
from edgeq.recipe import SHIPPED, parse
from edgeq.size import TABLES, is_quantized

GENERATIONS = ("2.5", "3", "3.5")


def initializers(folder: object) -> dict[str, np.ndarray]:
    import onnx_ir as ir

    graph = ir.load(f"{folder}/{weights.MODEL}").graph
    return {name: value.const_value.numpy() for name, value in graph.initializers.items() if value.const_value}


def unpacked(packed: np.ndarray, bits: int) -> np.ndarray:
    if bits == 8:
        return packed
    return np.stack([packed & 15, packed >> 4], axis=-1).reshape(*packed.shape[:-1], -1)


def test_four_bit_codes_are_packed_with_the_earlier_input_in_the_lower_bits() -> None:
    packed = weights.pack(np.array([[1, 2, 15, 0]], np.uint8), 4)
    assert packed.tolist() == [[0x21, 0x0F]]


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


@pytest.mark.parametrize("recipe", ["w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_packed_bytes_dequantize_to_the_solution(built: Build, tiny: Build, generation: str, recipe: str) -> None:
    checkpoint, stored = Checkpoint.open(tiny(generation)), initializers(built(generation, recipe))
    for name in ("model.layers.1.mlp.down_proj.weight", TABLES[0]):
        solution = solve(checkpoint, parse(recipe), name)
        codes = unpacked(stored[f"{name}.codes"], solution.bits).reshape(solution.codes.shape)
        np.testing.assert_array_equal(codes, solution.codes)
        np.testing.assert_array_equal(stored[f"{name}.scales"], solution.scales)


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


@pytest.mark.parametrize("recipe", SHIPPED)
@pytest.mark.parametrize("generation", GENERATIONS)
def test_predicted_bits_per_weight_are_those_of_the_file(built: Build, generation: str, recipe: str) -> None:
    """Second views of the table, rotary caches and the convolution's bias of zeros are the graph's, not the model's."""
    from edgeq.bundle import read

    folder = built(generation, recipe)
    made = read(folder)
    added = ("table", "cache", "conv1d.bias")
    held = sum(array.nbytes for name, array in initializers(folder).items() if not any(part in name for part in added))
    shape = model.read_config(made.config)
    assert 8 * held / shape.parameters == pytest.approx(made.bits_per_weight, rel=0.01)
