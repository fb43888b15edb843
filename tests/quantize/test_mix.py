from __future__ import annotations

import itertools
import math
from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq.quantize import mix
from edgeq.quantize.mix import Option
from edgeq.recipe import plain

LAYOUTS = (plain(2, 64), plain(4, 128), plain(4, 32), plain(8, 32))
UNITS = st.dictionaries(
    st.sampled_from("abcd"),
    st.lists(st.tuples(st.integers(1, 60), st.integers(0, 60)), min_size=1, max_size=4),
    min_size=1,
)


def options(pairs: list[tuple[int, int]]) -> list[Option]:
    return [Option(layout, size, float(loss)) for layout, (size, loss) in zip(LAYOUTS, pairs, strict=False)]


def best(units: dict[str, list[Option]], room: int) -> float:
    """Least loss within some bytes, by trying all."""
    sums = (
        (sum(each.bytes for each in picked), sum(each.cost for each in picked))
        for picked in itertools.product(*units.values())
    )
    return min((loss for size, loss in sums if size <= room), default=math.inf)


@given(UNITS, st.integers(0, 200))
def test_a_choice_keeps_the_room_and_is_near_the_best(found: dict[str, list[tuple[int, int]]], room: int) -> None:
    units = {name: options(pairs) for name, pairs in found.items()}
    smallest = sum(min(each.bytes for each in given) for given in units.values())
    choice = mix.choose(units, room, 0.0)
    assert choice.bytes == sum(each.bytes for each in choice.options.values())
    assert choice.cost == pytest.approx(sum(each.loss for each in choice.options.values()))
    if smallest > room:
        assert choice.bytes == smallest
        return
    assert choice.bytes <= room
    largest_step = max(each.bytes for given in units.values() for each in given)
    assert choice.cost >= best(units, room)
    assert choice.cost <= best(units, room - largest_step) + 1e-9


@given(UNITS, st.integers(0, 100))
def test_a_loss_that_can_be_kept_is_kept_in_no_more_bytes_than_it_needs(
    found: dict[str, list[tuple[int, int]]], limit: int
) -> None:
    units = {name: options(pairs) for name, pairs in found.items()}
    choice = mix.choose(units, math.inf, limit)
    least = sum(min(each.cost for each in given) for given in units.values())
    assert choice.cost <= max(limit, least)
    assert choice.bytes == sum(each.bytes for each in choice.options.values())
    assert choice.cost == pytest.approx(sum(each.cost for each in choice.options.values()))
    for name, option in choice.options.items():
        smaller = [each for each in mix._hull(units[name]) if each.bytes < option.bytes]
        assert all(choice.cost - option.cost + each.cost > limit for each in smaller)


def test_bytes_go_where_they_save_most() -> None:
    small, large = LAYOUTS[1], LAYOUTS[3]
    units = {
        "sensitive": [Option(small, 10, 9.0), Option(large, 20, 1.0)],
        "dull": [Option(small, 10, 2.0), Option(large, 20, 1.0)],
    }
    chosen = mix.choose(units, 30, 0.0)
    assert {name: option.layout for name, option in chosen.options.items()} == {"sensitive": large, "dull": small}
    assert (chosen.bytes, chosen.cost) == (30, 3.0)


def test_an_option_that_is_larger_and_no_better_is_never_taken() -> None:
    units = {"a": [Option(LAYOUTS[0], 10, 5.0), Option(LAYOUTS[1], 20, 6.0), Option(LAYOUTS[2], 30, 1.0)]}
    assert mix.choose(units, 25, 0.0).options["a"].bytes == 10
    assert mix.choose(units, 30, 0.0).options["a"].bytes == 30


def test_steps_that_a_last_large_one_made_needless_are_taken_back() -> None:
    units = {"a": options([(10, 8), (11, 0)]), "b": options([(10, 60), (40, 0)])}
    choice = mix.choose(units, math.inf, 20.0)
    assert (choice.bytes, choice.cost) == (50, 8.0)


@given(UNITS, st.floats(0.01, 100))
def test_a_text_that_costs_more_in_all_changes_no_mean(found: dict[str, list[tuple[int, int]]], more: float) -> None:
    units = {name: options(pairs) for name, pairs in found.items()}
    dearer = {name: [replace(each, loss=more * each.loss) for each in given] for name, given in units.items()}
    hedged = mix.hedged(units, dearer)
    for name, before in units.items():
        assert [each.loss for each in hedged[name]] == pytest.approx([each.loss for each in before])


def test_a_mean_of_two_texts_has_half_of_what_each_says() -> None:
    one = {name: [Option(LAYOUTS[0], 10, 2.0, 0.5)] for name in "abc"}
    other = {"a": [Option(LAYOUTS[0], 10, 30.0, 20.0)]} | {name: [Option(LAYOUTS[0], 10, 20.0, 5.0)] for name in "bc"}
    hedged = mix.hedged(one, other)
    assert hedged["a"] == [Option(LAYOUTS[0], 10, 2.5, 1.25)]
    assert hedged["b"] == hedged["c"] == [Option(LAYOUTS[0], 10, 2.0, 0.5)]
