from __future__ import annotations

import platform
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

import checkpoints
from checkpoints import Build, quiet
from edgeq import building, bundle, choosing, planning
from edgeq.checkpoint import Checkpoint
from edgeq.errors import (
    CorruptInput,
    GateFailed,
    MissingTool,
    NothingFits,
    OutOfMemory,
    UnsafeInput,
    UnsupportedModel,
    UsageFault,
)
from edgeq.model import read_config


def plan(model: Path | str, out: Path, **options: object) -> planning.Plan:
    words: dict[str, object] = {"target": "x86-avx2", "recipe_name": "w4g32-e8-rtn", "backend": "null", "context": 256}
    return planning.plan(str(model), out=out, **(words | options))  # type: ignore[arg-type]


def test_a_bundle_is_sealed_complete_and_says_where_it_came_from(built: Build, tiny: Build) -> None:
    folder = built("3", "w4g32-e8-rtn")
    made = bundle.read(folder)
    bundle.verify_files(folder, made)
    assert made.generation == "3"
    assert made.source.kind == "folder"
    assert {file.path for file in made.source.files} >= {"config.json", "model.safetensors", "tokenizer.json"}
    assert {file.path for file in made.files} >= {
        "model.onnx",
        "scorer.onnx",
        "model.onnx.data",
        "tokenizer.json",
        "chat_template.jinja",
        "generation_config.json",
        "genai_config.json",
        bundle.REFERENCE,
    }
    assert {tool.split()[0] for tool in made.tools} >= {"edgeq", "numpy", "onnxruntime", "transformers", "torch"}
    assert made.gate.passed
    assert made.gate.ran_on == platform.machine()


def test_an_engine_that_does_not_run_the_quantized_weights_is_refused_whatever_the_limit(
    tiny: Build, tmp_path: Path
) -> None:
    with pytest.raises(GateFailed, match="the engine does not run the weights that were quantized"):
        building.build(plan(tiny("3"), tmp_path / "out", max_loss=100.0), quiet)


def test_the_bundle_is_the_same_bytes_when_built_again(built: Build, tiny: Build, tmp_path: Path) -> None:
    first = bundle.read(built("3", "w4g32-e8-rtn"))
    again = plan(tiny("3"), tmp_path / "again", backend="onnx")
    building.build(again, quiet)
    assert bundle.read(again.out).files == first.files


def test_a_failed_gate_leaves_no_bundle_and_no_staging_folder(tiny: Build, tmp_path: Path) -> None:
    work = plan(tiny("3"), tmp_path / "bundles" / "one", max_loss=1e-6)
    with pytest.raises(GateFailed, match="above the limit"):
        building.build(work, quiet)
    assert not (tmp_path / "bundles").exists()


