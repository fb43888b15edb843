from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import pytest

from edgeq.recommending import front
from edgeq.recommending.document import Candidate, Thinking
from edgeq.recommending.quantization import Loss
from recommended import around, candidate


def chosen(*given: Candidate) -> tuple[Candidate, Sequence[Candidate]]:
    eligible = front.marked(front.timed(given))
    return front.choose(eligible), eligible


def test_what_is_beaten_in_everything_is_not_on_the_front() -> None:
    better, worse = candidate(score=80, tps=20), candidate("qwen3-8b", score=79, tps=19, memory=4 << 30)
    small = candidate("qwen3-0.6b", score=40, tps=18, memory=1 << 30)
    _, eligible = chosen(better, worse, small)
    assert [each.front for each in eligible] == [True, False, True]


def test_estimates_do_not_rank_engines() -> None:
    choice, eligible = chosen(candidate(tps=17), candidate(tps=24, backend="mlc"))
    assert choice.backend == "llamacpp"
    assert [each.front for each in eligible] == [True, False]
    assert front.why_lost(eligible[1], choice, eligible).startswith("llamacpp is named first for this device")


def test_measured_rows_come_before_estimates_and_rank_engines() -> None:
    guess, slow = candidate(tps=30), candidate(tps=17, backend="onnx", evidence="measured")
    choice, eligible = chosen(guess, slow)
    assert choice.backend == "onnx"
    assert front.why_lost(eligible[0], choice, eligible).startswith("onnx was measured")
    assert chosen(guess, slow, candidate(tps=24, backend="mlc", evidence="measured"))[0].backend == "mlc"


def test_the_choice_is_the_best_balance_however_near_the_others_are() -> None:
    first = candidate(score=80.1, tps=16.8, recipe="w4g32-e8-rtn")
    second = candidate(score=79.5, tps=18.4, memory=(3 << 30) - 1, recipe="w4g32-e4-rtn")
    for given in ((first, second), (second, first)):
        choice, eligible = chosen(*given)
        assert choice.recipe == "w4g32-e4-rtn"
        assert front.balance(choice) == max(map(front.balance, eligible))


def test_of_equals_the_first_in_the_targets_order_is_chosen_and_the_other_says_so() -> None:
    same = [candidate(recipe=name) for name in ("w4g32-e8-rtn", "w4g32-e4-rtn")]
    choice, eligible = chosen(*same)
    assert choice.recipe == "w4g32-e8-rtn"
    reason = front.why_lost(eligible[1], choice, eligible)
    assert reason.startswith("the same balance, and the target's order names it later")


def test_the_choice_weighs_quality_against_waiting() -> None:
    quick, good = candidate("qwen3-1.7b", score=70, tps=40), candidate(score=72, tps=20, memory=4 << 30)
    assert chosen(quick, good)[0].score == 70
    assert chosen(quick, candidate(score=84, tps=20, memory=4 << 30))[0].score == 84


def test_a_few_points_are_not_worth_more_than_twice_the_bits() -> None:
    four = candidate(score=79.9, tps=22, recipe="w4g32-e8-rtn")
    eight = candidate(score=83.4, tps=12, memory=5 << 30, recipe="w8g32-e8-rtn")
    assert chosen(four, eight)[0].recipe == "w4g32-e8-rtn"
    quick = candidate(score=79.9, tps=200, recipe="w4g32-e8-rtn")
    assert chosen(quick, candidate(score=83.4, tps=120, memory=5 << 30, recipe="w8g32-e8-rtn"))[0].score == 83.4


def test_slower_than_reading_only_where_nothing_is_faster() -> None:
    slow, quick = candidate("qwen3-8b", score=90, tps=3.9), candidate("qwen3-0.6b", score=45, tps=8, memory=1 << 30)
    choice, eligible = chosen(slow, quick)
    assert choice.model == "qwen3-0.6b"
    assert front.why_lost(eligible[0], choice, eligible).startswith("writes more slowly than people read")
    choice, eligible = chosen(slow, candidate("qwen3-4b", score=70, tps=3, memory=2 << 30))
    assert choice.model == "qwen3-8b"
    assert front.why_chosen(choice, eligible)[0].startswith("nothing writes as fast as people read: the fastest of 2")
    assert front.why_lost(eligible[1], choice, eligible).startswith("slower still: ")


def test_what_may_be_as_fast_as_people_read_is_not_cut() -> None:
    doubtful = candidate("qwen3.5-0.8b", score=45, tps=4.9, decode_tokens_per_s=around(4.9, 1.7))
    quick = candidate("qwen2.5-0.5b", score=20, tps=8, memory=1 << 30)
    choice, eligible = chosen(doubtful, quick)
    assert choice.model == "qwen3.5-0.8b"
    assert front.why_lost(eligible[1], choice, eligible).startswith("worse balance")


