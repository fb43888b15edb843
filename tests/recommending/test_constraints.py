from __future__ import annotations

from typing import Any

import pytest

from edgeq.errors import UsageFault
from edgeq.estimating.speed import Range
from edgeq.recommending import constraints
from edgeq.recommending.document import Constraints
from edgeq.recommending.quantization import Loss
from recommended import candidate

ROOM = 8 << 30


def missed(wanted: Constraints, usable: int | None = ROOM, **figures: Any) -> dict[str, str]:
    return {miss.constraint: miss.reason for miss in constraints.missed(candidate(**figures), wanted, usable)}


def test_nothing_is_missed_where_nothing_is_wanted() -> None:
    assert missed(Constraints()) == {}


def test_a_speed_is_met_only_by_the_low_end_of_its_interval() -> None:
    speed = Range(10.15, 20.05, 29.95)
    assert missed(Constraints(min_tps=10), decode_tokens_per_s=speed) == {}
    reason = missed(Constraints(min_tps=20), decode_tokens_per_s=speed)["min-tps"]
    assert reason == "marginal: ~20.1 [10.2, 29.9] tokens/s, 20 are wanted"
    assert missed(Constraints(min_tps=30), decode_tokens_per_s=speed)["min-tps"].startswith("slow: ")
    unknown: dict[str, Any] = {
        "decode_tokens_per_s": None,
        "basis": "decode = a formula",
        "unknown": "the bandwidth is not known",
    }
    assert missed(Constraints(min_tps=1), **unknown) == {"min-tps": "its speed is unknown: the bandwidth is not known"}


def test_a_carried_speed_is_no_measured_one() -> None:
    figures: dict[str, Any] = {
        "evidence": "measured",
        "measured_depth": 0,
        "decode_tokens_per_s": Range(8.0, 10.0, 12.0),
    }
    assert missed(Constraints(min_tps=9), **figures)["min-tps"].startswith("marginal: ~10.0 [8.0, 12.0]")


def test_a_first_token_is_met_only_by_the_high_end() -> None:
    wait = Range(1.0, 2.0, 4.0)
    assert missed(Constraints(max_ttft_s=4), first_token_s=wait) == {}
    assert missed(Constraints(max_ttft_s=3), first_token_s=wait)["max-ttft"].startswith("marginal: ")
    assert missed(Constraints(max_ttft_s=0.5), first_token_s=wait)["max-ttft"].startswith("slow: ")
    assert "unknown" in missed(Constraints(max_ttft_s=9), first_token_s=None)["max-ttft"]


def test_a_loss_is_met_only_by_the_high_end() -> None:
    loss = Loss(value=0.05, low=0.03, high=0.08, evidence="published", basis="made up")
    assert missed(Constraints(max_loss=0.08), loss=loss) == {}
    assert missed(Constraints(max_loss=0.04), loss=loss)["max-loss"].startswith("marginal: quantization costs ~5.0%")
    assert missed(Constraints(max_loss=0.02), loss=loss)["max-loss"].startswith("lossy: ")


def test_memory_is_that_of_the_device_and_of_the_wish() -> None:
    assert missed(Constraints(), memory=ROOM, evidence="measured") == {}
    assert missed(Constraints(), memory=ROOM + 1)["memory"] == "needs ~8.00 GiB, 8.00 GiB are usable"
    marginal = "marginal: needs ~8.00 GiB and up to 5% more, 8.00 GiB are usable"
    assert missed(Constraints(), memory=ROOM - 1)["memory"] == marginal
    assert missed(Constraints(), memory=7 << 30) == {}
    assert set(missed(Constraints(max_memory_bytes=1 << 30), memory=2 << 30)) == {"max-memory"}
    assert "does not say" in missed(Constraints(), usable=None)["memory"]
    assert missed(Constraints(max_memory_bytes=4 << 30), usable=None) == {}


def test_a_licence_for_research_is_not_open() -> None:
    assert missed(Constraints(license="open")) == {}
    assert "not for commercial use" in missed(Constraints(license="open"), model="qwen2.5-3b")["license"]
    assert missed(Constraints(license="any"), model="qwen2.5-3b") == {}


@pytest.mark.parametrize(
    ("word", "able", "unable"),
    [
        ("vision", "qwen3.5-2b", "qwen3-1.7b"),
        ("video", "qwen3.5-2b", "qwen2.5-3b"),
        ("thinking", "qwen3-4b", "qwen2.5-7b"),
    ],
)
def test_a_capability_is_the_catalogues(word: str, able: str, unable: str) -> None:
    assert missed(Constraints(capability=(word,)), model=able) == {}
    assert missed(Constraints(capability=(word,)), model=unable)["capability"] == f"no {word}"


def test_a_context_is_the_models_own_at_most() -> None:
    assert missed(Constraints(), model="qwen3.5-2b", context=262144) == {}
    assert "32768 tokens at most" in missed(Constraints(), model="qwen3-4b", context=65536)["context"]


def test_evidence_is_that_of_the_figures() -> None:
    assert set(missed(Constraints(evidence="measured"))) == {"evidence"}
    assert missed(Constraints(evidence="measured"), evidence="measured") == {}
    assert set(missed(Constraints(evidence="estimated"), evidence="measured")) == {"evidence"}


def test_a_model_without_published_scores_is_never_ranked() -> None:
    unknown = {"quality": None, "score": None, "hub": None, "license": None, "commercial": None}
    assert "its quality is unknown" in missed(Constraints(), **unknown)["quality"]


@pytest.mark.parametrize(
    "wanted",
    [
        Constraints(license="free"),
        Constraints(capability=("smell",)),
        Constraints(evidence="hearsay"),
        Constraints(min_tps=0),
        Constraints(max_ttft_s=-1),
        Constraints(max_loss=float("nan")),
        Constraints(max_loss=5),
    ],
)
def test_words_that_mean_nothing_are_refused(wanted: Constraints) -> None:
    with pytest.raises(UsageFault) as caught:
        constraints.check(wanted)
    assert caught.value.run.startswith("edgeq recommend ... ")


def test_what_is_wrong_with_a_number_is_said() -> None:
    with pytest.raises(UsageFault, match="finite"):
        constraints.check(Constraints(max_ttft_s=float("inf")))
    with pytest.raises(UsageFault, match="share of the quality") as caught:
        constraints.check(Constraints(max_loss=5))
    assert caught.value.run.endswith("--max-loss 0.05")
    constraints.check(Constraints(max_loss=1))
    with pytest.raises(UsageFault) as caught:
        constraints.check(Constraints(evidence="mesured"))
    assert caught.value.run == "edgeq recommend ... --evidence measured or estimated or any"
