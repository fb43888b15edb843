"""Tiny random checkpoints in the layout of the published ones, written without torch or transformers."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.model import Model, read_config

SPECIALS = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")
VOCAB = 288
GENERATIONS = ("2.5", "3", "3.5")
CHAT_TEMPLATE = (
    "{%- for message in messages %}"
    "{{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>\\n' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"
)
_DTYPES = {"bf16": "BF16", "f16": "F16", "f32": "F32"}


Build = Callable[..., Path]


def quiet(phase: str, done: int, total: int) -> None:
    """Progress that nobody reads."""


def write(
    folder: Path,
    generation: str,
    *,
    tied: bool = True,
    shards: int = 1,
    multimodal: bool = False,
    dtype: str = "bf16",
    seed: int = 0,
) -> Path:
    """Write a checkpoint of generation "2.5", "3" or "3.5" into `folder` (made when absent), and return it.

    Hidden 64, ffn 128, 2 layers (3.5: three linear and one full), vocabulary 288 of which the tokenizer knows 260
    (bytes, specials, and one merge, of two zero bytes).
    Same arguments, same bytes.
    """
    folder.mkdir(parents=True, exist_ok=True)
    config = config_of(generation, tied=tied, multimodal=multimodal)
    write_json(folder / "config.json", config)
    write_weights(folder, random_tensors(read_config(config), seed, multimodal), _DTYPES[dtype], shards)
    _write_tokenizer(folder)
    return folder


def config_of(generation: str, *, tied: bool = True, multimodal: bool = False) -> dict[str, Any]:
    """`config.json` as the publisher writes it."""
    text: dict[str, Any] = {
        "hidden_size": 64,
        "intermediate_size": 128,
        "num_hidden_layers": 2,
        "num_attention_heads": 2 if generation == "2.5" else 4,
        "num_key_value_heads": 1 if generation == "2.5" else 2,
        "vocab_size": VOCAB,
        "max_position_embeddings": 512,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-6,
        "tie_word_embeddings": tied,
        "torch_dtype": "bfloat16",
        "bos_token_id": 256,
        "eos_token_id": 258,
    }
    if generation == "2.5":
        return {"architectures": ["Qwen2ForCausalLM"], "model_type": "qwen2", "rope_theta": 1e6} | text
    text["head_dim"] = 32
    if generation == "3":
        return {"architectures": ["Qwen3ForCausalLM"], "model_type": "qwen3", "rope_theta": 1e6} | text
    rope = {
        "rope_type": "default",
        "rope_theta": 1e7,
        "partial_rotary_factor": 0.25,
        "mrope_interleaved": True,
        "mrope_section": [2, 1, 1],
    }
    text |= {
        "model_type": "qwen3_5_text",
        "num_hidden_layers": 4,
        "full_attention_interval": 4,
        "linear_num_key_heads": 2,
        "linear_num_value_heads": 4,
        "linear_key_head_dim": 32,
        "linear_value_head_dim": 32,
        "linear_conv_kernel_dim": 4,
        "rope_parameters": rope,
    }
    if not multimodal:
        return {"architectures": ["Qwen3_5ForCausalLM"]} | text
    return {
        "architectures": ["Qwen3_5ForConditionalGeneration"],
        "model_type": "qwen3_5",
        "tie_word_embeddings": tied,
        "text_config": text | {"mtp_num_hidden_layers": 1},
        "vision_config": {"depth": 1, "hidden_size": 32},
    }


def random_tensors(model: Model, seed: int, multimodal: bool) -> dict[str, NDArray[np.float32]]:
    """Float32 values of every tensor under the name that the checkpoint gives it."""
    random = np.random.default_rng(seed)
    found: dict[str, NDArray[np.float32]] = {}
    for name, shape in model.tensors().items():
        values = random.normal(0, 0.05, shape).astype(np.float32)
        if name.endswith("norm.weight"):
            around_zero = model.generation == "3.5" and not name.endswith("linear_attn.norm.weight")
            values += 0 if around_zero else 1
        if name.endswith("A_log"):
            values = np.log(random.uniform(1, 16, shape)).astype(np.float32)
        found[name if name == "lm_head.weight" else model.prefix + name.removeprefix("model.")] = values
    if multimodal:
        for name, shape in {
            "model.visual.patch_embed.proj.weight": (32, 3, 2, 4, 4),
            "model.visual.blocks.0.attn.qkv.weight": (96, 32),
            "model.visual.blocks.0.attn.qkv.bias": (96,),
        }.items():
            found[name] = random.normal(0, 0.05, shape).astype(np.float32)
        for name, shape in model.head_tensors().items():
            found[name] = random.normal(0, 0.05, shape).astype(np.float32)
    return found


def write_weights(folder: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str, shards: int) -> None:
    """Weights in one file, or spread over `shards` files with their index; `dtype` is BF16, F16 or F32."""
    if shards == 1:
        write_safetensors(folder / "model.safetensors", tensors, dtype)
        return
    names = list(tensors)
    weight_map: dict[str, str] = {}
    for number in range(shards):
        part = names[number * len(names) // shards : (number + 1) * len(names) // shards]
        file = f"model-{number + 1:05}-of-{shards:05}.safetensors"
        write_safetensors(folder / file, {name: tensors[name] for name in part}, dtype)
        weight_map |= dict.fromkeys(part, file)
    total = sum(tensor.size for tensor in tensors.values()) * int(encode(np.zeros(1, np.float32), dtype).itemsize)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    write_json(folder / "model.safetensors.index.json", index)


def write_safetensors(path: Path, tensors: Mapping[str, NDArray[np.float32]], dtype: str) -> None:
    """One safetensors file, its header padded to eight bytes as the reference writer does."""
    header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
    blobs, offset = [], 0
    for name, tensor in tensors.items():
        blob = encode(tensor, dtype).tobytes()
        header[name] = {"dtype": dtype, "shape": list(tensor.shape), "data_offsets": [offset, offset + len(blob)]}
        offset += len(blob)
        blobs.append(blob)
    write_raw(path, json.dumps(header, separators=(",", ":")).encode(), b"".join(blobs))


def read_safetensors(path: Path) -> tuple[dict[str, Any], bytes]:
    """Header and data of a sound safetensors file."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    return json.loads(raw[8 : 8 + length]), raw[8 + length :]


