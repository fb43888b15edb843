"""What a device's system has for llama.cpp: compilers and headers to compile it, drivers to run it."""

from __future__ import annotations

import os
import re
import subprocess
from collections.abc import Callable
from pathlib import Path

from edgeq.backends.findings import Finding, show
from edgeq.machine import Machine
from edgeq.target import Target

OLDEST_VULKAN_HEADERS = (1, 3, 272)
"""First with VK_EXT_layer_settings, whose types ggml-vulkan.cpp of llama-cpp-python 0.3.36 uses without asking.

Everything newer it guards. Debian 12 has 1.3.239; Ubuntu 22.04, and JetPack 6 with it, 1.3.204.
"""
_FIRST_CUDA = {"sm_86": "11.1", "sm_87": "11.4", "sm_89": "11.8", "sm_90": "11.8", "sm_120": "12.8", "sm_110": "13.0"}
"""Oldest toolkit for an architecture, to be named to people (CUDA release notes); nvcc itself says what it knows."""
_OLDEST_DRIVER = {11: 450, 12: 525, 13: 580}
"""Driver branch that programs of a CUDA version need: CUDA release notes, minor version compatibility."""
_CUDA_BIN = "/usr/local/cuda/bin"
_NVCC_ARGUMENT = "-DCMAKE_CUDA_COMPILER="
_LIBRARIES = ("usr/lib/{}", "usr/lib/{}/nvidia", "usr/lib/{}/tegra", "usr/lib64", "usr/lib", "usr/local/lib")
_ELSEWHERE = ("usr/lib/wsl/lib", "run/opengl-driver/lib")
_VULKAN_DRIVERS = ("etc/vulkan/icd.d", "usr/share/vulkan/icd.d", "usr/local/share/vulkan/icd.d")
_SOFTWARE_DRIVERS = ("lvp", "vk_swiftshader")
_APPLE_COMPILERS = (
    "Library/Developer/CommandLineTools/usr/bin/clang++",
    "Applications/Xcode.app/Contents/Developer/Toolchains/XcodeDefault.xctoolchain/usr/bin/clang++",
)


def tools(target: Target, root: Path) -> list[Finding]:
    """What compiling for the target's API needs, looked for below `root`."""
    return [look(target, root) for look in (_compiler, *_TOOLS.get(target.api, ()))]


def drivers(target: Target, machine: Machine, root: Path) -> list[Finding]:
    """What running on the target's API needs of its system, looked for below `root`."""
    return [look(target, machine, root) for look in _DRIVERS.get(target.api, ())]


def _compiler(target: Target, root: Path) -> Finding:
    if target.host.endswith("darwin"):
        path = next((root / each for each in _APPLE_COMPILERS if (root / each).exists()), None)
        expected, remedy = "Apple's command line tools", "xcode-select --install"
    else:
        path = next(filter(None, (_program(name, root) for name in ("c++", "g++", "clang++"))), None)
        expected = "c++, g++ or clang++"
        remedy = _packages(target, "a C++ compiler, on Debian and Ubuntu build-essential")
    return Finding("c++ compiler", path is not None, expected, show(path, root), remedy)


def _nvcc(target: Target, root: Path) -> Finding:
    arch = target.gpu.arch if target.gpu else "unknown"
    since = f" (CUDA {_FIRST_CUDA[arch]} or newer)" if arch in _FIRST_CUDA else ""
    expected = f"nvcc that knows {arch}{since}"
    path, found = _cuda_compiler(target, root)
    if path is None:
        return Finding("nvcc", False, expected, "none found", _packages(target, f"the CUDA toolkit{since}"))
    version, known = _release(path), _run(path, "--list-gpu-code").split()
    observed = f"nvcc {version or 'of unknown version'}, {show(path, root)}"
    if not known or not arch.startswith("sm_"):
        return Finding("nvcc", None, expected, observed, f"nvcc --list-gpu-code has to name {arch}")
    if arch not in known:
        observed += f", knows {known[0]} to {known[-1]}"
        return Finding("nvcc", False, expected, observed, f"install a CUDA toolkit that knows {arch}{since}")
    remedy = f"it is not on PATH: before installing, export CUDACXX={show(path, root)}"
    return Finding("nvcc", found or None, expected, observed, remedy)


