from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

import machines
from edgeq import backends, detect, target
from edgeq.accelerators import Accelerator
from edgeq.errors import MissingTool, UsageFault
from edgeq.machine import Machine, this_machine
from edgeq.target import Figure

MACHINES = [
    (machines.cloud_vm, "x86-avx512-vnni"),
    (machines.desktop, "x86-avx2"),
    (machines.container, "x86-avx2"),
    (machines.raspberry_pi_5, "raspberry-pi-5-8gb"),
    (machines.jetson_orin_nano_super, "jetson-orin-nano-super-8gb"),
    (machines.jetson_agx_thor, "jetson-agx-thor"),
    (machines.rk3588, None),
    (machines.raspberry_pi_4, "raspberry-pi-4-8gb"),
    (machines.raspberry_pi_500_plus, "raspberry-pi-5-16gb"),
    (machines.orange_pi_5, "orange-pi-5"),
    (machines.jetson_nano, "jetson-nano-4gb"),
    (machines.jetson_xavier_nx, "jetson-xavier-nx-8gb"),
    (partial(machines.jetson, model="Orin Nano Developer Kit", cores=6, ram_kb=7802752), "jetson-orin-nano-8gb"),
    (partial(machines.jetson, model="Orin NX Developer Kit", cores=6, ram_kb=7802752), "jetson-orin-nx-8gb"),
    (partial(machines.jetson, model="Orin NX Developer Kit Super", cores=8, ram_kb=16000000), "jetson-orin-nx-16gb"),
    (partial(machines.jetson, model="AGX Orin Developer Kit", cores=8, ram_kb=31400000), "jetson-agx-orin-32gb"),
    (partial(machines.jetson, model="AGX Orin Developer Kit", cores=12, ram_kb=64334848), "jetson-agx-orin-64gb"),
    (machines.snapdragon_x_laptop, "snapdragon-x-elite-laptop"),
    (machines.snapdragon_phone, "snapdragon-8-gen-3-phone"),
    (partial(machines.snapdragon_phone, gpu="Adreno830v2"), "snapdragon-8-elite-phone"),
    (partial(machines.graviton, part=machines.V1, cores=64), "aws-graviton3"),
    (partial(machines.graviton, part=machines.V2, cores=96), "aws-graviton4"),
    (partial(machines.graviton, part=machines.V1, cores=4), None),
    (machines.sapphire_rapids, "x86-amx"),
]
LAPTOPS = [
    ("AMD Ryzen 7 7840U w/ Radeon 780M Graphics", machines.AVX512_VNNI, "amd-780m-laptop"),
    ("AMD Ryzen AI 9 HX 370 w/ Radeon 890M", f"{machines.AVX512_VNNI} avx_vnni", "amd-strix-point-890m"),
    ("Intel(R) Core(TM) Ultra 7 155H", f"{machines.AVX2} avx_vnni", "intel-meteor-lake-arc"),
    ("Intel(R) Core(TM) Ultra 7 258V", f"{machines.AVX2} avx_vnni avx_vnni_int8", "intel-lunar-lake-140v"),
    ("Intel(R) N150", f"{machines.AVX2} avx_vnni", "intel-n150-minipc"),
    ("12th Gen Intel(R) Core(TM) i7-1260P", f"{machines.AVX2} avx_vnni", None),
]


@pytest.fixture
def vm(tmp_path: Path) -> Machine:
    return this_machine(machines.cloud_vm(tmp_path))


@pytest.mark.parametrize(("make", "name"), MACHINES)
def test_each_machine_is_its_target_and_no_other(
    tmp_path: Path, make: Callable[[Path], Path], name: str | None
) -> None:
    machine = this_machine(make(tmp_path))
    found = detect.closest(machine)
    assert (found and found.name) == name
    assert [word for word in target.names() if detect.mismatch(target.load(word), machine) is None] == [name] * (
        name is not None
    )


