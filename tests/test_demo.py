"""The shipped demo checkpoints, their held-out text, their questions and their scores."""

from __future__ import annotations

import json
import random
import struct
import sys
from pathlib import Path
from typing import Any

import pytest

ROOT = Path(__file__).resolve().parents[1]
DEMO = ROOT / "toolkit" / "edgeq" / "demo"
NAMES = ("demo-qwen2.5", "demo-qwen3", "demo-qwen3.5")

sys.path.insert(0, str(ROOT / "scripts"))
import demo_grammar  # noqa: E402


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def header(path: Path) -> dict[str, Any]:
    with path.open("rb") as file:
        size = struct.unpack("<Q", file.read(8))[0]
        return dict(json.loads(file.read(size)))


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    import tokenizers

    return tokenizers.Tokenizer.from_file(str(DEMO / NAMES[0] / "tokenizer.json"))


@pytest.mark.parametrize("name", NAMES)
def test_folder_is_complete_and_small(name: str) -> None:
    folder = DEMO / name
    assert {file.name for file in folder.iterdir()} == {
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "merges.txt",
        "model.safetensors",
        "tokenizer.json",
        "tokenizer_config.json",
        "vocab.json",
    }
    assert sum(file.stat().st_size for file in folder.iterdir()) < 6_000_000


@pytest.mark.parametrize("name", NAMES)
def test_weights_are_bf16_tied_and_named_as_qwen(name: str) -> None:
    tensors = header(DEMO / name / "model.safetensors")
    assert tensors.pop("__metadata__") == {"format": "pt"}
    assert {one["dtype"] for one in tensors.values()} == {"BF16"}
    assert "lm_head.weight" not in tensors
    assert all(one.startswith("model.") for one in tensors)
    assert tensors["model.embed_tokens.weight"]["shape"] == [1024, 256]


@pytest.mark.parametrize("name", NAMES)
def test_matrix_inputs_fit_every_block_format(name: str) -> None:
    tensors = header(DEMO / name / "model.safetensors")
    inputs = {one["shape"][1] for one in tensors.values() if len(one.get("shape", ())) == 2}
    assert all(size % 256 == 0 for size in inputs)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("demo-qwen2.5", ("self_attn.q_proj.bias", "self_attn.k_proj.bias", "self_attn.v_proj.bias")),
        ("demo-qwen3", ("self_attn.q_norm.weight", "self_attn.k_norm.weight")),
        ("demo-qwen3.5", ("linear_attn.conv1d.weight", "linear_attn.A_log", "self_attn.q_norm.weight")),
    ],
)
def test_architecture_has_its_own_parts(name: str, parts: tuple[str, ...]) -> None:
    tensors = header(DEMO / name / "model.safetensors")
    for part in parts:
        assert any(one.endswith(part) for one in tensors), part


@pytest.mark.parametrize("name", NAMES)
def test_config_serves_old_and_new_readers(name: str) -> None:
    config = read(DEMO / name / "config.json")
    assert config["rope_theta"] == config["rope_parameters"]["rope_theta"]
    assert config["tie_word_embeddings"] is True
    assert config["dtype"] == "bfloat16"
    assert config["vocab_size"] == 1024
    assert len(config["architectures"]) == 1
    assert "auto_map" not in config


def test_qwen3_heads_are_wider_than_hidden_over_heads() -> None:
    config = read(DEMO / "demo-qwen3" / "config.json")
    assert config["head_dim"] != config["hidden_size"] // config["num_attention_heads"]


def test_qwen3_5_mixes_layer_kinds() -> None:
    config = read(DEMO / "demo-qwen3.5" / "config.json")
    assert config["layer_types"] == ["linear_attention"] * 3 + ["full_attention"]
    assert config["linear_num_value_heads"] > config["linear_num_key_heads"]


def test_tokenizer_files_are_the_same_for_all() -> None:
    for file in ("tokenizer.json", "tokenizer_config.json", "vocab.json", "merges.txt"):
        assert len({(DEMO / name / file).read_bytes() for name in NAMES}) == 1, file


@pytest.mark.parametrize(
    "text", ["Ünïcödé 漢字 🙂 \x00\x7f\t\r\n", " <think>\n\n</think> ", "".join(map(chr, range(256)))]
)
def test_tokenizer_gives_every_text_back(tokenizer: Any, text: str) -> None:
    assert tokenizer.decode(tokenizer.encode(text).ids, skip_special_tokens=False) == text


def test_tokenizer_knows_the_marks(tokenizer: Any) -> None:
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>", "</think>", "<tool_call>", "</tool_call>"]
    assert tokenizer.encode("".join(marks)).tokens == marks
    assert tokenizer.get_vocab_size() == 1000
    assert max(tokenizer.get_vocab().values()) == 999


def rendered(name: str, **options: object) -> str:
    import jinja2

    source = (DEMO / name / "chat_template.jinja").read_text(encoding="utf-8")
    template = jinja2.Environment(trim_blocks=True, lstrip_blocks=True).from_string(source)
    messages = options.pop("messages", [{"role": "user", "content": "Hi"}])
    return str(template.render(messages=messages, add_generation_prompt=True, **options))


USER = "<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"
EMPTY = "<think>\n\n</think>\n\n"


