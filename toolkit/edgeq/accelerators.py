"""A machine's GPUs: as its drivers list them, else as the names of its board, chip and processor tell."""

from __future__ import annotations

import re
from collections.abc import Sequence

import msgspec

from edgeq import nvml, vulkan

_JETSON_ARCH = {"Thor": "sm_110", "Orin": "sm_87", "Xavier": "sm_72", "Nano": "sm_53"}
_INTEGRATED = {
    "Jupiter": "gfx1033",  # products of Valve: Steam Deck LCD and OLED
    "Galileo": "gfx1033",
    "VANGOGH": "gfx1033",  # as Mesa's RADV calls their GPU
    "Radeon 780M": "gfx1103",
    "Radeon 890M": "gfx1150",
    "Radeon 8060S": "gfx1151",
    "(MTL)": "Xe-LPG",  # as Mesa's ANV calls Intel's generations
    "(LNL)": "Xe2",
    "Ultra 7 155H": "Xe-LPG",
    "Ultra 7 165H": "Xe-LPG",
    "Ultra 9 185H": "Xe-LPG",
    "Ultra 7 258V": "Xe2",
    "rockchip,rk3588": "Mali-G610",
    "rockchip,rk3588s": "Mali-G610",
    "Mali-G610": "Mali-G610",
    "qcom,x1e80100": "Adreno X1-85",
}
"""Architecture of a GPU by a word that names it, its computer, or the chip that it is part of."""
_ADRENO = re.compile(r"Adreno(?: ?\(TM\))? ?(X?[\d-]*\d)")
_NVIDIA = 0x10DE


class Accelerator(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """A GPU: the interface it is programmed through, its architecture, and its own memory (None: it shares the RAM)."""

    name: str
    api: str
    arch: str | None = None
    memory_bytes: int | None = None
    driver: str | None = None

    def __str__(self) -> str:
        size = f"{self.memory_bytes / 2**30:.1f} GiB of its own" if self.memory_bytes else None
        driver = f"driver {self.driver}" if self.driver else None
        return f"{self.name} ({', '.join(filter(None, (self.api, self.arch, size, driver)))})"


def of_machine(device_tree: str | None, names: Sequence[str], *, running: bool) -> tuple[Accelerator, ...]:
    """GPUs of a machine by its device tree's model and its other names; a `running` one's drivers are asked too.

    A GPU that Vulkan lists without a name that tells its architecture is the integrated one that the machine's names
    tell of, unless it has memory of its own.
    """
    if jetson := _jetson(device_tree):
        return jetson
    cuda = _nvidia() if running else ()
    named = next((_integrated(name) for name in names if arch_of(name)), None)
    listed = [gpu for gpu in (vulkan.devices() if running else ()) if not (cuda and gpu.vendor == _NVIDIA)]
    if not listed:
        return (*cuda, named) if named else cuda
    return (*cuda, *(_listed(gpu, named) for gpu in listed))


def arch_of(name: str) -> str | None:
    """Architecture of a GPU by what its driver, its chip or its computer is called; None when the name says nothing."""
    if adreno := _ADRENO.search(name):
        return f"Adreno {adreno[1]}"
    words = (word for word in _INTEGRATED if name == word or ("," not in word and word in name))
    return next((_INTEGRATED[word] for word in words), None)


def _jetson(device_tree: str | None) -> tuple[Accelerator, ...]:
    if device_tree is None or "Jetson" not in device_tree:
        return ()
    arch = next((arch for word, arch in _JETSON_ARCH.items() if word in device_tree), None)
    return (Accelerator(name=f"integrated GPU of {device_tree}", api="cuda", arch=arch),)


def _nvidia() -> tuple[Accelerator, ...]:
    library = nvml.library()
    found = nvml.gpus(library) if library else ()
    return tuple(Accelerator(api="cuda", **gpu._asdict()) for gpu in found)


def _integrated(name: str) -> Accelerator:
    return Accelerator(name=f"integrated GPU of {name}", api="vulkan", arch=arch_of(name))


def _listed(gpu: vulkan.Gpu, named: Accelerator | None) -> Accelerator:
    arch = arch_of(gpu.name) or (named.arch if named and gpu.memory_bytes is None else None)
    return Accelerator(name=gpu.name, api="vulkan", arch=arch, memory_bytes=gpu.memory_bytes)
