"""Shapes of the three generations, against transformers and against the published parameter counts."""

from __future__ import annotations

import json
import re
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import checkpoints
from edgeq.errors import CorruptInput, EdgeqError, UnsafeInput, UnsupportedModel
from edgeq.model import MODEL_CLASSES, read_config

QWEN25 = {"model_type": "qwen2", "rope_theta": 1e6, "max_position_embeddings": 32768, "vocab_size": 151936}
QWEN3 = {"model_type": "qwen3", "rope_theta": 1e6, "max_position_embeddings": 40960, "vocab_size": 151936}
QWEN35 = {
    "model_type": "qwen3_5_text",
    "rope_parameters": {"rope_type": "default", "rope_theta": 1e7, "partial_rotary_factor": 0.25},
    "max_position_embeddings": 262144,
    "vocab_size": 248320,
    "linear_num_key_heads": 16,
    "linear_key_head_dim": 128,
    "linear_value_head_dim": 128,
    "linear_conv_kernel_dim": 4,
}
SIZES = ("num_hidden_layers", "hidden_size", "intermediate_size", "num_attention_heads", "num_key_value_heads")
PUBLISHED = [
    (QWEN25, (24, 896, 4864, 14, 2), {"tie_word_embeddings": True}, 494_032_768),
    (QWEN25, (28, 1536, 8960, 12, 2), {"tie_word_embeddings": True}, 1_543_714_304),
    (QWEN25, (36, 2048, 11008, 16, 2), {"tie_word_embeddings": True}, 3_085_938_688),
    (QWEN25, (28, 3584, 18944, 28, 4), {"tie_word_embeddings": False, "vocab_size": 152064}, 7_615_616_512),
    (QWEN3, (28, 1024, 3072, 16, 8), {"tie_word_embeddings": True, "head_dim": 128}, 596_049_920),
    (QWEN3, (28, 2048, 6144, 16, 8), {"tie_word_embeddings": True, "head_dim": 128}, 1_720_574_976),
    (QWEN3, (36, 2560, 9728, 32, 8), {"tie_word_embeddings": True, "head_dim": 128}, 4_022_468_096),
    (QWEN3, (36, 4096, 12288, 32, 8), {"tie_word_embeddings": False, "head_dim": 128}, 8_190_735_360),
    (
        QWEN35,
        (24, 1024, 3584, 8, 2),
        {"tie_word_embeddings": True, "head_dim": 256, "linear_num_value_heads": 16},
        752_393_024,
    ),
    (
        QWEN35,
        (24, 2048, 6144, 8, 2),
        {"tie_word_embeddings": True, "head_dim": 256, "linear_num_value_heads": 16},
        1_881_825_088,
    ),
    (
        QWEN35,
        (32, 2560, 9216, 16, 4),
        {"tie_word_embeddings": True, "head_dim": 256, "linear_num_value_heads": 32},
        4_205_751_296,
    ),
    (
        QWEN35,
        (32, 4096, 12288, 16, 4),
        {"tie_word_embeddings": False, "head_dim": 256, "linear_num_value_heads": 32},
        8_953_803_264,
    ),
]


@pytest.mark.parametrize(("family", "sizes", "more", "parameters"), PUBLISHED)
def test_parameters_are_those_of_the_published_model(
    family: dict[str, Any], sizes: tuple[int, ...], more: dict[str, Any], parameters: int
) -> None:
    assert read_config(family | dict(zip(SIZES, sizes, strict=True)) | more).parameters == parameters


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("generation", checkpoints.GENERATIONS)
def test_tensors_are_those_of_the_transformers_class(generation: str, tied: bool) -> None:
    import torch
    import transformers

    model = read_config(checkpoints.config_of(generation, tied=tied))
    config = transformers.AutoConfig.for_model(**model.config())
    with torch.device("meta"):
        reference = getattr(transformers, MODEL_CLASSES[model.model_type])(config)
    found = {name: tuple(tensor.shape) for name, tensor in reference.state_dict().items()}
    if tied:
        del found["lm_head.weight"]
    assert model.tensors() == found
    assert config.rope_parameters["rope_theta"] == model.rope["rope_theta"]


@pytest.mark.parametrize("generation", checkpoints.GENERATIONS)
def test_kinds_stand_for_every_tensor(generation: str) -> None:
    model = read_config(checkpoints.config_of(generation))
    left = dict(model.tensors())
    for name, shape, count in model.kinds:
        same = [each for each in left if re.sub(r"layers\.\d+", "", each) == re.sub(r"layers\.\d+", "", name)]
        assert (same[0], len(same)) == (name, count)
        assert {left.pop(each) for each in same} == {shape}
    assert not left


