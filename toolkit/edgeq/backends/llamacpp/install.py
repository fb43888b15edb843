"""The line that installs llama-cpp-python for a device: it is compiled there, for the device's API."""

from __future__ import annotations

import importlib.metadata
import platform
import re
from collections.abc import Sequence

from edgeq.machine import this_machine
from edgeq.target import Target

CMAKE_ARGS = {
    "x86_64": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF",
    "aarch64": "-DLLAVA_BUILD=OFF",
    "arm64": "-DLLAVA_BUILD=OFF",
}
"""GGML_NATIVE takes the kernels for AMX where the compiler sees them, and those crashed."""
ISA_CMAKE_ARGS = {
    "avx_vnni": "-DGGML_AVX_VNNI=ON",
    "avx512_vnni": "-DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON",
    "avx512_bf16": "-DGGML_AVX512_BF16=ON",
}
"""What GGML_NATIVE would have found on x86, by instruction set.

With AVX-512 and VNNI prompts are read 1.3 to 1.7 times as fast as with AVX2 alone; AVX-VNNI was not measured.
"""
_BACKENDS = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}


def pinned() -> str | None:
    """Version of llama-cpp-python that edgeq is made for; None where edgeq is not installed as a package.

    Its structures and its log change from version to version.
    """
    try:
        wanted = importlib.metadata.requires("edgeq") or []
    except importlib.metadata.PackageNotFoundError:
        return None
    found = (re.match(r"llama[-_]cpp[-_]python\s*==\s*([\w.]+)", each) for each in wanted)
    return next((match[1] for match in found if match), None)


def line(target: Target) -> str:
    """Command that installs edgeq with llama.cpp on a target; packages of its system that compiling needs follow #."""
    packages = target.llamacpp.packages
    needs = f"  # compiles with the system's packages: {' '.join(packages)}" if packages else ""
    return f"{_cmake_args(target)} pip install 'edgeq[llamacpp]'{needs}"


def again(target: Target, version: str) -> str:
    """Command that compiles a version anew: pip would keep what is installed, or what it compiled for another API."""
    return f"{_cmake_args(target)} pip install --force-reinstall --no-cache-dir --no-deps llama-cpp-python=={version}"


def lines(target: Target) -> str:
    """Where to run what: for a target with another processor, this machine needs llama.cpp too, to run the gate."""
    if target.cpu.arch == platform.machine().replace("arm64", "aarch64"):
        return line(target)
    return f"{line_for('cpu')} here; on {target.title}: {line(target)}"


def line_for(api: str) -> str:
    """Command that installs edgeq with llama.cpp for an API, on this machine."""
    return f"CMAKE_ARGS='{' '.join(_words(api, platform.machine(), this_machine().isa))}' pip install 'edgeq[llamacpp]'"


def lacking(isa: Sequence[str], features: str) -> list[str]:
    """Instruction sets of a processor that a llama.cpp was compiled without, by its own line of features."""
    return [name for name in ISA_CMAKE_ARGS if name in isa and f"{name.upper()} = 1" not in features]


def _cmake_args(target: Target) -> str:
    words = _words(target.api, target.cpu.arch, target.cpu.isa)
    if target.api == "cuda" and target.gpu and target.gpu.arch.startswith("sm_"):
        words.append(f"-DCMAKE_CUDA_ARCHITECTURES={target.gpu.arch.removeprefix('sm_')}")
    return f"CMAKE_ARGS='{' '.join((*words, *target.llamacpp.cmake_args))}'"


def _words(api: str, arch: str, isa: Sequence[str]) -> list[str]:
    words = [
        CMAKE_ARGS.get(arch, "-DLLAVA_BUILD=OFF"),
        *(words for name, words in ISA_CMAKE_ARGS.items() if name in isa),
    ]
    return [*words, _BACKENDS[api]] if api in _BACKENDS else words
