"""Can llama.cpp be compiled for this device, and does the one that is installed run there? Nothing is compiled."""

from __future__ import annotations

import importlib.metadata
import os
import re
import sys
from pathlib import Path
from typing import NamedTuple

import msgspec

from edgeq.backends import findings as looking
from edgeq.backends.findings import Finding
from edgeq.backends.llamacpp import install, system
from edgeq.backends.llamacpp.devices import Device, Report
from edgeq.machine import Machine
from edgeq.target import Target

_ENGINE = "llama.cpp"
_NOWHERE = Path(os.devnull)
_ASK = (sys.executable, "-P", "-m", "edgeq.backends.llamacpp.devices")
_ASK_SECONDS = 60.0
_NO_DEVICE = {
    "cpu": "report this: a CPU is always there",
    "cuda": "nvidia-smi has to list it; a container needs --gpus all, on a Jetson --runtime nvidia",
    "vulkan": "install the GPU's driver (Mesa's, for AMD and Intel), and join the groups render and video",
    "metal": "run on the Mac itself: virtual machines and containers have no Metal",
}


class Engine(NamedTuple):
    """The installed llama-cpp-python: its version (None: absent), and its report or why there is none."""

    version: str | None = None
    report: Report | None = None
    fault: str = ""

    def has(self, api: str) -> bool:
        """Whether it was compiled for an API."""
        return self.report is not None and api in self.report.backends


def findings(target: Target, machine: Machine, root: Path, *, here: bool) -> list[Finding]:
    """Everything that llama.cpp needs for `target`, looked for below `root`; `here`: this machine is the target.

    On another machine all are unknown, and nothing is looked at: what is here says nothing of the device.
    """
    engine, place = (ask(), root) if here else (Engine(), _NOWHERE)
    tools = [_spared(each, target, engine) for each in system.tools(target, place)]
    drivers = system.drivers(target, machine, place)
    found = [*tools, *drivers, _compiled_in(target, engine), _devices(target, engine)]
    return found if here else [_elsewhere(each, target) for each in found]


def _elsewhere(found: Finding, target: Target) -> Finding:
    remedy = "check again on the device itself"
    if found.name == _ENGINE:
        remedy += f"; what installs it there: {install.line(target)}"
    return found._replace(passed=None, observed="this is another machine", remedy=remedy)


def ask() -> Engine:
    """The installed engine, asked in a process of its own: a library that does not suit the machine may end it."""
    try:
        version = importlib.metadata.version("llama-cpp-python")
    except importlib.metadata.PackageNotFoundError:
        return Engine()
    answer, fault = looking.ask(_ASK, _ASK_SECONDS, "it")
    if fault:
        return Engine(version, fault=fault)
    try:
        return Engine(version, msgspec.json.decode(answer, type=Report))
    except ValueError as error:
        return Engine(version, fault=f"its answer cannot be read: {error}")


def _spared(found: Finding, target: Target, engine: Engine) -> Finding:
    """A missing compiler is no fault where nothing has to be compiled."""
    if found.passed is not False:
        return found
    if engine.has(target.api):
        return found._replace(passed=None, remedy=f"only to compile llama.cpp again: {found.remedy}")
    if target.backends[0] != "llamacpp" and engine.version is None:
        return found._replace(passed=None, remedy=f"only for the llamacpp backend: {found.remedy}")
    return found


def _compiled_in(target: Target, engine: Engine) -> Finding:
    name, expected = _ENGINE, f"llama-cpp-python, compiled for {target.api}"
    if engine.version is None:
        passed = None if target.backends[0] != "llamacpp" else False
        return Finding(name, passed, expected, "llama-cpp-python is not installed", install.line(target))
    wanted = install.pinned() or engine.version
    again = install.again(target, wanted)
    if engine.version != wanted:
        return Finding(name, False, f"llama-cpp-python {wanted}", engine.version, again)
    if engine.report is None:
        return Finding(name, False, expected, f"{engine.version}: {engine.fault}", again)
    observed = f"{engine.version} for {', '.join(engine.report.backends)}"
    lacking = install.lacking(target.cpu.isa, engine.report.features)
    if lacking and target.api == "cpu" and engine.has("cpu"):
        words = ", ".join(lacking)
        return Finding(
            name, None, f"{expected} with {words}", f"{observed}, without {words}: prompts are slower", again
        )
    compiled = re.search(r"ARCHS = ([\d,]+)", engine.report.features)
    if not (compiled and target.gpu and engine.has(target.api)):
        return Finding(name, engine.has(target.api), expected, observed, again)
    suits = f"{target.gpu.arch.removeprefix('sm_')}0" in compiled[1].split(",")
    observed += f", architectures {compiled[1]}"
    return Finding(name, suits or None, f"{expected}, {target.gpu.arch}", observed, again)


def _devices(target: Target, engine: Engine) -> Finding:
    name, expected = "llama.cpp devices", "the CPU" if target.api == "cpu" else f"a {target.api} device that is a GPU"
    if engine.report is None or not engine.has(target.api):
        return Finding(name, None, expected, "it cannot be asked", "first put right what is said of llama.cpp above")
    real = [each for each in engine.report.devices if each.api == target.api and not each.software]
    observed = ", ".join(map(_describe, engine.report.devices)) or "none"
    return Finding(name, bool(real), expected, observed, _NO_DEVICE[target.api])


def _describe(device: Device) -> str:
    return f"{device.name} {device.description}" + (" (software)" if device.software else "")
