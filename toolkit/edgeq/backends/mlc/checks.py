"""Can models be compiled with TVM here, and does the installed TVM run them on the device? Nothing is compiled."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeq.backends import findings as looking
from edgeq.backends.findings import Finding, show
from edgeq.backends.llamacpp import install
from edgeq.backends.mlc import official
from edgeq.errors import MissingTool
from edgeq.machine import Machine
from edgeq.target import Target

INSTALL = "pip install 'edgeq[tvm]'"
_PIN = re.compile(r"(apache-tvm(?:-ffi)?)\s*==\s*([\w.]+)")
_ASK = (sys.executable, "-P", "-c", "from edgeq.backends.mlc import checks; checks.answer()")
_ASK_SECONDS = 60.0
_RUNTIMES = ("cuda", "metal", "opencl", "vulkan")
_FIRST_L4T = 38
"""First L4T release with CUDA 13: JetPack 7. 36 is JetPack 6 with CUDA 12, 35 JetPack 5 with CUDA 11 (L4T archive)."""
_OLDEST_DRIVER = 580
"""Driver branch that programs of CUDA 13 need: CUDA release notes, minor version compatibility."""
_LIBRARIES = ("usr/local/cuda/lib64", "usr/lib/{}", "usr/lib/{}/nvidia", "usr/lib64", "usr/lib", "usr/local/lib")
_NO_RUNTIME = {
    "metal": f"run on the Mac itself, where the package has it: {INSTALL}",
    "opencl": "the package has no OpenCL: compile TVM on the device with USE_OPENCL=ON",
    "vulkan": "the package has no Vulkan: compile TVM on the device with USE_VULKAN=ON",
}


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What the installed TVM says: the GPU runtimes it could load."""

    runtimes: tuple[str, ...]


class Engine(NamedTuple):
    """The installed packages by name and version (None: absent), and TVM's report or why there is none."""

    versions: dict[str, str | None]
    report: Report | None = None
    fault: str = ""

    @property
    def installed(self) -> bool:
        """Whether TVM is there, in whatever version."""
        return self.versions["apache-tvm"] is not None

    def has(self, kind: str) -> bool:
        """Whether its runtime for a kind of device was loaded."""
        return self.report is not None and kind in self.report.runtimes


def findings(target: Target, machine: Machine, root: Path, *, here: bool) -> list[Finding]:
    """What the mlc backend needs for `target`, looked for below `root`; `here`: this machine is the target.

    What compiles is looked for on any machine; what runs is unknown on another one, and not looked at.
    """
    gpu = target.code_generator in _RUNTIMES
    engine = ask(report=here and gpu)
    found = [_packages(target, engine), *_kernel_check(target, root), _official(target)]
    if gpu:
        wanted = _elsewhere(_runtime_name(target), _needs(target))
        found.append(_runtime(target, machine, root, engine) if here else wanted)
    if target.code_generator == "cuda" and target.gpu:
        wanted = _elsewhere("cuda kernel compiler", f"nvcc that knows {target.gpu.arch}, for kernels that are source")
        found.append(_kernel_compiler(target, root) if here else wanted)
    return found


def pinned() -> dict[str, str]:
    """Versions of TVM's packages that edgeq is made for; empty where edgeq is not installed as a package.

    Both, because the foreign function interface that pip chooses by itself ends CUDA builds with a segmentation fault.
    """
    try:
        wanted = importlib.metadata.requires("edgeq") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    return {match[1]: match[2] for each in wanted if (match := _PIN.match(each.replace("_", "-")))}


def ask(*, report: bool) -> Engine:
    """The installed TVM; its `report` in a process of its own: a library that does not suit the machine may end it."""
    versions = {name: version(name) for name in ("apache-tvm", "apache-tvm-ffi")}
    if versions["apache-tvm"] is None or not report:
        return Engine(versions)
    said, fault = looking.ask(_ASK, _ASK_SECONDS, "TVM")
    return Engine(versions, fault=fault) if fault else Engine(versions, msgspec.json.decode(said, type=Report))


def answer() -> None:
    """Write the report of this process, which imports TVM for it, to stdout as one line of JSON."""
    from tvm import runtime

    report = Report(tuple(kind for kind in _RUNTIMES if runtime.enabled(kind)))
    sys.stdout.buffer.write(msgspec.json.encode(report) + b"\n")


def version(package: str) -> str | None:
    """Installed version of a package; None where it is absent."""
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _elsewhere(name: str, expected: str) -> Finding:
    return Finding(name, None, expected, "this is another machine", "check again on the device itself")


def _needs(target: Target) -> str:
    """What runs a library there; JetPack 6 has CUDA 12."""
    kind = target.code_generator
    return f"a TVM whose {kind} runtime loads" + (": CUDA 13, on a Jetson JetPack 7" if kind == "cuda" else "")


def _packages(target: Target, engine: Engine) -> Finding:
    pins = pinned()
    expected = ", ".join(f"{name} {version}" for name, version in pins.items()) or "the versions that edgeq pins"
    observed = ", ".join(f"{name} {version or 'missing'}" for name, version in engine.versions.items())
    if not engine.installed:
        passed = False if target.backends[0] == "mlc" else None
        return Finding("tvm", passed, expected, observed, f"only for the mlc backend: {INSTALL}")
    if not pins:
        return Finding("tvm", None, expected, f"{observed}; edgeq is not installed as a package", "pip install -e .")
    again = " ".join(f"{name}=={version}" for name, version in pins.items())
    return Finding("tvm", engine.versions == pins, expected, observed, f"pip install {again}")


