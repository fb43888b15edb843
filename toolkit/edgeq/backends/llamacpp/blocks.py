"""Solutions as GGML's blocks. Plain ones are blocks of 32 weights with a 16-bit scale:

    Q4_0    float16 d, 16 bytes of codes     w = (code - 8) * d
    Q8_0    float16 d, 32 signed bytes       w = code * d

A byte of a 4-bit block holds the code of input i in its lower half and that of input i + 16 in its upper half.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

from edgeq import size
from edgeq.errors import UnsupportedModel, UsageFault
from edgeq.model import Model
from edgeq.quantize import ggml
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.recipe import GGML, Layout, Recipe, plain
from edgeq.size import is_quantized, layout_of

BLOCK = 32
_PLAIN = {plain(4, BLOCK): "Q4_0", plain(8, BLOCK): "Q8_0"}


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
    for name, (_, inputs) in _matrices(model):
        layout = layout_of(model, recipe, name)
        if layout.is_float:
            continue
        if not layout.is_ggml and layout not in _PLAIN:
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


def _matrices(model: Model) -> Iterator[tuple[str, tuple[int, ...]]]:
    return ((name, shape) for name, shape in model.tensors().items() if is_quantized(name))


def format_of(layout: Layout) -> str:
    """GGML's name of a layout of codes."""
    return layout.name.upper() if layout.is_ggml else _PLAIN[layout]


def pack(solution: Solution | BlockSolution, rows: slice = slice(None)) -> NDArray[np.uint8]:
    """Bytes [outputs, bytes of a row] that dequantize to exactly the solution, or to some rows of it.

    Raises UsageFault when a plain solution has zero points, for which Q4_0 and Q8_0 have no room.
    """
    if isinstance(solution, BlockSolution):
        return ggml.pack(solution, rows)
    scales = solution.scales[rows]
    if (solution.zero_points[rows] != 1 << (solution.bits - 1)).any():
        raise UsageFault(
            f"{solution.name}: llama.cpp cannot hold this solution",
            why="Its plain blocks have no zero points.",
            run=f"choose a symmetric recipe, for example w{solution.bits}g{BLOCK}-e8-rtn",
        )
    codes = solution.codes[rows].reshape(*scales.shape, BLOCK)
    if solution.bits == 8:
        stored = codes ^ np.uint8(0x80)
    else:
        stored = codes[:, :, : BLOCK // 2] | np.left_shift(codes[:, :, BLOCK // 2 :], 4, dtype=np.uint8)
    header = np.ascontiguousarray(scales, "<f2").view(np.uint8).reshape(*scales.shape, 2)
    return np.concatenate([header, stored], axis=2).reshape(len(scales), -1)
