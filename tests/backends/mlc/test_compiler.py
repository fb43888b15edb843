"""What compiled code is like: rules, bytes and memory, for the Jetson's GPU with real shapes and for this CPU."""

from __future__ import annotations

import dataclasses
import json
import math
from pathlib import Path
from typing import Any

import msgspec
import pytest

from checkpoints import Build, config_of
from edgeq import bundle, catalog, recipe, size, target
from edgeq.backends.mlc import tensor_cache
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, CorruptInput, UsageFault
from edgeq.model import Model, read_config
from edgeq.recipe import Recipe
from edgeq.target import Target

RECIPE = "w4g32-e8-rtn-kv16"
TINY: list[tuple[str, str, dict[str, Any]]] = [
    ("2.5", "w4g32-e4-rtn", {"tied": False}),
    ("3", "f32", {}),
    ("3", RECIPE, {}),
    ("3.5", "w4g32-e4-rtn", {"multimodal": True}),
]
GPU_RULES = {"Matmul", "GEMV", "LowBatchGEMV"}


def first_layers(name: str) -> Model:
    """A model of the catalogue with its first four layers."""
    model = catalog.load(name).model
    return dataclasses.replace(model, layer_types=model.layer_types[:4])


def compiled(model: Model, words: str, device: Target, context: int = 4096) -> Any:
    from edgeq.backends.mlc import compiler, devices, kernels

    how = compiler.precision(recipe.parse(words), "bfloat16")
    with kernels.kept_as_source():
        return compiler.compile_model(model, how, devices.tvm_target(device), context)


@pytest.fixture(
    scope="session",
    params=[pytest.param(name, marks=pytest.mark.slow) for name in ("qwen2.5-0.5b", "qwen3-0.6b", "qwen3.5-0.8b")],
)
def jetson(request: pytest.FixtureRequest, here: Target) -> tuple[Model, Any]:
    """The first layers of each generation's smallest model, and what was compiled of it for the Jetson."""
    model = first_layers(request.param)
    return model, compiled(model, RECIPE, target.load("jetson"))


def matrices(model: Model) -> dict[str, list[tuple[int, int]]]:
    """Rows and inputs of a layer's matrices by kind, those of one input side by side; and of the table."""
    queries, keys = model.heads * model.head_dim, model.kv_heads * model.head_dim
    mlp = [(2 * model.ffn, model.hidden), (model.hidden, model.ffn)]
    gate = [(queries, model.hidden)] if model.linear else []
    found = {
        "full_attention": [(queries + 2 * keys, model.hidden), *gate, (model.hidden, queries), *mlp],
        "table": [(model.vocab, model.hidden)],
    }
    if model.linear:
        values = model.linear.value_heads * model.linear.value_head_dim
        shapes = [(model.linear.conv_channels, model.hidden), (values, model.hidden), (model.hidden, values)]
        found["linear_attention"] = shapes + mlp
    return found


def test_every_matrix_product_on_the_gpu_has_a_rule_made_for_it(jetson: tuple[Model, Any]) -> None:
    from edgeq.backends.mlc import schedules

    _, made = jetson
    products = {kernel.name: kernel.rule for kernel in made.kernels if "matmul" in kernel.name}
    assert set(products.values()) == GPU_RULES
    assert {kernel.rule for kernel in made.kernels if "matmul" in kernel.name and kernel.calls} == {"GEMV"}
    rules = {kernel.name: kernel.rule for kernel in made.kernels}
    attention = [name for name in rules if "paged_kv" in name or "ragged_kv" in name or name == "scan"]
    assert attention
    assert {rules[name] for name in attention} == {schedules.OWN}
    assert {rule for name, rule in rules.items() if "norm" in name} == {"Reduction"}


def test_decoding_one_token_moves_next_to_nothing_by_the_fallback_rule(jetson: tuple[Model, Any]) -> None:
    from edgeq.backends.mlc import report

    assert 0 < report.fallback_share(jetson[1].kernels) <= 0.02


