from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeq import bundle, data
from edgeq.bundle import Bundle, File, Gate, Source
from edgeq.errors import CorruptInput, DigestMismatch, UnsafeInput, UsageFault

CONTENT = {
    "model.onnx": b"graph",
    "model.onnx.data": b"\0" * 5000,
    "sub/tokenizer.json": b"{}",
    "reference.npz": b"ref",
}


def fill(folder: Path, names: list[str]) -> None:
    for name in names:
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(CONTENT[name])


def describe(folder: Path, **changes: Any) -> Bundle:
    made = Bundle(
        schema=bundle.SCHEMA,
        digest="",
        model="tiny",
        generation="3",
        config={"hidden_size": 64, "rope_theta": 1e6, "rms_norm_eps": 1e-6, "layer_types": ["full_attention"]},
        source=Source("folder", "tiny", None, (File("model.safetensors", 3, "ab" * 32),)),
        recipe="w4g32-e8-rtn",
        bits_per_weight=5.123456789,
        target="x86-avx2",
        backend="null",
        provider="null",
        context=256,
        tools=("null 1",),
        notes=(),
        files=bundle.files_in(folder),
        gate=Gate(True, 0.1, 0.09, 0.9, 10.0, 11.0, None, 0.3, 100, "cd" * 32, "x86_64"),
    )
    return msgspec.structs.replace(made, **changes)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sealed bundle of four files."""
    place = tmp_path / "bundle"
    fill(place, list(CONTENT))
    (place / bundle.MANIFEST).write_bytes(data.to_json(bundle.seal(describe(place))))
    return place


def edit(folder: Path, **changes: Any) -> None:
    path = folder / bundle.MANIFEST
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def test_a_sealed_bundle_is_read_back_and_verified(folder: Path) -> None:
    made = bundle.read(folder)
    assert made == bundle.seal(describe(folder))
    assert len(made.digest) == 64
    bundle.verify_files(folder, made)


def test_the_bytes_of_a_bundle_leave_out_the_recorded_reference(folder: Path) -> None:
    assert bundle.read(folder).bytes == 5 + 5000 + 2


def test_files_are_listed_by_path_with_size_and_digest_and_without_the_manifest(folder: Path) -> None:
    found = bundle.files_in(folder)
    assert [file.path for file in found] == ["model.onnx", "model.onnx.data", "reference.npz", "sub/tokenizer.json"]
    assert found[0] == File("model.onnx", 5, bundle.sha256(folder / "model.onnx"))
    assert found[0].sha256 == "eef93e1d14482804277fca0172464032d1a4fdbcc338524059fa1e861454ad4d"


@pytest.mark.parametrize("mask", [0o000, 0o022, 0o077])
def test_the_digest_does_not_depend_on_the_order_of_files_or_the_umask(tmp_path: Path, folder: Path, mask: int) -> None:
    again = tmp_path / "again"
    before = os.umask(mask)
    try:
        fill(again, list(reversed(CONTENT)))
    finally:
        os.umask(before)
    assert bundle.seal(describe(again)).digest == bundle.read(folder).digest


def test_the_digest_depends_on_every_field(folder: Path) -> None:
    made = bundle.read(folder)
    changes: dict[str, Any] = {
        "model": "other",
        "config": made.config | {"hidden_size": 65},
        "source": msgspec.structs.replace(made.source, revision="main"),
        "recipe": "w16",
        "bits_per_weight": 5.12345678,
        "context": 255,
        "notes": ("a",),
        "files": made.files[:-1],
        "gate": msgspec.structs.replace(made.gate, kl_mean=0.2),
    }
    digests = {bundle.seal(msgspec.structs.replace(made, **{name: value})).digest for name, value in changes.items()}
    assert len(digests | {made.digest}) == len(changes) + 1


def test_a_figure_that_is_not_finite_survives_sealing_and_reading(folder: Path) -> None:
    gate = msgspec.structs.replace(bundle.read(folder).gate, perplexity=float("inf"))
    (folder / bundle.MANIFEST).write_bytes(data.to_json(bundle.seal(describe(folder, gate=gate))))
    assert bundle.read(folder).gate.perplexity is None


def grow(folder: Path) -> None:
    with (folder / "model.onnx").open("ab") as stream:
        stream.write(b"!")


def flip(folder: Path) -> None:
    raw = bytearray((folder / "model.onnx").read_bytes())
    raw[0] ^= 1
    (folder / "model.onnx").write_bytes(raw)


def link(folder: Path) -> None:
    (folder / "model.onnx").rename(folder.parent / "elsewhere")
    (folder / "model.onnx").symlink_to(folder.parent / "elsewhere")


def link_manifest(folder: Path) -> None:
    (folder / bundle.MANIFEST).rename(folder.parent / "elsewhere.json")
    (folder / bundle.MANIFEST).symlink_to(folder.parent / "elsewhere.json")


def link_folder(folder: Path) -> None:
    (folder / "more").symlink_to(folder.parent, target_is_directory=True)


def link_subfolder(folder: Path) -> None:
    (folder / "sub").rename(folder.parent / "sub")
    (folder / "sub").symlink_to(folder.parent / "sub", target_is_directory=True)


def pipe(folder: Path) -> None:
    (folder / "model.onnx").unlink()
    os.mkfifo(folder / "model.onnx")


@pytest.mark.parametrize(
    ("damage", "named", "state"),
    [
        (grow, "model.onnx", "changed"),
        (flip, "model.onnx", "changed"),
        (lambda folder: (folder / "sub/tokenizer.json").unlink(), "sub/tokenizer.json", "missing"),
        (lambda folder: (folder / "extra.bin").write_bytes(b""), "extra.bin", "not part of the bundle"),
        (lambda folder: (folder / "sub/extra").symlink_to("/nowhere"), "sub/extra", "not part of the bundle"),
        (link, "model.onnx", "is a link"),
        (link_manifest, "edgeq.json", "is a link"),
        (link_folder, "more", "not part of the bundle"),
        (link_subfolder, "sub", "not part of the bundle"),
        (pipe, "model.onnx", "no plain file"),
    ],
    ids=[
        *(
            "grown",
            "one bit",
            "missing",
            "extra",
            "extra dangling link",
            "link",
            "linked manifest",
            "extra linked folder",
        ),
        *("linked folder", "pipe"),
    ],
)
def test_a_damaged_bundle_is_a_digest_mismatch_that_names_the_file(
    folder: Path, damage: Any, named: str, state: str
) -> None:
    damage(folder)
    with pytest.raises(DigestMismatch) as caught:
        bundle.verify_files(folder, bundle.read(folder))
    assert caught.value.exit_code == 12
    assert caught.value.what.startswith(f"{folder / named}: ")
    assert state in caught.value.what


def test_a_manifest_cannot_name_files_outside_its_folder(folder: Path) -> None:
    (folder.parent / "outside").write_bytes(b"x")
    outside = File("../outside", 1, bundle.sha256(folder.parent / "outside"))
    made = describe(folder, files=(*bundle.files_in(folder), outside))
    with pytest.raises(DigestMismatch, match="outside: missing"):
        bundle.verify_files(folder, made)


@pytest.mark.parametrize("field", ["recipe", "digest", "model"])
def test_an_edited_manifest_is_a_digest_mismatch_that_names_it(folder: Path, field: str) -> None:
    edit(folder, **{field: "other"})
    with pytest.raises(DigestMismatch, match=r"edgeq\.json: changed after it was written"):
        bundle.read(folder)


def test_an_unknown_field_is_corrupt_input_that_names_it(folder: Path) -> None:
    edit(folder, surprise=1)
    with pytest.raises(CorruptInput, match="surprise"):
        bundle.read(folder)


def test_another_schema_is_corrupt_input(folder: Path) -> None:
    edit(folder, schema=2)
    with pytest.raises(CorruptInput, match="schema 2 is unknown"):
        bundle.read(folder)


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b"\xff", b'{"schema": "1"}', b"[" * 100_000])
def test_a_damaged_manifest_is_corrupt_input(folder: Path, raw: bytes) -> None:
    (folder / bundle.MANIFEST).write_bytes(raw)
    with pytest.raises(CorruptInput, match=r"edgeq\.json: not a valid Bundle file"):
        bundle.read(folder)


def test_a_folder_without_a_manifest_is_no_bundle(tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="is not a bundle"):
        bundle.read(tmp_path)
    with pytest.raises(UsageFault, match="is not a bundle"):
        bundle.read(tmp_path / "nowhere")


@pytest.mark.parametrize("target", ["/etc/hostname", "model.onnx", "."])
def test_links_are_refused_when_a_bundle_is_made(folder: Path, target: str) -> None:
    (folder / "link").symlink_to(target)
    with pytest.raises(UnsafeInput, match="may not hold links"):
        bundle.files_in(folder)
