from __future__ import annotations

import platform

import msgspec
import pytest

from edgeq import target
from edgeq.backends.llamacpp import install
from edgeq.machine import this_machine
from edgeq.target import LlamaCpp

NVCC = "-DCMAKE_CUDA_COMPILER=/usr/local/cuda/bin/nvcc"
ARM, X86 = "-DLLAVA_BUILD=OFF", "-DLLAVA_BUILD=OFF -DGGML_NATIVE=OFF"


@pytest.fixture(scope="session", autouse=True)
def installed() -> None:
    """Lines are for those who have no llama.cpp."""


@pytest.mark.parametrize(
    ("name", "arguments", "packages"),
    [
        ("jetson", f"{ARM} -DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=87 {NVCC}", "build-essential nvidia-jetpack"),
        ("thor", f"{ARM} -DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=110 {NVCC}", "build-essential nvidia-jetpack"),
        (
            "rtx-4060-laptop",
            f"{X86} -DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=89",
            "build-essential cuda-toolkit",
        ),
        ("apple-m4", f"{ARM} -DGGML_METAL=on", ""),
        (
            "steamdeck",
            f"{X86} -DGGML_VULKAN=on",
            "base-devel vulkan-headers vulkan-icd-loader spirv-headers shaderc vulkan-radeon",
        ),
        ("pi5", ARM, "build-essential"),
        ("x86-avx2", X86, ""),
        ("x86-avx512-vnni", f"{X86} -DGGML_AVX512=ON -DGGML_AVX512_VNNI=ON", ""),
        ("n150", f"{X86} -DGGML_AVX_VNNI=ON", "build-essential"),
    ],
)
def test_each_device_has_its_line(name: str, arguments: str, packages: str) -> None:
    line = f"CMAKE_ARGS='{arguments}' pip install 'edgeq[llamacpp]'"
    needs = f"  # compiles with the system's packages: {packages}" if packages else ""
    assert install.line(target.load(name)) == line + needs


def test_a_target_of_ones_own_adds_its_arguments() -> None:
    pi = msgspec.structs.replace(target.load("pi5"), llamacpp=LlamaCpp(cmake_args=("-DGGML_CPU_ALL_VARIANTS=on",)))
    assert install.line(pi) == f"CMAKE_ARGS='{ARM} -DGGML_CPU_ALL_VARIANTS=on' pip install 'edgeq[llamacpp]'"


def test_compiling_anew_passes_by_pips_cache() -> None:
    line = install.again(target.load("steamdeck"), "0.3.36")
    assert line.startswith(f"CMAKE_ARGS='{X86} -DGGML_VULKAN=on' pip install ")
    assert line.endswith("--force-reinstall --no-cache-dir --no-deps llama-cpp-python==0.3.36")


def test_a_device_with_another_processor_needs_it_here_too(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    old = msgspec.structs.replace(this_machine(), isa=("avx2",))
    monkeypatch.setattr(install, "this_machine", lambda: old)
    here, there = install.lines(target.load("jetson")).split(" here; on Jetson Orin Nano Super Developer Kit 8GB: ")
    assert here == f"CMAKE_ARGS='{X86}' pip install 'edgeq[llamacpp]'"
    assert there == install.line(target.load("jetson"))
