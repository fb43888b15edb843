from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from checkpoints import config_of
from edgeq.backends.llamacpp import blocks, limits
from edgeq.errors import UnsupportedModel, UsageFault
from edgeq.model import Model, read_config
from edgeq.quantize import rtn
from edgeq.quantize.solution import Solution
from edgeq.recipe import parse

INPUTS = 96


def solution(bits: int, zero_points: np.ndarray | None = None) -> Solution:
    weights = np.random.default_rng(3).normal(0, 0.05, (7, INPUTS)).astype(np.float32)
    codes, scales, symmetric = rtn.quantize(weights, bits, 32)
    return Solution("some.weight", bits, 32, codes, scales, symmetric if zero_points is None else zero_points)


def dequantized(packed: np.ndarray, layout: str) -> np.ndarray:
    import gguf

    found: np.ndarray = gguf.dequantize(packed, gguf.GGMLQuantizationType[layout])
    return found


@pytest.mark.parametrize(("bits", "layout", "row_bytes"), [(4, "Q4_0", 54), (8, "Q8_0", 102)])
def test_symmetric_solutions_are_packed_exactly(bits: int, layout: str, row_bytes: int) -> None:
    made = solution(bits)
    packed = blocks.pack(made)
    assert packed.shape == (7, row_bytes)
    np.testing.assert_array_equal(dequantized(packed, layout), made.dequantize())


def test_some_rows_are_packed_as_they_are_within_the_whole() -> None:
    made = solution(4)
    np.testing.assert_array_equal(blocks.pack(made, slice(2, 5)), blocks.pack(made)[2:5])


@pytest.mark.parametrize("bits", [4, 8])
def test_zero_points_are_refused_where_a_block_has_none(bits: int) -> None:
    with pytest.raises(UsageFault, match="no zero points"):
        blocks.pack(solution(bits, np.full((7, INPUTS // 32), 3, np.uint8)))


def shape(generation: str, **changes: object) -> Model:
    return dataclasses.replace(read_config(config_of(generation)), **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("group", [16, 64, 128])
def test_other_groups_are_refused_with_a_recipe_that_works(group: int) -> None:
    with pytest.raises(UsageFault, match=r"model\.embed_tokens\.weight.*\n.*\n.*w4g32-e8-rtn"):
        limits.check(shape("3"), parse(f"w4g{group}-e8-rtn"))
    limits.check(shape("3"), parse("w4g32-e8-rtn"))


@pytest.mark.parametrize(
    ("given", "offered"),
    [
        ("w4g64-eq4_1-rtn", "w4g32-eq4_1-rtn"),
        ("w8g64-e4-rtn-kv8", "w8g32-e4-rtn-kv8"),
        ("w4g64-eiq4_nl-rtn-kv16", "w4g32-eiq4_nl-rtn-kv16"),
    ],
)
def test_the_recipe_that_is_offered_instead_keeps_the_rest(given: str, offered: str) -> None:
    with pytest.raises(UsageFault) as caught:
        limits.check(shape("3", head_dim=32), parse(given))
    assert caught.value.run == f"edgeq build ... --recipe {parse(offered)}"


@pytest.mark.parametrize(
    ("given", "offered", "narrow"),
    [
        ("w4ag32-e8-mse", "q4_1-e8-rtn", "q4_1-e8-rtn"),
        ("w4ag64-e16-rtn-kv16", "q4_1-e16-rtn-kv16", "q4_1-e16-rtn-kv16"),
        ("w2g32-e8-rtn", "q2_k-e8-rtn", "q4_1-e8-rtn"),
        ("w2ag16-e8-mse", "q2_k-e8-rtn", "q4_1-e8-rtn"),
        ("w8ag32-e8-mse", "w8g32-e8-mse", "w8g32-e8-mse"),
        ("w8gcol-e4-mse", "w8g32-e4-mse", "w8g32-e4-mse"),
    ],
)
def test_zero_points_two_bits_and_columns_are_refused_with_what_comes_closest(
    given: str, offered: str, narrow: str
) -> None:
    wide = shape("3", hidden=256, ffn=512, heads=8, head_dim=32)
    for model, near in ((wide, offered), (shape("3"), narrow)):
        with pytest.raises(UsageFault, match=r"llama\.cpp cannot hold") as caught:
            limits.check(model, parse(given))
        assert caught.value.run == f"edgeq build ... --recipe {near}"
    limits.check(wide, parse(offered))


def test_an_8_bit_cache_needs_heads_that_fill_its_blocks() -> None:
    with pytest.raises(UsageFault, match=r"heads of 16 do not fill blocks.*\n.*\n.*--recipe f32-kv16"):
        limits.check(shape("3", head_dim=16), parse("f32-kv8"))
    limits.check(shape("3", head_dim=16), parse("f32-kv16"))


@pytest.mark.parametrize("change", [{"value_head_dim": 64}, {"value_heads": 3}])
def test_heads_that_llama_cpp_cannot_load_are_refused(change: dict[str, int]) -> None:
    model = shape("3.5")
    assert model.linear is not None
    odd = dataclasses.replace(model, linear=dataclasses.replace(model.linear, **change))
    with pytest.raises(UnsupportedModel, match="key heads of"):
        limits.check(odd, parse("w16"))


def test_rows_that_fill_no_whole_block_are_refused_with_the_tensor() -> None:
    narrow = shape("3", ffn=100)
    with pytest.raises(UsageFault, match=r"100 inputs of model\.layers\.0\.mlp\.down_proj\.weight"):
        limits.check(narrow, parse("w4g32-e8-rtn"))
    limits.check(narrow, parse("w16"))


def test_value_heads_that_split_a_block_are_refused_where_they_change_places() -> None:
    model = shape("3.5")
    assert model.linear is not None
    odd = dataclasses.replace(
        model, linear=dataclasses.replace(model.linear, value_heads=8, key_head_dim=16, value_head_dim=16)
    )
    with pytest.raises(UsageFault, match=r"value heads of 16 split the blocks of model\.layers\.0\.linear_attn\.out"):
        limits.check(odd, parse("w4g32-e8-rtn"))
    same = dataclasses.replace(odd, linear=dataclasses.replace(model.linear, key_heads=8, value_heads=8))
    limits.check(same, parse("w4g32-e8-rtn"))
