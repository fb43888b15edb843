from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
from checkpoints import Build
from edgeq import recipe, size
from edgeq.checkpoint import Checkpoint
from edgeq.errors import GateFailed, UnsupportedModel, UsageFault
from edgeq.quantize import mse, rtn, solve
from edgeq.quantize.solution import Solution

MATRIX = "model.layers.0.mlp.down_proj.weight"
TABLE = "model.embed_tokens.weight"


@pytest.fixture(scope="module")
def checkpoint(tiny: Build) -> Checkpoint:
    return Checkpoint.open(tiny("3", tied=False))


@pytest.mark.parametrize("threads", [1, 3, None])
@pytest.mark.parametrize("piece", [1, 1000, 64 * 7, 1 << 22])
def test_the_solution_is_that_of_the_whole_matrix_whatever_the_pieces_and_threads(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, piece: int, threads: int | None
) -> None:
    monkeypatch.setattr(solve, "PIECE", piece)
    monkeypatch.setattr(os, "cpu_count", lambda: threads)
    for name in (MATRIX, TABLE):
        found = solve.solve(checkpoint, recipe.parse("w4g32-e8-rtn"), name)
        assert isinstance(found, Solution)
        codes, scales, zero_points = rtn.quantize(checkpoint.tensor(name), found.bits, 32)
        np.testing.assert_array_equal(found.codes, codes)
        np.testing.assert_array_equal(found.scales, scales)
        np.testing.assert_array_equal(found.zero_points, zero_points)
        assert (found.name, found.group) == (name, 32)


@pytest.mark.parametrize("word", ["w4ag32-e8-mse", "w2gcol-e16-rtn", "w8agcol-e8-rtn", "w4gcol-e4-mse"])
def test_new_layouts_are_the_same_too_whatever_the_pieces(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch, word: str
) -> None:
    wanted = recipe.parse(word)
    whole = solve.solve(checkpoint, wanted, MATRIX)
    assert isinstance(whole, Solution)
    assert whole.group == (wanted.body.group if wanted.body.group > 0 else 128)
    assert whole.symmetric is wanted.body.symmetric
    quantize = {"rtn": rtn.quantize, "mse": mse.quantize}[wanted.method]
    wanted_codes = quantize(checkpoint.tensor(MATRIX), whole.bits, whole.group, symmetric=wanted.body.symmetric)[0]
    monkeypatch.setattr(solve, "PIECE", 1000)
    monkeypatch.setattr(os, "cpu_count", lambda: 3)
    pieces = solve.solve(checkpoint, wanted, MATRIX)
    for found in (whole.codes, pieces.codes):
        np.testing.assert_array_equal(found, wanted_codes)


@pytest.mark.parametrize("word", ["w2g32-e8-rtn", "w2ag128-e8-rtn", "w2gcol-e8-rtn", "w4gcol-e8-rtn"])
@pytest.mark.parametrize("tail", [3, 30])
def test_few_bits_lose_less_than_the_limit_and_zeros_lose_more(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, word: str, tail: float
) -> None:
    def random(matrix: Any) -> None:
        matrix[:] = np.random.default_rng(7).standard_t(tail, matrix.shape) * 0.02

    checkpoint = with_weights(tmp_path, random)
    solve.solve(checkpoint, recipe.parse(word), MATRIX)

    quantize = rtn.quantize
    monkeypatch.setattr(rtn, "quantize", lambda weights, *layout, **which: quantize(0 * weights, *layout, **which))
    with pytest.raises(GateFailed):
        solve.solve(checkpoint, recipe.parse(word), MATRIX)


