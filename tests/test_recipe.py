from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import recipe
from edgeq.errors import UsageFault
from edgeq.recipe import Recipe

caches = st.sampled_from(["", "-kv16", "-kv8"])
bodies = st.one_of(
    st.builds(
        "w{}{}g{}".format,
        st.sampled_from([2, 4, 8]),
        st.sampled_from(["", "a"]),
        st.sampled_from([16, 32, 64, 128, "col"]),
    ),
    st.sampled_from(sorted(recipe.GGML)),
)
methods = st.sampled_from(recipe.METHODS)
names = st.one_of(
    st.builds("{}{}".format, st.sampled_from(sorted(recipe.FLOATS)), caches),
    st.builds(
        "{}-e{}-{}{}".format,
        bodies,
        st.sampled_from(["4", "8", "16", *recipe.GGML]),
        methods,
        caches,
    ).filter(lambda name: name.startswith("w") or "-mse" not in name),
)


@given(names)
def test_every_name_of_the_grammar_is_its_own_definition(name: str) -> None:
    assert str(recipe.parse(name)) == name


def test_the_parts_of_a_name_are_what_they_say() -> None:
    found = recipe.parse("w4g64-e8-rtn")
    assert found == Recipe(recipe.plain(4, 64), recipe.plain(8, 64), "rtn")
    assert (found.body.bits, found.body.group, found.table.bits, found.kv_bits) == (4, 64, 8, 32)
    assert recipe.parse("w16-kv16") == Recipe(recipe.FLOATS["w16"], recipe.FLOATS["w16"], "none", 16)
    assert recipe.parse("q4_k-eq6_k-rtn") == Recipe(recipe.GGML["q4_k"], recipe.GGML["q6_k"], "rtn")
    assert recipe.parse("iq4_nl-e8-rtn-kv8").table == recipe.plain(8, 32)
    assert recipe.parse("w2g16-e16-mse").table == recipe.FLOATS["w16"]


def test_an_asymmetric_body_has_a_symmetric_table() -> None:
    found = recipe.parse("w4ag64-e8-mse")
    assert (found.body.symmetric, found.body.group, found.body.bits, found.method) == (False, 64, 4, "mse")
    assert found.table == recipe.plain(8, 64)
    assert recipe.parse("w4g64-e8-mse").body.symmetric


def test_a_column_is_one_group_of_all_inputs_in_runs_of_a_power_of_two() -> None:
    found = recipe.parse("w8gcol-e8-rtn")
    assert found.body == found.table == recipe.plain(8, recipe.COLUMN)
    assert [(made.group, made.block, made.run) for made in map(found.body.of, (896, 1024, 3072))] == [
        *((896, 16, 128), (1024, 16, 512), (3072, 16, 1024))
    ]
    assert found.body.of(896).stored_bits(32) == 8.25
    assert found.body.of(1024).stored_bits(16) == 8 + 1 / 32
    assert recipe.plain(4, 32).of(1024) == recipe.plain(4, 32)


def test_a_zero_point_takes_the_bits_of_a_code_for_each_group() -> None:
    assert recipe.parse("w4ag32-e8-rtn").body.stored_bits(32) == 5.125
    assert recipe.parse("w2ag64-e8-rtn").body.stored_bits(32) == 2.53125


def test_ggmls_layouts_have_no_search_but_ggmls() -> None:
    with pytest.raises(UsageFault, match="its own search") as caught:
        recipe.parse("q4_k-eq6_k-mse-kv16")
    assert "--recipe q4_k-eq6_k-rtn-kv16" in caught.value.run
    assert recipe.parse("w4g32-eq6_k-mse").table == recipe.GGML["q6_k"]


@pytest.mark.parametrize(
    "name",
    [
        *("", "w4", "w16-e8", "w4g32", "w4g32-e8", "w4g32-rtn", "w4g32-e8-", "w4g32-e8-rtn-rtn", " w16", "w16\n"),
        *("w5g32-e8-rtn", "w4g33-e8-rtn", "w4g0-e8-rtn", "w4g32-e2-rtn", "W4G32-E8-RTN", "w4g32_e8_rtn"),
        *("w3g32-e8-rtn", "wa4g32-e8-rtn", "w4ga32-e8-rtn", "w4gCol-e8-rtn", "w4g-1-e8-rtn", "w4g32-e8a-rtn"),
        *("w4g32-e8-rtn\n", "w4g32-e8-RTN", "w４g32-e8-rtn", "q4_k_m", "q4_k", "Q4_K-e8-rtn", "q4_k-eq9_k-rtn"),
        *("w16-kv32", "w16-kv4", "w4g32-e8-rtn-kv", "w4g32-e8-kv8", "f64", "w4g32-ew16-rtn"),
    ],
)
def test_other_names_are_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(UsageFault, match="is not a recipe") as caught:
        recipe.parse(name)
    assert repr(name) in caught.value.what
    assert "w<2|4|8>g<16|32|64|128|col>" in caught.value.why
    assert "the method is one of rtn, mse, gptq, guided, tuned." in caught.value.why
    assert caught.value.exit_code == 2


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageFault, match="unknown method 'awq'") as caught:
        recipe.parse("w4g32-e8-awq")
    for method in recipe.METHODS:
        assert method in caught.value.why


def test_near_names_are_suggested() -> None:
    for name, meant in (("w4g32-e8", "w4g32-e8-rtn"), ("w4g32-e8-gptqq", "gptq")):
        with pytest.raises(UsageFault) as caught:
            recipe.parse(name)
        assert caught.value.why.startswith("Did you mean ")
        assert meant in caught.value.why.partition("?")[0]


@given(
    st.one_of(st.text(max_size=20), st.from_regex(r"w[0-9]{1,2}a?g(col|[0-9]{1,3})-e[0-9]{1,2}-[a-z]+(-kv(8|16|32))?"))
)
def test_any_text_is_a_recipe_or_a_usage_fault(text: str) -> None:
    try:
        found = recipe.parse(text)
    except UsageFault:
        return
    assert str(found) == text


def test_bits_per_weight_count_one_float32_scale_for_each_group() -> None:
    assert recipe.parse("w4g32-e8-rtn").body.stored_bits(32) == 5.0
    assert recipe.parse("w4g32-e8-rtn").table.stored_bits(32) == 9.0
    assert recipe.parse("w4g32-e8-rtn").body.stored_bits(16) == 4.5
    assert recipe.parse("w8g128-e8-rtn").body.stored_bits(32) == 8.25
    assert recipe.parse("w16").body.stored_bits(32) == 16.0


def test_ggml_layouts_take_what_ggml_says_whatever_a_plain_scale_takes() -> None:
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType

    for name, layout in recipe.GGML.items():
        values, size = GGML_QUANT_SIZES[GGMLQuantizationType[name.upper()]]
        assert (layout.block, layout.bits_of_block) == (values, 8 * size)
        assert layout.stored_bits(16) == layout.stored_bits(32) == 8 * size / values


def test_fewer_bits_may_lose_more() -> None:
    limits = [
        recipe.parse(name).max_loss
        for name in (
            *("f32", "w16", "w8g32-e8-rtn", "q6_k-e8-rtn", "q5_k-e8-rtn", "w4g32-e8-rtn"),
            *("q3_k-e8-rtn", "q2_k-e8-rtn", "w2g32-e8-rtn"),
        )
    ]
    assert limits == sorted(limits)
    assert limits[0] > 0


@pytest.mark.parametrize("name", recipe.SHIPPED)
def test_every_shipped_recipe_is_in_the_grammar(name: str) -> None:
    assert str(recipe.parse(name)) == name
