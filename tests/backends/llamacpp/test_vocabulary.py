from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest

import checkpoints
from checkpoints import Build
from edgeq.backends.llamacpp import vocabulary
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UnsupportedModel


@pytest.fixture
def folder(tiny: Build, tmp_path: Path) -> Path:
    """A checkpoint that a test may change."""
    return Path(shutil.copytree(tiny("3"), tmp_path / "copy"))


def test_tokens_are_in_the_order_of_their_ids_and_padded(folder: Path) -> None:
    found = vocabulary.read(Checkpoint.open(folder))
    assert len(found.tokens) == len(found.kinds) == checkpoints.VOCAB
    assert (found.tokens[65], found.kinds[65]) == ("A", 1)
    assert (found.tokens[257], found.kinds[257]) == ("<|im_start|>", 3)
    assert (found.tokens[259], found.kinds[259]) == ("ĀĀ", 1)
    assert (found.tokens[260], found.kinds[260]) == ("[PAD260]", 5)
    assert found.merges == ("Ā Ā",)
    assert (found.bos, found.eos, found.pad) == (None, 258, 256)


def change(folder: Path, **changes: object) -> Checkpoint:
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    tokenizer["model"] |= changes
    path.write_text(json.dumps(tokenizer))
    return Checkpoint.open(folder)


def test_merges_may_be_written_as_text(folder: Path) -> None:
    assert vocabulary.read(change(folder, merges=["t h"])).merges == ("t h",)


def test_a_tokenizer_without_merges_is_refused(folder: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no merges"):
        vocabulary.read(change(folder, merges=[]))


@pytest.mark.parametrize("changes", [{"type": "Unigram"}, {"vocab": ["a"]}, {"vocab": {"a": 288}}, {"merges": [["a"]]}])
def test_a_damaged_tokenizer_is_corrupt_input(folder: Path, changes: dict[str, object]) -> None:
    with pytest.raises(CorruptInput, match=r"tokenizer\.json"):
        vocabulary.read(change(folder, **changes))


def test_special_tokens_may_be_objects(folder: Path) -> None:
    settings = folder / "tokenizer_config.json"
    given = json.loads(settings.read_text()) | {"eos_token": {"content": "<|im_end|>"}}
    settings.write_text(json.dumps(given))
    assert vocabulary.read(Checkpoint.open(folder)).eos == 258
