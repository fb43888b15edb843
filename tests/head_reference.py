"""Qwen3.5's multi-token-prediction head in float32, of transformers' own layers: what drafts should be."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from edgeq import transformer
from edgeq.checkpoint import Checkpoint


class Reference:
    """The model and its head; everything is computed anew for each call."""

    def __init__(self, folder: Path) -> None:
        import torch
        from transformers.models.qwen3_5 import modeling_qwen3_5 as qwen

        self._checkpoint = Checkpoint.open(folder)
        self._model = transformer.instantiate(self._checkpoint, lambda _: True)
        config = copy.deepcopy(self._model.model.config)
        config.layer_types, config.num_hidden_layers, config._attn_implementation = ["full_attention"], 1, "eager"
        self._layer = qwen.Qwen3_5DecoderLayer(config, 0).eval()
        self._layer.load_state_dict({name: self._tensor(f"layers.0.{name}") for name in self._layer.state_dict()})
        self._norms = {}
        for name in ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm"):
            self._norms[name] = qwen.Qwen3_5RMSNorm(config.hidden_size, eps=config.rms_norm_eps)
            self._norms[name].weight.data = self._tensor(f"{name}.weight")
        self._torch: Any = torch

    def _tensor(self, name: str) -> Any:
        import torch

        return torch.from_numpy(self._checkpoint.tensor(f"mtp.{name}"))

    def guesses(self, text: Sequence[int], count: int) -> list[int]:
        """What follows a text whose last token the model has not read: its head reads on into its own guesses.

        The head's state after a guess stands for the model's.
        """
        torch, base = self._torch, self._model.model
        with torch.inference_mode():
            states = base(input_ids=torch.tensor([text[:-1]])).last_hidden_state
            tokens, found = list(text[1:]), list[int]()
            while len(found) < count:
                out = self._run(tokens, states)
                found.append(int(self._model.lm_head(out[0, -1]).argmax()))
                tokens, states = [*tokens, found[-1]], torch.cat([states, out[:, -1:]], dim=1)
        return found

    def _run(self, tokens: Sequence[int], states: Any) -> Any:
        """States [1, n, hidden] of the head, from each token and the state before it."""
        torch, base, count = self._torch, self._model.model, len(tokens)
        embedded = self._norms["pre_fc_norm_embedding"](base.embed_tokens(torch.tensor([tokens])))
        both = torch.cat([embedded, self._norms["pre_fc_norm_hidden"](states)], dim=-1)
        positions = torch.arange(count).view(1, 1, -1).expand(3, 1, -1)
        mask = torch.triu(torch.full((count, count), float("-inf")), 1)[None, None]
        x = both @ self._tensor("fc.weight").T
        x = self._layer(x, position_embeddings=base.rotary_emb(x, positions), attention_mask=mask)
        return self._norms["norm"](x)