def _official(target: Target) -> Finding:
    """MLC's own compiler: what the package index has under its name is an empty placeholder, so the module counts."""
    use = "needed for Vulkan" if target.code_generator == "vulkan" else "optional"
    try:
        found = official.find(official.without(target))
    except MissingTool as missing:
        return Finding("mlc_llm", None, "MLC's own compiler", missing.what, f"{use}: {missing.run}")
    return Finding("mlc_llm", True, "MLC's own compiler", f"{found.version} in {found.python}", "")


def _runtime_name(target: Target) -> str:
    return f"tvm {target.code_generator} runtime"


def _runtime(target: Target, machine: Machine, root: Path, engine: Engine) -> Finding:
    kind, name = target.code_generator, _runtime_name(target)
    expected = f"a TVM whose {kind} runtime loads"
    if engine.has(kind):
        return Finding(name, True, expected, "it loads", "")
    if kind == "cuda":
        return _no_cuda(target, machine, root, engine)
    if not engine.installed:
        return Finding(name, None, expected, "TVM is not installed", f"only for the mlc backend: {_NO_RUNTIME[kind]}")
    return Finding(name, False, expected, engine.fault or "TVM has none", _NO_RUNTIME[kind])


def _no_cuda(target: Target, machine: Machine, root: Path, engine: Engine) -> Finding:
    """Why the package's CUDA runtime is not there: it links CUDA 13, and the driver has to know that."""
    name, expected = _runtime_name(target), "libcudart.so.13 (JetPack 7 on a Jetson)"
    release, library = _l4t(root), _library("libcudart.so.13", target, root)
    if release and release[0] < _FIRST_L4T:
        remedy = f"compile TVM on the board, or use the llamacpp backend: {install.line(target)}"
        return Finding(name, False, expected, f"L4T {'.'.join(map(str, release))}, whose CUDA is older", remedy)
    driver = next((gpu.driver for gpu in machine.accelerators if gpu.api == "cuda" and gpu.driver), "")
    observed = show(library, root) + (f", driver {driver}" if driver else "")
    if driver and int(driver.partition(".")[0]) < _OLDEST_DRIVER:
        return Finding(name, False, expected, observed, f"install NVIDIA's driver {_OLDEST_DRIVER} or newer")
    if not engine.installed:
        remedy = f"only for the mlc backend: install CUDA 13's runtime, then {INSTALL}"
        return Finding(name, library is not None or None, expected, observed, remedy)
    remedy = "install CUDA 13's runtime, and name its folder in LD_LIBRARY_PATH"
    return Finding(name, False, expected, f"{observed}; {engine.fault or 'TVM cannot load it'}", remedy)


def _kernel_compiler(target: Target, root: Path) -> Finding:
    """What compiles a library's kernels when it is first loaded, where they were not compiled with it."""
    return _knowing_nvcc(
        target, root, "cuda kernel compiler", "only where kernels were not compiled with the bundle: install"
    )


def _kernel_check(target: Target, root: Path) -> list[Finding]:
    """What compiles kernels here only to see that they compile, as no GPU is needed for that."""
    kind, name, unchecked = target.code_generator, "kernel check", "kernels stay unchecked; to check them, install"
    if kind == "opencl":
        clang = _program("clang", root)
        return [Finding(name, clang is not None or None, "clang", show(clang, root), f"{unchecked} clang")]
    if kind != "cuda":
        return []
    return [_knowing_nvcc(target, root, name, unchecked)]


def _knowing_nvcc(target: Target, root: Path, name: str, when: str) -> Finding:
    """nvcc that compiles for the target; `when` begins the remedy."""
    arch, nvcc = target.gpu.arch if target.gpu else "unknown", _nvcc(root)
    expected, remedy = f"nvcc that knows {arch}", f"{when} a CUDA toolkit whose nvcc --list-gpu-code names {arch}"
    if nvcc is None:
        return Finding(name, None, expected, "none found", remedy)
    known = _run(nvcc, "--list-gpu-code").split() or ["nothing that it says"]
    observed = f"{show(nvcc, root)}, knows {' to '.join(dict.fromkeys((known[0], known[-1])))}"
    return Finding(name, arch in known or None, expected, observed, remedy)


def _l4t(root: Path) -> tuple[int, ...]:
    """Release of NVIDIA's Linux for Tegra such as (36, 4, 3); empty on other machines."""
    try:
        text = (root / "etc/nv_tegra_release").read_text(errors="replace")
    except OSError:
        return ()
    match = re.match(r"# R(\d+) \(release\), REVISION: ([\d.]+)", text)
    return tuple(map(int, (match[1], *match[2].strip(".").split(".")))) if match else ()


def _nvcc(root: Path) -> Path | None:
    return _program("nvcc", root) or _program("nvcc", root, "/usr/local/cuda/bin")


def _program(name: str, root: Path, *folders: str) -> Path | None:
    """Path below `root` of a program in `folders`, or on PATH."""
    every = folders or os.environ.get("PATH", "").split(os.pathsep)
    paths = (root / folder.lstrip("/") / name for folder in every if folder)
    return next((path for path in paths if path.is_file() and os.access(path, os.X_OK)), None)


def _library(name: str, target: Target, root: Path) -> Path | None:
    """Path below `root` of a library in LD_LIBRARY_PATH or where CUDA's installers put it."""
    given = [folder.lstrip("/") for folder in os.environ.get("LD_LIBRARY_PATH", "").split(os.pathsep) if folder]
    every = (*given, *(each.format(target.host) for each in _LIBRARIES))
    return next((path for folder in every if (path := root / folder / name).exists()), None)


def _run(program: Path, argument: str) -> str:
    try:
        return subprocess.run([program, argument], capture_output=True, text=True, timeout=20, check=False).stdout
    except (OSError, subprocess.TimeoutExpired):
        return ""
