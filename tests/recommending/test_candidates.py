from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeq import backends, catalog, cli, data, profiles, recipe, target
from edgeq.estimating import anchors
from edgeq.profiles import Profile
from edgeq.recommending import candidates
from edgeq.recommending.document import Candidate

JETSON = target.load("jetson")


def demo_row() -> Profile:
    return profiles.read(data.folder("profiles") / "x86-avx512-vnni" / "demo-qwen3.w4g32-e8-rtn.onnx.json")


def save(row: Profile) -> None:
    profiles.write(row, profiles.path(row.target, row.model, row.recipe, row.backend, Path("profiles")))


@pytest.fixture
def work(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_candidates_are_all_models_by_recipes_by_backends_that_can_load_them(work: Path) -> None:
    found = candidates.find(JETSON, 4096)
    assert {each.model for each in found} == set(catalog.names())
    assert {each.backend for each in found} == set(JETSON.backends)
    keys = [(each.model, each.recipe, each.backend) for each in found]
    assert len(set(keys)) == len(keys)
    for each in found:
        backends.get(each.backend).check(catalog.load(each.model).model, recipe.parse(each.recipe))
        assert not (each.backend == "onnx" and each.recipe.endswith("kv16"))


def test_models_below_1b_are_shown(work: Path) -> None:
    small = {each.model for each in candidates.find(JETSON, 4096) if catalog.load(each.model).parameters < 1e9}
    assert small == {"qwen2.5-0.5b", "qwen3-0.6b", "qwen3.5-0.8b"}


def test_no_candidate_is_an_untrained_or_base_checkpoint(work: Path) -> None:
    for each in candidates.find(JETSON, 4096):
        assert each.hub is not None
        assert not each.hub.lower().endswith(("-base", "-init"))
        assert each.hub != catalog.load(each.model).base


def test_a_tied_table_counts_once(work: Path) -> None:
    (found,) = (
        each
        for each in candidates.find(JETSON, 4096, recipes=["w16"], engines=["llamacpp"])
        if each.model == "qwen3-0.6b"
    )
    assert found.weights_bytes == pytest.approx(2 * 596_049_920, rel=0.01)


def test_a_format_that_the_runtime_cannot_load_is_no_candidate(work: Path) -> None:
    found = candidates.find(JETSON, 4096, recipes=["q4_k-eq6_k-rtn", "w4ag32-e8-mse"])
    assert {(each.recipe, each.backend) for each in found} == {
        ("q4_k-eq6_k-rtn", "llamacpp"),
        ("w4ag32-e8-mse", "onnx"),
    }
    assert "qwen2.5-0.5b" not in {each.model for each in found if each.backend == "llamacpp"}


def test_a_measured_row_stands_in_place_of_its_estimate(work: Path) -> None:
    device = target.load("x86-avx512-vnni")
    row = msgspec.structs.replace(demo_row(), model="qwen3-0.6b")
    save(row)
    found = candidates.find(device, 4096)
    measured = [each for each in found if each.evidence == "measured" and each.model == "qwen3-0.6b"]
    assert [(each.recipe, each.backend) for each in measured] == [(row.recipe, row.backend)]
    (one,) = measured
    short = next(each for each in candidates.find(device, 2 * row.decode[0].tokens) if each.title == one.title)
    assert short.decode_tokens_per_s is not None
    assert short.decode_tokens_per_s.mid == row.decode[0].tokens_per_s.median
    assert short.exact_speed
    assert one.loss.evidence == "measured"
    assert row.accuracy is not None
    assert one.loss.kl_mean == row.accuracy.kl_mean
    assert row.memory.peak_rss_bytes is not None
    assert row.memory.kv_cache_bytes_per_token is not None
    assert one.memory_bytes is not None
    assert (
        row.memory.peak_rss_bytes
        < one.memory_bytes
        <= row.memory.peak_rss_bytes + 4096 * row.memory.kv_cache_bytes_per_token
    )
    keys = [(each.model, each.recipe, each.backend) for each in found]
    assert keys.count(("qwen3-0.6b", row.recipe, row.backend)) == 1


@pytest.mark.parametrize("name", ["jetson-orin-nano-super-8gb", "x86-avx512-vnni"])
def test_a_speed_that_was_measured_at_another_depth_is_carried_to_half_the_context(work: Path, name: str) -> None:
    device = target.load(name)
    row = demo_row()
    (decode,) = row.decode
    speed = msgspec.structs.replace(decode.tokens_per_s, low=39.0, median=40.0, high=41.0)
    decode = msgspec.structs.replace(decode, tokens_per_s=speed)
    bundle = msgspec.structs.replace(row.bundle, bytes=400_000_000)
    save(msgspec.structs.replace(row, model="qwen3-0.6b", target=name, decode=(decode,), bundle=bundle))

    def at(context: int) -> Candidate:
        found = candidates.find(device, context)
        return next(each for each in found if each.evidence == "measured" and each.model == "qwen3-0.6b")

    short, long, longer = at(256), at(16384), at(32768)
    assert (short.depth, short.measured_depth, short.exact_speed) == (0, None, True)
    assert (long.depth, long.measured_depth, long.exact_speed) == (8192, 0, False)
    assert "carried from 0 tokens in the cache" in long.basis
    speeds = [each.decode_tokens_per_s for each in (short, long, longer)]
    assert all(speeds)
    first, second, third = (each.mid for each in speeds if each)
    assert first == 40.0
    assert first > 1.2 * second > 1.4 * third
    assert speeds[2] is not None
    assert speeds[2].high > 1.1 * speeds[2].mid, "what was not measured there has an estimate's interval"


def test_a_row_that_is_named_after_the_hub_is_the_catalogues_model(work: Path) -> None:
    save(msgspec.structs.replace(demo_row(), model="qwen2.5-0.5b-instruct", target=JETSON.name))
    assert list(anchors.measured_rows(JETSON)) == [("qwen2.5-0.5b", "w4g32-e8-rtn", "onnx")]


def test_a_measured_recipe_that_is_not_the_targets_is_a_candidate(work: Path) -> None:
    save(msgspec.structs.replace(demo_row(), model="qwen3-0.6b", recipe="w4g32-e8-guided", target=JETSON.name))
    found = candidates.find(JETSON, 4096)
    assert [each.evidence for each in found if each.model == "qwen3-0.6b" and each.recipe == "w4g32-e8-guided"].count(
        "measured"
    ) == 1


def test_a_measured_backend_that_is_not_the_targets_is_a_candidate_where_it_was_measured(work: Path) -> None:
    pi = target.load("raspberry-pi-5-8gb")
    alone = msgspec.structs.replace(pi, backends=("llamacpp",))
    save(msgspec.structs.replace(demo_row(), model="qwen3-0.6b", target=pi.name))
    found = [each for each in candidates.find(alone, 4096) if each.backend == "onnx"]
    assert [(each.model, each.evidence) for each in found] == [("qwen3-0.6b", "measured")]


def test_a_measured_row_of_a_real_model_moves_the_estimates_of_all_others(work: Path) -> None:
    def speed() -> float:
        found = candidates.find(JETSON, 4096, recipes=["w4g32-e8-rtn"], engines=["llamacpp"])
        decode = next(each.decode_tokens_per_s for each in found if each.model == "qwen3-4b")
        assert decode is not None
        return decode.mid

    row, before = demo_row(), speed()
    slow = [
        msgspec.structs.replace(one, tokens_per_s=msgspec.structs.replace(one.tokens_per_s, median=20.0))
        for one in row.decode
    ]
    row = msgspec.structs.replace(
        row, target=JETSON.name, backend="llamacpp", decode=tuple(slow), model="qwen2.5-0.5b-instruct"
    )
    save(row)
    assert speed() == before, "a bundle of some megabytes says nothing about bandwidth"
    save(msgspec.structs.replace(row, bundle=msgspec.structs.replace(row.bundle, bytes=400_000_000)))
    assert speed() < 0.7 * before


def test_a_target_without_a_bandwidth_has_speeds_once_one_model_was_measured(
    work: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def shown() -> str:
        assert cli.main(["recommend", "--target", "x86-avx512-vnni", "--max-memory", "8GB"]) == 0
        return capsys.readouterr().out

    before = " ".join(shown().split())
    assert "edgeq build MODEL --target host" in before
    assert "edgeq profile BUNDLE --save" in before
    row = demo_row()
    slow = [
        msgspec.structs.replace(one, tokens_per_s=msgspec.structs.replace(one.tokens_per_s, median=40.0))
        for one in row.decode
    ]
    bundle = msgspec.structs.replace(row.bundle, bytes=400_000_000)
    save(msgspec.structs.replace(row, bundle=bundle, model="qwen3-0.6b", decode=tuple(slow)))
    after = shown()
    assert "no speed is known" not in after
    lines = [line for line in after.splitlines() if " onnx " in line and "estimated" in line]
    assert lines
    assert all(line.count("~") == 4 for line in lines), "memory, tokens/s, answer, quality"


def test_a_large_bundle_of_an_unknown_model_is_no_anchor_and_no_fault(work: Path) -> None:
    row = msgspec.structs.replace(demo_row(), model="my-own-4b", backend="llamacpp", target=JETSON.name)
    save(msgspec.structs.replace(row, bundle=msgspec.structs.replace(row.bundle, bytes=2_000_000_000)))
    found = candidates.find(JETSON, 4096)
    assert [each.quality for each in found if each.model == "my-own-4b"] == [None]
    assert len(found) > 200


def test_what_must_not_be_used_is_not_used(work: Path) -> None:
    save(msgspec.structs.replace(demo_row(), model="qwen3-0.6b", target=JETSON.name, valid=False))
    assert anchors.measured_rows(JETSON) == {}


def test_a_measured_model_that_nobody_scored_has_no_quality(work: Path) -> None:
    found = [each for each in candidates.find(target.load("x86-avx512-vnni"), 4096) if each.model.startswith("demo-")]
    assert {each.evidence for each in found} == {"measured"}
    assert {each.quality for each in found} == {None}
    assert {each.license for each in found} == {None}


def test_thinking_costs_seconds_on_this_device(work: Path) -> None:
    by_model = {
        each.model: each for each in candidates.find(JETSON, 4096, recipes=["w4g32-e8-rtn"], engines=["llamacpp"])
    }
    one = by_model["qwen3-4b"]
    assert one.thinking is not None
    assert one.decode_tokens_per_s is not None
    assert one.thinking.seconds_per_1000_tokens is not None
    assert one.thinking.seconds_per_1000_tokens.mid == pytest.approx(1000 / one.decode_tokens_per_s.mid)
    assert one.thinking.published is not None
    assert (one.thinking.published.score, one.thinking.direct_score) == (83.7, 77.3)
    assert by_model["qwen2.5-7b"].thinking is None
    always = by_model["qwen3-4b-thinking-2507"].thinking
    assert always is not None
    assert always.always
