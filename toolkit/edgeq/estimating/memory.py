"""Bytes that a model needs on a device: weights, cache, states, activations and the engine; arithmetic on shapes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import NamedTuple

from edgeq import size
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.target import Target

CHUNK = 512
"""Tokens of a prompt that an engine runs at once (llama.cpp's `ubatch`)."""
USUAL_SHARE = 0.7
"""Of the memory, for a model: a laptop's, as targets/x86-laptop-ddr5.toml has it."""
MEMORY_ERROR = 1.05
"""Estimates of memory against real files are within 3 %; of what engines take besides, less is known."""
_FLOAT = 4
_GGML_CACHE_BITS = {8: 8.5}  # Q8_0: 34 bytes for 32 values
_PROCESS_BYTES = 71_000_000  # a loaded session of ONNX Runtime with a model of 2 MB: profiles/x86-avx512-vnni
_WORKSPACE = 24  # float32 values of a token and a layer's width that are alive at once


@dataclass(frozen=True)
class Needed:
    """Bytes by purpose; `cache_bytes_per_token` is what one more token of context costs."""

    weights_bytes: int
    kv_cache_bytes: int
    state_bytes: int
    runtime_bytes: int
    cache_bytes_per_token: float

    @property
    def total_bytes(self) -> int:
        """All of it."""
        return self.weights_bytes + self.kv_cache_bytes + self.state_bytes + self.runtime_bytes


class Widened(NamedTuple):
    """Bytes beyond the file's that an engine holds at most, and that each token reads, of matrices that it widens."""

    held: int
    read: int


def needed(
    model: Model, recipe: Recipe, backend: str, *, context: int, weights_bytes: int | None = None, widened: int = 0
) -> Needed:
    """Bytes that a model needs under a recipe with room for `context` tokens; `weights_bytes` replaces the prediction.

    Keys and values are of full-attention layers only, in the recipe's bits; delta nets keep a state, whatever the
    context. A tied table counts once. `widened` bytes, held beyond the file's, count as the engine's.
    """
    per_token = cache_bytes_per_token(model, recipe, backend)
    return Needed(
        weights_bytes=_weights(model, recipe, backend) if weights_bytes is None else weights_bytes,
        kv_cache_bytes=math.ceil(per_token * context),
        state_bytes=state_bytes(model),
        runtime_bytes=_PROCESS_BYTES + activation_bytes(model, min(CHUNK, context)) + widened,
        cache_bytes_per_token=per_token,
    )


def _weights(model: Model, recipe: Recipe, backend: str) -> int:
    """Bytes of the weights; a mix has the bits that it is made for."""
    if recipe.mixed_bits is not None and not recipe.chosen:
        return int(model.parameters * recipe.mixed_bits) // 8
    return size.weight_bytes(model, recipe, scale_bits(recipe, backend))


def widened(model: Model, recipe: Recipe, target: Target, backend: str) -> Widened:
    """What ONNX Runtime adds: a graph in float32, which all but CUDA's are, gets float32 copies of float matrices.

    Each is widened, then transposed, and both copies are alive until loading ends; float32 is transposed alone. A
    table that is looked up stays, beside its copies when tied; all else takes the place of what it is made of.
    """
    held = read = 0
    if backend == "onnx" and target.onnx.provider != "cuda":
        for name, shape, count in size.alike(model, recipe):
            looked_up = name == size.TABLES[0]
            if not size.is_quantized(name) or (looked_up and not model.tied):
                continue
            if (layout := size.layout_of(model, recipe, name)).is_float:
                values, stored = math.prod(shape) * count, layout.bits // 8
                copies = 1 if stored == _FLOAT else 2
                read += values * (_FLOAT - stored)
                held += values * (copies * _FLOAT - (0 if looked_up else stored))
    return Widened(held, read)


def largest_context(model: Model, found: Needed, usable_bytes: int) -> int:
    """Most tokens of context, the model's own at most, that fit into `usable_bytes`; 0 when not even one does."""
    room = usable_bytes - (found.total_bytes - found.kv_cache_bytes)
    return max(0, min(model.context, int(room / found.cache_bytes_per_token)))


def usable_bytes(target: Target) -> int | None:
    """Bytes of a target that a model may take, by a usual share where its own is unknown; None for an unknown size."""
    total, share = target.memory.total_bytes, target.memory.usable_share
    return int(total.value * (share.value if share else USUAL_SHARE)) if total else None


def assumed_share(target: Target) -> str | None:
    """Sentence about a usual share that stands for an unknown one; None where the target has its own or no size."""
    if target.memory.total_bytes is None or target.memory.usable_share:
        return None
    return (
        f"what share of its memory is free for a model is not known: {USUAL_SHARE:.0%} is assumed; "
        "set memory.usable_share in a target file of your own"
    )


def scale_bits(recipe: Recipe, backend: str) -> int:
    """Bits that a backend stores for the scale of a plain group: those of its `scale_bits`, 16 for other runtimes."""
    return {"onnx": 32, "mlc": recipe.kv_bits}.get(backend, 16)


def cache_bytes_per_token(model: Model, recipe: Recipe, backend: str) -> float:
    """Bytes that one token adds to the cache of keys and values."""
    bits = _GGML_CACHE_BITS.get(recipe.kv_bits, recipe.kv_bits) if backend == "llamacpp" else recipe.kv_bits
    return model.kv_bytes_per_token(1) * bits / 8


def recurrent_bytes(model: Model) -> int:
    """Bytes of the float32 matrices of the delta nets, one for each value head, which each token reads and writes."""
    if model.linear is None:
        return 0
    heads = model.linear.value_heads * model.linear.key_head_dim * model.linear.value_head_dim
    return _FLOAT * heads * model.layer_types.count("linear_attention")


def state_bytes(model: Model) -> int:
    """Bytes of all that delta nets keep of earlier tokens: their matrices, and the inputs of the convolution."""
    if model.linear is None:
        return 0
    taps = model.linear.conv_channels * (model.linear.conv_kernel - 1)
    return recurrent_bytes(model) + _FLOAT * taps * model.layer_types.count("linear_attention")


def activation_bytes(model: Model, tokens: int) -> int:
    """Bytes of what a run of `tokens` has alive: float32 logits of each, a layer's activations, scores of attention.

    Engines reserve logits of a whole chunk (llama.cpp's compute buffer does; ONNX Runtime's graph returns them).
    """
    layer = max(_WORKSPACE * model.hidden, 3 * model.ffn + 8 * model.hidden)
    return _FLOAT * tokens * (model.vocab + layer)


def table_bytes(model: Model, recipe: Recipe, backend: str) -> int:
    """Bytes of an embedding table that is only looked up: one beside an output layer of its own; 0 for a tied one."""
    if model.tied:
        return 0
    layout = size.layout_of(model, recipe, size.TABLES[0])
    return int(model.vocab * model.hidden * layout.stored_bits(scale_bits(recipe, backend))) // 8
