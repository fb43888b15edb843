from __future__ import annotations

import ctypes
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import machines
from edgeq import detect, machine, nvml, vulkan
from edgeq.accelerators import Accelerator
from edgeq.machine import Machine, physical_cores, this_machine

GIB = 1 << 30


def test_a_cloud_machine_is_read_whole(tmp_path: Path) -> None:
    found = this_machine(machines.cloud_vm(tmp_path))
    assert (found.cpu_model, found.arch) == ("AMD EPYC", "x86_64")
    assert {"avx2", "fma", "f16c", "avx512_vnni"} <= set(found.isa)
    assert (found.cores, found.threads) == (2, 2)
    assert found.memory_bytes == found.ram_bytes == 24684084 * 1024
    assert (found.os, found.kernel) == ("Debian GNU/Linux 12 (bookworm)", "6.18.44")
    assert found.device_tree is None
    assert found.governor is None
    assert found.accelerators == ()


def test_hardware_threads_are_not_counted_as_cores(tmp_path: Path) -> None:
    found = this_machine(machines.desktop(tmp_path))
    assert (found.cores, found.threads) == (4, 8)
    assert found.governor == "schedutil"
    assert found.swap_bytes == 8388604 * 1024
    assert "avx512_vnni" not in found.isa


def test_arm_instruction_sets_get_their_usual_names(tmp_path: Path) -> None:
    found = this_machine(machines.raspberry_pi_5(tmp_path))
    assert (found.cpu_model, found.arch) == ("Cortex-A76", "aarch64")
    assert found.isa == ("neon", "dotprod", "fp16")
    assert found.device_tree == "Raspberry Pi 5 Model B Rev 1.0"


def test_a_jetson_has_a_gpu_that_shares_its_memory(tmp_path: Path) -> None:
    (gpu,) = this_machine(machines.jetson_orin_nano_super(tmp_path)).accelerators
    assert (gpu.api, gpu.arch, gpu.memory_bytes) == ("cuda", "sm_87", None)


def test_clusters_are_named_big_ones_first(tmp_path: Path) -> None:
    assert this_machine(machines.rk3588(tmp_path)).cpu_model == "4x Cortex-A76 + 4x Cortex-A55"
    assert this_machine(machines.snapdragon_x_laptop(tmp_path / "laptop")).cpu_model == "Oryon"
    assert this_machine(machines.jetson_xavier_nx(tmp_path / "board")).cpu_model == "Carmel"


def test_the_tightest_limit_of_nested_groups_counts(tmp_path: Path) -> None:
    found = this_machine(machines.container(tmp_path))
    assert found.memory_bytes == 4 * GIB
    assert found.ram_bytes == 16307592 * 1024


def test_a_version_1_memory_limit_counts_where_only_its_mount_is_seen(tmp_path: Path) -> None:
    root = machines.cloud_vm(tmp_path)
    machines.write(root, machines.process("0-1", "4:memory:/docker/0123\n"))
    machines.write(root, {"sys/fs/cgroup/memory/memory.limit_in_bytes": f"{3 * GIB}\n"})
    assert this_machine(root).memory_bytes == 3 * GIB


@pytest.mark.parametrize(
    ("make", "cores"),
    [
        (machines.cloud_vm, 2),
        (machines.desktop, 4),
        (machines.container, 2),
        (machines.raspberry_pi_5, 4),
        (machines.jetson_orin_nano_super, 6),
        (machines.rk3588, 4),
    ],
)
def test_threads_of_arithmetic_follow_cores_quota_and_the_biggest_cluster(
    tmp_path: Path, make: Callable[[Path], Path], cores: int
) -> None:
    assert physical_cores(make(tmp_path)) == cores


def test_affinity_is_respected(tmp_path: Path) -> None:
    root = machines.desktop(tmp_path)
    machines.write(root, machines.process("1-2,5"))
    assert physical_cores(root) == 2


@pytest.mark.parametrize(
    ("capacities", "cores"),
    [
        ((250,) * 4 + (870,) * 3 + (1024,), 4),  # one prime, three big, four small: the prime core is not left alone
        ((160,) * 4 + (1024,) * 4, 4),
        ((800,) * 6 + (1024,) * 2, 8),  # no small ones
        ((530,) * 4 + (1024, 1024, 1004, 1004), 4),
        ((1024,) * 4, 4),
    ],
)
def test_small_cores_are_left_out_where_they_would_slow_the_big_ones(
    tmp_path: Path, capacities: tuple[int, ...], cores: int
) -> None:
    files = machines.cpus(tuple(map(str, range(len(capacities)))), cpu_capacity=capacities)
    assert physical_cores(machines.write(tmp_path, files)) == cores


def test_a_process_bound_to_the_small_cluster_uses_it(tmp_path: Path) -> None:
    root = machines.rk3588(tmp_path)
    machines.write(root, machines.process("0-3"))
    assert physical_cores(root) == 4


