from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import led
from checkpoints import Build
from edgeq import backends, bundle, speculation
from edgeq.backends.base import Session
from edgeq.backends.onnx import session as onnx_session
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, UsageFault

VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("2.5", {}),
    ("2.5", {"tied": False}),
    ("3", {}),
    ("3", {"tied": False, "shards": 3}),
    ("3.5", {}),
    ("3.5", {"tied": False}),
    ("3.5", {"multimodal": True, "shards": 2}),
    ("3", {"dtype": "f32"}),
]
IDS = [(7 * n + 3) % 256 for n in range(150)]


def load(folder: Path) -> Session:
    return backends.get("onnx").load(folder, bundle.read(folder))


def reference_logits(folder: Path) -> np.ndarray:
    import torch

    from edgeq import transformer

    with torch.inference_mode():
        model = transformer.instantiate(Checkpoint.open(folder), lambda _: True)
        logits: np.ndarray = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(("generation", "options"), VARIANTS)
def test_sixteen_bit_logits_are_those_of_transformers(
    built: Build, tiny: Build, generation: str, options: dict[str, Any]
) -> None:
    session = load(built(generation, "w16", **options))
    tolerance = 2e-2 if options.get("dtype") == "f32" else 5e-4 if generation == "3.5" else 1e-4
    np.testing.assert_allclose(session.logits(IDS), reference_logits(tiny(generation, **options)), atol=tolerance)


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_a_prompt_in_chunks_gives_the_logits_of_one_run(
    built: Build, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load(built(generation, "w16"))
    whole = session.logits(IDS[:100])
    monkeypatch.setattr(onnx_session, "SCORE_CHUNK", 7)
    np.testing.assert_allclose(session.logits(IDS[:100]), whole, atol=1e-4)


@pytest.mark.parametrize("recipe", ["w16", "w4g32-e8-rtn"])
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_decoding_step_by_step_takes_the_likeliest_token_of_the_whole_sequence(
    built: Build, generation: str, recipe: str
) -> None:
    session = load(built(generation, recipe))
    tokens = list(session.generate(IDS[:40], 12))
    logits = session.logits(IDS[:40] + tokens)[39:-1]
    chosen = logits[np.arange(12), tokens]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=1e-3 if recipe == "w16" else 5e-2)


def test_a_second_generation_does_not_remember_the_first(built: Build) -> None:
    session = load(built("3.5", "w4g32-e8-rtn"))
    first = list(session.generate(IDS[:20], 8))
    list(session.generate(IDS[50:90], 8))
    assert list(session.generate(IDS[:20], 8)) == first


def test_more_tokens_than_the_context_are_refused_with_the_number(built: Build) -> None:
    session = load(built("3", "w4g32-e8-rtn"))
    with pytest.raises(UsageFault, match="context of 256"):
        next(session.generate(IDS, 200))


def test_a_model_that_onnx_runtime_refuses_is_a_backend_fault(built: Build, tmp_path: Path) -> None:
    folder = built("3", "w4g32-e8-rtn")
    broken = Path(shutil.copytree(folder, tmp_path / "broken"))
    (broken / "model.onnx").write_bytes(b"not a model")
    with pytest.raises(BackendFault, match="cannot load"):
        backends.get("onnx").load(broken, bundle.read(folder))


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_a_prompt_is_read_in_chunks_with_the_same_continuation(
    built: Build, generation: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    session = load(built(generation, "w16"))
    whole = list(session.generate(IDS[:100], 8))
    monkeypatch.setattr(onnx_session, "PROMPT_CHUNK", 9)
    assert list(session.generate(IDS[:100], 8)) == whole


def test_decoding_runs_the_graph_that_computes_the_last_logits_only(built: Build) -> None:
    session = load(built("3", "w4g32-e8-rtn"))
    next(session.generate(IDS[:10], 20))
    assert session._step(IDS[:5]).shape[0] == 1  # type: ignore[attr-defined]
    assert session.logits(IDS[:5]).shape[0] == 5


def test_logits_of_chosen_positions_are_those_of_the_whole_sequence(built: Build) -> None:
    session = load(built("3", "w16"))
    wanted = session.logits(IDS[:18])
    assert session.one_way is None
    session.begin(40)
    np.testing.assert_allclose(session.advance(IDS[:10]), wanted[9:10], atol=1e-4)
    np.testing.assert_allclose(session.advance(IDS[10:14], 4), wanted[10:14], atol=1e-4)
    np.testing.assert_allclose(session.advance(IDS[14:18]), wanted[17:18], atol=1e-4)


@pytest.mark.parametrize("prompt", [1, 30, 37])
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_tokens_that_were_taken_back_leave_nothing_behind(
    built: Build, generation: str, prompt: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(onnx_session, "PROMPT_CHUNK", 15)
    session = load(built(generation, "w16"))
    wanted = led.straight(session, IDS[:prompt], IDS[40:80])
    np.testing.assert_allclose(led.with_detours(session, IDS[:prompt], IDS[40:80]), wanted, atol=2e-4)
    np.testing.assert_array_equal(led.straight(session, IDS[:prompt], IDS[40:80]), wanted)


@led.rows_add_alike
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_with_codes_in_matrices_and_cache_drafts_change_no_bit(built: Build, generation: str) -> None:
    session = load(built(generation, "w4g32-e8-rtn-kv8"))
    wanted = led.straight(session, IDS[:30], IDS[40:80])
    np.testing.assert_array_equal(led.with_detours(session, IDS[:30], IDS[40:80]), wanted)


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_prompt_lookup_gives_the_tokens_of_plain_decoding(built: Build, generation: str) -> None:
    session = load(built(generation, "w16"))
    for start in range(0, 100, 20):
        prompt = [*IDS[start : start + 20], *IDS[start : start + 11]]
        assert list(speculation.generate(session, prompt, 60, "lookup")) == list(session.generate(prompt, 60))


def test_prompt_lookup_fills_the_context_to_its_end(built: Build) -> None:
    session = load(built("3.5", "w4g32-e8-rtn"))
    assert len(list(speculation.generate(session, IDS[:50], 206, "lookup"))) == 206
    with pytest.raises(UsageFault, match="context of 256"):
        next(speculation.generate(session, IDS[:50], 207, "lookup"))


def test_a_bundle_without_a_choice_of_logits_says_so_and_decodes_plainly(built: Build, tmp_path: Path) -> None:
    """The scorer has none either, and plays the graph of an older version."""
    folder = built("3", "w4g32-e8-rtn")
    old = Path(shutil.copytree(folder, tmp_path / "old"))
    shutil.copy(old / "scorer.onnx", old / "model.onnx")
    session = load(old)
    assert "build it again" in (session.one_way or "")
    assert list(speculation.generate(session, IDS[:20], 5, "lookup")) == list(load(folder).generate(IDS[:20], 5))


def test_threads_sleep_soon_and_pieces_of_work_change_no_bit(built: Build, monkeypatch: pytest.MonkeyPatch) -> None:
    found = []
    for pieces in (onnx_session.PIECES, 0):
        monkeypatch.setattr(onnx_session, "PIECES", pieces)
        chosen = onnx_session.options()
        assert chosen.get_session_config_entry("session.dynamic_block_base") == str(pieces)
        assert chosen.get_session_config_entry("session.intra_op.spin_duration_us") == "5"
        session = load(built("3", "w4g32-e8-rtn"))
        found.append(session.logits(list(range(40))))
        session.close()
    np.testing.assert_array_equal(found[0], found[1])
