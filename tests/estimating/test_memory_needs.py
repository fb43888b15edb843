from __future__ import annotations

import dataclasses

import msgspec
import pytest

from edgeq import catalog, recipe, size, target
from edgeq.estimating import memory

FOUR = recipe.parse("w4g32-e8-rtn-kv16")


def test_keys_and_values_count_full_attention_layers_only() -> None:
    hybrid, dense = catalog.load("qwen3.5-4b").model, catalog.load("qwen3-4b").model
    assert memory.cache_bytes_per_token(dense, FOUR, "llamacpp") == 2 * 36 * 8 * 128 * 2
    assert memory.cache_bytes_per_token(hybrid, FOUR, "llamacpp") == 2 * 8 * hybrid.kv_heads * hybrid.head_dim * 2


def test_an_eight_bit_cache_of_llama_cpp_has_scales() -> None:
    model, eight = catalog.load("qwen3-4b").model, recipe.parse("w4g32-e8-rtn-kv8")
    assert memory.cache_bytes_per_token(model, eight, "llamacpp") == 2 * 36 * 8 * 128 * 34 / 32
    assert memory.cache_bytes_per_token(model, eight, "onnx") == 2 * 36 * 8 * 128


def test_states_do_not_grow_with_the_context() -> None:
    model = catalog.load("qwen3.5-4b").model
    short, long = (memory.needed(model, FOUR, "llamacpp", context=tokens) for tokens in (512, 65536))
    assert short.state_bytes == long.state_bytes > 0
    assert memory.recurrent_bytes(model) == 50_331_648  # what published rows say is read and, again, written
    assert memory.state_bytes(catalog.load("qwen3-4b").model) == 0


def test_a_tied_table_counts_once() -> None:
    tied = catalog.load("qwen3-0.6b").model
    untied = dataclasses.replace(tied, tied=False)
    table = memory.table_bytes(untied, FOUR, "llamacpp")
    both = [memory.needed(each, FOUR, "llamacpp", context=1).weights_bytes for each in (tied, untied)]
    assert both[1] - both[0] == table > 0
    assert memory.table_bytes(tied, FOUR, "llamacpp") == 0


@pytest.mark.parametrize("backend", ["onnx", "llamacpp", "mlc"])
def test_scales_are_those_of_the_backend(backend: str) -> None:
    from edgeq import backends

    for name in ("w4g32-e8-rtn", "w4g32-e8-rtn-kv16"):
        wanted = recipe.parse(name)
        assert memory.scale_bits(wanted, backend) == backends.get(backend).scale_bits(wanted)


def test_the_largest_context_just_fits() -> None:
    model = catalog.load("qwen3-4b").model
    usable = memory.usable_bytes(target.load("jetson"))
    assert usable is not None
    found = memory.needed(model, FOUR, "llamacpp", context=4096)
    most = memory.largest_context(model, found, usable)
    assert 4096 < most < model.context
    assert memory.needed(model, FOUR, "llamacpp", context=most).total_bytes <= usable
    assert memory.needed(model, FOUR, "llamacpp", context=most + 1).total_bytes > usable
    assert memory.largest_context(model, found, 10**9) == 0
    assert memory.largest_context(model, found, 10**12) == model.context


def test_what_was_measured_on_a_processor() -> None:
    """README: qwen3-0.6b took 1.02 GiB with w4g32-e8-rtn and 1.22 GiB with w8g32-e8-rtn, 640 tokens in the cache."""
    model = catalog.load("qwen3-0.6b").model
    for name, measured in (("w4g32-e8-rtn", 1.02), ("w8g32-e8-rtn", 1.22)):
        found = memory.needed(model, recipe.parse(name), "onnx", context=640).total_bytes
        assert found == pytest.approx(measured * 2**30, rel=0.1)


def test_what_was_measured_with_mlx() -> None:
    """mlx-lm's BENCHMARKS.md, as quoted in published.toml: peaks of 5.25 and 3.60 GB with 2048 tokens and more."""
    model = catalog.load("qwen3-4b").model
    for weights, measured in ((4_273_872_352, 5.25e9), (2_514_042_560, 3.60e9)):
        found = memory.needed(model, FOUR, "mlx", context=2176, weights_bytes=weights).total_bytes
        assert found == pytest.approx(measured, rel=0.1)


def test_a_mix_has_the_bits_it_is_made_for() -> None:
    model = catalog.load("qwen3-4b").model
    found = memory.needed(model, recipe.parse("mix4.5-guided"), "llamacpp", context=1)
    assert found.weights_bytes == model.parameters * 4.5 // 8


def test_bytes_of_a_file_replace_the_prediction() -> None:
    model = catalog.load("qwen3-4b").model
    assert memory.needed(model, FOUR, "mlx", context=1, weights_bytes=123).weights_bytes == 123
    assert memory.needed(model, FOUR, "onnx", context=1).weights_bytes == size.weight_bytes(model, FOUR, 32)


@pytest.mark.parametrize(("name", "held"), [("w16", 6), ("bf16", 6), ("f32", 0)])
def test_what_onnx_widens(name: str, held: int) -> None:
    """A tied table is looked up as it is stored, beside the copies for the output layer."""
    model, device, wanted = catalog.load("qwen3-0.6b").model, target.load("pi5"), recipe.parse(name)
    stored = wanted.body.bits // 8
    found = memory.widened(model, wanted, device, "onnx")
    tied = stored * model.vocab * model.hidden
    assert found.held == pytest.approx(model.parameters * held + tied, rel=0.001)
    assert found.read == pytest.approx(model.parameters * (4 - stored), rel=0.001)
    assert memory.widened(model, wanted, device, "llamacpp") == (0, 0)


def test_onnx_widens_a_table_in_sixteen_bits_where_the_output_layer_reads_it() -> None:
    tied, device = catalog.load("qwen3-0.6b").model, target.load("pi5")
    table = tied.vocab * tied.hidden
    for model, held in ((tied, 8), (dataclasses.replace(tied, tied=False), 6)):
        assert memory.widened(model, recipe.parse("w4g32-e16-rtn"), device, "onnx") == (held * table, 2 * table)
    assert memory.widened(tied, recipe.parse("w4g32-e8-rtn"), device, "onnx") == (0, 0)


@pytest.mark.parametrize(("name", "measured"), [("w16", 4.9), ("f32", 3.2)])
def test_what_was_measured_of_widened_matrices(name: str, measured: float) -> None:
    """Peak of qwen3-0.6b's shape, random weights, after 24 tokens: AMD EPYC; w16 was 4.8 to 5.0 GiB, four times."""
    model, wanted = catalog.load("qwen3-0.6b").model, recipe.parse(name)
    held = memory.widened(model, wanted, target.load("x86-avx512-vnni"), "onnx").held
    found = memory.needed(model, wanted, "onnx", context=152, widened=held).total_bytes
    assert found == pytest.approx(measured * 2**30, rel=0.1)


def test_float16_graphs_widen_nothing() -> None:
    device = target.load("pi5")
    cuda = msgspec.structs.replace(device, onnx=msgspec.structs.replace(device.onnx, provider="cuda"))
    assert memory.widened(catalog.load("qwen3-0.6b").model, recipe.parse("w16"), cuda, "onnx") == (0, 0)
