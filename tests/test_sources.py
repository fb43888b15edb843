from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

import checkpoints
from checkpoints import Build
from edgeq import bundle, catalog, hub, sources
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault
from edgeq.model import read_config

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(autouse=True)
def asked(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str | None, bool]]:
    """What the hub was asked for; nothing is downloaded."""
    calls: list[tuple[str, str | None, bool]] = []

    def download(repo: str, revision: str | None, offline: bool) -> hub.Download:
        calls.append((repo, revision, offline))
        return hub.Download(Path("cache", COMMIT), repo, COMMIT)

    def config(repo: str, revision: str | None, offline: bool) -> dict[str, Any]:
        calls.append((repo, revision, offline))
        return checkpoints.config_of("3.5", multimodal=True)

    monkeypatch.setattr(hub, "download", download)
    monkeypatch.setattr(hub, "config", config)
    return calls


@pytest.mark.parametrize("name", sources.DEMOS)
def test_a_demo_is_found_without_the_hub(name: str, asked: list[Any]) -> None:
    found = sources.find(name, offline=True)
    assert (found.kind, found.name, found.revision, found.short_name) == ("demo", name, None, name)
    assert Checkpoint.open(found.folder).model.generation == name.removeprefix("demo-qwen")
    assert asked == []


def test_a_folder_is_found_by_any_path_and_named_after_itself(
    tiny: Build, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    folder = tiny("3")
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder.parent))
    for path in (str(folder), ".", f"../{folder.name}", f"~/{folder.name}", f"{folder}/"):
        found = sources.find(path, offline=False)
        assert (found.kind, found.name, found.folder) == ("folder", folder.name, folder.resolve())
    assert asked == []


