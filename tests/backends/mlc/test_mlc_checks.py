from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import msgspec
import pytest

import machines
from edgeq import target
from edgeq.accelerators import Accelerator
from edgeq.backends.findings import Finding
from edgeq.backends.llamacpp import install
from edgeq.backends.mlc import checks, official
from edgeq.backends.mlc.checks import Engine, Report
from edgeq.backends.mlc.official import Official
from edgeq.errors import MissingTool
from edgeq.machine import Machine, this_machine

PINS = {"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.13.post2"}
ABSENT = Engine({"apache-tvm": None, "apache-tvm-ffi": None})
JETPACK_6 = "# R36 (release), REVISION: 4.3, GCID: 38968081, BOARD: generic, EABI: aarch64, DATE: Wed Jan  8 2025\n"
JETPACK_7 = "# R38 (release), REVISION: 2.0, GCID: 41844464, BOARD: generic, EABI: aarch64, DATE: Fri Aug 22 2025\n"


@pytest.fixture(autouse=True)
def pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    """What edgeq pins, an empty PATH below the root, and no official compiler."""
    wanted = ["numpy>=1.26", *(f"{name}=={version}; extra == 'tvm'" for name, version in PINS.items())]
    monkeypatch.setattr(importlib.metadata, "requires", lambda _: wanted)

    def absent(_: str) -> Official:
        raise MissingTool("mlc_llm is not installed", run=official.INSTALL)

    monkeypatch.setattr(official, "find", absent)
    monkeypatch.setenv("PATH", "/usr/bin")
    monkeypatch.delenv("LD_LIBRARY_PATH", raising=False)


@pytest.fixture
def jetson(tmp_path: Path) -> Path:
    """A Jetson Orin Nano with JetPack 6."""
    return machines.write(machines.jetson_orin_nano_super(tmp_path), {"etc/nv_tegra_release": JETPACK_6})


@pytest.fixture
def thor(tmp_path: Path) -> Path:
    """A Jetson Thor with JetPack 7 and its CUDA runtime."""
    cuda = {"etc/nv_tegra_release": JETPACK_7, "usr/local/cuda/lib64/libcudart.so.13": ""}
    return machines.write(machines.jetson_agx_thor(tmp_path), cuda)


def engine(*runtimes: str) -> Engine:
    return Engine(dict(PINS), Report(runtimes))


def findings(
    monkeypatch: pytest.MonkeyPatch,
    root: Path,
    name: str,
    found: Engine,
    *,
    here: bool = True,
    machine: Machine | None = None,
) -> dict[str, Finding]:
    asked: list[bool] = []

    def ask(*, report: bool) -> Engine:
        asked.append(report)
        return found

    monkeypatch.setattr(checks, "ask", ask)
    device = target.load(name)
    each = checks.findings(device, machine or this_machine(root), root, here=here)
    assert asked == [here and device.code_generator not in ("llvm", "webgpu")], "TVM is loaded only for its runtimes"
    assert all(bool(one.expected and one.observed) for one in each)
    return {one.name: one for one in each}


def program(root: Path, path: str, text: str = "") -> None:
    machines.write(root, {path: f"#!/bin/sh\n{text}\n"})
    (root / path).chmod(0o755)


def test_on_jetpack_6_the_cuda_runtime_cannot_load(monkeypatch: pytest.MonkeyPatch, jetson: Path) -> None:
    for installed in (engine(), ABSENT):
        found = findings(monkeypatch, jetson, "jetson", installed)["tvm cuda runtime"]
        assert (found.passed, found.observed) == (False, "L4T 36.4.3, whose CUDA is older")
        assert found.remedy.endswith(f"use the llamacpp backend: {install.line(target.load('jetson'))}")


def test_a_tvm_that_was_compiled_on_the_board_passes_there(monkeypatch: pytest.MonkeyPatch, jetson: Path) -> None:
    assert findings(monkeypatch, jetson, "jetson", engine("cuda"))["tvm cuda runtime"].passed is True


def test_on_jetpack_7_the_cuda_runtime_loads(monkeypatch: pytest.MonkeyPatch, thor: Path) -> None:
    assert findings(monkeypatch, thor, "thor", engine("cuda"))["tvm cuda runtime"].passed is True
    unasked = findings(monkeypatch, thor, "thor", ABSENT)
    assert (unasked["tvm"].passed, unasked["tvm cuda runtime"].passed) == (None, True)
    assert unasked["tvm cuda runtime"].observed == "/usr/local/cuda/lib64/libcudart.so.13"


def test_a_runtime_that_does_not_load_says_why(monkeypatch: pytest.MonkeyPatch, thor: Path) -> None:
    broken = Engine(dict(PINS), fault="loading TVM ends with SIGSEGV")
    found = findings(monkeypatch, thor, "thor", broken)["tvm cuda runtime"]
    assert (found.passed, found.observed) == (
        False,
        "/usr/local/cuda/lib64/libcudart.so.13; loading TVM ends with SIGSEGV",
    )
    (thor / "usr/local/cuda/lib64/libcudart.so.13").unlink()
    assert findings(monkeypatch, thor, "thor", ABSENT)["tvm cuda runtime"].passed is None


def test_cuda_13_needs_a_driver_that_knows_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = Accelerator(name="NVIDIA GeForce RTX 4060 Laptop GPU", api="cuda", arch="sm_89", driver="550.54")
    machine = msgspec.structs.replace(this_machine(machines.desktop(tmp_path)), accelerators=(gpu,))
    found = findings(monkeypatch, tmp_path, "rtx-4060-laptop", engine(), machine=machine)["tvm cuda runtime"]
    assert (found.passed, found.observed) == (False, "none found, driver 550.54")
    assert found.remedy == "install NVIDIA's driver 580 or newer"


