"""NVIDIA GPUs as the driver's own library describes them; nothing to install, nothing found without a driver."""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple

_LIBRARY = "libnvidia-ml.so.1"
_TEXT_BYTES = 96


class Gpu(NamedTuple):
    """Name, compute capability as `sm_90`, memory in bytes, and driver version; None where the driver does not say."""

    name: str
    arch: str | None
    memory_bytes: int | None
    driver: str | None


class _Memory(ctypes.Structure):
    _fields_ = (("total", ctypes.c_ulonglong), ("free", ctypes.c_ulonglong), ("used", ctypes.c_ulonglong))


def library() -> Any:
    """The driver's NVML library, or None when this machine has no NVIDIA driver."""
    try:
        return ctypes.CDLL(_LIBRARY)
    except OSError:
        return None


def gpus(nvml: Any) -> tuple[Gpu, ...]:
    """Every GPU that the library lists; empty when it cannot start (a driver without a device)."""
    if nvml.nvmlInit_v2() != 0:
        return ()
    try:
        count = ctypes.c_uint()
        if nvml.nvmlDeviceGetCount_v2(ctypes.byref(count)) != 0:
            return ()
        driver = _text(nvml.nvmlSystemGetDriverVersion)
        return tuple(gpu for index in range(count.value) if (gpu := _gpu(nvml, index, driver)))
    finally:
        nvml.nvmlShutdown()


def _gpu(nvml: Any, index: int, driver: str | None) -> Gpu | None:
    handle, memory = ctypes.c_void_p(), _Memory()
    major, minor = ctypes.c_int(), ctypes.c_int()
    if nvml.nvmlDeviceGetHandleByIndex_v2(ctypes.c_uint(index), ctypes.byref(handle)) != 0:
        return None
    known = nvml.nvmlDeviceGetCudaComputeCapability(handle, ctypes.byref(major), ctypes.byref(minor)) == 0
    sized = nvml.nvmlDeviceGetMemoryInfo(handle, ctypes.byref(memory)) == 0
    return Gpu(
        name=_text(nvml.nvmlDeviceGetName, handle) or "NVIDIA GPU",
        arch=f"sm_{major.value}{minor.value}" if known else None,
        memory_bytes=int(memory.total) if sized else None,
        driver=driver,
    )


def _text(call: Any, *arguments: Any) -> str | None:
    buffer = ctypes.create_string_buffer(_TEXT_BYTES)
    return buffer.value.decode(errors="replace") if call(*arguments, buffer, ctypes.c_uint(_TEXT_BYTES)) == 0 else None
