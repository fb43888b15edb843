from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeq import catalog, data, profiles, recipe, tables, target
from edgeq.errors import UsageFault
from edgeq.estimating import memory
from edgeq.estimating.estimate import Estimate, estimate
from edgeq.profiles import Decode, Gaps, Prefill, Profile, Spread
from edgeq.target import Figure, Target

FOUR = recipe.parse("w4g32-e8-rtn-kv16")
SIXTEEN = recipe.parse("f16-kv16")


def _ask(
    model: str,
    device: str,
    wanted: str = "w4g32-e8-rtn-kv16",
    backend: str = "llamacpp",
    *,
    context: int = 4096,
    depth: int = 0,
    weights_bytes: int | None = None,
) -> Estimate:
    return estimate(
        catalog.load(model).model,
        model,
        recipe.parse(wanted),
        target.load(device),
        backend,
        context=context,
        depth=depth,
        weights_bytes=weights_bytes,
    )


def _mid(found: Estimate) -> float:
    assert found.decode_tokens_per_s is not None
    return found.decode_tokens_per_s.mid


@pytest.mark.parametrize("device", ["jetson", "apple-m4", "raspberry-pi-5-8gb"])
def test_the_hybrid_overtakes_at_long_context_in_speed_and_memory(device: str) -> None:
    dense, hybrid = (
        [_ask(model, device, context=32768, depth=depth) for depth in (0, 32000)]
        for model in ("qwen3-4b", "qwen3.5-4b")
    )
    assert _mid(hybrid[0]) < _mid(dense[0])
    assert _mid(hybrid[1]) > _mid(dense[1])
    assert hybrid[1].total_bytes < dense[1].total_bytes


def _bytes(name: str) -> float:
    total = target.load(name).memory.total_bytes
    return total.value if total and memory.usable_bytes(target.load(name)) else 0


EIGHT_GB = [name for name in target.names() if _bytes(name) == 8 << 30]


@pytest.mark.parametrize("device", EIGHT_GB)
def test_four_billion_parameters_run_in_eight_gigabytes_only_quantized(device: str) -> None:
    assert _ask("qwen3.5-4b", device, "f16-kv16").fits is False
    assert _ask("qwen3.5-4b", device).fits is True


def test_there_are_devices_of_eight_gigabytes() -> None:
    assert len(EIGHT_GB) >= 5


def test_what_is_not_known_is_null_with_its_reason() -> None:
    found = _ask("qwen3-0.6b", "x86-avx2", "w4g32-e8-rtn", "onnx")
    assert (found.decode_tokens_per_s, found.prefill_tokens_per_s, found.first_token_s) == (None, None, None)
    assert found.decode_reason == found.first_token_reason
    assert str(found.decode_reason).startswith("the memory bandwidth of x86-avx2 is not known: edgeq profile BUNDLE")
    assert found.fits is None
    assert found.memory_reason == "the memory of x86-avx2 is not known"


def test_an_unknown_share_of_the_memory_is_assumed_and_named() -> None:
    device = target.load("x86-laptop-ddr5")
    memory_alone = msgspec.structs.replace(device.memory, total_bytes=Figure(16 << 30, "made up"), usable_share=None)
    device = msgspec.structs.replace(device, memory=memory_alone)
    shape = catalog.load("qwen3-0.6b").model
    found = estimate(shape, "qwen3-0.6b", recipe.parse("w4g32-e8-rtn"), device, "onnx", context=4096)
    assert found.fits is True
    assert found.usable_bytes == int((16 << 30) * 0.7)
    assert found.memory_reason == (
        "what share of its memory is free for a model is not known: 70% is assumed; "
        "set memory.usable_share in a target file of your own"
    )
    assert memory.assumed_share(target.load("jetson")) is None
    assert "70% is assumed" in tables.plain(tables.estimate(found))


def test_a_file_that_exists_already_is_slower_when_larger() -> None:
    small, large = (_ask("qwen3-4b", "apple-m4", weights_bytes=size) for size in (2_000_000_000, 4_000_000_000))
    assert small.weights_bytes == 2_000_000_000
    assert _mid(small) > _mid(large)


def test_weak_gpus_with_untuned_kernels_are_slowed_by_unpacking() -> None:
    """Snapdragon 8 Gen 3, llama.cpp by OpenCL, Qwen2.5-1.5B Q4_0: 27.3 tokens/s (published.toml)."""
    found = _ask("qwen2.5-1.5b", "snapdragon-8-gen-3-phone")
    assert "unpacking the weights takes longer than reading" in found.basis
    assert "unpacking" not in _ask("qwen2.5-1.5b", "jetson").basis
    assert "unpacking" not in _ask("qwen2.5-1.5b", "raspberry-pi-5-8gb").basis


