from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeq import catalog, data, profiles, recipe, target
from edgeq.errors import UsageFault
from edgeq.estimating import memory
from edgeq.estimating.estimate import Estimate, estimate
from edgeq.profiles import Decode, Gaps, Prefill, Profile, Spread

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
    assert found.decode_reason == found.first_token_reason == "the memory bandwidth of x86-avx2 is not known"
    assert found.fits is None
    assert found.memory_reason == "the memory of x86-avx2 is not known"


def test_a_file_that_exists_already_is_slower_when_larger() -> None:
    small, large = (_ask("qwen3-4b", "apple-m4", weights_bytes=size) for size in (2_000_000_000, 4_000_000_000))
    assert small.weights_bytes == 2_000_000_000
    assert _mid(small) > _mid(large)


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
