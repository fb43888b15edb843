"""What a Qwen checkpoint is: generation, shapes, and the exact tensors that it must hold.

Read from `config.json` through an allow-list: nothing else of the file reaches another library.
Names of tensors are the text-only ones (`model.layers.0...`); `prefix` says how the checkpoint spells `model.`.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

from edgeq.errors import CorruptInput, UnsafeInput, UnsupportedModel

GENERATIONS = {"qwen2": "2.5", "qwen3": "3", "qwen3_5_text": "3.5"}
MODEL_CLASSES = {
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "qwen3_5_text": "Qwen3_5ForCausalLM",
}
IGNORED_TENSORS = ("model.visual.", "visual.", "mtp.", "model.mtp.")
_UNSAFE_KEYS = ("auto_map", "custom_pipelines", "trust_remote_code")
_LARGEST = 1 << 20
_LAYER = re.compile(r"(?<=^model\.layers\.)\d+")
_MOST_LAYERS = 1 << 10
_LARGEST_NUMBER = 1e30


@dataclass(frozen=True)
class LinearAttention:
    """Shape of Qwen3.5's gated delta-net layers: heads and head sizes of keys and values, taps of the convolution."""

    key_heads: int
    value_heads: int
    key_head_dim: int
    value_head_dim: int
    conv_kernel: int

    @property
    def conv_channels(self) -> int:
        """Channels of the causal convolution: queries, keys and values side by side."""
        return 2 * self.key_heads * self.key_head_dim + self.value_heads * self.value_head_dim


