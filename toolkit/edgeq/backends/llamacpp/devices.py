"""Devices that the installed llama.cpp sees, and what its log says of where a model went."""

from __future__ import annotations

import ctypes
import re
import sys
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import msgspec

from edgeq.profiles import Placement

_APIS = {"CPU": "cpu", "CUDA": "cuda", "MTL": "metal", "Metal": "metal", "Vulkan": "vulkan"}
_IMITATIONS = ("llvmpipe", "SwiftShader", "lavapipe")
_LAYER = re.compile(r"layer +\d+ assigned to device ([^,\s]+),")
_BUFFER = re.compile(r": +(\S+) +(?:model|KV|RS|compute|output) buffer size = +([\d.]+) MiB")
_MIB = 1 << 20


@dataclass(frozen=True)
class Device:
    """One device: ggml's name of it (`Vulkan0`), its API, what the driver calls it, and its handle."""

    name: str
    api: str
    description: str
    handle: int

    @property
    def software(self) -> bool:
        """Whether the CPU imitates it."""
        return self.api != "cpu" and any(word in self.description for word in _IMITATIONS)


@dataclass(frozen=True)
class Report:
    """What the installed llama.cpp says of itself: APIs compiled in, devices, and its line of features."""

    backends: tuple[str, ...]
    devices: tuple[Device, ...]
    features: str


def report() -> Report:
    """Report of the library in this process; `python -m` of this module writes it as JSON.

    Raises ImportError, OSError or RuntimeError when it cannot be loaded; one that was compiled for another processor or
    driver may end the process.
    """
    features = _function("llama_print_system_info", ctypes.c_char_p)
    return Report(backends(), found(), features().decode(errors="replace"))


def found() -> tuple[Device, ...]:
    """All devices of the backends that are compiled in."""
    get, count = (
        _function("ggml_backend_dev_get", ctypes.c_void_p),
        _function("ggml_backend_dev_count", ctypes.c_size_t),
    )
    name = _function("ggml_backend_dev_name", ctypes.c_char_p)
    description = _function("ggml_backend_dev_description", ctypes.c_char_p)
    registry = _function("ggml_backend_dev_backend_reg", ctypes.c_void_p)
    registry_name = _function("ggml_backend_reg_name", ctypes.c_char_p)
    devices = []
    for index in range(count()):
        handle = get(ctypes.c_size_t(index))
        pointer = ctypes.c_void_p(handle)
        backend = registry_name(ctypes.c_void_p(registry(pointer))).decode()
        devices.append(
            Device(name(pointer).decode(), _APIS.get(backend, backend.lower()), description(pointer).decode(), handle)
        )
    return tuple(devices)


def backends() -> tuple[str, ...]:
    """APIs that are compiled in, whether or not this machine has a device for them."""
    get, count = (
        _function("ggml_backend_reg_get", ctypes.c_void_p),
        _function("ggml_backend_reg_count", ctypes.c_size_t),
    )
    name = _function("ggml_backend_reg_name", ctypes.c_char_p)
    names = [name(ctypes.c_void_p(get(ctypes.c_size_t(index)))).decode() for index in range(count())]
    return tuple(_APIS.get(each, each.lower()) for each in names)


def placement(log: Iterable[str], devices: Sequence[Device]) -> tuple[Placement, ...]:
    """Layers and bytes on each device, read from the lines that llama.cpp logs while it loads.

    Buffers that a device's driver keeps in host memory count as the CPU's.
    """
    text = "".join(log)
    layers = Counter(_LAYER.findall(text))
    held: Counter[str] = Counter()
    for buffer, size in _BUFFER.findall(text):
        held[_owner(buffer, devices)] += int(float(size) * _MIB)
    known = {device.name: device for device in devices}
    return tuple(
        Placement(
            provider=known[name].api,
            device=known[name].description,
            layers=layers[name],
            bytes=held[name],
            software=known[name].software,
        )
        for name in known
        if layers[name] or held[name]
    )


def _owner(buffer: str, devices: Sequence[Device]) -> str:
    """Device of a buffer type: `Vulkan0`, `CUDA0`, `MTL0_Mapped`, `CPU_REPACK`, `CUDA_Host`."""
    owner = next((device.name for device in devices if buffer.partition("_")[0] == device.name), None)
    return owner or next(device.name for device in devices if device.api == "cpu")


def _function(name: str, kind: type) -> Any:
    """A function of ggml, in the libraries that libllama itself uses.

    The wheel holds libggml.so twice, each copy with a registry of its own: looking the name up behind libllama finds
    the right one.
    """
    import llama_cpp

    function = llama_cpp.llama_cpp._lib[name]
    function.restype = kind
    return function


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(report()) + b"\n")
