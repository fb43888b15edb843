"""Logits of compiled models against those of transformers over the very weights that the recipe makes."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import numpy as np
import pytest
from numpy.typing import NDArray

import in_8_bits
import led
from checkpoints import Build, quiet
from edgeq import bundle, recipe, size, speculation, transformer
from edgeq.backends.base import Job
from edgeq.backends.mlc import official, official_weights, tensor_cache
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, OutOfMemory, UsageFault
from edgeq.quantize.solve import rounded
from edgeq.target import Target

Logits = NDArray[np.float32]
Open = Callable[..., Any]
IDS = [(7 * n + 3) % 251 for n in range(300)]
STEPS = 6
EXACT = 1e-4
HALF = 2e-2
NEAR, USUALLY = 0.1, 6e-3
"""Largest difference of a logit, of at most 2.6: in float32; with a float16 cache; where matrices read 8 bits, of which
few are rounded the other way, with the difference of most: 8.5e-6, 3.0e-4, 0.04 and 0.0037 were measured."""


class Variant(NamedTuple):
    """A tiny checkpoint and a recipe."""

    generation: str
    recipe: str
    options: dict[str, Any]

    @property
    def near(self) -> float:
        """Largest difference of a logit from transformers': sums are taken in another order."""
        if self.rounds:
            return NEAR
        return HALF if self.recipe.endswith("-kv16") else EXACT

    @property
    def rounds(self) -> bool:
        """Whether matrices are in tiles, which read activations in 8 bits."""
        words = recipe.parse(self.recipe)
        return not words.body.is_float and words.body.group != 16


QUICK = [
    Variant("2.5", "w4g32-e4-rtn", {"tied": False}),
    Variant("3", "f32", {}),
    Variant("3", "w4g32-e8-rtn-kv16", {}),
    Variant("3.5", "w4g32-e4-rtn", {"multimodal": True}),
]
SLOW = [
    Variant("2.5", "f32", {}),
    Variant("2.5", "bf16", {"tied": False}),
    Variant("2.5", "w4g32-e8-rtn", {}),
    Variant("2.5", "w8g32-e8-rtn", {"tied": False}),
    Variant("2.5", "w4g64-e4-rtn", {}),
    Variant("2.5", "w2g16-e16-mse", {"dtype": "f16"}),
    Variant("3", "w2gcol-e8-mse", {}),
    Variant("3.5", "w8gcol-e16-rtn", {"tied": False}),
    Variant("2.5", "w4g32-e8-rtn-kv16", {}),
    Variant("3", "w16", {"dtype": "f16"}),
    Variant("3", "w4g32-e8-rtn", {"tied": False}),
    Variant("3", "w8g32-e8-rtn", {}),
    Variant("3", "w4g64-e4-rtn", {"tied": False}),
    Variant("3.5", "f32", {"tied": False}),
    Variant("3.5", "bf16", {}),
    Variant("3.5", "w4g32-e8-rtn", {}),
    Variant("3.5", "w8g32-e8-rtn", {"tied": False}),
    Variant("3.5", "w4g64-e4-rtn", {}),
    Variant("3.5", "w4g32-e8-rtn-kv16", {}),
    Variant("3.5", "f16-kv16", {}),
]


@pytest.fixture(
    scope="session",
    params=[*QUICK, *(pytest.param(each, marks=pytest.mark.slow) for each in SLOW)],
    ids=lambda each: "-".join([each.generation, each.recipe, *each.options]),
)
def variant(request: pytest.FixtureRequest) -> Variant:
    found: Variant = request.param
    return found


@pytest.fixture
def opened(packed: Build) -> Iterator[Open]:
    """Session of a variant's library on the CPU, over its weights or those of another folder."""
    sessions: list[Any] = []

    def make(variant: Variant, folder: Path | None = None, context: int = 512) -> Any:
        import tvm

        from edgeq.backends.mlc import library
        from edgeq.backends.mlc.session import MlcSession

        built = packed(variant.generation, variant.recipe, **variant.options)
        config = json.loads((built / "config.json").read_text())
        described = cast(bundle.Bundle, SimpleNamespace(context=context, config=config))
        module = tvm.runtime.load_module(str(library.find(built)))
        sessions.append(MlcSession(module, tvm.cpu(), folder or built, described))
        return sessions[-1]

    yield make
    for session in sessions:
        session.close()