def test_a_folder_wins_over_a_catalogue_name_and_a_hub_id(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("qwen3-0.6b", "Qwen/Qwen3-0.6B"):
        (tmp_path / name).mkdir(parents=True)
        assert sources.find(name, offline=False).kind == "folder"
    assert asked == []


@pytest.mark.parametrize("name", ["with space", "häßlich", "caf\udce9", "line\nbreak"])
def test_a_folder_of_any_name_can_be_recorded(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir()
    found = sources.find(str(tmp_path / name), offline=True)
    assert found.folder == tmp_path / name
    assert found.folder.is_dir()
    record = bundle.Source(found.kind, found.name, found.revision, ())
    assert msgspec.json.decode(msgspec.json.encode(record), type=bundle.Source) == record
    assert found.short_name


@pytest.mark.parametrize(
    ("word", "repo", "revision"),
    [
        ("Qwen/Qwen3-0.6B", "Qwen/Qwen3-0.6B", None),
        ("Qwen/Qwen3-0.6B@main", "Qwen/Qwen3-0.6B", "main"),
        (f"someone/My_model.v1@{COMMIT}", "someone/My_model.v1", COMMIT),
        ("someone/model@refs/pr/3", "someone/model", "refs/pr/3"),
    ],
)
def test_a_hub_id_is_read_with_its_revision(word: str, repo: str, revision: str | None, asked: list[Any]) -> None:
    found = sources.find(word, offline=True)
    assert asked == [(repo, revision, True)]
    assert (found.kind, found.name, found.revision) == ("hub", repo, COMMIT)
    assert found.folder == Path("cache", COMMIT)
    assert found.short_name == repo.split("/")[1].lower()


@pytest.mark.parametrize("word", ["qwen3-0.6b", "Qwen3-0.6B"])
def test_a_catalogue_name_in_any_case_is_its_hub_id(word: str, asked: list[Any]) -> None:
    found = sources.find(word, offline=False)
    assert asked == [("Qwen/Qwen3-0.6B", None, False)]
    assert found.name == "Qwen/Qwen3-0.6B"


@pytest.mark.parametrize(
    "word",
    [
        *("", "demo-qwen4", "qwen3-0.7b", "/nowhere/at/all", "./nowhere", "~nobody-of-that-name/model", "a/b/c"),
        *("owner/", "/name", "owner/name@", "owner/na me", "owner/name\n", "https://huggingface.co/a/b", "nul\0byte"),
    ],
)
def test_an_unknown_word_is_a_usage_fault_and_asks_no_hub(word: str, asked: list[Any]) -> None:
    with pytest.raises(UsageFault, match="is no folder, demo, catalogue name or hub id") as caught:
        sources.find(word, offline=False)
    with pytest.raises(UsageFault, match="is no folder, demo, catalogue name or hub id"):
        sources.shape(word, offline=False)
    assert caught.value.exit_code == 2
    assert repr(word) in caught.value.what
    assert caught.value.run == "edgeq models list"
    assert asked == []


@pytest.mark.parametrize(
    ("word", "near"), [("demo-qwen", "demo-qwen3"), ("qwen3-0.6", "qwen3-0.6b"), ("DEMO-QWEN3.5", "demo-qwen3.5")]
)
def test_an_unknown_word_suggests_the_near_names(word: str, near: str) -> None:
    with pytest.raises(UsageFault) as caught:
        sources.find(word, offline=False)
    assert caught.value.why.startswith("Did you mean ")
    assert near in caught.value.why


def test_a_word_like_nothing_lists_all_names() -> None:
    with pytest.raises(UsageFault) as caught:
        sources.find("zzz", offline=False)
    for name in (*sources.DEMOS, *catalog.names()):
        assert name in caught.value.why


def test_a_bundle_is_no_checkpoint_and_is_called_what_it_is(tmp_path: Path) -> None:
    (tmp_path / bundle.MANIFEST).write_text("{}")
    for ask in (sources.find, sources.shape, sources.configured):
        with pytest.raises(UsageFault, match="is a bundle, not a checkpoint") as caught:
            ask(str(tmp_path), offline=True)
        assert f"edgeq profile {tmp_path}" in caught.value.run


@pytest.mark.parametrize("name", sources.DEMOS)
def test_the_shape_of_a_demo_is_that_of_its_folder(name: str, asked: list[Any]) -> None:
    model = Checkpoint.open(sources.find(name, offline=True).folder).model
    assert sources.shape(name, offline=True) == (name, model)
    assert asked == []


def test_the_shape_of_a_folder_is_read_from_headers_that_must_be_sound(tmp_path: Path, asked: list[Any]) -> None:
    folder = checkpoints.write(tmp_path / "Tiny", "3", tied=False)
    assert sources.shape(str(folder), offline=True) == ("tiny", Checkpoint.open(folder).model)
    (folder / "model.safetensors").unlink()
    with pytest.raises(CorruptInput):
        sources.shape(str(folder), offline=True)
    assert asked == []


@pytest.mark.parametrize("name", catalog.names())
def test_the_shape_of_a_catalogue_name_needs_no_hub(name: str, asked: list[Any]) -> None:
    assert sources.shape(name.upper(), offline=False) == (name, catalog.load(name).model)
    assert asked == []


def test_the_shape_of_a_hub_id_is_read_from_its_configuration_alone(
    monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    monkeypatch.setattr(hub, "download", lambda *_: pytest.fail("the weights were asked for"))
    name, model = sources.shape("someone/My_Model@v2", offline=True)
    assert (name, model) == ("my_model", read_config(checkpoints.config_of("3.5", multimodal=True)))
    assert asked == [("someone/My_Model", "v2", True)]


def test_the_shape_of_a_folder_wins_over_that_of_a_catalogue_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoints.write(tmp_path / "qwen3-0.6b", "2.5")
    monkeypatch.chdir(tmp_path)
    assert sources.shape("qwen3-0.6b", offline=True)[1].generation == "2.5"


def test_the_record_holds_every_file_with_its_digest(tiny: Build) -> None:
    folder = tiny("3")
    record = sources.find(str(folder), offline=True).source(Checkpoint.open(folder))
    assert (record.kind, record.name, record.revision) == ("folder", folder.name, None)
    found = {file.path: file for file in record.files}
    assert {"config.json", "model.safetensors", "tokenizer.json"} <= set(found)
    assert found["model.safetensors"].sha256 == bundle.sha256(folder / "model.safetensors")


def test_what_is_here_is_a_folder_or_in_the_cache(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, asked: list[Any]
) -> None:
    calls: list[tuple[str, str | None]] = []

    def cached(repo: str, revision: str | None) -> Path:
        calls.append((repo, revision))
        return tmp_path / COMMIT

    monkeypatch.setattr(hub, "cached", cached)
    assert sources.here(str(tmp_path)) == tmp_path
    assert sources.here("demo-qwen3") == sources.find("demo-qwen3", offline=True).folder
    assert calls == []
    assert sources.here("qwen3-0.6b") == sources.here("someone/My_Model@v2") == tmp_path / COMMIT
    assert calls == [("Qwen/Qwen3-0.6B", None), ("someone/My_Model", "v2")]
    assert asked == []


def test_the_root_folder_has_a_name_too() -> None:
    assert sources.find("/", offline=True).short_name == "model"
