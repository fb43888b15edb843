"""What several tests build on: tiny checkpoints and the bundles made of them, once per worker."""

from __future__ import annotations

import os
import sys
import uuid
from functools import cache
from pathlib import Path

import pytest

import checkpoints
from checkpoints import Build, quiet
from edgeq import building, planning, sensitivities

os.environ.update(HF_HUB_OFFLINE="1", ORT_DISABLE_TELEMETRY="1", TOKENIZERS_PARALLELISM="false", OMP_NUM_THREADS="1")


@pytest.fixture(autouse=True)
def kept(tmp_path_factory: pytest.TempPathFactory, monkeypatch: pytest.MonkeyPatch) -> None:
    """A place of their own for sensitivities that a test's builds keep."""
    place = tmp_path_factory.getbasetemp() / f"sensitivities-{uuid.uuid4()}"
    monkeypatch.setattr(sensitivities, "_path", lambda key: place / f"{key}.json")


@pytest.fixture(scope="session")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Folder of a tiny checkpoint: tiny("3.5", multimodal=True)."""

    @cache
    def make(generation: str, **options: object) -> Path:
        return checkpoints.write(tmp_path_factory.mktemp("tiny") / f"tiny{generation}", generation, **options)  # type: ignore[arg-type]

    return make


@pytest.fixture(scope="session")
def built(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> Build:
    """Bundle folder of a tiny checkpoint: built("3", "w4g32-e8-rtn", tied=False). Do not change it."""

    @cache
    def make(generation: str, recipe: str, **options: object) -> Path:
        out = tmp_path_factory.mktemp("built") / "bundle"
        plan = planning.plan(
            str(tiny(generation, **options)), target="x86-avx2", recipe_name=recipe, out=out, context=256
        )
        building.build(plan, quiet)
        return out

    return make


def pytest_sessionfinish() -> None:
    """Close the two files that llama-cpp-python opens when it is imported, and would be warned of at the end."""
    if opened := sys.modules.get("llama_cpp._utils"):
        opened.outnull_file.close()
        opened.errnull_file.close()
