from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import recipe
from edgeq.errors import UsageFault
from edgeq.recipe import Recipe

names = st.one_of(
    st.just("w16"),
    st.builds(
        "w{}g{}-e{}-{}".format,
        st.sampled_from([4, 8]),
        st.sampled_from([16, 32, 64, 128]),
        st.sampled_from([4, 8]),
        st.sampled_from(recipe.METHODS),
    ),
)


@given(names)
def test_every_name_of_the_grammar_is_its_own_definition(name: str) -> None:
    assert str(recipe.parse(name)) == name


def test_the_parts_of_a_name_are_what_they_say() -> None:
    assert recipe.parse("w4g64-e8-rtn") == Recipe(bits=4, group=64, table_bits=8, method="rtn")
    assert recipe.parse("w16") == Recipe(bits=16, group=0, table_bits=16, method="none")


@pytest.mark.parametrize(
    "name",
    [
        *("", "w4", "w16-e8", "w4g32", "w4g32-e8", "w4g32-rtn", "w4g32-e8-", "w4g32-e8-rtn-rtn", " w16", "w16\n"),
        *("w5g32-e8-rtn", "w4g33-e8-rtn", "w4g0-e8-rtn", "w4g32-e16-rtn", "W4G32-E8-RTN", "w4g32_e8_rtn"),
        *("w4g32-e8-rtn\n", "w4g32-e8-RTN", "w４g32-e8-rtn", "q4_k_m"),
    ],
)
def test_other_names_are_refused_with_the_grammar(name: str) -> None:
    with pytest.raises(UsageFault, match="is not a recipe") as caught:
        recipe.parse(name)
    assert repr(name) in caught.value.what
    assert "w<4|8>g<16|32|64|128>-e<4|8>-<method>" in caught.value.why
    assert caught.value.exit_code == 2


def test_an_unknown_method_is_refused_with_the_known_ones() -> None:
    with pytest.raises(UsageFault, match="unknown method 'gptq'") as caught:
        recipe.parse("w4g32-e8-gptq")
    for method in recipe.METHODS:
        assert method in caught.value.why


@given(st.one_of(st.text(max_size=20), st.from_regex(r"w[0-9]{1,2}g[0-9]{1,3}-e[0-9]{1,2}-[a-z]+")))
def test_any_text_is_a_recipe_or_a_usage_fault(text: str) -> None:
    try:
        found = recipe.parse(text)
    except UsageFault:
        return
    assert str(found) == text


def test_bits_per_weight_count_one_float32_scale_for_each_group() -> None:
    assert recipe.parse("w4g32-e8-rtn").stored_bits(4) == 5.0
    assert recipe.parse("w4g32-e8-rtn").stored_bits(8) == 9.0
    assert recipe.parse("w8g128-e8-rtn").stored_bits(8) == 8.25
    assert recipe.parse("w16").stored_bits(16) == 16.0


def test_fewer_bits_may_lose_more() -> None:
    limits = [recipe.parse(name).max_loss for name in ("w16", "w8g32-e8-rtn", "w4g32-e8-rtn")]
    assert limits == sorted(limits)
    assert limits[0] > 0


@pytest.mark.parametrize("name", recipe.SHIPPED)
def test_every_shipped_recipe_is_in_the_grammar(name: str) -> None:
    assert str(recipe.parse(name)) == name
