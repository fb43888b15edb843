from __future__ import annotations

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from edgeq.errors import MissingTool, UnsupportedModel
from edgeq.quantize import ggml
from edgeq.recipe import GGML

gguf = pytest.importorskip("gguf", reason="gguf, of the extra edgeq[llamacpp], is not installed")
pytest.importorskip("llama_cpp", reason="llama-cpp-python is not installed: it is compiled, and needs a C++ compiler")

LAYOUTS = sorted(GGML)


def weights(rows: int = 5, inputs: int = 512) -> np.ndarray:
    """A matrix with groups of zeros, of one sign, and of very different size."""
    found = np.random.default_rng(11).normal(0, 0.05, (rows, inputs)).astype(np.float32)
    found[0, :32] = 0
    found[1, :256] = 0
    found[2, 32:64] = np.abs(found[2, 32:64])
    found[3] *= 1e3
    return found


def dequantized(packed: np.ndarray, name: str) -> np.ndarray:
    values: np.ndarray = gguf.dequantize(packed, gguf.GGMLQuantizationType[name.upper()])
    return values


@pytest.mark.parametrize("name", LAYOUTS)
def test_bytes_stand_for_the_values_that_ggufs_own_reader_gives(name: str) -> None:
    packed = ggml.quantize(weights(), GGML[name])
    solution = ggml.unpack(packed, GGML[name], "some.weight")
    np.testing.assert_array_equal(solution.dequantize(), dequantized(packed, name))
    assert (solution.name, solution.bits) == ("some.weight", GGML[name].bits)
    assert solution.codes.max() < 1 << GGML[name].bits


@pytest.mark.parametrize("name", LAYOUTS)
@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), rows=st.integers(1, 4), blocks=st.integers(1, 3))
def test_any_bytes_are_read_as_ggufs_own_reader_does_and_written_again(
    name: str, seed: int, rows: int, blocks: int
) -> None:
    layout = GGML[name]
    packed = np.random.default_rng(seed).integers(0, 256, (rows, blocks * layout.bits_of_block // 8), np.uint8)
    solution = ggml.unpack(packed, layout, "some.weight")
    assume(np.isfinite(solution.super_scales).all() and np.isfinite(solution.super_minimums).all())
    np.testing.assert_array_equal(ggml.pack(solution), packed)
    np.testing.assert_array_equal(solution.dequantize(), dequantized(packed, name))


@pytest.mark.parametrize("name", LAYOUTS)
def test_taken_apart_and_put_together_again_they_are_the_same_bytes(name: str) -> None:
    packed = ggml.quantize(weights(), GGML[name])
    solution = ggml.unpack(packed, GGML[name], "some.weight")
    np.testing.assert_array_equal(ggml.pack(solution), packed)
    np.testing.assert_array_equal(ggml.pack(solution, slice(1, 3)), packed[1:3])


@pytest.mark.parametrize("name", LAYOUTS)
def test_other_codes_in_the_same_blocks_are_packed_as_they_are(name: str) -> None:
    """What a solver does that keeps the scales: any codes must reach the file."""
    packed = ggml.quantize(weights(), GGML[name])
    solution = ggml.unpack(packed, GGML[name], "some.weight")
    solution.codes[:] = np.random.default_rng(12).integers(0, 1 << solution.bits, solution.codes.shape)
    np.testing.assert_array_equal(dequantized(ggml.pack(solution), name), solution.dequantize())


@pytest.mark.parametrize("name", LAYOUTS)
def test_more_bits_leave_a_smaller_error(name: str) -> None:
    original = weights()
    made = ggml.unpack(ggml.quantize(original, GGML[name]), GGML[name], "some.weight").dequantize()
    lost = np.sqrt(np.square(made - original).sum() / np.square(original).sum())
    assert lost < {2: 0.35, 3: 0.2, 4: 0.1, 5: 0.05, 6: 0.03}[GGML[name].bits]


@pytest.mark.parametrize("name", sorted({*LAYOUTS} - {"q4_1"}))
def test_important_inputs_lose_less(name: str) -> None:
    original = np.random.default_rng(13).normal(0, 0.05, (32, 512)).astype(np.float32)
    importance = np.ones(512, np.float32)
    importance[::8] = 1000
    lost = []
    for given_importance in (None, importance):
        packed = ggml.quantize(original, GGML[name], given_importance)
        errors = np.square(ggml.unpack(packed, GGML[name], "w").dequantize() - original)
        lost.append(errors[:, ::8].sum())
    assert lost[1] < lost[0]


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_weights_that_are_not_finite_are_refused(name: str, value: float) -> None:
    spoilt = weights()
    spoilt[4, 100] = value
    with pytest.raises(UnsupportedModel, match="not finite"):
        ggml.quantize(spoilt, GGML[name])
    with pytest.raises(UnsupportedModel, match="not finite"):
        ggml.quantize(weights(), GGML[name], spoilt[4])


def test_q4_1_is_ggufs_own_rule() -> None:
    wanted = gguf.quantize(weights(), gguf.GGMLQuantizationType.Q4_1)
    np.testing.assert_array_equal(ggml.quantize(weights(), GGML["q4_1"]), wanted)


def test_without_the_library_the_line_that_installs_it_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "llama_cpp", None)
    with pytest.raises(MissingTool, match=r"pip install 'edgeq\[llamacpp\]'"):
        ggml.quantize(weights(), GGML["q4_k"])
