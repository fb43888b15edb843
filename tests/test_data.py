from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeq import data
from edgeq.errors import CorruptInput


class Point(msgspec.Struct, forbid_unknown_fields=True):
    x: int
    label: str = ""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "point"


def test_a_sound_document_is_read_from_both_formats(file: Path) -> None:
    file.write_text('x = 3\nlabel = "ü"\n', encoding="utf-8")
    assert data.read_toml(file, Point) == Point(3, "ü")
    file.write_bytes(data.to_json(Point(3, "ü")))
    assert data.read_json(file, Point) == Point(3, "ü")


@pytest.mark.parametrize(
    ("toml", "json", "field"),
    [
        ('x = "3"', '{"x": "3"}', "$.x"),
        ("x = 3\nlabel = 1", '{"x": 3, "label": 1}', "$.label"),
        ("y = 3\nx = 3", '{"y": 3, "x": 3}', "unknown field `y`"),
        ("", "{}", "missing required field `x`"),
    ],
)
def test_a_document_that_does_not_match_names_the_file_and_the_field(
    file: Path, toml: str, json: str, field: str
) -> None:
    for text, read in ((toml, data.read_toml), (json, data.read_json)):
        file.write_text(text)
        with pytest.raises(CorruptInput) as caught:
            read(file, Point)
        assert caught.value.what == f"{file}: not a valid Point file"
        assert field in caught.value.why


@pytest.mark.parametrize(
    "raw",
    [b"\xff", b"[", b"x = ", b"{", b"", b"x = " + b"9" * 5000, b"x = " + b"[" * 5000 + b"]" * 5000, b"x = 1\nx = 2"],
    ids=["not UTF-8", "open table", "no value", "open object", "empty", "huge number", "deep", "repeated"],
)
def test_damaged_text_is_corrupt_input_in_either_format(file: Path, raw: bytes) -> None:
    file.write_bytes(raw)
    for read in (data.read_toml, data.read_json):
        with pytest.raises(CorruptInput, match="not a valid Point file"):
            read(file, Point)


def test_deeply_nested_json_is_corrupt_input(file: Path) -> None:
    for depth in (900, 100_000):
        file.write_bytes(b'{"x":' + b"[" * depth + b"]" * depth + b"}")
        with pytest.raises(CorruptInput):
            data.read_json(file, Point)
    file.write_bytes(b"[" * 100_000)
    with pytest.raises(CorruptInput):
        data.read_json(file, list)


def test_json_is_written_in_the_declared_order_indented_with_a_final_newline() -> None:
    assert data.to_json(Point(1, "é")) == '{\n  "x": 1,\n  "label": "é"\n}\n'.encode()


def test_shipped_folders_are_found() -> None:
    for name in ("targets", "catalog", "demo"):
        assert data.folder(name).is_dir()


def test_data_of_an_installed_package_wins_over_a_checkout(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    package, checkout = tmp_path / "site" / "edgeq", tmp_path
    monkeypatch.setattr(data, "_PACKAGE", package)
    monkeypatch.setattr(data, "_CHECKOUT", checkout)
    assert data.folder("targets") == checkout / "targets"
    (package / "targets").mkdir(parents=True)
    assert data.folder("targets") == package / "targets"


def test_a_near_name_is_suggested_in_any_case() -> None:
    assert data.near("QWEN3-06b", ["qwen3-0.6b", "qwen3-8b", "llama"]).startswith("Did you mean qwen3-0.6b")


def test_known_names_are_listed_when_none_is_near() -> None:
    assert data.near("zzz", ["onnx", "null"]) == "Known: null, onnx."
    assert data.suggested("zzz", ["onnx", "null"]) == ""
