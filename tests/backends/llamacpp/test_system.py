from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import msgspec
import pytest

import machines
from edgeq import target
from edgeq.accelerators import Accelerator
from edgeq.backends.findings import Finding
from edgeq.backends.llamacpp import system
from edgeq.machine import Machine, this_machine

JETSON, THOR, LAPTOP, DECK, PI, MAC = map(
    target.load, ("jetson", "thor", "rtx-4060-laptop", "steamdeck", "pi5", "apple-m4")
)
NVCC_12 = ("12.6", "sm_50 sm_60 sm_72 sm_80 sm_87 sm_89 sm_90")
NVCC_13 = ("13.0", "sm_75 sm_80 sm_87 sm_89 sm_90 sm_110")
HEADERS = """#define VK_HEADER_VERSION {}
#define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION(0, {}, {}, VK_HEADER_VERSION)
"""


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """None of this needs llama.cpp."""


@pytest.fixture(autouse=True)
def environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/usr/bin")
    for name in ("CMAKE_ARGS", "CUDACXX", "LD_LIBRARY_PATH", "VULKAN_SDK", "VK_DRIVER_FILES", "VK_ICD_FILENAMES"):
        monkeypatch.delenv(name, raising=False)


def program(root: Path, path: str, text: str = "") -> None:
    """A program below `root` that prints a text."""
    machines.write(root, {path: f"#!/bin/sh\n{text}\n"})
    (root / path).chmod(0o755)


def nvcc(root: Path, version: tuple[str, str], path: str = "usr/local/cuda/bin/nvcc") -> None:
    release, architectures = version
    program(
        root,
        path,
        f'if [ "$1" = --version ]; then echo "Cuda compilation tools, release {release}, V{release}.85"; fi\n'
        f'if [ "$1" = --list-gpu-code ]; then printf "%s\\n" {architectures}; fi',
    )


def headers(root: Path, version: tuple[int, int, int], folder: str = "usr/include") -> None:
    major, minor, patch = version
    machines.write(root, {f"{folder}/vulkan/vulkan_core.h": HEADERS.format(patch, major, minor)})


def tools(device: target.Target, root: Path) -> dict[str, Finding]:
    return {found.name: found for found in system.tools(device, root)}


def drivers(device: target.Target, root: Path, machine: Machine | None = None) -> dict[str, Finding]:
    machine = machine or this_machine(machines.cloud_vm(root / "machine"))
    return {found.name: found for found in system.drivers(device, machine, root)}


@pytest.mark.parametrize("name", ["c++", "g++", "clang++"])
def test_any_compiler_is_one(tmp_path: Path, name: str) -> None:
    assert tools(PI, tmp_path)["c++ compiler"].passed is False
    assert "build-essential" in tools(PI, tmp_path)["c++ compiler"].remedy
    machines.write(tmp_path, {f"usr/bin/{name}": "not executable"})
    assert tools(PI, tmp_path)["c++ compiler"].passed is False
    program(tmp_path, f"usr/bin/{name}")
    assert tools(PI, tmp_path)["c++ compiler"][1:4] == (True, "c++, g++ or clang++", f"/usr/bin/{name}")


def test_a_mac_needs_apples_tools_and_not_the_stub_on_path(tmp_path: Path) -> None:
    program(tmp_path, "usr/bin/c++")
    found = tools(MAC, tmp_path)["c++ compiler"]
    assert (found.passed, found.remedy) == (False, "xcode-select --install")
    program(tmp_path, "Library/Developer/CommandLineTools/usr/bin/clang++")
    assert tools(MAC, tmp_path)["c++ compiler"].passed is True