@dataclass(frozen=True)
class Model:
    """Text model of a checkpoint: all sizes in elements, `context` in tokens."""

    model_type: str
    layer_types: tuple[str, ...]
    hidden: int
    ffn: int
    heads: int
    kv_heads: int
    head_dim: int
    vocab: int
    tied: bool
    context: int
    rms_norm_eps: float
    rope: Mapping[str, Any]
    linear: LinearAttention | None
    prefix: str
    has_vision: bool
    has_mtp: bool

    @property
    def generation(self) -> str:
        """Qwen generation: "2.5", "3" or "3.5"."""
        return GENERATIONS[self.model_type]

    @property
    def layers(self) -> int:
        """Number of decoder layers."""
        return len(self.layer_types)

    @property
    def full_attention_layers(self) -> int:
        """Layers that keep keys and values of every token."""
        return self.layer_types.count("full_attention")

    @cached_property
    def parameters(self) -> int:
        """Weights of the text model, a tied table counted once."""
        return sum(math.prod(shape) for shape in self._tensors.values())

    def kv_bytes_per_token(self, bytes_per_value: int) -> int:
        """Bytes that one token adds to the KV cache."""
        return 2 * self.full_attention_layers * self.kv_heads * self.head_dim * bytes_per_value

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the text model, in the order of the forward pass."""
        return dict(self._tensors)

    @cached_property
    def _tensors(self) -> dict[str, tuple[int, ...]]:
        found: dict[str, tuple[int, ...]] = {"model.embed_tokens.weight": (self.vocab, self.hidden)}
        for index, kind in enumerate(self.layer_types):
            for name, shape in self._layer(kind):
                found[f"model.layers.{index}.{name}"] = shape
        found["model.norm.weight"] = (self.hidden,)
        if not self.tied:
            found["lm_head.weight"] = (self.vocab, self.hidden)
        return found

    @cached_property
    def kinds(self) -> tuple[tuple[str, tuple[int, ...], int], ...]:
        """Name of the first, shape and number of the tensors that layers call the same, which have one shape."""
        found: dict[str, list[str]] = {}
        for name in self._tensors:
            found.setdefault(_LAYER.sub("", name), []).append(name)
        return tuple((names[0], self._tensors[names[0]], len(names)) for names in found.values())

    def head_tensors(self) -> dict[str, tuple[int, ...]]:
        """Name and shape of every tensor of the multi-token-prediction head, beside its table; none without a head."""
        if not self.has_mtp:
            return {}
        norms = ("pre_fc_norm_embedding", "pre_fc_norm_hidden", "norm")
        found: dict[str, tuple[int, ...]] = {"mtp.fc.weight": (self.hidden, 2 * self.hidden)}
        found |= {f"mtp.{name}.weight": (self.hidden,) for name in norms}
        return found | {f"mtp.layers.0.{name}": shape for name, shape in self._layer("full_attention")}

    def _layer(self, kind: str) -> Iterator[tuple[str, tuple[int, ...]]]:
        yield "input_layernorm.weight", (self.hidden,)
        if kind == "linear_attention":
            yield from self._delta_net()
        else:
            yield from self._attention()
        yield "post_attention_layernorm.weight", (self.hidden,)
        yield "mlp.gate_proj.weight", (self.ffn, self.hidden)
        yield "mlp.up_proj.weight", (self.ffn, self.hidden)
        yield "mlp.down_proj.weight", (self.hidden, self.ffn)

    def _attention(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        queries, keys = self.heads * self.head_dim, self.kv_heads * self.head_dim
        gated = 2 if self.model_type == "qwen3_5_text" else 1
        for name, rows in (("q", queries * gated), ("k", keys), ("v", keys)):
            yield f"self_attn.{name}_proj.weight", (rows, self.hidden)
            if self.model_type == "qwen2":
                yield f"self_attn.{name}_proj.bias", (rows,)
        if self.model_type != "qwen2":
            yield "self_attn.q_norm.weight", (self.head_dim,)
            yield "self_attn.k_norm.weight", (self.head_dim,)
        yield "self_attn.o_proj.weight", (self.hidden, queries)

    def _delta_net(self) -> Iterator[tuple[str, tuple[int, ...]]]:
        assert self.linear is not None
        values = self.linear.value_heads * self.linear.value_head_dim
        yield "linear_attn.in_proj_qkv.weight", (self.linear.conv_channels, self.hidden)
        yield "linear_attn.in_proj_z.weight", (values, self.hidden)
        yield "linear_attn.in_proj_b.weight", (self.linear.value_heads, self.hidden)
        yield "linear_attn.in_proj_a.weight", (self.linear.value_heads, self.hidden)
        yield "linear_attn.conv1d.weight", (self.linear.conv_channels, 1, self.linear.conv_kernel)
        yield "linear_attn.dt_bias", (self.linear.value_heads,)
        yield "linear_attn.A_log", (self.linear.value_heads,)
        yield "linear_attn.norm.weight", (self.linear.value_head_dim,)
        yield "linear_attn.out_proj.weight", (self.hidden, values)

    def config(self) -> dict[str, Any]:
        """Text-only `config.json` with known keys alone, as transformers 4 and 5 both read it."""
        config: dict[str, Any] = {
            "architectures": [MODEL_CLASSES[self.model_type]],
            "model_type": self.model_type,
            "vocab_size": self.vocab,
            "hidden_size": self.hidden,
            "intermediate_size": self.ffn,
            "num_hidden_layers": self.layers,
            "num_attention_heads": self.heads,
            "num_key_value_heads": self.kv_heads,
            "head_dim": self.head_dim,
            "max_position_embeddings": self.context,
            "hidden_act": "silu",
            "rms_norm_eps": self.rms_norm_eps,
            "tie_word_embeddings": self.tied,
            "rope_theta": self.rope["rope_theta"],
            "rope_parameters": dict(self.rope),
            "layer_types": list(self.layer_types),
        }
        if self.linear is not None:
            config |= {
                "linear_num_key_heads": self.linear.key_heads,
                "linear_num_value_heads": self.linear.value_heads,
                "linear_key_head_dim": self.linear.key_head_dim,
                "linear_value_head_dim": self.linear.value_head_dim,
                "linear_conv_kernel_dim": self.linear.conv_kernel,
                "partial_rotary_factor": self.rope["partial_rotary_factor"],
            }
        return config


def read_config(config: Mapping[str, Any]) -> Model:
    """Model that a parsed `config.json` describes.

    Raises UnsafeInput when the file asks for code to be run, UnsupportedModel for another architecture or
    an already quantized checkpoint, and CorruptInput when a size is missing or impossible.
    """
    _refuse_code(config)
    outer = config.get("model_type")
    text = config.get("text_config") if outer == "qwen3_5" else config
    if not isinstance(text, Mapping):
        raise CorruptInput("config.json: text_config is missing", why="A Qwen3.5 folder holds its text model there.")
    _refuse_code(text)
    model_type = "qwen3_5_text" if outer == "qwen3_5" else outer
    if not isinstance(model_type, str) or model_type not in GENERATIONS:
        raise UnsupportedModel(
            f"config.json: model_type {outer!r} is not supported",
            why="edgeq builds dense Qwen2.5 (qwen2), Qwen3 (qwen3) and Qwen3.5 (qwen3_5, qwen3_5_text) checkpoints.",
            run="edgeq models list",
        )
    return _Reader(config, text).model(model_type)


def _refuse_code(config: Mapping[str, Any]) -> None:
    for key in config:
        if key in _UNSAFE_KEYS or key.startswith("_attn_implementation"):
            raise UnsafeInput(
                f"config.json: key {key!r} would run code that came with the checkpoint",
                why="edgeq never runs code from a checkpoint.",
                run="remove the key, or take the checkpoint from its original publisher",
            )


class _Reader:
    """Checked access to the two levels of a config: the file and its text model."""

    def __init__(self, config: Mapping[str, Any], text: Mapping[str, Any]) -> None:
        self.outer, self.text = config, text

    def model(self, model_type: str) -> Model:
        if self.outer.get("quantization_config") or self.text.get("quantization_config"):
            raise UnsupportedModel(
                "config.json: the checkpoint is quantized already (quantization_config)",
                why="Quantizing twice adds both losses.",
                run="take the bf16 checkpoint of the same model",
            )
        if self.text.get("hidden_act", "silu") != "silu":
            raise UnsupportedModel(f"config.json: hidden_act {self.text['hidden_act']!r} is not supported")
        if self.text.get("use_sliding_window"):
            raise UnsupportedModel("config.json: use_sliding_window is not supported")
        heads, hidden = self.size("num_attention_heads"), self.size("hidden_size")
        head_dim = self.size("head_dim", hidden // heads)
        layers = self.size("num_hidden_layers", largest=_MOST_LAYERS)
        hybrid = model_type == "qwen3_5_text"
        return Model(
            model_type=model_type,
            layer_types=self.layer_types(layers, hybrid),
            hidden=hidden,
            ffn=self.size("intermediate_size"),
            heads=heads,
            kv_heads=self.size("num_key_value_heads", heads),
            head_dim=head_dim,
            vocab=self.size("vocab_size"),
            tied=self.flag("tie_word_embeddings"),
            context=self.size("max_position_embeddings", largest=1 << 24),
            rms_norm_eps=self.number("rms_norm_eps", 1e-6),
            rope=self.rope(hybrid),
            linear=self.linear() if hybrid else None,
            prefix="model.language_model." if "text_config" in self.outer else "model.",
            has_vision="vision_config" in self.outer,
            has_mtp=bool(self.text.get("mtp_num_hidden_layers")),
        )

    def size(self, key: str, default: int | None = None, largest: int = _LARGEST) -> int:
        value = self.text.get(key)
        value = default if value is None else value
        if type(value) is not int or not 0 < value <= largest:
            raise CorruptInput(f"config.json: {key} is {value!r}", why=f"It must be an integer from 1 to {largest}.")
        return value

    def number(self, key: str, default: float) -> float:
        value = self.text.get(key, default)
        if type(value) not in (int, float) or not 0 < value < _LARGEST_NUMBER:
            raise CorruptInput(f"config.json: {key} is {value!r}", why="It must be a positive number.")
        return float(value)

    def flag(self, key: str) -> bool:
        value = self.text.get(key, self.outer.get(key, False))
        if type(value) is not bool:
            raise CorruptInput(f"config.json: {key} is {value!r}", why="It must be true or false.")
        return value

    def layer_types(self, layers: int, hybrid: bool) -> tuple[str, ...]:
        interval = self.size("full_attention_interval", 4) if hybrid else 1
        usual = ["full_attention" if (n + 1) % interval == 0 else "linear_attention" for n in range(layers)]
        given = self.text.get("layer_types") or usual
        if not isinstance(given, list) or len(given) != layers:
            raise CorruptInput("config.json: layer_types does not name one type for each layer")
        allowed = {"full_attention", "linear_attention"} if hybrid else {"full_attention"}
        if unknown := {str(kind) for kind in given} - allowed:
            raise UnsupportedModel(f"config.json: layer types {sorted(unknown)} are not supported")
        return tuple(given)

    def rope(self, hybrid: bool) -> dict[str, Any]:
        given = self.text.get("rope_parameters") or self.text.get("rope_scaling") or {}
        if not isinstance(given, Mapping):
            raise CorruptInput("config.json: rope_parameters is not an object")
        kind = given.get("rope_type", given.get("type", "default"))
        if kind != "default":
            raise UnsupportedModel(f"config.json: rope type {kind!r} is not supported", why="Known: default.")
        theta = given.get("rope_theta", self.text.get("rope_theta"))
        if type(theta) not in (int, float) or not 0 < theta < _LARGEST_NUMBER:
            raise CorruptInput(f"config.json: rope_theta is {theta!r}", why="It must be a positive number.")
        rope: dict[str, Any] = {"rope_type": "default", "rope_theta": float(theta)}
        if hybrid:
            share = given.get("partial_rotary_factor", self.text.get("partial_rotary_factor", 0.25))
            sections = given.get("mrope_section", [11, 11, 10])
            if type(share) not in (int, float) or not 0 < share <= 1:
                raise CorruptInput(f"config.json: partial_rotary_factor is {share!r}")
            if not isinstance(sections, list) or [type(n) for n in sections] != [int] * 3:
                raise CorruptInput(f"config.json: mrope_section is {sections!r}")
            rope |= {"partial_rotary_factor": share, "mrope_interleaved": True, "mrope_section": sections}
        return rope

    def linear(self) -> LinearAttention:
        return LinearAttention(
            key_heads=self.size("linear_num_key_heads"),
            value_heads=self.size("linear_num_value_heads"),
            key_head_dim=self.size("linear_key_head_dim"),
            value_head_dim=self.size("linear_value_head_dim"),
            conv_kernel=self.size("linear_conv_kernel_dim"),
        )
