from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from edgeq.backends.llamacpp import devices
from edgeq.backends.llamacpp.devices import Device
from edgeq.profiles import Placement

CPU = Device("CPU", "cpu", "a processor", 1)
ORIN = Device("CUDA0", "cuda", "Orin", 2)
LLVMPIPE = Device("Vulkan0", "vulkan", "llvmpipe (LLVM 15.0.6, 256 bits)", 3)

LOG = [
    "load_tensors: layer   0 assigned to device Vulkan0, is_swa = 0\n",
    "load_tensors: layer   1 assigned to device Vulkan0, is_swa = 0\n",
    "load_tensors: layer   2 assigned to device CPU, is_swa = 0\n",
    "load_tensors: offloaded 2/3 layers to GPU\n",
    "load_tensors:   CPU_Mapped model buffer size =     2.50 MiB\n",
    "load_tensors:      Vulkan0 model buffer size =     8.00 MiB\n",
    "llama_context: Vulkan_Host  output buffer size =     0.25 MiB\n",
    "llama_kv_cache:    Vulkan0 KV buffer size =     1.00 MiB\n",
    "llama_memory_recurrent:    Vulkan0 RS buffer size =     0.50 MiB\n",
    "sched_reserve:    Vulkan0 compute buffer size =",
    "     4.00 MiB\n",
]


def test_layers_and_buffers_are_read_from_the_log() -> None:
    assert devices.placement(LOG, (LLVMPIPE, CPU)) == (
        Placement(provider="vulkan", device=LLVMPIPE.description, layers=2, bytes=27 << 19, software=True),
        Placement(provider="cpu", device="a processor", layers=1, bytes=11 << 18, software=False),
    )


def test_a_device_that_holds_nothing_is_left_out() -> None:
    log = ["load_tensors: layer   0 assigned to device CPU, is_swa = 0\n"]
    assert [place.provider for place in devices.placement(log, (ORIN, CPU))] == ["cpu"]


def test_two_devices_of_one_api_are_told_apart() -> None:
    second = Device("CUDA1", "cuda", "another", 4)
    log = [
        "load_tensors: layer 0 assigned to device CUDA0, is_swa = 0\n",
        "load_tensors: layer 1 assigned to device CUDA1, is_swa = 0\n",
        "load_tensors: CUDA1 model buffer size = 1.00 MiB\n",
    ]
    found = devices.placement(log, (ORIN, second, CPU))
    assert [(place.device, place.layers, place.bytes) for place in found] == [("Orin", 1, 0), ("another", 1, 1 << 20)]


@pytest.mark.parametrize("name", ["llvmpipe (LLVM 15.0.6, 256 bits)", "SwiftShader Device (Subzero)"])
def test_gpus_that_the_processor_imitates_are_known_by_their_names(name: str) -> None:
    assert Device("Vulkan0", "vulkan", name, 1).software
    assert not Device("Vulkan0", "vulkan", "AMD Custom GPU 0932 (RADV VANGOGH)", 1).software
    assert not CPU.software


def test_this_machines_processor_is_among_the_devices() -> None:
    assert "cpu" in devices.backends()
    assert [device.name for device in devices.found() if device.api == "cpu"] == ["CPU"]


def test_devices_come_from_the_registry_that_libllama_uses() -> None:
    """The wheel may hold libggml twice; a handle of the other copy's registry is none that libllama knows."""
    import llama_cpp

    folder = Path(llama_cpp.__file__).parent / "lib"
    if not (folder / "libggml.so.0").exists():
        pytest.skip("this llama-cpp-python has no libggml.so.0 (it is not Linux, or linked in one piece)")
    get = ctypes.CDLL(str(folder / "libggml.so.0")).ggml_backend_dev_get
    get.restype = ctypes.c_void_p
    assert [device.handle for device in devices.found()] == [get(ctypes.c_size_t(0))]
