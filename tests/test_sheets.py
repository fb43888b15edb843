from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import msgspec
import pytest

import checkpoints
import machines
from checkpoints import Build
from edgeq import backends, catalog, hub, machine, planning, recipe, sheets, size
from edgeq.choosing import Prediction
from edgeq.errors import UsageFault
from edgeq.model import Model, read_config


@pytest.fixture(autouse=True)
def _no_hub(monkeypatch: pytest.MonkeyPatch) -> None:
    def download(*_: Any) -> Any:
        pytest.fail("the hub was asked")

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "config", download)


def check(sheet: sheets.ModelSheet, model: Model) -> None:
    assert sheet.parameters == model.parameters
    assert (sheet.layers, sheet.hidden, sheet.vocabulary) == (model.layers, model.hidden, model.vocab)
    assert sheet.full_attention_layers == model.full_attention_layers
    assert sheet.kv_cache_bytes_per_token == 2 * 4 * model.full_attention_layers * model.kv_heads * model.head_dim
    assert [row.recipe for row in sheet.recipes] == list(recipe.SHIPPED)
    for row in sheet.recipes:
        assert row.weights_bytes == size.weight_bytes(model, recipe.parse(row.recipe))
        assert row.bits_per_weight == pytest.approx(8 * row.weights_bytes / model.parameters)
        for held in row.backends:
            wanted, engine = recipe.parse(row.recipe), backends.get(held.backend)
            engine.check(model, wanted)
            assert held.weights_bytes == size.weight_bytes(model, wanted, engine.scale_bits(wanted))
            assert held.bits_per_weight == pytest.approx(8 * held.weights_bytes / model.parameters)
    assert msgspec.json.decode(msgspec.json.encode(sheet), type=sheets.ModelSheet) == sheet


@pytest.mark.parametrize("name", catalog.names())
def test_a_catalogue_models_sheet_needs_no_hub(name: str) -> None:
    entry = catalog.load(name)
    sheet = sheets.model(name.upper(), offline=False)
    check(sheet, entry.model)
    assert (sheet.name, sheet.hub, sheet.license) == (name, entry.hub, entry.license)
    assert sheet.modality == entry.modality
    assert sheet.scores == entry.scores
    assert ("vision" in sheet.left_out) is entry.model.has_vision


def test_each_recipe_says_which_backends_run_it() -> None:
    def runs(name: str) -> dict[str, list[str]]:
        sheet = sheets.model(name, offline=True)
        return {row.recipe: [held.backend for held in row.backends] for row in sheet.recipes}

    found = runs("qwen3-0.6b")
    assert found["w16"] == found["w4g32-e8-rtn"] == ["onnx", "llamacpp", "mlc"]
    assert found["w4ag32-e8-mse"] == found["w2ag32-e8-mse"] == ["onnx"]
    assert found["w8gcol-e8-rtn"] == found["w4g128-e8-mse"] == ["onnx", "mlc"]
    assert found["q4_k-eq6_k-rtn"] == found["q2_k-eq6_k-rtn"] == ["llamacpp"]
    assert all(found.values())
    narrow = runs("qwen2.5-0.5b")
    assert narrow["q4_k-eq6_k-rtn"] == []
    assert narrow["w4ag32-e8-mse"] == ["onnx"]


def test_backends_differ_in_what_a_scale_takes() -> None:
    sheet = sheets.model("qwen3-0.6b", offline=True)
    (row,) = (row for row in sheet.recipes if row.recipe == "w4g32-e8-rtn")
    assert {held.backend: round(held.bits_per_weight, 2) for held in row.backends} == {
        "onnx": 6.05,
        "llamacpp": 5.55,
        "mlc": 6.05,
    }


def test_a_hub_id_of_the_catalogue_needs_no_hub_either() -> None:
    assert sheets.model("Qwen/Qwen3-0.6B", offline=False) == sheets.model("qwen3-0.6b", offline=True)


@pytest.mark.parametrize(("generation", "tied"), [("2.5", True), ("3", False), ("3.5", True)])
def test_a_folders_sheet_comes_from_its_checkpoint(tiny: Build, generation: str, tied: bool) -> None:
    from edgeq.checkpoint import Checkpoint

    folder = tiny(generation, tied=tied)
    sheet = sheets.model(str(folder), offline=True)
    check(sheet, Checkpoint.open(folder).model)
    assert (sheet.name, sheet.generation, sheet.tied) == (folder.name, generation, tied)
    assert (sheet.hub, sheet.license, sheet.commercial, sheet.thinking) == (None, None, None, None)
    assert sheet.modality == ("text",)
    assert sheet.left_out == ()


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_a_folders_configuration_is_enough(tmp_path: Path, generation: str) -> None:
    config = checkpoints.config_of(generation)
    (tmp_path / "config.json").write_text(json.dumps(config), encoding="utf-8")
    check(sheets.model(str(tmp_path), offline=True), read_config(config))


def test_what_is_left_out_is_said(tiny: Build) -> None:
    assert sheets.model(str(tiny("3.5", multimodal=True)), offline=True).left_out == ("vision", "mtp")


def test_a_hub_ids_sheet_comes_from_its_configuration_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    config = checkpoints.config_of("3.5", multimodal=True)
    monkeypatch.setattr(hub, "config", lambda *_: config)
    sheet = sheets.model("someone/Tiny", offline=False)
    check(sheet, read_config(config))
    assert (sheet.name, sheet.generation, sheet.hub, sheet.left_out) == ("tiny", "3.5", None, ("vision", "mtp"))


def test_an_unknown_model_is_a_usage_fault_with_near_names() -> None:
    with pytest.raises(UsageFault, match=r"qwen3-0\.6b"):
        sheets.model("qwen3-0.6", offline=True)


def test_a_plans_sheet_says_what_the_build_would_do(tiny: Build, tmp_path: Path) -> None:
    work = planning.plan(
        str(tiny("3")), target="x86-avx2", recipe_name="w8g32-e8-rtn", backend="null", context=128, out=tmp_path / "out"
    )
    sheet = sheets.plan(work, Prediction(None, 12345))
    assert (sheet.model, sheet.generation, sheet.target) == (tiny("3").name, "3", "x86-avx2")
    assert (sheet.recipe, sheet.backend, sheet.context) == ("w8g32-e8-rtn", "null", 128)
    assert sheet.bundle == str(tmp_path / "out")
    assert sheet.weights_bytes == size.weight_bytes(work.shape, work.recipe)
    assert sheet.max_loss == recipe.parse("w8g32-e8-rtn").max_loss
    assert sheet.notes == work.notes
    assert (sheet.predicted_loss, sheet.bundle_bytes) == (None, 12345)
    assert not (tmp_path / "out").exists()


def test_a_detection_names_the_target_and_the_state_of_its_backends(tmp_path: Path) -> None:
    found = sheets.detection(machine.this_machine(machines.cloud_vm(tmp_path)))
    assert found.target == "x86-avx512-vnni"
    assert found.cpu == "AMD EPYC"
    assert "avx512_vnni" in found.isa
    assert found.accelerators == ()
    assert found.memory_bytes == 24684084 * 1024
    assert found.backends
    assert all(state.reason for state in found.backends)
    msgspec.json.encode(found)
