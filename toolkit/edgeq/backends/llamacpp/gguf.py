"""One GGUF file of a checkpoint: metadata by gguf's own writer, then the tensors, streamed.

What the keys mean: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md. All keys are llama.cpp's, except those
that say where the file comes from, under `edgeq.`.
"""

from __future__ import annotations

import logging
import math
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Job
from edgeq.backends.llamacpp import blocks, head, limits, tensors, vocabulary
from edgeq.model import Model
from edgeq.quantize.solve import PIECE, as_float, float_type
from edgeq.size import is_quantized, layout_of
from edgeq.version import VERSION

MODEL = "model.gguf"
_FLOATS = {"bfloat16": "BF16", "float16": "F16", "float32": "F32"}
_ARCHITECTURES = {"2.5": "qwen2", "3": "qwen3", "3.5": "qwen35"}
_FILE_TYPES = {"F32": "ALL_F32", "Q3_K": "MOSTLY_Q3_K_S", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}


def write(job: Job, out: Path) -> None:
    """Write `model.gguf` into `out`, one matrix in memory at a time.

    Raises UsageFault when GGML's blocks cannot hold the recipe, UnsupportedModel when llama.cpp cannot run the layers,
    and what reading the tokenizer and `solve` raise.
    """
    alignment = _write_header(job, out / MODEL)
    _write_tensors(job, out / MODEL, alignment)


def beside_bytes(job: Job) -> int:
    """Bytes of the file beside the matrices that recipes quantize; raises what reading the tokenizer raises."""
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, MODEL)
        alignment = _write_header(job, path)
        size = path.stat().st_size
    vectors = {
        name: shape for name, shape in _shapes(job).items() if not is_quantized(name) or name in job.checkpoint.head
    }
    return (
        size + sum(_stored_bytes(job, name, shape) for name, shape in vectors.items()) + alignment * len(_shapes(job))
    )


def _write_header(job: Job, path: Path) -> int:
    """Write metadata and what is known of the tensors; returns what their places are multiples of."""
    import gguf

    logging.getLogger("gguf").setLevel(logging.WARNING)
    model = job.checkpoint.model
    limits.check(model, job.recipe)
    writer = gguf.GGUFWriter(path, _ARCHITECTURES[model.generation])
    writer.add_type(gguf.GGUFType.MODEL)
    writer.add_size_label(_size_label(model))
    _add_shape(writer, model, heads=1 if job.checkpoint.head else 0)
    _add_tokenizer(writer, job)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    body = _format(job, next(name for name in model.tensors() if name.endswith("mlp.down_proj.weight")))
    writer.add_file_type(gguf.LlamaFileType[_FILE_TYPES.get(body, f"MOSTLY_{body}")])
    writer.add_string("edgeq.version", VERSION)
    writer.add_string("edgeq.recipe", str(job.recipe))
    for name, shape in _shapes(job).items():
        kind = gguf.GGMLQuantizationType[_format(job, name)]
        stored = shape if len(shape) < 3 else (shape[0], shape[2])
        naming = head if name in job.checkpoint.head else tensors
        writer.add_tensor_info(
            naming.gguf_name(model, name), stored, np.dtype(np.float32), _stored_bytes(job, name, shape), kind
        )
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    writer.close()
    alignment: int = writer.data_alignment
    return alignment


def _stored_bytes(job: Job, name: str, shape: tuple[int, ...]) -> int:
    import gguf

    values, size = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[_format(job, name)]]
    stored: int = math.prod(shape) // values * size
    return stored


