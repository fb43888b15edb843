from __future__ import annotations

import ctypes
from pathlib import Path

import pytest

from checkpoints import quiet
from edgeq import building, bundle, data, planning
from edgeq.backends.llamacpp import gguf

DEMOS = ("demo-qwen2.5", "demo-qwen3", "demo-qwen3.5")
ENGINE_LOSS = 2e-4  # nats per token beyond the weights' own; seen: 5e-5


@pytest.mark.parametrize("recipe", ["w16", "w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn"])
@pytest.mark.parametrize("demo", DEMOS)
def test_demo_checkpoints_pass_the_gate(demo: str, recipe: str, tmp_path: Path) -> None:
    plan = planning.plan(
        demo, target="x86-avx2", recipe_name=recipe, backend="llamacpp", out=tmp_path / "bundle", context=256
    )
    made = building.build(plan, quiet)
    assert made.gate.kl_mean is not None
    assert made.gate.kl_mean < made.gate.kl_weights_only + ENGINE_LOSS
    assert (made.backend, made.provider) == ("llamacpp", "cpu")
    assert {file.path for file in bundle.read(tmp_path / "bundle").files} >= {gguf.MODEL, "tokenizer.json"}


@pytest.mark.parametrize("demo", DEMOS)
def test_llama_cpp_reads_text_as_the_checkpoints_own_tokenizer_does(demo: str, tmp_path: Path) -> None:
    import llama_cpp
    from tokenizers import Tokenizer

    plan = planning.plan(demo, target="x86-avx2", recipe_name="w4g32-e8-rtn", backend="llamacpp", out=tmp_path / "made")
    building.build(plan, quiet)
    text = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")[:4000] + "<|im_end|>\n"
    parameters = llama_cpp.llama_model_default_params()
    parameters.vocab_only = True
    model = llama_cpp.llama_model_load_from_file(str(tmp_path / "made" / gguf.MODEL).encode(), parameters)
    found = (ctypes.c_int32 * 8000)()
    raw = text.encode()
    count = llama_cpp.llama_tokenize(
        llama_cpp.llama_model_get_vocab(model), raw, len(raw), found, len(found), False, True
    )
    llama_cpp.llama_model_free(model)
    assert list(found[:count]) == Tokenizer.from_file(str(tmp_path / "made" / "tokenizer.json")).encode(text).ids