@pytest.mark.parametrize(
    ("versions", "passed"),
    [
        (PINS, True),
        (PINS | {"apache-tvm-ffi": "0.1.15"}, False),
        (PINS | {"apache-tvm": "0.25.0"}, False),
        (ABSENT.versions, None),
    ],
)
def test_both_packages_have_the_pinned_versions(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, versions: dict[str, str | None], passed: bool | None
) -> None:
    found = findings(monkeypatch, machines.raspberry_pi_5(tmp_path), "pi5", Engine(versions))["tvm"]
    assert (found.passed, found.expected) == (passed, "apache-tvm 0.26.0, apache-tvm-ffi 0.1.13.post2")
    line = (
        "pip install 'edgeq[tvm]'" if passed is None else "pip install apache-tvm==0.26.0 apache-tvm-ffi==0.1.13.post2"
    )
    assert found.remedy.endswith(line)


def test_a_target_with_mlc_alone_cannot_do_without(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, machines.cloud_vm(tmp_path), "web-browser", ABSENT, here=False)
    assert found["tvm"].passed is False
    assert set(found) == {"tvm", "mlc_llm"}, "a browser brings its own runtime"


def test_without_edgeqs_metadata_the_versions_are_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert findings(monkeypatch, machines.raspberry_pi_5(tmp_path), "pi5", engine())["tvm"].passed is None


def test_kernels_that_were_not_compiled_need_an_nvcc_that_knows_the_gpu(
    monkeypatch: pytest.MonkeyPatch, thor: Path
) -> None:
    def found() -> Finding:
        return findings(monkeypatch, thor, "thor", engine("cuda"))["cuda kernel compiler"]

    assert (found().passed, found().observed) == (None, "none found")
    assert found().remedy.startswith("only where kernels were not compiled with the bundle: install a CUDA toolkit")
    program(thor, "usr/local/cuda/bin/nvcc", "echo sm_75 sm_90")
    assert (found().passed, found().observed) == (None, "/usr/local/cuda/bin/nvcc, knows sm_75 to sm_90")
    program(thor, "usr/local/cuda/bin/nvcc", "echo sm_75 sm_110")
    assert found().passed is True


@pytest.mark.parametrize(
    ("codes", "passed", "observed"),
    [
        ("sm_87 sm_110 sm_121", True, "sm_87 to sm_121"),
        ("sm_50 sm_87 sm_90", None, "sm_50 to sm_90"),
        ("", None, "nothing that it says"),
    ],
)
def test_nvcc_checks_kernels_for_an_architecture_that_it_knows(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, codes: str, passed: bool | None, observed: str
) -> None:
    program(tmp_path, "usr/bin/nvcc", f"echo {codes}")
    found = findings(monkeypatch, machines.cloud_vm(tmp_path), "thor", engine(), here=False)["kernel check"]
    assert (found.passed, found.observed) == (passed, f"/usr/bin/nvcc, knows {observed}")
    assert "unchecked" in found.remedy
    assert found.expected == "nvcc that knows sm_110"


def test_clang_checks_opencl_kernels(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machines.cloud_vm(tmp_path)
    assert findings(monkeypatch, root, "opi5", engine(), here=False)["kernel check"].passed is None
    program(root, "usr/bin/clang")
    assert findings(monkeypatch, root, "opi5", engine(), here=False)["kernel check"].passed is True


def test_opencl_needs_a_tvm_that_was_compiled_with_it(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root, name = machines.steam_deck(tmp_path), "tvm opencl runtime"
    without = findings(monkeypatch, root, "steamdeck", engine())[name]
    assert (without.passed, without.observed) == (False, "TVM has none")
    assert without.remedy == "the package has no OpenCL: compile TVM on the device with USE_OPENCL=ON"
    assert findings(monkeypatch, root, "steamdeck", ABSENT)[name].passed is None
    assert findings(monkeypatch, root, "steamdeck", engine("opencl"))[name].passed is True


def test_what_runs_is_unknown_on_another_machine(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, machines.cloud_vm(tmp_path), "jetson", engine("cuda"), here=False)
    for name in ("tvm cuda runtime", "cuda kernel compiler"):
        assert (found[name].passed, found[name].observed) == (None, "this is another machine")


def test_the_official_compiler_is_optional_and_named(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    root = machines.cloud_vm(tmp_path)
    found = findings(monkeypatch, root, "jetson", ABSENT, here=False)["mlc_llm"]
    assert (found.passed, found.observed) == (None, "mlc_llm is not installed")
    assert official.INSTALL in found.remedy
    monkeypatch.setattr(official, "find", lambda _: Official(Path("mlc/bin/python"), "mlc-llm 1.0"))
    found = findings(monkeypatch, root, "jetson", ABSENT, here=False)["mlc_llm"]
    assert (found.passed, found.observed) == (True, "mlc-llm 1.0 in mlc/bin/python")


def test_a_library_that_ends_the_process_is_a_fault(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", PINS.__getitem__)
    for code, fault in (
        ("import os; os.abort()", "loading TVM ends with SIGABRT"),
        ("raise OSError('libx.so is missing')", "OSError: libx.so is missing"),
        ("raise SystemExit(3)", "loading TVM exits with 3"),
    ):
        monkeypatch.setattr(checks, "_ASK", (sys.executable, "-c", code))
        found = checks.ask(report=True)
        assert (found.report, found.fault) == (None, fault)
    assert checks.ask(report=False) == Engine(dict(PINS))


@pytest.mark.slow
def test_the_installed_tvm_answers() -> None:
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    found = checks.ask(report=True)
    assert found.fault == ""
    assert found.report is not None
    assert set(found.report.runtimes) <= {"cuda", "metal", "opencl", "vulkan"}