def _shapes(job: Job) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor in the order of the file."""
    model = job.checkpoint.model
    return model.tensors() | (model.head_tensors() if job.checkpoint.head else {})


def _add_shape(writer: Any, model: Model, heads: int) -> None:
    writer.add_context_length(model.context)
    writer.add_embedding_length(model.hidden)
    writer.add_block_count(model.layers + heads)
    if heads:
        writer.add_nextn_predict_layers(heads)
    writer.add_feed_forward_length(model.ffn)
    writer.add_head_count(model.heads)
    writer.add_head_count_kv(model.kv_heads)
    writer.add_key_length(model.head_dim)
    writer.add_value_length(model.head_dim)
    writer.add_layer_norm_rms_eps(model.rms_norm_eps)
    writer.add_rope_freq_base(model.rope["rope_theta"])
    writer.add_vocab_size(model.vocab)
    if model.linear is None:
        return
    writer.add_rope_dimension_count(int(model.head_dim * model.rope["partial_rotary_factor"]))
    writer.add_rope_dimension_sections([*model.rope["mrope_section"], 0])
    writer.add_full_attention_interval(limits.full_attention_interval(model))
    writer.add_ssm_conv_kernel(model.linear.conv_kernel)
    writer.add_ssm_state_size(model.linear.key_head_dim)
    writer.add_ssm_group_count(model.linear.key_heads)
    writer.add_ssm_time_step_rank(model.linear.value_heads)
    writer.add_ssm_inner_size(model.linear.value_heads * model.linear.value_head_dim)


def _size_label(model: Model) -> str:
    """Parameters as people write them: 600M, 1.7B."""
    billions = model.parameters / 1e9
    return f"{billions:.1f}B" if billions >= 1 else f"{billions * 1e3:.0f}M"


def _add_tokenizer(writer: Any, job: Job) -> None:
    found = vocabulary.read(job.checkpoint)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary.PRE_TOKENIZERS[job.checkpoint.model.generation])
    writer.add_token_list(found.tokens)
    writer.add_token_types(found.kinds)
    writer.add_token_merges(found.merges)
    writer.add_add_bos_token(False)
    for add, number in ((writer.add_bos_token_id, found.bos), (writer.add_eos_token_id, found.eos)):
        if number is not None:
            add(number)
    if found.pad is not None:
        writer.add_pad_token_id(found.pad)
    if (template := job.checkpoint.chat_template()) is not None:
        writer.add_chat_template(template)


def _format(job: Job, name: str) -> str:
    """GGML's name of how a tensor is stored."""
    if name in job.checkpoint.head and len(job.checkpoint.head[name].shape) == 2:
        return _FLOATS[float_type(job.checkpoint, job.recipe, name).name] if job.recipe.body.is_float else head.CODES
    if not is_quantized(name):
        return "F32"
    layout = layout_of(job.checkpoint.model, job.recipe, name)
    if layout.is_float:
        return _FLOATS[float_type(job.checkpoint, job.recipe, name).name]
    return blocks.format_of(layout)


def _write_tensors(job: Job, path: Path, alignment: int) -> None:
    names = list(_shapes(job))
    with path.open("ab") as stream:
        for done, name in enumerate(names):
            job.progress("quantize", done, len(names))
            stream.write(b"\0" * (-stream.tell() % alignment))
            for rows in head.stored(job, name) if name in job.checkpoint.head else _stored(job, name):
                stream.write(np.ascontiguousarray(rows).view(np.uint8).data)
        stream.write(b"\0" * (-stream.tell() % alignment))
    job.progress("quantize", len(names), len(names))


def _stored(job: Job, name: str) -> Iterator[NDArray[Any]]:
    """A tensor as stored, in runs of rows."""
    model = job.checkpoint.model
    order = tensors.columns(model, name)
    if not is_quantized(name):
        yield tensors.float32(job.checkpoint, name)
    elif layout_of(model, job.recipe, name).is_float:
        for start, stop in _pieces(model, name):
            rows = job.checkpoint.rows(name, start, stop)
            yield as_float(job.checkpoint, job.recipe, name, rows if order is None else rows[:, order])
    else:
        solution = job.solution(name)
        solution = solution if order is None else tensors.with_columns(solution, order)
        for start, stop in _pieces(model, name):
            yield blocks.pack(solution, slice(start, stop))


def _pieces(model: Model, name: str) -> Iterator[tuple[int, int]]:
    """Runs of rows in the order of the file, `PIECE` weights each at most."""
    step = max(1, PIECE // model.tensors()[name][1])
    for first, last in tensors.row_runs(model, name):
        for start in range(first, last, step):
            yield start, min(start + step, last)