def test_matrix_products_move_words_scales_input_and_output_once(jetson: tuple[Model, Any]) -> None:
    """Biases and residuals in the same kernel come on top; they are vectors."""
    model, made = jetson
    shapes = matrices(model)
    for bits, wide, groups in ((8, 4, ["table"]), (4, 2, model.layer_types)):
        found = [kernel for kernel in made.kernels if f"matmul_{bits}_bits" in kernel.name and kernel.calls]
        every = [shape for kind in groups for shape in shapes[kind]]
        least = sum(rows * n * bits // 8 + rows * n // 32 * 2 + n * 2 + rows * wide for rows, n in every)
        assert sum(kernel.calls for kernel in found) == len(every)
        assert least <= sum(kernel.bytes for kernel in found) <= least + sum(2 * rows for rows, _ in every)
    if model.generation == "3":
        (table,) = (kernel for kernel in made.kernels if "matmul_8_bits" in kernel.name and kernel.calls)
        assert table.bytes == 151936 * (1024 + 2 * 32 + 4) + 2 * 1024


def test_the_memory_plan_is_what_shapes_predict(jetson: tuple[Model, Any]) -> None:
    model, made = jetson
    widths = {"uint32": 4, "float32": 4, "float16": 2}
    held = sum(math.prod(shape) * widths[dtype] for shape, dtype in made.parameters.values())
    assert made.memory.weights_bytes == held
    assert held == pytest.approx(size.weight_bytes(model, recipe.parse(RECIPE), 16), rel=1e-3)
    assert made.memory.kv_cache_bytes_per_token == model.kv_bytes_per_token(2)
    temporary = made.memory.temporary_bytes
    assert temporary["batch_prefill"] == pytest.approx(256 * temporary["decode"], rel=0.05)
    assert temporary["create_tir_paged_kv_cache"] == 0


@pytest.mark.slow
@pytest.mark.parametrize(("generation", "words", "options"), TINY)
def test_the_plan_of_a_built_folder_is_what_was_written(
    tiny: Build, packed: Build, generation: str, words: str, options: dict[str, Any]
) -> None:
    folder, model = packed(generation, words, **options), Checkpoint.open(tiny(generation, **options)).model
    made = msgspec.json.decode(folder.with_suffix(".json").read_bytes(), type=bundle.Compiled)
    width = recipe.parse(words).kv_bits // 8
    assert made.kernels is None
    assert made.memory.weights_bytes == sum(path.stat().st_size for path in folder.glob("params_shard_*.bin"))
    assert made.memory.weights_bytes == sum(each["nbytes"] for each in tensor_cache.records(folder).values())
    assert made.memory.kv_cache_bytes_per_token == model.kv_bytes_per_token(width)
    states = 3 * (3 * 256 * width + 4 * 32 * 32 * 4) if generation == "3.5" else 0
    assert made.memory.state_bytes == states


@pytest.mark.parametrize(("generation", "words", "options"), TINY[::-1])  # other workers build the first one
def test_temporary_memory_is_that_of_a_token_times_the_chunk(
    packed: Build, generation: str, words: str, options: dict[str, Any]
) -> None:
    made = msgspec.json.decode(
        packed(generation, words, **options).with_suffix(".json").read_bytes(), type=bundle.Compiled
    )
    temporary = made.memory.temporary_bytes
    assert 0 < temporary["decode"] <= 64 * 128
    assert temporary["batch_verify"] == pytest.approx(32 * temporary["decode"], rel=0.1)
    assert temporary["batch_prefill"] == pytest.approx(256 * temporary["decode"], rel=0.1)
    assert "create_tir_paged_kv_cache" not in temporary


@pytest.mark.slow
def test_only_the_chunk_makes_temporary_memory_grow(tiny: Build, here: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.backends.mlc import compiler

    model = Checkpoint.open(tiny("3")).model
    short, long = (compiled(model, "w4g32-e8-rtn", here, context).memory for context in (64, 32768))
    assert short == long
    monkeypatch.setattr(compiler, "CHUNK", 512)
    doubled = compiled(model, "w4g32-e8-rtn", here, 64).memory.temporary_bytes
    assert doubled["batch_prefill"] == pytest.approx(2 * short.temporary_bytes["batch_prefill"], rel=0.01)
    assert doubled["batch_verify"] == short.temporary_bytes["batch_verify"]


@pytest.mark.parametrize(("generation", "words", "options"), TINY)
def test_every_matrix_product_on_the_cpu_has_the_rule_made_for_it(
    packed: Build, generation: str, words: str, options: dict[str, Any]
) -> None:
    from edgeq.backends.mlc import report

    made = report.read(packed(generation, words, **options))
    products = [kernel for kernel in made.kernels if "matmul" in kernel.name]
    assert {kernel.rule for kernel in products} <= {"MatrixOnCpu", "its own"}
    packed_ones = [kernel for kernel in products if "_bits" in kernel.name]
    assert {kernel.rule for kernel in packed_ones} == (set() if recipe.parse(words).body.is_float else {"its own"})
    assert any(kernel.calls for kernel in products)


def test_the_delta_rule_moves_its_whole_state(packed: Build) -> None:
    """State of a layer: 4 heads of 32 by 32 in float32, read and written in place."""
    from edgeq.backends.mlc import report

    made = report.read(packed(*TINY[3][:2], **TINY[3][2]))
    (scan,) = (kernel for kernel in made.kernels if kernel.name == "scan")
    assert scan.calls == 3
    assert scan.bytes >= 3 * 4 * 32 * 32 * 4


def test_a_library_describes_itself(packed: Build) -> None:
    tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from tvm import relax

    folder = packed(*TINY[3][:2], **TINY[3][2])
    machine = relax.VirtualMachine(tvm.runtime.load_module(str(folder / "model.so")), tvm.cpu())
    told = json.loads(str(machine["_metadata"]()))
    assert (told["model_type"], told["quantization"], told["context_window_size"]) == (
        "qwen3_5_text",
        "w4g32-w4g32-float32",
        512,
    )
    assert (told["prefill_chunk_size"], told["verify_chunk_size"], told["kv_state_kind"]) == (256, 32, "plain")
    assert [each["shape"] for each in told["states"]] == [[3, 256], [4, 32, 32]] * 3
    held = tensor_cache.records(folder)
    assert {each["name"]: (each["shape"], each["dtype"]) for each in told["params"]} == {
        name: (held[name]["shape"], held[name]["dtype"]) for name in held
    }


@pytest.mark.parametrize(
    ("words", "own", "dtype", "floats"),
    [
        ("w4g32-e8-rtn", "bfloat16", "float32", "float32"),
        ("w4g32-e8-rtn-kv16", "bfloat16", "float16", "float32"),
        ("w16", "bfloat16", "float32", "bfloat16"),
        ("w16", "float16", "float32", "float16"),
        ("f16-kv16", "bfloat16", "float16", "float16"),
        ("bf16", "float16", "float32", "bfloat16"),
        ("f32", "bfloat16", "float32", "float32"),
    ],
)
def test_the_cache_decides_the_type_of_scales_and_activations_and_the_recipe_that_of_matrices(
    here: Target, words: str, own: str, dtype: str, floats: str
) -> None:
    from edgeq.backends.mlc import compiler

    wanted: Recipe = recipe.parse(words)
    found = compiler.precision(wanted, own)
    assert (found.body, found.table, found.floats) == (wanted.body, wanted.table, floats)
    assert (found.dtype, found.stored) == (dtype, dtype)
    found = compiler.precision(wanted, own, tiles=True)
    assert (found.dtype, found.stored, found.floats) == ("float32", dtype, floats)


def test_the_fallback_rules_share_is_by_bytes_of_a_token(here: Target) -> None:
    from edgeq.backends.mlc.report import Kernel, fallback_share

    kernels = [Kernel("a", "GEMV", 2, 600), Kernel("b", "Fallback", 9, 100), Kernel("c", "its own", 1, 300)]
    assert fallback_share(iter(kernels)) == 0.1


def test_a_report_is_read_as_it_was_written_and_a_damaged_one_is_corrupt(here: Target, tmp_path: Path) -> None:
    from edgeq.backends.mlc import report

    made = report.Report(
        compiler=report.BUILT_IN,
        isa=("avx2",),
        dtype="float32",
        floats="float32",
        kernels=(report.Kernel("a", "GEMV", 1, 10),),
    )
    report.write(made, tmp_path)
    assert report.read(tmp_path) == made
    written = json.loads((tmp_path / report.FILE).read_text())
    for damaged in (written | {"more": 1}, {key: written[key] for key in written if key != "isa"}):
        (tmp_path / report.FILE).write_text(json.dumps(damaged))
        with pytest.raises(CorruptInput, match=report.FILE):
            report.read(tmp_path)
    (tmp_path / report.FILE).unlink()
    with pytest.raises(CorruptInput, match="missing"):
        report.read(tmp_path)


@pytest.mark.slow
def test_a_kernel_that_no_rule_takes_is_a_fault_on_a_gpu(here: Target, monkeypatch: pytest.MonkeyPatch) -> None:
    from edgeq.backends.mlc import compiler, devices, schedules

    monkeypatch.setattr(schedules, "_tries", lambda *_: iter(()))
    model = read_config(config_of("3"))
    how = compiler.precision(recipe.parse("w4g32-e8-rtn"), "bfloat16")
    with pytest.raises(BackendFault, match="TVM cannot compile") as raised:
        compiler.compile_model(model, how, devices.tvm_target(target.load("jetson")), 256)
    assert "no schedule rule takes the kernel" in raised.value.why


@pytest.mark.slow
def test_a_kernel_with_more_threads_than_the_target_allows_is_a_fault(here: Target) -> None:
    from edgeq.backends.mlc import compiler, devices

    board = target.load("orange-pi-5")
    small = msgspec.structs.replace(board, mlc=msgspec.structs.replace(board.mlc, max_threads_per_block=8))
    how = compiler.precision(recipe.parse("w4g32-e8-rtn"), "bfloat16")
    with pytest.raises(BackendFault, match="TVM cannot compile") as raised:
        compiler.compile_model(read_config(config_of("3")), how, devices.tvm_target(small), 256)
    assert "8" in raised.value.why
    assert "[mlc] table" in raised.value.run


def test_a_processor_that_llvm_does_not_know_is_refused(here: Target) -> None:
    from edgeq.backends.mlc import devices

    board = target.load("raspberry-pi-5-8gb")
    odd = msgspec.structs.replace(board, mlc=msgspec.structs.replace(board.mlc, mcpu="cortex-a999"))
    with pytest.raises(UsageFault, match="'cortex-a999' is no processor that LLVM knows for aarch64-linux-gnu"):
        devices.tvm_target(odd)


@pytest.mark.parametrize("words", ["w2g16-e8-rtn", "w4gcol-e8-rtn", "w8gcol-e8-rtn"])
@pytest.mark.parametrize("inputs", [1024, 3072])
def test_a_decoded_token_takes_the_schedule_of_a_matrix_times_a_vector(words: str, inputs: int) -> None:
    pytest.importorskip("tvm", reason="apache-tvm, of the extra edgeq[tvm], is not installed")
    from tvm.relax.frontend.nn import spec

    from edgeq.backends.mlc import devices, schedules
    from edgeq.backends.mlc.layers import Linear, Precision

    jetson = devices.tvm_target(target.load("jetson")).with_host(devices.this_cpu())
    layout = recipe.parse(words).body
    taken: dict[str, str] = {}
    with jetson:
        linear = Linear(
            Precision(layout, layout, "float16", "float16", "float32"),
            "model.layers.0.mlp.down_proj.weight",
            inputs,
            64,
        )
        given = {"x": spec.Tensor([1, 1, inputs], "float16"), "$": {"param_mode": "plain", "effect_mode": "none"}}
        module, _ = linear.export_tvm({"forward": given})
        schedules.apply(jetson, taken)(module)
    assert [*taken.values()] == ["GEMV"]
