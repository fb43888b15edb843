from __future__ import annotations

import re

import pytest

import checkpoints
from edgeq import catalog, size
from edgeq.errors import UsageFault
from edgeq.model import Model, read_config
from edgeq.recipe import parse


def bytes_by_hand(model: Model, body: float, table: float) -> float:
    total = 0.0
    for name, shape in model.tensors().items():
        count = float(shape[0])
        for length in shape[1:]:
            count *= length
        if name in ("model.embed_tokens.weight", "lm_head.weight"):
            total += count * table
        elif len(shape) == 2 and not name.endswith(("in_proj_a.weight", "in_proj_b.weight")):
            total += count * body
        else:
            total += count * 4
    return total


@pytest.mark.parametrize("name", catalog.names())
def test_bytes_are_packed_bits_and_scales_and_float32_for_the_rest(name: str) -> None:
    model = catalog.load(name).model
    assert size.weight_bytes(model, parse("w4g32-e8-rtn")) == bytes_by_hand(model, 0.625, 1.125)
    assert size.weight_bytes(model, parse("w8g32-e8-rtn")) == bytes_by_hand(model, 1.125, 1.125)
    assert size.weight_bytes(model, parse("w4g32-e4-rtn")) == bytes_by_hand(model, 0.625, 0.625)
    assert size.weight_bytes(model, parse("w8g128-e4-rtn")) == bytes_by_hand(model, 1.03125, 0.53125)
    assert size.weight_bytes(model, parse("w16")) == bytes_by_hand(model, 2, 2)


def test_bits_per_weight_are_the_mean_over_all_parameters() -> None:
    model = catalog.load("qwen3-0.6b").model
    assert size.bits_per_weight(model, parse("w16")) == pytest.approx(16.0018, abs=1e-4)
    assert [
        round(size.bits_per_weight(model, parse(name)), 2)
        for name in ("w8g32-e8-rtn", "w8gcol-e8-rtn", "w4g32-e8-rtn", "w4ag32-e8-mse", "w4g32-e4-rtn", "w4g128-e16-mse")
    ] == [9.0, 8.06, 6.05, 6.14, 5.0, 7.32]


@pytest.mark.parametrize("name", catalog.names())
@pytest.mark.parametrize("recipe", ["w16", "w8g32-e8-rtn", "w4ag128-e4-mse", "w2gcol-e8-rtn", "q4_1-eiq4_nl-rtn"])
def test_groups_up_to_128_and_columns_divide_every_model_of_the_catalogue(name: str, recipe: str) -> None:
    size.check_groups(catalog.load(name).model, parse(recipe))


@pytest.mark.parametrize(
    ("generation", "recipe", "matrix"),
    [
        ("2.5", "w4g128-e8-rtn", "64 inputs of model.embed_tokens.weight"),
        ("3", "w8g128-e8-rtn", "64 inputs of model.embed_tokens.weight"),
        ("3", "w4g64-e8-rtn", "96 inputs of model.layers.0.mlp.down_proj.weight"),
    ],
)
def test_a_group_that_does_not_divide_is_refused_with_the_matrix(generation: str, recipe: str, matrix: str) -> None:
    model = read_config(checkpoints.config_of(generation) | {"intermediate_size": 96})
    with pytest.raises(
        UsageFault, match=re.escape(f"{recipe}: group {parse(recipe).body.group} does not divide the")
    ) as caught:
        size.check_groups(model, parse(recipe))
    assert caught.value.what.endswith(matrix)
    assert "a recipe with a smaller group" in caught.value.run
    assert not size.divides(model, parse(recipe))
    size.check_groups(model, parse("w4g32-e8-rtn"))
    assert size.divides(model, parse("w4g32-e8-rtn"))


def test_a_column_has_the_inputs_of_each_matrix() -> None:
    model = catalog.load("qwen3-0.6b").model
    wanted = parse("w4gcol-e8-rtn")
    found = {
        name.rpartition(".mlp.")[2]: size.layout_of(model, wanted, name)
        for name in ("model.embed_tokens.weight", "model.layers.0.mlp.down_proj.weight")
    }
    assert {name: (each.bits, each.group) for name, each in found.items()} == {
        "model.embed_tokens.weight": (8, 1024),
        "down_proj.weight": (4, 3072),
    }


def test_a_column_needs_rows_that_runs_of_16_divide() -> None:
    model = read_config(checkpoints.config_of("3") | {"intermediate_size": 40})
    with pytest.raises(UsageFault, match="group 16 does not divide the 40 inputs"):
        size.check_groups(model, parse("w4gcol-e8-rtn"))
    size.check_groups(read_config(checkpoints.config_of("3") | {"intermediate_size": 48}), parse("w4gcol-e8-rtn"))


def test_groups_matter_to_quantized_matrices_alone() -> None:
    model = read_config(checkpoints.config_of("3.5") | {"hidden_size": 48, "intermediate_size": 64})
    size.check_groups(model, parse("w16"))
    size.check_groups(model, parse("w4g16-e8-rtn"))


def test_projections_and_tables_are_quantized_and_nothing_else() -> None:
    model = catalog.load("qwen3.5-0.8b").model
    floats = {re.sub(r"model\.layers\.\d+\.", "", name) for name in model.tensors() if not size.is_quantized(name)}
    assert floats == {
        *("input_layernorm.weight", "post_attention_layernorm.weight", "model.norm.weight"),
        *("self_attn.q_norm.weight", "self_attn.k_norm.weight"),
        *("linear_attn.in_proj_a.weight", "linear_attn.in_proj_b.weight", "linear_attn.conv1d.weight"),
        *("linear_attn.dt_bias", "linear_attn.A_log", "linear_attn.norm.weight"),
    }


def test_layouts_with_blocks_of_256_are_refused_where_rows_do_not_fill_them() -> None:
    """ggml would cut the rest of each row off without a word."""
    narrow = catalog.load("qwen2.5-0.5b").model
    with pytest.raises(UsageFault, match=r"block 256 does not divide the 896 inputs of model\.layers\.0"):
        size.check_groups(narrow, parse("q4_k-e8-rtn"))
    size.check_groups(narrow, parse("q4_1-e8-rtn"))
    size.check_groups(catalog.load("qwen3-0.6b").model, parse("q4_k-eq6_k-rtn"))


@pytest.mark.parametrize(
    ("recipe", "fallback"),
    [("q2_k", "q4_1"), ("iq4_xs", "q4_1"), ("q4_k", "q4_1"), ("q5_k", "q5_1"), ("q6_k", "w8g32")],
)
def test_value_heads_in_another_order_get_blocks_that_do_not_mix_them(recipe: str, fallback: str) -> None:
    name = "model.layers.0.linear_attn.out_proj.weight"
    wanted = parse(f"{recipe}-e8-rtn")
    small, large = (catalog.load(f"qwen3.5-{each}").model for each in ("0.8b", "4b"))
    assert size.layout_of(small, wanted, name).name == recipe
    assert size.layout_of(large, wanted, name).name == fallback
    assert size.layout_of(large, wanted, name.replace("out_proj", "in_proj_z")).name == recipe
    assert size.layout_of(large, parse("iq4_nl-e8-rtn"), name).name == "iq4_nl"


def test_a_scale_of_sixteen_bits_takes_half_a_bit_less_in_groups_of_32() -> None:
    model = catalog.load("qwen3-0.6b").model
    wide, narrow = (size.bits_per_weight(model, parse("w4g32-e8-rtn"), bits) for bits in (32, 16))
    assert wide - narrow == pytest.approx(0.5, abs=1e-3)
