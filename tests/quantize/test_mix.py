from __future__ import annotations

import itertools
import math

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
