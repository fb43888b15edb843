"""Speed of inner loops: scripts/bench (tests never assert time)."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import null_bundles
from checkpoints import Build, write_safetensors
from edgeq import accuracy, backends, bundle, recipe, tensorfile
from edgeq.backends.null import NullSession
from edgeq.quantize import gptq

ROWS, INPUTS = 256, 512


@pytest.mark.parametrize("word", ["w4g32-e8-gptq", "w4ag32-e8-gptq", "w4gcol-e8-gptq"])
def test_gptq_of_some_rows(benchmark: Any, word: str) -> None:
    random = np.random.default_rng(0)
    weights = random.normal(0, 0.02, (ROWS, INPUTS)).astype(np.float32)
    read = random.normal(size=(2 * INPUTS, INPUTS)).astype(np.float32)
    curved = gptq.curvature(torch.from_numpy(read.T @ read / len(read)))
    found = benchmark(gptq.quantize, weights, curved, recipe.parse(word).body.of(INPUTS), "matrix")
    assert found.codes.shape == (ROWS, INPUTS)


def test_curvature(benchmark: Any) -> None:
    read = np.random.default_rng(0).normal(size=(2 * INPUTS, INPUTS)).astype(np.float32)
    moments = torch.from_numpy(read.T @ read / len(read))
    assert benchmark(lambda: gptq.curvature(moments.clone())).factor.shape == (INPUTS, INPUTS)


@pytest.mark.parametrize("kept", [1024, None])
def test_divergence_of_a_window(benchmark: Any, kept: int | None) -> None:
    vocab = 8192
    reference = null_bundles.reference(vocab, kept)
    logits = NullSession(vocab).logits(reference.windows[0].tolist())
    assert benchmark(accuracy.compare, reference, 0, logits).kl.max() < 1e-6


def test_header_of_a_large_file(benchmark: Any, tmp_path: Path) -> None:
    tensors = {f"model.layers.{number}.weight": np.zeros((2, 2), np.float32) for number in range(2000)}
    write_safetensors(tmp_path / "model.safetensors", tensors, "F32")
    assert len(benchmark(tensorfile.read_header, tmp_path / "model.safetensors")) == 2000


def test_step_of_a_null_session(benchmark: Any) -> None:
    session = NullSession(null_bundles.VOCAB)
    session.begin(8)
    assert benchmark(session.advance, [1]).shape == (1, null_bundles.VOCAB)


def test_step_of_an_onnx_session(benchmark: Any, built: Build) -> None:
    folder = built("3", "w4g32-e8-rtn")
    session = backends.get("onnx").load(folder, bundle.read(folder))

    def step() -> Any:
        session.begin(8)
        session.advance([1, 2, 3, 4])
        return session.advance([5]).shape[0]

    try:
        assert benchmark(step) == 1
    finally:
        session.close()