def test_a_model_that_always_thinks_pays_for_its_thoughts() -> None:
    thinking = Thinking(always=True, published=None, direct_score=None, seconds_per_1000_tokens=around(50))
    thinker, direct = candidate("qwen3-4b-thinking-2507", score=80, thinking=thinking), candidate(score=76)
    choice, eligible = chosen(thinker, direct)
    assert choice.model == "qwen3-4b"
    assert eligible[0].answer_s is not None
    assert eligible[1].answer_s is not None
    assert round(eligible[0].answer_s - eligible[1].answer_s) == 1000 / 20


def test_reading_the_prompt_counts_where_it_is_known_for_any() -> None:
    unknown = candidate("qwen3-8b", first_token_s=None)
    known, slow = front.timed([candidate(), unknown])
    (alone,) = front.timed([unknown])
    assert known.answer_s == pytest.approx((512 / 20 + front.ANSWER) / 20)
    assert slow.answer_s == pytest.approx((512 + front.ANSWER) / 20)
    assert alone.answer_s == front.ANSWER / 20
    assert [each.answer_without_prompt for each in (known, slow, alone)] == [False, False, True]


def test_seconds_that_leave_out_the_prompt_are_at_least_so_many() -> None:
    unknown: dict[str, Any] = {"first_token_s": None, "prefill_tokens_per_s": None}
    choice, eligible = chosen(
        candidate(**unknown), candidate("qwen3-0.6b", score=40, tps=40, memory=1 << 30, **unknown)
    )
    assert "at least ~13 s for an answer" in front.why_chosen(choice, eligible)[0]
    assert "at least ~6 s for an answer against at least ~13 s" in front.why_lost(eligible[1], choice, eligible)


def test_a_candidate_of_unknown_speed_is_the_last_resort() -> None:
    unknown = candidate("qwen3.5-9b", score=90, decode_tokens_per_s=None, first_token_s=None)
    assert chosen(unknown, candidate(score=60))[0].score == 60
    assert chosen(unknown)[0].score == 90


def test_where_no_speed_is_known_the_choice_is_cautious() -> None:
    large = candidate("qwen3.5-9b", score=87, memory=18 << 30, decode_tokens_per_s=None, first_token_s=None)
    small = candidate("qwen3.5-2b", score=66, memory=3 << 30, decode_tokens_per_s=None, first_token_s=None)
    choice, eligible = chosen(large, small)
    assert choice.model == "qwen3.5-2b"
    assert front.why_chosen(choice, eligible)[0].startswith("speed unknown: the best balance out of caution")
    assert front.why_lost(eligible[0], choice, eligible).startswith("speed unknown: the smaller one out of caution")


def test_where_no_speed_is_known_no_reason_asserts_one() -> None:
    unknown: dict[str, Any] = {"decode_tokens_per_s": None, "first_token_s": None}
    sizes = [("qwen3.5-9b", 87, 18), ("qwen3-8b", 80, 19), ("qwen3.5-2b", 66, 3), ("qwen3-0.6b", 40, 1)]
    choice, eligible = chosen(*(candidate(name, score, memory=size << 30, **unknown) for name, score, size in sizes))
    assert choice.model == "qwen3.5-2b"
    reasons = {each.model: front.why_lost(each, choice, eligible) for each in eligible if each is not choice}
    assert not any("slow" in reason or "fast" in reason for reason in reasons.values())
    assert reasons["qwen3-8b"].startswith("qwen3.5-9b w4g32-e8-rtn llamacpp is at least as good and small")
    assert reasons["qwen3-0.6b"].startswith(
        "speed unknown: worse balance out of caution, as if weights were read at 10"
    )


def test_reasons_name_the_benchmarks_and_the_figures() -> None:
    lossy = Loss(value=0.05, low=0.03, high=0.08, evidence="published", basis="made up")
    best = candidate("qwen3-4b-instruct-2507", score=82, tps=20, loss=lossy)
    lost = candidate("qwen3-1.7b", score=63, tps=40, memory=2 << 30)
    choice, eligible = chosen(lost, best)
    reason = front.why_lost(eligible[0], choice, eligible)
    assert reason.startswith("worse balance of quality and waiting: ~63.0 points against ~82.0")
    assert "; ~2.00 GiB against ~3.00 GiB; " in reason
    assert "MMLU-Redux 64.4 against 84.2" in reason
    assert "answering directly" in reason
    assert "\n" not in reason
    words = " ".join(front.why_chosen(choice, eligible))
    assert "quantization costs ~5.0%" in words
    assert "MMLU-Redux" in words


def test_a_choice_that_may_not_be_sold_says_so() -> None:
    choice, eligible = chosen(candidate("qwen2.5-3b", score=62))
    assert "not for commercial use" in front.why_chosen(choice, eligible)[-1]