@pytest.mark.parametrize(("model", "flags", "name"), LAPTOPS)
def test_a_laptop_is_known_by_its_processors_name(tmp_path: Path, model: str, flags: str, name: str | None) -> None:
    found = detect.closest(this_machine(machines.x86_laptop(tmp_path, model, flags)))
    assert (found and found.name) == name


def test_the_size_that_varies_is_the_machines_own(tmp_path: Path) -> None:
    machine = this_machine(machines.orange_pi_5(tmp_path))
    found = detect.resolve("host", machine)
    assert found.memory.total_bytes == Figure(8131000 * 1024, detect.READ_HERE)
    assert not found.memory.varies
    assert detect.mismatch(target.load("orange-pi-5"), machine) is None


def test_a_laptop_with_two_gpus_is_the_one_with_cuda(tmp_path: Path) -> None:
    machine = this_machine(machines.x86_laptop(tmp_path, LAPTOPS[0][0], LAPTOPS[0][1]))
    both = msgspec.structs.replace(machine, accelerators=(LAPTOP_GPU, *machine.accelerators))
    found = detect.closest(both)
    assert found is not None
    assert found.name == "geforce-rtx-4060-laptop-8gb"


def test_a_board_of_the_same_chip_with_other_memory_is_another(tmp_path: Path) -> None:
    machine = msgspec.structs.replace(this_machine(machines.orange_pi_5(tmp_path)), device_tree="Orange Pi 5 Max")
    assert "without 'Max'" in (detect.mismatch(target.load("orange-pi-5"), machine) or "")


def test_what_is_only_asked_for_by_name_is_never_found(tmp_path: Path) -> None:
    machine = this_machine(machines.desktop(tmp_path))
    assert "by name" in (detect.mismatch(target.load("x86-laptop-ddr5"), machine) or "")


def test_a_steam_deck_is_itself_before_it_is_a_computer_with_avx2(tmp_path: Path) -> None:
    machine = this_machine(machines.steam_deck(tmp_path))
    assert [(gpu.api, gpu.arch) for gpu in machine.accelerators] == [("vulkan", "gfx1033")]
    found = detect.closest(machine)
    assert found is not None
    assert found.name == "steam-deck-oled"
    assert detect.mismatch(target.load("x86-avx2"), machine) is None


def test_the_steam_deck_with_the_other_screen_is_another_device(tmp_path: Path) -> None:
    machine = this_machine(machines.steam_deck(tmp_path, product="Jupiter"))
    found = detect.closest(machine)
    assert found is not None
    assert found.name == "steam-deck-lcd"
    assert "'Jupiter'" in (detect.mismatch(target.load("steam-deck-oled"), machine) or "")
    assert "'nothing'" in (
        detect.mismatch(target.load("steam-deck-oled"), msgspec.structs.replace(machine, product=None)) or ""
    )


LAPTOP_GPU = Accelerator(
    name="NVIDIA GeForce RTX 4060 Laptop GPU", api="cuda", arch="sm_89", memory_bytes=8188 << 20, driver="580.65"
)


