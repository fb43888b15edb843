"""Drafts of Qwen3.5's own head: what they are, and that they never change a token."""

from __future__ import annotations

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import checkpoints
import gguf_files
from checkpoints import Build, quiet
from edgeq import backends, bundle, recipe, speculation, target
from edgeq.backends.base import Job
from edgeq.backends.llamacpp import drafting, gguf
from edgeq.backends.null import NullSession
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, CorruptInput
from head_reference import Reference

IDS = [(7 * n + 3) % 256 for n in range(150)]


def load(folder: Path, checkpoint: Path, name: str = "f32") -> Any:
    config = Checkpoint.open(checkpoint).model.config()
    described = SimpleNamespace(context=256, config=config, recipe=name, provider="cpu", target="x86-avx2")
    return backends.get("llamacpp").load(folder, cast(bundle.Bundle, described))


@pytest.fixture
def session(packed: Build, tiny: Build) -> Iterator[Any]:
    found = load(packed("3.5", "f32", multimodal=True), tiny("3.5", multimodal=True))
    yield found
    found.close()


@pytest.mark.parametrize("length", [1, 2, 40, 128, 129, 145])
def test_guesses_are_those_of_the_head_in_float32(session: Any, tiny: Build, length: int) -> None:
    reference = Reference(tiny("3.5", multimodal=True))
    head = session.drafter()
    session.begin(200)
    text = [*IDS[:length], int(session.advance(IDS[:length])[-1].argmax())]
    assert head.guess(text, 3) == reference.guesses(text, 3)


def test_guesses_after_drafts_that_were_taken_back_are_those_of_the_head_in_float32(session: Any, tiny: Build) -> None:
    reference = Reference(tiny("3.5", multimodal=True))
    head = session.drafter()
    session.begin(200)
    text = [*IDS[:30], int(session.advance(IDS[:30])[-1].argmax())]
    assert head.guess(text, 3) == reference.guesses(text, 3)
    for right in (0, 2, 1, 3, 0, 0, 3, 1):
        now = IDS[len(text) : len(text) + right]
        draft = [*now, *[17] * (3 - right)]
        session.advance([text[-1], *draft], 4)
        session.rewind(3 - right)
        found = [*now, IDS[len(text) + right]]
        text += found
        assert head.guess(found, 3) == reference.guesses(text, 3)


@pytest.mark.parametrize("name", ["f32", "w16", "w4g32-e8-rtn"])
def test_tokens_are_those_of_plain_decoding(packed: Build, tiny: Build, name: str) -> None:
    session = load(packed("3.5", name, multimodal=True), tiny("3.5", multimodal=True), name)
    for start in (0, 30, 70):
        prompt = IDS[start : start + 25]
        steps = speculation.steps(session, prompt, 60, session.drafter())
        found = [token for step in steps for token in step]
        plain = list(session.generate(prompt, 60))
        assert len(found) == 60
        assert name != "f32" or found == plain
    session.close()


