"""Which target a machine is, and which backends it can use."""

from __future__ import annotations

import importlib.metadata
from typing import Literal, cast

import msgspec

from edgeq import target as targets
from edgeq.accelerators import Accelerator
from edgeq.errors import MissingTool, UsageFault
from edgeq.machine import Machine, this_machine
from edgeq.target import HOST, Cpu, Figure, Gpu, Match, Memory, Mlc, Onnx, Target

READ_HERE = "read from the machine itself"
_SMALLEST_RAM_SHARE = 0.8  # firmware and graphics take the rest before the system counts it
_RECIPES = ("w4g32-e8-rtn", "w8g32-e8-rtn", "w4g32-e4-rtn", "w16")
_BACKENDS: dict[str, tuple[str, ...]] = {
    "cpu": ("onnx", "llamacpp", "mlc"),
    "cuda": ("llamacpp", "mlc", "onnx"),
    "metal": ("llamacpp", "mlc", "onnx"),
    "vulkan": ("llamacpp", "onnx", "mlc"),
}
_MLC = {
    "cuda": Mlc(max_threads_per_block=1024, max_shared_memory_per_block=49152, thread_warp_size=32),
    "metal": Mlc(max_threads_per_block=1024, max_shared_memory_per_block=32768, thread_warp_size=32),
    "vulkan": Mlc(kind="opencl", max_threads_per_block=256, max_shared_memory_per_block=32768, thread_warp_size=1),
}
"""What every GPU of an API has: CUDA C++ programming guide, compute capabilities; Metal feature set tables; OpenCL 3.0
specification, device queries of the full profile, and TVM 0.26's own assumption of 256 threads and no warps."""


