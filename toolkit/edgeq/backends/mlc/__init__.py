"""MLC's way: the model is compiled for one device, on any host, and run by TVM's virtual machine."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path

from edgeq import size
from edgeq.backends.base import Job, Session
from edgeq.bundle import Bundle, Compiled, Memory
from edgeq.errors import BackendFault, MissingTool, UsageFault
from edgeq.machine import physical_cores, this_machine
from edgeq.model import Model, read_config
from edgeq.recipe import Recipe, parse
from edgeq.target import Target

ENGINE = ("apache-tvm", "apache-tvm-ffi")
_VERSIONS = {"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.13.post2"}
"""Tried together; the younger ffi that pip takes by itself crashes when it builds for CUDA."""
_INSTALL = "pip install 'edgeq[tvm]'"
_LARGEST_DIFFERENCE = 0.01


def provider(target: Target) -> str:
    """API of the target's kernels: `cpu`, or what its code generator is for."""
    return "cpu" if target.code_generator == "llvm" else target.code_generator


def scale_bits(recipe: Recipe) -> int:
    """Scales have the type of the activations, which is that of the cache."""
    return recipe.kv_bits


def check(model: Model, recipe: Recipe) -> None:  # noqa: ARG001
    """Raise UsageFault for GGML's layouts and for an 8-bit cache."""
    if recipe.body.is_ggml or recipe.table.is_ggml:
        raise UsageFault(f"{recipe}: MLC does not know GGML's layouts", run="edgeq build ... --backend llamacpp")
    if recipe.kv_bits == 8:
        raise UsageFault(
            f"{recipe}: the mlc backend keeps keys and values in float32 or float16",
            run=f"edgeq build ... --recipe {str(recipe).rpartition('-')[0]}-kv16",
        )


def tools(target: Target) -> tuple[str, ...]:  # noqa: ARG001
    """Names and versions of the packages that compile; raises MissingTool when one is absent or another version."""
    return _versions(_INSTALL)


def build(job: Job, out: Path) -> Compiled:
    """Write a library for the target, the weights in MLC's layout, and what was compiled into `out`.

    Raises BackendFault when the device's compiler refuses a kernel, or the code wants another size of weights or cache
    than was planned; MissingTool when nothing here links for the target.
    """
    from edgeq.backends.mlc import compiler, devices, kernels, library, report, weights
    from edgeq.backends.mlc.report import Report

    target, model = job.target, job.checkpoint.model
    how = compiler.precision(job.recipe, "float16" if job.checkpoint.dtype(size.TABLES[0]) == "F16" else "bfloat16")
    job.progress("compile", 0, 1)
    with kernels.kept_as_source():
        made = compiler.compile_model(model, how, devices.tvm_target(target), job.context)
    found = kernels.check(made.executable, target.code_generator, target.gpu.arch if target.gpu else "")
    library.export(made.executable, out, target.host, found.binaries)
    job.progress("compile", 1, 1)
    report.write(Report(isa=target.cpu.isa, floats=how.floats, kernels=made.kernels), out)
    _hold_against_plan(model, job.recipe, made.memory)
    weights.write(job, made.parameters, out)
    return Compiled(kernels=found.state if found.names else None, memory=made.memory)


def load(folder: Path, bundle: Bundle) -> Session:
    """Session of a built folder: its library where this machine can run it, else the same model compiled for its CPU.

    Raises MissingTool when TVM is absent or another version than the one that compiled.
    """
    _versions(f"edgeq doctor --target {bundle.target}")
    os.environ.setdefault("TVM_NUM_THREADS", str(physical_cores()))
    import tvm

    from edgeq.backends.mlc import compiler, devices, library, report
    from edgeq.backends.mlc.session import MlcSession

    made, path = report.read(folder), library.find(folder)
    device = devices.find(bundle.provider)
    if device is not None and library.is_for_this_machine(path) and set(made.isa) <= set(this_machine().isa):
        return MlcSession(tvm.runtime.load_module(str(path)), device, folder, bundle)
    how = compiler.precision(parse(bundle.recipe), made.floats)
    compiled = compiler.compile_model(read_config(bundle.config), how, devices.this_cpu(), bundle.context)
    return MlcSession(compiled.executable, tvm.cpu(), folder, bundle)


def _versions(run: str) -> tuple[str, ...]:
    """Names and versions of TVM's packages; raises MissingTool when one is absent or another than edgeq's."""
    for name, wanted in _VERSIONS.items():
        try:
            found = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingTool(f"the mlc backend needs {name}", run=_INSTALL) from error
        if found != wanted:
            raise MissingTool(
                f"{name} {found} is installed, edgeq needs {wanted}",
                why="Libraries and TVM's own interface change from version to version.",
                run=run,
            )
    return tuple(f"{name} {version}" for name, version in _VERSIONS.items())


def _hold_against_plan(model: Model, recipe: Recipe, memory: Memory) -> None:
    """Raise BackendFault when compiled code wants more or less memory than edgeq predicts from shapes."""
    predicted = {
        "weights_bytes": size.weight_bytes(model, recipe, scale_bits(recipe)),
        "kv_cache_bytes_per_token": model.kv_bytes_per_token(recipe.kv_bits // 8),
    }
    for name, wanted in predicted.items():
        if abs(getattr(memory, name) / wanted - 1) > _LARGEST_DIFFERENCE:
            raise BackendFault(
                f"the compiled code has {name} {getattr(memory, name)}, {wanted} were predicted",
                why="It is not the code of this model and recipe.",
            )
