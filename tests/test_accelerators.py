from __future__ import annotations

import pytest

from edgeq import accelerators, nvml, vulkan
from edgeq.accelerators import Accelerator
from edgeq.vulkan import Gpu

LAPTOP = Gpu("NVIDIA GeForce RTX 4060 Laptop GPU", 0x10DE, 8 << 30)
RYZEN = "AMD Ryzen 7 7840U w/ Radeon 780M Graphics"


@pytest.fixture
def drivers(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A machine whose drivers list nothing, until told otherwise."""
    monkeypatch.setattr(nvml, "library", lambda: None)
    monkeypatch.setattr(vulkan, "devices", tuple)
    return monkeypatch


@pytest.mark.parametrize(
    ("name", "arch"),
    [
        ("AMD Radeon 780M Graphics (RADV PHOENIX)", "gfx1103"),
        ("AMD Custom GPU 0932 (RADV VANGOGH)", "gfx1033"),
        ("AMD RYZEN AI MAX+ 395 w/ Radeon 8060S", "gfx1151"),
        ("Intel(R) Arc(tm) Graphics (MTL)", "Xe-LPG"),
        ("Mali-G610 (Panfrost)", "Mali-G610"),
        ("Turnip Adreno (TM) 750", "Adreno 750"),
        ("Adreno830v2", "Adreno 830"),
        ("Adreno X1-85", "Adreno X1-85"),
        ("rockchip,rk3588s", "Mali-G610"),
        ("a rockchip,rk3588 board", None),
        ("NVIDIA GeForce RTX 4060 Laptop GPU", None),
    ],
)
def test_names_tell_architectures(name: str, arch: str | None) -> None:
    assert accelerators.arch_of(name) == arch


def test_drivers_are_only_asked_on_the_running_machine(drivers: pytest.MonkeyPatch) -> None:
    drivers.setattr(vulkan, "devices", lambda: pytest.fail("asked"))
    assert accelerators.of_machine(None, ["Galileo"], running=False)[0].arch == "gfx1033"


def test_a_gpu_is_listed_once(drivers: pytest.MonkeyPatch) -> None:
    cuda = nvml.Gpu(LAPTOP.name, "sm_89", 8188 << 20, "580.65")
    drivers.setattr(nvml, "library", object)
    drivers.setattr(nvml, "gpus", lambda _: (cuda,))
    drivers.setattr(vulkan, "devices", lambda: (LAPTOP, Gpu("AMD Radeon Graphics (RADV REMBRANDT)", 0x1002, None)))
    found = accelerators.of_machine(None, [RYZEN], running=True)
    assert [(gpu.api, gpu.arch) for gpu in found] == [("cuda", "sm_89"), ("vulkan", "gfx1103")]
    drivers.setattr(vulkan, "devices", lambda: (LAPTOP,))
    assert [gpu.api for gpu in accelerators.of_machine(None, [], running=True)] == ["cuda"]
    drivers.setattr(nvml, "library", lambda: None)
    assert [gpu.memory_bytes for gpu in accelerators.of_machine(None, [RYZEN], running=True)] == [8 << 30]


def test_without_drivers_the_names_tell(drivers: pytest.MonkeyPatch) -> None:
    (gpu,) = accelerators.of_machine(None, ["12.3", RYZEN], running=True)
    assert str(gpu) == f"integrated GPU of {RYZEN} (vulkan, gfx1103)"
    assert accelerators.of_machine(None, [], running=True) == ()


def test_a_gpu_says_all_that_is_known_of_it() -> None:
    gpu = Accelerator(name="H200", api="cuda", arch="sm_90", memory_bytes=139 << 30, driver="580.1")
    assert str(gpu) == "H200 (cuda, sm_90, 139.0 GiB of its own, driver 580.1)"
