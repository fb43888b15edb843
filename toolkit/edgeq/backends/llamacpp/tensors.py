"""Names, order and values that llama.cpp expects of a checkpoint's tensors.

Vectors of Qwen3.5 are stored as they are used: norms with the one that transformers adds, decays as -exp(A_log). Where
a delta net has more value heads than key heads, the checkpoint keeps the value heads of one key head side by side and
llama.cpp repeats the key heads as a whole, so value heads are dealt out in turn.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.model import LinearAttention, Model
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.size import TABLES

_OUTER = {TABLES[0]: "token_embd.weight", TABLES[1]: "output.weight", "model.norm.weight": "output_norm.weight"}
_INNER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.o_proj": "attn_output",
    "linear_attn.in_proj_qkv": "attn_qkv",
    "linear_attn.in_proj_z": "attn_gate",
    "linear_attn.in_proj_b": "ssm_beta",
    "linear_attn.in_proj_a": "ssm_alpha",
    "linear_attn.conv1d": "ssm_conv1d",
    "linear_attn.norm": "ssm_norm",
    "linear_attn.out_proj": "ssm_out",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_BARE = {"linear_attn.dt_bias": "ssm_dt.bias", "linear_attn.A_log": "ssm_a"}
_QKV = ("in_proj_qkv.weight", "conv1d.weight")
_PER_HEAD = ("in_proj_a.weight", "in_proj_b.weight", "dt_bias", "A_log")


def gguf_name(model: Model, name: str) -> str:
    """GGUF's name of a checkpoint tensor, for example `blk.0.attn_q.weight`."""
    if name in _OUTER:
        return _OUTER[name]
    _, _, layer, inner = name.split(".", 3)
    if inner in _BARE:
        return f"blk.{layer}.{_BARE[inner]}"
    stem, _, kind = inner.rpartition(".")
    found = _INNER[stem]
    if found == "ffn_norm" and model.generation == "3.5":
        found = "post_attention_norm"
    return f"blk.{layer}.{found}.{kind}"


def row_runs(model: Model, name: str) -> Iterator[tuple[int, int]]:
    """Runs of a checkpoint tensor's rows, first and one past the last, in the order of the file."""
    rows, linear = model.tensors()[name][0], model.linear
    if linear is None or ".linear_attn." not in name or not reorders(linear):
        yield 0, rows
    elif name.endswith(_QKV):
        first = rows - linear.value_heads * linear.value_head_dim
        yield 0, first
        yield from _heads(linear, linear.value_head_dim, first)
    elif name.endswith("in_proj_z.weight"):
        yield from _heads(linear, linear.value_head_dim, 0)
    elif name.endswith(_PER_HEAD):
        yield from _heads(linear, 1, 0)
    else:
        yield 0, rows


def columns(model: Model, name: str) -> NDArray[np.intp] | None:
    """Inputs of a matrix in the order of the file; None when that is the checkpoint's own order."""
    linear = model.linear
    if linear is None or not name.endswith("linear_attn.out_proj.weight") or not reorders(linear):
        return None
    return np.concatenate([np.arange(*run) for run in _heads(linear, linear.value_head_dim, 0)])


def reorders(linear: LinearAttention) -> bool:
    """Whether value heads change places."""
    return linear.value_heads > linear.key_heads


def with_columns(solution: Solution | BlockSolution, order: NDArray[np.intp]) -> Solution | BlockSolution:
    """Solution whose inputs are put in another order, which must keep each group and block together."""
    inputs = len(order)
    moved = {}
    for field in dataclasses.fields(solution):
        values = getattr(solution, field.name)
        if getattr(values, "ndim", 0) == 2:
            unit = inputs // values.shape[1]
            moved[field.name] = values[:, order[::unit] // unit]
    return dataclasses.replace(solution, **moved)


def float32(checkpoint: Checkpoint, name: str) -> NDArray[np.float32]:
    """Float32 values of a whole tensor, as llama.cpp uses them."""
    values, order = checkpoint.tensor(name), columns(checkpoint.model, name)
    values = np.concatenate([values[start:stop] for start, stop in row_runs(checkpoint.model, name)])
    if name.endswith("A_log"):
        return -np.exp(values)
    if name.endswith("conv1d.weight"):
        return values.squeeze(1)
    if checkpoint.model.generation == "3.5" and name.endswith("norm.weight") and ".linear_attn." not in name:
        return values + np.float32(1)
    return values if order is None else values[:, order]


def _heads(linear: LinearAttention, size: int, first: int) -> Iterator[tuple[int, int]]:
    """Runs of `size` rows, one for each value head: the first of every key head, then the second of each, ..."""
    each = linear.value_heads // linear.key_heads
    for turn in range(each):
        for key in range(linear.key_heads):
            start = first + (key * each + turn) * size
            yield start, start + size
