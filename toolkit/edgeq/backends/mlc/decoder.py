"""What a library can be asked: the functions around a stack of layers, by the names and arguments of MLC's libraries.

    embed(ids [n], params)                                   -> [n, hidden]
    batch_prefill(x [1, n, hidden], positions [m], kv, ...)  -> logits [1, m, vocabulary]
    batch_verify(x [1, n, hidden], kv, ...)                  -> logits [1, n, vocabulary]
    decode(x [1, 1, hidden], kv, ...)                        -> logits [1, 1, vocabulary]
    batch_decode(x [batch, 1, hidden], kv, ...)              -> logits [batch, 1, vocabulary]
    create_tir_paged_kv_cache(batch, tokens, chunk, page, sliding)

Logits are float32. Where layers keep a state of their own, `...` begins with all of them and the next ones follow the
logits and the cache; a layer may overwrite its state in place. For a processor `kv` is a list: the tokens before, int32
[1], and each layer's keys and values, overwritten in place; the last two functions are absent.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from tvm import relax
from tvm.relax.frontend import nn
from tvm.relax.frontend.nn import Tensor, spec
from tvm.relax.frontend.nn.llm.kv_cache import PagedKVCache, RopeMode, TIRPagedKVCache

from edgeq.backends.mlc import attention, operators
from edgeq.backends.mlc.cpu.attention import Cache
from edgeq.backends.mlc.cpu.lanes import LANES
from edgeq.backends.mlc.layers import Linear, Norm, Precision
from edgeq.model import Model
from edgeq.size import TABLES

PAGE = 16
_PACKED = {"param_mode": "packed", "effect_mode": "none"}


class Stack(nn.Module):
    """Table, layers and last norm, named as the checkpoint names them."""

    def __init__(self, model: Model, precision: Precision, layers: Sequence[nn.Module]) -> None:
        self.embed_tokens = Linear(precision, TABLES[0], model.hidden, model.vocab)
        self.layers = nn.ModuleList(list(layers))
        self.norm = Norm(model.hidden, model.rms_norm_eps)


class Decoder(nn.Module):
    """A causal language model; a layer is called with x, the cache and the list of states, which it may change."""

    def __init__(
        self,
        model: Model,
        precision: Precision,
        target: Any,
        layers: Sequence[nn.Module],
        states: Sequence[tuple[Sequence[int], str]] = (),
    ) -> None:
        self._shape, self._precision, self._target, self.states = model, precision, target, tuple(states)
        self.plain = target.kind.name == "llvm"
        self.caches = _caches(model, precision.stored) if self.plain else ()
        self.model = Stack(model, precision, layers)
        self.lm_head = None if model.tied else Linear(precision, TABLES[1], model.hidden, model.vocab)

    def embed(self, ids: Tensor) -> Tensor:
        """Rows of the table."""
        return self.model.embed_tokens.take(ids)

    def batch_prefill(self, x: Tensor, positions: Tensor, kv: Any, states: Any = None) -> Any:
        """Logits at some positions."""
        return self._run(x, kv, states, positions)

    def batch_verify(self, x: Tensor, kv: Any, states: Any = None) -> Any:
        """Logits at all positions."""
        return self._run(x, kv, states)

    decode = batch_decode = batch_verify

    def _run(self, x: Tensor, kv: PagedKVCache, states: Any, positions: Tensor | None = None) -> Any:
        kept = list(states or ())
        given = kv
        if self.plain:
            rotated = int(self._shape.head_dim * self._shape.rope.get("partial_rotary_factor", 1))
            kv = Cache(kv[0], kv[1:], self._shape.rope["rope_theta"], rotated)
        for layer in self.model.layers:
            x = layer(x, kv, kept)
        if positions is not None:
            x = operators.at_positions(x, positions)
        logits = (self.lm_head or self.model.embed_tokens)(self.model.norm(x), "float32")
        return (logits, given, kept) if kept else (logits, given)

    def create_tir_paged_kv_cache(self, batch: Any, tokens: Any, chunk: Any, page: Any, sliding: Any) -> Any:
        """Empty keys and values of `tokens` tokens in all; queries and keys are rotated on their way in."""
        model = self._shape
        layers = model.full_attention_layers
        cache = TIRPagedKVCache(
            attn_kind="mha",
            max_batch_size=batch,
            max_total_seq_len=tokens,
            prefill_chunk_size=chunk,
            page_size=page,
            support_sliding_window=sliding,
            layer_partition=relax.ShapeExpr([0, layers]),
            num_hidden_layers=layers,
            num_attention_heads=model.heads,
            num_key_value_heads=model.kv_heads,
            qk_head_dim=model.head_dim,
            v_head_dim=model.head_dim,
            mla_original_qk_head_dim=0,
            mla_original_v_head_dim=0,
            rope_mode=RopeMode.NORMAL,
            rope_scale=1,
            rope_theta=model.rope["rope_theta"],
            rope_scaling={},
            rope_ext_factors=relax.prim_value(0),
            rotary_dim=int(model.head_dim * model.rope.get("partial_rotary_factor", 1)),
            enable_disaggregation=False,
            dtype=self._precision.dtype,
            target=self._target,
        )
        builder = relax.BlockBuilder.current()
        merge = builder.get().get_global_var("tir_attention_merge_state")
        builder.update_func(merge, attention.merge_state(model.heads, model.head_dim, self._precision.dtype))
        return cache

    @property
    def cache_bytes(self) -> int:
        """Of a token's keys and values, where they are plain."""
        sizes = (np.dtype(dtype).itemsize for _, dtype in self.caches)
        return sum(self._shape.kv_heads * self._shape.head_dim * size for size in sizes)

    def functions(self) -> dict[str, dict[str, Any]]:
        """Arguments of each function, as `export_tvm` wants them."""

        def run(batch: int | str, n: int | str, **more: Any) -> dict[str, Any]:
            x = spec.Tensor([batch, n, self._shape.hidden], self._precision.dtype)
            states = [spec.Tensor([batch, *shape], dtype) for shape, dtype in self.states]
            kv: Any = spec.Object(PagedKVCache)
            if self.plain:
                kv = [spec.Tensor([1], "int32"), *(spec.Tensor(shape, dtype) for shape, dtype in self.caches)]
            given = {"x": x, **more, "kv": kv}
            return given | ({"states": states} if states else {}) | {"$": dict(_PACKED)}

        sizes = dict.fromkeys(("batch", "tokens", "chunk", "page", "sliding"), int)
        paged = {
            "batch_decode": run("b", 1),
            "create_tir_paged_kv_cache": {**sizes, "$": {"param_mode": "none", "effect_mode": "none"}},
        }
        return {
            "embed": {"ids": spec.Tensor(["n"], "int32"), "$": dict(_PACKED)},
            "batch_prefill": run(1, "n", positions=spec.Tensor(["m"], "int32")),
            "batch_verify": run(1, "n"),
            "decode": run(1, 1),
            **({} if self.plain else paged),
        }


def _caches(model: Model, dtype: str) -> Sequence[tuple[Sequence[int | str], str]]:
    """Shape and dtype of each layer's keys and values, in blocks of positions."""
    keys = (model.kv_heads, "blocks", model.head_dim, LANES), dtype
    values = (model.kv_heads, "blocks", LANES, model.head_dim), dtype
    return (keys, values) * model.full_attention_layers