def test_a_multimodal_config_describes_its_text_model() -> None:
    whole = read_config(checkpoints.config_of("3.5", multimodal=True))
    text = read_config(checkpoints.config_of("3.5"))
    assert whole.tensors() == text.tensors()
    assert whole.config() == text.config()
    assert (whole.prefix, whole.has_vision, whole.has_mtp) == ("model.language_model.", True, True)


@pytest.mark.parametrize("generation", checkpoints.GENERATIONS)
def test_the_rebuilt_config_describes_the_same_model(generation: str) -> None:
    model = read_config(checkpoints.config_of(generation))
    assert read_config(model.config()) == model
    assert model.generation == generation


def test_only_full_attention_layers_keep_a_growing_cache() -> None:
    model = read_config(checkpoints.config_of("3.5"))
    assert model.layer_types.count("linear_attention") == 3
    assert model.kv_bytes_per_token(2) == 2 * 1 * 2 * 32 * 2


@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation", "_attn_implementation_internal"])
@pytest.mark.parametrize("inner", [False, True])
def test_a_config_that_asks_for_code_is_unsafe(key: str, inner: bool) -> None:
    config = checkpoints.config_of("3.5", multimodal=True)
    (config["text_config"] if inner else config)[key] = "someone/kernels"
    with pytest.raises(UnsafeInput, match=key):
        read_config(config)


@pytest.mark.parametrize(
    "change",
    [
        {"model_type": "llama"},
        {"model_type": ["qwen3"]},
        {"model_type": None},
        {"quantization_config": {"quant_method": "awq"}},
        {"hidden_act": "gelu"},
        {"use_sliding_window": True},
        {"rope_scaling": {"type": "yarn", "factor": 4.0}},
        {"layer_types": ["full_attention", "sliding_attention"]},
    ],
)
def test_another_kind_of_model_is_not_supported(change: dict[str, Any]) -> None:
    with pytest.raises(UnsupportedModel, match=r"config\.json"):
        read_config(checkpoints.config_of("3") | change)


@pytest.mark.parametrize(
    "change",
    [
        {"hidden_size": 0},
        {"hidden_size": 64.0},
        {"hidden_size": True},
        {"vocab_size": None},
        {"num_hidden_layers": 1 << 19},
        {"rms_norm_eps": 10**400},
        {"rope_theta": 10**400},
        {"rope_theta": "1e6"},
        {"tie_word_embeddings": "yes"},
        {"layer_types": ["full_attention"]},
        {"rope_parameters": [1]},
    ],
)
def test_an_impossible_value_is_named(change: dict[str, Any]) -> None:
    with pytest.raises(CorruptInput, match=next(iter(change)).replace("rope_parameters", "rope")):
        read_config(checkpoints.config_of("3") | change)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)


@settings(deadline=None, suppress_health_check=[HealthCheck.too_slow])
@given(
    data=st.data(), generation=st.sampled_from(checkpoints.GENERATIONS), multimodal=st.booleans(), inner=st.booleans()
)
def test_any_value_of_any_key_is_read_or_refused(
    data: st.DataObject, generation: str, multimodal: bool, inner: bool
) -> None:
    config = checkpoints.config_of(generation, multimodal=multimodal and generation == "3.5")
    level = config["text_config"] if inner and "text_config" in config else config
    keys = [*level, "rope_scaling", "layer_types", "head_dim", "partial_rotary_factor"]
    level[data.draw(st.sampled_from(keys))] = data.draw(JSON)
    assert outcome(config) in (0, 10, 11, 13)


def outcome(config: dict[str, Any]) -> int:
    """Exit code of reading a config, 0 when it is a model."""
    try:
        json.dumps(read_config(config).config())
    except EdgeqError as error:
        return error.exit_code
    return 0


def test_a_head_is_one_layer_of_full_attention_with_its_input_and_norms() -> None:
    found = read_config(checkpoints.config_of("3.5", multimodal=True)).head_tensors()
    assert found["mtp.fc.weight"] == (64, 128)
    assert found["mtp.layers.0.self_attn.q_proj.weight"] == (256, 64)
    assert sum(not name.startswith("mtp.layers.0.") for name in found) == 4
    assert len(found) == 15
    assert read_config(checkpoints.config_of("3.5")).head_tensors() == {}
