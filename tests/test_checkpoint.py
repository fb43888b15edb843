"""Checkpoints, sound and damaged: every fault is found, with its exit code and the name of what is wrong."""

from __future__ import annotations

import json
import os
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import checkpoints
from edgeq import tensorfile
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, EdgeqError, UnsafeInput, UnsupportedModel, UsageFault
from edgeq.model import read_config

UP = "model.layers.0.mlp.up_proj.weight"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
INDEX = "model.safetensors.index.json"


def quiet(done: int, total: int) -> None:
    """Progress that nobody watches."""


def scanned(folder: Path) -> Checkpoint:
    """A checkpoint whose every weight was read."""
    checkpoint = Checkpoint.open(folder)
    checkpoint.scan(quiet)
    return checkpoint


def fault_of(folder: Path, *, scan: bool = False) -> EdgeqError:
    """Error at opening (and scanning) a folder, which must come within a second of work."""
    begun = time.process_time()
    with pytest.raises(EdgeqError) as caught:
        scanned(folder) if scan else Checkpoint.open(folder)
    assert time.process_time() - begun < 1
    assert caught.value.run or caught.value.why
    return caught.value


def rewrite(path: Path, change: Callable[[dict[str, Any]], object]) -> None:
    """Change the header of a safetensors file, and nothing else."""
    header, data = checkpoints.read_safetensors(path)
    change(header)
    checkpoints.write_raw(path, json.dumps(header).encode(), data)


def change_json(path: Path, **change: object) -> None:
    """Set keys of a JSON file."""
    checkpoints.write_json(path, json.loads(path.read_bytes()) | change)


