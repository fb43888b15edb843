"""CUDA: ONNX Runtime's provider for NVIDIA GPUs, and whether the installed one has kernels for the device.

Nothing here ever ran on a GPU: the graph is proven on the CPU provider only, and the check of the kernels on the
published packages.
"""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeq.backends.onnx.device import Device
from edgeq.errors import BackendFault, MissingTool
from edgeq.machine import this_machine

PTX, CUBIN = 1, 2
INSTEAD = "CMAKE_ARGS=-DGGML_CUDA=on pip install 'edgeq[llamacpp]', then edgeq build ... --backend llamacpp"
_ENGINE = "CUDAExecutionProvider"
_LIBRARY = "libonnxruntime_providers_cuda.so"
_MAGIC = struct.pack("<I", 0xBA55ED50)
_HEADER, _ENTRY = struct.Struct("<4xHHQ"), struct.Struct("<HHIQ12xI")
_TEGRA = (53, 62, 72, 87, 101, 110)


def find() -> Device:
    """The CUDA device; raises MissingTool without a GPU or the provider, BackendFault when it has no kernels for it."""
    machine = this_machine()
    gpu = next((each for each in machine.accelerators if each.api == "cuda"), None)
    if gpu is None:
        raise MissingTool("this machine has no CUDA GPU", run="edgeq doctor")
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingTool("onnxruntime cannot be imported", why=str(error), run="pip install edgeq") from error
    if _ENGINE not in ort.get_available_providers():
        raise MissingTool(f"the installed onnxruntime {ort.__version__} has no CUDA provider", run=INSTEAD)
    check(gpu.arch, Path(ort.__file__).parent / "capi" / _LIBRARY)

    def open_session(path: str, options: Any) -> Any:
        return ort.InferenceSession(path, options, providers=[_ENGINE, "CPUExecutionProvider"])

    return Device("cuda", _ENGINE, gpu.name, "cuda", False, None, open_session)


def check(arch: str | None, library: Path) -> None:
    """Raise BackendFault when a provider's library has no kernels for a GPU's architecture, such as `sm_87`.

    Nothing is known, and nothing raised, where the GPU's architecture is not, or where no kernels are found at all.
    """
    kernels = set(read(library)) if library.is_file() and library.stat().st_size else set()
    if arch is None or not kernels or any(_runs(*kernel, int(arch.removeprefix("sm_"))) for kernel in kernels):
        return
    raise BackendFault(
        f"the installed onnxruntime has no kernels for this GPU ({arch})",
        why=f"{library.name} holds {_names(kernels)}: it would load, and fail at the first kernel.",
        run=INSTEAD,
    )


def _names(kernels: set[tuple[int, int]]) -> str:
    return ", ".join(f"sm_{number}" for number in sorted({number for _, number in kernels}))


def read(library: Path) -> Iterator[tuple[int, int]]:
    """Kind (PTX or CUBIN) and architecture (87) of every kernel image in a file.

    Images lie in containers: magic number, header size and length, then entries of the same plan, their architecture
    at byte 28. No publisher describes this; it was checked on onnxruntime-gpu 1.31.1, where it finds 75, 80, 86, 89, 90
    and 120 (x86-64) and 89, 90, 120 and 121 (aarch64).
    """
    with library.open("rb") as stream, mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ) as data:
        start = data.find(_MAGIC)
        while 0 <= start <= len(data) - _HEADER.size:
            _, header, length = _HEADER.unpack_from(data, start)
            place, end = start + header, start + header + length
            if header != _HEADER.size or end > len(data):
                end = start + len(_MAGIC)  # these four bytes are something else
            while place <= end - _ENTRY.size:
                kind, _, size, payload, arch = _ENTRY.unpack_from(data, place)
                yield kind, arch
                place += max(_ENTRY.size, size + payload)
            start = data.find(_MAGIC, end)


def _runs(kind: int, built: int, device: int) -> bool:
    """Whether an image runs on a device (CUDA C++ Programming Guide, "Application Compatibility").

    PTX is compiled for any later architecture; machine code runs on the same one, and on later minors of the same major
    unless either is a Tegra (Jetson).
    """
    if built == device:
        return True
    if kind == PTX:
        return built < device
    return built < device and built // 10 == device // 10 and built not in _TEGRA and device not in _TEGRA