class BackendState(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Whether a backend runs and builds bundles here; `reason` names its tools, or what is missing and its remedy."""

    name: str
    usable: bool
    builds: bool
    reason: str


def closest(machine: Machine) -> Target | None:
    """Shipped target that the machine is (of several the one that asks for most), or None."""
    fitting = [found for found in map(targets.load, targets.names()) if mismatch(found, machine) is None]
    return max(fitting, key=_asks_for, default=None)


def resolve(name: str, machine: Machine | None = None) -> Target:
    """Target by name, alias or file; `host` is what this machine is.

    Where a machine is no shipped target, `host` is a target of that name, made of what was read. Cores and memory that
    a shipped target leaves open, or that vary, are filled in from the machine. Raises UsageFault when there is no such
    target.
    """
    if name.lower() != HOST:
        return targets.load(name)
    machine = machine or this_machine()
    return _completed(closest(machine) or _host(machine), machine)


def mismatch(target: Target, machine: Machine) -> str | None:
    """Why the machine is not that target, as one sentence; None when it is."""
    if target.name == HOST:
        return None
    if target.match.by_name_only:
        return f"{target.name} is only asked for by name: no machine says of itself that it is one."
    if machine.arch != target.cpu.arch:
        return f"The processor is {machine.arch}, {target.name} is {target.cpu.arch}."
    if ("linux" in target.host) == machine.os.startswith("macOS"):
        return f"The system is {machine.os}, {target.name} runs {target.host}."
    if reason := _other_names(target, machine):
        return reason
    if lost := [name for name in target.match.isa if name not in machine.isa]:
        return f"The processor has no {', '.join(lost)}, which {target.name} has."
    if more := [name for name in target.match.without if name in machine.isa]:
        return f"The processor has {', '.join(more)}: it runs faster kernels than {target.name}."
    return _other_gpu(target, machine) or _other_memory(target, machine)


def usable_backends(target: Target) -> tuple[BackendState, ...]:
    """State of each backend of the target, best first; asks the backends for their tools, builds nothing."""
    from edgeq import backends

    def state(name: str) -> BackendState:
        if name not in backends.NAMES:
            return BackendState(name, False, False, "not part of this edgeq")
        backend = backends.get(name)
        try:
            return BackendState(name, True, True, ", ".join(backend.tools(target)))
        except MissingTool as missing:
            runs = all(map(_installed, backend.ENGINE))
            return BackendState(name, runs, False, "; ".join(str(missing).splitlines()))

    return tuple(state(name) for name in target.backends)


def _installed(package: str) -> bool:
    try:
        return bool(importlib.metadata.version(package))
    except importlib.metadata.PackageNotFoundError:
        return False


def _asks_for(target: Target) -> tuple[bool, int, bool, int]:
    """A GPU with CUDA comes before the one that its laptop's processor has too."""
    match = target.match
    names = len(match.device_tree) + len(match.compatible) + bool(match.product) + bool(match.cpu) + bool(match.cores)
    return target.api == "cuda", names, target.gpu is not None, len(match.isa)


def _other_names(target: Target, machine: Machine) -> str | None:
    """What the machine calls itself, its board, its chip or its processor, where the target asks for another name."""
    match, tree = target.match, machine.device_tree or ""
    if lost := [part for part in match.device_tree if part not in tree]:
        return _says(target, tree or "no device tree (containers may hide it)", lost[0])
    if more := [part for part in match.device_tree_without if part in tree]:
        return f"The machine says {tree!r}, {target.name} is without {more[0]!r}."
    if lost := [name for name in match.compatible if name not in machine.compatible]:
        return _says(target, " ".join(machine.compatible) or "no device tree (containers may hide it)", lost[0])
    if match.product not in (None, machine.product):
        return _says(target, machine.product or "nothing", match.product)
    if match.cpu and not any(part in machine.cpu_model for part in match.cpu):
        return f"The processor is {machine.cpu_model}, {target.name} has {' or '.join(match.cpu)}."
    if match.cores not in (None, machine.cores):
        return f"The machine has {machine.cores or 'unknown'} cores, {target.name} has {match.cores}."
    return None


def _says(target: Target, seen: str, wanted: str | None) -> str:
    return f"The machine says {seen!r}, {target.name} says {wanted!r}."


def _gpus(target: Target, machine: Machine) -> list[Accelerator]:
    """GPUs of the machine that have the target's API, and its name where the target insists on one."""
    return [gpu for gpu in machine.accelerators if gpu.api == target.api and target.match.gpu in (None, gpu.name)]


def _own_memory(target: Target, machine: Machine) -> int | None:
    """Bytes of the target's GPU; None where it shares the RAM."""
    return max((gpu.memory_bytes for gpu in _gpus(target, machine) if gpu.memory_bytes), default=None)


def _other_memory(target: Target, machine: Machine) -> str | None:
    total = target.memory.total_bytes
    size = _own_memory(target, machine) or machine.ram_bytes
    if total is None or target.memory.varies or size is None:
        return None
    if _SMALLEST_RAM_SHARE * total.value <= size <= total.value:
        return None
    return f"The machine has {_gib(size)} of memory, {target.name} has {_gib(total.value)}."


def _other_gpu(target: Target, machine: Machine) -> str | None:
    if target.gpu is None or target.gpu.arch in [gpu.arch or gpu.name for gpu in _gpus(target, machine)]:
        return None
    wanted = target.match.gpu or target.gpu.arch
    gpus = [gpu for gpu in machine.accelerators if gpu.api == target.api]
    found = [gpu.name if target.match.gpu else gpu.arch or gpu.name for gpu in gpus]
    return f"The machine's {target.api} GPU is {', '.join(found) or 'missing'}, {target.name} has {wanted}."


def _gib(size: float) -> str:
    return f"{size / 2**30:.1f} GiB"


def _host(machine: Machine) -> Target:
    """Target of an unknown machine: its GPU by CUDA or Metal, or by Vulkan where the GPU has memory of its own."""
    if machine.arch not in ("x86_64", "aarch64"):
        raise UsageFault(
            f"this machine's processor ({machine.arch}) is not supported",
            why="edgeq builds for x86_64 and aarch64.",
            run="edgeq targets list",
        )
    gpu = next((gpu for gpu in machine.accelerators if gpu.api != "vulkan" or gpu.memory_bytes), None)
    api = gpu.api if gpu else "cpu"
    return Target(
        name=HOST,
        title=machine.cpu_model,
        api=cast(targets.Api, api),
        host=f"{machine.arch}-apple-darwin" if machine.os.startswith("macOS") else f"{machine.arch}-linux-gnu",
        cpu=Cpu(arch=cast(Literal["x86_64", "aarch64"], machine.arch), model=machine.cpu_model, isa=machine.isa),
        memory=Memory(),
        gpu=Gpu(model=gpu.name, arch=gpu.arch or "unknown") if gpu else None,
        match=Match(isa=machine.isa),
        backends=_BACKENDS[api],
        recipes=_RECIPES,
        onnx=Onnx(provider="webgpu" if api == "vulkan" else "cpu"),
        mlc=_MLC.get(api, Mlc()),
        sources=(READ_HERE,),
    )


def _completed(target: Target, machine: Machine) -> Target:
    memory, cpu = target.memory, target.cpu
    size = _own_memory(target, machine) or machine.memory_bytes
    if size and (memory.total_bytes is None or memory.varies):
        memory = msgspec.structs.replace(memory, total_bytes=Figure(size, READ_HERE), varies=False)
    if cpu.cores is None and machine.cores:
        cpu = msgspec.structs.replace(cpu, cores=Figure(machine.cores, READ_HERE))
    return msgspec.structs.replace(target, memory=memory, cpu=cpu)