@pytest.mark.parametrize(
    ("device", "version", "passed"),
    [(JETSON, NVCC_12, True), (JETSON, NVCC_13, True), (THOR, NVCC_12, False), (THOR, NVCC_13, True)],
)
def test_nvcc_has_to_know_the_gpu(
    tmp_path: Path, device: target.Target, version: tuple[str, str], passed: bool
) -> None:
    nvcc(tmp_path, version)
    found = tools(device, tmp_path)["nvcc"]
    assert found.passed is passed
    assert found.observed.startswith(f"nvcc {version[0]}, /usr/local/cuda/bin/nvcc")
    if not passed:
        assert found.observed.endswith("knows sm_50 to sm_90")
        assert found.remedy == "install a CUDA toolkit that knows sm_110 (CUDA 13.0 or newer)"


def test_no_nvcc_names_the_packages(tmp_path: Path) -> None:
    nvcc(tmp_path, NVCC_12, "usr/bin/nvcc")  # the target's arguments name another place
    found = tools(JETSON, tmp_path)["nvcc"]
    assert (found.passed, found.observed) == (False, "none found")
    assert "nvidia-jetpack" in found.remedy


def test_nvcc_beside_path_has_to_be_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    nvcc(tmp_path, NVCC_12)
    found = tools(LAPTOP, tmp_path)["nvcc"]
    assert found.passed is None
    assert found.remedy.endswith("export CUDACXX=/usr/local/cuda/bin/nvcc")
    monkeypatch.setenv("CUDACXX", "/usr/local/cuda/bin/nvcc")
    assert tools(LAPTOP, tmp_path)["nvcc"].passed is True


@pytest.mark.parametrize("text", ["exit 1", "echo", "kill -9 $$"])
def test_an_nvcc_that_does_not_answer_is_unknown(tmp_path: Path, text: str) -> None:
    program(tmp_path, "usr/bin/nvcc", text)
    found = tools(LAPTOP, tmp_path)["nvcc"]
    assert (found.passed, found.observed) == (None, "nvcc of unknown version, /usr/bin/nvcc")


@pytest.mark.parametrize(
    ("version", "passed"),
    [((1, 3, 204), False), ((1, 3, 239), False), ((1, 3, 271), False), ((1, 3, 272), True), ((1, 4, 309), True)],
)
def test_old_vulkan_headers_fail(tmp_path: Path, version: tuple[int, int, int], passed: bool) -> None:
    headers(tmp_path, version)
    found = tools(DECK, tmp_path)["vulkan headers"]
    assert (found.passed, found.observed) == (passed, f"{'.'.join(map(str, version))} in /usr/include")
    assert "-DVulkan_INCLUDE_DIR" in found.remedy


