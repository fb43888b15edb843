"""Qwen3.5's multi-token-prediction head in the GGUF file: one more layer, by llama.cpp's names for it.

The head guesses the token after the next from the next token's embedding and the last hidden state (DeepSeek-AI 2024,
"DeepSeek-V3 Technical Report", section 2.2). Table and output layer are the model's own. What it guesses is checked,
so that its precision costs speed at most: its matrices have 8 bits under every recipe of codes.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Job
from edgeq.backends.llamacpp import blocks, limits, tensors
from edgeq.errors import CorruptInput
from edgeq.model import Model
from edgeq.quantize import rtn
from edgeq.quantize.solution import Solution
from edgeq.quantize.solve import as_float

CODES = "Q8_0"
_LAYER = "mtp.layers.0."
_OUTER = {
    "mtp.fc.weight": "nextn.eh_proj.weight",
    "mtp.pre_fc_norm_embedding.weight": "nextn.enorm.weight",
    "mtp.pre_fc_norm_hidden.weight": "nextn.hnorm.weight",
    "mtp.norm.weight": "nextn.shared_head_norm.weight",
}


def gguf_name(model: Model, name: str) -> str:
    """GGUF's name of one of the head's tensors; its layer follows the last one."""
    if name in _OUTER:
        return f"blk.{model.layers}.{_OUTER[name]}"
    return tensors.gguf_name(model, f"model.layers.{model.layers}.{name.removeprefix(_LAYER)}")


def stored(job: Job, name: str) -> Iterator[NDArray[Any]]:
    """A tensor of the head as stored; raises CorruptInput when it is not finite."""
    values = job.checkpoint.tensor(name)
    if not np.isfinite(values).all():
        raise CorruptInput(
            f"{job.checkpoint.head[name].file}: {name} is not finite", run="copy or download the checkpoint again"
        )
    if values.ndim == 1:
        yield values + np.float32(1)
    elif job.recipe.body.is_float:
        yield as_float(job.checkpoint, job.recipe, name, values)
    else:
        yield blocks.pack(Solution(name, 8, limits.BLOCK, *rtn.quantize(values, 8, limits.BLOCK)))
