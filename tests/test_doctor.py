from __future__ import annotations

import importlib.metadata
from pathlib import Path
from types import SimpleNamespace
from typing import Literal

import msgspec
import pytest

import machines
from edgeq import detect, doctor, target
from edgeq.detect import BackendState
from edgeq.doctor import Check
from edgeq.errors import BackendFault, MissingTool

VERSIONS = {"numpy": "2.4.6", "onnxruntime": "1.32.0", "onnxruntime-genai": "0.18.0", "torch": "2.13.0+cpu"}
REQUIRES = ["numpy>=1.26", "onnxruntime>=1.30", "torch>=2.8; extra == 'build'"]
REQUIRES += ["onnxruntime-genai<0.19,>=0.18; extra == 'build'", "pytest>=8.3; extra == 'dev'"]


@pytest.fixture(autouse=True)
def installed(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> dict[str, str]:
    """Packages that doctor sees, a quiet environment, and one usable backend."""
    versions = dict(VERSIONS)

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    monkeypatch.setattr(importlib.metadata, "version", version)
    monkeypatch.setattr(importlib.metadata, "requires", lambda name: REQUIRES)
    monkeypatch.setattr(detect, "usable_backends", lambda _: (BackendState("onnx", True, True, "onnxruntime 1.32.0"),))
    monkeypatch.setenv("HF_HOME", str(tmp_path / "hub"))
    for name in ("HF_TOKEN", "HF_HUB_CACHE", "ORT_DISABLE_TELEMETRY"):
        monkeypatch.delenv(name, raising=False)
    return versions


def ask(root: Path, name: str = "x86-avx512-vnni") -> dict[str, Check]:
    return {check.name: check for check in doctor.checks(target.load(name), root)}


def test_a_sound_machine_fails_nothing(tmp_path: Path) -> None:
    found = ask(machines.cloud_vm(tmp_path))
    assert not [check for check in found.values() if check.status == "FAILED"]
    assert {"python", "base packages", "build packages", "torch", "machine", "backend", "memory", "cores"} <= set(found)


def test_the_report_says_what_the_machine_is(tmp_path: Path) -> None:
    found = ask(machines.jetson_orin_nano_super(tmp_path / "board"), "jetson")
    assert found["closest target"].observed.startswith("jetson-orin-nano-super-8gb: ")
    assert "(cuda, sm_87)" in found["accelerators"].observed
    assert {found[name].status for name in ("closest target", "accelerators")} == {"PASSED"}
    other = ask(machines.rk3588(tmp_path / "other"), "steamdeck")
    assert other["closest target"].observed.startswith("none: ")
    assert {other[name].status for name in ("closest target", "accelerators")} == {"UNKNOWN"}


def test_a_remedy_is_given_exactly_where_a_check_did_not_pass(tmp_path: Path) -> None:
    for name in ("x86-avx512-vnni", "jetson"):
        for check in ask(machines.cloud_vm(tmp_path), name).values():
            assert bool(check.remedy) == (check.status != "PASSED"), check
            assert check.expected
            assert check.observed


@pytest.mark.parametrize(
    ("package", "version", "group", "expected"),
    [
        ("onnxruntime", "1.29.1", "base packages", "onnxruntime >=1.30"),
        ("onnxruntime", None, "base packages", "onnxruntime >=1.30"),
        ("onnxruntime-genai", "0.19.0", "build packages", "onnxruntime-genai <0.19,>=0.18"),
        ("torch", None, "build packages", "torch >=2.8"),
    ],
)
def test_a_missing_or_unfit_package_is_named(
    tmp_path: Path, installed: dict[str, str], package: str, version: str | None, group: str, expected: str
) -> None:
    installed.pop(package)
    if version:
        installed[package] = version
    check = ask(machines.cloud_vm(tmp_path))[group]
    runs_only = package == "torch"
    assert (check.status, check.expected) == ("UNKNOWN" if runs_only else "FAILED", expected)
    assert f"{package} {version or 'missing'}" in check.observed


def test_without_installed_metadata_the_packages_are_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(name: str) -> list[str]:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "requires", absent)
    assert ask(machines.cloud_vm(tmp_path))["base packages"].status == "UNKNOWN"


