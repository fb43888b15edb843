"""Small /proc and /sys trees of machines that tests cannot own; each function fills a folder and returns it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

AVX2 = "fpu sse4_2 avx f16c fma avx2 lm"
AVX512_VNNI = f"{AVX2} avx512f avx512dq avx512bw avx512vl avx512_vnni avx512_bf16"
ARMV8_2 = "fp asimd evtstrm aes crc32 atomics fphp asimdhp cpuid asimdrdm asimddp"
ARMV8_0 = "fp asimd evtstrm crc32 cpuid"
ARMV8_6 = f"{ARMV8_2} i8mm bf16"
A55, A57, A72, A76, A78AE, V1, V2, V3AE = "0xd05", "0xd07", "0xd08", "0xd0b", "0xd42", "0xd40", "0xd4f", "0xd83"


def write(root: Path, files: Mapping[str, str]) -> Path:
    """Write texts by their paths below `root`."""
    for name, text in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


def memory(ram_kb: int, swap_kb: int = 0) -> dict[str, str]:
    """/proc/meminfo with its two sizes in KiB."""
    return {"proc/meminfo": f"MemTotal:       {ram_kb} kB\nMemFree:        1024 kB\nSwapTotal: {swap_kb} kB\n"}


def process(cpus: str, cgroup: str = "0::/\n") -> dict[str, str]:
    """The running process: its CPUs as a kernel list, and its control groups."""
    return {"proc/self/status": f"Name:\tpython\nCpus_allowed_list:\t{cpus}\n", "proc/self/cgroup": cgroup}


def cpus(siblings: Sequence[str], **files: Sequence[int | str]) -> dict[str, str]:
    """One folder in /sys per CPU: hardware threads of its core as a kernel list, and files by name (`__` is `/`)."""
    top = "sys/devices/system/cpu"
    found = {f"{top}/online": f"0-{len(siblings) - 1}\n"}
    for cpu, threads in enumerate(siblings):
        found[f"{top}/cpu{cpu}/topology/core_cpus_list"] = f"{threads}\n"
        for name, values in files.items():
            found[f"{top}/cpu{cpu}/{name.replace('__', '/')}"] = f"{values[cpu]}\n"
    return found


def x86(model: str, flags: str, count: int) -> dict[str, str]:
    """/proc/cpuinfo of an x86-64 processor."""
    block = "processor\t: {}\nmodel name\t: {}\nflags\t\t: {}\npower management:\n"
    return {"proc/cpuinfo": "\n".join(block.format(cpu, model, flags) for cpu in range(count))}


def arm(parts: Sequence[str], features: str = ARMV8_2, implementer: str = "0x41") -> dict[str, str]:
    """/proc/cpuinfo of an Arm processor, one part number per CPU."""
    block = "processor\t: {}\nBogoMIPS\t: 48.00\nFeatures\t: {}\nCPU implementer\t: {}\nCPU part\t: {}\n"
    return {"proc/cpuinfo": "\n".join(block.format(cpu, features, implementer, part) for cpu, part in enumerate(parts))}


def system(name: str, kernel: str) -> dict[str, str]:
    """Names of the distribution and of the kernel."""
    return {"etc/os-release": f'NAME="{name}"\nPRETTY_NAME="{name}"\n', "proc/sys/kernel/osrelease": f"{kernel}\n"}


def board(model: str, *compatible: str) -> dict[str, str]:
    """Device tree's names of the board and of its chip, with the NUL that the kernel appends to each."""
    names = {"proc/device-tree/compatible": "".join(f"{name}\0" for name in compatible)} if compatible else {}
    return {"proc/device-tree/model": f"{model}\0"} | names


def computer(
    root: Path,
    processor: Mapping[str, str],
    cores: int,
    ram_kb: int,
    *names: Mapping[str, str],
    os: str = "Ubuntu 24.04",
) -> Path:
    """A machine of one kind of core without hardware threads, by its processor's file and what else it says."""
    files = {**processor, **cpus(tuple(map(str, range(cores)))), **memory(ram_kb), **process(f"0-{cores - 1}")}
    for each in names:
        files |= each
    return write(root, files | system(os, "6.8.0"))


