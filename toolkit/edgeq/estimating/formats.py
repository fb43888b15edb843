"""Bytes of files that others publish, by the names of their quantizations: Q4_K_M, MLX's 4bit and the like."""

from __future__ import annotations

import math

from edgeq import size
from edgeq.model import Model

_Q5_0, _Q8_0 = 5.5, 8.5  # bits of a weight, scales counted: ggml's `ggml-common.h`
_Q4_K, _Q5_K, _Q6_K = 4.5, 5.5, 6.5625
_FALLBACK = {_Q4_K: _Q5_0, _Q5_K: 6.0, _Q6_K: _Q8_0}  # for rows that blocks of 256 do not divide
_K_BLOCK = 256
_PLAIN = {
    "q4_0": 4.5,
    "q4_1": 5.0,
    "q8_0": _Q8_0,
    "bf16": 16.0,
    "f16": 16.0,
    "4bit": 4.5,
    "8bit": 8.5,
    "4bit-g32": 5.0,
    "q4f16": 4.5,
}
"""The same for all matrices. MLX's groups of 64 have a scale and a bias of 16 bits, MLC's groups of 32 a scale."""
_MIXED = {"q4_k_m": (_Q4_K, _Q5_K)}
"""Bits of most matrices, and of a delta net's joint projection of queries, keys and values."""
_K_BITS = (4.6, 7.5)  # llama.cpp's K mixes of four to six bits; Q4_0 is below
_FLOAT_BITS = 12
NAMES = (*_PLAIN, *_MIXED)


def usual(runtime: str) -> str:
    """What people run with a runtime that edgeq does not build for."""
    return {"ollama": "Q4_K_M", "rkllm": "8bit"}.get(runtime, "4bit")


def name_of_size(model: Model, weights_bytes: int) -> str:
    """Published quantization that a file of so many bytes is most like, by its bits per weight."""
    bits = 8 * weights_bytes / model.parameters
    if bits < _K_BITS[0]:
        return "q4_0"
    if bits < _K_BITS[1]:
        return "q4_k_m"
    return "q8_0" if bits < _FLOAT_BITS else "bf16"


def recipe_like(name: str) -> str:
    """Recipe that moves what a published quantization moves: its kind of blocks, keys and values in 16 bits."""
    if name.lower() in _MIXED:
        return "q4_k-eq6_k-rtn-kv16"
    bits = _PLAIN[_canonical(name)]
    return "f16-kv16" if bits == 16 else f"w{8 if bits > 8 else 4}g32-e{8 if bits > 8 else 4}-rtn-kv16"


def known(name: str) -> bool:
    """Whether a name is a published quantization's."""
    return _canonical(name) in NAMES


def _canonical(name: str) -> str:
    return name.lower().replace(" ", "-")


def weight_bytes(model: Model, name: str) -> int | None:
    """Bytes of a model's weights in a published quantization, tokenizer not counted; None for a name not known.

    Vectors are float32. Q4_K_M follows llama.cpp's own choice (`llama-quant.cpp`): six bits for the output layer, and
    for the values and the feed-forward's output of the first and last eighth of the layers and every third between.
    """
    name = _canonical(name)
    if name not in NAMES:
        return None
    bits = 0.0
    for tensor, shape in model.tensors().items():
        count = math.prod(shape)
        bits += count * (_bits(model, name, tensor, shape[1]) if _is_matrix(tensor) else 32)
    return int(bits) // 8


def _is_matrix(tensor: str) -> bool:
    return size.is_quantized(tensor) or ".in_proj_" in tensor


def _bits(model: Model, name: str, tensor: str, inputs: int) -> float:
    """Bits of a weight in one matrix."""
    if name in _PLAIN:
        return _PLAIN[name]
    most, joint = _MIXED[name]
    output = size.TABLES[0] if model.tied else size.TABLES[1]
    if tensor == output or (tensor.endswith(("v_proj.weight", "down_proj.weight")) and _more(model, tensor)):
        found = _Q6_K
    else:
        found = joint if tensor.endswith("in_proj_qkv.weight") else most
    return found if inputs % _K_BLOCK == 0 else _FALLBACK[found]


def _more(model: Model, tensor: str) -> bool:
    """Whether llama.cpp gives a layer more bits; values count the layers that have attention."""
    layer, layers = int(tensor.split(".")[2]), model.layers
    if tensor.endswith("v_proj.weight"):
        layer, layers = model.layer_types[:layer].count("full_attention"), model.full_attention_layers
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2