def _cuda_compiler(target: Target, root: Path) -> tuple[Path | None, bool]:
    """nvcc, and whether CMake finds it: it is on PATH, or named by the target or by CUDACXX."""
    named = [word.partition("=")[2] for word in target.llamacpp.cmake_args if word.startswith(_NVCC_ARGUMENT)]
    if place := (*named, os.environ.get("CUDACXX", ""))[0]:
        path = _below(root, place) if "/" in place else _program(place, root) or _below(root, place)
        return path if path.is_file() else None, True
    on_path = _program("nvcc", root)
    return on_path or _program("nvcc", root, _CUDA_BIN), on_path is not None


def _vulkan_headers(target: Target, root: Path) -> Finding:
    oldest = ".".join(map(str, OLDEST_VULKAN_HEADERS))
    expected = f"{oldest} or newer"
    arguments = (os.environ.get("CMAKE_ARGS", ""), *target.llamacpp.cmake_args)
    given = re.findall(r"-DVulkan_INCLUDE_DIR=(\S+)", " ".join(arguments))
    sdk = [f"{each}/include" for each in (os.environ.get("VULKAN_SDK"),) if each]
    for folder in (*given, *sdk, "/usr/local/include", "/usr/include"):
        if version := _header_version(_below(root, folder) / "vulkan/vulkan_core.h"):
            observed = f"{'.'.join(map(str, version))} in {folder}"
            remedy = f"unpack Vulkan-Headers {oldest} or newer; add -DVulkan_INCLUDE_DIR=<its include> to CMAKE_ARGS"
            return Finding("vulkan headers", version >= OLDEST_VULKAN_HEADERS, expected, observed, remedy)
    remedy = _packages(target, "Vulkan's headers, on Debian and Ubuntu libvulkan-dev")
    return Finding("vulkan headers", False, expected, "none in /usr/include", remedy)


def _spirv_headers(target: Target, root: Path) -> Finding:
    file = "cmake/SPIRV-Headers/SPIRV-HeadersConfig.cmake"
    folders = ("usr/share", "usr/lib", "usr/local/share", "usr/local/lib", f"usr/lib/{target.host}")
    path = next((root / each / file for each in folders if (root / each / file).is_file()), None)
    remedy = _packages(target, "SPIR-V's headers, on Debian and Ubuntu spirv-headers")
    return Finding("spirv headers", path is not None, "SPIRV-HeadersConfig.cmake", show(path, root), remedy)


def _glslc(target: Target, root: Path) -> Finding:
    sdk = os.environ.get("VULKAN_SDK")
    path = _program("glslc", root, *((f"{sdk}/bin",) if sdk else ()))
    remedy = _packages(target, "glslc, on Debian 12 and Ubuntu 24.04 of that name; on Ubuntu 22.04 the LunarG SDK")
    return Finding("glslc", path is not None, "glslc", show(path, root), remedy)


def _nvidia_driver(target: Target, machine: Machine, root: Path) -> Finding:
    path = _library("libcuda.so.1", target, root)
    driver = next((gpu.driver for gpu in machine.accelerators if gpu.api == "cuda" and gpu.driver), "")
    nvcc, _ = _cuda_compiler(target, root)
    toolkit, branch = _major(_release(nvcc) if nvcc else ""), _major(driver)
    oldest = _OLDEST_DRIVER.get(toolkit)
    expected = "libcuda.so.1" + (f", driver {oldest} or newer for CUDA {toolkit}" if oldest else "")
    observed = show(path, root) + (f", driver {driver}" if driver else "")
    if path is None:
        return Finding("nvidia driver", False, expected, observed, _packages(target, "NVIDIA's driver"))
    new_enough = not (branch and oldest) or branch >= oldest
    return Finding("nvidia driver", new_enough, expected, observed, "install a newer driver, or an older CUDA toolkit")


