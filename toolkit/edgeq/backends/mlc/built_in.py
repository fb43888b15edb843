"""The built-in compiler's way from a job to a folder: compile, check, link, hold against the plan, write weights."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from edgeq import size
from edgeq.backends.base import Job
from edgeq.backends.mlc import compiler, devices, kernels, library, report, weights
from edgeq.backends.mlc.report import BUILT_IN, Report
from edgeq.bundle import Bundle, Compiled, MemoryPlan
from edgeq.errors import BackendFault
from edgeq.model import Model, read_config
from edgeq.recipe import Recipe, layout, parse

_LARGEST_DIFFERENCE = 0.01


def build(job: Job, out: Path) -> Compiled:
    """Write library, weights and report into `out`; raises as the backend's `build` does."""
    target, model = job.target, job.checkpoint.model
    own = "float16" if job.checkpoint.dtype(size.TABLES[0]) == "F16" else "bfloat16"
    how = compiler.precision(job.recipe, own, tiles=target.code_generator == "llvm")
    job.progress("compile", 0, 1)
    with kernels.kept_as_source():
        made = compiler.compile_model(model, how, devices.tvm_target(target), job.context)
    _hold_against_plan(model, job.recipe, made.memory)
    found = kernels.check(made.executable, target.code_generator, target.gpu.arch if target.gpu else "")
    library.export(made.executable, out, target.host, found.binaries)
    job.progress("compile", 1, 1)
    told = Report(
        compiler=BUILT_IN,
        isa=target.cpu.isa,
        dtype=how.dtype,
        floats=how.floats,
        kernels=made.kernels,
        tiles=how.tiles,
    )
    report.write(told, out)
    weights.write(job, made.parameters, out)
    return Compiled(kernels=found.state if found.names else None, memory=made.memory)


def for_this_cpu(bundle: Bundle, made: Report) -> Any:
    """Executable for the CPU at hand of a bundle's model, which reads the weights as they were made for another."""
    chosen = tuple((name, layout(word)) for name, word in (bundle.layouts or {}).items())
    how = compiler.precision(dataclasses.replace(parse(bundle.recipe), chosen=chosen), made.floats, tiles=made.tiles)
    return compiler.compile_model(read_config(bundle.config), how, devices.this_cpu(), bundle.context).executable


def _hold_against_plan(model: Model, recipe: Recipe, memory: MemoryPlan) -> None:
    """Raise BackendFault when compiled code wants more or less memory than edgeq predicts from shapes."""
    predicted = {
        "weights_bytes": size.weight_bytes(model, recipe, recipe.kv_bits),
        "kv_cache_bytes_per_token": model.kv_bytes_per_token(recipe.kv_bits // 8),
    }
    for name, wanted in predicted.items():
        if abs(getattr(memory, name) / wanted - 1) > _LARGEST_DIFFERENCE:
            raise BackendFault(
                f"the compiled code has {name} {getattr(memory, name)}, {wanted} were predicted",
                why="It is not the code of this model and recipe.",
            )
