"""Is everything here that building and measuring need? One check each, with what was expected and what to do."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import msgspec

from edgeq import detect
from edgeq.errors import BackendFault, MissingTool
from edgeq.machine import ROOT, Machine, physical_cores, this_machine
from edgeq.target import Target

Status = Literal["PASSED", "FAILED", "UNKNOWN"]
OLDEST_PYTHON = (3, 11)
DISK_BYTES = 2 * 10**9  # checkpoint and bundle of the smallest catalogue model, twice over
MEMORY_BYTES = 2 * 10**9  # its float32 reference: half a billion parameters of 4 bytes
_GPU_BACKENDS = ("llamacpp", "mlc")
_REQUIREMENT = re.compile(r"([A-Za-z0-9._-]+)\s*([^;]*)(?:;\s*extra\s*==\s*['\"](\w+)['\"])?")


class Check(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """One answer; UNKNOWN: nothing can be said, or it is fine if meant so. `remedy` is empty when PASSED."""

    name: str
    status: Status
    expected: str
    observed: str
    remedy: str


def checks(target: Target, root: Path = ROOT) -> list[Check]:
    """Every check for building here for `target` and for measuring it, on the machine whose /proc is below `root`."""
    machine = this_machine(root)
    found = [
        _python(),
        _packages("base packages", "", "pip install edgeq"),
        _build_packages(),
        _torch(),
        _telemetry(),
        _closest(machine),
        _machine(target, machine),
        _accelerators(target, machine),
        _backends(target),
    ]
    if target.api == "cuda":
        found.append(_gpu(target, machine))
    engines = [
        *_engine("llamacpp", target, machine, root),
        *_engine("mlc", target, machine, root),
        *_onnx(target, machine),
    ]
    return [
        *found,
        *(_doubted(each, target) for each in engines),
        _memory(machine),
        _cores(machine, physical_cores(root)),
        _governor(machine),
        _swap(machine),
        _disk(Path.cwd()),
        _cache(),
        _token(),
    ]


def _check(name: str, passed: bool | None, expected: str, observed: str, remedy: str) -> Check:
    if passed:
        return Check(name, "PASSED", expected, observed, "")
    return Check(name, "UNKNOWN" if passed is None else "FAILED", expected, observed, remedy)


def _python() -> Check:
    expected = "{}.{} or newer".format(*OLDEST_PYTHON)
    observed = "{}.{}.{}".format(*sys.version_info)
    return _check("python", sys.version_info >= OLDEST_PYTHON, expected, observed, "install a newer Python")


def _packages(name: str, extra: str, remedy: str) -> Check:
    wanted = _requirements(extra)
    if not wanted:
        return _check(name, None, "edgeq's own list", "edgeq is not installed as a package", "pip install -e .")
    observed, bad = [], []
    for package, bounds in wanted.items():
        version = _version(package)
        observed.append(f"{package} {version or 'missing'}")
        if version is None or not _within(version, bounds):
            bad.append(f"{package} {bounds}".strip())
    expected = ", ".join(bad) if bad else "all within their bounds"
    return _check(name, not bad, expected, ", ".join(observed), remedy)


def _build_packages() -> Check:
    """The same for edgeq[build]; UNKNOWN on a device, which runs bundles without it."""
    found = _packages("build packages", "build", "only `edgeq build` needs them: pip install 'edgeq[build]'")
    if found.status == "FAILED" and _version("torch") is None:
        return msgspec.structs.replace(found, status="UNKNOWN")
    return found


def _requirements(extra: str) -> dict[str, str]:
    try:
        lines = importlib.metadata.requires("edgeq") or []
    except importlib.metadata.PackageNotFoundError:
        return {}
    parsed = [match for line in lines if (match := _REQUIREMENT.fullmatch(line.strip()))]
    return {match[1]: match[2].strip() for match in parsed if (match[3] or "") == extra}


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def _within(version: str, bounds: str) -> bool:
    """Whether a version meets bounds such as `>=0.18,<0.19`; other operators are left to the installer."""
    have = _numbers(version)
    pairs: Iterable[tuple[str, str]] = re.findall(r"(>=|<)\s*([\d.]+)", bounds)
    return all(have >= _numbers(limit) if sign == ">=" else have < _numbers(limit) for sign, limit in pairs)


def _numbers(version: str) -> tuple[int, ...]:
    return tuple(int(number) for number in re.findall(r"\d+", version.partition("+")[0]))


def _torch() -> Check:
    version = _version("torch")
    build = (version or "").partition("+")[2]
    passed = {"": None, "cpu": True}.get(build, False)
    expected = "CPU build (quantizing uses no GPU)"
    return _check(
        "torch",
        passed,
        expected,
        version or "missing",
        "the CPU build is gigabytes smaller: choose it in PyTorch's own install guide",
    )


def _telemetry() -> Check:
    variable = "ORT_DISABLE_TELEMETRY"
    value = os.environ.get(variable)
    remedy = f"edgeq sets it for itself; for other programs: export {variable}=1"
    return _check("telemetry", True if value == "1" else None, f"{variable}=1", f"{variable}={value or ''}", remedy)


def _closest(machine: Machine) -> Check:
    found = detect.closest(machine)
    observed = f"{found.name}: {found.title}" if found else f"none: {machine.cpu_model}, {machine.os}"
    remedy = "describe it in a file of your own (edgeq targets validate), or use --target host"
    return _check("closest target", True if found else None, "a device of the catalogue", observed, remedy)


def _accelerators(target: Target, machine: Machine) -> Check:
    observed = "; ".join(map(str, machine.accelerators)) or "none found"
    passed = target.api == "cpu" or any(gpu.api == target.api for gpu in machine.accelerators)
    expected = "none needed" if target.api == "cpu" else f"a {target.api} GPU"
    return _check("accelerators", passed or None, expected, observed, "check again on the device itself")


def _machine(target: Target, machine: Machine) -> Check:
    reason = detect.mismatch(target, machine)
    remedy = f"bundles may be built here; measurements are {target.name}'s only when made on it: edgeq targets detect"
    return _check("machine", reason is None, target.title, reason or machine.cpu_model, remedy)


def _backends(target: Target) -> Check:
    states = detect.usable_backends(target)
    observed = "; ".join(f"{state.name}: {state.reason}" for state in states)
    passed = any(state.usable for state in states)
    return _check("backend", passed, f"one of {', '.join(target.backends)}", observed, "install what is missing above")


def _gpu(target: Target, machine: Machine) -> Check:
    expected = f"CUDA GPU and {' or '.join(_GPU_BACKENDS)}"
    gpus = [gpu.name for gpu in machine.accelerators if gpu.api == "cuda"]
    usable = [state.name for state in detect.usable_backends(target) if state.usable and state.name in _GPU_BACKENDS]
    observed = f"GPU: {', '.join(gpus) or 'none'}; backends: {', '.join(usable) or 'none'}"
    if gpus:
        return _check("gpu", bool(usable), expected, observed, "without such a backend bundles run on the CPU")
    here = detect.mismatch(target, machine) is None
    return _check("gpu", False if here else None, expected, observed, "check again on the device itself")


def _engine(name: str, target: Target, machine: Machine, root: Path) -> list[Check]:
    """What a backend itself looks for, where the target has that backend."""
    if name not in target.backends:
        return []
    checks = importlib.import_module(f"edgeq.backends.{name}.checks")
    here = detect.mismatch(target, machine) is None
    return [_check(*found) for found in checks.findings(target, machine, root, here=here)]


def _doubted(found: Check, target: Target) -> Check:
    """The same without a line that installs what the target does not know to install there."""
    if target.install_doubt is None or "pip install" not in found.remedy:
        return found
    return msgspec.structs.replace(found, remedy=f"none is known: {target.install_doubt}")


def _onnx(target: Target, machine: Machine) -> list[Check]:
    """Whether ONNX Runtime's provider for the target's GPU works here; kernels are looked for, nothing is run."""
    provider = target.onnx.provider
    if "onnx" not in target.backends or provider == "cpu":
        return []
    name, expected = f"onnx {provider}", f"ONNX Runtime's provider and a device for {provider}"
    if detect.mismatch(target, machine) is not None:
        return [_check(name, None, expected, "this is another machine", "check again on the device itself")]
    try:
        observed = importlib.import_module(f"edgeq.backends.onnx.{provider}").find().name
    except MissingTool as missing:
        return [_check(name, None, expected, missing.what, f"only for the onnx backend: {missing.run}")]
    except BackendFault as fault:
        return [_check(name, False, expected, fault.what, fault.run)]
    return [_check(name, True, expected, observed, "")]


def _memory(machine: Machine) -> Check:
    size = machine.memory_bytes
    observed = "unknown" if size is None else f"{size / 1e9:.1f} GB"
    if size and machine.ram_bytes and size < machine.ram_bytes:
        observed += f" (container's limit; the machine has {machine.ram_bytes / 1e9:.1f} GB)"
    passed = None if size is None else size >= MEMORY_BYTES
    return _check("memory", passed, f"{MEMORY_BYTES / 1e9:.0f} GB or more", observed, "raise the limit, or add memory")


def _cores(machine: Machine, usable: int) -> Check:
    passed = True if usable == machine.cores else None
    observed = f"{usable} of {machine.cores or 'unknown'}"
    remedy = "fine if meant so: quota, affinity and slower clusters are respected"
    return _check("cores", passed, "every physical core is used", observed, remedy)


def _governor(machine: Machine) -> Check:
    passed = None if machine.governor is None else machine.governor == "performance"
    remedy = "while measuring: sudo cpupower frequency-set -g performance"
    return _check("governor", passed, "performance", machine.governor or "not visible here", remedy)


def _swap(machine: Machine) -> Check:
    size = machine.swap_bytes
    observed = "unknown" if size is None else f"{size / 1e9:.1f} GB"
    return _check("swap", True if size == 0 else None, "none", observed, "while measuring: sudo swapoff -a")


def _disk(folder: Path) -> Check:
    free = shutil.disk_usage(folder).free
    expected = f"{DISK_BYTES / 1e9:.0f} GB free or more"
    return _check("disk", free >= DISK_BYTES, expected, f"{free / 1e9:.1f} GB free in {folder}", "free some space")


def _hub_home() -> Path:
    return Path(os.environ.get("HF_HOME") or Path.home() / ".cache/huggingface")


def _cache() -> Check:
    cache = Path(os.environ.get("HF_HUB_CACHE") or _hub_home() / "hub")
    nearest = next(folder for folder in (cache, *cache.parents) if folder.exists())
    passed = os.access(nearest, os.W_OK)
    state = "writable" if passed else "not writable"
    return _check("hub cache", passed, "writable folder", f"{cache}: {state}", "export HF_HOME=<a folder of yours>")


def _token() -> Check:
    held = bool(os.environ.get("HF_TOKEN")) or (_hub_home() / "token").is_file()
    remedy = "fine: the models in the catalogue are public; else: hf auth login"
    return _check("hub token", True if held else None, "set, for gated models", "set" if held else "not set", remedy)