@pytest.mark.parametrize(
    ("version", "status"), [("2.13.0+cpu", "PASSED"), ("2.13.0+cu130", "FAILED"), ("2.13.0", "UNKNOWN")]
)
def test_the_build_of_torch_is_read_from_its_version(
    tmp_path: Path, installed: dict[str, str], version: str, status: str
) -> None:
    installed["torch"] = version
    assert ask(machines.cloud_vm(tmp_path))["torch"].status == status


def test_a_quota_and_a_limit_are_reported(tmp_path: Path) -> None:
    found = ask(machines.container(tmp_path), "x86-avx2")
    assert (found["cores"].status, found["cores"].observed) == ("UNKNOWN", "2 of 4")
    assert found["memory"].observed == "4.3 GB (container's limit; the machine has 16.7 GB)"
    assert (found["governor"].status, found["governor"].observed) == ("FAILED", "schedutil")
    assert found["swap"].status == "UNKNOWN"


def test_too_little_memory_fails(tmp_path: Path) -> None:
    root = machines.cloud_vm(tmp_path)
    machines.write(root, machines.memory(1000000))
    assert ask(root)["memory"].status == "FAILED"


def test_another_machine_than_the_target_is_said_so(tmp_path: Path) -> None:
    found = ask(machines.cloud_vm(tmp_path), "jetson")
    assert found["machine"].status == "FAILED"
    assert "aarch64" in found["machine"].observed
    assert found["gpu"].status == "UNKNOWN"


def test_a_jetson_without_a_gpu_backend_fails(tmp_path: Path) -> None:
    found = ask(machines.jetson_orin_nano_super(tmp_path), "jetson")
    assert found["machine"].status == "PASSED"
    assert found["gpu"].status == "FAILED"


LLAMA_CPP = ("c++ compiler", "nvcc", "nvidia driver", "llama.cpp", "llama.cpp devices")


def test_a_jetson_without_llama_cpp_is_told_what_compiles_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    root = machines.jetson_orin_nano_super(tmp_path)
    machines.write(root, {"usr/lib/aarch64-linux-gnu/nvidia/libcuda.so.1": "", "usr/bin/c++": ""})
    (root / "usr/bin/c++").chmod(0o755)
    found = ask(root, "jetson")
    assert [found[name].status for name in LLAMA_CPP] == ["PASSED", "FAILED", "PASSED", "FAILED", "UNKNOWN"]
    assert "-DCMAKE_CUDA_ARCHITECTURES=87" in found["llama.cpp"].remedy


def test_llama_cpp_of_another_device_is_unknown_here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("edgeq.backends.llamacpp.checks.ask", lambda: pytest.fail("asked here"))
    found = ask(machines.cloud_vm(tmp_path), "jetson")
    assert {found[name].status for name in LLAMA_CPP} == {"UNKNOWN"}
    assert found["nvcc"].expected == "nvcc that knows sm_87 (CUDA 11.4 or newer)"


