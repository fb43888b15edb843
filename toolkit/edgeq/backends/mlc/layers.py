"""Layers that Qwen's generations share, on the wheel's `nn`: matrices as a recipe stores them, norm, feed-forward."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from edgeq.backends.mlc import operators
from edgeq.backends.mlc.cpu import matrices
from edgeq.backends.mlc.packing import BLOCK, ROWS, WORD
from edgeq.model import Model
from edgeq.recipe import Layout
from edgeq.size import TABLES

_BFLOAT16_BITS = 16


@dataclass(frozen=True)
class Precision:
    """How a library stores and computes.

    body and table: layouts of the matrices; dtype: float32 or float16, of activations; stored: float32 or float16, of
    scales, keys and values; floats: dtype of matrices that are not quantized (bfloat16 is packed in words, which every
    API can read); chosen: layouts of a mixed recipe, by the checkpoint's names; tiles: quantized matrices are stored as
    processors read them.
    """

    body: Layout
    table: Layout
    dtype: str
    stored: str
    floats: str
    chosen: Mapping[str, Layout] = field(default_factory=dict)
    tiles: bool = False

    def layout(self, name: str) -> Layout:
        """Layout of a matrix, by the checkpoint's name."""
        return self.chosen.get(name, self.table if name in TABLES else self.body)


class Linear(nn.Module):
    """y = x W^T + bias, with W [outputs, inputs] stored as the checkpoint's matrix of that name is."""

    def __init__(self, precision: Precision, name: str, inputs: int, outputs: int, *, bias: bool = False) -> None:
        layout = precision.layout(name)
        self.dtype = precision.dtype
        self.bits = 0
        run = layout.of(inputs).run if not layout.is_float else 0
        self.tiles = precision.tiles and run and run % BLOCK == 0 and outputs % ROWS == 0
        if self.tiles:
            self.bits = layout.bits
            self.q_weight = nn.Parameter((outputs // ROWS, inputs // BLOCK, self.bits, ROWS), "uint32")
            self.q_scale = nn.Parameter((outputs // ROWS, inputs // run, ROWS), precision.stored)
        elif not layout.is_float:
            self.bits = layout.bits
            self.q_weight = nn.Parameter((outputs, inputs * self.bits // WORD), "uint32")
            self.q_scale = nn.Parameter((outputs, inputs // run), precision.stored)
        elif precision.floats == "bfloat16":
            self.bits = _BFLOAT16_BITS
            self.weight = nn.Parameter((outputs, inputs * self.bits // WORD), "uint32")
        else:
            self.weight = nn.Parameter((outputs, inputs), precision.floats)
        self.bias = nn.Parameter((outputs,), precision.dtype) if bias else None

    def forward(self, x: Tensor, out_dtype: str | None = None) -> Tensor:
        """x [batch, n, inputs] to [batch, n, outputs]."""
        out_dtype = out_dtype or self.dtype
        if self.tiles:
            y = matrices.matmul(x, self.q_weight, self.q_scale, self.bits)
        elif self.bits:
            y = operators.packed_matmul(x, self._words(), self._scales(), self.bits, out_dtype)
        else:
            y = operators.float_matmul(x, self.weight, out_dtype)
        return y if self.bias is None else op.add(y, self.bias)

    def take(self, ids: Tensor) -> Tensor:
        """Rows `ids` int32 [n], as [n, inputs]."""
        if self.tiles:
            return matrices.take(self.q_weight, self.q_scale, ids, self.bits)
        if self.bits:
            return operators.packed_take(self._words(), self._scales(), ids, self.bits, self.dtype)
        return operators.float_take(self.weight, ids, self.dtype)

    def _words(self) -> Tensor:
        return self.weight if self.bits == _BFLOAT16_BITS else self.q_weight

    def _scales(self) -> Tensor | None:
        return None if self.bits == _BFLOAT16_BITS else self.q_scale


class Float32(nn.Module):
    """A weight that no recipe touches."""

    def __init__(self, *shape: int) -> None:
        self.weight = nn.Parameter(shape, "float32")


class Norm(Float32):
    """Root mean square norm."""

    def __init__(self, size: int, epsilon: float) -> None:
        super().__init__(size)
        self.epsilon = epsilon

    def forward(self, x: Tensor) -> Tensor:
        """Norm over the last axis."""
        return operators.rms_norm(x, self.weight, self.epsilon)


class FeedForward(nn.Module):
    """SwiGLU: down(silu(gate(x)) * up(x)) (Shazeer 2020)."""

    def __init__(self, precision: Precision, name: str, hidden: int, ffn: int) -> None:
        self.gate_up_proj = Linear(precision, f"{name}.gate_proj.weight", hidden, 2 * ffn)
        self.down_proj = Linear(precision, f"{name}.down_proj.weight", ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """x [batch, n, hidden]."""
        gate, up = op.split(self.gate_up_proj(x), 2, axis=-1)
        return self.down_proj(op.multiply(op.silu(gate), up))


class Layer(nn.Module):
    """x + mixer(norm(x)), then x + feed-forward(norm(x)).

    The mixer is attention or a delta net, under the name that the checkpoint has for it; it is called with x, the cache
    and the list of states, which it may change.
    """

    def __init__(self, model: Model, precision: Precision, index: int, name: str, mixer: nn.Module) -> None:
        self.name = name
        self.input_layernorm = Norm(model.hidden, model.rms_norm_eps)
        setattr(self, name, mixer)
        self.post_attention_layernorm = Norm(model.hidden, model.rms_norm_eps)
        self.mlp = FeedForward(precision, f"model.layers.{index}.mlp", model.hidden, model.ffn)

    def forward(self, x: Tensor, kv: Any, states: list[Tensor]) -> Tensor:
        """x [batch, n, hidden]."""
        x = op.add(x, getattr(self, self.name)(self.input_layernorm(x), kv, states))
        return op.add(x, self.mlp(self.post_attention_layernorm(x)))
