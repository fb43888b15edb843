"""MLC's way: the model is compiled for one device, on any host, and run by TVM's virtual machine."""

from __future__ import annotations

import contextlib
import importlib.metadata
import json
import os
from pathlib import Path
from typing import Any

import msgspec

from edgeq import size
from edgeq.backends.base import Job, Session
from edgeq.bundle import Bundle, Compiled, Memory
from edgeq.errors import BackendFault, MissingTool, UsageFault
from edgeq.machine import physical_cores
from edgeq.model import Model, read_config
from edgeq.recipe import Recipe, parse
from edgeq.target import Target

ENGINE = ("apache-tvm", "apache-tvm-ffi")
REPORT = "kernels.json"
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
    return _check_versions("the mlc backend")


def build(job: Job, out: Path) -> Compiled:
    """Write a library for the target, the weights in MLC's layout, and the list of kernels into `out`."""
    from edgeq.backends.mlc import compiler, devices, kernels, library, weights

    target, model = job.target, job.checkpoint.model
    own = "float16" if job.checkpoint.dtype(size.TABLES[0]) == "F16" else "bfloat16"
    job.progress("compile", 0, 1)
    with kernels.kept_as_source():
        made = compiler.compile_model(
            model, compiler.precision(job.recipe, own), devices.tvm_target(target), job.context
        )
    found = kernels.check(made.executable, target.code_generator, target.gpu.arch if target.gpu else "")
    library.export(made.executable, out, target.host, found.binaries)
    job.progress("compile", 1, 1)
    (out / REPORT).write_bytes(msgspec.json.format(msgspec.json.encode(made.kernels)) + b"\n")
    _hold_against(model, job.recipe, made.memory)
    weights.write(job, made.parameters, out)
    return Compiled(kernels=None if target.code_generator == "llvm" else found.state, memory=made.memory)


def load(folder: Path, bundle: Bundle) -> Session:
    """Session of a built folder: its library where this machine can run it, else the same model compiled for its CPU."""
    _check_versions("this bundle")
    os.environ.setdefault("TVM_NUM_THREADS", str(physical_cores()))
    import tvm

    from edgeq.backends.mlc import devices, library
    from edgeq.backends.mlc.session import MlcSession

    device = devices.find(bundle.provider)
    if device is not None and library.runs_here(folder):
        module = tvm.runtime.load_module(str(library.find(folder)))
        return MlcSession(module, device, folder, bundle)
    return MlcSession(_for_this_cpu(folder, bundle), tvm.cpu(), folder, bundle)


def _for_this_cpu(folder: Path, bundle: Bundle) -> Any:
    """Executable of a bundle's model for the CPU at hand."""
    from edgeq.backends.mlc import compiler, devices, tensor_cache

    own = {"float16": "float16"}.get(tensor_cache.records(folder)[_ANY_MATRIX]["dtype"], "bfloat16")
    how = compiler.precision(parse(bundle.recipe), own)
    return compiler.compile_model(read_config(bundle.config), how, devices.this_cpu(), bundle.context).executable
