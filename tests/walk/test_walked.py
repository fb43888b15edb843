from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from checkpoints import GENERATIONS, Build, quiet
from edgeq import accuracy, data, transformer
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, Interrupted
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.recipe import parse
from edgeq.size import is_quantized
from edgeq.walk import gradients, head, run, windows
from edgeq.walk.layered import Layered
from edgeq.walk.moments import moments, recorded, stages
from edgeq.walk.run import Walked
from edgeq.walk.windows import Held

TEXT = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")[:2000]
CALIBRATION = np.random.default_rng(3).integers(0, 256, (5, 48)).astype(np.int32)
each_generation = pytest.mark.parametrize("generation", GENERATIONS)


def each_walk(names: Sequence[str], quick: Mapping[str, str]) -> pytest.MarkDecorator:
    """Every recipe in every generation; those of `quick` are slow in all but the one there, since others do as much."""
    cases = [(name, generation) for name in names for generation in GENERATIONS]
    slow = [(name, generation) for name, generation in cases if quick.get(name, generation) != generation]
    return pytest.mark.parametrize(
        ("name", "generation"),
        [pytest.param(*case, marks=[pytest.mark.slow] if case in slow else []) for case in cases],
    )


def whole(checkpoint: Checkpoint, tokens: NDArray[np.int32], solutions: Solutions | None = None) -> NDArray[np.float32]:
    """Logits [windows, length, vocabulary] of one transformers model, its matrices replaced where there are others."""
    model = transformer.instantiate(checkpoint, lambda _: True)
    for name in filter(is_quantized, checkpoint.model.tensors()) if solutions else ():
        assert solutions is not None
        model.get_parameter(name).data = torch.from_numpy(solutions.values(name))
    with torch.no_grad():
        logits: NDArray[np.float32] = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits.numpy()
    return logits


def held(checkpoint: Checkpoint) -> Held:
    return windows.quick(checkpoint, TEXT, 64)


def walked(checkpoint: Checkpoint, name: str, folder: Path, progress: Any = quiet) -> Walked:
    folder.mkdir(exist_ok=True)
    return run.quantize(checkpoint, parse(name), held(checkpoint), CALIBRATION, folder, progress)


@each_generation
@pytest.mark.parametrize("tied", [True, False])
def test_the_float_models_logits_are_those_of_the_whole_model(tiny: Build, generation: str, tied: bool) -> None:
    checkpoint = Checkpoint.open(tiny(generation, tied=tied))
    tokens = held(checkpoint).windows[0]
    found = run.logits(checkpoint, tokens.tolist(), quiet)
    np.testing.assert_allclose(found, whole(checkpoint, tokens[None])[0], atol=1e-5)


@each_walk(
    ["w4g32-e8-rtn", "w4g32-e8-gptq", "w4ag32-e8-guided", "w4gcol-e8-gptq", "w4g32-e8-tuned"],
    quick={"w4g32-e8-gptq": "3.5", "w4gcol-e8-gptq": "3"},
)
def test_the_loss_of_the_weights_is_that_of_a_whole_model_with_them(
    tiny: Build, tmp_path: Path, generation: str, name: str
) -> None:
    checkpoint = Checkpoint.open(tiny(generation, tied=generation != "3"))
    found = walked(checkpoint, name, tmp_path / "kept")
    logits = whole(checkpoint, held(checkpoint).windows, found.solutions)
    losses = [accuracy.compare(found.reference, window, each) for window, each in enumerate(logits)]
    assert found.weights_only == pytest.approx(accuracy.summarize(found.reference, losses).kl_mean, rel=1e-3, abs=1e-7)
    assert found.weights_only > 1e-5


@pytest.fixture
def layered(tiny: Build, request: pytest.FixtureRequest) -> Any:
    model = Layered(Checkpoint.open(tiny(request.param)))
    yield model
    model.close()


@pytest.mark.parametrize("layered", ["3.5"], indirect=True)
def test_matrices_that_read_one_tensor_are_one_stage(layered: Layered) -> None:
    def found(index: int) -> list[list[str]]:
        with layered.layer(index):
            window = np.random.default_rng(0).normal(size=(16, 64)).astype(np.float32)
            return [[name.split(".")[-2] for name in each] for each in stages(layered, index, window)]

    rest = [["gate_proj", "up_proj"], ["down_proj"]]
    assert found(0) == [["in_proj_qkv", "in_proj_z"], ["out_proj"], *rest]
    assert found(3) == [["q_proj", "k_proj", "v_proj"], ["o_proj"], *rest]


