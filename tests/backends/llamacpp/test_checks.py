from __future__ import annotations

import importlib.metadata
import sys
from pathlib import Path

import pytest

import machines
from edgeq import target
from edgeq.backends.findings import Finding
from edgeq.backends.llamacpp import checks, install
from edgeq.backends.llamacpp.checks import Engine
from edgeq.backends.llamacpp.devices import Device, Report
from edgeq.machine import this_machine

CPU = Device("CPU", "cpu", "a processor", 1)
ORIN = Device("CUDA0", "cuda", "Orin", 2)
DECK = Device("Vulkan0", "vulkan", "AMD Custom GPU 0932 (RADV VANGOGH)", 3)
LAVAPIPE = Device("Vulkan0", "vulkan", "llvmpipe (LLVM 15.0.6, 256 bits)", 4)


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """What is installed is said by each test."""


@pytest.fixture(autouse=True)
def nothing_on_path(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")


def engine(*devices: Device, apis: tuple[str, ...] = (), features: str = "") -> Engine:
    found = apis or tuple(dict.fromkeys(device.api for device in devices))
    return Engine("0.3.36", Report(found, devices, features))


def findings(
    monkeypatch: pytest.MonkeyPatch, root: Path, name: str, found: Engine, *, here: bool = True
) -> dict[str, Finding]:
    monkeypatch.setattr(checks, "ask", lambda: found)
    machine = this_machine(machines.cloud_vm(root))
    return {each.name: each for each in checks.findings(target.load(name), machine, root, here=here)}


@pytest.mark.parametrize(
    ("name", "found"),
    [
        ("steamdeck", engine(DECK, CPU)),
        ("jetson", engine(ORIN, CPU, features="CUDA : ARCHS = 870 | USE_GRAPHS = 1 | CPU : NEON = 1 | ")),
        ("pi5", engine(CPU)),
    ],
)
def test_an_engine_for_the_device_that_sees_it_passes(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, found: Engine
) -> None:
    asked = findings(monkeypatch, tmp_path, name, found)
    assert asked["llama.cpp"].passed is True
    assert asked["llama.cpp devices"].passed is True
    assert asked["c++ compiler"].passed is None, "nothing has to be compiled any more"
    assert asked["c++ compiler"].remedy.startswith("only to compile llama.cpp again: ")


def test_an_engine_for_another_api_fails_with_the_line_that_compiles_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    asked = findings(monkeypatch, tmp_path, "jetson", engine(CPU))
    found = asked["llama.cpp"]
    assert (found.passed, found.observed) == (False, "0.3.36 for cpu")
    assert found.remedy == install.again(target.load("jetson"), "0.3.36")
    assert asked["llama.cpp devices"].passed is None
    assert asked["nvcc"].passed is False


def test_an_engine_for_another_gpu_is_unknown(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    other = engine(ORIN, CPU, features="CUDA : ARCHS = 750,860 | ")
    found = findings(monkeypatch, tmp_path, "jetson", other)["llama.cpp"]
    assert (found.passed, found.expected) == (None, "llama-cpp-python, compiled for cuda, sm_87")
    assert found.observed == "0.3.36 for cuda, cpu, architectures 750,860"


def test_an_engine_without_the_processors_instructions_is_told_to_be_compiled_anew(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    old = engine(CPU, features="CPU : AVX2 = 1 | AVX512 = 1 | ")
    found = findings(monkeypatch, tmp_path, "x86-avx512-vnni", old)["llama.cpp"]
    assert (found.passed, found.expected) == (None, "llama-cpp-python, compiled for cpu with avx512_vnni")
    assert found.observed == "0.3.36 for cpu, without avx512_vnni: prompts are slower"
    assert "-DGGML_AVX512_VNNI=ON" in found.remedy
    new = engine(CPU, features="CPU : AVX2 = 1 | AVX512 = 1 | AVX512_VNNI = 1 | ")
    assert findings(monkeypatch, tmp_path, "x86-avx512-vnni", new)["llama.cpp"].passed is True


def test_software_devices_are_named_and_do_not_count(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, tmp_path, "steamdeck", engine(LAVAPIPE, CPU))["llama.cpp devices"]
    assert found.passed is False
    assert found.observed == "Vulkan0 llvmpipe (LLVM 15.0.6, 256 bits) (software), CPU a processor"


def test_no_device_says_what_to_do(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    found = findings(monkeypatch, tmp_path, "jetson", engine(CPU, apis=("cuda", "cpu")))["llama.cpp devices"]
    assert (found.passed, found.observed) == (False, "CPU a processor")
    assert "--runtime nvidia" in found.remedy


@pytest.mark.parametrize(("name", "passed"), [("jetson", False), ("pi5", None)])
def test_without_it_a_target_that_wants_it_first_fails(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str, passed: bool | None
) -> None:
    asked = findings(monkeypatch, tmp_path, name, Engine())
    assert asked["llama.cpp"].passed is passed
    assert asked["llama.cpp"].remedy == install.line(target.load(name))
    assert asked["c++ compiler"].passed is passed
    assert asked["llama.cpp devices"].passed is None


def test_a_broken_engine_fails_wherever_it_is(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    broken = Engine("0.3.36", fault="OSError: libcudart.so.12: cannot open shared object file")
    asked = findings(monkeypatch, tmp_path, "pi5", broken)
    assert asked["llama.cpp"].passed is False
    assert "libcudart.so.12" in asked["llama.cpp"].observed
    assert asked["c++ compiler"].passed is False, "it has to be compiled again"


@pytest.mark.parametrize("name", target.names())
def test_another_machine_says_nothing_of_the_device(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, name: str) -> None:
    asked = findings(monkeypatch, tmp_path, name, engine(CPU, ORIN, DECK), here=False)
    assert {(found.passed, found.observed) for found in asked.values()} == {(None, "this is another machine")}
    assert all(found.remedy.startswith("check again on the device itself") for found in asked.values())
    assert asked["llama.cpp"].remedy.endswith(install.line(target.load(name)))


@pytest.mark.parametrize(
    ("program", "fault"),
    [
        ("raise OSError('libcudart.so.12: no such file')", "OSError: libcudart.so.12: no such file"),
        ("import os; os.kill(os.getpid(), 4)", "loading it ends with SIGILL"),
        ("raise SystemExit(3)", "loading it exits with 3"),
        ("print('hello')", "its answer cannot be read: "),
        ("import time; time.sleep(9)", "it does not answer within 0.5 s"),
    ],
)
def test_a_library_that_ends_its_process_does_not_end_this_one(
    monkeypatch: pytest.MonkeyPatch, program: str, fault: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", lambda _: "0.3.36")
    monkeypatch.setattr(checks, "_ASK", (sys.executable, "-c", program))
    if "sleep" in program:
        monkeypatch.setattr(checks, "_ASK_SECONDS", 0.5)
    found = checks.ask()
    assert (found.version, found.report) == ("0.3.36", None)
    assert found.fault.startswith(fault)


def test_an_absent_library_is_no_engine(monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> str:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "version", absent)
    assert checks.ask() == Engine()


def test_the_installed_library_answers() -> None:
    pytest.importorskip("llama_cpp")
    found = checks.ask()
    assert found.fault == ""
    assert found.has("cpu")
    assert found.report is not None
    assert any(device.api == "cpu" and not device.software for device in found.report.devices)
    assert "CPU" in found.report.features