@pytest.fixture
def any_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the null backend through, whose logits have nothing to do with the weights."""
    monkeypatch.setattr("edgeq.gate.ENGINE_FLOOR", 100.0)


@pytest.mark.usefixtures("any_engine")
def test_a_failed_build_keeps_the_older_bundle(tiny: Build, tmp_path: Path) -> None:
    out = tmp_path / "one"
    building.build(plan(tiny("3"), out, max_loss=100.0), quiet)
    before = bundle.read(out)
    with pytest.raises(GateFailed):
        building.build(plan(tiny("3"), out, max_loss=1e-6), quiet)
    assert bundle.read(out) == before


def test_weights_that_are_not_finite_are_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "nan", "3")
    weights = folder / "model.safetensors"
    content = bytearray(weights.read_bytes())
    content[-2:] = b"\xc0\x7f"
    weights.write_bytes(content)
    with pytest.raises(CorruptInput, match="model"):
        building.build(plan(folder, tmp_path / "out"), quiet)
    assert not (tmp_path / "out").exists()


def test_a_hostile_chat_template_is_refused_before_anything_is_made(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "hostile", "3")
    (folder / "chat_template.jinja").write_text("{{ ''.__class__.__mro__[1].__subclasses__() }}")
    with pytest.raises(UnsafeInput):
        building.build(plan(folder, tmp_path / "out"), quiet)
    assert not (tmp_path / "out").exists()


def test_the_vision_tower_is_left_out_and_the_plan_says_so(tiny: Build, tmp_path: Path) -> None:
    work = plan(tiny("3.5", multimodal=True, shards=2), tmp_path / "out")
    assert any("vision tower is left out" in note for note in work.notes)


def absent(_: object) -> tuple[str, ...]:
    raise MissingTool("no engine", run="pip install engine")


def test_a_gpu_target_without_its_backends_gets_the_cpu_bundle_and_is_told(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in ("llamacpp", "mlc"):
        monkeypatch.setattr(f"edgeq.backends.{engine}.tools", absent)
    work = plan(tiny("3"), tmp_path / "out", target="jetson", backend="auto", recipe_name="auto")
    assert (work.backend, work.target.name) == ("onnx", "jetson-orin-nano-super-8gb")
    assert str(work.recipe) == next(name for name in work.target.recipes if not name.endswith("-kv16"))
    assert any("uses no GPU there" in note for note in work.notes)
    assert any("the gate runs on this machine's CPU" in note for note in work.notes)


@pytest.mark.parametrize("name", ["q4_1-e8-rtn", "w4g32-e8-rtn-kv16"])
def test_a_recipe_that_the_first_backend_does_not_know_gets_the_next_one(
    tiny: Build, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for engine in ("onnx", "llamacpp", "mlc"):
        monkeypatch.setattr(f"edgeq.backends.{engine}.tools", lambda _: ("an engine",))
    work = plan(tiny("3"), tmp_path / "out", backend="auto", recipe_name=name)
    assert (work.backend, str(work.recipe)) == ("llamacpp", name)
    assert [note for note in work.notes if "backend" in note] == [
        f"backend llamacpp: the first of x86-avx2's that is installed here and knows {name}"
    ]


def test_the_largest_size_chooses_the_best_recipe_that_fits(tiny: Build, tmp_path: Path) -> None:
    best, smallest = (plan(tiny("3"), tmp_path, recipe_name=name) for name in ("w4g32-e8-rtn", "w4g32-e4-rtn"))
    assert smallest.bytes < best.bytes
    work = plan(tiny("3"), tmp_path / "out", recipe_name="auto", max_size=best.bytes - 1)
    assert str(work.recipe) == "iq4_nl-eiq4_nl-rtn-kv16"
    with pytest.raises(NothingFits, match="no recipe of the target fits"):
        plan(tiny("3"), tmp_path / "out", recipe_name="auto", max_size=100)
    with pytest.raises(NothingFits, match=r"w8g32-e8-rtn does not fit 0\.0 MB"):
        plan(tiny("3"), tmp_path / "out", recipe_name="w8g32-e8-rtn", max_size=100)


def test_more_context_than_the_checkpoint_has_is_refused_with_its_number(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="--context 100000 is not possible") as caught:
        plan(tiny("3"), tmp_path / "out", context=100_000)
    assert "512 tokens" in caught.value.why


@pytest.mark.parametrize("context", [0, 1, 64, 95])
def test_less_context_than_the_gate_needs_is_refused_with_its_number(tiny: Build, tmp_path: Path, context: int) -> None:
    with pytest.raises(UsageFault, match="is not possible") as caught:
        plan(tiny("3"), tmp_path / "out", context=context)
    assert "96 tokens" in caught.value.why


def test_the_shortest_context_that_is_allowed_builds(tiny: Build, tmp_path: Path) -> None:
    work = plan(tiny("3"), tmp_path / "out", context=96, backend="onnx")
    assert building.build(work, quiet).gate.passed


@pytest.mark.parametrize("max_loss", [0.0, -1.0, float("nan"), float("inf")])
def test_a_largest_loss_that_is_no_limit_is_refused(tiny: Build, tmp_path: Path, max_loss: float) -> None:
    with pytest.raises(UsageFault, match="is not possible"):
        plan(tiny("3"), tmp_path / "out", max_loss=max_loss)


def test_a_gpu_target_says_so_when_the_cpu_backend_was_asked_for_too(tiny: Build, tmp_path: Path) -> None:
    work = plan(tiny("3"), tmp_path / "out", target="jetson", backend="onnx")
    assert any("uses no GPU there" in note for note in work.notes)


def test_a_bundle_larger_than_the_largest_size_is_not_kept(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.choosing.bundle_bytes", lambda *_: 0)
    work = plan(tiny("3"), tmp_path / "place" / "out", backend="onnx", max_size=120_000)
    with pytest.raises(NothingFits, match=r"the bundle has .* MB, --max-size is 0\.1 MB"):
        building.build(work, quiet)
    assert not (tmp_path / "place").exists()


@pytest.mark.parametrize("backend", ["onnx", "llamacpp"])
def test_a_bundle_that_will_be_too_large_is_refused_before_its_weights_are_read(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, backend: str
) -> None:
    work = plan(tiny("3"), tmp_path / "made", backend=backend)
    predicted = choosing.bundle_bytes(work, Checkpoint.open(tiny("3")))
    made = building.build(work, quiet)
    assert made.bytes <= predicted <= 1.15 * made.bytes
    work = plan(tiny("3"), tmp_path / "out", backend=backend, max_size=int(predicted / 1.03))
    monkeypatch.setattr(Checkpoint, "scan", lambda *_: pytest.fail("read"))
    with pytest.raises(NothingFits, match=r"the bundle would have about .* MB, --max-size is"):
        building.build(work, quiet)
    assert not (tmp_path / "out").exists()


def test_a_group_that_does_not_divide_a_matrix_leaves_nothing(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="does not divide"):
        plan(tiny("3"), tmp_path / "out", recipe_name="w4g128-e8-rtn")


def test_a_target_with_no_usable_backend_names_each_reason(tiny: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    for engine in ("onnx", "llamacpp", "mlc"):
        monkeypatch.setattr(f"edgeq.backends.{engine}.tools", absent)
    with pytest.raises(MissingTool, match="no backend") as caught:
        planning.plan(str(tiny("3")), target="x86-avx2")
    assert "pip install engine" in caught.value.why


@pytest.mark.parametrize("recipe_name", ["auto", "w4g32-e8-rtn"])
def test_a_model_that_the_first_backend_cannot_load_is_built_with_the_next(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, recipe_name: str
) -> None:
    for engine in ("onnx", "llamacpp"):
        monkeypatch.setattr(f"edgeq.backends.{engine}.tools", lambda _: ())
    monkeypatch.setattr("edgeq.backends.mlc.tools", absent)
    folder = checkpoints.write(tmp_path / "odd", "3.5")
    config = checkpoints.config_of("3.5") | {"linear_value_head_dim": 64}
    checkpoints.write_json(folder / "config.json", config)
    checkpoints.write_weights(folder, checkpoints.random_tensors(read_config(config), 0, False), "BF16", 1)
    work = planning.plan(str(folder), target="jetson", recipe_name=recipe_name, offline=True, context=256)
    assert work.backend == "onnx"
    assert any(note.startswith("backend onnx: the first of") for note in work.notes)
    with pytest.raises(UnsupportedModel):
        planning.plan(str(folder), target="jetson", recipe_name=recipe_name, backend="llamacpp", offline=True)


@pytest.mark.usefixtures("any_engine")
def test_the_document_has_every_promised_key(tiny: Build, tmp_path: Path) -> None:
    import msgspec

    document = msgspec.to_builtins(building.build(plan(tiny("2.5"), tmp_path / "out", max_loss=100.0), quiet))
    assert document.keys() >= {
        *("bundle", "digest", "model", "generation", "target", "recipe", "backend", "provider", "bytes"),
        *("bits_per_weight", "seconds", "peak_rss_bytes", "peak_anonymous_bytes", "gate"),
    }
    assert document["gate"].keys() >= {
        *("passed", "kl_mean", "top1_agreement", "perplexity_reference", "perplexity", "reason"),
    }
    assert document["provider"] == "null"
    assert np.isfinite(document["gate"]["kl_mean"])


def test_too_little_memory_is_said_with_the_prediction_before_any_work(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=500_000_000))
    steps: list[str] = []
    with pytest.raises(OutOfMemory, match=r"needs about 0\.7 GB of memory, 0\.5 GB are free") as caught:
        building.build(plan(tiny("3"), tmp_path / "out"), lambda phase, *_: steps.append(phase))
    assert caught.value.exit_code == 21
    assert steps == []


@pytest.mark.usefixtures("any_engine")
def test_a_users_file_in_an_older_bundles_folder_is_never_deleted(tiny: Build, tmp_path: Path) -> None:
    work = plan(tiny("3"), tmp_path / "out", max_loss=100.0)
    building.build(work, quiet)
    note = work.out / "notes.txt"
    note.write_text("mine")
    with pytest.raises(UsageFault, match=r"notes\.txt is not part of the bundle there"):
        building.build(work, quiet)
    assert note.read_text() == "mine"
    note.unlink()
    building.build(work, quiet)
