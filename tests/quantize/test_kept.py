from __future__ import annotations

import ast
from pathlib import Path
from unittest.mock import Mock

import numpy as np
import pytest

import checkpoints
from checkpoints import Build
from edgeq import recipe
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput
from edgeq.quantize import kept
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solve import part

MATRIX = "model.layers.0.mlp.down_proj.weight"
TABLE = "model.embed_tokens.weight"
WORDS = [
    "w2g32-e8-rtn",
    "w2agcol-e8-rtn",
    "w4g16-e4-rtn",
    "w4ag32-e16-mse",
    "w4gcol-e8-rtn",
    "w8g32-e8-rtn",
    "w8agcol-e8-rtn",
]
GGML = ["q4_1-eq4_1-rtn", "iq4_nl-eiq4_nl-rtn", "q5_0-eq5_1-rtn"]


@pytest.mark.parametrize("word", [*WORDS, *GGML])
def test_what_is_kept_comes_back_exactly(tiny: Build, tmp_path: Path, word: str) -> None:
    if word in GGML:
        pytest.importorskip("llama_cpp", reason="ggml rounds its layouts itself", exc_type=ImportError)
    checkpoint, wanted = Checkpoint.open(tiny("3")), recipe.parse(word)
    solution = Solutions(checkpoint, wanted)(MATRIX)
    there = Solutions(checkpoint, wanted, tmp_path)
    there.keep(solution)
    assert [path.name for path in tmp_path.iterdir()] == [f"{MATRIX}.zip"]
    for field, value in vars(there(MATRIX)).items():
        np.testing.assert_array_equal(value, getattr(solution, field), err_msg=field)
    np.testing.assert_array_equal(there.rows(MATRIX)(np.array([3, 0])), solution.dequantize()[[3, 0]])
    np.testing.assert_array_equal(there.values(MATRIX), solution.dequantize())


@pytest.mark.parametrize("word", ["w4ag32-e16-mse", "iq4_nl-eiq4_nl-rtn"])
def test_threads_that_read_what_is_kept_parse_no_python(
    tiny: Build, tmp_path: Path, word: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    if word in GGML:
        pytest.importorskip("llama_cpp", reason="ggml rounds its layouts itself", exc_type=ImportError)
    there = Solutions(Checkpoint.open(tiny("3")), recipe.parse(word), tmp_path)
    there.keep(there(MATRIX))

    parse = Mock(wraps=ast.parse)
    monkeypatch.setattr(ast, "parse", parse)
    there(MATRIX)
    parse.assert_not_called()


def test_a_matrix_that_was_not_kept_is_solved(tiny: Build, tmp_path: Path) -> None:
    checkpoint, wanted = Checkpoint.open(tiny("3")), recipe.parse("w4g32-e8-rtn")
    for name in (MATRIX, TABLE):
        found, solved = Solutions(checkpoint, wanted, tmp_path)(name), Solutions(checkpoint, wanted)(name)
        np.testing.assert_array_equal(found.dequantize(), solved.dequantize())


def test_a_table_of_floats_is_rounded_to_its_type(tiny: Build) -> None:
    checkpoint = Checkpoint.open(tiny("3", dtype="f32"))
    found = Solutions(checkpoint, recipe.parse("w4g32-e16-rtn")).values(TABLE)
    bits = checkpoints.encode(checkpoint.tensor(TABLE), "BF16").astype(np.uint32) << 16
    np.testing.assert_array_equal(found.view(np.uint32), bits)


@pytest.mark.parametrize("damage", [b"", b"PK", b"half", b"flipped", b"other"])
def test_a_kept_file_that_is_damaged_is_refused_with_its_name(tiny: Build, tmp_path: Path, damage: bytes) -> None:
    checkpoint, wanted = Checkpoint.open(tiny("3")), recipe.parse("w4g32-e8-rtn")
    there, path = Solutions(checkpoint, wanted, tmp_path), tmp_path / f"{MATRIX}.zip"
    there.keep(part(there(MATRIX), slice(None)))
    sound = path.read_bytes()
    middle = len(sound) // 3
    flipped = sound[:middle] + bytes([sound[middle] ^ 255]) + sound[middle + 1 :]
    path.write_bytes({b"half": sound[: len(sound) // 2], b"flipped": flipped}.get(damage, damage))
    if damage == b"other":
        with path.open("wb") as stream:
            np.savez(stream, something=np.zeros(3))
    with pytest.raises(CorruptInput, match="not a solution that was kept") as caught:
        there(MATRIX)
    assert str(path) in caught.value.what


def test_codes_of_four_bits_are_two_to_a_byte() -> None:
    codes = np.random.default_rng(0).integers(0, 16, (5, 64)).astype(np.uint8)
    stored = kept._packed(codes, 4)
    assert stored.shape == (5, 32)
    np.testing.assert_array_equal(kept._unpacked(stored, 4), codes)