def test_llama_cpp_that_a_target_can_do_without_is_no_fault(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    found = ask(machines.raspberry_pi_5(tmp_path), "pi5")
    assert {found[name].status for name in ("c++ compiler", "llama.cpp", "llama.cpp devices")} == {"UNKNOWN"}
    assert found["c++ compiler"].remedy.startswith("only for the llamacpp backend: install build-essential")


def test_a_target_without_llama_cpp_is_not_asked_for_it(tmp_path: Path) -> None:
    alone = msgspec.structs.replace(target.load("x86-avx512-vnni"), backends=("onnx",))
    names = {check.name for check in doctor.checks(alone, machines.cloud_vm(tmp_path))}
    assert not names & set(LLAMA_CPP)


@pytest.mark.parametrize(("release", "revision", "status"), [(36, "4.3", "FAILED"), (38, "2.0", "UNKNOWN")])
def test_a_jetson_is_told_whether_tvms_cuda_runtime_suits_its_jetpack(
    tmp_path: Path, release: int, revision: str, status: str
) -> None:
    root = machines.jetson_orin_nano_super(tmp_path)
    machines.write(root, {"etc/nv_tegra_release": f"# R{release} (release), REVISION: {revision}, GCID: 1\n"})
    check = ask(root, "jetson")["tvm cuda runtime"]
    assert check.status == status
    assert ("use the llamacpp backend: CMAKE_ARGS=" in check.remedy) == (status == "FAILED")


def test_a_target_without_mlc_is_not_asked_for_it(tmp_path: Path) -> None:
    alone = msgspec.structs.replace(target.load("jetson"), backends=("llamacpp",))
    assert "tvm" in ask(machines.cloud_vm(tmp_path), "jetson")
    names = {check.name for check in doctor.checks(alone, machines.cloud_vm(tmp_path))}
    assert not names & {"tvm", "tvm cuda runtime", "cuda kernel compiler", "kernel check", "mlc_llm"}


def test_no_usable_backend_fails_with_its_install_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(detect, "usable_backends", lambda _: (BackendState("onnx", False, False, "pip install onnx"),))
    check = ask(machines.cloud_vm(tmp_path))["backend"]
    assert (check.status, check.observed) == ("FAILED", "onnx: pip install onnx")


def test_the_token_is_never_shown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    found = ask(machines.cloud_vm(tmp_path))
    assert found["hub token"].status == "PASSED"
    assert "hf_secret" not in repr(found)


def test_switched_off_telemetry_passes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "1")
    assert ask(machines.cloud_vm(tmp_path))["telemetry"].status == "PASSED"


def test_a_cache_that_may_not_be_written_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("os.access", lambda path, mode: False)
    assert ask(machines.cloud_vm(tmp_path))["hub cache"].status == "FAILED"


def named_gpu(provider: Literal["webgpu", "cuda"], monkeypatch: pytest.MonkeyPatch, found: object) -> doctor.Check:
    """What is said of a provider of the onnx backend on a Steam Deck where looking for its device ends in `found`."""

    def find() -> object:
        if isinstance(found, Exception):
            raise found
        return found

    monkeypatch.setattr(f"edgeq.backends.onnx.{provider}.find", find)
    monkeypatch.setattr(detect, "mismatch", lambda *_: None)
    device = msgspec.structs.replace(target.load("steam-deck-oled"), onnx=target.Onnx(provider=provider))
    (check,) = [each for each in doctor.checks(device) if each.name == f"onnx {provider}"]
    return check


def test_a_provider_that_finds_its_gpu_passes(monkeypatch: pytest.MonkeyPatch) -> None:
    check = named_gpu("webgpu", monkeypatch, SimpleNamespace(name="AMD GPU"))
    assert (check.status, check.observed) == ("PASSED", "AMD GPU")


def test_a_provider_that_is_not_installed_is_unknown_with_its_line(monkeypatch: pytest.MonkeyPatch) -> None:
    check = named_gpu("webgpu", monkeypatch, MissingTool("no provider", run="pip install it"))
    assert (check.status, check.remedy) == ("UNKNOWN", "only for the onnx backend: pip install it")


def test_a_provider_without_kernels_for_the_gpu_fails(monkeypatch: pytest.MonkeyPatch) -> None:
    check = named_gpu("cuda", monkeypatch, BackendFault("no kernels for sm_87", run="take another"))
    assert (check.status, check.observed, check.remedy) == ("FAILED", "no kernels for sm_87", "take another")


def test_a_provider_of_another_device_is_unknown_here(tmp_path: Path) -> None:
    found = ask(machines.cloud_vm(tmp_path), "steam-deck-oled")
    assert (found["onnx webgpu"].status, found["onnx webgpu"].observed) == ("UNKNOWN", "this is another machine")
    assert "onnx cpu" not in ask(machines.cloud_vm(tmp_path), "x86-avx2")


def test_no_line_installs_what_the_target_does_not_know_to_install(tmp_path: Path) -> None:
    engines = ("llama.cpp", "llama.cpp devices", "onnx cuda")
    nano, orin = (ask(machines.cloud_vm(tmp_path), name) for name in ("jetson-nano", "jetson"))
    assert "pip install" in orin["llama.cpp"].remedy
    assert not any("pip install" in nano[name].remedy for name in engines if name in nano)
    assert nano["llama.cpp"].remedy.startswith("none is known: JetPack 4.6")
