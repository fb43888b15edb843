"""GPUs as the Vulkan loader lists them, asked in a process of its own: a driver that does not suit may end it."""

from __future__ import annotations

import ctypes
import subprocess
import sys
from functools import cache
from typing import Any

import msgspec

_LIBRARIES = ("libvulkan.so.1", "libvulkan.so")  # Linux, Android
_ASK = (sys.executable, "-P", "-m", "edgeq.vulkan")
_ASK_SECONDS = 10.0
_CREATE_INSTANCE = 1  # VK_STRUCTURE_TYPE_INSTANCE_CREATE_INFO
_DISCRETE, _CPU = 2, 4  # VkPhysicalDeviceType
_DEVICE_LOCAL = 1  # VK_MEMORY_HEAP_DEVICE_LOCAL_BIT
_MOST_DEVICES = 16


class Gpu(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Name, PCI vendor, and own memory in bytes: None for a GPU that shares the RAM."""

    name: str
    vendor: int
    memory_bytes: int | None


class _CreateInfo(ctypes.Structure):
    _fields_ = (
        ("sType", ctypes.c_uint32),
        ("pNext", ctypes.c_void_p),
        ("flags", ctypes.c_uint32),
        ("pApplicationInfo", ctypes.c_void_p),
        ("enabledLayerCount", ctypes.c_uint32),
        ("ppEnabledLayerNames", ctypes.c_void_p),
        ("enabledExtensionCount", ctypes.c_uint32),
        ("ppEnabledExtensionNames", ctypes.c_void_p),
    )


class _Properties(ctypes.Structure):
    """The start of VkPhysicalDeviceProperties, and room for its rest (820 bytes in Vulkan 1.4)."""

    _fields_ = (
        ("apiVersion", ctypes.c_uint32),
        ("driverVersion", ctypes.c_uint32),
        ("vendorID", ctypes.c_uint32),
        ("deviceID", ctypes.c_uint32),
        ("deviceType", ctypes.c_uint32),
        ("deviceName", ctypes.c_char * 256),
        ("rest", ctypes.c_uint64 * 512),
    )


class _Heap(ctypes.Structure):
    _fields_ = (("size", ctypes.c_uint64), ("flags", ctypes.c_uint32))


class _Memory(ctypes.Structure):
    _fields_ = (
        ("memoryTypeCount", ctypes.c_uint32),
        ("memoryTypes", ctypes.c_uint32 * 64),
        ("memoryHeapCount", ctypes.c_uint32),
        ("memoryHeaps", _Heap * 16),
    )


def library() -> Any:
    """The Vulkan loader, or None where there is none."""
    for name in _LIBRARIES:
        try:
            return ctypes.CDLL(name)
        except OSError:
            continue
    return None


@cache
def devices() -> tuple[Gpu, ...]:
    """GPUs of this machine; empty without a loader, and where asking it fails, crashes or takes too long."""
    if library() is None:
        return ()
    try:
        said = subprocess.run(_ASK, capture_output=True, timeout=_ASK_SECONDS, check=True).stdout
        return msgspec.json.decode(said, type=tuple[Gpu, ...])
    except (OSError, subprocess.SubprocessError, ValueError):
        return ()


def gpus(vulkan: Any) -> tuple[Gpu, ...]:
    """Every GPU that a loader lists, by the functions of Vulkan 1.0; processors that act as one are left out."""
    instance, info = ctypes.c_void_p(), _CreateInfo(sType=_CREATE_INSTANCE)
    if vulkan.vkCreateInstance(ctypes.byref(info), None, ctypes.byref(instance)) != 0:
        return ()
    count, handles = ctypes.c_uint32(_MOST_DEVICES), (ctypes.c_void_p * _MOST_DEVICES)()
    if vulkan.vkEnumeratePhysicalDevices(instance, ctypes.byref(count), handles) < 0:
        return ()
    found = (_gpu(vulkan, ctypes.c_void_p(handle)) for handle in handles[: count.value])
    return tuple(gpu for gpu in found if gpu)


def _gpu(vulkan: Any, handle: ctypes.c_void_p) -> Gpu | None:
    properties, memory = _Properties(), _Memory()
    vulkan.vkGetPhysicalDeviceProperties(handle, ctypes.byref(properties))
    vulkan.vkGetPhysicalDeviceMemoryProperties(handle, ctypes.byref(memory))
    if properties.deviceType == _CPU:
        return None
    heaps = memory.memoryHeaps[: memory.memoryHeapCount]
    size = max((heap.size for heap in heaps if heap.flags & _DEVICE_LOCAL), default=0)
    own = size if properties.deviceType == _DISCRETE and size else None
    return Gpu(properties.deviceName.decode(errors="replace"), properties.vendorID, own)


if __name__ == "__main__":
    sys.stdout.buffer.write(msgspec.json.encode(gpus(library())))
