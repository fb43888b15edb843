"""The gated delta rule as one kernel, states in place (Yang et al. 2024, "Gated Delta Networks")."""

from __future__ import annotations

from typing import Any

import tvm
from tvm import s_tir
from tvm.relax.frontend.nn import Tensor, op
from tvm.script import tirx as T

from edgeq.backends.mlc.cpu import delta as on_processor


def delta_rule(q: Tensor, k: Tensor, v: Tensor, decay: Tensor, beta: Tensor, state: Tensor) -> tuple[Tensor, Tensor]:
    """Outputs [batch, n, value heads, value size] and the state, which is overwritten; everything float32.

    For each token: state *= decay; state += k (v - k^T state) beta; output = q^T state. q and k are [batch, n, key
    heads, key size] and serve consecutive value heads; v is [batch, n, value heads, value size]; decay and beta
    [batch, n, value heads]; state [batch, value heads, key size, value size].
    """
    on_cpu = tvm.target.Target.current(allow_none=False).kind.name == "llvm"
    function = (on_processor.kernel if on_cpu else kernel)(
        int(k.shape[2]), int(v.shape[2]), int(k.shape[3]), int(v.shape[3])
    )
    out = [Tensor.placeholder(v.shape, "float32"), Tensor.placeholder(state.shape, "float32")]
    found = op.tensor_ir_inplace_op(function, "delta_rule", [q, k, v, decay, beta, state], [-1, 5], out)
    return found[0], found[1]


def kernel(key_heads: int, value_heads: int, key_size: int, value_size: int) -> Any:
    """Scheduled function for the current target: a block per batch and value head, a thread per column of its state."""
    each = value_heads // key_heads

    @T.prim_func(s_tir=True)
    def scan(
        var_q: T.handle, var_k: T.handle, var_v: T.handle, var_d: T.handle, var_b: T.handle, var_s: T.handle,
        var_o: T.handle,
    ) -> None:  # fmt: skip
        T.func_attr({"op_pattern": 8, "tirx.noalias": True, "tirx.is_scheduled": True})
        batch, n = T.int64(), T.int64()
        q = T.match_buffer(var_q, (batch, n, key_heads, key_size), "float32")
        k = T.match_buffer(var_k, (batch, n, key_heads, key_size), "float32")
        v = T.match_buffer(var_v, (batch, n, value_heads, value_size), "float32")
        decay = T.match_buffer(var_d, (batch, n, value_heads), "float32")
        beta = T.match_buffer(var_b, (batch, n, value_heads), "float32")
        state = T.match_buffer(var_s, (batch, value_heads, key_size, value_size), "float32")
        out = T.match_buffer(var_o, (batch, n, value_heads, value_size), "float32")
        for head, column in T.grid(batch * value_heads, value_size):
            with T.sblock("scan"):
                h, c = T.axis.remap("SS", [head, column])
                T.reads()
                T.writes()
                held = T.sblock_alloc_buffer((key_size,), "float32", scope="local")
                total = T.sblock_alloc_buffer((2,), "float32", scope="local")
                for i in T.unroll(key_size):
                    held[i] = state[h // value_heads, h % value_heads, i, c]
                for t in T.serial(n):
                    total[0] = T.float32(0)
                    for i in T.unroll(key_size):
                        held[i] = held[i] * decay[h // value_heads, t, h % value_heads]
                        total[0] = total[0] + held[i] * k[h // value_heads, t, h % value_heads // each, i]
                    total[0] = (v[h // value_heads, t, h % value_heads, c] - total[0]) * beta[
                        h // value_heads, t, h % value_heads
                    ]
                    total[1] = T.float32(0)
                    for i in T.unroll(key_size):
                        held[i] = held[i] + total[0] * k[h // value_heads, t, h % value_heads // each, i]
                        total[1] = total[1] + held[i] * q[h // value_heads, t, h % value_heads // each, i]
                    out[h // value_heads, t, h % value_heads, c] = total[1]
                for i in T.unroll(key_size):
                    state[h // value_heads, h % value_heads, i, c] = held[i]

    schedule = s_tir.Schedule(scan)
    head, column = schedule.get_loops(schedule.get_sblock("scan"))
    schedule.bind(head, "blockIdx.x")
    schedule.bind(column, "threadIdx.x")
    return schedule.mod["main"].with_attr("tirx.is_scheduled", True)
