"""What this machine is, read from /proc and /sys below a root; what cannot be read is None, never an error."""

from __future__ import annotations

import platform
import re
import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec

from edgeq import accelerators
from edgeq.accelerators import Accelerator

ROOT = Path("/")
SAME_CLUSTER = 0.9  # cores of one kind differ by a few per cent: favoured cores, binning
_WORTH_MORE = 1.2  # RK3588: eight cores are worth 1.06 times its four big ones, and were half as fast (llama.cpp 7176)
_MOST_CPUS = 8192
_X86_ISA = (
    *("sse4_2", "avx", "avx2", "fma", "f16c", "avx_vnni", "avx_vnni_int8"),
    *("avx512f", "avx512bw", "avx512dq", "avx512vl", "avx512_vnni", "avx512_bf16", "avx512_fp16"),
    *("amx_tile", "amx_int8", "amx_bf16"),
)
_ARM_ISA = {
    **{"asimd": "neon", "asimddp": "dotprod", "asimdhp": "fp16"},
    **{name: name for name in ("i8mm", "bf16", "sve", "sve2", "sme")},
}
_ISA = {name: name for name in _X86_ISA} | _ARM_ISA
_CORES = {
    "0x41": {
        0xD03: "Cortex-A53",
        0xD05: "Cortex-A55",
        0xD07: "Cortex-A57",
        0xD08: "Cortex-A72",
        0xD0B: "Cortex-A76",
        0xD0C: "Neoverse-N1",
        0xD40: "Neoverse-V1",
        0xD41: "Cortex-A78",
        0xD42: "Cortex-A78AE",
        0xD49: "Neoverse-N2",
        0xD4F: "Neoverse-V2",
        0xD80: "Cortex-A520",
        0xD81: "Cortex-A720",
        0xD82: "Cortex-X4",
        0xD83: "Neoverse-V3AE",
    },
    "0x4e": {0x004: "Carmel"},
    "0x51": {0x001: "Oryon"},
}
"""Arm's, NVIDIA's and Qualcomm's cores by implementer and part number, as in the kernel's cputype.h."""
_MAC_ISA = {"AdvSIMD": "neon", "FEAT_DotProd": "dotprod", "FEAT_FP16": "fp16", "FEAT_I8MM": "i8mm", "FEAT_BF16": "bf16"}


