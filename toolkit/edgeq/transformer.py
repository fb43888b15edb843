"""A checkpoint as a transformers model, filled from edgeq's own reader: no file of the folder reaches transformers."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from edgeq.checkpoint import Checkpoint
from edgeq.errors import MissingTool


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