@pytest.fixture(scope="session")
def reference(tiny: Build) -> Callable[..., Logits]:
    """Float32 logits of transformers for IDS and more, its matrices replaced by what the variant's recipe makes, which
    read what processors' do if `rounds`.
    """

    @cache
    def model(folder: Path, name: str, also: tuple[str, ...], *, rounds: bool) -> Any:
        import torch

        checkpoint = Checkpoint.open(folder)
        found = transformer.instantiate(checkpoint, lambda _: True)
        for each in checkpoint.model.tensors():
            if size.is_quantized(each) or each.endswith(also):
                values = rounded(checkpoint, recipe.parse(name), each)
                found.get_parameter(each).data = torch.from_numpy(values)
        if rounds:
            in_8_bits.make(found)
        return found

    def logits(variant: Variant, ids: list[int], also: tuple[str, ...] = (), *, rounds: bool = True) -> Logits:
        import torch

        with torch.inference_mode():
            folder = tiny(variant.generation, **variant.options)
            made = model(folder, variant.recipe, also, rounds=variant.rounds and rounds)
            found: Logits = made(input_ids=torch.tensor([ids])).logits[0].numpy()
        return found

    return logits


def generated(session: Any, monkeypatch: pytest.MonkeyPatch) -> tuple[list[int], list[tuple[int, Logits]]]:
    """Tokens that follow IDS, and for each run of the model its number of tokens and its last logits."""
    seen: list[tuple[int, Logits]] = []
    run = session._run

    def watched(function: Any, ids: list[int], *positions: Any) -> Logits:
        logits: Logits = run(function, ids, *positions)
        seen.append((len(ids), logits[-1]))
        return logits

    monkeypatch.setattr(session, "_run", watched)
    return list(session.generate(IDS, STEPS)), seen


def assert_near(found: Logits, wanted: Logits, variant: Variant) -> None:
    difference = np.abs(found - wanted)
    assert difference.max() <= variant.near
    assert np.median(difference) <= min(variant.near, USUALLY)


def test_logits_are_those_of_transformers(opened: Open, reference: Callable[..., Logits], variant: Variant) -> None:
    """In ten chunks, whose states and cache the next one needs."""
    found = opened(variant).logits(IDS)
    assert (found.shape, found.dtype) == ((len(IDS), 288), np.float32)
    assert_near(found, reference(variant, IDS), variant)


def test_prompts_in_chunks_and_decoded_tokens_have_the_logits_of_transformers(
    opened: Open, reference: Callable[..., Logits], variant: Variant, monkeypatch: pytest.MonkeyPatch
) -> None:
    tokens, runs = generated(opened(variant), monkeypatch)
    assert [length for length, _ in runs] == [256, 44, *[1] * (STEPS - 1)]
    wanted = reference(variant, IDS + tokens)
    ends = np.cumsum([length for length, _ in runs]) - 1
    found = np.stack([logits for _, logits in runs])
    assert_near(found, wanted[ends], variant)
    assert tokens == found[1:].argmax(axis=1).tolist()


def test_nothing_of_one_call_is_left_in_the_next(opened: Open, variant: Variant) -> None:
    session = opened(variant)
    first = session.logits(IDS[:40])
    tokens = list(session.generate(IDS[:40], 4))
    session.logits(IDS)
    np.testing.assert_array_equal(session.logits(IDS[:40]), first)
    unfinished = session.generate(IDS[50:90], 4)
    next(unfinished)
    assert list(session.generate(IDS[:40], 4)) == tokens


def test_two_sessions_in_one_process_keep_their_own_weights(
    opened: Open, tiny: Build, packed: Build, here: Target, tmp_path: Path
) -> None:
    other, variant = tiny("3", seed=1), QUICK[1]
    written(other, variant, packed, here, tmp_path)
    first = opened(variant)
    wanted = first.logits(IDS[:20])
    second = opened(variant, tmp_path)
    assert np.abs(second.logits(IDS[:20]) - wanted).max() > 0.01
    np.testing.assert_array_equal(first.logits(IDS[:20]), wanted)
    first.close()
    second.close()
    np.testing.assert_array_equal(opened(variant).logits(IDS[:20]), wanted)


