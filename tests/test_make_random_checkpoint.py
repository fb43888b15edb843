from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import script_files
from edgeq import catalog
from edgeq.checkpoint import Checkpoint
from edgeq.errors import UsageFault
from edgeq.model import read_config

SMALL = {"num_hidden_layers": 4, "hidden_size": 64, "intermediate_size": 96, "vocab_size": 512}
SMALL |= {"num_attention_heads": 4, "num_key_value_heads": 2}
HYBRID = {"linear_num_key_heads": 2, "linear_num_value_heads": 4, "linear_key_head_dim": 16}
HYBRID |= {"linear_value_head_dim": 16, "head_dim": 32}
CATALOGUE = ("qwen2.5-0.5b", "qwen3-0.6b", "qwen3.5-0.8b")


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("make_random_checkpoint") as module:
        yield module


def shrunk(name: str) -> dict[str, Any]:
    """Configuration of a catalogue model, its sizes made small."""
    config = json.loads(json.dumps(catalog.load(name).config))
    text = config.get("text_config", config)
    text.update(SMALL | (HYBRID if "text_config" in config else {"head_dim": 16}))
    return dict(config)


def write(script: Any, name: str, folder: Path, **words: Any) -> Checkpoint:
    words = {"seed": 0, "shard_bytes": 1 << 30, "dtype": "bf16", "progress": lambda done, total: None} | words
    script.write_checkpoint(shrunk(name), folder, **words)
    return Checkpoint.open(folder)


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_checkpoint_is_complete_and_sound(script: Any, tmp_path: Path, name: str) -> None:
    found = write(script, name, tmp_path / "made")
    found.scan(lambda done, total: None)
    assert found.model.generation == catalog.load(name).generation
    assert found.dtype("model.embed_tokens.weight") == "BF16"
    assert 0.019 < found.tensor("model.embed_tokens.weight").std() < 0.021


@pytest.mark.parametrize("name", CATALOGUE)
def test_the_first_layers_alone_have_the_shapes_that_they_had(script: Any, name: str) -> None:
    whole = shrunk(name)
    shapes = read_config(whole).tensors()
    some = read_config(script.first_layers(whole, 3))
    assert some.layers == 3
    assert some.tensors() == {name: shape for name, shape in shapes.items() if "layers.3." not in name}
    assert script.first_layers(whole, None) == whole == shrunk(name)


@pytest.mark.parametrize("name", CATALOGUE)
def test_transformers_loads_it_and_computes(script: Any, tmp_path: Path, name: str) -> None:
    import torch
    import transformers

    write(script, name, tmp_path / "made", dtype="f32")
    model, report = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "made", output_loading_info=True)
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    with torch.no_grad():
        logits = model(torch.arange(12)[None]).logits
    assert logits.isfinite().all()
    assert logits.std() > 0.01


def test_norms_start_at_one_and_as_a_difference_in_qwen_3_5(script: Any, tmp_path: Path) -> None:
    usual = write(script, "qwen3-0.6b", tmp_path / "3")
    hybrid = write(script, "qwen3.5-0.8b", tmp_path / "3.5")
    name = "model.layers.0.input_layernorm.weight"
    assert abs(usual.tensor(name).mean() - 1) < 0.02
    assert abs(hybrid.tensor(name).mean()) < 0.02
    assert abs(hybrid.tensor("model.layers.0.linear_attn.norm.weight").mean() - 1) < 0.02
    decay = hybrid.tensor("model.layers.0.linear_attn.A_log")
    assert (decay >= 0).all()
    assert (decay <= np.log(16) + 0.01).all()


def test_shards_respect_their_size_and_hold_the_same_values(script: Any, tmp_path: Path) -> None:
    whole = write(script, "qwen3-0.6b", tmp_path / "whole")
    parts = write(script, "qwen3-0.6b", tmp_path / "parts", shard_bytes=100_000)
    assert [path.name for path in whole.weights] == ["model.safetensors"]
    assert len(parts.weights) > 2
    assert all(path.stat().st_size < 110_000 for path in parts.weights)
    for name in whole.model.tensors():
        np.testing.assert_array_equal(whole.tensor(name), parts.tensor(name))


def test_the_seed_decides_the_values(script: Any, tmp_path: Path) -> None:
    made = [write(script, "qwen3-0.6b", tmp_path / str(n), seed=seed) for n, seed in enumerate((1, 1, 2))]
    first, same, other = (checkpoint.tensor("model.embed_tokens.weight") for checkpoint in made)
    np.testing.assert_array_equal(first, same)
    assert (first != other).mean() > 0.9


def test_rounding_to_bfloat16_is_to_the_nearest(script: Any) -> None:
    import torch

    values = np.random.default_rng(0).standard_normal(4096).astype(np.float32)
    expected = torch.from_numpy(values).to(torch.bfloat16).view(torch.int16).numpy().tobytes()
    assert script._encoded(values, "bf16") == expected


def test_every_text_tokenizes_and_comes_back(script: Any, tmp_path: Path) -> None:
    import tokenizers

    script.write_tokenizer(tmp_path)
    tokenizer = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    text = "Grüße, 世界!\n<|im_end|>"
    ids = tokenizer.encode(text).ids
    assert max(ids) < 300
    assert tokenizer.decode(ids, skip_special_tokens=False) == text
    settings = json.loads((tmp_path / "generation_config.json").read_text())
    assert settings["eos_token_id"] == [tokenizer.token_to_id("<|im_end|>"), tokenizer.token_to_id("<|endoftext|>")]


def test_a_folder_with_files_is_left_alone(script: Any, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UsageFault, match="not empty"):
        write(script, "qwen3-0.6b", tmp_path)


def test_the_command_line_says_what_is_wrong(script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert script.main(["qwen3-0.5b", str(tmp_path)]) == 2
    assert "Did you mean" in capsys.readouterr().err


@pytest.mark.parametrize("size", ["2 cups", "0GB", "-1GB"])
def test_a_size_must_be_one(script: Any, tmp_path: Path, size: str) -> None:
    with pytest.raises(SystemExit):
        script.main(["qwen3-0.6b", str(tmp_path), f"--shard-size={size}"])
