"""Checkpoints that compute the same and are quantized otherwise: their hidden units in another order."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np

from edgeq.checkpoint import Checkpoint

_READS = (
    *("embed_tokens", "lm_head", "q_proj", "k_proj", "v_proj", "gate_proj", "up_proj"),
    *("in_proj_qkv", "in_proj_z", "in_proj_a", "in_proj_b"),
)
_WRITES = ("o_proj", "down_proj", "out_proj", "input_layernorm", "post_attention_layernorm", "model.norm")


def write(checkpoint: Checkpoint, seed: int, out: Path) -> Checkpoint:
    """Copy of a small checkpoint whose hidden units are shuffled; seed 0 leaves their order.

    Blocks then hold other weights together, so rounding errors are drawn anew: what two rules lose by chance differs
    from order to order, what they lose by rule does not.
    """
    import torch
    from safetensors.torch import load_file, save_file

    shutil.copytree(checkpoint.folder, out)
    order = torch.arange(checkpoint.model.hidden)
    if seed:
        order = torch.from_numpy(np.random.default_rng(seed).permutation(checkpoint.model.hidden))
    for weights in out.glob("*.safetensors"):
        found = load_file(weights)
        for name, values in found.items():
            stem = name.removesuffix(".weight")
            if stem.endswith(_READS):
                found[name] = values[:, order].contiguous()
            elif stem.endswith(_WRITES):
                found[name] = values[order].contiguous()
        save_file(found, weights, {"format": "pt"})
    return Checkpoint.open(out)
