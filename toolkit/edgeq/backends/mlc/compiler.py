"""Compile a model for one device with the stock TVM wheel: no weights are needed, only shapes and a recipe."""

from __future__ import annotations

import importlib
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from edgeq.backends.mlc import report, schedules
from edgeq.backends.mlc.decoder import Decoder
from edgeq.backends.mlc.layers import Precision
from edgeq.backends.mlc.report import Kernel
from edgeq.bundle import MemoryPlan
from edgeq.errors import BackendFault
from edgeq.model import Model
from edgeq.recipe import Recipe

CHUNK = 256
"""Tokens of a prompt that run at once: temporary memory grows with it."""
VERIFY_CHUNK = 32
"""The same where all logits are wanted: 32 rows of a vocabulary of 248,320 are 32 MB."""
_BATCH = 4
_MODELS = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_5_text": "qwen3_5"}
_BOUNDS = {"batch_verify": {"n": VERIFY_CHUNK}, "batch_decode": {"b": _BATCH}}


@dataclass(frozen=True)
class Compiled:
    """An executable, its parameters in order (name to shape and dtype), its kernels, and the memory that it wants."""

    executable: Any
    parameters: Mapping[str, tuple[tuple[int, ...], str]]
    kernels: tuple[Kernel, ...]
    memory: MemoryPlan


def precision(recipe: Recipe, own: str, *, tiles: bool = False) -> Precision:
    """How a recipe is stored and computed; `own` is the checkpoint's 16-bit type, for w16 and tables of 16 bits.

    A float16 cache means float16 scales, and where matrices are not in tiles float16 activations too: paged attention
    reads and writes one type.
    """
    names = {"f32": "float32", "f16": "float16", "bf16": "bfloat16", "w16": own}
    floats = names.get(recipe.table.name, "float32")
    stored = "float16" if recipe.kv_bits == 16 else "float32"
    dtype = "float32" if tiles else stored
    return Precision(recipe.body, recipe.table, dtype, stored, floats, dict(recipe.chosen), tiles)


def compile_model(model: Model, how: Precision, target: Any, context: int) -> Compiled:
    """Executable for a `tvm.target.Target` whose host is set; raises BackendFault with TVM's words when it fails."""
    from tvm import relax, transform

    architecture = importlib.import_module(f"edgeq.backends.mlc.models.{_MODELS[model.model_type]}")
    taken: dict[str, str] = {}
    found: dict[str, Any] = {}
    try:
        with target:
            decoder: Decoder = architecture.decoder(model, how, target)
            module, named = decoder.export_tvm(decoder.functions())
        parameters = {name: (tuple(map(int, each.shape)), str(each.dtype)) for name, each in named}
        pipeline = _pipeline(target, _description(model, how, context, decoder, parameters), taken, found)
        with target, transform.PassContext(opt_level=3):
            executable = relax.build(module, target=target, relax_pipeline=pipeline)
    except Exception as error:  # TVM raises errors of every kind, and edgeq's own come back from it as RuntimeError
        raise BackendFault(
            f"TVM cannot compile {model.model_type} for {target.kind.name}",
            why=str(error).strip().rpartition("\n")[2],
            run="compare the limits in the target's [mlc] table with the device's; else edgeq doctor",
        ) from error
    calls = {name: found["calls"].get(name, 0) for name in sorted(taken)}
    kernels = tuple(Kernel(name, taken[name], times, times * found["bytes"][name]) for name, times in calls.items())
    memory = MemoryPlan(
        weights_bytes=sum(map(_bytes, parameters.values())),
        kv_cache_bytes_per_token=found.get("kv_cache_bytes_per_token") or decoder.cache_bytes,
        state_bytes=sum(map(_bytes, decoder.states)),
        temporary_bytes=found["temporary_bytes"],
    )
    return Compiled(executable, parameters, kernels, memory)


def _description(
    model: Model, how: Precision, context: int, decoder: Decoder, parameters: Mapping[str, tuple[tuple[int, ...], str]]
) -> dict[str, Any]:
    """What the library says of itself, by the keys of MLC's libraries; `states`, `caches`, `verify_chunk_size`
    and the kind of state `plain` are edgeq's."""
    return {
        "model_type": model.model_type,
        "quantization": f"{'mix' if how.chosen else f'{how.body.name}-{how.table.name}'}-{how.dtype}",
        "context_window_size": context,
        "prefill_chunk_size": CHUNK,
        "verify_chunk_size": VERIFY_CHUNK,
        "max_batch_size": _BATCH,
        "kv_state_kind": "plain" if decoder.plain else "hybrid" if decoder.states else "kv_cache",
        "caches": [
            {"shape": [-1 if size == "blocks" else size for size in shape], "dtype": dtype}
            for shape, dtype in decoder.caches
        ],
        "states": [{"shape": list(shape), "dtype": dtype} for shape, dtype in decoder.states],
        "params": [{"name": name, "shape": shape, "dtype": dtype} for name, (shape, dtype) in parameters.items()],
    }


def _pipeline(target: Any, description: Mapping[str, Any], taken: dict[str, str], found: dict[str, Any]) -> Any:
    """Passes from layers to the virtual machine's code; what they see on the way is entered in `taken` and `found`."""
    from tvm import relax, transform

    return transform.Sequential(
        [
            _bounds(),
            _metadata(description),
            relax.transform.FuseTransposeMatmul(),
            relax.transform.LegalizeOps(),
            relax.transform.AnnotateTIROpPattern(),
            relax.transform.FoldConstant(),
            relax.transform.FuseOps(),
            relax.transform.FuseTIR(),
            relax.transform.DeadCodeElimination(),
            report.measure(found),
            schedules.apply(target, taken),
            relax.transform.RewriteDataflowReshape(),
            report.count(found),
            relax.transform.ToNonDataflow(),
            relax.transform.RemovePurityChecking(),
            relax.transform.CallTIRRewrite(),
            relax.transform.StaticPlanBlockMemory(),
            report.plan(found),
            relax.transform.LowerAllocTensor(),
            relax.transform.KillAfterLastUse(),
            relax.transform.LowerRuntimeBuiltin(),
            relax.transform.ComputePrimValue(),
            relax.transform.VMShapeLower(),
            relax.transform.AttachGlobalSymbol(),
        ]
    )


def _bytes(tensor: tuple[Sequence[int], str]) -> int:
    """Bytes of a tensor by shape and dtype."""
    shape, dtype = tensor
    return math.prod(shape) * np.dtype(dtype).itemsize


def _bounds() -> Any:
    """Pass that tells each function how large its symbolic sizes get, which the memory plan needs."""
    import tvm
    from tvm import relax

    @tvm.transform.module_pass(opt_level=0, name="edgeq_bounds")
    def run(module: Any, _: Any) -> Any:
        for variable, function in list(module.functions_items()):
            if isinstance(function, relax.Function):
                bounds = {"n": CHUNK, "m": 1} | _BOUNDS.get(variable.name_hint, {})
                module[variable] = function.with_attr("tir_var_upper_bound", bounds)
        return module

    return run


def _metadata(values: Mapping[str, Any]) -> Any:
    """Pass that adds `_metadata`, which gives the library's own description as JSON."""
    import tvm
    from tvm import relax

    @tvm.transform.module_pass(opt_level=0, name="edgeq_metadata")
    def run(module: Any, _: Any) -> Any:
        builder = relax.BlockBuilder(module)
        with builder.function("_metadata", params=[]):
            builder.emit_func_output(relax.StringImm(json.dumps(values)))
        return builder.finalize()

    return run
