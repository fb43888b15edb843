"""Targets: the devices that edgeq builds for, one TOML file each, every figure with its source."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Literal

import msgspec

from edgeq import data, recipe
from edgeq.errors import CorruptInput, UsageFault

Api = Literal["cuda", "metal", "vulkan", "webgpu", "cpu"]
BACKENDS = ("onnx", "llamacpp", "mlc", "null")
DeviceClass = Literal["jetson", "sbc", "phone", "handheld", "mac", "laptop", "mini-pc", "computer", "server", "browser"]
CodeGenerator = Literal["llvm", "cuda", "metal", "opencl", "webgpu", "vulkan"]
HOST = "host"
_NAME = re.compile(r"[a-z0-9]+([.-][a-z0-9]+)*")
_CMAKE_ARGUMENT = re.compile(r"-D\w+=[\w./;:+-]+")
_ARCH = re.compile(r"[\w.+-]+( [\w.+-]+)*")
_RATE = re.compile(r"(cpu|gpu|both)(_[a-z0-9]+)*_bytes_per_s")
_PACKAGE = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+_-]*")
_CODE_GENERATORS: dict[Api, tuple[CodeGenerator, ...]] = {
    "cpu": ("llvm",),
    "cuda": ("cuda",),
    "metal": ("metal",),
    "vulkan": ("vulkan", "opencl", "webgpu"),
    "webgpu": ("webgpu",),
}


class Figure(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One positive number, in the unit that its field's name ends with, and where it was published."""

    value: int | float
    source: str

    def __post_init__(self) -> None:
        if not self.value > 0:
            raise ValueError(f"value {self.value} is not positive")
        if not self.source.strip():
            raise ValueError("source is empty: a figure without a source is left out")


class Cpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Processor: architecture, model, physical cores, and the instruction sets that matter, by `machine`'s names.

    The rates are dense peaks of all its fast cores, in operations per second.
    """

    arch: Literal["x86_64", "aarch64", "wasm32"]
    model: str
    cores: Figure | None = None
    isa: tuple[str, ...]
    fp32_flop_per_s: Figure | None = None
    fp16_flop_per_s: Figure | None = None
    int8_op_per_s: Figure | None = None


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory that models live in: its size, the share left for a model (0 to 1), and the theoretical bandwidth.

    It is the GPU's own where the GPU has its own, else the RAM. `varies`: the device is sold with other sizes too, and
    `total_bytes` is one of them. `measured` has published rates by who moved the bytes and how, all names ending in
    `_bytes_per_s`: `cpu_copy_bytes_per_s`, `gpu_triad_bytes_per_s`.
    """

    total_bytes: Figure | None = None
    varies: bool = False
    usable_share: Figure | None = None
    bandwidth_bytes_per_s: Figure | None = None
    measured: dict[str, Figure] = msgspec.field(default_factory=dict)

    def __post_init__(self) -> None:
        if wrong := [name for name in self.measured if not _RATE.fullmatch(name)]:
            raise ValueError(f"memory.measured: {wrong[0]!r} is not a name such as cpu_copy_bytes_per_s")
        if self.varies and self.total_bytes is None:
            raise ValueError("memory.varies needs total_bytes, one of the sizes")
        if self.usable_share and self.usable_share.value > 1:
            raise ValueError("usable_share is above 1")


