"""What scripts/verify_vulkan decides, and how scripts/build_llamacpp calls pip; nothing is compiled here."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import script_files
from checkpoints import Build, quiet
from edgeq import backends, building, planning
from edgeq.backends.llamacpp import install
from edgeq.errors import MissingTool
from edgeq.profiles import Placement

ROOT = Path(__file__).parents[1]
BUILD = ROOT / "scripts" / "build_llamacpp"
DECK = Placement(provider="vulkan", device="llvmpipe (LLVM 15.0.6, 256 bits)", layers=4, bytes=9, software=True)
TABLE = Placement(provider="cpu", device="AMD EPYC", layers=0, bytes=9)
LEFT = Placement(provider="cpu", device="AMD EPYC", layers=1, bytes=9)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("verify_vulkan") as module:
        yield module


@pytest.mark.parametrize(
    ("decode", "prefill", "named"),
    [(9e-5, 4e-3, []), (2e-4, 4e-3, ["decode"]), (9e-5, 6e-3, ["prefill"]), (float("nan"), 0.0, ["decode"])],
)
def test_a_difference_beyond_its_tolerance_is_named(
    script: Any, decode: float, prefill: float, named: list[str]
) -> None:
    said = script.too_far({"decode": decode, "prefill": prefill})
    assert [each.split()[0] for each in said] == named


def test_the_worst_difference_is_that_of_one_logit(script: Any) -> None:
    wanted = np.zeros((2, 3), np.float32)
    found = wanted.copy()
    found[1, 2] = -0.5
    assert script.worst(found, wanted) == 0.5
    found[0, 0] = np.nan
    assert np.isnan(script.worst(found, wanted))


@pytest.mark.parametrize(
    ("placement", "said"),
    [
        ((DECK, TABLE), []),
        ((DECK, LEFT), ["1 layers are on AMD EPYC"]),
        ((TABLE,), ["llama.cpp reports no layers"]),
        ((), ["llama.cpp reports no layers"]),
    ],
)
def test_every_layer_has_to_be_on_vulkan(script: Any, placement: tuple[Placement, ...], said: list[str]) -> None:
    assert script.elsewhere(placement) == said


@pytest.mark.parametrize(
    ("placement", "error", "failures"),
    [
        ((DECK, TABLE), 0.0, []),
        ((DECK, LEFT), 0.0, ["demo-qwen3: 1 layers are on AMD EPYC"]),
        ((DECK,), 0.25, ["demo-qwen3: decode differs by 2.5e-01, 1e-04 is allowed"]),
    ],
)
def test_a_generation_is_proven_by_its_own_figures(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    placement: tuple[Placement, ...],
    error: float,
    failures: list[str],
) -> None:
    wanted = np.ones((2, 3), np.float32)
    monkeypatch.setattr(script.proofs, "dequantized_logits", lambda model, recipe, ids: wanted)
    monkeypatch.setattr(script, "prompt", lambda folder: np.arange(2))
    monkeypatch.setattr(script, "mesa", lambda: "22.3.6")
    monkeypatch.setattr(script.bundle, "read", lambda folder: SimpleNamespace(generation="3"))
    np.save(tmp_path / "decode.npy", wanted + np.float32(error))
    np.save(tmp_path / "prefill.npy", wanted)
    np.save(tmp_path / "kv16.npy", wanted)
    done = {step: script.Found(str(tmp_path / f"{step}.npy"), placement) for step in script.STEPS}
    proven, failed = script.judge([tmp_path / "demo-qwen3"], [done])
    assert failed == failures
    assert (proven[0].api, proven[0].generation, proven[0].how) == ("Vulkan", "3", "Mesa lavapipe 22.3.6")
    assert proven[0].figures == {"layers": 4, "decode_max_abs": error, "prefill_max_abs": 0.0, "kv16_max_abs": 0.0}
    assert re.search(r"demo-qwen3 +4 layers", capsys.readouterr().out)


def test_a_bundle_that_runs_on_the_processor_is_no_proof(
    script: Any, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """llama.cpp without Vulkan runs the same bundle, on the processor, and reports that."""
    monkeypatch.setattr(script.llama_session, "physical_cores", lambda: 1)
    monkeypatch.setattr(script.llama_session, "CHUNK", script.llama_session.CHUNK)
    try:
        plan = planning.plan(
            str(tiny("3")), target=script.TARGET, recipe_name=script.RECIPE, backend="llamacpp", out=tmp_path / "bundle"
        )
    except MissingTool as missing:
        pytest.skip(str(missing))
    building.build(plan, quiet)
    found = script.run(plan.out)
    assert found.keys() == script.TOLERANCES.keys() == {"decode", "prefill", "kv16"}
    for each in found.values():
        assert np.load(each.logits).shape == (script.TOKENS, 288)
        assert script.elsewhere(each.placement)
        assert script.on_vulkan(each.placement) == 0
    assert backends.get(plan.backend).provider(plan.target) == "vulkan"


def test_the_child_sees_lavapipe_alone_and_its_own_llama_cpp_first(
    script: Any, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PYTHONPATH", "/mine")
    environment = script.vulkan_only(tmp_path)
    assert environment["PYTHONPATH"].split(os.pathsep) == [str(tmp_path), "/mine"]
    assert environment["GGML_VK_VISIBLE_DEVICES"] == "0"
    assert "lvp" in environment["VK_ICD_FILENAMES"]
    monkeypatch.delenv("PYTHONPATH")
    assert script.vulkan_only(tmp_path)["PYTHONPATH"] == str(tmp_path)


def test_newer_headers_come_from_the_machines_own_debian(script: Any) -> None:
    known = "http://mirror/debian/ bookworm\nhttp://mirror/debian/ bookworm-updates\nhttp://safe/ bookworm-security\n"
    assert script.newer(known) == f"deb http://mirror/debian/ {script.NEWER} main\n"


def test_without_debian_in_apt_headers_are_a_skip(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        script.newer("")
    assert end.value.code == 77
    assert "apt lists no Debian" in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("dpkg") is None, reason="needs dpkg, which compares Debian's versions")
@pytest.mark.parametrize(("version", "older"), [("1.3.239.0-1", True), ("1.4.309.0-1", False), ("1.10.0-1", False)])
def test_debian_12s_headers_are_too_old(script: Any, version: str, older: bool) -> None:
    assert script.older(version) == older


@pytest.fixture
def compiler(tmp_path: Path) -> dict[str, str]:
    """Environment with a fake compiler and a fake Python, whose pip notes CMAKE_ARGS and makes a wheel."""
    programs = tmp_path / "bin"
    programs.mkdir()
    for name in (
        "bash",
        "basename",
        "cut",
        "dirname",
        "grep",
        "mkdir",
        "mktemp",
        "mv",
        "nice",
        "rm",
        "sed",
        "sha256sum",
    ):
        (programs / name).symlink_to(shutil.which(name) or pytest.skip(f"needs {name}"))
    (programs / "uname").symlink_to(shutil.which("uname") or pytest.skip("needs uname"))
    (programs / "tail").symlink_to(shutil.which("tail") or pytest.skip("needs tail"))
    python = f"""#!{shutil.which("bash")}
