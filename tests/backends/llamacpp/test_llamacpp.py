from __future__ import annotations

import importlib.metadata
import os
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import pytest

from checkpoints import Build
from edgeq import backends, planning, target
from edgeq.backends import llamacpp
from edgeq.backends.llamacpp import install
from edgeq.errors import MissingTool


def test_tools_are_named_with_their_versions() -> None:
    assert [tool.split()[0] for tool in backends.get("llamacpp").tools(target.load("x86-avx2"))] == [
        "gguf",
        "llama-cpp-python",
    ]


def test_an_absent_engine_is_a_missing_tool_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    flags = install.CMAKE_ARGS["x86_64"]
    with pytest.raises(MissingTool) as caught:
        llamacpp.tools(target.load("x86-avx2"))
    assert caught.value.run == f"CMAKE_ARGS='{flags}' pip install 'edgeq[llamacpp]'"


def test_openmp_s_threads_are_told_how_long_to_spin_before_torch_loads_it() -> None:
    lines = "import os; from edgeq import backends; backends.get('llamacpp'); print(os.getenv('GOMP_SPINCOUNT'))"
    names = ("OMP_WAIT_POLICY", "GOMP_SPINCOUNT")
    environment = {name: value for name, value in os.environ.items() if name not in names}
    for wanted, given in (("5000", {}), ("None", {"OMP_WAIT_POLICY": "active"}), ("7", {"GOMP_SPINCOUNT": "7"})):
        command = [sys.executable, "-c", lines]
        shown = subprocess.run(command, env=environment | given, capture_output=True, text=True, check=True)
        assert shown.stdout.strip() == wanted


def test_llama_cpp_may_be_written_with_its_dot(tiny: Build, tmp_path: Path) -> None:
    work = planning.plan(str(tiny("3")), target="x86-avx2", backend="llama.cpp", out=tmp_path / "out")
    assert work.backend == "llamacpp"


def test_a_target_that_names_it_first_gets_it(tiny: Build, tmp_path: Path) -> None:
    work = planning.plan(str(tiny("3")), target="jetson", out=tmp_path / "out")
    assert work.backend == "llamacpp"
    assert not any("uses no GPU" in note for note in work.notes)


def test_another_version_of_the_engine_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its structures would be read by the names of another version, and unknown fields set nothing."""
    assert install.pinned() == importlib.metadata.version("llama-cpp-python")
    monkeypatch.setattr(install, "pinned", lambda: "9.9.9")
    device = target.load("x86-avx2")
    with pytest.raises(MissingTool, match=r"edgeq needs 9\.9\.9") as caught:
        llamacpp.tools(device)
    assert caught.value.run == install.again(device, "9.9.9")
    with pytest.raises(MissingTool, match=r"edgeq needs 9\.9\.9"):
        llamacpp.load(tmp_path, cast(Any, SimpleNamespace(provider="cpu", target="x86-avx2")))
