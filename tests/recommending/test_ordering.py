from __future__ import annotations

import datetime
from collections.abc import Mapping
from typing import Any

import pytest

from edgeq import catalog
from edgeq.catalog import Entry, Scores
from edgeq.recommending import ordering
from edgeq.recommending.ordering import Order

CATALOGUE = ordering.of_catalogue()


def entry(name: str, **modes: Mapping[str, float]) -> Entry:
    facts: dict[str, Any] = {
        "name": name,
        "title": name,
        "hub": f"Qwen/{name}",
        "generation": "3",
        "license": "Apache-2.0",
    }
    return Entry(
        **facts,
        released=datetime.date(2025, 1, 1),
        commercial=True,
        context=4096,
        thinking="default-on",
        modality=("text",),
        parameters=1,
        sources=("made up",),
        config={},
        scores={mode: Scores("made up", dict(values)) for mode, values in modes.items()},
    )


def order(*entries: Entry) -> Order:
    return ordering.order(entries)


def score(name: str) -> float:
    quality = CATALOGUE.quality(name)
    assert quality is not None
    return quality.score


def test_every_model_of_the_catalogue_has_a_place() -> None:
    assert set(CATALOGUE.strengths) == set(catalog.names())
    for name in catalog.names():
        quality = CATALOGUE.quality(name)
        assert quality is not None
        assert 0 < quality.low < quality.score < quality.high < 100
        assert quality.source
        assert quality.compared_on >= 6


@pytest.mark.parametrize(("newer", "older"), [("qwen3-1.7b", "qwen2.5-3b"), ("qwen3-4b", "qwen2.5-7b")])
def test_a_generation_is_worth_about_twice_the_size(newer: str, older: str) -> None:
    assert abs(score(newer) - score(older)) < 4
    one, other = CATALOGUE.quality(newer), CATALOGUE.quality(older)
    assert one is not None
    assert other is not None
    assert one.low < other.high


def test_the_seed_claims_hold_by_name() -> None:
    assert CATALOGUE.alike("qwen3-1.7b", "qwen2.5-3b")
    assert "MMLU-Redux 64.4 against 64.4" in CATALOGUE.compared("qwen3-1.7b", "qwen2.5-3b")
    assert not CATALOGUE.alike("qwen3-4b", "qwen2.5-0.5b")


def test_quality_does_not_go_by_size() -> None:
    assert score("qwen3.5-4b") > score("qwen3-8b") > score("qwen2.5-7b")
    assert score("qwen3-4b-instruct-2507") > score("qwen3-8b")
    assert score("qwen3.5-2b") > score("qwen2.5-3b")


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_within_a_generation_the_order_is_that_of_every_published_table(generation: str) -> None:
    plain = [name for name in catalog.names() if catalog.load(name).generation == generation and "2507" not in name]
    assert [score(name) for name in plain] == sorted(score(name) for name in plain)


def test_scores_of_another_benchmark_or_mode_are_not_compared() -> None:
    made = order(
        entry("a", non_thinking={"MMLU-Redux": 60, "GPQA": 50}),
        entry("b", non_thinking={"MMLU-Redux": 60, "GPQA-Diamond": 90}),
        entry("c", thinking={"MMLU-Redux": 99, "GPQA": 99}),
    )
    assert made.strengths["a"] == pytest.approx(made.strengths["b"])
    assert "c" not in made.strengths
    assert made.quality("c") is None
    assert made.compared("a", "b") == "MMLU-Redux 60 against 60, answering directly"
    assert made.compared("a", "c") == "no benchmark in common, compared through other models"


def test_models_without_a_benchmark_in_common_are_compared_through_others() -> None:
    made = order(
        entry("low", non_thinking={"MMLU-Redux": 40}),
        entry("middle", non_thinking={"MMLU-Redux": 60, "MMMLU": 40}),
        entry("high", non_thinking={"MMMLU": 60}),
    )
    assert made.strengths["low"] < made.strengths["middle"] < made.strengths["high"]


def test_a_cycle_of_noisy_comparisons_becomes_one_order() -> None:
    made = order(
        entry("a", non_thinking={"MMLU-Redux": 62, "Y": 40, "W": 50}),
        entry("b", non_thinking={"MMLU-Redux": 58, "X": 62, "W": 50}),
        entry("c", non_thinking={"X": 58, "Y": 44, "W": 50}),
    )
    assert max(made.strengths.values()) - min(made.strengths.values()) < 0.1
    assert made.alike("a", "b")
    assert made.alike("b", "c")
    assert made.alike("c", "a")


def test_what_thinking_adds_to_all_is_no_quality() -> None:
    made = order(
        entry("both", non_thinking={"MMLU-Redux": 60}, thinking={"MMLU-Redux": 80}),
        entry("direct", non_thinking={"MMLU-Redux": 60}),
        entry("thinker", thinking={"MMLU-Redux": 80}),
    )
    assert made.strengths["thinker"] == pytest.approx(made.strengths["direct"], abs=1e-6)
    quality = made.quality("thinker")
    assert quality is not None
    assert quality.score == pytest.approx(60, abs=0.1)
    assert quality.published is None
    assert "inferred" in (quality.inferred or "")


def test_a_model_with_scores_of_thinking_alone_has_a_wider_interval() -> None:
    thinker, direct = CATALOGUE.quality("qwen3-4b-thinking-2507"), CATALOGUE.quality("qwen3-4b")
    assert thinker is not None
    assert direct is not None
    assert thinker.high - thinker.low > 1.5 * (direct.high - direct.low)
    assert direct.inferred is None
    assert direct.published == 77.3


def test_one_benchmark_that_disagrees_with_all_others_counts_less() -> None:
    names = [f"B{number}" for number in range(8)]
    fair = dict.fromkeys(names, 60.0)
    made = order(
        entry("odd", non_thinking=fair | {"MMLU-Redux": 5.0}),
        entry(
            "usual",
            non_thinking={name: 60.5 - 0.1 * number for number, name in enumerate(names)} | {"MMLU-Redux": 60.0},
        ),
        entry(
            "other",
            non_thinking={name: 60.0 + 0.1 * number for number, name in enumerate(names)} | {"MMLU-Redux": 60.5},
        ),
    )
    assert abs(made.strengths["odd"] - made.strengths["usual"]) < 0.15


def test_thinking_is_published_apart() -> None:
    published = ordering.thinking(catalog.load("qwen3-4b"))
    assert published is not None
    assert (published.score, published.benchmark) == (83.7, "MMLU-Redux")
    assert ordering.thinking(catalog.load("qwen2.5-7b")) is None