def test_a_head_that_is_right_is_asked_for_three_tokens_and_saves_steps(
    session: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The true continuation plays the head's guesses."""
    plain = list(session.generate(IDS[:20], 40))
    text = [*IDS[:20], *plain]
    guess = drafting.Head.guess

    def knowing(self: drafting.Head, found: Sequence[int], most: int) -> list[int]:
        place = self._length + len(self._tokens) + len(found) + (1 if self._length or self._tokens else 0)
        count = len(guess(self, found, most))
        return text[place : place + count]

    monkeypatch.setattr(drafting.Head, "guess", knowing)
    steps = list(speculation.steps(session, IDS[:20], 40, session.drafter()))
    assert [token for step in steps for token in step] == plain
    assert [len(step) for step in steps[1:5]] == [1, 2, 4, 4]


def test_lookup_and_plain_decoding_do_without_the_head(session: Any) -> None:
    """It is loaded when first asked for, and serves one text."""
    layers = session.placement[0].bytes
    plain = list(session.generate(IDS[:20], 10))
    list(speculation.generate(session, IDS[:20], 10, "lookup"))
    assert session._head is None
    assert session._with_head is False
    session.drafter()
    assert session.placement[0].bytes > layers
    session.begin(40)
    assert session._head is not None
    session.begin(40)
    assert session._head is None
    assert list(session.generate(IDS[:20], 10)) == plain


def test_a_checkpoint_without_a_head_has_no_drafter(packed: Build, tiny: Build) -> None:
    for generation in ("3", "3.5"):
        session = load(packed(generation, "f32"), tiny(generation))
        assert session.drafter() is None
        session.close()
    assert NullSession(9).drafter() is None  # type: ignore[func-returns-value]


def _write(checkpoint: Path, out: Path, name: str = "w4g32-e8-rtn") -> dict[str, np.ndarray]:
    gguf.write(Job(Checkpoint.open(checkpoint), recipe.parse(name), target.load("x86-avx2"), 256, quiet), out)
    return gguf_files.dequantized(gguf_files.reader(out))


def test_the_file_holds_the_head_behind_the_last_layer(tiny: Build, tmp_path: Path) -> None:
    folder = tiny("3.5", multimodal=True)
    checkpoint = Checkpoint.open(folder)
    stored = _write(folder, tmp_path, "f32")
    np.testing.assert_array_equal(stored["blk.4.nextn.eh_proj.weight"], checkpoint.tensor("mtp.fc.weight"))
    for name, given in (("nextn.hnorm", "pre_fc_norm_hidden"), ("nextn.enorm", "pre_fc_norm_embedding")):
        np.testing.assert_array_equal(stored[f"blk.4.{name}.weight"], checkpoint.tensor(f"mtp.{given}.weight") + 1)
    assert sum(name.startswith("blk.4.") for name in stored) == len(checkpoint.model.head_tensors()) == 15


def test_the_heads_matrices_have_eight_bits_under_recipes_of_codes(tiny: Build, tmp_path: Path) -> None:
    folder = tiny("3.5", multimodal=True)
    stored = _write(folder, tmp_path)["blk.4.attn_q.weight"]
    wanted = Checkpoint.open(folder).tensor("mtp.layers.0.self_attn.q_proj.weight")
    step = np.abs(wanted.reshape(-1, 32)).max(axis=1) / 127
    assert 0 < np.abs(stored - wanted).max() <= 0.6 * step.max()


def test_a_part_of_a_head_is_left_out(tmp_path: Path) -> None:
    folder = checkpoints.write(tmp_path / "whole", "3.5", multimodal=True)
    model = Checkpoint.open(folder).model
    tensors = checkpoints.random_tensors(model, 0, True)
    del tensors["mtp.norm.weight"]
    checkpoints.write_weights(folder, tensors, "BF16", 1)
    (tmp_path / "out").mkdir()
    assert Checkpoint.open(folder).head == {}
    assert not [name for name in _write(folder, tmp_path / "out") if name.startswith("blk.4.")]


def test_a_head_with_a_number_that_is_none_is_corrupt(tiny: Build, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(tiny("3.5", multimodal=True), tmp_path / "bad"))
    tensors = checkpoints.random_tensors(Checkpoint.open(folder).model, 0, True)
    tensors["mtp.fc.weight"][3, 5] = np.nan
    checkpoints.write_weights(folder, tensors, "F32", 1)
    (tmp_path / "out").mkdir()
    with pytest.raises(CorruptInput, match=r"mtp\.fc\.weight is not finite"):
        _write(folder, tmp_path / "out")


def test_a_head_that_fails_is_a_backend_fault(session: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    head = session.drafter()
    session.begin(50)
    session.advance(IDS[:5])
    monkeypatch.setattr(llama_cpp, "llama_decode", lambda *_: 1)
    with pytest.raises(BackendFault, match="multi-token-prediction head"):
        head.guess(IDS[:6], 1)
