"""Keys and values kept in 8 bits: one scale for each channel of each head, fixed when building.

Format: onnxruntime `docs/ContribOperators.md`, com.microsoft.GroupQueryAttention with k_quant_type and v_quant_type
PER_CHANNEL, which is symmetric: code = round(value / scale), scales float32 [heads, 1, head size].
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import transformer
from edgeq.backends.base import CacheRanges, Progress
from edgeq.checkpoint import Checkpoint
from edgeq.model import Model

BITS = 8
_LARGEST = 127
_SCALES = ((12, "k_scale"), (13, "v_scale"))  # GroupQueryAttention's optional inputs
_ROOM = 1.25  # for what calibration did not see: with 1.0 demo-qwen2.5 lost 5 times what it loses with 1.3
_TEXTS, _LENGTH, _SEED = 32, 32, 20261128


def store(model: Any, ranges: CacheRanges) -> None:
    """Make the attention of a graph (onnx_ir.Model) keep keys and values in 8 bits, in place."""
    import onnx_ir as ir

    nodes = [node for node in model.graph if node.op_type == "GroupQueryAttention"]
    kind = ir.TensorType(ir.DataType.INT8)
    for layer, node in enumerate(nodes):
        node.resize_inputs(_SCALES[-1][0] + 1)
        for (index, name), largest in zip(_SCALES, (ranges.keys[layer], ranges.values[layer]), strict=True):
            tensor = ir.tensor(scales(largest), name=f"{node.name}.{name}")
            value = ir.Value(name=tensor.name, type=ir.TensorType(tensor.dtype), shape=tensor.shape, const_value=tensor)
            model.graph.register_initializer(value)
            node.replace_input_with(index, value)
        for name in ("k_quant_type", "v_quant_type"):
            node.attributes.add(ir.AttrString(name, "PER_CHANNEL"))
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", BITS))
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            value.type = kind


def scales(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales [heads, 1, size] with room for a quarter more than `largest` [heads, size]; 1 where that is 0."""
    return np.where(largest > 0, _ROOM * largest / _LARGEST, 1).astype(np.float32)[:, None]


def calibrated(checkpoint: Checkpoint, windows: NDArray[np.int32] | None, progress: Progress) -> CacheRanges:
    """Ranges that the float32 model shows over token windows [count, length], or over texts that it samples itself.

    Keys are read before they are rotated: a rotation leaves the length of a pair of channels as it is, so that length
    bounds both channels at every position, those beyond the windows too. Holds the model in float32, 4 bytes a weight.
    """
    import torch

    model = transformer.instantiate(checkpoint, lambda _: True)
    seen = _Largest(model, checkpoint.model)
    with torch.inference_mode():
        if windows is None:
            _sample(model, progress)
        else:
            for done, window in enumerate(windows):
                progress("calibrate cache", done, len(windows))
                model(input_ids=torch.from_numpy(window[None].astype(np.int64)), logits_to_keep=1)
    return seen.ranges()


def _sample(model: Any, progress: Progress) -> None:
    """Let a model write texts by itself, each from a random token, all at the same time."""
    import torch

    generator = torch.Generator().manual_seed(_SEED)
    tokens = torch.randint(model.config.vocab_size, (_TEXTS, 1), generator=generator)
    past = None
    for done in range(_LENGTH):
        progress("calibrate cache", done, _LENGTH)
        output = model(input_ids=tokens, past_key_values=past, use_cache=True)
        past = output.past_key_values
        tokens = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=generator)


class _Largest:
    """The largest magnitudes so far of what becomes keys and values, [heads, size] for each layer, by hooks."""

    def __init__(self, model: Any, shape: Model) -> None:
        self._heads = (-1, shape.kv_heads, shape.head_dim)
        self._pairs = len(model.model.rotary_emb.inv_freq)
        self._keys: dict[int, Any] = {}
        self._values: dict[int, Any] = {}
        for number, layer in enumerate(model.model.layers):
            if (attention := getattr(layer, "self_attn", None)) is not None:
                key = getattr(attention, "k_norm", attention.k_proj)
                self._watch(key, self._keys, number, self._pair_lengths)
                self._watch(attention.v_proj, self._values, number, abs)

    def ranges(self) -> CacheRanges:
        """Of all layers with attention, first to last."""
        keys, values = (np.stack([seen[number] for number in sorted(seen)]) for seen in (self._keys, self._values))
        return CacheRanges(keys, values)

    def _watch(self, module: Any, seen: dict[int, Any], number: int, magnitude: Callable[[Any], Any]) -> None:
        def hook(_module: Any, _inputs: Any, output: Any) -> None:
            largest = magnitude(output.reshape(self._heads)).amax(0).numpy()
            seen[number] = np.maximum(largest, seen.get(number, 0))

        module.register_forward_hook(hook)

    def _pair_lengths(self, keys: Any) -> Any:
        """Magnitudes [tokens, heads, size] after any rotation: channels i and i + pairs turn together, others stay."""
        import torch

        first, second, still = keys.tensor_split((self._pairs, 2 * self._pairs), dim=-1)
        length = first.hypot(second)
        return torch.cat([length, length, still.abs()], dim=-1)
