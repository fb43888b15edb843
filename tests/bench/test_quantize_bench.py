"""Speed of quantizing and packing one matrix: scripts/bench (tests never assert time)."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from edgeq.backends.onnx.weights import pack
from edgeq.quantize import mse, rtn

ROWS, INPUTS = 1024, 1024


@pytest.fixture(scope="module")
def weights() -> np.ndarray:
    return np.random.default_rng(0).normal(0, 0.02, (ROWS, INPUTS)).astype(np.float32)


@pytest.mark.parametrize("bits", [4, 8])
def test_round_to_nearest(benchmark: Any, weights: np.ndarray, bits: int) -> None:
    codes, scales, _ = benchmark(rtn.quantize, weights, bits, 32)
    assert codes.shape == (ROWS, INPUTS)
    assert scales.shape == (ROWS, INPUTS // 32)


@pytest.mark.parametrize("symmetric", [True, False])
def test_clipped_grids(benchmark: Any, weights: np.ndarray, symmetric: bool) -> None:
    codes, scales, _ = benchmark(mse.quantize, weights[:256], 4, 32, symmetric=symmetric)
    assert codes.shape == (256, INPUTS)
    assert scales.shape == (256, INPUTS // 32)


def test_four_bit_packing(benchmark: Any, weights: np.ndarray) -> None:
    codes = rtn.quantize(weights, 4, 32)[0]
    assert benchmark(pack, codes, 4).shape == (ROWS, INPUTS // 2)