def test_a_peak_that_is_a_lower_bound_makes_prompts_less_certain() -> None:
    plain, bound = (_ask("qwen3-1.7b", device).prefill_tokens_per_s for device in ("apple-m4", "apple-m5"))
    assert plain is not None
    assert bound is not None
    assert bound.high / bound.mid > 1.3 * plain.high / plain.mid


def test_published_figures_are_met_where_device_and_runtime_have_some() -> None:
    """Orin Nano Super, llama.cpp, Qwen3.5-4B Q4_K_M: 16.6 tokens/s, prompts 484 (published.toml)."""
    found = _ask("qwen3.5-4b", "jetson", "q4_k-eq6_k-rtn-kv16", weights_bytes=2_727_304_233)
    assert _mid(found) == pytest.approx(16.6, rel=0.1)
    assert found.prefill_tokens_per_s is not None
    assert found.prefill_tokens_per_s.mid == pytest.approx(484, rel=0.15)


def _measured(device: str, decode: float, prefill: float) -> Profile:
    """A row that a made-up device wrote, from a true one."""
    row = profiles.read(next(data.folder("profiles").rglob("demo-qwen3.*.json")))

    def spread(value: float) -> Spread:
        return Spread(median=value, low=value, high=value, cv=None, samples=(value,))

    return msgspec.structs.replace(
        row,
        model="qwen3-1.7b",
        recipe="w4g32-e8-rtn-kv16",
        backend="llamacpp",
        target=device,
        bundle=msgspec.structs.replace(row.bundle, bytes=1_100_000_000),
        prefill=(Prefill(tokens=512, depth=0, tokens_per_s=spread(prefill)),),
        decode=(Decode(tokens=128, depth=0, tokens_per_s=spread(decode), gap_s=Gaps(p50=0, p90=0, p99=0, max=0)),),
    )


def test_one_measured_model_moves_the_estimates_of_all_others() -> None:
    model, device = catalog.load("qwen3-4b").model, target.load("apple-m4")
    usual = estimate(model, "qwen3-4b", FOUR, device, "llamacpp", context=4096)
    expected = _mid(_ask("qwen3-1.7b", "apple-m4", weights_bytes=1_100_000_000))
    assert usual.decode_tokens_per_s is not None
    assert usual.prefill_tokens_per_s is not None
    for factor in (0.5, 1.25):
        anchor = _measured("apple-m4", factor * expected, factor * 700)
        found = estimate(model, "qwen3-4b", FOUR, device, "llamacpp", context=4096, anchor=anchor)
        assert (_mid(found) < _mid(usual)) == (factor < 1)
        assert found.basis.startswith("measured there: qwen3-1.7b w4g32-e8-rtn-kv16; ")


def test_a_measured_prompt_stands_for_an_unknown_peak() -> None:
    model, device = catalog.load("qwen3-1.7b").model, target.load("iphone-17-pro")
    assert estimate(model, "qwen3-1.7b", FOUR, device, "llamacpp", context=4096).prefill_tokens_per_s is None
    anchor = _measured("iphone-17-pro", 40, 600)
    found = estimate(model, "qwen3-1.7b", FOUR, device, "llamacpp", context=4096, anchor=anchor)
    assert found.prefill_tokens_per_s is not None
    assert found.prefill_tokens_per_s.mid == pytest.approx(600, rel=0.01)