def test_newer_headers_that_cmake_is_given_count(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers(tmp_path, (1, 3, 239))
    headers(tmp_path, (1, 4, 300), "opt/newer/include")
    headers(tmp_path, (1, 4, 301), "opt/sdk/include")
    monkeypatch.setenv("VULKAN_SDK", "/opt/sdk")
    assert tools(DECK, tmp_path)["vulkan headers"].observed == "1.4.301 in /opt/sdk/include"
    monkeypatch.setenv("CMAKE_ARGS", "-DGGML_VULKAN=on -DVulkan_INCLUDE_DIR=/opt/newer/include")
    assert tools(DECK, tmp_path)["vulkan headers"].observed == "1.4.300 in /opt/newer/include"


@pytest.mark.parametrize("text", ["", "#define VK_HEADER_VERSION 300\n"])
def test_headers_without_a_version_are_none(tmp_path: Path, text: str) -> None:
    machines.write(tmp_path, {"usr/include/vulkan/vulkan_core.h": text})
    found = tools(DECK, tmp_path)["vulkan headers"]
    assert (found.passed, found.observed) == (False, "none in /usr/include")
    assert "vulkan-headers" in found.remedy


@pytest.mark.parametrize(
    ("name", "make"),
    [
        ("glslc", lambda root: program(root, "usr/bin/glslc")),
        (
            "spirv headers",
            lambda root: machines.write(root, {"usr/share/cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake": ""}),
        ),
    ],
)
def test_shader_tools_are_there_or_named(tmp_path: Path, name: str, make: Callable[[Path], object]) -> None:
    found = tools(DECK, tmp_path)[name]
    assert (found.passed, found.observed) == (False, "none found")
    assert "shaderc" in found.remedy
    make(tmp_path)
    assert tools(DECK, tmp_path)[name].passed is True


@pytest.mark.parametrize("folder", ["usr/lib/aarch64-linux-gnu/nvidia", "usr/lib/aarch64-linux-gnu/tegra"])
def test_the_driver_of_a_jetson_is_found_where_jetpack_puts_it(tmp_path: Path, folder: str) -> None:
    assert drivers(JETSON, tmp_path)["nvidia driver"].passed is False
    machines.write(tmp_path, {f"{folder}/libcuda.so.1": ""})
    nvcc(tmp_path, NVCC_12)
    found = drivers(JETSON, tmp_path)["nvidia driver"]
    assert (found.passed, found.observed) == (True, f"/{folder}/libcuda.so.1")
    assert found.expected == "libcuda.so.1, driver 525 or newer for CUDA 12"


@pytest.mark.parametrize(
    ("version", "driver", "passed"),
    [(NVCC_13, "580.65.06", True), (NVCC_13, "550.54", False), (NVCC_12, "550.54", True), (NVCC_12, None, True)],
)
def test_the_driver_has_to_suit_the_toolkit(
    tmp_path: Path, version: tuple[str, str], driver: str | None, passed: bool
) -> None:
    machines.write(tmp_path, {"usr/lib/x86_64-linux-gnu/libcuda.so.1": ""})
    nvcc(tmp_path, version)
    gpu = Accelerator(name="a GPU", api="cuda", arch="sm_89", driver=driver)
    machine = msgspec.structs.replace(this_machine(machines.desktop(tmp_path / "machine")), accelerators=(gpu,))
    assert drivers(LAPTOP, tmp_path, machine)["nvidia driver"].passed is passed


def test_libraries_are_also_found_by_their_variable(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drivers(DECK, tmp_path)["vulkan loader"].passed is False
    machines.write(tmp_path, {"opt/vulkan/libvulkan.so.1": ""})
    monkeypatch.setenv("LD_LIBRARY_PATH", "/opt/vulkan")
    found = drivers(DECK, tmp_path)["vulkan loader"]
    assert (found.passed, found.observed) == (True, "/opt/vulkan/libvulkan.so.1")


def test_a_software_driver_is_no_gpus(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert drivers(DECK, tmp_path)["vulkan driver"][1:4:2] == (False, "none")
    machines.write(tmp_path, {"usr/share/vulkan/icd.d/lvp_icd.x86_64.json": "{}"})
    assert drivers(DECK, tmp_path)["vulkan driver"][1:4:2] == (False, "lvp_icd.x86_64 (software)")
    machines.write(tmp_path, {"etc/vulkan/icd.d/radeon_icd.json": "{}"})
    assert drivers(DECK, tmp_path)["vulkan driver"][1:4:2] == (True, "radeon_icd, lvp_icd.x86_64 (software)")
    monkeypatch.setenv("VK_DRIVER_FILES", "/usr/share/vulkan/icd.d/lvp_icd.x86_64.json:/nowhere.json")
    assert drivers(DECK, tmp_path)["vulkan driver"][1:4:2] == (False, "lvp_icd.x86_64 (software)")


def test_each_api_asks_for_its_own(tmp_path: Path) -> None:
    assert list(tools(PI, tmp_path)) == list(tools(MAC, tmp_path)) == ["c++ compiler"]
    assert list(drivers(PI, tmp_path)) == list(drivers(MAC, tmp_path)) == []
    assert list(tools(JETSON, tmp_path)) == ["c++ compiler", "nvcc"]
    assert list(tools(DECK, tmp_path)) == ["c++ compiler", "vulkan headers", "spirv headers", "glslc"]
