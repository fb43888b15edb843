"""GGUF files of tiny checkpoints."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest

from checkpoints import Build, quiet
from edgeq import backends, recipe, target
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint
from edgeq.errors import MissingTool


@pytest.fixture(autouse=True)
def one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads of llama.cpp spin while they wait for each other: beside other tests, one thread is far faster."""
    monkeypatch.setattr("edgeq.backends.llamacpp.session.physical_cores", lambda: 1)


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """Skip with the backend's own words where it is not installed."""
    try:
        backends.get("llamacpp").tools(target.load("x86-avx2"))
    except MissingTool as missing:
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def packed(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Folder with the GGUF file of a tiny checkpoint: packed("3", "w4g32-e8-rtn", tied=False). Do not change it."""

    @cache
    def make(generation: str, name: str, **options: object) -> Path:
        out = tmp_path_factory.mktemp("packed")
        checkpoint = Checkpoint.open(tiny(generation, **options))
        job = Job(checkpoint, recipe.parse(name), target.load("x86-avx2"), checkpoint.model.context, quiet)
        backends.get("llamacpp").build(job, out)
        return out

    return make