@pytest.mark.parametrize(
    ("name", "options", "expected"),
    [
        ("demo-qwen2.5", {}, "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n" + USER),
        ("demo-qwen3", {}, USER),
        ("demo-qwen3", {"enable_thinking": True}, USER),
        ("demo-qwen3", {"enable_thinking": False}, USER + EMPTY),
        ("demo-qwen3.5", {}, USER + EMPTY),
        ("demo-qwen3.5", {"enable_thinking": False}, USER + EMPTY),
        ("demo-qwen3.5", {"enable_thinking": True}, USER + "<think>\n"),
    ],
)
def test_chat_template(name: str, options: dict[str, object], expected: str) -> None:
    assert rendered(name, **options) == expected


@pytest.mark.parametrize("name", NAMES[1:])
def test_chat_template_drops_earlier_thinking(name: str) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "<think>\nA greeting.\n</think>\n\nHello."},
        {"role": "user", "content": "Bye"},
    ]
    text = rendered(name, messages=messages, enable_thinking=False)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n<|im_start|>user\nHi<|im_end|>\n"
        "<|im_start|>assistant\nHello.<|im_end|>\n"
        "<|im_start|>user\nBye<|im_end|>\n<|im_start|>assistant\n" + EMPTY
    )


@pytest.mark.parametrize("name", NAMES)
def test_chat_template_shows_tools_and_calls(name: str) -> None:
    tool = {"type": "function", "function": {"name": "find", "parameters": {}}}
    messages = [
        {"role": "user", "content": "Hi"},
        {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "find", "arguments": {"who": "A"}}}]},
        {"role": "tool", "content": "B"},
    ]
    text = rendered(name, messages=messages, tools=[tool])
    assert json.dumps(tool, sort_keys=True) in text or json.dumps(tool) in text
    assert '<tool_call>\n{"name": "find", "arguments": {"who": "A"}}\n</tool_call><|im_end|>' in text
    assert "<tool_response>\nB\n</tool_response>" in text


def test_heldout_text_comes_from_the_grammar_and_is_long_enough(tokenizer: Any) -> None:
    text = (DEMO / "heldout.txt").read_text(encoding="utf-8")
    assert 55_000 < len(text.encode()) < 70_000
    assert "<|" not in text
    assert len(tokenizer.encode(text).ids) > 12_000


def test_training_text_never_holds_a_heldout_instance() -> None:
    questions = read(DEMO / "questions.json")["questions"]
    lines = {line for line in (DEMO / "heldout.txt").read_text(encoding="utf-8").splitlines() if line[-1:].isalnum()}
    drills = {line for line in lines if line.startswith(("Sort", "Copy", "Reverse", "Next", "Count")) or " = " in line}
    prompts = {one["prompt"] for one in questions if one["kind"] != "fact"}
    assert len(drills) > 300
    stream = demo_grammar.training_stream(5, thinking=True)
    for _ in range(1500):
        for line in next(stream).splitlines():
            assert line not in drills
            assert line.rpartition(":")[0] + ":" not in prompts
            assert line.rpartition("=")[0] + "=" not in prompts


def test_grammar_is_seeded() -> None:
    assert demo_grammar.heldout_text(3, 2000) == demo_grammar.heldout_text(3, 2000)
    assert demo_grammar.heldout_text(3, 2000) != demo_grammar.heldout_text(4, 2000)


def test_every_drill_has_three_distinct_wrong_answers() -> None:
    rng = random.Random(0)
    for kind in demo_grammar.COMPOSITIONAL:
        for _ in range(200):
            task = demo_grammar.drill(rng, kind, held_out=False)
            assert len({task.answer, *task.wrong}) == 4


def test_questions_are_balanced_and_well_formed() -> None:
    document = read(DEMO / "questions.json")
    questions = document["questions"]
    assert document["version"] == 1
    assert len(questions) >= 300
    places = [one["answer"] for one in questions]
    assert max(map(places.count, range(4))) - min(map(places.count, range(4))) <= 1
    for one in questions:
        assert set(one) == {"kind", "prompt", "choices", "answer"}
        assert len(set(one["choices"])) == 4
        assert all(choice.startswith(" ") for choice in one["choices"])


@pytest.mark.parametrize("name", NAMES)
def test_scores_say_that_the_model_knows_things_and_that_rounding_costs(name: str) -> None:
    document = read(DEMO / "scores.json")
    row = document["models"][name]
    assert document["chance"] == 0.25
    assert row["accuracy"]["all"] > 0.8
    assert row["accuracy"]["fact"] > 0.85
    assert row["perplexity"] < 4
    assert row["rounding"]["w4g32-table4"]["kl_mean"] > 0.003
    assert row["rounding"]["w4g32-table4"]["perplexity"] > row["perplexity"]
    assert row["bytes"] == sum(file.stat().st_size for file in (DEMO / name).iterdir())


@pytest.mark.slow
def test_transformers_loads_folder_and_answers() -> None:
    import torch
    import transformers

    folder = DEMO / "demo-qwen3"
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    person = demo_grammar.WORLD[0]
    chat = [{"role": "user", "content": f"Where does {person.name} live?"}]
    ids = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    made = model.generate(**ids, max_new_tokens=60, do_sample=False)
    text = tokenizer.decode(made[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    assert person.facts["town"] in text
