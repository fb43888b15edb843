"""MLC's way: the model is compiled for one device, on any host, and run by TVM's virtual machine."""

from __future__ import annotations

import os
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq import size
from edgeq.bundle import Bundle, Compiled
from edgeq.errors import MissingTool, UsageFault
from edgeq.machine import physical_cores, this_machine
from edgeq.model import Model, read_config
from edgeq.recipe import Layout, Recipe, plain
from edgeq.target import Target

if TYPE_CHECKING:
    from edgeq.backends.base import Job, Session

ENGINE = ("apache-tvm", "apache-tvm-ffi")
MIXED = ("w2g64", "w4g128", "w4g32", "w8g32")
JOINED = {"up_proj": "gate_proj"}
# A library's bytes, of a model without and with a delta net: the least with a fixed recipe, and the most with every
# layout in every kind of layer, of the demos and the shapes of Qwen3-0.6B and Qwen3.5-0.8B. OpenCL's are source.
_LIBRARY_BYTES = {
    "llvm": ((290_000, 677_000), (510_000, 979_000)),
    "cuda": ((846_000, 1_890_000), (1_767_000, 3_948_000)),
    "metal": ((810_000, 2_345_000), (1_692_000, 4_898_000)),
}
_SOURCE_BYTES = (1_125_000, 4_973_000), (2_350_000, 10_387_000)
_THREADS = {"TVM_THREAD_POOL_SPIN_COUNT": "100", "TVM_BIND_THREADS": "0"}
"""Threads of TVM give way 100 times before they sleep, which is as fast as its own 300,000 on an idle machine, and are
moved by the system when another process wants their core.
"""
OFFICIAL_PYTHON = "EDGEQ_MLC_PYTHON"
"""Environment variable that names the Python of an official compiler, which then compiles."""


def provider(target: Target) -> str:
    """API of the target's kernels: `cpu`, or what its code generator is for."""
    return "cpu" if target.code_generator == "llvm" else target.code_generator


def scale_bits(recipe: Recipe) -> int:
    """Scales have the type of the cache."""
    return recipe.kv_bits


def activation_group(target: Target, layout: Layout) -> int:
    """32 on processors, where groups of weights are not smaller; GPUs multiply floats."""
    return 32 if target.code_generator == "llvm" and not layout.is_float and layout.group != 16 else 0


def calibrates_cache(recipe: Recipe) -> bool:  # noqa: ARG001
    """Its caches are in floats."""
    return False


def beside_bytes(job: Job) -> int:
    """Bytes of vectors, and those that a library has at least; with a mix, whose layouts want kernels each, at most."""
    model = job.checkpoint.model
    least, most = _LIBRARY_BYTES.get(job.target.code_generator, _SOURCE_BYTES)[model.linear is not None]
    return size.float_bytes(model) + (most if job.recipe.mixed else least)


def check(model: Model, recipe: Recipe) -> None:  # noqa: ARG001
    """Raise UsageFault for GGML's layouts, zero points, an 8-bit cache, and what a chosen official compiler lacks."""
    if recipe.body.is_ggml or recipe.table.is_ggml:
        raise UsageFault(f"{recipe}: MLC does not know GGML's layouts", run="edgeq build ... --backend llamacpp")
    if not recipe.body.symmetric:
        near = replace(recipe, body=plain(recipe.body.bits, recipe.body.group))
        raise UsageFault(f"{recipe}: MLC's layout has no room for zero points", run=f"edgeq build ... --recipe {near}")
    if recipe.kv_bits == 8:
        raise UsageFault(
            f"{recipe}: the mlc backend keeps keys and values in float32 or float16",
            run=f"edgeq build ... --recipe {str(recipe).rpartition('-')[0]}-kv16",
        )
    if os.environ.get(OFFICIAL_PYTHON):
        from edgeq.backends.mlc import official

        official.quantization(recipe)


def tools(target: Target) -> tuple[str, ...]:
    """Names and versions of what compiles, and of the TVM that runs the gate; raises MissingTool when one is absent."""
    from edgeq.backends.mlc import library, official

    found = (*_versions(), library.linker())
    return (*found, official.find(official.without(target)).version) if official.is_chosen(target) else found


def build(job: Job, out: Path) -> Compiled:
    """Write a library for the target, the weights in MLC's layout, and what was compiled into `out`.

    Raises BackendFault when a compiler fails or refuses a kernel, or the code wants another size of weights or cache
    than was planned; MissingTool when nothing here links for the target.
    """
    from edgeq.backends.mlc import official

    if official.is_chosen(job.target):
        return official.build(job, out)
    from edgeq.backends.mlc import built_in

    return built_in.build(job, out)


def load(folder: Path, bundle: Bundle) -> Session:
    """Session of a built folder: its library where this machine can run it, else the same model compiled for its CPU.

    CUDA kernels that are source are compiled by this machine's nvcc, once, and kept in the folder that
    EDGEQ_KERNEL_CACHE names, or in the user's cache. Raises MissingTool when TVM is absent or another version than the
    one that edgeq is made for.
    """
    _versions()
    for name, value in {**_THREADS, "TVM_NUM_THREADS": str(physical_cores())}.items():
        os.environ.setdefault(name, value)
    import tvm

    from edgeq.backends.mlc import built_in, devices, kernels, library, official_weights, report
    from edgeq.backends.mlc.session import MlcSession

    made, path = report.read(folder), library.find(folder)
    device = devices.find(bundle.provider)
    if device is not None and library.is_for_this_machine(path) and set(made.isa) <= set(this_machine().isa):
        with kernels.cache_compiled(kernels.cache_folder()):
            session = MlcSession(tvm.runtime.load_module(str(path)), device, folder, bundle)
            if bundle.provider == "cuda" and bundle.kernels == "unchecked":
                next(session.generate([0], 1))  # a kernel may be compiled when it is first launched
        return session
    executable = built_in.for_this_cpu(bundle, made)
    if made.compiler == report.BUILT_IN:
        return MlcSession(executable, tvm.cpu(), folder, bundle)
    with tempfile.TemporaryDirectory() as scratch:
        official_weights.for_built_in(folder, read_config(bundle.config), Path(scratch))
        return MlcSession(executable, tvm.cpu(), Path(scratch), bundle)


def _versions() -> tuple[str, ...]:
    """Names and versions of TVM's packages; raises MissingTool when one is absent or another than edgeq's."""
    from edgeq.backends.mlc import checks

    found = {name: checks.version(name) for name in ENGINE}
    pins = checks.pinned()
    for name, version in found.items():
        if version is None:
            raise MissingTool(f"the mlc backend needs {name}", run=checks.INSTALL)
        if version != pins.get(name, version):
            raise MissingTool(
                f"{name} {version} is installed, edgeq needs {pins[name]}",
                why="Libraries and TVM's own interface change from version to version.",
                run=checks.INSTALL,
            )
    return tuple(f"{name} {version}" for name, version in found.items())
