"""Weights of the official compiler's libraries: edgeq's solutions under mlc_llm's names, in its layouts and types.

With 4 bits every matrix is codes and scales, the two small ones of a delta net too; all other floats have the model's
type, norms included.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Job
from edgeq.backends.mlc import packing, tensor_cache
from edgeq.model import Model
from edgeq.quantize.solution import Solution
from edgeq.quantize.solve import as_float
from edgeq.size import is_quantized

Parameters = dict[str, tuple[tuple[int, ...], str]]
DTYPES = {"q4f16_1": "float16", "q4f32_1": "float32", "q0f16": "float16", "q0f32": "float32"}
"""The model's type by MLC's name of a quantization."""
_MERGED = {
    "q_proj": "c_attn",
    "k_proj": "c_attn",
    "v_proj": "c_attn",
    "gate_proj": "gate_up_proj",
    "up_proj": "gate_up_proj",
}
_FLOAT32 = (".A_log", ".dt_bias")


def names(model: Model) -> dict[str, tuple[str, ...]]:
    """Checkpoint tensors, rows side by side, that each parameter of an unquantized library holds.

    Queries of Qwen3.5 stay as the checkpoint has them, each head's gate after its query; so does its convolution.
    """
    found: dict[str, list[str]] = {}
    for tensor in model.tensors():
        found.setdefault(_name(tensor), []).append(tensor)
    return {name: tuple(tensors) for name, tensors in found.items()}


def parameters(model: Model, quantization: str) -> Parameters:
    """Shape and dtype of every parameter that a library wants, by name.

    With 4 bits, every matrix is codes and scales: Qwen3.5's `in_proj_a` and `in_proj_b`, which a recipe leaves alone
    elsewhere, too.
    """
    dtype, shapes = DTYPES[quantization], model.tensors()
    found: Parameters = {}
    for name, tensors in names(model).items():
        rows, rest = sum(shapes[tensor][0] for tensor in tensors), shapes[tensors[0]][1:]
        if quantization.startswith("q4") and len(rest) == 1:
            stem = name.removesuffix("weight")
            found[f"{stem}q_weight"] = (rows, rest[0] // 8), "uint32"
            found[f"{stem}q_scale"] = (rows, rest[0] // 32), dtype
        else:
            found[name] = (rows, *rest), "float32" if name.endswith(_FLOAT32) else dtype
    return found


def write(job: Job, wanted: Parameters, out: Path) -> None:
    """Write edgeq's weights as a tensor cache into the folder `out`, under the names of `parameters`.

    One matrix is held at a time. Raises what `solve` raises, and UnsupportedModel for values beyond float16.
    """
    model, every = job.checkpoint.model, names(job.checkpoint.model)
    with tensor_cache.Writer(out) as cache:
        for done, (name, tensors) in enumerate(every.items()):
            job.progress("weights", done, len(every))
            stem = name.removesuffix("weight")
            if f"{stem}q_weight" in wanted:
                packed = [packing.pack(_solved(job, tensor)) for tensor in tensors]
                words, scales = (np.concatenate(each) for each in zip(*packed, strict=True))
                cache.add(f"{stem}q_weight", words)
                cache.add(f"{stem}q_scale", scales.astype(wanted[f"{stem}q_scale"][1]))
            else:
                values = np.concatenate([_floats(job, model, tensor) for tensor in tensors])
                cache.add(name, values.astype(wanted[name][1]))
        job.progress("weights", len(every), len(every))


def for_built_in(folder: Path, model: Model, out: Path) -> None:
    """Write the weights of an official library's bundle again, under the built-in compiler's names and in its types.

    The same codes and values; but scales keep their type, and what that compiler leaves float32 is dequantized.
    """
    held = tensor_cache.records(folder)
    gates = model.generation == "3.5"
    with tensor_cache.Writer(out) as cache:
        for name in held:
            values = tensor_cache.read(folder, held[name])
            stem, _, last = name.rpartition(".")
            if stem.endswith("c_attn"):
                rows = len(values)
                both = np.arange(2 * model.heads * model.head_dim).reshape(model.heads, 2, -1)
                queries = both[:, 0].ravel() if gates else np.arange(0)
                rest = np.arange(both.size if gates else 0, rows)
                attention = stem.removesuffix("c_attn")
                cache.add(f"{attention}qkv_proj.{last}", values[np.concatenate([queries, rest])])
                if gates:
                    cache.add(f"{attention}q_gate_proj.{last}", values[both[:, 1].ravel()])
            elif stem.endswith(("in_proj_a", "in_proj_b")):
                if name.endswith(("in_proj_b.weight", "in_proj_b.q_weight")):
                    parts = [_dequantized(folder, held, stem.removesuffix("b") + each) for each in "ba"]
                    cache.add(f"{stem.removesuffix('b')}ba.weight", np.concatenate(parts))
            elif last == "conv1d_weight":
                cache.add(f"{stem}.conv1d.weight", values.squeeze(1).astype(np.float32))
            else:
                cache.add(name, values.astype(np.float32) if stem.endswith("norm") else values)


def _dequantized(folder: Path, held: Mapping[str, Mapping[str, Any]], stem: str) -> NDArray[np.float32]:
    """Float32 matrix of a parameter, whether it is codes or values."""
    if f"{stem}.weight" in held:
        return tensor_cache.read(folder, held[f"{stem}.weight"]).astype(np.float32)
    words = tensor_cache.read(folder, held[f"{stem}.q_weight"])
    scales = tensor_cache.read(folder, held[f"{stem}.q_scale"]).astype(np.float32)
    return packing.dequantize(words, scales, 4)


def _name(tensor: str) -> str:
    """Parameter of a library that holds a tensor."""
    for part, whole in _MERGED.items():
        tensor = tensor.replace(f".{part}.", f".{whole}.")
    return tensor.replace(".conv1d.weight", ".conv1d_weight")


def _solved(job: Job, tensor: str) -> Solution:
    found = job.solution(tensor)
    assert isinstance(found, Solution)
    return found


def _floats(job: Job, model: Model, tensor: str) -> NDArray[Any]:
    values = job.checkpoint.tensor(tensor)
    if is_quantized(tensor):
        return as_float(job.checkpoint, job.recipe, tensor, values)
    around_zero = model.generation == "3.5" and tensor.endswith("norm.weight")
    if around_zero and not tensor.endswith("linear_attn.norm.weight"):
        values += np.float32(1)  # transformers adds it when it runs
    return values
