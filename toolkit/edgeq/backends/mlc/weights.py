"""A checkpoint's tensors under the names, in the order and in the types of a library's parameters.

Matrices that read the same input are one parameter, their rows side by side, and in tiles if it is a processor's. Norms
of Qwen3.5 are stored with the one that transformers adds, convolutions without their middle axis.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Job
from edgeq.backends.mlc import packing, tensor_cache
from edgeq.errors import BackendFault
from edgeq.model import Model
from edgeq.quantize.solution import Solution
from edgeq.quantize.solve import as_float, part
from edgeq.size import is_quantized, layout_of

_JOINED = {
    "qkv_proj": ("q_proj", "k_proj", "v_proj"),
    "q_gate_proj": ("q_proj",),
    "gate_up_proj": ("gate_proj", "up_proj"),
    "in_proj_ba": ("in_proj_b", "in_proj_a"),
}
Part = tuple[str, slice | NDArray[np.intp]]


def write(job: Job, parameters: Mapping[str, tuple[tuple[int, ...], str]], out: Path) -> None:
    """Write every parameter (name to shape and dtype) into the tensor cache of the folder `out`, one at a time.

    Raises BackendFault when a parameter comes out in another shape than the library wants, and what `solve` raises.
    """
    names = list(dict.fromkeys(map(_as_stored, parameters)))
    with tensor_cache.Writer(out) as cache:
        for done, stored in enumerate(names):
            job.progress("weights", done, len(names))
            for name, values in _tensors(job, stored).items():
                shape, dtype = parameters[name]
                if len(shape) > values.ndim:
                    values = packing.in_tiles(values, shape)
                if values.shape != shape:
                    raise BackendFault(f"{name} has shape {list(values.shape)}, the library wants {list(shape)}")
                cache.add(name, values.astype(dtype, copy=False))
        job.progress("weights", len(names), len(names))


def parts(model: Model, name: str) -> list[Part]:
    """Checkpoint tensors, and the rows of each, that make up the parameter of that name; `weight` is any layout."""
    module, _, kind = name.rpartition(".")
    before, _, last = module.rpartition(".")
    found: list[Part] = []
    for source in _JOINED.get(last, (last,)):
        rows: slice | NDArray[np.intp] = slice(None)
        if source == "q_proj" and model.generation == "3.5":  # rows of each head: queries, then their gates
            both = np.arange(2 * model.heads * model.head_dim).reshape(model.heads, 2, model.head_dim)
            rows = both[:, int(last == "q_gate_proj")].ravel()
        found.append((".".join(filter(None, (before, source, kind))), rows))
    return found


def _as_stored(name: str) -> str:
    """Name of a parameter as if it were a float's."""
    return name.replace(".q_weight", ".weight").replace(".q_scale", ".weight")


def _tensors(job: Job, name: str) -> dict[str, NDArray[Any]]:
    """Parameters that one name stands for: words and scales, or the values themselves."""
    checkpoint, recipe, model = job.checkpoint, job.recipe, job.checkpoint.model
    sources = parts(model, name)
    quantized = is_quantized(sources[0][0])
    if quantized and not layout_of(model, recipe, sources[0][0]).is_float:
        packed = [packing.pack(cast(Solution, part(job.solution(source), rows))) for source, rows in sources]
        words, scales = (np.concatenate(each) for each in zip(*packed, strict=True))
        module = name.removesuffix(".weight")
        return {f"{module}.q_weight": words, f"{module}.q_scale": scales}
    values = np.concatenate([checkpoint.tensor(source)[rows] for source, rows in sources])
    if quantized:
        stored = as_float(checkpoint, recipe, sources[0][0], values)
        return {name: stored.view("<u4") if stored.dtype.name == "bfloat16" else stored}
    if name.endswith("conv1d.weight"):
        values = values.squeeze(1)
    if model.generation == "3.5" and name.endswith("norm.weight") and not name.endswith("linear_attn.norm.weight"):
        values = values + np.float32(1)
    return {name: values}