@pytest.mark.parametrize("layered", GENERATIONS, indirect=True)
@pytest.mark.parametrize("weighed", [False, True])
def test_moments_are_those_of_what_the_matrix_reads(layered: Layered, tmp_path: Path, weighed: bool) -> None:
    random = np.random.default_rng(0)
    exact, quantized = (random.normal(size=(5, 16, 64)).astype(np.float32) for _ in range(2))
    weights = random.uniform(0.1, 2, (5, 16)).astype(np.float32) if weighed else None
    each = np.ones((5, 16, 1), np.float32) if weights is None else weights[:, :, None]
    with layered.layer(0):
        name = next(name for name in layered.matrices(0) if name.endswith("down_proj.weight"))
        seen: list[NDArray[np.float32]] = []
        hook = layered.linear(name).register_forward_pre_hook(lambda _, read: seen.append(read[0][0].numpy().copy()))
        with torch.no_grad():
            after = [layered.run(0, torch.from_numpy(window)).numpy() for window in exact]
            for window in quantized:
                layered.run(0, torch.from_numpy(window))
        hook.remove()
        read = recorded(layered, 0, [name], exact, tmp_path)[name]
        np.testing.assert_array_equal(exact, np.stack(after))
        matrix = torch.from_numpy(layered.checkpoint.tensor(name))
        second, cross = moments(layered, 0, name, quantized, read, weights=weights)
        _, through = moments(layered, 0, name, quantized, read, matrix, weights)
        plain, nothing = moments(layered, 0, name, quantized)
    x, q = (np.stack(part).astype(np.float64) for part in (seen[:5], seen[5:]))
    np.testing.assert_array_equal(read, x)
    np.testing.assert_allclose(second.numpy(), np.einsum("wti,wtj->ij", each * q, q) / 80, atol=1e-6)
    wanted = np.einsum("wti,wtj->ij", each * (x - q), q) / 80
    np.testing.assert_allclose(cross.numpy(), wanted, atol=1e-6)
    np.testing.assert_allclose(through.numpy(), matrix.double().numpy() @ wanted, atol=1e-6)
    np.testing.assert_allclose(plain.numpy(), np.einsum("wti,wtj->ij", q, q) / 80, atol=1e-6)
    assert nothing is None
    assert not any(tmp_path.iterdir())


@pytest.mark.parametrize("text", [2, len(CALIBRATION)])
@pytest.mark.parametrize("layered", GENERATIONS, indirect=True)
def test_tokens_matter_as_autograd_over_the_whole_model_says(layered: Layered, text: int, tmp_path: Path) -> None:
    found = gradients.token_weights(layered, CALIBRATION, text, tmp_path, quiet)
    weights: NDArray[np.float32] = found[0]
    checkpoint = layered.checkpoint
    model = transformer.instantiate(checkpoint, lambda _: True)
    norms: list[NDArray[np.float32]] = []
    for window, tokens in enumerate(CALIBRATION):
        outputs: list[Any] = []

        def keep(_: Any, __: Any, output: Any, outputs: list[Any] = outputs) -> None:
            outputs.append(output[0] if isinstance(output, tuple) else output)
            outputs[-1].retain_grad()

        hooks = [layer.register_forward_hook(keep) for layer in model.model.layers]
        embedded = model.model.embed_tokens(torch.from_numpy(tokens[None].astype(np.int64))).requires_grad_(True)
        logs = torch.log_softmax(model(inputs_embeds=embedded, use_cache=False).logits[0], 1)
        chances = np.exp(logs.detach().numpy())
        drawn = head._drawn(chances, np.random.default_rng((gradients._SEED, window)))
        logs[np.arange(len(tokens)), drawn].sum().backward()
        norms.append(np.stack([output.grad.reshape(len(tokens), -1).norm(dim=1).numpy() for output in outputs]))
        for hook in hooks:
            hook.remove()
    wanted = np.stack(norms, axis=1)
    for part in (slice(text), slice(text, None))[: 1 + (text < len(CALIBRATION))]:
        wanted[:, part] /= wanted[:, part].mean(axis=(1, 2), keepdims=True)
    np.testing.assert_allclose(weights.mean(axis=(1, 2)), 1, rtol=1e-5)
    np.testing.assert_allclose(weights, wanted, rtol=0.03, atol=0.01)  # states between layers are kept in 16 bits


def stop_at(phase: str, layer: int) -> Progress:
    """Progress that is interrupted there."""

    def stop(seen: str, done: int, total: int) -> None:
        if (seen, done) == (phase, layer):
            raise Interrupted("stopped")

    return stop


@each_walk(["w4g32-e8-gptq", "w4g32-e8-guided"], quick={"w4g32-e8-gptq": "3"})
def test_a_walk_that_was_stopped_goes_on_to_the_same_bits_and_solves_no_layer_twice(
    tiny: Build, tmp_path: Path, generation: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny(generation))
    straight = walked(checkpoint, name, tmp_path / "straight")

    with pytest.raises(Interrupted):
        walked(checkpoint, name, tmp_path / "stopped", stop_at("layers", 1))
    solved: list[str] = []
    keep = Solutions.keep

    def note(self: Solutions, found: Solution | BlockSolution) -> None:
        solved.append(found.name)
        keep(self, found)

    monkeypatch.setattr(Solutions, "keep", note)
    again = walked(checkpoint, name, tmp_path / "stopped")
    body = [each for each in solved if each.startswith("model.layers.")]
    assert body
    assert not any(each.startswith("model.layers.0.") for each in body)
    assert again.weights_only == straight.weights_only
    for each in filter(is_quantized, checkpoint.model.tensors()):
        np.testing.assert_array_equal(again.solutions.values(each), straight.solutions.values(each), err_msg=each)


