"""Tiny checkpoints compiled for this machine's CPU, each once for all workers."""

from __future__ import annotations

import fcntl
import os
import platform
import sys
from functools import cache
from pathlib import Path

import msgspec
import pytest

from checkpoints import Build, quiet
from edgeq import recipe, target
from edgeq.backends import mlc
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint
from edgeq.errors import MissingTool

os.environ["TVM_NUM_THREADS"] = "1"  # read once, when TVM is loaded
_TARGETS = {"x86_64": "x86-avx2", "aarch64": "raspberry-pi-5"}


@pytest.fixture(scope="session")
def here() -> target.Target:
    """Target whose libraries this machine loads; skips where TVM is not installed or edgeq has no such target."""
    name = _TARGETS.get(platform.machine())
    if sys.platform != "linux" or name is None:
        pytest.skip(f"libraries for {platform.machine()} {sys.platform} are not built here")
    found = target.load(name)
    try:
        mlc.tools(found)
    except MissingTool as missing:
        pytest.skip(str(missing))
    return found


@pytest.fixture(scope="session")
def packed(tiny: Build, here: target.Target, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Folder of a tiny checkpoint's library and weights: packed("3", "w4g32-e8-rtn", tied=False). Do not change it.

    Within it is the model's text-only config.json; beside it, with the suffix .json, what `build` returned.
    """
    root = tmp_path_factory.getbasetemp()
    root = (root.parent if "PYTEST_XDIST_WORKER" in os.environ else root) / "mlc"
    root.mkdir(exist_ok=True)

    @cache
    def make(generation: str, name: str, **options: object) -> Path:
        out = root / "-".join([generation.replace(".", "_"), name, *(f"{key}={options[key]}" for key in options)])
        with out.with_suffix(".lock").open("w") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            if not out.with_suffix(".json").exists():
                out.mkdir(exist_ok=True)
                checkpoint = Checkpoint.open(tiny(generation, **options))
                made = mlc.build(Job(checkpoint, recipe.parse(name), here, checkpoint.model.context, quiet), out)
                (out / "config.json").write_bytes(msgspec.json.encode(checkpoint.model.config()))
                out.with_suffix(".json").write_bytes(msgspec.json.encode(made))
        return out

    return make