def cloud_vm(root: Path) -> Path:
    """Two cores of an EPYC with AVX-512 VNNI, version 1 control groups, no clock control."""
    return write(
        root,
        x86("AMD EPYC", AVX512_VNNI, 2)
        | cpus(("0", "1"), cpu_capacity=(1024, 1024))
        | memory(24684084)
        | process("0-1", "9:name=systemd:/\n4:memory:/jobs/7\n1:cpu,cpuacct:/\n0::/\n")
        | {"sys/fs/cgroup/memory/jobs/7/memory.limit_in_bytes": "9223372036854771712\n"}
        | {
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "-1\n",
            "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "100000",
        }
        | system("Debian GNU/Linux 12 (bookworm)", "6.18.44"),
    )


def desktop(root: Path) -> Path:
    """Four cores with two threads each, AVX2 only, one favoured core, swap."""
    return write(
        root,
        x86("AMD Ryzen 5 3400G", AVX2, 8)
        | cpus(
            ("0,4", "1,5", "2,6", "3,7") * 2,
            cpufreq__cpuinfo_max_freq=(4200000, 4100000, 4100000, 4100000) * 2,
            cpufreq__scaling_governor=("schedutil",) * 8,
        )
        | memory(16307592, 8388604)
        | process("0-7")
        | system("Ubuntu 24.04.3 LTS", "6.8.0-64-generic"),
    )


def raspberry_pi_5(root: Path, ram_kb: int = 8255472) -> Path:
    """Raspberry Pi 5; the 8 GB board unless told otherwise."""
    return write(
        root,
        arm((A76,) * 4)
        | cpus(("0", "1", "2", "3"), cpufreq__scaling_governor=("ondemand",) * 4)
        | memory(ram_kb, 524272)
        | process("0-3")
        | board("Raspberry Pi 5 Model B Rev 1.0")
        | system("Debian GNU/Linux 12 (bookworm)", "6.12.25+rpt-rpi-2712"),
    )


def jetson_orin_nano_super(root: Path, model: str = "Orin Nano Engineering Reference Developer Kit Super") -> Path:
    """Jetson Orin Nano Super developer kit, 8 GB."""
    return write(
        root,
        arm((A78AE,) * 6)
        | cpus(tuple(map(str, range(6))), cpufreq__scaling_governor=("schedutil",) * 6)
        | memory(7802752, 3901376)
        | process("0-5")
        | board(f"NVIDIA Jetson {model}")
        | system("Ubuntu 22.04.5 LTS", "5.15.148-tegra"),
    )


def jetson_agx_thor(root: Path) -> Path:
    """Jetson AGX Thor developer kit, 128 GB, as a report of L4T 38.2 shows it."""
    return write(
        root,
        arm((V3AE,) * 14, f"{ARMV8_2} sve i8mm bf16 sve2")
        | cpus(tuple(map(str, range(14))), cpufreq__scaling_governor=("schedutil",) * 14)
        | memory(128765952)
        | process("0-13")
        | board("NVIDIA Jetson AGX Thor Developer Kit")
        | system("Ubuntu 24.04.3 LTS", "6.8.12-tegra"),
    )


def steam_deck(root: Path, product: str = "Galileo") -> Path:
    """Steam Deck; the OLED model unless told otherwise."""
    return write(
        root,
        x86("AMD Custom APU 0932", AVX2, 8)
        | cpus(("0,4", "1,5", "2,6", "3,7") * 2, cpufreq__scaling_governor=("schedutil",) * 8)
        | memory(15173012, 8388604)
        | process("0-7")
        | {"sys/class/dmi/id/product_name": f"{product}\n"}
        | system("SteamOS Holo", "6.11.11-valve24-2-neptune-611"),
    )


def container(root: Path) -> Path:
    """The desktop's kernel seen from a version 2 control group: 4 GiB by the parent, 6 GiB and 2.5 CPUs by itself."""
    return write(
        desktop(root),
        process("0-7", "0::/kube/pod\n")
        | {"sys/fs/cgroup/kube/memory.max": f"{4 << 30}\n", "sys/fs/cgroup/kube/cpu.max": "max 100000\n"}
        | {"sys/fs/cgroup/kube/pod/memory.max": f"{6 << 30}\n", "sys/fs/cgroup/kube/pod/cpu.max": "250000 100000\n"},
    )