class Gpu(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Graphics processor: model, architecture (`sm_87`), and dense peak arithmetic in operations per second."""

    model: str
    arch: str
    fp16_flop_per_s: Figure | None = None
    int8_op_per_s: Figure | None = None

    def __post_init__(self) -> None:
        if not _ARCH.fullmatch(self.arch):
            raise ValueError(f"gpu.arch {self.arch!r} is not a name such as sm_87")


class LlamaCpp(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How llama.cpp is compiled on the device: CMake's arguments beside its API's own, and the system's packages."""

    cmake_args: tuple[str, ...] = ()
    packages: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        for word in self.cmake_args:
            if not _CMAKE_ARGUMENT.fullmatch(word):
                raise ValueError(f"cmake_args: {word!r} is not -DNAME=VALUE without spaces and quotes")
        for word in self.packages:
            if not _PACKAGE.fullmatch(word):
                raise ValueError(f"packages: {word!r} is not the name of a package")


class Onnx(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which of ONNX Runtime's execution providers runs the device's bundles."""

    provider: Literal["cpu", "webgpu", "cuda"] = "cpu"


class Mlc(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How TVM generates code for the device: by which generator, within which limits of the GPU, for which processor.

    `kind` None: the API's own name. TVM from the package index generates code for every kind but `vulkan`, which
    needs the official compiler: a Vulkan GPU that has an OpenCL driver as well is therefore an `opencl` one here. The
    limits are those that schedules keep to, in threads and bytes; a GPU has all three, `llvm` none. `mcpu` is LLVM's
    name of the processor, None for any of its architecture.
    """

    kind: CodeGenerator | None = None
    max_threads_per_block: int | None = None
    max_shared_memory_per_block: int | None = None
    thread_warp_size: int | None = None
    mcpu: str | None = None

    def __post_init__(self) -> None:
        for name, limit in self.limits().items():
            if limit is not None and limit <= 0:
                raise ValueError(f"{name} {limit} is not positive")
        if self.mcpu is not None and not _NAME.fullmatch(self.mcpu):
            raise ValueError(f"mcpu {self.mcpu!r} is not a name such as cortex-a76")

    def limits(self) -> dict[str, int | None]:
        """The GPU's limits by TVM's names of them."""
        return {
            "max_threads_per_block": self.max_threads_per_block,
            "max_shared_memory_per_block": self.max_shared_memory_per_block,
            "thread_warp_size": self.thread_warp_size,
        }


class Match(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """How a machine is recognised: `isa` it has, `without` it has not, and parts of its device-tree model, all of them.

    `device_tree_without` has parts that the model must not have, `compatible` what the device tree calls the chip.
    `product` is the firmware's name of the computer, `gpu` the driver's name of its GPU, both whole; `cpu` has parts of
    the processor's name, one of which it has, `cores` how many physical ones. A machine with a faster instruction set
    than the target's is another device: what it measures is not this target's. `by_name_only`: no machine says of
    itself that it is this one.
    """

    isa: tuple[str, ...] = ()
    without: tuple[str, ...] = ()
    device_tree: tuple[str, ...] = ()
    device_tree_without: tuple[str, ...] = ()
    compatible: tuple[str, ...] = ()
    cpu: tuple[str, ...] = ()
    cores: int | None = None
    product: str | None = None
    gpu: str | None = None
    by_name_only: bool = False


class Calibration(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What a runtime reaches on the device, as `scripts/refit` writes it: `estimating.speed` says what it means.

    eta: share of the theoretical bandwidth; layer_s: seconds of each layer on top; compute: share of the peak
    arithmetic; unpack: operations for each weight of a decoded token, null where the peak is not known; intervals hold
    90 %; correlation: of the errors of logit(eta) and ln(layer_s).
    """

    eta: float
    eta_interval: tuple[float, float]
    layer_s: float
    layer_s_interval: tuple[float, float]
    correlation: float
    compute: float
    compute_interval: tuple[float, float]
    unpack: float | None = None
    unpack_interval: tuple[float, float] | None = None
    source: str

    def __post_init__(self) -> None:
        for name in ("eta", "layer_s", "compute", "unpack"):
            value, interval = getattr(self, name), getattr(self, f"{name}_interval")
            if (value is None) != (interval is None):
                raise ValueError(f"{name} and {name}_interval go together")
            if interval and not 0 < interval[0] <= value <= interval[1]:
                raise ValueError(f"{name} is not positive and within {name}_interval")
        if not self.eta_interval[1] < 1 or not -1 <= self.correlation <= 1 or not self.source.strip():
            raise ValueError("eta_interval reaches 1, correlation is none, or source is empty")


class Target(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One device; `backends` and `recipes` are ordered best first, `host` is its triple (aarch64-linux-gnu).

    install_doubt: why current releases of its engines may not install there.
    """

    name: str
    title: str
    aliases: tuple[str, ...] = ()
    device_class: DeviceClass | None = None
    api: Api
    host: str
    cpu: Cpu
    memory: Memory
    gpu: Gpu | None = None
    match: Match
    backends: tuple[str, ...]
    recipes: tuple[str, ...]
    llamacpp: LlamaCpp = LlamaCpp()
    onnx: Onnx = Onnx()
    mlc: Mlc = Mlc()
    calibration: dict[str, Calibration] = {}
    install_doubt: str | None = None
    notes: tuple[str, ...] = ()
    sources: tuple[str, ...]

    def __post_init__(self) -> None:
        for name in (self.name, *self.aliases):
            if not _NAME.fullmatch(name):
                raise ValueError(f"{name!r} is not a name: lower-case words joined by '-' or '.'")
        if not self.host.startswith(f"{self.cpu.arch}-"):
            raise ValueError(f"host {self.host!r} does not start with cpu.arch {self.cpu.arch!r}")
        if self.api != "cpu" and self.gpu is None:
            raise ValueError(f"api {self.api!r} needs a [gpu] table")
        if not self.backends or not self.recipes:
            raise ValueError("backends and recipes each need one name at least")
        for name in self.backends:
            if name not in BACKENDS:
                raise ValueError(f"{name!r} is not a backend. {data.near(name, BACKENDS)}")
        self._check_mlc()
        for name in self.recipes:
            try:
                recipe.parse(name)
            except UsageFault as fault:
                raise ValueError(str(fault)) from fault

    @property
    def code_generator(self) -> CodeGenerator:
        """TVM's code generator: mlc.kind, or the one that the API has by itself."""
        return self.mlc.kind or _CODE_GENERATORS[self.api][0]

    def _check_mlc(self) -> None:
        kind, limits = self.code_generator, self.mlc.limits()
        if kind not in _CODE_GENERATORS[self.api]:
            raise ValueError(f"mlc.kind {kind!r} does not suit api {self.api!r}: {_CODE_GENERATORS[self.api]}")
        if kind == "llvm" and any(limits.values()):
            raise ValueError("mlc has limits of a GPU, which kind 'llvm' has not")
        if kind != "llvm" and "mlc" in self.backends and (lost := [name for name in limits if not limits[name]]):
            raise ValueError(f"backend mlc needs mlc.{lost[0]} for kind {kind!r}")


def names() -> tuple[str, ...]:
    """Names of the shipped targets, sorted."""
    return tuple(sorted(path.stem for path in data.folder("targets").glob("*.toml")))


def load(name: str) -> Target:
    """Target by its name, one of its aliases (in any case), or the path of a TOML file.

    Raises UsageFault when there is none, CorruptInput when the file is not a valid target or takes the name `host`,
    which means the machine at hand.
    """
    if name.endswith(".toml"):
        path = Path(name)
        if not path.is_file():
            raise UsageFault(f"{name}: no such target file", run="edgeq targets list")
        return _own(path)
    wanted = name.lower()
    if wanted in names():
        return _shipped(wanted)
    aliases = {alias: found for found in map(_shipped, names()) for alias in found.aliases}
    if wanted in aliases:
        return aliases[wanted]
    if Path(name).is_file():
        own = Path(name).with_suffix(".toml")
        raise UsageFault(f"{name} is no target file", why="Its name does not end in .toml.", run=f"rename it to {own}")
    raise UsageFault(
        f"{name!r} is not a target", why=data.near(name, (*names(), *aliases, HOST)), run="edgeq targets list"
    )


def _own(path: Path) -> Target:
    try:
        found = data.read_toml(path, Target)
    except CorruptInput as fault:
        raise CorruptInput(fault.what, why=fault.why, run=f"mend it, then edgeq targets validate {path}") from fault
    if HOST in (found.name, *found.aliases):
        raise CorruptInput(f"{path}: the name {HOST!r} is reserved", why="It means the machine that edgeq runs on.")
    return found


def _shipped(name: str) -> Target:
    return data.read_toml(data.folder("targets") / f"{name}.toml", Target)
