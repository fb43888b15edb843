"""How many bytes a model's weights take under a recipe: arithmetic on shapes, nothing is read."""

from __future__ import annotations

import math
from collections.abc import Iterator

from edgeq.errors import UsageFault
from edgeq.model import Model
from edgeq.recipe import Recipe

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_MATRICES = ("_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight")
_FLOAT_BYTES = 4


def is_quantized(name: str) -> bool:
    """Whether a recipe's bits apply to the tensor of that (text-only) name.

    True for the projections of the layers and for both tables. Vectors, the convolution and the two small
    `in_proj_a`, `in_proj_b` of a delta-net layer stay float32.
    """
    return name in TABLES or name.endswith(_MATRICES)


def check_groups(model: Model, recipe: Recipe) -> None:
    """Raise UsageFault, naming the matrix, when a recipe's group does not divide the inputs of a matrix."""
    for name, inputs in _undivided(model, recipe):
        raise UsageFault(
            f"{recipe}: group {recipe.group} does not divide the {inputs} inputs of {name}",
            run="choose a recipe with a smaller group, for example g32",
        )


def divides(model: Model, recipe: Recipe) -> bool:
    """Whether a recipe's group divides the inputs of every matrix."""
    return not any(True for _ in _undivided(model, recipe))


def _undivided(model: Model, recipe: Recipe) -> Iterator[tuple[str, int]]:
    for name, shape in model.tensors().items():
        if recipe.bits != 16 and is_quantized(name) and shape[1] % recipe.group:
            yield name, shape[1]


def weight_bytes(model: Model, recipe: Recipe) -> int:
    """Predicted bytes of all weights: packed bits and one float32 scale per group of inputs; a tied table once.

    Tensors that no recipe touches count four bytes a value.
    """
    return sum(_tensor_bytes(name, shape, recipe) for name, shape in model.tensors().items())


def bits_per_weight(model: Model, recipe: Recipe) -> float:
    """Predicted mean bits per weight of the whole text model."""
    return 8 * weight_bytes(model, recipe) / model.parameters


def _tensor_bytes(name: str, shape: tuple[int, ...], recipe: Recipe) -> int:
    if not is_quantized(name):
        return math.prod(shape) * _FLOAT_BYTES
    bits = recipe.table_bits if name in TABLES else recipe.bits
    return int(math.prod(shape) * recipe.stored_bits(bits)) // 8
