"""The line that installs llama-cpp-python for a device: it is compiled there, for the device's API."""

from __future__ import annotations

import platform

from edgeq.target import Target

CMAKE_ARGS = {
    "x86_64": "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF",
    "aarch64": "-DLLAVA_BUILD=OFF",
    "arm64": "-DLLAVA_BUILD=OFF",
}
"""GGML_NATIVE takes the kernels for AMX where the compiler sees them, and those crashed."""
_BACKENDS = {"cuda": "-DGGML_CUDA=on", "metal": "-DGGML_METAL=on", "vulkan": "-DGGML_VULKAN=on"}


def line(target: Target) -> str:
    """Command that installs edgeq with llama.cpp on a target."""
    compute = target.gpu.arch.removeprefix("sm_") if target.gpu and target.gpu.arch.startswith("sm_") else ""
    return line_for(target.api, target.cpu.arch, compute)


def lines(target: Target) -> str:
    """Where to run what: for a target with another processor, this machine needs llama.cpp too, to run the gate."""
    if target.cpu.arch == platform.machine().replace("arm64", "aarch64"):
        return line(target)
    return f"{line_for('cpu')} here; on {target.title}: {line(target)}"


def line_for(api: str, arch: str = "", compute: str = "") -> str:
    """Command that installs edgeq with llama.cpp for an API, on this machine's processor where none is given.

    `compute` is CUDA's compute capability without its point, such as 87.
    """
    words = [CMAKE_ARGS.get(arch or platform.machine(), "-DLLAVA_BUILD=OFF")]
    if api in _BACKENDS:
        words.append(_BACKENDS[api])
    if api == "cuda" and compute:
        words.append(f"-DCMAKE_CUDA_ARCHITECTURES={compute}")
    return f"CMAKE_ARGS='{' '.join(words)}' pip install 'edgeq[llamacpp]'"
