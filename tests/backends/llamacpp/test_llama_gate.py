from __future__ import annotations

import ctypes
from pathlib import Path

import numpy as np
import pytest

import gguf_files
from checkpoints import quiet
from edgeq import backends, building, bundle, data, planning, sources, target
from edgeq.backends.base import Job
from edgeq.backends.llamacpp import gguf, tensors
from edgeq.checkpoint import Checkpoint
from edgeq.quantize.solve import rounded
from edgeq.recipe import parse
from edgeq.size import is_quantized

pytestmark = pytest.mark.slow
DEMOS = ("demo-qwen2.5", "demo-qwen3", "demo-qwen3.5")
ENGINE_LOSS = 3e-4  # nats per token beyond the weights' own; seen: 7e-4 of 0.043 with q2_k, 2.1e-4 with q4_k, else 5e-5
RECIPES = (
    *("f32", "w16", "f16", "w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn", "w4g32-e8-rtn-kv16", "w4g32-e8-rtn-kv8"),
    *("q4_1-e8-rtn", "q5_0-eq5_1-rtn", "iq4_nl-eq4_1-rtn", "q4_k-eq6_k-rtn", "q5_k-eq5_k-rtn", "q6_k-e8-rtn"),
    *("iq4_xs-eq6_k-rtn", "q3_k-e16-rtn", "q2_k-eq6_k-rtn"),
)


@pytest.mark.parametrize("recipe", RECIPES)
@pytest.mark.parametrize("demo", DEMOS)
def test_demo_checkpoints_pass_the_gate(demo: str, recipe: str, tmp_path: Path) -> None:
    plan = planning.plan(
        demo, target="x86-avx2", recipe_name=recipe, backend="llamacpp", out=tmp_path / "bundle", context=256
    )
    made = building.build(plan, quiet)
    assert made.gate.kl_mean is not None
    assert made.gate.kl_mean < 1.02 * made.gate.kl_weights_only + ENGINE_LOSS
    assert (made.backend, made.provider) == ("llamacpp", "cpu")
    assert {file.path for file in bundle.read(tmp_path / "bundle").files} >= {gguf.MODEL, "tokenizer.json"}


@pytest.mark.parametrize(
    "recipe",
    ["q4_k-eq6_k-rtn", "q5_k-eq5_k-rtn", "q6_k-eq6_k-rtn", "q2_k-eq3_k-rtn", "q3_k-eq2_k-rtn", "iq4_xs-e16-rtn"],
)
@pytest.mark.parametrize("demo", DEMOS)
def test_layouts_with_large_blocks_dequantize_to_their_solutions(demo: str, recipe: str, tmp_path: Path) -> None:
    """The tiny checkpoints of the other tests are too narrow for blocks of 256."""
    checkpoint = Checkpoint.open(sources.find(demo, offline=True).folder)
    job = Job(checkpoint, parse(recipe), target.load("x86-avx2"), 256, quiet)
    gguf.write(job, tmp_path)
    stored = gguf_files.dequantized(gguf_files.reader(tmp_path))
    for name in filter(is_quantized, checkpoint.model.tensors()):
        wanted = gguf_files.in_file_order(checkpoint.model, name, rounded(checkpoint, parse(recipe), name))
        np.testing.assert_array_equal(stored[tensors.gguf_name(checkpoint.model, name)], wanted)


@pytest.mark.parametrize("demo", DEMOS)
def test_the_stock_loader_opens_the_file_and_says_the_same(demo: str, tmp_path: Path) -> None:
    """llama-cpp-python's own Llama class knows nothing of edgeq."""
    from llama_cpp import Llama

    plan = planning.plan(
        demo, target="x86-avx2", recipe_name="f32", backend="llamacpp", out=tmp_path / "made", context=256
    )
    building.build(plan, quiet)
    prompt = [5 + 3 * n for n in range(20)]
    session = backends.get("llamacpp").load(tmp_path / "made", bundle.read(tmp_path / "made"))
    ours = list(session.generate(prompt, 12))
    session.close()
    stock = Llama(str(tmp_path / "made" / gguf.MODEL), n_ctx=256, n_threads=1, n_gpu_layers=0, verbose=False)
    theirs = [token for token, _ in zip(stock.generate(prompt, temp=0.0, repeat_penalty=1.0), range(12), strict=False)]
    stock.close()
    assert theirs == ours


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
