"""Bundles for providers other than the CPU, and what their weights should compute."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
import pytest

import checkpoints
from checkpoints import Build, quiet
from edgeq import building, data, planning
from edgeq.checkpoint import Checkpoint
from edgeq.model import read_config
from edgeq.quantize.solve import rounded
from edgeq.recipe import parse
from edgeq.size import is_quantized


@pytest.fixture(scope="session")
def built_for(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Bundle folder of a tiny checkpoint for a provider: built_for("webgpu", "3", "w4g32-e8-rtn"). Do not change it."""

    @cache
    def make(provider: str, generation: str, recipe: str) -> Path:
        folder = tmp_path_factory.mktemp(provider)
        device = folder / "device.toml"
        text = (data.folder("targets") / "x86-avx2.toml").read_text()
        device.write_text(f'{text}\n[onnx]\nprovider = "{provider}"\n')
        plan = planning.plan(
            str(tiny(generation)), target=str(device), recipe_name=recipe, out=folder / "bundle", context=256
        )
        building.build(plan, quiet)
        return folder / "bundle"

    return make


@pytest.fixture(scope="session")
def built_odd(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Bundle folder inside that of its checkpoint, whose feed-forward has 96 inputs: built_odd("w4gcol-e8-rtn")."""

    def make(recipe: str) -> Path:
        folder = tmp_path_factory.mktemp("odd")
        config = checkpoints.config_of("3") | {"intermediate_size": 96}
        checkpoints.write(folder, "3")
        checkpoints.write_json(folder / "config.json", config)
        checkpoints.write_weights(folder, checkpoints.random_tensors(read_config(config), 0, False), "BF16", 1)
        plan = planning.plan(str(folder), target="x86-avx2", recipe_name=recipe, out=folder / "bundle", context=256)
        building.build(plan, quiet)
        return folder / "bundle"

    return make


@pytest.fixture
def quantized(tiny: Build) -> Callable[[str, str, list[int]], np.ndarray]:
    """What transformers computes with the weights that a recipe makes: quantized("3", "w4g32-e8-rtn", ids)."""

    def logits(generation: str, recipe: str, ids: list[int]) -> np.ndarray:
        import torch

        from edgeq import transformer

        checkpoint = Checkpoint.open(tiny(generation))
        with torch.inference_mode():
            model = transformer.instantiate(checkpoint, lambda _: True)
            for name, parameter in model.named_parameters():
                if is_quantized(name):
                    parameter.copy_(torch.from_numpy(rounded(checkpoint, parse(recipe), name)))
            found: np.ndarray = model(input_ids=torch.tensor([ids])).logits[0].numpy()
        return found

    return logits
