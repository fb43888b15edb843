from __future__ import annotations

import ctypes
import sys
from collections.abc import Iterator
from typing import Any

import pytest

from edgeq import vulkan
from edgeq.vulkan import Gpu

GIB = 1 << 30
DEVICES = (
    (b"AMD Radeon 780M Graphics (RADV PHOENIX)", 0x1002, 1, 8 * GIB),
    (b"NVIDIA GeForce RTX 4060 Laptop GPU", 0x10DE, 2, 8 * GIB),
    (b"llvmpipe (LLVM 19.1.7, 256 bits)", 0x10005, 4, 16 * GIB),
)


class FakeLoader:
    """The four calls of the Vulkan loader, for three devices: one integrated, one with memory, one made of software."""

    def __init__(self, starts: int = 0, lists: int = 0) -> None:
        self.starts, self.lists = starts, lists

    def vkCreateInstance(self, info: Any, allocator: None, instance: Any) -> int:  # noqa: N802
        assert info._obj.sType == 1
        return self.starts

    def vkEnumeratePhysicalDevices(self, instance: Any, count: Any, handles: Any) -> int:  # noqa: N802
        count._obj.value = len(DEVICES)
        handles[: len(DEVICES)] = range(1, len(DEVICES) + 1)
        return self.lists

    def vkGetPhysicalDeviceProperties(self, handle: ctypes.c_void_p, properties: Any) -> None:  # noqa: N802
        name, vendor, kind, _ = DEVICES[(handle.value or 0) - 1]
        found = properties._obj
        found.deviceName, found.vendorID, found.deviceType = name, vendor, kind

    def vkGetPhysicalDeviceMemoryProperties(self, handle: ctypes.c_void_p, memory: Any) -> None:  # noqa: N802
        heaps = memory._obj.memoryHeaps
        memory._obj.memoryHeapCount = 2
        heaps[0].size, heaps[0].flags = DEVICES[(handle.value or 0) - 1][3], 1
        heaps[1].size = 64 * GIB


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    vulkan.devices.cache_clear()
    yield
    vulkan.devices.cache_clear()


def test_gpus_are_listed_without_software_and_only_with_memory_of_their_own() -> None:
    assert vulkan.gpus(FakeLoader()) == (
        Gpu("AMD Radeon 780M Graphics (RADV PHOENIX)", 0x1002, None),
        Gpu("NVIDIA GeForce RTX 4060 Laptop GPU", 0x10DE, 8 * GIB),
    )


@pytest.mark.parametrize("loader", [FakeLoader(starts=-9), FakeLoader(lists=-3)])
def test_a_loader_without_a_driver_has_no_gpus(loader: FakeLoader) -> None:
    assert vulkan.gpus(loader) == ()


@pytest.mark.parametrize(
    "program",
    [
        "import os; os.kill(os.getpid(), 11)",
        "print('not a list')",
        "import sys; sys.exit(1)",
        "import time; time.sleep(9)",
    ],
)
def test_a_driver_that_ends_its_process_does_not_end_this_one(monkeypatch: pytest.MonkeyPatch, program: str) -> None:
    monkeypatch.setattr(vulkan, "library", object)
    monkeypatch.setattr(vulkan, "_ASK", (sys.executable, "-c", program))
    monkeypatch.setattr(vulkan, "_ASK_SECONDS", 0.5 if "sleep" in program else 10.0)
    assert vulkan.devices() == ()


def test_what_the_child_says_is_read(monkeypatch: pytest.MonkeyPatch) -> None:
    said = """print('[{"name": "Mali-G610", "vendor": 5045, "memory_bytes": null}]')"""
    monkeypatch.setattr(vulkan, "library", object)
    monkeypatch.setattr(vulkan, "_ASK", (sys.executable, "-c", said))
    assert vulkan.devices() == (Gpu("Mali-G610", 5045, None),)


def test_nobody_is_asked_without_a_loader(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(vulkan, "library", lambda: None)
    monkeypatch.setattr(vulkan, "_ASK", ("a-program-that-nobody-has",))
    assert vulkan.devices() == ()
