"""Keys and values kept in 8 bits: one scale for each channel of each head, fixed when building.

Format: onnxruntime `docs/ContribOperators.md`, com.microsoft.GroupQueryAttention with k_quant_type and v_quant_type
PER_CHANNEL, which is symmetric: code = round(value / scale), scales float32 [heads, 1, head size].
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import CacheRanges

_LARGEST = 127
_SCALES = ((12, "k_scale"), (13, "v_scale"))  # GroupQueryAttention's optional inputs
_ROOM = 1.25  # for what calibration did not see: costs the demos 1.7 times the loss at most, with 0.8 it is 27 and more


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
        node.attributes.add(ir.AttrInt64("kv_cache_bit_width", 8))
        for value in (*node.inputs[3:5], *node.outputs[1:]):
            value.type = kind


def scales(largest: NDArray[np.float32]) -> NDArray[np.float32]:
    """Scales [heads, 1, size] with room for a quarter more than `largest` [heads, size]; 1 where that is 0."""
    return np.where(largest > 0, _ROOM * largest / _LARGEST, 1).astype(np.float32)[:, None]
