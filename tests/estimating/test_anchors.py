from __future__ import annotations

from pathlib import Path

import msgspec
import pytest

from edgeq import data, profiles, target
from edgeq.estimating import anchors, asked
from edgeq.profiles import Decode, Gaps, Profile, Spread

M4 = target.load("apple-m4")


@pytest.fixture
def row(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Profile:
    """A row of a small board that was never measured, from a true one; the folder is where `--save` would write."""
    monkeypatch.chdir(tmp_path)
    found = profiles.read(next(data.folder("profiles").rglob("demo-qwen3.*.json")))
    rate = Spread(median=20.0, low=20.0, high=20.0, cv=None, samples=(20.0,))
    return msgspec.structs.replace(
        found,
        model="qwen3-1.7b",
        recipe="w4g32-e8-rtn-kv16",
        backend="llamacpp",
        target=M4.name,
        bundle=msgspec.structs.replace(found.bundle, bytes=1_100_000_000),
        prefill=(),
        decode=(Decode(tokens=128, depth=0, tokens_per_s=rate, gap_s=Gaps(p50=0, p90=0, p99=0, max=0)),),
    )


def _save(row: Profile) -> Path:
    path = profiles.path(row.target, row.model, row.recipe, row.backend, Path("profiles"))
    profiles.write(row, path)
    return path


def test_what_was_measured_on_the_target_is_followed_without_being_named(row: Profile) -> None:
    before = asked.ask("qwen3-4b", target="m4")
    path = _save(row)
    after, named = asked.ask("qwen3-4b", target="m4"), asked.ask("qwen3-4b", target="m4", anchor=path)
    assert after == named
    assert after.decode_tokens_per_s is not None
    assert before.decode_tokens_per_s is not None
    assert after.decode_tokens_per_s.mid < 0.7 * before.decode_tokens_per_s.mid
    assert "measured" not in before.basis
    assert asked.ask("qwen3-4b", target="m4", backend="mlx") == asked.ask("qwen3-4b", target="m4", backend="mlx")


def test_the_largest_model_is_the_anchor_and_small_or_unknown_ones_are_none(row: Profile) -> None:
    small = msgspec.structs.replace(
        row, model="qwen3-0.6b", bundle=msgspec.structs.replace(row.bundle, bytes=3 * 10**8)
    )
    tiny = msgspec.structs.replace(row, backend="onnx", bundle=msgspec.structs.replace(row.bundle, bytes=10**6))
    other = msgspec.structs.replace(row, backend="mlc", model="my-own")
    assert anchors.by_backend([row, small, tiny, other]) == {"llamacpp": row}


def test_hub_names_are_the_catalogues() -> None:
    assert anchors.catalogue_name("qwen2.5-0.5b-instruct") == "qwen2.5-0.5b"
    assert anchors.catalogue_name("qwen3-4b") == "qwen3-4b"
    assert anchors.catalogue_name("my-own") is None


def test_rows_that_are_not_valid_are_left_out(row: Profile) -> None:
    _save(msgspec.structs.replace(row, valid=False))
    assert anchors.measured_rows(M4) == {}
