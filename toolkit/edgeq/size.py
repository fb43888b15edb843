"""How many bytes a model's weights take under a recipe: arithmetic on shapes, nothing is read."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator

from edgeq.errors import UsageFault
from edgeq.model import Model
from edgeq.recipe import COLUMN, GGML, Layout, Recipe, plain

TABLES = ("model.embed_tokens.weight", "lm_head.weight")
_MATRICES = ("_proj.weight", ".in_proj_qkv.weight", ".in_proj_z.weight")
_FLOAT_BITS = 32


def is_quantized(name: str) -> bool:
    """Whether a recipe's bits apply to the tensor of that (text-only) name.

    True for the projections of the layers and for both tables. Vectors, the convolution and the two small
    `in_proj_a`, `in_proj_b` of a delta-net layer stay float32.
    """
    return name in TABLES or name.endswith(_MATRICES)


def layout_of(model: Model, recipe: Recipe, name: str) -> Layout:
    """Layout that a recipe gives to one of a model's matrices.

    That is the body's or the table's for the matrix's inputs, but for the output of a delta-net layer whose value heads
    GGML orders otherwise than the checkpoint: a block of 256 inputs would mix heads, so it gets the next larger layout
    with blocks of 32. A mixed recipe's are those chosen.
    """
    if recipe.chosen:
        return dict(recipe.chosen)[name]
    layout = recipe.table if name in TABLES else recipe.body
    if layout.group == COLUMN:
        return layout.of(model.tensors()[name][1])
    if not mixes_heads(model, name, layout):
        return layout
    return next((GGML[word] for word in ("q4_1", "q5_1") if layout.bits <= GGML[word].bits), plain(8, 32))


def alike(model: Model, recipe: Recipe) -> Iterable[tuple[str, tuple[int, ...], int]]:
    """Name of the first, shape and number of tensors that a recipe stores alike: each alone where it chose for each."""
    return [(*each, 1) for each in model.tensors().items()] if recipe.chosen else model.kinds


def mixes_heads(model: Model, name: str, layout: Layout) -> bool:
    """Whether blocks of a GGML layout would hold inputs of heads that GGML puts elsewhere than the checkpoint."""
    linear = model.linear
    if linear is None or not layout.is_ggml or not name.endswith("linear_attn.out_proj.weight"):
        return False
    return linear.value_heads != linear.key_heads and linear.value_head_dim % layout.block != 0


def check_groups(model: Model, recipe: Recipe) -> None:
    """Raise UsageFault, naming the matrix, when a recipe's group or block does not divide the inputs of a matrix."""
    for name, inputs, layout in _undivided(model, recipe):
        unit = "block" if layout.block > layout.group else "group"
        raise UsageFault(
            f"{recipe}: {unit} {layout.block} does not divide the {inputs} inputs of {name}",
            run="choose a recipe with a smaller group, for example g32",
        )


def divides(model: Model, recipe: Recipe) -> bool:
    """Whether a recipe's groups and blocks divide the inputs of every matrix."""
    return not any(True for _ in _undivided(model, recipe))


def _undivided(model: Model, recipe: Recipe) -> Iterator[tuple[str, int, Layout]]:
    for name, shape, _ in alike(model, recipe):
        if is_quantized(name) and shape[1] % (layout := layout_of(model, recipe, name)).block:
            yield name, shape[1], layout


def weight_bytes(model: Model, recipe: Recipe, scale_bits: int = 32) -> int:
    """Predicted bytes of all weights: packed bits and the scales, of `scale_bits` in plain groups; a tied table once.

    Tensors that no recipe touches count four bytes a value.
    """
    total = 0
    for name, shape, count in alike(model, recipe):
        bits = layout_of(model, recipe, name).stored_bits(scale_bits) if is_quantized(name) else _FLOAT_BITS
        total += int(math.prod(shape) * bits) // 8 * count
    return total


def float_bytes(model: Model) -> int:
    """Predicted bytes of the tensors that no recipe touches."""
    return sum(4 * math.prod(shape) * count for name, shape, count in model.kinds if not is_quantized(name))


def bits_per_weight(model: Model, recipe: Recipe, scale_bits: int = 32) -> float:
    """Predicted mean bits per weight of the whole text model."""
    return 8 * weight_bytes(model, recipe, scale_bits) / model.parameters
