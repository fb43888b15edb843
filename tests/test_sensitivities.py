from __future__ import annotations

from pathlib import Path

import pytest

from edgeq import backends, recipe, sensitivities
from edgeq.quantize.mix import Option

PLACE = sensitivities._path
OPTIONS = {
    engine: [
        Option(recipe.layout(word), 100 + turn, 1 / (3 + turn), turn / 7)
        for turn, word in enumerate(backends.get(engine).MIXED)
    ]
    for engine in ("onnx", "llamacpp")
}


def test_options_are_found_as_they_were_kept_by_their_key() -> None:
    assert sensitivities.find("one") is None
    sensitivities.keep("one", OPTIONS)
    assert sensitivities.find("one") == OPTIONS
    assert sensitivities.find("other") is None
    sensitivities.keep("one", {})
    assert sensitivities.find("one") == {}


@pytest.mark.parametrize("text", ["", "[]", '{"a": 1}', '{"a": [{"layout": "w4g32"}]}', "\0"])
def test_a_damaged_file_is_as_good_as_none(text: str) -> None:
    sensitivities.keep("one", OPTIONS)
    sensitivities._path("one").write_text(text)
    assert sensitivities.find("one") is None


def test_where_nothing_can_be_written_nothing_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").touch()
    monkeypatch.setattr(sensitivities, "_path", lambda key: tmp_path / "file" / key)
    sensitivities.keep("one", OPTIONS)
    assert sensitivities.find("one") is None


def test_the_place_is_the_users_cache(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert PLACE("one") == Path("/somewhere/edgeq/sensitivities/one.json")
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert PLACE("one") == Path.home() / ".cache/edgeq/sensitivities/one.json"