def test_no_piece_is_larger_than_the_limit(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    sizes: list[int] = []
    quantize = rtn.quantize

    def measured(weights: Any, bits: int, group: int, *, symmetric: bool) -> Any:
        sizes.append(weights.size)
        return quantize(weights, bits, group, symmetric=symmetric)

    monkeypatch.setattr(solve, "PIECE", 1000)
    monkeypatch.setattr(rtn, "quantize", measured)
    solve.solve(checkpoint, recipe.parse("w4g32-e8-rtn"), MATRIX)
    assert max(sizes) <= 1000
    assert sum(sizes) == 64 * 128


@pytest.mark.parametrize("name", [TABLE, "lm_head.weight"])
@pytest.mark.parametrize(("word", "bits"), [("w4g32-e8-rtn", 8), ("w8g32-e4-rtn", 4), ("w4g32-e4-rtn", 4)])
def test_tables_take_the_bits_of_the_table(checkpoint: Checkpoint, name: str, word: str, bits: int) -> None:
    assert name in size.TABLES
    found = solve.solve(checkpoint, recipe.parse(word), name)
    assert isinstance(found, Solution)
    assert found.bits == bits
    assert found.codes.max() < 1 << bits
    assert (found.zero_points == 1 << (bits - 1)).all()


@pytest.mark.parametrize(("word", "bits"), [("w4g32-e8-rtn", 4), ("w8g32-e4-rtn", 8)])
def test_the_matrices_of_the_layers_take_the_bits_of_the_body(checkpoint: Checkpoint, word: str, bits: int) -> None:
    assert solve.solve(checkpoint, recipe.parse(word), MATRIX).bits == bits


def test_a_group_that_does_not_divide_the_inputs_is_a_usage_fault_that_names_the_tensor(checkpoint: Checkpoint) -> None:
    name = "model.layers.0.mlp.up_proj.weight"
    with pytest.raises(UsageFault, match=r"group 128 does not divide the 64 inputs") as caught:
        solve.solve(checkpoint, recipe.parse("w4g128-e8-rtn"), name)
    assert name in caught.value.what
    assert caught.value.exit_code == 2


def with_weights(folder: Path, change: Any) -> Checkpoint:
    checkpoints.write(folder, "3", dtype="f32")
    header, raw = checkpoints.read_safetensors(folder / "model.safetensors")
    tensors = {}
    for name, entry in header.items():
        if name != "__metadata__":
            start, stop = entry["data_offsets"]
            tensors[name] = np.frombuffer(raw[start:stop], np.float32).reshape(entry["shape"]).copy()
    change(tensors[MATRIX])
    checkpoints.write_weights(folder, tensors, "F32", 1)
    return Checkpoint.open(folder)


def test_weights_beyond_float16_scales_are_an_unsupported_model_that_names_the_tensor(tmp_path: Path) -> None:
    def enlarge(matrix: Any) -> None:
        matrix[3, 5] = 1e9

    checkpoint = with_weights(tmp_path, enlarge)
    with pytest.raises(UnsupportedModel, match=r"1e\+09 are too large for w4g32-e8-rtn") as caught:
        solve.solve(checkpoint, recipe.parse("w4g32-e8-rtn"), MATRIX)
    assert MATRIX in caught.value.what


@pytest.mark.parametrize("factor", [0.0, 1e-3, 1e6])
def test_weights_of_any_likely_size_are_quantized(tmp_path: Path, factor: float) -> None:
    def scale(matrix: Any) -> None:
        matrix *= np.float32(factor)

    checkpoint = with_weights(tmp_path, scale)
    found = solve.solve(checkpoint, recipe.parse("w4g32-e8-rtn"), MATRIX).dequantize()
    weights = checkpoint.tensor(MATRIX)
    assert np.abs(found - weights).max() <= np.abs(weights).max() / 8


def test_a_solution_that_is_not_the_matrix_any_more_fails_the_gate(
    checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch
) -> None:
    quantize = rtn.quantize

    def flipped(weights: Any, bits: int, group: int, *, symmetric: bool) -> Any:
        codes, scales, zero_points = quantize(weights, bits, group, symmetric=symmetric)
        return codes, -scales, zero_points

    monkeypatch.setattr(rtn, "quantize", flipped)
    with pytest.raises(GateFailed, match=r"lost \d+\.\d% of the matrix") as caught:
        solve.solve(checkpoint, recipe.parse("w4g32-e8-rtn"), MATRIX)
    assert MATRIX in caught.value.what


def test_rounded_is_what_the_recipe_makes_of_a_matrix(checkpoint: Checkpoint) -> None:
    word = recipe.parse("w4g32-e8-rtn")
    np.testing.assert_array_equal(
        solve.rounded(checkpoint, word, MATRIX), solve.solve(checkpoint, word, MATRIX).dequantize()
    )
    np.testing.assert_array_equal(solve.rounded(checkpoint, recipe.parse("w16"), MATRIX), checkpoint.tensor(MATRIX))


def test_a_table_of_16_bits_beside_a_quantized_body_is_the_checkpoints_own(tiny: Build) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    word = recipe.parse("w4g32-e16-rtn")
    np.testing.assert_array_equal(solve.rounded(checkpoint, word, TABLE), checkpoint.tensor(TABLE))
    assert solve.float_type(checkpoint, word, TABLE).name == "bfloat16"
    assert (solve.rounded(checkpoint, word, MATRIX) != checkpoint.tensor(MATRIX)).any()


@pytest.mark.parametrize(("stored", "kept"), [("bf16", "bfloat16"), ("f16", "float16"), ("f32", "bfloat16")])
def test_w16_keeps_the_checkpoints_own_16_bit_type(tiny: Build, stored: str, kept: str) -> None:
    assert solve.float_type(Checkpoint.open(tiny("3", dtype=stored)), recipe.parse("w16"), MATRIX).name == kept


@pytest.mark.parametrize(("word", "kept"), [("f16", "float16"), ("bf16", "bfloat16"), ("f32", "float32")])
def test_a_recipe_that_names_a_type_stores_that_type(checkpoint: Checkpoint, word: str, kept: str) -> None:
    assert solve.float_type(checkpoint, recipe.parse(word), MATRIX).name == kept
