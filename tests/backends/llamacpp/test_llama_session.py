from __future__ import annotations

import ctypes
import dataclasses
import os
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest

import led
from checkpoints import Build, quiet
from edgeq import backends, bundle, recipe, size, speculation, target, transformer
from edgeq.backends.base import Job, Session
from edgeq.backends.llamacpp import devices, gguf
from edgeq.backends.llamacpp import session as llama_session
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, UsageFault
from edgeq.quantize.solve import rounded

Open = Callable[..., Session]
GENERATIONS = ("2.5", "3", "3.5")
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("2.5", {}),
    ("2.5", {"tied": False}),
    ("3", {}),
    ("3", {"tied": False, "shards": 3}),
    ("3.5", {}),
    ("3.5", {"tied": False}),
    ("3.5", {"multimodal": True, "shards": 2}),
    ("3", {"dtype": "f16"}),
]
IDS = [(7 * n + 3) % 256 for n in range(150)]


def load(folder: Path, checkpoint: Path, context: int = 256, recipe: str = "w16", provider: str = "cpu") -> Session:
    """Session of a folder; of the manifest it reads these fields only."""
    config = Checkpoint.open(checkpoint).model.config()
    described = SimpleNamespace(context=context, config=config, recipe=recipe, provider=provider, target="x86-avx2")
    return backends.get("llamacpp").load(folder, cast(bundle.Bundle, described))


@pytest.fixture
def opened(packed: Build, tiny: Build) -> Iterator[Open]:
    """Session of a tiny checkpoint: opened("3.5", "w16", context=512, tied=False)."""
    sessions: list[Session] = []

    def make(generation: str, name: str, context: int = 256, **options: object) -> Session:
        sessions.append(load(packed(generation, name, **options), tiny(generation, **options), context, name))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


def reference_logits(folder: Path, name: str = "w16") -> np.ndarray:
    """Float32 logits of transformers over what a recipe makes of the weights."""
    import torch

    checkpoint = Checkpoint.open(folder)
    with torch.inference_mode():
        model = transformer.instantiate(checkpoint, lambda _: True)
        for each in filter(size.is_quantized, checkpoint.model.tensors()):
            model.get_parameter(each).data = torch.from_numpy(rounded(checkpoint, recipe.parse(name), each))
        logits: np.ndarray = model(input_ids=torch.tensor([IDS])).logits[0].numpy()
    return logits


@pytest.mark.parametrize(("generation", "options"), VARIANTS)
def test_float32_matrices_give_the_logits_of_transformers(
    tiny: Build, tmp_path: Path, generation: str, options: dict[str, Any]
) -> None:
    """Names, orders and values are right: llama.cpp keeps activations in float32 beside float32 matrices only."""
    folder = tiny(generation, **options)
    checkpoint = Checkpoint.open(folder)
    gguf.write(Job(checkpoint, recipe.parse("f32"), target.load("x86-avx2"), 256, quiet), tmp_path)
    session = load(tmp_path, folder)
    np.testing.assert_allclose(session.logits(IDS), reference_logits(folder), atol=2e-5)


@pytest.mark.parametrize(("generation", "options"), VARIANTS)
def test_sixteen_bit_logits_are_near_those_of_transformers(
    opened: Open, tiny: Build, generation: str, options: dict[str, Any]
) -> None:
    """Not equal: llama.cpp rounds activations to bfloat16 (float16) beside such matrices."""
    session = opened(generation, "w16", **options)
    tolerance = 4e-3 if options.get("dtype") == "f16" else 5e-2 if generation == "3.5" else 2e-2
    np.testing.assert_allclose(session.logits(IDS), reference_logits(tiny(generation, **options)), atol=tolerance)


@pytest.mark.parametrize("name", ["w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn"])
@pytest.mark.parametrize(("generation", "options"), VARIANTS[::2])
def test_quantized_logits_are_near_those_of_the_dequantized_weights(
    opened: Open, tiny: Build, generation: str, options: dict[str, Any], name: str
) -> None:
    """Not equal: llama.cpp rounds activations to 8 bits beside quantized matrices."""
    session = opened(generation, name, **options)
    tolerance = 0.2 if generation == "3.5" else 0.06
    wanted = reference_logits(tiny(generation, **options), name)
    np.testing.assert_allclose(session.logits(IDS), wanted, atol=tolerance)


