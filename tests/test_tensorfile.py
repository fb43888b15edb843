"""Headers of weight files, hostile and damaged: refused at once, or read as they stand."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
import edgeq
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, EdgeqError
from edgeq.tensorfile import read_header

UP = "model.layers.0.mlp.up_proj.weight"
ENTRY = {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}


@pytest.mark.parametrize(
    ("header", "words"),
    [
        (b'{"a": 1, "a": 2}', "duplicate key 'a'"),
        (b'{"__metadata__": {"a": 1}}', "__metadata__"),
        (b'{"a":' * 50_000, "not valid JSON"),
        ({"a": 1}, "is not a tensor"),
        ({"a": ENTRY | {"more": 1}}, "is not a tensor"),
        ({"a" * 300: ENTRY}, "is not a tensor"),
        ({"a": ENTRY | {"dtype": "F33"}}, "unknown dtype"),
        ({"a": ENTRY | {"dtype": []}}, "unknown dtype"),
        ({"a": ENTRY | {"shape": [-2]}}, "no valid shape"),
        ({"a": ENTRY | {"shape": [2.0]}}, "no valid shape"),
        ({"a": ENTRY | {"shape": [True, 2]}}, "no valid shape"),
        ({"a": ENTRY | {"shape": [1 << 60]}}, "no valid shape"),
        ({"a": ENTRY | {"shape": [1 << 40] * 8}}, "holds 8 bytes"),
        ({"a": ENTRY | {"shape": [1] * 9}}, "no valid shape"),
        ({"a": ENTRY | {"shape": [3]}}, "holds 8 bytes"),
        ({"a": ENTRY | {"data_offsets": [0]}}, "no valid data_offsets"),
        ({"a": ENTRY | {"data_offsets": [8, 0]}}, "holds -8 bytes"),
        ({"a": ENTRY | {"data_offsets": [-8, 0]}}, "no valid data_offsets"),
        ({"a": ENTRY, "b": ENTRY}, "overlaps"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [4, 12]}}, "overlaps"),
        ({"a": ENTRY | {"data_offsets": [4, 12]}}, "leaves a gap"),
        ({"a": ENTRY, "b": ENTRY | {"data_offsets": [8, 16]}}, "cut short"),
        ({}, "longer than"),
    ],
)
def test_a_hostile_header_is_corrupt(tmp_path: Path, header: bytes | dict[str, Any], words: str) -> None:
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    checkpoints.write_raw(tmp_path / "model.safetensors", raw, bytes(8))
    with pytest.raises(CorruptInput) as caught:
        read_header(tmp_path / "model.safetensors")
    assert "model.safetensors" in str(caught.value)
    assert words in str(caught.value)


def test_a_header_gives_every_tensor_with_its_place(tmp_path: Path) -> None:
    checkpoints.write_raw(tmp_path / "a", json.dumps({"a": ENTRY, "__metadata__": {"format": "pt"}}).encode(), bytes(8))
    (entry,) = read_header(tmp_path / "a").values()
    size = (tmp_path / "a").stat().st_size
    assert (entry.name, entry.dtype, entry.shape, entry.values) == ("a", "F32", (2,), 2)
    assert (entry.offset, entry.stop) == (size - 8, size)


@pytest.mark.parametrize("length", [1 << 63, (1 << 64) - 1, 1 << 31, 100])
def test_a_huge_header_length_is_corrupt(tmp_path: Path, length: int) -> None:
    (tmp_path / "model.safetensors").write_bytes(length.to_bytes(8, "little") + b"{}")
    with pytest.raises(CorruptInput, match=r"model\.safetensors: not a whole safetensors file"):
        read_header(tmp_path / "model.safetensors")


def test_the_worst_header_stays_below_200_megabytes(tmp_path: Path) -> None:
    """The peak is the process's own, so it is measured in a fresh one."""
    folder = checkpoints.write(tmp_path, "3")
    raw = ("{" + ",".join(f'"{number:x}":{{}}' for number in range(190_000)) + "}").encode()
    assert len(raw) < 2 << 20
    checkpoints.write_raw(folder / "model.safetensors", raw, b"")
    script = """
import sys
from pathlib import Path
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput
from edgeq.profiling import memory
try:
    Checkpoint.open(Path(sys.argv[1]))
except CorruptInput:
    print(memory.read().rss_bytes)
"""
    source = str(Path(next(iter(edgeq.__path__))).parent)
    environment = os.environ | {"PYTHONPATH": source}
    words = [sys.executable, "-c", script, str(folder)]
    done = subprocess.run(words, env=environment, capture_output=True, text=True, timeout=60, check=True)
    assert int(done.stdout) < 200e6


@dataclass
class Target:
    """A folder whose weights each example overwrites, and its sound header and data."""

    folder: Path
    header: dict[str, Any]
    data: bytes

    def outcome(self, raw: bytes) -> int:
        """Exit code of reading the folder with such a weight file, 0 when it is sound."""
        (self.folder / "model.safetensors").write_bytes(raw)
        try:
            Checkpoint.open(self.folder).scan(lambda done, total: None)
        except EdgeqError as error:
            return error.exit_code
        return 0


@pytest.fixture(scope="module")
def target(tmp_path_factory: pytest.TempPathFactory) -> Target:
    """A sound checkpoint to damage."""
    folder = checkpoints.write(tmp_path_factory.mktemp("fuzz") / "tiny", "3")
    return Target(folder, *checkpoints.read_safetensors(folder / "model.safetensors"))


FUZZ = settings(deadline=None, max_examples=60, suppress_health_check=[HealthCheck.too_slow])
SCALAR = st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5)
VALUE = SCALAR | st.lists(SCALAR, max_size=3) | st.dictionaries(st.text(max_size=5), SCALAR, max_size=3)


@FUZZ
@given(raw=st.binary(max_size=200))
def test_random_bytes_are_refused(target: Target, raw: bytes) -> None:
    assert target.outcome(raw) == 10


@FUZZ
@given(name=st.sampled_from([UP, "__metadata__"]), key=st.sampled_from(["dtype", "shape", "data_offsets"]), value=VALUE)
def test_a_changed_field_of_the_header_is_read_or_refused(target: Target, name: str, key: str, value: object) -> None:
    header = target.header | {name: target.header[name] | {key: value}}
    text = json.dumps(header).encode()
    assert target.outcome(len(text).to_bytes(8, "little") + text + target.data) in (0, 10)


@FUZZ
@given(name=st.sampled_from([UP, "__metadata__", "more"]), value=VALUE)
def test_a_changed_entry_of_the_header_is_read_or_refused(target: Target, name: str, value: object) -> None:
    text = json.dumps(target.header | {name: value}).encode()
    assert target.outcome(len(text).to_bytes(8, "little") + text + target.data) in (0, 10)


@FUZZ
@given(position=st.integers(0, 20_000), byte=st.integers(0, 255))
def test_one_changed_byte_is_read_or_refused(target: Target, position: int, byte: int) -> None:
    text = json.dumps(target.header).encode()
    raw = bytearray(len(text).to_bytes(8, "little") + text + target.data)
    raw[position] = byte
    assert target.outcome(bytes(raw)) in (0, 10)
