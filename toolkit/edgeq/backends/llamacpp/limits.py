"""What llama.cpp can hold: recipes in GGML's blocks, and the models whose layers it runs."""

from __future__ import annotations

import dataclasses

from edgeq import size
from edgeq.errors import UnsupportedModel, UsageFault
from edgeq.model import Model
from edgeq.recipe import GGML, Layout, Recipe, plain
from edgeq.size import is_quantized, layout_of

BLOCK = 32
PLAIN = {plain(4, BLOCK): "Q4_0", plain(8, BLOCK): "Q8_0"}


def check(model: Model, recipe: Recipe) -> None:
    """Raise UsageFault, naming the tensor and a recipe that works, when GGML's blocks cannot hold a recipe."""
    linear = model.linear
    reorders = linear is not None and linear.value_heads > linear.key_heads
    if linear and (linear.key_head_dim != linear.value_head_dim or linear.value_heads % linear.key_heads):
        raise UnsupportedModel(
            f"config.json: {linear.key_heads} key heads of {linear.key_head_dim}, "
            f"{linear.value_heads} value heads of {linear.value_head_dim}",
            why="llama.cpp wants heads of one size, and as many value heads for each key head.",
            run="edgeq build ... --backend onnx",
        )
    if recipe.kv_bits == 8 and model.head_dim % BLOCK:
        raise UsageFault(
            f"{recipe}: heads of {model.head_dim} do not fill blocks of the 8-bit cache",
            why=f"A block holds {BLOCK} values.",
            run=f"edgeq build ... --recipe {dataclasses.replace(recipe, kv_bits=16)}",
        )
    for name, shape, _ in filter(lambda each: is_quantized(each[0]), size.alike(model, recipe)):
        inputs = shape[1]
        layout = layout_of(model, recipe, name)
        if layout.is_float:
            continue
        if not layout.is_ggml and layout not in PLAIN:
            raise UsageFault(
                f"{recipe}: llama.cpp cannot hold {layout.name} for {name}",
                why=f"GGML's plain blocks have 4 or 8 bits, one scale per {BLOCK} inputs, and no zero points.",
                run=f"edgeq build ... --recipe {_in_blocks(model, recipe)}",
            )
        if inputs % layout.block:
            raise UsageFault(
                f"{recipe}: the {inputs} inputs of {name} are no multiple of {layout.block}",
                why="A row of GGML's blocks must fill whole blocks.",
                run=f"edgeq build ... --recipe {'w16' if inputs % BLOCK else 'w4g32-e8-rtn'}",
            )
        if linear and reorders and name.endswith("linear_attn.out_proj.weight") and linear.value_head_dim % BLOCK:
            raise UsageFault(
                f"{recipe}: value heads of {linear.value_head_dim} split the blocks of {name}",
                why=f"llama.cpp orders value heads otherwise than the checkpoint, and a block holds {BLOCK} inputs.",
                run="edgeq build ... --recipe w16",
            )


def _in_blocks(model: Model, recipe: Recipe) -> Recipe:
    """The same bits in GGML's blocks, with minimums instead of zero points; more bits where rows do not fill those."""
    body, table = recipe.body, recipe.table
    if not table.is_ggml and not table.is_float:
        table = plain(table.bits, BLOCK)
    if body.bits == 2 or not (body.is_ggml or body.symmetric):
        names = {2: ("q2_k", "q4_1"), 4: ("q4_1",), 8: ()}[body.bits]
        bodies = [*map(GGML.__getitem__, names), plain(8, BLOCK)]
    else:
        bodies = [body if body.is_ggml else plain(body.bits, BLOCK)]
    near = [dataclasses.replace(recipe, body=each, table=table, method=_method(recipe, each)) for each in bodies]
    return next((each for each in near if size.divides(model, each)), near[-1])


def _method(recipe: Recipe, body: Layout) -> str:
    return "rtn" if body.is_ggml and recipe.method == "mse" else recipe.method


def full_attention_interval(model: Model) -> int:
    """Distance between layers of full attention; raises UnsupportedModel for any other pattern."""
    if len(set(model.layer_types)) == 1 and model.linear:
        raise UnsupportedModel(
            f"config.json: all {model.layers} layers are of one kind, {model.layer_types[0]}",
            why="llama.cpp runs Qwen3.5 with layers of both kinds only.",
            run="edgeq build ... --backend onnx",
        )
    interval = model.layer_types.index("full_attention") + 1
    expected = ["linear_attention" if (n + 1) % interval else "full_attention" for n in range(model.layers)]
    if expected != list(model.layer_types):
        raise UnsupportedModel(
            f"config.json: full attention is not every {interval}th layer",
            why="llama.cpp runs regular patterns of layers only.",
            run="edgeq build ... --backend onnx",
        )
    return interval