class Machine(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One machine: `cores` are physical, `memory_bytes` is the container's limit where that is below `ram_bytes`.

    `product` is the name that the firmware gives the computer (DMI); boards have a `device_tree` model instead, and
    `compatible` names of the board and of its chip.
    """

    cpu_model: str
    arch: str
    isa: tuple[str, ...]
    cores: int | None
    threads: int | None
    memory_bytes: int | None
    ram_bytes: int | None
    swap_bytes: int | None
    os: str
    kernel: str | None
    device_tree: str | None
    governor: str | None
    accelerators: tuple[Accelerator, ...]
    python: str
    product: str | None = None
    compatible: tuple[str, ...] = ()


def this_machine(root: Path = ROOT) -> Machine:
    """Machine whose /proc and /sys lie below `root`; drivers are asked only when that is the running system."""
    if sys.platform == "darwin" and root == ROOT:
        return _mac()
    cpus = _online(root)
    blocks = _cpuinfo(root)
    ram = _meminfo(root, "MemTotal")
    device_tree = _text(root / "proc/device-tree/model")
    product = _text(root / "sys/class/dmi/id/product_name")
    compatible = tuple((_text(root / "proc/device-tree/compatible") or "").replace("\0", " ").split())
    cpu_model = _cpu_model(blocks)
    adreno = _text(root / "sys/class/kgsl/kgsl-3d0/gpu_model")
    names = [name for name in (adreno, product, cpu_model, *compatible) if name]
    return Machine(
        cpu_model=cpu_model,
        arch=_arch(root, blocks),
        isa=_isa(blocks),
        cores=len({_siblings(root, cpu) for cpu in cpus}) or None,
        threads=len(cpus) or None,
        memory_bytes=min((limit for limit in (ram, *_memory_limits(root)) if limit), default=None),
        ram_bytes=ram,
        swap_bytes=_meminfo(root, "SwapTotal"),
        os=_os(root),
        kernel=_text(root / "proc/sys/kernel/osrelease"),
        device_tree=device_tree,
        governor=_governor(root, cpus),
        accelerators=accelerators.of_machine(device_tree, names, running=root == ROOT),
        python=platform.python_version(),
        product=product,
        compatible=compatible,
    )


def physical_cores(root: Path = ROOT) -> int:
    """Cores that this process should use for arithmetic, one at least.

    Counts physical cores (not their hardware threads) that the affinity mask allows, without the small ones where
    clusters differ, and no more than the CPU quota of the container.
    """
    if sys.platform == "darwin" and root == ROOT:
        return int(_sysctl("hw.perflevel0.physicalcpu") or _sysctl("hw.physicalcpu") or 1)
    allowed = set(_cpu_list(_field(root / "proc/self/status", "Cpus_allowed_list")))
    cpus = [cpu for cpu in _online(root) if not allowed or cpu in allowed]
    cores = len({_siblings(root, cpu) for cpu in _big(root, cpus)})
    return max(1, min((cores, *(int(quota) for quota in _quotas(root)))))


def _big(root: Path, cpus: list[int]) -> list[int]:
    """CPUs that make an evenly split job faster than the bigger ones alone do.

    Its slowest part decides, so that a set is worth its number times its smallest capacity; the clock stands for the
    capacity only among cores of one kind, which a kernel without capacities does not tell.
    """
    if capacities := _told(root, cpus, "cpu_capacity"):
        chosen: list[int] = []
        for least in sorted(set(capacities.values()), reverse=True):
            more = [cpu for cpu in cpus if capacities[cpu] >= least]
            worth = len(chosen) * min((capacities[cpu] for cpu in chosen), default=0)
            if len(more) * least > _WORTH_MORE * worth or least >= SAME_CLUSTER * max(capacities.values()):
                chosen = more
        return chosen
    clocks = _told(root, cpus, "cpufreq/cpuinfo_max_freq")
    return [cpu for cpu in cpus if not clocks or clocks[cpu] >= SAME_CLUSTER * max(clocks.values())]


def _told(root: Path, cpus: list[int], file: str) -> dict[int, int]:
    """A number that each CPU has in a file of its own; empty when one has none, or all the same."""
    sizes = {cpu: size for cpu in cpus if (size := _number(_cpu(root, cpu) / file))}
    return sizes if len(sizes) == len(cpus) and len(set(sizes.values())) > 1 else {}


def _online(root: Path) -> list[int]:
    listed = _cpu_list(_text(root / "sys/devices/system/cpu/online"))
    return listed or list(range(sum("processor" in block for block in _cpuinfo(root))))


def _siblings(root: Path, cpu: int) -> tuple[int, ...]:
    for file in ("core_cpus_list", "thread_siblings_list"):
        if found := _cpu_list(_text(_cpu(root, cpu) / "topology" / file)):
            return tuple(found)
    return (cpu,)


def _cpu(root: Path, cpu: int) -> Path:
    return root / f"sys/devices/system/cpu/cpu{cpu}"


def _cpu_list(text: str | None) -> list[int]:
    """CPUs of a kernel list such as `0-3,6`; empty when it is not one."""
    found: list[int] = []
    for part in (text or "").split(","):
        match = re.fullmatch(r"(\d{1,5})(?:-(\d{1,5}))?", part.strip())
        if match is None or int(match[2] or match[1]) > _MOST_CPUS:
            return []
        found += range(int(match[1]), int(match[2] or match[1]) + 1)
    return found


def _cpuinfo(root: Path) -> list[dict[str, str]]:
    blocks = (_text(root / "proc/cpuinfo") or "").split("\n\n")
    return [
        {key.strip(): value.strip() for key, _, value in (line.partition(":") for line in block.splitlines())}
        for block in blocks
    ]


def _cpu_model(blocks: list[dict[str, str]]) -> str:
    if names := [block["model name"] for block in blocks if block.get("model name")]:
        return names[0]
    parts = [_core(block.get("CPU implementer", ""), block["CPU part"]) for block in blocks if block.get("CPU part")]
    counted = {part: parts.count(part) for part in reversed(parts)}
    if len(counted) > 1:
        return " + ".join(f"{count}x {part}" for part, count in counted.items())
    return next(iter(counted), "unknown")


def _core(implementer: str, part: str) -> str:
    number = int(part, 16) if re.fullmatch(r"0x[0-9a-f]{1,4}", part) else None
    if number is None:
        return "unknown"
    return _CORES.get(implementer, {}).get(number, f"CPU part {part}")


def _isa(blocks: list[dict[str, str]]) -> tuple[str, ...]:
    sets = [set(flags.split()) for block in blocks if (flags := block.get("flags") or block.get("Features"))]
    everywhere = set.intersection(*sets) if sets else set()
    return tuple(name for flag, name in _ISA.items() if flag in everywhere)


def _arch(root: Path, blocks: list[dict[str, str]]) -> str:
    if any("asimd" in block.get("Features", "").split() for block in blocks):
        return "aarch64"
    if any("lm" in block.get("flags", "").split() for block in blocks):
        return "x86_64"
    return _text(root / "proc/sys/kernel/arch") or (platform.machine() if root == ROOT else "unknown")


def _os(root: Path) -> str:
    release = _text(root / "etc/os-release") or ""
    match = re.search(r'^PRETTY_NAME="?([^"\n]+)', release, re.MULTILINE)
    return match[1] if match else "Linux"


def _governor(root: Path, cpus: Iterable[int]) -> str | None:
    found = {_text(_cpu(root, cpu) / "cpufreq/scaling_governor") for cpu in cpus} - {None}
    return " + ".join(sorted(filter(None, found))) or None


def _memory_limits(root: Path) -> Iterator[int]:
    for file in ("memory.max", "memory.limit_in_bytes"):
        for folder in _cgroups(root, "memory"):
            if (limit := _number(folder / file)) is not None:
                yield limit


def _quotas(root: Path) -> Iterator[float]:
    for folder in _cgroups(root, "cpu"):
        if match := re.fullmatch(r"(\d+) (\d+)", _text(folder / "cpu.max") or ""):
            quota, period = int(match[1]), int(match[2])
        else:
            quota, period = (_number(folder / f"cpu.cfs_{name}_us") or 0 for name in ("quota", "period"))
        if quota and period:
            yield quota / period


def _cgroups(root: Path, controller: str) -> Iterator[Path]:
    """Folders of this process's control group and of all its parents, version 2 and version 1 of `controller`."""
    for line in (_text(root / "proc/self/cgroup") or "").splitlines():
        controllers, _, path = line.partition(":")[2].partition(":")
        if controllers and controller not in controllers.split(","):
            continue
        parts = [part for part in path.split("/") if part not in ("", "..")]
        for mount in (controllers, controller) if controllers else ("", "unified"):
            for depth in range(len(parts), -1, -1):
                yield (root / "sys/fs/cgroup" / mount).joinpath(*parts[:depth])


def _meminfo(root: Path, key: str) -> int | None:
    match = re.fullmatch(r"(\d+) kB", _field(root / "proc/meminfo", key) or "")
    return int(match[1]) * 1024 if match else None


def _field(path: Path, key: str) -> str | None:
    match = re.search(rf"^{key}:\s*(.*)$", _text(path) or "", re.MULTILINE)
    return match[1].strip() if match else None


def _number(path: Path) -> int | None:
    text = _text(path) or ""
    return int(text) if re.fullmatch(r"\d{1,19}", text) else None


def _text(path: Path) -> str | None:
    try:
        return path.read_bytes().decode(errors="replace").strip(" \t\r\n\0") or None
    except OSError:
        return None


def _mac() -> Machine:
    brand, memory = _sysctl("machdep.cpu.brand_string") or "unknown", int(_sysctl("hw.memsize") or 0) or None
    arm = platform.machine() == "arm64"
    return Machine(
        cpu_model=brand,
        arch="aarch64" if arm else platform.machine(),
        isa=tuple(name for flag, name in _MAC_ISA.items() if _sysctl(f"hw.optional.arm.{flag}") == "1"),
        cores=int(_sysctl("hw.physicalcpu") or 0) or None,
        threads=int(_sysctl("hw.logicalcpu") or 0) or None,
        memory_bytes=memory,
        ram_bytes=memory,
        swap_bytes=None,
        os=f"macOS {platform.mac_ver()[0]}",
        kernel=platform.release(),
        device_tree=None,
        governor=None,
        accelerators=(Accelerator(name=brand, api="metal"),) if arm else (),
        python=platform.python_version(),
    )


def _sysctl(key: str) -> str | None:
    import subprocess

    result = subprocess.run(["/usr/sbin/sysctl", "-n", key], capture_output=True, text=True, check=False)
    return result.stdout.strip() or None