def test_a_laptop_is_known_by_the_name_and_the_own_memory_of_its_gpu(tmp_path: Path) -> None:
    machine = msgspec.structs.replace(this_machine(machines.desktop(tmp_path)), accelerators=(LAPTOP_GPU,))
    laptop = target.load("rtx-4060-laptop")
    assert detect.closest(machine) == laptop
    assert detect.resolve("host", machine).cpu.cores == Figure(4, detect.READ_HERE)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"name": "NVIDIA GeForce RTX 4090", "memory_bytes": 24564 << 20}, "is NVIDIA GeForce RTX 4090,"),
        ({"memory_bytes": 5 << 30}, "5.0 GiB"),
        ({"api": "vulkan"}, "cuda GPU is missing"),
    ],
)
def test_another_gpu_is_another_laptop(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    gpu = msgspec.structs.replace(LAPTOP_GPU, **change)
    machine = msgspec.structs.replace(this_machine(machines.desktop(tmp_path)), accelerators=(gpu,))
    assert reason in (detect.mismatch(target.load("rtx-4060-laptop"), machine) or "")


def test_memory_of_an_unknown_machine_is_its_gpus_own(tmp_path: Path) -> None:
    gpu = msgspec.structs.replace(LAPTOP_GPU, name="NVIDIA GeForce RTX 4050 Laptop GPU", memory_bytes=6 << 30)
    machine = msgspec.structs.replace(this_machine(machines.desktop(tmp_path)), isa=("avx2",), accelerators=(gpu,))
    assert detect.resolve("host", machine).memory.total_bytes == Figure(6 << 30, detect.READ_HERE)


@pytest.mark.parametrize(
    ("chip", "name"), [("Apple M4", "apple-m4"), ("Apple M4 Pro", "apple-m4-pro"), ("Apple M9", "host")]
)
def test_a_mac_is_known_by_its_chip(vm: Machine, chip: str, name: str) -> None:
    mac = msgspec.structs.replace(
        vm,
        arch="aarch64",
        isa=("neon", "dotprod", "fp16", "i8mm", "bf16"),
        os="macOS 15.5",
        ram_bytes=24 << 30,
        accelerators=(Accelerator(name=chip, api="metal"),),
    )
    assert (detect.mismatch(target.load("apple-m4"), mac) is None) == (name == "apple-m4")
    assert detect.resolve("host", mac).name == name


def test_host_is_the_shipped_target_with_its_gaps_filled_from_the_machine(vm: Machine) -> None:
    found = detect.resolve("HOST", vm)
    assert found.name == "x86-avx512-vnni"
    assert found.memory.total_bytes is not None
    assert (found.memory.total_bytes.value, found.memory.total_bytes.source) == (vm.memory_bytes, detect.READ_HERE)
    assert found.cpu.cores is not None
    assert found.cpu.cores.value == 2


def test_an_unknown_board_is_a_target_named_host(tmp_path: Path) -> None:
    machine = this_machine(machines.rk3588(tmp_path))
    found = detect.resolve("host", machine)
    assert (found.name, found.api, found.host) == ("host", "cpu", "aarch64-linux-gnu")
    assert found.backends == ("onnx", "llamacpp", "mlc")
    assert found.cpu.isa == machine.isa
    assert detect.mismatch(found, machine) is None


def test_an_unknown_machine_with_a_gpu_is_a_cuda_target(vm: Machine) -> None:
    gpu = Accelerator(name="NVIDIA GeForce RTX 4060", api="cuda", arch="sm_89")
    machine = msgspec.structs.replace(vm, isa=("avx2",), accelerators=(gpu,))
    found = detect.resolve("host", machine)
    assert found.api == "cuda"
    assert found.gpu is not None
    assert found.gpu.arch == "sm_89"
    assert found.mlc.limits() == target.load("rtx-4060-laptop").mlc.limits()


@pytest.mark.parametrize(("memory_bytes", "api"), [(16 << 30, "vulkan"), (None, "cpu")])
def test_an_unknown_machine_uses_vulkan_where_the_gpu_has_memory_of_its_own(
    tmp_path: Path, memory_bytes: int | None, api: str
) -> None:
    gpu = Accelerator(name="AMD Radeon RX 7800 XT (RADV NAVI32)", api="vulkan", memory_bytes=memory_bytes)
    machine = this_machine(machines.x86_laptop(tmp_path, "AMD Ryzen 5 9600X", machines.AVX2 + " avx_vnni"))
    found = detect.resolve("host", msgspec.structs.replace(machine, accelerators=(gpu,)))
    assert (found.name, found.api) == ("host", api)
    assert found.onnx.provider == ("webgpu" if api == "vulkan" else "cpu")
    assert found.memory.total_bytes == Figure(memory_bytes or 31900000 * 1024, detect.READ_HERE)


def test_another_architecture_is_refused(vm: Machine) -> None:
    with pytest.raises(UsageFault, match="riscv64"):
        detect.resolve("host", msgspec.structs.replace(vm, arch="riscv64"))


def test_other_names_are_looked_up() -> None:
    assert detect.resolve("pi5").name == "raspberry-pi-5-8gb"


def test_host_always_matches(tmp_path: Path, vm: Machine) -> None:
    assert detect.mismatch(detect.resolve("host", this_machine(machines.rk3588(tmp_path / "other"))), vm) is None


def test_faster_instructions_make_another_device(vm: Machine) -> None:
    assert "avx512f" in (detect.mismatch(target.load("x86-avx2"), vm) or "")
    assert "amx_int8" in (
        detect.mismatch(target.load("x86-avx512-vnni"), msgspec.structs.replace(vm, isa=(*vm.isa, "amx_int8"))) or ""
    )


def test_a_board_with_other_memory_is_another_device(tmp_path: Path) -> None:
    small = this_machine(machines.raspberry_pi_5(tmp_path, ram_kb=4127736))
    assert "3.9 GiB" in (detect.mismatch(target.load("pi5"), small) or "")


def test_a_limited_container_on_the_board_is_still_the_board(tmp_path: Path) -> None:
    root = machines.raspberry_pi_5(tmp_path)
    machines.write(root, {"sys/fs/cgroup/memory.max": f"{2 << 30}\n"})
    machine = this_machine(root)
    assert machine.memory_bytes == 2 << 30
    assert detect.mismatch(target.load("pi5"), machine) is None


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"arch": "x86_64"}, "x86_64"),
        ({"os": "macOS 15.1"}, "macOS"),
        ({"device_tree": None}, "containers may hide it"),
        ({"device_tree": "NVIDIA Jetson Orin Nano Developer Kit"}, "Super"),
        ({"isa": ("neon", "fp16")}, "no dotprod"),
        ({"accelerators": ()}, "missing"),
    ],
)
def test_each_difference_is_named(tmp_path: Path, change: dict[str, object], reason: str) -> None:
    machine = this_machine(machines.jetson_orin_nano_super(tmp_path))
    changed = msgspec.structs.replace(machine, **change)
    assert reason in (detect.mismatch(target.load("jetson"), changed) or "")


