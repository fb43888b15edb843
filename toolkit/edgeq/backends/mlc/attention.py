"""What replaces a kernel of the wheel's paged attention."""

from __future__ import annotations

from typing import Any

from tvm.script import tirx as T

_LANES = 32


def merge_state(heads: int, size: int, dtype: str) -> Any:
    """Scheduled function that merges attention over some keys, in place, with attention over others.

    v and v_other [n, heads, size] are outputs, s and s_other float32 [n, heads] the logarithms in base 2 of their sums
    (Ye et al. 2025, "FlashInfer", attention states). One thread of a block alone touches s: in TVM 0.26 every thread
    reads it and later writes it, with nothing between, so some read what others wrote.
    """
    lanes = min(_LANES, size)

    @T.prim_func(private=True, s_tir=True)
    def merge(var_v: T.handle, var_s: T.handle, var_v_other: T.handle, var_s_other: T.handle) -> None:
        T.func_attr({"tirx.is_scheduled": True})
        n = T.int32()
        v = T.match_buffer(var_v, (n, heads, size), dtype)
        s = T.match_buffer(var_s, (n, heads), "float32")
        v_other = T.match_buffer(var_v_other, (n, heads, size), dtype)
        s_other = T.match_buffer(var_s_other, (n, heads), "float32")
        for token in T.thread_binding(n, thread="blockIdx.x"):
            for head in T.thread_binding(heads, thread="blockIdx.y"):
                for lane in T.thread_binding(lanes, thread="threadIdx.x"):
                    with T.sblock("merge"):
                        T.reads()
                        T.writes()
                        shares = T.sblock_alloc_buffer((2,), "float32", scope="shared")
                        sums = T.sblock_alloc_buffer((3,), "float32", scope="local")
                        if lane == 0:
                            sums[0] = T.max(s[token, head], s_other[token, head])
                            sums[1] = T.exp2(s[token, head] - sums[0])
                            sums[2] = T.exp2(s_other[token, head] - sums[0])
                            shares[0] = sums[1] / (sums[1] + sums[2])
                            shares[1] = sums[2] / (sums[1] + sums[2])
                            s[token, head] = T.log2(sums[1] + sums[2]) + sums[0]
                        T.tvm_storage_sync("shared")
                        for i in T.serial(size // lanes):
                            v[token, head, i * lanes + lane] = T.Cast(
                                dtype,
                                T.Cast("float32", v[token, head, i * lanes + lane]) * shares[0]
                                + T.Cast("float32", v_other[token, head, i * lanes + lane]) * shares[1],
                            )

    return merge
