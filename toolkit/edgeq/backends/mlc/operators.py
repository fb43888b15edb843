"""Operators that the wheel has not, as tensor expressions: matrices out of packed words, norms, the delta net's parts.

Every sum is taken in float32, whatever the activations are.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from tvm import te, tirx
from tvm.relax.frontend.nn import Tensor, op

from edgeq.backends.mlc.packing import WORD, middle

_FUSES_WITH_WHAT_FOLLOWS = {"op_pattern": 4}  # biases, residuals and gates run in the same kernel
_BFLOAT16 = 16


def packed_matmul(x: Tensor, words: Tensor, scales: Tensor | None, bits: int, out_dtype: str) -> Tensor:
    """x [batch, n, inputs] times the transpose of a packed matrix [outputs, inputs], unpacked where it is used.

    Weights are float32 for one token, and of x's dtype for several, which is what units for matrix products take.
    """

    def build(x: Any, words: Any, scales: Any = None) -> Any:
        shape = (words.shape[0], words.shape[1] * (WORD // bits))
        dtype = "float32" if isinstance(x.shape[1], tirx.IntImm) else x.dtype
        weights = te.compute(shape, lambda o, i: _unpacked(words, scales, bits, o, i).astype(dtype), "dequantize")
        return _matmul(x, weights, out_dtype)

    given = [x, words] if scales is None else [x, words, scales]
    return op.tensor_expr_op(build, f"matmul_{bits}_bits", given, attrs=_FUSES_WITH_WHAT_FOLLOWS)


def float_matmul(x: Tensor, weights: Tensor, out_dtype: str) -> Tensor:
    """x [batch, n, inputs] times the transpose of a matrix of floats [outputs, inputs]."""
    return op.tensor_expr_op(
        lambda x, weights: _matmul(x, weights, out_dtype), "matmul", [x, weights], attrs=_FUSES_WITH_WHAT_FOLLOWS
    )


def packed_take(words: Tensor, scales: Tensor | None, ids: Tensor, bits: int, dtype: str) -> Tensor:
    """Rows `ids` int32 [n] of a packed matrix, [n, inputs]."""

    def build(words: Any, ids: Any, scales: Any = None) -> Any:
        shape = (ids.shape[0], words.shape[1] * (WORD // bits))
        return te.compute(shape, lambda n, i: _unpacked(words, scales, bits, ids[n], i).astype(dtype), "take")

    given = [words, ids] if scales is None else [words, ids, scales]
    return op.tensor_expr_op(build, f"take_{bits}_bits", given)


def float_take(weights: Tensor, ids: Tensor, dtype: str) -> Tensor:
    """Rows `ids` int32 [n] of a matrix of floats, [n, inputs]."""

    def build(weights: Any, ids: Any) -> Any:
        shape = (ids.shape[0], weights.shape[1])
        return te.compute(shape, lambda n, i: weights[ids[n], i].astype(dtype), "take")

    return op.tensor_expr_op(build, "take", [weights, ids])


def at_positions(x: Tensor, positions: Tensor) -> Tensor:
    """x [1, n, hidden] at `positions` int32 [m], [1, m, hidden]."""

    def build(x: Any, positions: Any) -> Any:
        shape = (1, positions.shape[0], x.shape[2])
        return te.compute(shape, lambda b, m, i: x[b, positions[m], i], "at_positions")

    return op.tensor_expr_op(build, "at_positions", [x, positions])


def rms_norm(x: Tensor, weight: Tensor, epsilon: float) -> Tensor:
    """x * weight / sqrt(mean(x^2) + epsilon) over the last axis; weight float32. (Zhang and Sennrich 2019)"""

    def build(x: Any, weight: Any) -> Any:
        squares = _squares(x)
        size = tirx.const(int(x.shape[-1]), "float32")

        def normed(*index: Any) -> Any:
            root = te.rsqrt(squares(*index[:-1]) / size + tirx.const(epsilon, "float32"))
            return (_float32(x(*index)) * root * weight(index[-1])).astype(x.dtype)

        return te.compute(x.shape, normed, "rms_norm")

    return op.tensor_expr_op(build, "rms_norm", [x, weight])


def head_norm(qkv: Tensor, q_weight: Tensor, k_weight: Tensor, heads: int, kv_heads: int, epsilon: float) -> Tensor:
    """Qwen3's norm of each query and key head, values left alone: qkv [batch, n, heads + 2 kv_heads, head size]."""

    def build(qkv: Any, q_weight: Any, k_weight: Any) -> Any:
        squares = _squares(qkv)
        size = tirx.const(int(qkv.shape[-1]), "float32")

        def normed(b: Any, n: Any, head: Any, i: Any) -> Any:
            root = te.rsqrt(squares(b, n, head) / size + tirx.const(epsilon, "float32"))
            weight = tirx.if_then_else(head < heads, q_weight[i], k_weight[i])
            value = _float32(qkv[b, n, head, i])
            return tirx.if_then_else(head < heads + kv_heads, value * root * weight, value).astype(qkv.dtype)

        return te.compute(qkv.shape, normed, "head_norm")

    return op.tensor_expr_op(build, "head_norm", [qkv, q_weight, k_weight])


def l2_norm(x: Tensor, scale: float) -> Tensor:
    """x * scale / sqrt(sum(x^2) + 1e-6) over the last axis, float32: the delta rule's queries and keys."""

    def build(x: Any) -> Any:
        squares = _squares(x)

        def normed(*index: Any) -> Any:
            root = te.rsqrt(squares(*index[:-1]) + tirx.const(1e-6, "float32"))
            return _float32(x(*index)) * root * tirx.const(scale, "float32")

        return te.compute(x.shape, normed, "l2_norm")

    return op.tensor_expr_op(build, "l2_norm", [x])