@pytest.mark.parametrize("chunk", [1, 7, 50])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_prompt_in_chunks_gives_the_logits_of_one_run(
    opened: Open, generation: str, chunk: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole = opened(generation, "w16").logits(IDS[:100])
    monkeypatch.setattr(llama_session, "CHUNK", chunk)
    np.testing.assert_allclose(opened(generation, "w16").logits(IDS[:100]), whole, atol=3e-2)


@pytest.mark.parametrize("name", ["w16", "w4g32-e8-rtn"])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_decoding_step_by_step_takes_the_likeliest_token_of_the_whole_sequence(
    opened: Open, generation: str, name: str
) -> None:
    session = opened(generation, name)
    tokens = list(session.generate(IDS[:40], 12))
    logits = session.logits(IDS[:40] + tokens)[39:-1]
    chosen = logits[np.arange(12), tokens]
    np.testing.assert_allclose(chosen, logits.max(axis=1), atol=3e-2)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_a_second_generation_does_not_remember_the_first(opened: Open, generation: str) -> None:
    session = opened(generation, "w4g32-e8-rtn")
    first = list(session.generate(IDS[:20], 8))
    list(session.generate(IDS[50:90], 8))
    assert list(session.generate(IDS[:20], 8)) == first


def test_a_longer_sequence_than_before_gets_a_larger_cache(opened: Open) -> None:
    session = opened("3.5", "w4g32-e8-rtn", context=512)
    short = session.logits(IDS[:20])
    session.logits(IDS + IDS)
    np.testing.assert_array_equal(session.logits(IDS[:20]), short)


def test_a_closed_session_may_be_closed_again(opened: Open) -> None:
    session = opened("3", "w4g32-e8-rtn")
    session.logits(IDS[:4])
    session.close()
    session.close()


def test_more_tokens_than_the_context_are_refused_with_the_number(opened: Open) -> None:
    session = opened("3", "w4g32-e8-rtn")
    with pytest.raises(UsageFault, match="context of 256"):
        next(session.generate(IDS, 200))


def test_a_file_that_llama_cpp_refuses_is_a_backend_fault_in_its_words(
    tiny: Build, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / gguf.MODEL).write_bytes(b"not a model")
    with pytest.raises(BackendFault, match=r"cannot load it\n.*magic"):
        load(tmp_path, tiny("3"))
    assert capfd.readouterr() == ("", "")


@pytest.fixture
def asked(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Parameters that llama.cpp was last given for a model and for a context, and how often it had to finish."""
    import llama_cpp

    seen: dict[str, Any] = {"synchronized": 0}
    load, make, wait = (
        llama_cpp.llama_model_load_from_file,
        llama_cpp.llama_init_from_model,
        llama_cpp.llama_synchronize,
    )

    def loading(path: bytes, parameters: Any) -> Any:
        seen["layers"] = parameters.n_gpu_layers
        seen["devices"] = ctypes.cast(parameters.devices, ctypes.POINTER(ctypes.c_void_p))[0]
        return load(path, parameters)

    def making(model: Any, parameters: Any) -> Any:
        for name in (
            "type_k",
            "type_v",
            "flash_attn_type",
            "op_offload",
            "offload_kqv",
            "n_threads",
            "n_threads_batch",
            "n_ctx",
            "n_batch",
        ):
            seen[name] = getattr(parameters, name)
        return make(model, parameters)

    def waiting(context: Any) -> None:
        seen["synchronized"] += 1
        wait(context)

    monkeypatch.setattr(llama_cpp, "llama_model_load_from_file", loading)
    monkeypatch.setattr(llama_cpp, "llama_init_from_model", making)
    monkeypatch.setattr(llama_cpp, "llama_synchronize", waiting)
    return seen


def test_a_cpu_session_gives_nothing_to_a_gpu(opened: Open, asked: dict[str, Any]) -> None:
    """No layers alone are not enough: llama.cpp still sends large batches to a GPU that it knows of."""
    opened("3", "w4g32-e8-rtn").logits(IDS[:40])
    assert (asked["layers"], asked["devices"]) == (0, None)
    assert (asked["op_offload"], asked["offload_kqv"]) == (False, False)


def test_a_session_for_a_gpu_that_is_not_there_runs_on_the_cpu_and_says_so(packed: Build, tiny: Build) -> None:
    session = load(packed("3", "w4g32-e8-rtn"), tiny("3"), recipe="w4g32-e8-rtn", provider="cuda")
    session.logits(IDS[:4])
    assert [(place.provider, place.layers) for place in session.placement] == [("cpu", 3)]
    session.close()


@pytest.mark.parametrize(("name", "fused"), [("w4g32-e8-rtn", 0), ("w4g32-e8-rtn-kv16", -1)])
def test_a_gpu_gets_every_layer_and_float32_keys_and_values_stay_float32(
    packed: Build, tiny: Build, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch, name: str, fused: int
) -> None:
    """Fused attention on a GPU would round them to float16. The processor's handle plays the GPU's."""
    (cpu,) = devices.found()
    monkeypatch.setattr(devices, "found", lambda: (dataclasses.replace(cpu, api="cuda"),))
    session = load(packed("3", "w4g32-e8-rtn"), tiny("3"), recipe=name, provider="cuda")
    session.logits(IDS[:4])
    assert (asked["layers"], asked["devices"]) == (999, cpu.handle)
    assert (asked["op_offload"], asked["offload_kqv"]) == (True, True)
    assert asked["flash_attn_type"] == fused
    session.close()


def test_threads_are_the_physical_cores_for_prompts_and_tokens(
    opened: Open, asked: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.backends.llamacpp.session.physical_cores", lambda: 3)
    opened("3", "w4g32-e8-rtn").logits(IDS[:4])
    assert asked["n_threads"] == asked["n_threads_batch"] == 3


def test_every_step_ends_when_its_work_is_done(opened: Open, asked: dict[str, Any]) -> None:
    """Without it llama_decode returns early on a GPU, and a step's time is that of asking."""
    session = opened("3", "w4g32-e8-rtn")
    list(session.generate(IDS[:40], 5))
    assert asked["synchronized"] == 5


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize(("bits", "kind", "tolerance"), [(32, 0, 0.0), (16, 1, 2e-2), (8, 8, 0.3)])
def test_keys_and_values_are_stored_as_the_recipe_says(
    packed: Build, tiny: Build, asked: dict[str, Any], generation: str, bits: int, kind: int, tolerance: float
) -> None:
    folder, checkpoint = packed(generation, "f32"), tiny(generation)
    exact = load(folder, checkpoint, recipe="f32")
    session = load(folder, checkpoint, recipe="f32" if bits == 32 else f"f32-kv{bits}")
    wanted = exact.logits(IDS)
    found = session.logits(IDS)
    assert asked["type_k"] == asked["type_v"] == kind
    assert 0 <= np.abs(found - wanted).max() <= tolerance
    assert bits == 32 or np.abs(found - wanted).max() > 0


def test_logits_at_all_positions_take_no_more_than_a_chunk_of_the_vocabulary(
    opened: Open, asked: dict[str, Any]
) -> None:
    """llama.cpp keeps logits for as many tokens as a batch may have, whatever the context."""
    session = opened("3.5", "w4g32-e8-rtn", context=512)
    assert len(session.logits(IDS * 3)) == 450
    assert (asked["n_ctx"], asked["n_batch"]) == (512, llama_session.CHUNK)
    assert asked["synchronized"] == 4


@pytest.mark.parametrize("generation", GENERATIONS)
def test_placement_counts_every_layer_and_the_output(opened: Open, tiny: Build, generation: str) -> None:
    session = opened(generation, "w4g32-e8-rtn")
    (loaded,) = session.placement
    session.logits(IDS[:8])
    (running,) = session.placement
    layers = Checkpoint.open(tiny(generation)).model.layers
    assert (running.provider, running.layers, running.software) == ("cpu", layers + 1, False)
    assert loaded.bytes is not None
    assert running.bytes is not None
    assert running.bytes > loaded.bytes > 0


def test_a_log_without_the_layers_is_a_backend_fault_and_frees_the_model(
    packed: Build, tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    import llama_cpp

    freed: list[Any] = []
    monkeypatch.setattr(llama_cpp, "llama_model_free", freed.append)
    monkeypatch.setattr(devices, "_LAYER", re.compile("other words"))
    with pytest.raises(BackendFault, match="does not say where the layers are"):
        load(packed("3", "w4g32-e8-rtn"), tiny("3"), recipe="w4g32-e8-rtn")
    assert len(freed) == 1


def test_a_folder_whose_name_is_no_unicode_is_opened(packed: Build, tiny: Build, tmp_path: Path) -> None:
    folder = Path(os.fsdecode(os.fsencode(tmp_path) + b"/name-\xff"))
    shutil.copytree(packed("3", "w4g32-e8-rtn"), folder)
    session = load(folder, tiny("3"), recipe="w4g32-e8-rtn")
    assert session.logits(IDS[:2]).shape[0] == 2
    session.close()


@pytest.mark.parametrize("prompt", [1, 30, 37])
@pytest.mark.parametrize("generation", GENERATIONS)
def test_tokens_that_were_taken_back_leave_nothing_behind(opened: Open, generation: str, prompt: int) -> None:
    session = opened(generation, "f32")
    wanted = led.straight(session, IDS[:prompt], IDS[40:80])
    np.testing.assert_allclose(led.with_detours(session, IDS[:prompt], IDS[40:80]), wanted, atol=1e-4)
    np.testing.assert_array_equal(led.straight(session, IDS[:prompt], IDS[40:80]), wanted)


@pytest.mark.parametrize("generation", GENERATIONS)
def test_prompt_lookup_gives_the_tokens_of_plain_decoding(opened: Open, generation: str) -> None:
    session = opened(generation, "f32")
    for start in range(0, 100, 20):
        prompt = [*IDS[start : start + 20], *IDS[start : start + 11]]
        assert list(speculation.generate(session, prompt, 60, "lookup")) == list(session.generate(prompt, 60))


def test_only_drafting_keeps_states_to_go_back_to(opened: Open) -> None:
    import llama_cpp

    session: Any = opened("3.5", "w4g32-e8-rtn")
    for _ in range(2):
        list(session.generate(IDS[:10], 2))
        assert llama_cpp.llama_n_rs_seq(session._context) == 0
        session.begin(12)
        assert llama_cpp.llama_n_rs_seq(session._context) == 7


def test_what_llama_cpp_cannot_take_back_is_a_backend_fault(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    import llama_cpp

    session = opened("3", "w4g32-e8-rtn")
    session.begin(20)
    session.advance(IDS[:4], 4)
    monkeypatch.setattr(llama_cpp, "llama_memory_seq_rm", lambda *_: False)
    with pytest.raises(BackendFault, match="cannot take back 2 tokens"):
        session.rewind(2)
