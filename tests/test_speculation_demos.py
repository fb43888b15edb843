"""Prompt lookup on trained models: the tokens of plain decoding, all of them or but for ties."""

from __future__ import annotations

from pathlib import Path

import pytest

import led
from checkpoints import quiet
from edgeq import backends, building, bundle, data, planning
from edgeq.sources import DEMOS

pytestmark = pytest.mark.slow
PROMPTS, TOKENS = 12, 64
TIE = 0.25
"""Most that rounding activations to 8 bits moved a logit here was 0.17."""


@pytest.mark.parametrize(
    ("backend", "recipe"),
    [
        ("onnx", "w16"),
        pytest.param("onnx", "w4g32-e8-rtn-kv8", marks=led.rows_add_alike),
        ("llamacpp", "f32"),
        ("mlc", "w4g32-e8-rtn-kv16"),
    ],
)
@pytest.mark.parametrize("demo", DEMOS)
def test_all_tokens_are_the_same(demo: str, backend: str, recipe: str, tmp_path: Path) -> None:
    assert all(_compare(demo, backend, recipe, tmp_path, tie=0.0))


@pytest.mark.parametrize("backend", ["onnx", "llamacpp"])
@pytest.mark.parametrize("demo", DEMOS)
def test_the_first_other_token_is_as_likely_with_four_bits(demo: str, backend: str, tmp_path: Path) -> None:
    same = _compare(demo, backend, "w4g32-e8-rtn", tmp_path, TIE)
    assert sum(same) >= PROMPTS / 2


def _compare(demo: str, backend: str, recipe: str, folder: Path, tie: float) -> list[bool]:
    """For each prompt of held-out text, whether all tokens are the same."""
    from tokenizers import Tokenizer

    plan = planning.plan(
        demo, target="x86-avx2", recipe_name=recipe, backend=backend, out=folder / "bundle", context=512
    )
    building.build(plan, quiet)
    words = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")
    ids = Tokenizer.from_file(str(plan.out / "tokenizer.json")).encode(words).ids
    session = backends.get(backend).load(plan.out, bundle.read(plan.out))
    prompts = [ids[start : start + 40 + 10 * number] for number, start in enumerate(range(0, 100 * PROMPTS, 100))]
    found = [led.assert_same_or_tied(session, prompt, TOKENS, tie) for prompt in prompts]
    session.close()
    return found
