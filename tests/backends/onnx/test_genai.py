"""A bundle is nothing of edgeq's own: onnxruntime-genai opens it and decodes the same tokens."""

from __future__ import annotations

from pathlib import Path

import pytest

from checkpoints import Build
from edgeq import backends, bundle

pytestmark = pytest.mark.slow
IDS = [(5 * n + 1) % 256 for n in range(40)]


def genai_tokens(folder: Path, tokens: int) -> list[int]:
    import onnxruntime_genai as og

    model = og.Model(str(folder))
    parameters = og.GeneratorParams(model)
    parameters.set_search_options(max_length=len(IDS) + tokens, do_sample=False)
    generator = og.Generator(model, parameters)
    generator.append_tokens(IDS)
    found = []
    for _ in range(tokens):
        generator.generate_next_token()
        found.append(int(generator.get_next_tokens()[0]))
    return found


@pytest.mark.parametrize("recipe", ["w16", "w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn", "w4g32-e8-rtn-kv8"])
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_onnxruntime_genai_gives_the_same_tokens(built: Build, generation: str, recipe: str) -> None:
    folder = built(generation, recipe)
    session = backends.get("onnx").load(folder, bundle.read(folder))
    assert genai_tokens(folder, 16) == list(session.generate(IDS, 16))