def gated_rms_norm(x: Tensor, weight: Tensor, gate: Tensor, epsilon: float) -> Tensor:
    """rms_norm(x) * weight * silu(gate) over the last axis, in the gate's dtype; x and weight float32."""

    def build(x: Any, weight: Any, gate: Any) -> Any:
        squares = _squares(x)
        size = tirx.const(int(x.shape[-1]), "float32")

        def gated(*index: Any) -> Any:
            opened = _float32(gate(*index))
            root = te.rsqrt(squares(*index[:-1]) / size + tirx.const(epsilon, "float32"))
            return (x(*index) * root * weight(index[-1]) * opened * te.sigmoid(opened)).astype(gate.dtype)

        return te.compute(x.shape, gated, "gated_rms_norm")

    return op.tensor_expr_op(build, "gated_rms_norm", [x, weight, gate])


def causal_convolution(x: Tensor, state: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """Depthwise causal convolution and silu: (y as x, next state).

    x [batch, n, channels]; state [batch, taps - 1, channels]: the inputs before; weight float32 [channels, taps].
    """
    taps = int(weight.shape[1])

    def before(x: Any, state: Any, b: Any, n: Any, c: Any) -> Any:
        return tirx.if_then_else(n < 0, state[b, n + taps - 1, c], x[b, tirx.max(n, 0), c])

    def convolved(x: Any, state: Any, weight: Any) -> Any:
        def at(b: Any, n: Any, c: Any) -> Any:
            terms = (_float32(before(x, state, b, n + tap - taps + 1, c)) * weight[c, tap] for tap in range(taps))
            total = sum(terms, tirx.const(0, "float32"))
            return (total * te.sigmoid(total)).astype(x.dtype)

        return te.compute(x.shape, at, "causal_convolution")

    def remembered(x: Any, state: Any) -> Any:
        return te.compute(
            state.shape, lambda b, tap, c: before(x, state, b, x.shape[1] - taps + 1 + tap, c), "convolution_state"
        )

    return (
        op.tensor_expr_op(convolved, "causal_convolution", [x, state, weight]),
        op.tensor_expr_op(remembered, "convolution_state", [x, state]),
    )


def decay_and_beta(ba: Tensor, a_log: Tensor, dt_bias: Tensor) -> tuple[Tensor, Tensor]:
    """exp(-exp(a_log) * softplus(a + dt_bias)) and sigmoid(b), float32 [batch, n, heads]; ba is b beside a."""
    heads = int(a_log.shape[0])

    def decay(ba: Any, a_log: Any, dt_bias: Any) -> Any:
        def at(b: Any, n: Any, head: Any) -> Any:
            return te.exp(-te.exp(a_log[head]) * _softplus(_float32(ba[b, n, heads + head]) + dt_bias[head]))

        return te.compute((*ba.shape[:2], heads), at, "decay")

    def beta(ba: Any) -> Any:
        return te.compute((*ba.shape[:2], heads), lambda b, n, head: te.sigmoid(_float32(ba[b, n, head])), "beta")

    return op.tensor_expr_op(decay, "decay", [ba, a_log, dt_bias]), op.tensor_expr_op(beta, "beta", [ba])


def _matmul(x: Any, weights: Any, out_dtype: str) -> Any:
    inner = te.reduce_axis((0, weights.shape[1]), "inner")
    shape: Sequence[Any] = (*x.shape[:-1], weights.shape[0])
    product = te.compute(
        shape,
        lambda *i: te.sum(_float32(x(*i[:-1], inner)) * _float32(weights[i[-1], inner]), axis=inner),
        "matmul",
    )
    return product if out_dtype == "float32" else te.compute(shape, lambda *i: product(*i).astype(out_dtype), "cast")


def _unpacked(words: Any, scales: Any, bits: int, row: Any, column: Any) -> Any:
    """Float32 value of one element of a packed matrix."""
    each = WORD // bits
    word = words[row, column // each]
    if bits == _BFLOAT16:  # the upper half of a float32
        upper = tirx.bitwise_and(word, tirx.const(0xFFFF0000, "uint32"))
        lower = tirx.shift_left(word, tirx.const(_BFLOAT16, "uint32"))
        return tirx.reinterpret("float32", tirx.Select(column % each == 0, lower, upper))
    shift = (column % each * bits).astype("uint32")
    code = tirx.bitwise_and(tirx.shift_right(word, shift), tirx.const((1 << bits) - 1, "uint32"))
    group = words.shape[1] * each // scales.shape[1]
    return (_float32(code) - tirx.const(middle(bits), "float32")) * _float32(scales[row, column // group])


def _softplus(value: Any) -> Any:
    """log(1 + exp(value)), by its series where the sum would lose exp(value), without overflow where it is large."""
    grown = te.exp(tirx.min(value, tirx.const(20.0, "float32")))
    series = grown * (1.0 - grown * (0.5 - grown * (1 / 3 - grown * 0.25)))
    logarithm = te.log(grown + tirx.const(1.0, "float32"))
    return tirx.if_then_else(value > 20.0, value, tirx.if_then_else(grown < 0.01, series, logarithm))


def _squares(x: Any) -> Any:
    inner = te.reduce_axis((0, x.shape[-1]), "inner")
    return te.compute(
        x.shape[:-1], lambda *i: te.sum(_float32(x(*i, inner)) * _float32(x(*i, inner)), axis=inner), "squares"
    )


def _float32(value: Any) -> Any:
    return value.astype("float32")