def write_raw(path: Path, header: bytes, data: bytes) -> None:
    """A file in safetensors' framing around any header and data."""
    header += b" " * (-len(header) % 8)
    path.write_bytes(len(header).to_bytes(8, "little") + header + data)


def encode(values: NDArray[np.float32], dtype: str) -> NDArray[Any]:
    """Values as stored: BF16 as 16-bit patterns rounded to nearest even, F16, or F32."""
    if dtype == "F32":
        return values.astype("<f4")
    if dtype == "F16":
        return values.astype("<f2")
    bits: NDArray[np.uint32] = np.ascontiguousarray(values, np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def write_json(path: Path, document: object) -> None:
    """A JSON document as the publisher formats it."""
    path.write_text(json.dumps(document, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def _write_tokenizer(folder: Path) -> None:
    letters = _byte_letters()
    added = [
        {"id": len(letters) + n, "content": word, "special": True, "lstrip": False, "rstrip": False}
        | {"single_word": False, "normalized": False}
        for n, word in enumerate(SPECIALS)
    ]
    byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": False, "use_regex": False}
    tokenizer: dict[str, Any] = {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": added,
        "normalizer": {"type": "NFC"},
        "pre_tokenizer": byte_level,
        "post_processor": byte_level,
        "decoder": byte_level,
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": "",
            "end_of_word_suffix": "",
            "fuse_unk": False,
            "byte_fallback": False,
            "vocab": {word: number for number, word in enumerate([*letters, *SPECIALS, "ĀĀ"])},
            "merges": [["Ā", "Ā"]],
        },
    }
    write_json(folder / "tokenizer.json", tokenizer)
    write_json(
        folder / "tokenizer_config.json",
        {
            "tokenizer_class": "Qwen2Tokenizer",
            "model_max_length": 512,
            "bos_token": None,
            "eos_token": "<|im_end|>",
            "pad_token": "<|endoftext|>",
            "add_prefix_space": False,
        },
    )
    write_json(folder / "generation_config.json", {"eos_token_id": [258, 256], "pad_token_id": 256, "do_sample": True})
    (folder / "chat_template.jinja").write_text(CHAT_TEMPLATE, encoding="utf-8")


def _byte_letters() -> list[str]:
    """Printable stand-in of each byte, as GPT-2's byte-level BPE defines them: token id = byte."""
    plain = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = iter(range(256, 512))
    return [chr(byte) if byte in plain else chr(next(others)) for byte in range(256)]
