"""How many bytes a model's weights take under a recipe: arithmetic on shapes, nothing is read."""

from __future__ import annotations

import math

from edgeq.model import Model
from edgeq.recipe import SCALE_BITS, Recipe

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_MATRICES = ("_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight")
_FLOAT_BYTES = 4
_HALF_BYTES = 2


def is_quantized(name: str) -> bool:
    """Whether a recipe's bits apply to the tensor of that (text-only) name.

    True for the projections of the layers and for both tables. Vectors, the convolution and the two small
    `in_proj_a`, `in_proj_b` of a delta-net layer stay float32.
    """
    return name in TABLES or name.endswith(_MATRICES)


def weight_bytes(model: Model, recipe: Recipe) -> int:
    """Predicted bytes of all weights: packed bits and one float32 scale per group of inputs; a tied table once."""
    return sum(_tensor_bytes(name, shape, recipe) for name, shape in model.tensors().items())


def bits_per_weight(model: Model, recipe: Recipe) -> float:
    """Predicted mean bits per weight of the whole text model."""
    return 8 * weight_bytes(model, recipe) / model.parameters


def _tensor_bytes(name: str, shape: tuple[int, ...], recipe: Recipe) -> int:
    if recipe.bits == 16:
        return math.prod(shape) * _HALF_BYTES
    if not is_quantized(name):
        return math.prod(shape) * _FLOAT_BYTES
    rows, inputs = shape
    bits = recipe.table_bits if name in TABLES else recipe.bits
    groups = math.ceil(inputs / recipe.group)
    return rows * groups * (recipe.group * bits + SCALE_BITS) // 8