def rk3588(root: Path) -> Path:
    """Four small and four big cores; the big pairs differ slightly."""
    return write(
        root,
        arm((A55,) * 4 + (A76,) * 4)
        | cpus(tuple(map(str, range(8))), cpu_capacity=(530,) * 4 + (1024, 1024, 1004, 1004))
        | memory(16200000)
        | process("0-7")
        | board("Radxa ROCK 5B")
        | system("Armbian 25.5", "6.1.115-vendor-rk35xx"),
    )


def raspberry_pi_4(root: Path) -> Path:
    """Raspberry Pi 4, the 8 GB board."""
    return computer(root, arm((A72,) * 4, ARMV8_0), 4, 8007000, board("Raspberry Pi 4 Model B Rev 1.5"))


def raspberry_pi_500_plus(root: Path) -> Path:
    """Raspberry Pi 500+, with 16 GB."""
    return computer(root, arm((A76,) * 4), 4, 16608000, board("Raspberry Pi 500 Plus Rev 1.0"))


def orange_pi_5(root: Path) -> Path:
    """Orange Pi 5 with 8 GB, as a mainline kernel names it."""
    name = board("Xunlong Orange Pi 5", "xunlong,orangepi-5", "rockchip,rk3588s")
    return computer(root, arm((A55,) * 4 + (A76,) * 4), 8, 8131000, name)


def jetson(root: Path, model: str, cores: int, ram_kb: int) -> Path:
    """A Jetson of the Orin family by its device tree's model."""
    return computer(root, arm((A78AE,) * cores), cores, ram_kb, board(f"NVIDIA Jetson {model}"))


def jetson_nano(root: Path) -> Path:
    """Jetson Nano of 2019, 4 GB."""
    return computer(root, arm((A57,) * 4, ARMV8_0), 4, 4059712, board("NVIDIA Jetson Nano Developer Kit"))


def jetson_xavier_nx(root: Path) -> Path:
    """Jetson Xavier NX, 8 GB."""
    features = ARMV8_2.replace(" asimddp", "")
    return computer(
        root, arm(("0x004",) * 6, features, "0x4e"), 6, 7766000, board("NVIDIA Jetson Xavier NX Developer Kit")
    )


def snapdragon_x_laptop(root: Path) -> Path:
    """ThinkPad T14s with a Snapdragon X Elite, running Linux."""
    name = board("Lenovo ThinkPad T14s Gen 6", "lenovo,thinkpad-t14s", "qcom,x1e78100", "qcom,x1e80100")
    return computer(root, arm(("0x001",) * 12, ARMV8_6, "0x51"), 12, 32400000, name)


def snapdragon_phone(root: Path, gpu: str = "Adreno750v2") -> Path:
    """Phone with a Snapdragon 8 Gen 3 as an app sees it: no device tree, but the GPU's name."""
    parts = ("0xd80",) * 2 + ("0xd81",) * 5 + ("0xd82",)
    return computer(root, arm(parts, ARMV8_6), 8, 11500000, {"sys/class/kgsl/kgsl-3d0/gpu_model": f"{gpu}\n"})


def graviton(root: Path, part: str, cores: int) -> Path:
    """Instance of AWS with Arm's Neoverse cores; V2 has SVE2."""
    features = f"{ARMV8_6} sve" + (" sve2" if part == V2 else "")
    return computer(root, arm((part,) * cores, features), cores, cores * 2000000, os="Amazon Linux 2023")


def x86_laptop(root: Path, model: str, flags: str, cores: int = 8, ram_kb: int = 31900000) -> Path:
    """Laptop with an x86-64 processor, known by its name."""
    return computer(root, x86(model, flags, cores), cores, ram_kb)


def sapphire_rapids(root: Path) -> Path:
    """Virtual machine on a Xeon with AMX."""
    flags = f"{AVX512_VNNI} avx_vnni amx_bf16 amx_tile amx_int8"
    return computer(root, x86("Intel(R) Xeon(R) Platinum 8481C", flags, 4), 4, 16000000)