def test_a_version_1_quota_below_one_processor_leaves_one(tmp_path: Path) -> None:
    root = machines.cloud_vm(tmp_path)
    machines.write(root, {"sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "50000\n"})
    assert physical_cores(root) == 1


def test_the_frequency_tells_clusters_where_capacities_are_not_given(tmp_path: Path) -> None:
    files = machines.cpus(("0", "1", "2"), cpufreq__cpuinfo_max_freq=(5000000, 4900000, 3700000))
    assert physical_cores(machines.write(tmp_path, files)) == 2


def test_nothing_readable_gives_none_and_one_core(tmp_path: Path) -> None:
    found = this_machine(tmp_path)
    assert (found.cores, found.threads, found.memory_bytes, found.governor) == (None, None, None, None)
    assert (found.cpu_model, found.arch, found.isa, found.os) == ("unknown", "unknown", (), "Linux")
    assert physical_cores(tmp_path) == 1


def test_garbage_gives_none_and_never_an_exception(tmp_path: Path) -> None:
    root = machines.cloud_vm(tmp_path)
    for path in sorted(path for path in root.rglob("*") if path.is_file()):
        path.write_bytes(b"\xff\x00 : 0-99999999999,x\n: kB -3\n")
        this_machine(root)
        assert physical_cores(root) >= 1
    assert this_machine(root).memory_bytes is None


def test_the_running_machine_is_readable() -> None:
    found = this_machine()
    assert found.threads is None or found.threads >= (found.cores or 0)
    assert physical_cores() >= 1
    assert isinstance(found, Machine)


class FakeNvml:
    """The six calls of the driver's library, for one GPU."""

    def __init__(self, starts: bool) -> None:
        self.starts = starts

    def nvmlInit_v2(self) -> int:  # noqa: N802
        return 0 if self.starts else 9

    def nvmlShutdown(self) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetCount_v2(self, count: Any) -> int:  # noqa: N802
        count._obj.value = 1
        return 0

    def nvmlSystemGetDriverVersion(self, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = b"580.178"
        return 0

    def nvmlDeviceGetHandleByIndex_v2(self, index: ctypes.c_uint, handle: Any) -> int:  # noqa: N802
        return 0

    def nvmlDeviceGetName(self, handle: Any, buffer: Any, length: Any) -> int:  # noqa: N802
        buffer.value = b"NVIDIA H100"
        return 0

    def nvmlDeviceGetCudaComputeCapability(self, handle: Any, major: Any, minor: Any) -> int:  # noqa: N802
        major._obj.value, minor._obj.value = 9, 0
        return 0

    def nvmlDeviceGetMemoryInfo(self, handle: Any, memory: Any) -> int:  # noqa: N802
        memory._obj.total = 80 * GIB
        return 0


def test_nvidia_gpus_are_described_by_the_driver() -> None:
    (gpu,) = nvml.gpus(FakeNvml(starts=True))
    assert tuple(gpu) == ("NVIDIA H100", "sm_90", 80 * GIB, "580.178")
    assert Accelerator(api="cuda", **gpu._asdict()).arch == "sm_90"


MACS = [("Apple M4", 10, 16, "apple-m4"), ("Apple M3 Max", 16, 64, "apple-m3-max"), ("Apple M3 Max", 14, 36, "host")]


@pytest.mark.parametrize(("chip", "cores", "gib", "name"), MACS)
def test_a_mac_is_read_from_sysctl(monkeypatch: pytest.MonkeyPatch, chip: str, cores: int, gib: int, name: str) -> None:
    said = {"machdep.cpu.brand_string": chip, "hw.memsize": f"{gib * GIB}", "hw.physicalcpu": f"{cores}"}
    said |= {f"hw.optional.arm.{flag}": "1" for flag in ("AdvSIMD", "FEAT_DotProd", "FEAT_FP16")}
    said |= {f"hw.optional.arm.{flag}": "1" for flag in ("FEAT_I8MM", "FEAT_BF16")}
    monkeypatch.setattr("sys.platform", "darwin")
    monkeypatch.setattr("platform.machine", lambda: "arm64")
    monkeypatch.setattr("platform.mac_ver", lambda: ("15.5", ("", "", ""), "arm64"))
    monkeypatch.setattr(machine, "_sysctl", said.get)
    found = this_machine()
    assert (found.cpu_model, found.cores, found.ram_bytes) == (chip, cores, gib * GIB)
    assert detect.resolve("host", found).name == name


def test_a_laptop_is_known_by_nvml(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    gpu = nvml.Gpu("NVIDIA GeForce RTX 4060 Laptop GPU", "sm_89", 8188 << 20, "580.65")
    monkeypatch.setattr(machine, "ROOT", tmp_path)
    monkeypatch.setattr(nvml, "library", object)
    monkeypatch.setattr(nvml, "gpus", lambda _: (gpu,))
    monkeypatch.setattr(vulkan, "devices", tuple)
    found = detect.closest(this_machine(machines.desktop(tmp_path)))
    assert found is not None
    assert found.name == "geforce-rtx-4060-laptop-8gb"


def test_a_driver_that_does_not_start_has_no_gpus() -> None:
    assert nvml.gpus(FakeNvml(starts=False)) == ()