def test_backends_say_what_they_use_or_what_they_miss(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> tuple[str, ...]:
        raise MissingTool("llama-cpp-python is not installed", run="pip install llama-cpp-python")

    modules = {"onnx": lambda _: ("onnxruntime 1.32.0",), "llamacpp": missing}
    monkeypatch.setattr(backends, "NAMES", tuple(modules))
    engines = {"onnx": ("onnxruntime",), "llamacpp": ("a-package-that-nobody-has",)}
    monkeypatch.setattr(backends, "get", lambda name: SimpleNamespace(tools=modules[name], ENGINE=engines[name]))
    states = {state.name: state for state in detect.usable_backends(target.load("jetson"))}
    why = "llama-cpp-python is not installed; Next: pip install llama-cpp-python"
    assert states["llamacpp"] == detect.BackendState("llamacpp", False, False, why)
    assert states["mlc"] == detect.BackendState("mlc", False, False, "not part of this edgeq")
    assert states["onnx"] == detect.BackendState("onnx", True, True, "onnxruntime 1.32.0")


def test_a_device_without_the_build_tools_still_runs_bundles(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(_: object) -> tuple[str, ...]:
        raise MissingTool("the onnx backend needs torch", run="pip install 'edgeq[build]'")

    monkeypatch.setattr("edgeq.backends.onnx.tools", missing)
    state = detect.usable_backends(target.load("x86-avx2"))[0]
    assert (state.name, state.usable, state.builds) == ("onnx", True, False)
    assert "edgeq[build]" in state.reason
