"""Qwen3.5, text only: three gated delta-net layers to one of gated attention (Qwen Team 2026; Yang et al. 2024).

Queries and keys of attention are normed and rotated in their first quarter, its output is gated. A delta-net layer
keeps two states: the last inputs of its convolution, and for each value head a matrix, which is overwritten in place.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from edgeq.backends.mlc import operators
from edgeq.backends.mlc.decoder import Decoder
from edgeq.backends.mlc.delta import delta_rule
from edgeq.backends.mlc.layers import Float32, Layer, Linear, Precision
from edgeq.backends.mlc.models import qwen3
from edgeq.model import LinearAttention, Model


class GatedAttention(qwen3.Attention):
    """Qwen3's attention, its output gated by the half of q_proj that is q_gate_proj here."""

    def __init__(self, model: Model, precision: Precision, index: int, slot: int) -> None:
        super().__init__(model, precision, index, slot)
        queries = f"model.layers.{index}.self_attn.q_proj.weight"
        self.q_gate_proj = Linear(precision, queries, model.hidden, model.heads * model.head_dim)

    def forward(self, x: Tensor, kv: Any, states: list[Tensor]) -> Tensor:  # noqa: ARG002
        """x [batch, n, hidden]."""
        return self.o_proj(op.multiply(self.attend(x, kv), op.sigmoid(self.q_gate_proj(x))))


class DeltaNet(nn.Module):
    """Linear attention with a decaying memory that is corrected, not only added to; states `slot` and the next."""

    def __init__(self, model: Model, shape: LinearAttention, precision: Precision, index: int, slot: int) -> None:
        name = f"model.layers.{index}.linear_attn"
        self.slot, self.shape, self.epsilon = slot, shape, model.rms_norm_eps
        values = shape.value_heads * shape.value_head_dim
        self.in_proj_qkv = Linear(precision, f"{name}.in_proj_qkv.weight", model.hidden, shape.conv_channels)
        self.in_proj_z = Linear(precision, f"{name}.in_proj_z.weight", model.hidden, values)
        self.in_proj_ba = Float32(2 * shape.value_heads, model.hidden)
        self.conv1d = Float32(shape.conv_channels, shape.conv_kernel)
        self.A_log = nn.Parameter((shape.value_heads,), "float32")
        self.dt_bias = nn.Parameter((shape.value_heads,), "float32")
        self.norm = Float32(shape.value_head_dim)
        self.out_proj = Linear(precision, f"{name}.out_proj.weight", values, model.hidden)

    def forward(self, x: Tensor, kv: Any, states: list[Tensor]) -> Tensor:  # noqa: ARG002
        """x [batch, n, hidden]; replaces its states."""
        batch, n, _ = x.shape
        shape = self.shape
        keys, key_shape = shape.key_heads * shape.key_head_dim, (batch, n, shape.key_heads, shape.key_head_dim)
        value_shape = (batch, n, shape.value_heads, shape.value_head_dim)
        mixed, convolution = operators.causal_convolution(self.in_proj_qkv(x), states[self.slot], self.conv1d.weight)
        q, k, v = op.split(mixed, [keys, 2 * keys], axis=-1)
        q = operators.l2_norm(op.reshape(q, key_shape), shape.key_head_dim**-0.5)
        k = operators.l2_norm(op.reshape(k, key_shape), 1.0)
        v = op.astype(op.reshape(v, value_shape), "float32")
        ba = operators.float_matmul(x, self.in_proj_ba.weight, "float32")
        decay, beta = operators.decay_and_beta(ba, self.A_log, self.dt_bias)
        y, memory = delta_rule(q, k, v, decay, beta, states[self.slot + 1])
        states[self.slot : self.slot + 2] = [convolution, memory]
        z = op.reshape(self.in_proj_z(x), value_shape)
        y = operators.gated_rms_norm(y, self.norm.weight, z, self.epsilon)
        return self.out_proj(op.reshape(y, (batch, n, shape.value_heads * shape.value_head_dim)))


def decoder(model: Model, precision: Precision, target: Any) -> Decoder:
    """The whole model."""
    assert model.linear is not None
    layers = []
    for index, kind in enumerate(model.layer_types):
        before = model.layer_types[:index].count(kind)
        if kind == "linear_attention":
            name, mixer = "linear_attn", DeltaNet(model, model.linear, precision, index, 2 * before)
        else:
            name, mixer = "self_attn", GatedAttention(model, precision, index, before)
        layers.append(Layer(model, precision, index, name, mixer))
    return Decoder(model, precision, target, layers, states(model, precision.dtype))


def states(model: Model, dtype: str) -> Sequence[tuple[Sequence[int], str]]:
    """Shape without the batch, and dtype, of every state in the order of the layers."""
    shape = model.linear
    assert shape is not None
    convolution = ((shape.conv_kernel - 1, shape.conv_channels), dtype)
    memory = ((shape.value_heads, shape.key_head_dim, shape.value_head_dim), "float32")
    return [convolution, memory] * model.layer_types.count("linear_attention")
