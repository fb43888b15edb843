"""Qwen3: grouped-query attention with a norm on each query and key head (Qwen Team 2025, arXiv:2505.09388)."""

from __future__ import annotations

from typing import Any

from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, op

from edgeq.backends.mlc import operators
from edgeq.backends.mlc.decoder import Decoder
from edgeq.backends.mlc.layers import Layer, Linear, Norm, Precision
from edgeq.model import Model


class Attention(nn.Module):
    """Causal attention over the cache of one layer."""

    def __init__(self, model: Model, precision: Precision, index: int, slot: int) -> None:
        name = f"model.layers.{index}.self_attn"
        self.slot, self.heads, self.kv_heads, self.size = slot, model.heads, model.kv_heads, model.head_dim
        self.all_heads = model.heads + 2 * model.kv_heads
        self.qkv_proj = Linear(precision, f"{name}.q_proj.weight", model.hidden, self.all_heads * model.head_dim)
        self.q_norm = Norm(model.head_dim, model.rms_norm_eps)
        self.k_norm = Norm(model.head_dim, model.rms_norm_eps)
        self.o_proj = Linear(precision, f"{name}.o_proj.weight", model.heads * model.head_dim, model.hidden)

    def forward(self, x: Tensor, kv: Any, states: list[Tensor]) -> Tensor:  # noqa: ARG002
        """x [batch, n, hidden]."""
        return self.o_proj(self.attend(x, kv))

    def attend(self, x: Tensor, kv: Any) -> Tensor:
        """What the heads give, side by side: [batch, n, heads * head size]."""
        batch, n, _ = x.shape
        qkv = op.reshape(self.qkv_proj(x), (batch, n, self.all_heads, self.size))
        qkv = operators.head_norm(
            qkv, self.q_norm.weight, self.k_norm.weight, self.heads, self.kv_heads, self.q_norm.epsilon
        )
        y = kv.attention_with_fused_qkv(self.slot, qkv, self.heads, self.size**-0.5)
        return op.reshape(y, (batch, n, self.heads * self.size))


def decoder(model: Model, precision: Precision, target: Any) -> Decoder:
    """The whole model."""
    layers = [
        Layer(model, precision, index, "self_attn", Attention(model, precision, index, index))
        for index in range(model.layers)
    ]
    return Decoder(model, precision, target, layers)