def test_tvms_own_cache_does_not_keep_the_weights_too(opened: Open) -> None:
    import tvm

    held = tvm.get_global_func("vm.builtin.tensor_cache.get")
    opened(QUICK[1])
    assert held("model.norm.weight") is None


def test_more_tokens_than_the_context_are_refused_with_the_number(opened: Open) -> None:
    session = opened(QUICK[1], context=64)
    assert len(session.logits(IDS[:64])) == 64
    assert len(list(session.generate(IDS[:60], 4))) == 4
    refused = "65 tokens do not fit the bundle's context of 64"
    with pytest.raises(UsageFault, match=refused):
        session.logits(IDS[:65])
    with pytest.raises(UsageFault, match=refused):
        next(session.generate(IDS[:60], 5))


def test_more_tokens_than_a_session_began_with_are_refused(opened: Open) -> None:
    session = opened(QUICK[1])
    session.begin(10)
    session.advance(IDS[:200])
    with pytest.raises(UsageFault, match="300 tokens do not fit the 256 that this session began with"):
        session.advance(IDS[200:])
    assert session.advance(IDS[200:256]).shape == (1, 288)


@pytest.mark.parametrize("other", [QUICK[0], QUICK[2]], ids=["of another model", "of another type"])
def test_weights_of_another_library_are_refused(opened: Open, packed: Build, other: Variant) -> None:
    folder = packed(other.generation, other.recipe, **other.options)
    with pytest.raises(BackendFault, match="do not belong together") as raised:
        opened(QUICK[1], folder)
    assert raised.value.run == "edgeq build ... again"


def test_a_type_that_differs_is_named(opened: Open, packed: Build, tmp_path: Path) -> None:
    """Same names and shapes: scales would be read as another type."""
    folder = packed(QUICK[2].generation, QUICK[2].recipe, **QUICK[2].options)
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    index = json.loads((tmp_path / tensor_cache.INDEX).read_text())
    record = next(each for each in index["records"][0]["records"] if each["name"] == "model.embed_tokens.q_scale")
    record["dtype"] = "uint16"
    (tmp_path / tensor_cache.INDEX).write_text(json.dumps(index))
    with pytest.raises(BackendFault, match="do not belong together") as raised:
        opened(QUICK[2], tmp_path)
    assert "model.embed_tokens.q_scale as float16 [18, 2, 16], the weights have uint16" in raised.value.why


def test_placement_counts_every_layer_the_output_and_all_weights(opened: Open, packed: Build) -> None:
    variant = QUICK[3]
    (place,) = opened(variant).placement
    held = tensor_cache.records(packed(variant.generation, variant.recipe, **variant.options))
    assert (place.provider, place.device, place.layers, place.software) == ("cpu", "CPU", 5, False)
    assert place.bytes == sum(each["nbytes"] for each in held.values())


@pytest.mark.slow
@pytest.mark.parametrize("index", [0, 1, 3], ids=[each.generation for each in (QUICK[0], QUICK[1], QUICK[3])])
def test_weights_of_the_official_compiler_give_the_same_logits(
    opened: Open, reference: Callable[..., Logits], tiny: Build, here: Target, tmp_path: Path, index: int
) -> None:
    """It quantizes Qwen3.5's two small matrices too, so that the reference has to."""
    variant = QUICK[index]
    checkpoint = Checkpoint.open(tiny(variant.generation, **variant.options))
    job = Job(checkpoint, recipe.parse(variant.recipe), here, 512, quiet)
    theirs, ours = tmp_path / "theirs", tmp_path / "ours"
    for folder in (theirs, ours):
        folder.mkdir()
    official_weights.write(
        job, official_weights.parameters(checkpoint.model, official.quantization(job.recipe)), theirs
    )
    official_weights.for_built_in(theirs, checkpoint.model, ours)
    small = () if job.recipe.body.is_float else ("in_proj_a.weight", "in_proj_b.weight")
    found = in_rows(checkpoint, variant, ours).logits(IDS)
    np.testing.assert_allclose(found, reference(variant, IDS, small, rounds=False), rtol=0, atol=EXACT)


def in_rows(checkpoint: Checkpoint, variant: Variant, folder: Path) -> Any:
    """Session on this CPU over weights as GPUs read them."""
    import tvm

    from edgeq.backends.mlc import compiler, devices
    from edgeq.backends.mlc.session import MlcSession

    how = compiler.precision(recipe.parse(variant.recipe), "bfloat16")
    made = compiler.compile_model(checkpoint.model, how, devices.this_cpu(), 512)
    described = cast(bundle.Bundle, SimpleNamespace(context=512, config=checkpoint.model.config()))
    return MlcSession(made.executable, tvm.cpu(), folder, described)