@pytest.fixture(params=["x86-avx2", "mine"])
def nameless(request: pytest.FixtureRequest, tmp_path: Path) -> Target:
    """A target without a bandwidth: a shipped one, and one of somebody's own."""
    if request.param != "mine":
        return target.load(request.param)
    text = (data.folder("targets") / "x86-avx2.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(text.replace("x86-avx2", "mine"), encoding="utf-8")
    return target.load(str(tmp_path / "mine.toml"))


def _after(anchor: Profile, model: str, wanted: str, device: Target, depth: int = 0) -> Estimate:
    size = anchor.bundle.bytes if (model, wanted) == (anchor.model, anchor.recipe) else None
    return estimate(
        catalog.load(model).model,
        model,
        recipe.parse(wanted),
        device,
        anchor.backend,
        context=4096,
        depth=depth,
        weights_bytes=size,
        anchor=anchor,
    )


def test_an_anchor_stands_for_an_unknown_bandwidth(nameless: Target) -> None:
    anchor = _measured(nameless.name, 18.0, 90.0)
    own = _after(anchor, anchor.model, anchor.recipe, nameless, depth=64)
    assert _mid(own) == pytest.approx(18, rel=0.01)
    assert own.prefill_tokens_per_s is not None
    assert own.prefill_tokens_per_s.mid == pytest.approx(90, rel=0.01)
    assert own.basis.startswith("measured there: qwen3-1.7b w4g32-e8-rtn-kv16; ")
    assert "; the bandwidth is the anchor's; " in own.basis
    four, eight = (_after(anchor, "qwen3-4b", f"w{bits}g32-e8-rtn-kv16", nameless) for bits in (4, 8))
    for found in (four, eight):
        assert _mid(found) == pytest.approx(18 * 1_100_000_000 / found.weights_bytes, rel=0.1)
        assert found.prefill_tokens_per_s is not None
        assert found.prefill_tokens_per_s.mid == pytest.approx(90 * 1.41 / 3.63, rel=0.1)  # billions in the layers
        assert found.decode_tokens_per_s is not None
        assert 1.15 < found.decode_tokens_per_s.high / found.decode_tokens_per_s.mid < 1.35


def test_an_anchor_faster_than_its_layers_were_thought_to_be_is_followed_too() -> None:
    anchor = _measured("x86-avx2", 450.0, 9000.0)
    own = _after(anchor, anchor.model, anchor.recipe, target.load("x86-avx2"), depth=64)
    assert _mid(own) == pytest.approx(450, rel=0.15)
    assert own.decode_tokens_per_s is not None
    assert own.decode_tokens_per_s.low < 450 < own.decode_tokens_per_s.high


def test_a_small_anchor_tells_no_bandwidth() -> None:
    anchor = _measured("x86-avx2", 6000.0, 40000.0)
    small = msgspec.structs.replace(anchor, bundle=msgspec.structs.replace(anchor.bundle, bytes=2_000_000))
    found = _after(small, "qwen3-4b", "w4g32-e8-rtn-kv16", target.load("x86-avx2"))
    assert (found.decode_tokens_per_s, found.prefill_tokens_per_s) == (None, None)
    assert "qwen3-1.7b w4g32-e8-rtn-kv16 is too small to tell it" in str(found.decode_reason)


def test_an_anchor_of_another_device_is_refused() -> None:
    model = catalog.load("qwen3-4b").model
    with pytest.raises(UsageFault, match="measured with llamacpp on jetson-orin-nano-super-8gb"):
        estimate(
            model,
            "qwen3-4b",
            FOUR,
            target.load("apple-m4"),
            "llamacpp",
            context=4096,
            anchor=_measured("jetson-orin-nano-super-8gb", 40, 600),
        )


def test_a_target_of_ones_own_is_estimated_by_its_api(tmp_path: Path) -> None:
    text = (data.folder("targets") / "apple-m4.toml").read_text(encoding="utf-8")
    (tmp_path / "mine.toml").write_text(
        text[: text.index("[calibration.")].replace('"apple-m4"', '"mine"', 1), encoding="utf-8"
    )
    mine = target.load(str(tmp_path / "mine.toml"))
    found = estimate(catalog.load("qwen3-4b").model, "qwen3-4b", FOUR, mine, "llamacpp", context=4096)
    assert found.basis.startswith("scripts/refit: llamacpp on metal, ")
    fitted = _ask("qwen3-4b", "apple-m4").decode_tokens_per_s
    assert fitted is not None
    assert found.decode_tokens_per_s is not None
    assert found.decode_tokens_per_s.high / found.decode_tokens_per_s.low > fitted.high / fitted.low


@pytest.mark.parametrize("name", ["w16", "f16", "bf16"])
def test_onnx_reads_widened_matrices_in_four_bytes(name: str) -> None:
    """Qwen3's shape on a processor, whose overhead of layers is small: as fast as f32, whose file is twice as large."""
    half, whole = (_ask("qwen3-4b", "raspberry-pi-5-16gb", each, "onnx") for each in (name, "f32"))
    assert half.weights_bytes == pytest.approx(whole.weights_bytes / 2, rel=0.01)
    assert _mid(half) == pytest.approx(_mid(whole))
    plain = _ask("qwen3-4b", "raspberry-pi-5-16gb", f"{name}-kv16")
    assert _mid(plain) > 1.8 * _mid(half)
    assert plain.total_bytes < 0.4 * half.total_bytes
    assert half.total_bytes == half.weights_bytes + half.kv_cache_bytes + half.state_bytes + half.runtime_bytes


def test_an_anchor_of_widened_matrices_moved_them_wide() -> None:
    device = target.load("x86-avx2")
    anchor = msgspec.structs.replace(_measured("x86-avx2", 5.0, 50.0), recipe="w16", backend="onnx")
    size = _after(anchor, "qwen3-1.7b", "f32", device).weights_bytes
    anchor = msgspec.structs.replace(anchor, bundle=msgspec.structs.replace(anchor.bundle, bytes=size // 2))
    assert _mid(_after(anchor, "qwen3-1.7b", "f32", device, depth=64)) == pytest.approx(5, rel=0.01)
