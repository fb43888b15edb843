from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest

import edgeq
from edgeq import catalog, planning, tables, target, units
from edgeq.errors import NothingFits, UsageFault
from edgeq.estimating import asked
from edgeq.recommending import recommend
from edgeq.recommending.document import Constraints, Recommendation

HEAVY = ("torch", "transformers", "onnxruntime", "numpy", "onnx_ir", "llama_cpp", "tvm")
KEYS = {
    *("model", "generation", "recipe", "backend", "memory_bytes", "decode_tokens_per_s", "prefill_tokens_per_s"),
    *("quality", "loss", "evidence", "license", "verdict", "reasons"),
}


@pytest.fixture(autouse=True)
def _no_rows_of_ones_own(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture(scope="module")
def jetson() -> Recommendation:
    return recommend.recommend("jetson")


def test_the_document_has_the_promised_keys(jetson: Recommendation) -> None:
    document = json.loads(msgspec.json.encode(jetson))
    assert document.keys() >= {"target", "context", "constraints", "choice", "candidates"}
    assert document["target"] == "jetson-orin-nano-super-8gb"
    for each in document["candidates"]:
        assert each.keys() >= KEYS
        assert each["quality"].keys() >= {"score", "benchmark", "source"}
        assert each["loss"].keys() >= {"value", "evidence"}
        assert each["verdict"] in ("chosen", "eligible", "rejected")
    assert document["choice"] == document["candidates"][0]


def test_one_is_chosen_and_each_other_says_in_one_line_why_not(jetson: Recommendation) -> None:
    assert [each.verdict for each in jetson.candidates].count("chosen") == 1
    assert jetson.choice is not None
    assert jetson.choice.front
    for each in jetson.candidates:
        assert each.reasons
        assert not any("\n" in reason for reason in each.reasons)
        assert (each.verdict == "rejected") == bool(each.excluded_by)


def test_an_8_gb_jetson_gets_a_4b_in_4_bits(jetson: Recommendation) -> None:
    assert jetson.choice is not None
    assert jetson.choice.model in ("qwen3.5-4b", "qwen3-4b-instruct-2507")
    assert jetson.choice.recipe.startswith("w4g32-")


def test_qwen35_4b_runs_in_8_gb_only_quantized(jetson: Recommendation) -> None:
    rows = [each for each in jetson.candidates if each.model == "qwen3.5-4b"]
    assert {each.verdict for each in rows if each.recipe.startswith("w16")} == {"rejected"}
    assert {each.excluded_by for each in rows if each.recipe.startswith("w16")} == {("memory",)}
    assert {each.verdict for each in rows if each.recipe.startswith("w4")} <= {"chosen", "eligible"}


def test_it_does_not_always_say_8_bits() -> None:
    chosen = [
        recommend.recommend(name, wanted=Constraints(max_memory_bytes=2_000_000_000)).choice
        for name in ("pi5", "jetson")
    ]
    for each in chosen:
        assert each is not None
        assert not each.recipe.startswith("w8")


def test_quality_falls_by_a_share_that_depends_on_the_size(jetson: Recommendation) -> None:
    lost = {
        each.model: each.loss.value
        for each in jetson.candidates
        if each.recipe == "w4g32-e4-rtn" and each.backend == "llamacpp"
    }
    assert lost["qwen2.5-0.5b"] > 1.5 * lost["qwen3-4b"] > 1.5 * lost["qwen3.5-9b"] * 0.75
    for each in jetson.candidates:
        assert each.quality is not None
        assert each.score == pytest.approx(each.quality.score * (1 - each.loss.value))


def test_eligible_ones_come_before_rejected_ones(jetson: Recommendation) -> None:
    order = [("chosen", "eligible", "rejected").index(each.verdict) for each in jetson.candidates]
    assert order == sorted(order)


def test_a_wish_is_met_for_sure() -> None:
    found = recommend.recommend("jetson", wanted=Constraints(min_tps=15, license="open", max_loss=0.15))
    assert found.choice is not None
    for each in found.candidates:
        if each.verdict != "rejected":
            assert each.decode_tokens_per_s is not None
            assert each.decode_tokens_per_s.low >= 15
            assert each.loss.high <= 0.15
            assert each.commercial


def test_vision_is_found_and_what_edgeq_leaves_out_is_said() -> None:
    found = recommend.recommend("jetson", wanted=Constraints(capability=("vision",)))
    assert found.choice is not None
    assert found.choice.generation == "3.5"
    assert any("vision tower is left out" in note for note in found.notes)


def test_a_long_context_leaves_the_models_that_can_read_it() -> None:
    found = recommend.recommend("jetson-agx-orin-64gb", context=131072)
    assert found.choice is not None
    assert found.choice.generation == "3.5" or found.choice.model.endswith("2507")
    assert found.excluded["context"] > 0


def test_at_long_context_the_hybrid_overtakes() -> None:
    found = recommend.recommend("jetson-agx-orin-32gb", context=32768)
    rows = {
        each.model: each
        for each in found.candidates
        if (each.recipe, each.backend) == ("w4g32-e8-rtn-kv16", "llamacpp")
    }
    hybrid, plain = rows["qwen3.5-4b"], rows["qwen3-4b"]
    assert hybrid.decode_tokens_per_s is not None
    assert plain.decode_tokens_per_s is not None
    assert hybrid.decode_tokens_per_s.mid > plain.decode_tokens_per_s.mid
    assert hybrid.memory_bytes is not None
    assert plain.memory_bytes is not None
    assert hybrid.memory_bytes < 0.6 * plain.memory_bytes


def test_when_nothing_fits_the_constraint_that_excluded_most_and_the_closest_miss_are_named() -> None:
    found = recommend.recommend("jetson", wanted=Constraints(min_tps=5000))
    assert found.choice is None
    assert found.closest is not None
    assert next(iter(found.excluded)) == "min-tps"
    with pytest.raises(NothingFits) as caught:
        recommend.require(found)
    assert "min-tps excluded most" in str(caught.value)
    assert found.closest.title in str(caught.value)
    assert caught.value.exit_code == 3
    assert caught.value.run.startswith("edgeq recommend ... --min-tps ")
    nearer = recommend.recommend("jetson", wanted=Constraints(min_tps=float(caught.value.run.split()[-1])))
    assert nearer.choice is not None
    quickest = max(each.decode_tokens_per_s.low for each in found.candidates if each.decode_tokens_per_s)
    assert found.closest.decode_tokens_per_s is not None
    assert found.closest.decode_tokens_per_s.low == quickest


@pytest.mark.parametrize(
    "wanted",
    [
        Constraints(max_memory_bytes=500_000_000),
        Constraints(max_ttft_s=0.01),
        Constraints(max_loss=0.0001, min_tps=90),
        Constraints(license="open", min_tps=1000),
    ],
)
def test_the_remedy_is_met(wanted: Constraints) -> None:
    with pytest.raises(NothingFits) as caught:
        recommend.require(recommend.recommend("jetson", wanted=wanted))
    words = caught.value.run.split()[3:]
    given = dict(zip(words[::2], words[1::2], strict=True))
    relaxed = msgspec.structs.replace(
        wanted,
        min_tps=float(given["--min-tps"]) if "--min-tps" in given else wanted.min_tps,
        max_ttft_s=float(given["--max-ttft"]) if "--max-ttft" in given else wanted.max_ttft_s,
        max_loss=float(given["--max-loss"]) if "--max-loss" in given else wanted.max_loss,
        max_memory_bytes=units.parse_bytes(given["--max-memory"])
        if "--max-memory" in given
        else wanted.max_memory_bytes,
    )
    assert relaxed != wanted
    assert recommend.recommend("jetson", wanted=relaxed).choice is not None


@pytest.mark.parametrize(("name", "context"), [("jetson", 300 << 10), ("jetson", 1 << 20), ("pi4", 1 << 20)])
def test_a_context_that_no_model_reads_is_remedied_by_one_that_some_does(name: str, context: int) -> None:
    with pytest.raises(NothingFits) as caught:
        recommend.require(recommend.recommend(name, context=context))
    words, tokens = caught.value.run.rsplit(maxsplit=1)
    assert words == "edgeq recommend ... --context"
    assert 262144 // 2 < int(tokens) <= 262144
    assert recommend.recommend(name, context=int(tokens)).choice is not None


def test_a_context_that_does_not_fit_is_remedied_by_one_that_does() -> None:
    only: dict[str, Any] = {"recipes": ["w16"], "engines": ["llamacpp"]}
    with pytest.raises(NothingFits) as caught:
        recommend.require(recommend.recommend("jetson", context=1 << 18, **only))
    words = caught.value.run.split()
    assert words[:4] == ["edgeq", "recommend", "...", "--context"]
    assert recommend.recommend("jetson", context=int(words[4]), **only).choice is not None
    assert recommend.recommend("jetson", context=int(words[4]) + 4096, **only).choice is None


def test_the_models_own_limit_is_no_estimate() -> None:
    own, fitting = (asked.ask(name, target="jetson") for name in ("qwen3-0.6b", "qwen3.5-4b"))
    assert tables._fitting(own) == "32768 tokens fit, the model's own limit"
    assert fitting.max_context is not None
    assert fitting.max_context < fitting.model_context
    assert tables._fitting(fitting) == f"~{fitting.max_context} tokens fit"


def test_estimates_read_no_more_than_the_catalogue_lists() -> None:
    assert catalog.load("qwen3-0.6b").context == 32768
    with pytest.raises(UsageFault, match="40000"):
        asked.ask("qwen3-0.6b", target="jetson", context=40000)


def test_only_measured_rows_where_these_are_asked_for() -> None:
    found = recommend.recommend("x86-avx512-vnni", wanted=Constraints(evidence="measured"))
    assert found.choice is None
    closest = {each.model for each in found.candidates if each.evidence == "measured"}
    assert closest == {"demo-qwen2.5", "demo-qwen3", "demo-qwen3.5"}
    with pytest.raises(NothingFits) as caught:
        recommend.require(found)
    assert caught.value.run == "edgeq recommend ... --evidence any --max-memory 8GB"
    assert "demo-" not in str(caught.value)
    assert "no model with published scores was measured" in found.notes[-1]
    assert any("nothing was measured" in note for note in recommend.recommend("jetson").notes)


def test_what_a_target_doubts_is_said_where_the_choice_is_made() -> None:
    doubt = target.load("jetson-nano").install_doubt
    assert doubt is not None
    assert "not known to install" in doubt
    assert doubt in recommend.recommend("jetson-nano").notes
    assert doubt in planning.plan("qwen3.5-2b", target="jetson-nano", backend="onnx", offline=True).notes


def test_speeds_from_figures_of_other_devices_or_apis_are_said_to_be_so() -> None:
    notes = {name: recommend.recommend(name).notes for name in ("orange-pi-5", "snapdragon-8-elite-phone", "jetson")}
    assert "speeds with llamacpp: no published figure is of orange-pi-5 or of a device like it" in notes["orange-pi-5"]
    assert any(
        "the figures are of opencl, edgeq's llamacpp runs on vulkan" in each
        for each in notes["snapdragon-8-elite-phone"]
    )
    assert not any(each.startswith("speeds with") for each in notes["jetson"])


@pytest.mark.parametrize("name", ["jetson-nano", "jetson-xavier-nx-8gb"])
def test_a_backend_that_the_target_does_not_have_is_not_planned_for(name: str) -> None:
    with pytest.raises(UsageFault, match="has no backend mlc") as caught:
        planning.plan("qwen3.5-2b", target=name, backend="mlc", offline=True)
    assert caught.value.run.endswith("--backend llamacpp")


def test_a_backend_that_is_none_is_told_from_recipes_that_do_not_suit() -> None:
    with pytest.raises(UsageFault, match="has no backend llamacp") as caught:
        recommend.for_build("jetson", backend="llamacp")
    assert "Did you mean llamacpp" in caught.value.why
    assert caught.value.run == "edgeq build ... --backend llamacpp"
    assert recommend.for_build("jetson", backend="llama.cpp").backend == "llamacpp"


def test_no_choice_is_called_cautious_where_there_is_none() -> None:
    found = recommend.recommend("x86-avx2")
    assert found.choice is None
    assert not any("choice" in note for note in found.notes)
    assert any("one measured model of 100 MB or more gives those of its backend" in note for note in found.notes)
    eight = recommend.recommend("x86-avx2", wanted=Constraints(max_memory_bytes=8_000_000_000))
    assert any("the choice is a cautious one" in note for note in eight.notes)


def test_a_build_for_unknown_memory_names_words_that_build_has() -> None:
    with pytest.raises(NothingFits) as caught:
        recommend.for_build("x86-avx2", backend="onnx")
    assert "memory" in caught.value.why
    assert caught.value.run.startswith("edgeq recommend --target x86-avx2 --max-memory 8GB, then edgeq build MODEL")


def test_a_build_that_is_too_small_for_any_model_names_the_smallest() -> None:
    with pytest.raises(NothingFits, match=r"no model fits 100\.0 MB") as caught:
        recommend.for_build("jetson", backend="llamacpp", max_size=100_000_000)
    assert "The smallest, qwen2.5-0.5b" in caught.value.why
    size = units.parse_bytes(caught.value.run.split()[-1])
    assert recommend.for_build("jetson", backend="llamacpp", max_size=size).model == "qwen2.5-0.5b"


def test_python_has_the_same_words() -> None:
    found = edgeq.recommend("jetson", context=2048, max_memory_bytes=3_000_000_000)
    assert found.context == 2048
    assert found.choice is not None
    assert found.choice.memory_bytes is not None
    assert found.choice.memory_bytes <= 3_000_000_000


@pytest.mark.parametrize("name", ["jetson", "raspberry-pi-5-8gb", "apple-m4"])
def test_nothing_heavy_is_imported(name: str) -> None:
    script = (
        "import sys; from edgeq import cli; code = cli.main(sys.argv[1:]); "
        f"print([name for name in {HEAVY!r} if name in sys.modules], file=sys.stderr); sys.exit(code)"
    )
    words = [sys.executable, "-c", script, "recommend", "--target", name, "--json"]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr.strip()) == (0, "[]")
    assert json.loads(child.stdout.splitlines()[-1])["choice"]["verdict"] == "chosen"


@pytest.mark.slow
@pytest.mark.parametrize("name", target.names())
def test_every_target_has_a_choice_or_says_what_it_does_not_know(name: str) -> None:
    found = recommend.recommend(name)
    assert found.candidates
    if found.choice is None:
        assert target.load(name).memory.total_bytes is None
        found = recommend.recommend(name, wanted=Constraints(max_memory_bytes=8_000_000_000))
    assert found.choice is not None
    assert found.choice.commercial
