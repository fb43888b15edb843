"""What scripts/verify_cuda decides; the compiler is a small script."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import script_files
from checkpoints import Build, quiet
from edgeq import building, planning
from edgeq.errors import MissingTool

SCRIPT = Path(__file__).parents[1] / "scripts" / "verify_cuda"
SAID = "Cuda compilation tools, release 13.0, V13.0.88\nBuild cuda_13.0.r13.0/compiler.36424714_0\n"


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("verify_cuda") as module:
        yield module


@pytest.fixture
def nvcc(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A compiler that notes its words, refuses files called bad.cu, and writes what -o names; nothing is downloaded."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(script, "unpack_source", lambda version, out: (out / "ggml").mkdir())
    monkeypatch.setattr(script, "unpack_cublas", lambda release, out: None)
    program = tmp_path / "nvcc"
    program.write_text(f"""#!/bin/sh
echo "$*" >>{tmp_path}/log
case "$*" in *bad.cu*) echo "error: bad" >&2; exit 1 ;; *--version*) printf '{SAID}'; exit 0 ;; esac
for out; do :; done
: >"$out"
""")
    program.chmod(0o755)
    return program


def test_the_release_is_read_from_what_nvcc_says(script: Any) -> None:
    assert script.release_of(SAID) == "13.0"
    with pytest.raises(SystemExit, match="names no release: nvcc: no"):
        script.release_of("nvcc: no")


def test_without_nvcc_it_is_skipped_with_the_reason(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(script.shutil, "which", lambda *_, **__: None)
    with pytest.raises(SystemExit) as end:
        script.find_nvcc()
    assert end.value.code == 77
    assert "needs nvcc" in capsys.readouterr().err


def test_each_operation_brings_its_files_once(script: Any) -> None:
    assert script.files_for({"ADD", "MUL", "VIEW"}) == ("binbcast", "convert", "ggml-cuda")
    assert {"mmvq", "mmq", "template-instances/mmq-instance-q4_0"} < set(script.files_for({"MUL_MAT"}))


def test_an_operation_without_known_files_is_a_failure_that_names_it(script: Any) -> None:
    with pytest.raises(SystemExit, match=r"use TRI, WKV: add"):
        script.files_for({"ADD", "WKV", "TRI"})


def test_files_are_compiled_for_the_jetson_and_only_once(script: Any, nvcc: Path, tmp_path: Path) -> None:
    for _ in range(2):
        assert script.compile_all(["norm", "template-instances/one"], str(nvcc), "13.0", "0.3.36") == []
    lines = (tmp_path / "log").read_text().splitlines()
    assert len(lines) == 2
    assert all("-c" in line.split() and "compute_87,code=sm_87" in line for line in lines)
    assert any("ggml-cuda/template-instances/one.cu" in line for line in lines)


def test_a_file_that_does_not_compile_is_named_and_tried_again(script: Any, nvcc: Path, tmp_path: Path) -> None:
    for _ in range(2):
        failures = script.compile_all(["norm", "bad"], str(nvcc), "13.0", "0.3.36")
        assert failures == ["bad.cu does not compile: error: bad"]
    assert len((tmp_path / "log").read_text().splitlines()) == 3


def test_what_is_recorded_says_that_it_was_compiled_only(
    script: Any, nvcc: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    used = {"2.5": {"ADD"}, "3": {"ADD", "ROPE"}}
    monkeypatch.setattr(sys, "argv", [str(SCRIPT)])
    monkeypatch.setattr(script, "find_nvcc", lambda: str(nvcc))
    monkeypatch.setattr(script.proofs, "need", lambda *packages: None)
    monkeypatch.setattr(script, "operations_of_demos", lambda: used)
    monkeypatch.setattr(script.importlib.metadata, "version", lambda package: "0.3.36")
    script.main()
    assert capsys.readouterr().out.count("compiled and not run") == 2
    proofs = json.loads((script.proofs.cache("proofs") / "cuda.json").read_text())["proofs"]
    assert [(each["generation"], each["state"], each["figures"]["files"]) for each in proofs] == [
        ("2.5", "compiled", 3.0),
        ("3", "compiled", 4.0),
    ]
    assert proofs[0]["how"] == "nvcc 13.0, sm_87, compile only"


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_files_are_known_for_what_llama_cpp_really_runs(
    script: Any, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str
) -> None:
    try:
        plan = planning.plan(
            str(tiny(generation)),
            target=script.TARGET,
            recipe_name=script.RECIPES[0],
            backend="llamacpp",
            context=256,
            out=tmp_path / "bundle",
        )
    except MissingTool as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr("edgeq.backends.llamacpp.session.physical_cores", lambda: 1)
    building.build(plan, quiet)
    used = script.operations_of(plan.out)
    assert {"MUL_MAT", "RMS_NORM", "ROPE", "SOFT_MAX", "FLASH_ATTN_EXT"} <= used
    assert ("GATED_DELTA_NET" in used) == (generation == "3.5")
    assert set(script.files_for(used)) > {"mmvq", "norm", "rope", "softmax"}