def _vulkan_loader(target: Target, _: Machine, root: Path) -> Finding:
    path = _library("libvulkan.so.1", target, root)
    remedy = _packages(target, "Vulkan's loader, on Debian and Ubuntu libvulkan1")
    return Finding("vulkan loader", path is not None, "libvulkan.so.1", show(path, root), remedy)


def _vulkan_driver(target: Target, _: Machine, root: Path) -> Finding:
    named = os.environ.get("VK_DRIVER_FILES") or os.environ.get("VK_ICD_FILENAMES")
    if named:
        files = [file for word in named.split(":") if (file := _below(root, word)).is_file()]
    else:
        files = sorted(file for folder in _VULKAN_DRIVERS for file in (root / folder).glob("*.json"))
    soft = [file for file in files if file.name.startswith(_SOFTWARE_DRIVERS)]
    observed = ", ".join(f"{file.stem} (software)" if file in soft else file.stem for file in files) or "none"
    remedy = _packages(target, "the GPU's Vulkan driver, on Debian and Ubuntu mesa-vulkan-drivers")
    return Finding("vulkan driver", len(files) > len(soft), "a GPU's driver in vulkan/icd.d", observed, remedy)


_TOOLS: dict[str, tuple[Callable[[Target, Path], Finding], ...]] = {
    "cuda": (_nvcc,),
    "vulkan": (_vulkan_headers, _spirv_headers, _glslc),
}
_DRIVERS: dict[str, tuple[Callable[[Target, Machine, Path], Finding], ...]] = {
    "cuda": (_nvidia_driver,),
    "vulkan": (_vulkan_loader, _vulkan_driver),
}


def _packages(target: Target, what: str) -> str:
    """Remedy: the target's own packages where its file names them, else `what` is missing."""
    return f"install {' '.join(target.llamacpp.packages) or what}"


def _program(name: str, root: Path, *folders: str) -> Path | None:
    """Path below `root` of a program on PATH or in `folders`."""
    every = (*filter(None, os.environ.get("PATH", "").split(os.pathsep)), *folders)
    paths = (_below(root, folder) / name for folder in every)
    return next((path for path in paths if path.is_file() and os.access(path, os.X_OK)), None)


def _library(name: str, target: Target, root: Path) -> Path | None:
    """Path below `root` of a library in LD_LIBRARY_PATH or where distributions and drivers put it."""
    given = filter(None, os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep))
    every = (*given, *(each.format(target.host) for each in _LIBRARIES), *_ELSEWHERE)
    return next((path for folder in every if (path := _below(root, folder) / name).exists()), None)


def _header_version(file: Path) -> tuple[int, ...] | None:
    try:
        text = file.read_text(errors="replace")
    except OSError:
        return None
    patch = re.search(r"define VK_HEADER_VERSION (\d+)", text)
    minor = re.search(
        r"define VK_HEADER_VERSION_COMPLETE VK_MAKE_API_VERSION\(0, (\d+), (\d+), VK_HEADER_VERSION\)", text
    )
    return (int(minor[1]), int(minor[2]), int(patch[1])) if minor and patch else None


def _release(nvcc: Path) -> str:
    """Version such as 12.6; empty when nvcc does not say."""
    match = re.search(r"release (\d+\.\d+)", _run(nvcc, "--version"))
    return match[1] if match else ""


def _major(version: str) -> int:
    """First number of a version; 0 when there is none."""
    match = re.match(r"\d+", version)
    return int(match[0]) if match else 0


def _run(program: Path, argument: str) -> str:
    try:
        return subprocess.run([program, argument], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""


def _below(root: Path, path: str) -> Path:
    return root / path.lstrip("/")