@pytest.fixture(scope="module")
def straight(tiny: Build, tmp_path_factory: pytest.TempPathFactory) -> Walked:
    """A guided walk of tiny("3") that nothing stopped."""
    return walked(Checkpoint.open(tiny("3")), "w4g32-e8-guided", tmp_path_factory.mktemp("straight"))


@pytest.mark.parametrize("layer", range(2 * 2))
def test_gradients_that_were_stopped_go_on_at_the_same_layer_to_the_same_bits(
    tiny: Build, straight: Walked, tmp_path: Path, layer: int
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))

    with pytest.raises(Interrupted):
        walked(checkpoint, "w4g32-e8-guided", tmp_path / "stopped", stop_at("gradients", layer))
    seen: list[int] = []

    def note(phase: str, done: int, total: int) -> None:
        if phase == "gradients":
            seen.append(done)

    again = walked(checkpoint, "w4g32-e8-guided", tmp_path / "stopped", note)
    assert seen == list(range(layer, 2 * 2 + 1))
    assert again.weights_only == straight.weights_only
    for each in filter(is_quantized, checkpoint.model.tensors()):
        np.testing.assert_array_equal(again.solutions.values(each), straight.solutions.values(each), err_msg=each)
    assert not (tmp_path / "stopped" / "gradients").exists()


@pytest.mark.parametrize(
    ("layer", "broken"), [(1, "ahead.json"), (1, "ahead.1.npy"), (1, "between"), (3, "norms"), (3, "back.1.npy")]
)
def test_gradients_that_were_stopped_are_not_gone_on_with_when_they_are_damaged(
    tiny: Build, tmp_path: Path, layer: int, broken: str
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))

    with pytest.raises(Interrupted):
        walked(checkpoint, "w4g32-e8-guided", tmp_path / "stopped", stop_at("gradients", layer))
    (tmp_path / "stopped" / "gradients" / broken).write_bytes(b"damaged")
    with pytest.raises(CorruptInput, match="not what a walk kept"):
        walked(checkpoint, "w4g32-e8-guided", tmp_path / "stopped")


@pytest.mark.parametrize(
    "broken", ["states.json", "exact_held.1.npy", "weights.npy", "model.layers.0.mlp.up_proj.weight"]
)
def test_what_a_stopped_walk_kept_is_not_gone_on_with_when_it_is_damaged(
    tiny: Build, tmp_path: Path, broken: str
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))

    with pytest.raises(Interrupted):
        walked(checkpoint, "w4g32-e8-guided", tmp_path / "kept", stop_at("layers", 1))
    if broken.startswith("model."):
        (tmp_path / "kept" / f"{broken}.zip").unlink()
    else:
        (tmp_path / "kept" / broken).write_bytes(b"{")
    with pytest.raises(CorruptInput, match="kept") as caught:
        walked(checkpoint, "w4g32-e8-guided", tmp_path / "kept").solutions.values("model.layers.0.mlp.up_proj.weight")
    assert caught.value.run is not None
    assert "again" in caught.value.run


@pytest.mark.parametrize("name", ["w4g32-e8-gptq", pytest.param("w4g32-e8-tuned", marks=pytest.mark.slow)])
def test_any_number_of_threads_finds_the_same_bits(
    tiny: Build, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny("3.5"))
    found = []
    for threads in (1, 3):
        monkeypatch.setattr("edgeq.walk.layered.physical_cores", lambda threads=threads: threads)
        found.append(walked(checkpoint, name, tmp_path / str(threads)))
    one, three = found
    assert one.weights_only == three.weights_only
    for each in filter(is_quantized, checkpoint.model.tensors()):
        np.testing.assert_array_equal(one.solutions.values(each), three.solutions.values(each), err_msg=each)


@pytest.mark.slow
def test_calibration_lowers_the_loss_and_guidance_and_tuning_lower_it_more(tmp_path: Path) -> None:
    from edgeq import calibration

    checkpoint = Checkpoint.open(data.folder("demo") / "demo-qwen3")
    text = calibration.read(checkpoint, "bundled", True, 256, quiet).windows
    part = windows.quick(checkpoint, data.held_out(), 128)
    losses = []
    for name in ("w4g32-e8-tuned", "w4g32-e8-guided", "w4g32-e8-gptq", "w4g32-e8-rtn"):
        (tmp_path / name).mkdir()
        losses.append(run.quantize(checkpoint, parse(name), part, text, tmp_path / name, quiet).weights_only)
    assert losses[0] < 0.95 * losses[1]
    assert losses[1] < losses[2] < losses[3]
