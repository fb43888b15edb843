"""A checkpoint as a transformers model, filled from edgeq's own reader and its allow-listed configuration."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import Any

from edgeq.checkpoint import Checkpoint
from edgeq.errors import MissingTool, OutOfMemory
from edgeq.machine import this_machine
from edgeq.model import Model

FLOAT_BYTES = 4
_QUANTIZING_BYTES = 6  # of the largest matrix, for each weight: codes, scales, and the float32 that they stand for
_LIBRARY_BYTES = 600_000_000  # torch, transformers and ONNX Runtime, as measured


def check_memory(model: Model, beside: int = 0) -> None:
    """Raise OutOfMemory, with the prediction, when a float32 model and so many bytes beside it would not fit here."""
    import psutil

    largest = max(math.prod(shape) for shape in model.tensors().values())
    needed = beside + FLOAT_BYTES * model.parameters + _QUANTIZING_BYTES * largest + _LIBRARY_BYTES
    available = min(psutil.virtual_memory().available, this_machine().memory_bytes or sys.maxsize)
    if needed > available:
        raise OutOfMemory(
            f"the float32 reference needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are free",
            why="It takes 4 bytes for each of the checkpoint's weights.",
            run="close other programs, or use a machine with more memory; a bundle itself runs without torch",
        )


def instantiate(checkpoint: Checkpoint, wanted: Callable[[str], bool]) -> Any:
    """Float32 transformers model in eval mode; tensors that are not `wanted` stay on the meta device.

    Raises MissingTool when transformers or torch is absent.
    """
    try:
        import torch
        from transformers import AutoConfig, AutoModelForCausalLM
        from transformers.utils import logging
    except ImportError as error:
        raise MissingTool(
            "the float32 reference needs torch and transformers", why=str(error), run="pip install 'edgeq[build]'"
        ) from error
    logging.set_verbosity_error()
    config = AutoConfig.for_model(**checkpoint.model.config())
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    for name in filter(wanted, checkpoint.model.tensors()):
        module, _, parameter = name.rpartition(".")
        data = torch.from_numpy(checkpoint.tensor(name))
        setattr(model.get_submodule(module), parameter, torch.nn.Parameter(data, requires_grad=False))
    if checkpoint.model.tied:
        model.lm_head.weight = model.model.embed_tokens.weight
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    return model.eval()
