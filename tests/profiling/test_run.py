from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import checkpoints
from checkpoints import Build, quiet
from edgeq import accuracy, building, bundle, cli, data, planning
from edgeq.errors import CorruptInput, DigestMismatch, InvalidMeasurement, OutOfMemory, UsageFault
from edgeq.profiling import measure, run
from edgeq.profiling.measure import Plan

SHORT = Plan(prompts=(16,), tokens=4, repetitions=1)
KEYS = {
    *("schema", "bundle", "model", "generation", "recipe", "backend", "provider", "target", "machine", "load"),
    *("first_token_s", "prefill", "decode", "memory", "energy", "accuracy", "sustained", "health", "valid", "grade"),
    *("reasons", "tools", "threads"),
}


def test_one_row_of_a_real_engine_has_every_promised_key_and_its_gates_loss(
    built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    folder = built("3", "w4g32-e8-rtn")
    words = ["profile", str(folder), "--target", "host", "-p", "16", "-n", "4", "-r", "1", "--save", "--json"]
    code = cli.main(words)
    printed = capsys.readouterr()
    row = json.loads(printed.out.splitlines()[-1])
    assert row.keys() >= KEYS
    assert row["accuracy"]["kl_mean"] == pytest.approx(bundle.read(folder).gate.kl_mean, rel=0.05)
    assert row["memory"]["kv_cache_bytes_per_token"] == 2 * 2 * 2 * 32 * 4
    if sys.platform == "linux":
        assert row["memory"]["peak_rss_bytes"] > 10_000_000
    assert [tool.split()[0] for tool in row["tools"]] == ["edgeq", "onnxruntime"]
    saved = Path("profiles") / row["target"] / "tiny3.w4g32-e8-rtn.onnx.json"
    assert code == (0 if row["valid"] else 7)
    assert saved.exists() == row["valid"]
    if row["valid"]:
        assert json.loads(saved.read_text()) == row
        assert str(saved) in printed.err
    else:
        assert "not a valid measurement" in printed.err


@pytest.mark.parametrize("valid", [True, False])
def test_only_a_valid_row_is_saved(built: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, valid: bool) -> None:
    monkeypatch.chdir(tmp_path)
    folder, plan = built("3", "w4g32-e8-rtn"), Plan(prompts=(16,), tokens=4, repetitions=1, accuracy="none")
    row = msgspec.structs.replace(run.profile(folder, target="host", progress=quiet, plan=plan), valid=valid)
    monkeypatch.setattr(measure, "profile", lambda *_, **__: row)
    assert run.profile(folder, target="host", progress=quiet, plan=plan, save=True) == row
    assert run.saved_path(row).exists() == valid


def test_a_machine_that_is_not_the_target_is_refused(built: Build) -> None:
    with pytest.raises(InvalidMeasurement, match="this machine is not jetson-orin-nano-super-8gb") as caught:
        run.profile(built("3", "w4g32-e8-rtn"), target="jetson", progress=quiet, plan=SHORT)
    assert caught.value.exit_code == 7
    assert "--target host" in caught.value.run


def test_a_changed_bundle_is_not_measured(built: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built("3", "w4g32-e8-rtn"), tmp_path / "changed"))
    with (folder / "model.onnx.data").open("ab") as stream:
        stream.write(b"x")
    with pytest.raises(DigestMismatch, match=r"model\.onnx\.data"):
        run.profile(folder, target="host", progress=quiet, plan=SHORT)


def small_bundle(tmp_path: Path) -> tuple[Path, Path]:
    source = checkpoints.write(tmp_path / "source", "3")
    plan = planning.plan(str(source), target="host", recipe_name="w4g32-e8-rtn", out=tmp_path / "out", context=256)
    building.build(plan, quiet)
    return source, plan.out


def test_full_accuracy_runs_the_reference_over_a_text_of_ones_own(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    _, folder = small_bundle(tmp_path)
    monkeypatch.chdir(tmp_path)
    text = tmp_path / "own.txt"
    text.write_text((data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")[:2000], encoding="utf-8")
    row = run.profile(folder, target="host", progress=quiet, plan=SHORT, text=text)
    assert row.accuracy is not None
    recorded = accuracy.load(folder / bundle.REFERENCE)
    assert row.accuracy.text_sha256 != recorded.text_sha256
    assert row.accuracy.tokens > recorded.windows.shape[1]


def test_full_accuracy_needs_the_very_checkpoint_that_was_built(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, folder = small_bundle(tmp_path)
    full = Plan(prompts=(16,), tokens=4, repetitions=1, accuracy="full")
    monkeypatch.chdir(tmp_path)
    checkpoints.write(source, "3", seed=1)
    with pytest.raises(DigestMismatch, match="not the checkpoint that the bundle was made of"):
        run.profile(folder, target="host", progress=quiet, plan=full)
    shutil.rmtree(source)
    with pytest.raises(UsageFault, match="needs the checkpoint source, which is not here"):
        run.profile(folder, target="host", progress=quiet, plan=full)


def test_a_reference_that_does_not_fit_in_memory_is_not_run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    _, folder = small_bundle(tmp_path)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("psutil.virtual_memory", lambda: SimpleNamespace(available=500_000_000))
    with pytest.raises(OutOfMemory, match=r"needs about 0\.7 GB of memory, 0\.5 GB are free"):
        run.profile(folder, target="host", progress=quiet, plan=Plan(prompts=(16,), tokens=4, accuracy="full"))


def test_a_bundle_for_a_target_of_ones_own_asks_for_its_file(built: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(built("3", "w4g32-e8-rtn"), tmp_path / "own"))
    own = bundle.seal(msgspec.structs.replace(bundle.read(folder), target="my-board"))
    (folder / bundle.MANIFEST).write_bytes(msgspec.json.encode(own))
    with pytest.raises(UsageFault, match="my-board") as caught:
        run.profile(folder, target=None, progress=quiet, plan=SHORT)
    assert "give its file with --target FILE" in caught.value.run


def test_a_text_that_is_missing_or_not_utf8_is_refused_before_anything_is_measured(
    built: Build, tmp_path: Path
) -> None:
    folder = built("3", "w4g32-e8-rtn")
    with pytest.raises(UsageFault, match=r"none\.txt: No such file"):
        run.profile(folder, target="host", progress=quiet, plan=SHORT, text=tmp_path / "none.txt")
    with pytest.raises(UsageFault, match=r": Is a directory"):
        run.profile(folder, target="host", progress=quiet, plan=SHORT, text=tmp_path)
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(CorruptInput, match=r"latin\.txt: not UTF-8"):
        run.profile(folder, target="host", progress=quiet, plan=SHORT, text=tmp_path / "latin.txt")
