"""The graph of a checkpoint, from onnxruntime-genai's model builder used as a library.

The builder walks a transformers model whose matrices live on the meta device: it emits every operator and every
small tensor (norms, biases, convolution, rotary caches) and never sees a large weight. `weights` fills those in.
"""

from __future__ import annotations

import contextlib
import copy
import io
import json
import logging
import os
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from edgeq import size, transformer
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint

_SIDE_FILES = ("generation_config.json", "tokenizer.json", "tokenizer_config.json")
POSITIONS = "logits_at"
_GATHER, _AS_SEQUENCE = "/lm_head/prune/Gather", "/lm_head/prune/Unsqueeze"
_FLOATS = {"cpu": "FLOAT", "webgpu": "FLOAT", "cuda": "FLOAT16"}  # CUDA has no attention in float32
_GENAI_TYPES = {"qwen2": "Qwen2ForCausalLM", "qwen3": "Qwen3ForCausalLM", "qwen3_5_text": "qwen3_5_text"}


def skeleton(job: Job, out: Path) -> Any:
    """Graph (onnx_ir.Model) whose large initializers have shape but no data; writes genai_config.json into `out`.

    Its logits are those of the last token, or of the positions that are asked for: in a prompt the output layer is a
    quarter of Qwen3-0.6B's arithmetic, and a third of Qwen3.5-0.8B's. The norms of Qwen3's queries and keys stay
    operators of their own: fused into attention, as the builder does for GPUs, they would run on no CPU, and no build
    machine could check the graph.
    """
    os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
    from transformers import AutoConfig

    checkpoint = job.checkpoint
    settings = checkpoint.model.config() | {"max_position_embeddings": job.context}
    config = AutoConfig.for_model(**settings)
    with tempfile.TemporaryDirectory() as side, contextlib.redirect_stdout(io.StringIO()):
        for name in _SIDE_FILES:
            if (text := checkpoint.text_file(name)) is not None:
                Path(side, name).write_text(text, encoding="utf-8")
        Path(side, "config.json").write_text(json.dumps(settings), encoding="utf-8")
        config._name_or_path = side
        builder = _builder(checkpoint)(
            copy.deepcopy(config),
            floats(job),
            floats(job),
            job.target.onnx.provider,
            side,
            {
                "shared_embeddings": checkpoint.model.tied,
                "op_types_to_quantize": ("MatMul", "Gather"),
                "hf_token": False,
                "prune_lm_head": True,
                "fuse_qk_norm_gqa": False,
            },
        )
        builder.model_type = _GENAI_TYPES[checkpoint.model.model_type]
        builder.make_model(side)
        builder.make_genai_config(config, {}, str(out))
    _choose_positions(builder.model)
    builder.model.graph.sort()
    return builder.model


def floats(job: Job) -> Any:
    """Type (onnx_ir.DataType) of activations, states, norms and scales."""
    import onnx_ir as ir

    return ir.DataType[_FLOATS[job.target.onnx.provider]]


def _choose_positions(model: Any) -> None:
    """Make the positions of the logits an input that may be left out: int64 [kept], the last position by default.

    That is an initializer which is an input too (ONNX IR specification, "Graphs"). The logits stay declared as those of
    one position, from which genai knows that it need not ask for more.
    """
    import onnx_ir as ir

    nodes = {node.name: node for node in model.graph}
    gather, unsqueeze = nodes[_GATHER], nodes[_AS_SEQUENCE]
    last = ir.tensor([-1], name=POSITIONS)
    kind, shape = ir.TensorType(last.dtype), ir.Shape(["kept_positions"])
    positions = ir.Value(name=POSITIONS, type=kind, shape=shape, const_value=last)
    model.graph.register_initializer(positions)
    model.graph.inputs.append(positions)
    gather.replace_input_with(1, positions)
    gather.outputs[0].shape = ir.Shape([gather.inputs[0].shape[0], shape[0], gather.inputs[0].shape[2]])
    unsqueeze.outputs[0].replace_all_uses_with(gather.outputs[0])
    model.graph.remove(unsqueeze, safe=True)


def all_positions(model: Any) -> Any:
    """Undo the pruning of a graph in place: logits of every token, without a choice."""
    import onnx_ir as ir

    gather = next(node for node in model.graph if node.name == _GATHER)
    hidden, logits = gather.inputs[0], model.graph.outputs[0]
    gather.outputs[0].replace_all_uses_with(hidden)
    model.graph.remove(gather, safe=True)
    model.graph.inputs.remove(model.graph.initializers.pop(POSITIONS))
    logits.shape = ir.Shape([*hidden.shape[:2], logits.shape[2]])
    return model


@contextlib.contextmanager
def _own_logging() -> Iterator[None]:
    """Keep the root logger as it is: ONNX Runtime's quantizer, which the builder imports, makes it print everything."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        root.handlers[:], root.level = handlers, level


def _builder(checkpoint: Checkpoint) -> Any:
    """The builder's class for a generation, reading weights from a checkpoint instead of from_pretrained."""
    with _own_logging():
        import onnxruntime_genai.models  # noqa: F401  (puts the builder's own modules on the path)
        from onnxruntime_genai.models.builders import Qwen3Model, Qwen35TextModel, QwenModel

    base: Any = {"qwen2": QwenModel, "qwen3": Qwen3Model, "qwen3_5_text": Qwen35TextModel}[checkpoint.model.model_type]

    class Builder(base):  # type: ignore[misc]
        def load_weights(self, _: str) -> Any:
            return transformer.instantiate(checkpoint, lambda name: not size.is_quantized(name))

    return Builder