echo "$CMAKE_ARGS" >>{tmp_path}/flags
[ -e {tmp_path}/broken ] && echo "CMake Error: no" && exit 1
while [ "$1" != -w ]; do shift; done
>"$2/llama_cpp_python-1.0-py3-none-any.whl"
"""
    for name, text in (("c++", ""), ("glslc", ""), ("python", python)):
        (programs / name).write_text(text)
        (programs / name).chmod(0o755)
    return {"PATH": str(programs), "PYTHON": str(programs / "python"), "XDG_CACHE_HOME": str(tmp_path / "cache")}


def compile_wheel(environment: dict[str, str], *words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run([BUILD, *words], env=environment, capture_output=True, text=True)


@pytest.mark.parametrize("device", ["cpu", "vulkan"])
def test_a_wheel_is_compiled_once_with_the_line_of_a_user(
    compiler: dict[str, str], tmp_path: Path, device: str
) -> None:
    done = [compile_wheel(compiler, *words) for words in ([device], [device])]
    assert [each.returncode for each in done] == [0, 0], done[0].stderr
    assert list(Path(done[0].stdout.strip()).glob("llama_cpp_python-*.whl"))
    assert done[1].stdout == done[0].stdout
    flags = (tmp_path / "flags").read_text().splitlines()
    assert len(flags) == 1
    assert f"CMAKE_ARGS='{flags[0]}' " in install.line_for(device)


def test_each_device_has_its_own_wheel_and_the_processor_is_the_default(compiler: dict[str, str]) -> None:
    folders = [compile_wheel(compiler, *words).stdout for words in ([], ["cpu"], ["vulkan"])]
    assert folders[0] == folders[1] != folders[2]


@pytest.mark.parametrize(("device", "program"), [("cpu", "c++"), ("vulkan", "c++"), ("vulkan", "glslc")])
def test_without_a_compiler_the_exit_code_is_5_and_names_it(
    compiler: dict[str, str], tmp_path: Path, device: str, program: str
) -> None:
    (tmp_path / "bin" / program).unlink()
    done = compile_wheel(compiler, device)
    assert (done.returncode, done.stdout) == (5, "")
    assert done.stderr == f"build_llamacpp: llama.cpp for {device} needs {program}, which is not installed\n"


def test_a_failed_compilation_exits_with_5_shows_the_log_and_leaves_no_wheel(
    compiler: dict[str, str], tmp_path: Path
) -> None:
    (tmp_path / "broken").touch()
    done = compile_wheel(compiler)
    assert (done.returncode, done.stdout) == (5, "")
    assert "CMake Error: no" in done.stderr
    (tmp_path / "broken").unlink()
    assert compile_wheel(compiler).returncode == 0


def test_an_unknown_device_is_refused(compiler: dict[str, str]) -> None:
    done = compile_wheel(compiler, "cuda")
    assert done.returncode == 2
    assert "no device 'cuda'" in done.stderr