def written(checkpoint: Path, variant: Variant, packed: Build, here: Target, out: Path) -> None:
    """Weights of a checkpoint for the library of a variant of the same shapes."""
    from edgeq.backends.mlc import weights

    job = Job(Checkpoint.open(checkpoint), recipe.parse(variant.recipe), here, 512, quiet)
    held = tensor_cache.records(packed(variant.generation, variant.recipe, **variant.options))
    weights.write(job, {name: (tuple(each["shape"]), each["dtype"]) for name, each in held.items()}, out)


def test_a_session_goes_on_after_it_found_no_memory(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(QUICK[1])
    wanted = session.logits(IDS[:20])

    def full(*_: object) -> None:
        raise RuntimeError("out of memory")

    with monkeypatch.context() as patch:
        patch.setattr(session, "_tensor", full)
        with pytest.raises(OutOfMemory, match="no room for a cache of 512 tokens"):
            session.logits(IDS)
    np.testing.assert_array_equal(session.logits(IDS[:20]), wanted)


@pytest.mark.parametrize("index", [0, 1, 3], ids=[each.generation for each in (QUICK[0], QUICK[1], QUICK[3])])
@pytest.mark.parametrize("prompt", [1, 30])
def test_tokens_that_were_taken_back_leave_nothing_behind(opened: Open, index: int, prompt: int) -> None:
    session = opened(QUICK[index])
    wanted = led.straight(session, IDS[:prompt], IDS[40:80])
    np.testing.assert_array_equal(led.with_detours(session, IDS[:prompt], IDS[40:80]), wanted)
    np.testing.assert_array_equal(led.straight(session, IDS[:prompt], IDS[40:80]), wanted)


def test_prompt_lookup_gives_the_tokens_of_plain_decoding(opened: Open, variant: Variant) -> None:
    session = opened(variant)
    for start in (0, 50):
        prompt = [*IDS[start : start + 20], *IDS[start : start + 11]]
        plain = list(session.generate(prompt, 40))
        assert list(speculation.generate(session, prompt, 40, "lookup")) == plain


@pytest.mark.parametrize("index", [0, 1, 2, 3], ids=[f"{each.generation}-{each.recipe}" for each in QUICK])
def test_several_tokens_have_the_logits_of_each_alone(opened: Open, index: int) -> None:
    session = opened(QUICK[index])
    wanted = led.straight(session, IDS[:37], IDS[40:100])
    session.begin(led.ROOM)
    session.advance(IDS[:37])
    found = [session.advance(IDS[start : start + 12], 12).copy() for start in range(40, 100, 12)]
    np.testing.assert_array_equal(np.concatenate(found), wanted)


def test_tokens_outside_the_vocabulary_are_refused_and_nothing_is_lost(opened: Open) -> None:
    session = opened(QUICK[3])
    wanted = led.straight(session, IDS[:20], IDS[20:24])
    session.begin(led.ROOM)
    session.advance(IDS[:20])
    session.advance([*IDS[20:22], 1, 2], 4)
    session.rewind(2)
    for wrong in (-1, 288):
        refused = f"token {wrong} is not in the vocabulary of 288"
        with pytest.raises(UsageFault, match=refused):
            session.advance([wrong])
        with pytest.raises(UsageFault, match=refused):
            session.advance([4] * 300 + [wrong])
        with pytest.raises(UsageFault, match="322 tokens do not fit the 256"):
            session.advance([4] * 300)
    np.testing.assert_array_equal(session.advance(IDS[22:24], 2), wanted[2:])
    with pytest.raises(UsageFault, match="token 288 is not"):
        session.logits([3, 288])
    with pytest.raises(UsageFault, match="token 288 is not"):
        next(session.generate([288], 2))


def test_states_without_history_cannot_be_left(opened: Open, monkeypatch: pytest.MonkeyPatch) -> None:
    session = opened(QUICK[3])
    assert session.one_way is None
    monkeypatch.setattr(session, "_metadata", {"kv_state_kind": "hybrid"})
    assert "no state to go back to" in str(session.one_way)
