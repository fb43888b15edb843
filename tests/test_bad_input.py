"""Damaged and hostile checkpoints through the whole command: exit code, message, and nothing left behind."""

from __future__ import annotations

import json
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import checkpoints

WEIGHTS = "model.safetensors"
SHARD = "model-00002-of-00002.safetensors"
COMMAND = (
    "import sys; from edgeq import cli; code = cli.main(sys.argv[1:]); "
    "heavy = {'torch', 'transformers', 'onnxruntime'} & set(sys.modules); "
    "sys.exit(code if not heavy else f'imported {heavy}')"
)


def unlink_shard(folder: Path) -> None:
    (folder / SHARD).unlink()


def truncate(folder: Path) -> None:
    content = (folder / WEIGHTS).read_bytes()
    (folder / WEIGHTS).write_bytes(content[: len(content) // 2])


def not_a_number(folder: Path) -> None:
    content = bytearray((folder / WEIGHTS).read_bytes())
    content[-2:] = b"\xc0\x7f"
    (folder / WEIGHTS).write_bytes(content)


def zero_block(folder: Path) -> None:
    path = folder / WEIGHTS
    content = bytearray(path.read_bytes())
    (length,) = struct.unpack("<Q", content[:8])
    start, stop = json.loads(content[8 : 8 + length])["model.layers.1.mlp.down_proj.weight"]["data_offsets"]
    content[8 + length + start : 8 + length + stop] = bytes(stop - start)
    path.write_bytes(content)


def wrong_layer_count(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["num_hidden_layers"] = 3
    (folder / "config.json").write_text(json.dumps(config))


def only_pickle(folder: Path) -> None:
    (folder / WEIGHTS).rename(folder / "pytorch_model.bin")


def auto_map(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    config["auto_map"] = {"AutoModel": "modeling.Evil"}
    (folder / "config.json").write_text(json.dumps(config))


def template_walk(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text("{{ ().__class__.__base__.__subclasses__() }}")


def template_bomb(folder: Path) -> None:
    (folder / "chat_template.jinja").write_text(
        "{% for a in range(99999) %}{% for b in range(99999) %}{% for c in range(99999) %}" + "{% endfor %}" * 3
    )


def another_architecture(folder: Path) -> None:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"model_type": "llama"}))


FAULTS: list[tuple[Callable[[Path], None], int, str]] = [
    (unlink_shard, 10, SHARD),
    (truncate, 10, WEIGHTS),
    (zero_block, 10, "model.layers.1.mlp.down_proj.weight"),
    (not_a_number, 10, "model.norm.weight"),
    (wrong_layer_count, 10, "layers"),
    (only_pickle, 11, "pytorch_model.bin"),
    (auto_map, 11, "auto_map"),
    (template_walk, 11, "chat template"),
    (template_bomb, 11, "chat template"),
    (another_architecture, 13, "llama"),
]


@pytest.mark.parametrize(("damage", "code", "named"), FAULTS, ids=lambda value: getattr(value, "__name__", None))
def test_a_bad_checkpoint_gets_its_exit_code_names_the_culprit_and_leaves_nothing(
    tmp_path: Path, damage: Callable[[Path], None], code: int, named: str
) -> None:
    folder = checkpoints.write(tmp_path / "bad", "3", shards=2 if damage is unlink_shard else 1)
    damage(folder)
    place = tmp_path / "place"
    words = ["build", str(folder), "-t", "x86-avx2", "-o", str(place / "out")]
    child = subprocess.run([sys.executable, "-c", COMMAND, *words], capture_output=True, text=True, check=False)
    assert child.returncode == code, child.stderr
    assert named in child.stderr
    assert "Next: " in child.stderr
    assert not place.exists()


@pytest.mark.slow
def test_a_hugging_face_cache_of_links_is_read_through_and_copied(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "blobs", "3")
    snapshot = tmp_path / "snapshots" / "abc"
    snapshot.mkdir(parents=True)
    for path in source.iterdir():
        (snapshot / path.name).symlink_to(path)
    out = tmp_path / "out"
    words = ["build", str(snapshot), "-t", "x86-avx2", "-o", str(out)]
    child = subprocess.run([sys.executable, "-m", "edgeq.cli", *words], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    assert not any(path.is_symlink() for path in out.rglob("*"))