def change_tensors(
    folder: Path, generation: str, change: Callable[[dict[str, Any]], object], dtype: str = "BF16"
) -> None:
    """Write the weights of a one-file checkpoint again, changed."""
    tensors = checkpoints.random_tensors(read_config(checkpoints.config_of(generation)), 0, False)
    change(tensors)
    checkpoints.write_weights(folder, tensors, dtype, 1)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A sound checkpoint in one file."""
    return checkpoints.write(tmp_path / "tiny", "3")


@pytest.fixture
def sharded(tmp_path: Path) -> Path:
    """A sound checkpoint in two files."""
    return checkpoints.write(tmp_path / "tiny", "3", shards=2)


@pytest.mark.parametrize("shards", [1, 3])
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("dtype", ["bf16", "f16", "f32"])
@pytest.mark.parametrize(("generation", "multimodal"), [("2.5", False), ("3", False), ("3.5", False), ("3.5", True)])
def test_every_tensor_comes_back_as_it_was_written(
    tmp_path: Path, generation: str, multimodal: bool, dtype: str, tied: bool, shards: int
) -> None:
    checkpoints.write(tmp_path, generation, tied=tied, shards=shards, multimodal=multimodal, dtype=dtype)
    checkpoint = Checkpoint.open(tmp_path)
    checkpoint.scan(quiet)
    written = checkpoints.random_tensors(checkpoint.model, 0, multimodal)
    assert list(checkpoint.entries) == list(checkpoint.model.tensors())
    for name, entry in checkpoint.entries.items():
        tolerance = {"bf16": 2**-8, "f16": 2**-10, "f32": 0}[dtype]
        assert checkpoint.dtype(name) == dtype.upper()
        assert checkpoint.tensor(name).dtype == np.float32
        np.testing.assert_allclose(checkpoint.tensor(name), written[entry.name], rtol=tolerance, atol=1e-7)


def test_bf16_values_are_exact(folder: Path) -> None:
    values = np.array([1.0, -2.5, 3.140625, 2.0**-130, 0.0], np.float32)

    def change(tensors: dict[str, Any]) -> None:
        tensors[UP][0, :5] = values

    change_tensors(folder, "3", change)
    np.testing.assert_array_equal(Checkpoint.open(folder).tensor(UP)[0, :5], values)


def test_pieces_of_any_size_give_the_same_values_and_positions(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = Checkpoint.open(folder).tensor(UP)
    monkeypatch.setattr(tensorfile, "PIECE", 4096)
    np.testing.assert_array_equal(scanned(folder).tensor(UP), whole)
    np.testing.assert_array_equal(Checkpoint.open(folder).rows(UP, 60, 128), whole[60:])

    def change(tensors: dict[str, Any]) -> None:
        tensors[UP][127, 63] = np.nan

    change_tensors(folder, "3", change)
    assert f"{UP}[127, 63] is NaN" in str(fault_of(folder, scan=True))


def test_rows_are_the_rows_of_the_tensor(sharded: Path) -> None:
    checkpoint = Checkpoint.open(sharded)
    np.testing.assert_array_equal(checkpoint.rows(UP, 3, 7), checkpoint.tensor(UP)[3:7])
    assert checkpoint.rows(UP, 5, 5).shape == (0, 64)


def test_progress_counts_the_bytes_of_the_text_model(folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    checkpoint = Checkpoint.open(folder)
    checkpoint.scan(lambda done, total: seen.append((done, total)))
    assert seen[-1] == (2 * checkpoint.model.parameters, 2 * checkpoint.model.parameters)
    assert seen == sorted(seen)


def test_files_are_those_that_the_model_needs_with_their_digests(sharded: Path) -> None:
    (sharded / "README.md").write_text("not needed")
    (sharded / "training_args.bin").write_bytes(b"not needed either")
    found = Checkpoint.open(sharded).files()
    assert [file.path for file in found] == [
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        FIRST,
        SECOND,
        INDEX,
        "tokenizer.json",
        "tokenizer_config.json",
    ]
    assert all(file.bytes == (sharded / file.path).stat().st_size and len(file.sha256) == 64 for file in found)


def test_the_template_is_taken_from_its_file_or_the_tokenizer_config(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.chat_template() == checkpoints.CHAT_TEMPLATE
    (folder / "chat_template.jinja").unlink()
    assert checkpoint.chat_template() is None
    change_json(folder / "tokenizer_config.json", chat_template="one")
    assert checkpoint.chat_template() == "one"
    named = [{"name": "tool_use", "template": "two"}, {"name": "default", "template": "three"}]
    change_json(folder / "tokenizer_config.json", chat_template=named)
    assert checkpoint.chat_template() == "three"
    change_json(folder / "tokenizer_config.json", chat_template=named[:1])
    assert checkpoint.chat_template() is None


def test_a_template_that_is_not_text_is_corrupt(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    (folder / "chat_template.jinja").write_bytes(b"\xff\xfe")
    with pytest.raises(CorruptInput, match=r"chat_template\.jinja: not UTF-8"):
        checkpoint.chat_template()
    (folder / "chat_template.jinja").unlink()
    change_json(folder / "tokenizer_config.json", chat_template=7)
    with pytest.raises(CorruptInput, match="chat_template is not text"):
        checkpoint.chat_template()


def test_an_absent_side_file_is_none_and_a_huge_one_corrupt(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    assert checkpoint.text_file("special_tokens_map.json") is None
    with (folder / "chat_template.jinja").open("wb") as stream:
        stream.truncate(64 << 20)
    with pytest.raises(CorruptInput, match="larger than 32 MiB"):
        checkpoint.text_file("chat_template.jinja")


def test_the_layout_of_the_hub_cache_is_read_through_its_links(tmp_path: Path) -> None:
    source = checkpoints.write(tmp_path / "source", "3.5", shards=2, multimodal=True)
    blobs, snapshot = tmp_path / "models--Qwen--Tiny" / "blobs", tmp_path / "models--Qwen--Tiny" / "snapshots" / "abc"
    blobs.mkdir(parents=True)
    snapshot.mkdir(parents=True)
    for number, path in enumerate(sorted(source.iterdir())):
        shutil.copy(path, blobs / str(number))
        (snapshot / path.name).symlink_to(Path("../../blobs") / str(number))
    linked, plain = Checkpoint.open(snapshot), Checkpoint.open(source)
    linked.scan(quiet)
    assert linked.files() == plain.files()
    np.testing.assert_array_equal(linked.tensor(UP), plain.tensor(UP))


@pytest.mark.parametrize("missing", [SECOND, "chat_template.jinja", "generation_config.json"])
def test_a_link_that_leads_nowhere_is_corrupt(sharded: Path, missing: str) -> None:
    (sharded / missing).unlink()
    (sharded / missing).symlink_to("../../blobs/gone")
    with pytest.raises(CorruptInput, match=f"{missing}: missing"):
        Checkpoint.open(sharded).text_file(missing)


@pytest.mark.parametrize("name", [b"caf\xe9 \xff", "模型 with spaces".encode(), b"x" * 200])
def test_any_name_of_the_folder_works(tmp_path: Path, name: bytes) -> None:
    place = Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), name)))  # noqa: PTH118
    checkpoint = Checkpoint.open(checkpoints.write(place, "2.5"))
    checkpoint.scan(quiet)
    assert len(checkpoint.files()) == 6


def test_a_folder_that_is_not_there_is_a_usage_fault(tmp_path: Path) -> None:
    assert fault_of(tmp_path / "absent").exit_code == UsageFault.exit_code


@pytest.mark.parametrize("name", ["config.json", "tokenizer.json", FIRST, SECOND, INDEX])
def test_a_missing_file_is_named(sharded: Path, name: str) -> None:
    (sharded / name).unlink()
    fault = fault_of(sharded)
    assert fault.exit_code == 10
    assert f"{name}: missing" in str(fault)


def test_a_folder_without_weights_is_corrupt(folder: Path) -> None:
    (folder / "model.safetensors").unlink()
    assert "model.safetensors: missing" in str(fault_of(folder))


def test_one_shard_of_several_without_an_index_is_corrupt(sharded: Path) -> None:
    (sharded / INDEX).unlink()
    (sharded / SECOND).unlink()
    assert f"{INDEX}: missing" in str(fault_of(sharded))


def test_a_single_shard_with_its_index_is_whole(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path, "3")
    name = "model.safetensors-00001-of-00001.safetensors"
    (folder / "model.safetensors").rename(folder / name)
    header, _ = checkpoints.read_safetensors(folder / name)
    checkpoints.write_json(folder / INDEX, {"weight_map": {key: name for key in header if key != "__metadata__"}})
    assert Checkpoint.open(folder).weights == (folder / name,)
    (folder / INDEX).unlink()
    assert Checkpoint.open(folder).weights == (folder / name,)


@pytest.mark.parametrize("cut", [0, 4, 8, 100, -1])
def test_a_file_cut_short_is_corrupt(sharded: Path, cut: int) -> None:
    raw = (sharded / SECOND).read_bytes()
    (sharded / SECOND).write_bytes(raw[:cut])
    fault = fault_of(sharded)
    assert fault.exit_code == 10
    assert SECOND in str(fault)


def test_a_file_with_bytes_behind_its_tensors_is_corrupt(folder: Path) -> None:
    with (folder / "model.safetensors").open("ab") as stream:
        stream.write(b"x")
    assert "longer than its header says" in str(fault_of(folder))


def test_a_file_cut_short_after_opening_is_corrupt(folder: Path) -> None:
    checkpoint = Checkpoint.open(folder)
    os.truncate(folder / "model.safetensors", 4096)
    with pytest.raises(CorruptInput, match=r"model\.safetensors: cut short inside tensor"):
        checkpoint.scan(quiet)


@pytest.mark.parametrize(("value", "word"), [(np.nan, "NaN"), (np.inf, "infinite"), (-np.inf, "infinite")])
@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_nan_or_infinite_weight_is_found(folder: Path, value: float, word: str, dtype: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[UP][17, 5] = value

    change_tensors(folder, "3", change, dtype)
    fault = fault_of(folder, scan=True)
    assert fault.exit_code == 10
    assert f"model.safetensors: {UP}[17, 5] is {word}" in str(fault)


@pytest.mark.parametrize("dtype", ["BF16", "F16", "F32"])
def test_a_zeroed_block_is_found(folder: Path, dtype: str) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors[UP].reshape(-1)[4096:] = 0

    change_tensors(folder, "3", change, dtype)
    fault = fault_of(folder, scan=True)
    assert fault.exit_code == 10
    assert f"{UP}[64, 0] begins 4096 zeros" in str(fault)


@pytest.mark.parametrize(
    ("generation", "name", "legal"),
    [
        ("2.5", "model.layers.0.self_attn.q_proj.bias", True),
        ("2.5", "model.layers.1.input_layernorm.weight", False),
        ("3", "model.layers.0.self_attn.q_norm.weight", False),
        ("3", "model.embed_tokens.weight", False),
        ("3.5", "model.layers.1.input_layernorm.weight", True),
        ("3.5", "model.layers.0.linear_attn.dt_bias", True),
        ("3.5", "model.layers.0.linear_attn.conv1d.weight", False),
    ],
)
def test_a_tensor_of_zeros_is_found_where_it_cannot_be_meant(
    tmp_path: Path, generation: str, name: str, legal: bool
) -> None:
    folder = checkpoints.write(tmp_path, generation)

    def change(tensors: dict[str, Any]) -> None:
        tensors[name][:] = 0

    change_tensors(folder, generation, change)
    if legal:
        scanned(folder)
    else:
        assert f"{name} is zero throughout" in str(fault_of(folder, scan=True))


def test_unused_rows_of_the_table_may_be_zero(folder: Path) -> None:
    def change(tensors: dict[str, Any]) -> None:
        tensors["model.embed_tokens.weight"][64:] = 0

    change_tensors(folder, "3", change)
    scanned(folder)


def test_a_missing_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, "3", lambda tensors: tensors.pop(UP))
    fault = fault_of(folder)
    assert fault.exit_code == 10
    assert f"tensor {UP} is missing" in str(fault)


@pytest.mark.parametrize(("layers", "words"), [(1, "model.layers.1."), (3, "model.layers.2.")])
def test_a_wrong_layer_count_is_found(folder: Path, layers: int, words: str) -> None:
    change_json(folder / "config.json", num_hidden_layers=layers)
    fault = fault_of(folder)
    assert fault.exit_code == 10
    assert words in str(fault)
    assert f"{layers} layers" in str(fault)


def test_an_extra_tensor_is_named(folder: Path) -> None:
    change_tensors(folder, "3", lambda tensors: tensors.update({"model.extra": np.ones(3, np.float32)}))
    assert "tensor 'model.extra' is not part of the model" in str(fault_of(folder))


@pytest.mark.parametrize(
    ("name", "shape", "legal"),
    [
        ("lm_head.weight", (checkpoints.VOCAB, 64), True),
        ("lm_head.weight", (checkpoints.VOCAB - 1, 64), False),
        ("model.layers.0.self_attn.rotary_emb.inv_freq", (16,), True),
        ("model.visual.merger.norm.weight", (32,), False),
        ("mtp.fc.weight", (64, 128), False),
        ("lm_head.bias", (checkpoints.VOCAB,), False),
    ],
)
def test_extra_tensors_are_ignored_only_where_real_checkpoints_have_them(
    folder: Path, name: str, shape: tuple[int, ...], legal: bool
) -> None:
    change_tensors(folder, "3", lambda tensors: tensors.update({name: np.ones(shape, np.float32)}))
    if legal:
        assert name not in Checkpoint.open(folder).entries
    else:
        assert name in str(fault_of(folder))


@pytest.mark.parametrize("name", ["model.visual.merger.norm.weight", "visual.x", "mtp.fc.weight", "model.mtp.x"])
@pytest.mark.parametrize("generation", checkpoints.GENERATIONS)
def test_vision_and_prediction_heads_are_ignored_in_qwen_3_5_alone(tmp_path: Path, generation: str, name: str) -> None:
    folder = checkpoints.write(tmp_path, generation)
    change_tensors(folder, generation, lambda tensors: tensors.update({name: np.ones(32, np.float32)}))
    if generation == "3.5":
        assert name not in Checkpoint.open(folder).entries
    else:
        fault = fault_of(folder)
        assert fault.exit_code == 10
        assert f"tensor {name!r} is not part of the model" in str(fault)


def test_an_untied_checkpoint_needs_its_output_layer(folder: Path) -> None:
    change_json(folder / "config.json", tie_word_embeddings=False)
    assert "tensor lm_head.weight is missing" in str(fault_of(folder))


def test_a_wrong_shape_is_named(folder: Path) -> None:
    rewrite(folder / "model.safetensors", lambda header: header[UP].update(shape=[64, 128]))
    fault = fault_of(folder)
    assert f"tensor {UP} has shape [64, 128]" in str(fault)
    assert "[128, 64]" in str(fault)


@pytest.mark.parametrize("dtype", ["I8", "I16", "F8_E4M3", "F64"])
def test_another_dtype_is_refused(folder: Path, dtype: str) -> None:
    header, data = checkpoints.read_safetensors(folder / "model.safetensors")
    last = max((name for name in header if name != "__metadata__"), key=lambda name: header[name]["data_offsets"][1])
    start = header[last]["data_offsets"][0]
    width = {"I8": 1, "F8_E4M3": 1, "I16": 2, "F64": 8}[dtype]
    header[last] |= {"dtype": dtype, "data_offsets": [start, start + width * 64]}
    checkpoints.write_raw(
        folder / "model.safetensors", json.dumps(header).encode(), data[:start] + bytes(range(64)) * width
    )
    fault = fault_of(folder)
    assert fault.exit_code == 10
    assert f"tensor {last} is {dtype}" in str(fault)


def test_a_tensor_in_two_shards_is_refused(sharded: Path) -> None:
    header, data = checkpoints.read_safetensors(sharded / FIRST)
    name = "model.embed_tokens.weight"
    checkpoints.write_raw(sharded / SECOND, json.dumps({name: header[name]}).encode(), data[: 288 * 64 * 2])
    weight_map = json.loads((sharded / INDEX).read_bytes())["weight_map"]
    change_json(sharded / INDEX, weight_map=weight_map)
    fault = fault_of(sharded)
    assert fault.exit_code == 10
    assert f"tensor '{name}' is in {FIRST} too" in str(fault)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"model.gone": SECOND}, "'model.gone' is missing"),
        ({"model.norm.weight": FIRST}, "'model.norm.weight'"),
        ({"model.norm.weight": "model-00003-of-00003.safetensors"}, "model-00003-of-00003.safetensors: missing"),
        ({"model.norm.weight": 7}, "not the name of a safetensors file"),
        ({"model.norm.weight": "\ud800.safetensors"}, "not the name of a safetensors file"),
        ({"model.norm.weight": "x" * 5000 + ".safetensors"}, "not the name of a safetensors file"),
    ],
)
def test_an_index_that_disagrees_with_the_files_is_corrupt(sharded: Path, change: dict[str, Any], words: str) -> None:
    index = json.loads((sharded / INDEX).read_bytes())
    index["weight_map"] |= change
    (sharded / INDEX).write_text(json.dumps(index))
    fault = fault_of(sharded)
    assert fault.exit_code == 10
    assert words in str(fault)


@pytest.mark.parametrize("weight_map", [None, {}, []])
def test_an_index_without_a_map_is_corrupt(sharded: Path, weight_map: object) -> None:
    change_json(sharded / INDEX, weight_map=weight_map)
    assert f"{INDEX}: holds no weight_map" in str(fault_of(sharded))


def test_a_weight_file_beside_the_index_that_it_does_not_name_is_refused(sharded: Path) -> None:
    shutil.copy(sharded / FIRST, sharded / "model.safetensors")
    assert f"model.safetensors: not named in {INDEX}" in str(fault_of(sharded))


@pytest.mark.parametrize(
    "name", ["../x.safetensors", "/etc/x.safetensors", "..", "a/b.safetensors", "..\\x.safetensors"]
)
def test_an_index_that_points_outside_the_folder_is_unsafe(sharded: Path, name: str) -> None:
    index = json.loads((sharded / INDEX).read_bytes())
    index["weight_map"]["model.norm.weight"] = name
    checkpoints.write_json(sharded / INDEX, index)
    fault = fault_of(sharded)
    assert fault.exit_code == UnsafeInput.exit_code
    assert "outside the folder" in str(fault)


@pytest.mark.parametrize("name", ["pytorch_model.bin", "model.pt", "model.pth", "model.ckpt", "model.PKL"])
def test_pickle_weights_alone_are_unsafe(folder: Path, name: str) -> None:
    (folder / name).write_bytes(b"cos\nsystem\n")
    Checkpoint.open(folder)
    (folder / "model.safetensors").unlink()
    fault = fault_of(folder)
    assert fault.exit_code == 11
    assert name in str(fault)


def test_an_index_that_names_a_pickle_is_unsafe(sharded: Path) -> None:
    change_json(sharded / INDEX, weight_map={"model.norm.weight": "pytorch_model.bin"})
    assert fault_of(sharded).exit_code == 11


@pytest.mark.parametrize("name", ["modeling_tiny.py", "custom_generate/generate.py"])
def test_code_in_the_folder_is_unsafe_and_never_runs(folder: Path, name: str) -> None:
    marker = folder.parent / "marker"
    (folder / name).parent.mkdir(exist_ok=True)
    (folder / name).write_text(f"open({str(marker)!r}, 'w')")
    fault = fault_of(folder)
    assert fault.exit_code == 11
    assert name in str(fault)
    assert not marker.exists()


@pytest.mark.parametrize("file", ["config.json", "tokenizer_config.json", "generation_config.json"])
@pytest.mark.parametrize("key", ["auto_map", "_attn_implementation"])
def test_a_key_that_would_run_code_is_unsafe(folder: Path, file: str, key: str) -> None:
    change_json(folder / file, **{key: "tiny.Tiny"})
    fault = fault_of(folder)
    assert fault.exit_code == 11
    assert file in str(fault)
    assert key in str(fault)


def test_another_architecture_is_not_supported(folder: Path) -> None:
    change_json(folder / "config.json", model_type="llama")
    assert fault_of(folder).exit_code == UnsupportedModel.exit_code


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (b"", "not valid JSON"),
        (b"[]", "not a JSON object"),
        (b'{"model_type": "qwen3", "model_type": "qwen2"}', "duplicate key 'model_type'"),
        (b'{"rope_theta": NaN}', "NaN is not a JSON number"),
        (b'{"a": -Infinity}', "-Infinity is not"),
        (b"\xff\xfe{\x00}\x00", "not valid JSON"),
        (b'{"a":' * 100_000, "not valid JSON"),
        (b'{"a": ' + b"9" * 100_000 + b"}", "not valid JSON"),
        (b" " * (3 << 20), "larger than"),
    ],
)
def test_a_config_that_is_not_strict_json_is_corrupt(folder: Path, text: bytes, words: str) -> None:
    (folder / "config.json").write_bytes(text)
    fault = fault_of(folder)
    assert fault.exit_code == 10
    assert "config.json" in str(fault)
    assert words in str(fault)


def test_a_pipe_instead_of_a_file_does_not_hang(folder: Path) -> None:
    (folder / "config.json").unlink()
    os.mkfifo(folder / "config.json")
    assert "config.json: missing" in str(fault_of(folder))
