from __future__ import annotations

import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints import GENERATIONS, Build, quiet
from edgeq import data, transformer
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, Interrupted
from edgeq.quantize import gptq
from edgeq.quantize.solve import quantized
from edgeq.recipe import Layout, layout, plain
from edgeq.size import TABLES, is_quantized
from edgeq.walk import gradients, head, scratch, sensitivity, windows
from edgeq.walk.layered import Layered

FINE, COARSE = plain(8, 32), plain(4, 32)
TEXT = data.held_out()[:24000]


def empty(folder: Path) -> Path:
    """A new folder in another one: what a measurement leaves is not that of the next."""
    return Path(tempfile.mkdtemp(dir=folder))


def measure(
    checkpoint: Checkpoint,
    layouts: list[Layout],
    folder: Path,
    groups: dict[Layout, int] | None = None,
    progress: Progress = quiet,
    *,
    feedback: bool = False,
) -> dict[str, list[Any]]:
    tokens = windows.windows(checkpoint.folder, TEXT, 24, 64, checkpoint.model.vocab)
    every = dict.fromkeys(sensitivity.units(checkpoint.model), layouts)
    inputs = groups or dict.fromkeys(layouts, 0)
    (found,) = sensitivity.measure(checkpoint, every, inputs, 16, [tokens], folder, progress, feedback=feedback)
    return found


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_every_matrix_is_in_one_unit_and_queries_keys_and_values_share_theirs(tiny: Build, generation: str) -> None:
    model = Checkpoint.open(tiny(generation)).model
    units = sensitivity.units(model)
    assert sorted(name for names in units.values() for name in names) == sorted(filter(is_quantized, model.tensors()))
    for first, names in units.items():
        parts = {name.rpartition(".")[0].rpartition(".")[2] for name in names}
        assert parts in ([{"q_proj", "k_proj", "v_proj"}] if "q_proj" in first else [{first.split(".")[-2]}])


@pytest.mark.parametrize(
    ("tied", "generation"),
    [
        *((True, generation) for generation in GENERATIONS),
        *((False, "2.5"), (False, "3"), pytest.param(False, "3.5", marks=pytest.mark.slow)),
    ],
)
def test_predicted_losses_are_those_of_models_with_one_unit_rounded(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str, tied: bool
) -> None:
    import torch

    monkeypatch.setattr(sensitivity, "APART", 2)
    checkpoint = Checkpoint.open(tiny(generation, tied=tied))
    found = measure(checkpoint, [COARSE], tmp_path)
    tokens = windows.windows(checkpoint.folder, TEXT, 24, 64, checkpoint.model.vocab)
    model = transformer.instantiate(checkpoint, lambda _: True)

    def log_probs() -> Any:
        with torch.no_grad():
            logits = model(input_ids=torch.from_numpy(tokens.astype(np.int64))).logits
        return torch.log_softmax(logits.double(), -1)

    exact = log_probs()
    predicted, measured = [], []
    for first, names in sensitivity.units(checkpoint.model).items():
        kept = {name: model.get_parameter(name).data.clone() for name in names}
        for name in names:
            values = quantized(checkpoint.tensor(name), COARSE, "mse", name).dequantize()
            model.get_parameter(name).data.copy_(torch.from_numpy(values))
        measured.append(float((exact.exp() * (exact - log_probs())).sum(-1).mean()))
        predicted.append(found[first][0].loss)
        for name in names:
            model.get_parameter(name).data.copy_(kept[name])
    assert 0.4 < sum(predicted) / sum(measured) < 2.5  # drawn tokens of a short text
    assert np.corrcoef(np.log(predicted), np.log(measured))[0, 1] > 0.7
    for mine, true in list(zip(predicted, measured, strict=True))[-3 - (not tied) : len(predicted) - (not tied)]:
        assert mine == pytest.approx(true, rel=0.2)  # nothing after the last layer's own matrices mixes tokens


def test_more_bits_cost_less_and_take_more_bytes(tiny: Build, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    shapes = checkpoint.model.tensors()
    for first, (fine, coarse) in measure(checkpoint, [FINE, COARSE], tmp_path).items():
        assert fine.loss < coarse.loss / 20
        names = sensitivity.units(checkpoint.model)[first]
        weights = sum(int(np.prod(shapes[name])) for name in names)
        assert (fine.bytes, coarse.bytes) == (weights * 8.5 // 8, weights * 4.5 // 8)


def stop_at(step: int) -> Progress:
    """Progress that is interrupted there."""

    def stop(phase: str, done: int, total: int) -> None:
        if done == step:
            raise Interrupted("stopped")

    return stop


@pytest.mark.parametrize(("step", "left"), list(enumerate([[0, 1, 1, 0], [1, 1, 0], [1, 0], [0], []])))
def test_what_was_stopped_goes_on_after_the_last_finished_layer_to_the_same_bits(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, step: int, left: list[int]
) -> None:
    checkpoint, groups = Checkpoint.open(tiny("3")), {COARSE: 32, FINE: 64}
    straight = measure(checkpoint, [COARSE, FINE], empty(tmp_path), groups, feedback=True)
    with pytest.raises(Interrupted):
        measure(checkpoint, [COARSE, FINE], tmp_path, groups, stop_at(step), feedback=True)
    seen: list[int] = []
    load = Layered.layer

    def note(self: Layered, index: int) -> Any:
        seen.append(index)
        return load(self, index)

    monkeypatch.setattr(Layered, "layer", note)
    assert measure(checkpoint, [COARSE, FINE], tmp_path, groups, feedback=True) == straight
    assert seen == left


@pytest.mark.parametrize("kept", ["costs.json", "back.json"])
@pytest.mark.parametrize("turn", [1, 2])
def test_a_layer_whose_costs_are_not_kept_is_not_done(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kept: str, turn: int
) -> None:
    checkpoint = Checkpoint.open(tiny("2.5"))
    straight = measure(checkpoint, [FINE], empty(tmp_path))
    put, stops = scratch.put, iter([False] * (turn - (kept == "costs.json")) + [True])

    def stop(path: Path, content: bytes) -> None:
        if path.name == kept and next(stops):
            raise Interrupted("stopped")
        put(path, content)

    with monkeypatch.context() as patch:
        patch.setattr(scratch, "put", stop)
        with pytest.raises(Interrupted):
            measure(checkpoint, [FINE], tmp_path)
    assert (tmp_path / "back.json").read_text() == str(turn - 1)
    assert measure(checkpoint, [FINE], tmp_path) == straight


@pytest.mark.parametrize(
    ("step", "broken", "content"),
    [
        (1, "ahead.json", b"damaged"),
        (1, "ahead.1.npy", b"damaged"),
        (1, "between", b"damaged"),
        (3, "back.json", b"damaged"),
        (3, "back.1.npy", b"damaged"),
        (3, "costs.json", b"damaged"),
        (3, "costs.json", b'{"losses": [], "activations": []}'),
        (3, "costs.json", None),
    ],
)
def test_what_was_stopped_is_not_gone_on_with_when_it_is_damaged(
    tiny: Build, tmp_path: Path, step: int, broken: str, content: bytes | None
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    with pytest.raises(Interrupted):
        measure(checkpoint, [FINE], tmp_path, progress=stop_at(step))
    if content is None:
        (tmp_path / broken).unlink()
    else:
        (tmp_path / broken).write_bytes(content)
    with pytest.raises(CorruptInput, match="not what a walk kept") as caught:
        measure(checkpoint, [FINE], tmp_path)
    assert caught.value.run == "edgeq build ... again, from the start"


@pytest.mark.parametrize("tied", [True, False])
def test_predicted_losses_of_rounded_activations_are_those_of_models_that_round_what_matrices_read(
    tiny: Build, tmp_path: Path, tied: bool
) -> None:
    import torch

    checkpoint = Checkpoint.open(tiny("3", tied=tied))
    found = measure(checkpoint, [COARSE, FINE], tmp_path, {COARSE: 32, FINE: 64})
    tokens = torch.from_numpy(windows.windows(checkpoint.folder, TEXT, 24, 64, checkpoint.model.vocab).astype(np.int64))
    model = transformer.instantiate(checkpoint, lambda _: True)

    def rounded(inputs: tuple[Any], group: int) -> tuple[Any]:
        parts = inputs[0].unflatten(-1, (-1, group))
        steps = parts.abs().amax(-1, keepdim=True) / 127
        return ((parts / steps).round().mul(steps).flatten(-2),)

    def log_probs() -> Any:
        with torch.no_grad():
            return torch.log_softmax(model(input_ids=tokens).logits.double(), -1)

    exact = log_probs()
    for place, group in enumerate((32, 64)):
        predicted, measured = [], []
        for first, names in sensitivity.units(checkpoint.model).items():
            modules = [model.get_submodule(name.removesuffix(".weight")) for name in names]
            if first == "model.embed_tokens.weight":
                modules = [model.lm_head] if tied else []
            hooks = [each.register_forward_pre_hook(lambda _, inputs, g=group: rounded(inputs, g)) for each in modules]
            measured.append(float((exact.exp() * (exact - log_probs())).sum(-1).mean()))
            predicted.append(found[first][place].activations)
            for hook in hooks:
                hook.remove()
        assert 0.7 < sum(predicted) / sum(measured) < 1.4
        assert [each == 0 for each in predicted] == [each == 0 for each in measured]
        assert predicted[-1] == pytest.approx(measured[-1], rel=0.2)


@pytest.mark.parametrize(("group", "places"), [(2, 4), (4, 2), (8, 1), (sys.maxsize, 1)])
def test_the_largest_of_each_group_sets_its_scale(group: int, places: int) -> None:
    import torch

    values = np.array([[0, 0, 0, 0, 1, 0.3, 100, 7], [127, 0.4, 0.6, -1, 0, 0, 0, 1e-9]], np.float32)
    found = sensitivity.rounding_error(torch.from_numpy(values), group).numpy()
    parts = values.astype(np.float64).reshape(2, places, -1)
    steps = np.abs(parts).max(axis=2, keepdims=True) / 127
    wanted = np.divide(parts, steps, out=np.zeros_like(parts), where=steps > 0).round() * steps - parts
    np.testing.assert_allclose(found, wanted.reshape(2, 8), rtol=1e-4, atol=1e-6)


def test_activations_that_are_floats_cost_nothing(tiny: Build, tmp_path: Path) -> None:
    for options in measure(Checkpoint.open(tiny("3")), [FINE], tmp_path).values():
        assert [option.activations for option in options] == [0.0]


@pytest.mark.parametrize("together", [0.0, 1.0, 2.0])
@pytest.mark.parametrize("loudest", [0, 128, 255])
def test_feedback_leaves_the_share_that_gptq_leaves(tiny: Build, together: float, loudest: int) -> None:
    import torch

    random = np.random.default_rng(3)
    common = random.normal(size=(2048, 32)) @ random.normal(size=(32, 256)) / 6
    common[:, loudest] *= 3
    values = together * common + random.normal(size=(2048, 256))
    read = torch.from_numpy(values.astype(np.float32))
    weights = random.normal(0, 0.05, (64, 256)).astype(np.float32)
    curved = gptq.curvature(read.T @ read / len(read))
    solved = gptq.quantize(weights, curved, COARSE, "matrix").dequantize()
    rounded = quantized(weights, COARSE, "mse", "matrix").dequantize()
    share = gptq.error(weights, solved, curved.hessian) / gptq.error(weights, rounded, curved.hessian)
    model = Layered(Checkpoint.open(tiny("3")))
    assert sensitivity.left_over(model, read) == pytest.approx(share, rel=0.4)
    model.close()


@pytest.mark.parametrize("tokens", [1, 3, 100, 1000])
def test_few_tokens_do_not_make_feedback_look_better(tiny: Build, tokens: int) -> None:
    import torch

    read = torch.from_numpy(np.random.default_rng(5).normal(size=(tokens, 600)).astype(np.float32))
    model = Layered(Checkpoint.open(tiny("3")))
    assert 0.85 < sensitivity.left_over(model, read) <= 1
    model.close()


def test_matrices_that_will_be_fitted_lose_less_and_tables_what_they_did(tiny: Build, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    fitted = measure(checkpoint, [FINE, COARSE], empty(tmp_path), feedback=True)
    for first, options in measure(checkpoint, [FINE, COARSE], empty(tmp_path)).items():
        fine, coarse = (one.loss / other.loss for one, other in zip(fitted[first], options, strict=True))
        assert fine == pytest.approx(coarse)
        assert fine == 1 if first in TABLES else 0.2 < fine < 0.95


def test_inputs_that_are_all_zero_leave_everything(tiny: Build) -> None:
    import torch

    model = Layered(Checkpoint.open(tiny("3")))
    assert sensitivity.left_over(model, torch.zeros(64, 32)) == pytest.approx(1)
    model.close()


def costs_of(checkpoint: Checkpoint, texts: list[tuple[int, int]]) -> Any:
    return sensitivity._Costs(SimpleNamespace(checkpoint=checkpoint), {}, {}, texts)  # type: ignore[arg-type]


def test_a_loss_that_few_tokens_have_is_found_from_other_tokens(tiny: Build) -> None:
    import torch

    random = np.random.default_rng(4)
    sizes = random.lognormal(0, 1.5, (40, 512)).astype(np.float32)
    changes = (1e-5 * sizes * random.normal(size=sizes.shape)).astype(np.float32)
    seen = np.concatenate([row[window % 8 :: 8] for window, row in enumerate(changes)])
    of_both = costs_of(Checkpoint.open(tiny("3")), [(32, 512), (8, 512)])
    found = of_both._mean(seen, torch.from_numpy(sizes))
    wanted = [np.square(1e-5 * sizes[part]).mean() / 2 for part in (slice(32), slice(32, None))]
    np.testing.assert_allclose(found, wanted, rtol=0.2)
    plain = [np.square(part).mean() / 2 for part in np.split(seen, [32 * 64])]
    assert np.abs(np.log(np.divide(plain, wanted))).max() > 0.3


def test_tokens_without_a_gradient_cost_nothing(tiny: Build) -> None:
    import torch

    costs = costs_of(Checkpoint.open(tiny("3")), [(1, 16), (1, 16)])
    sizes = torch.tensor([[0.0] * 16, [0.0, 2.0] * 8])
    found = costs._mean(np.array([0, 0, 0.2, 0.2], np.float32), sizes)
    np.testing.assert_allclose(found, [0, 0.01], rtol=1e-6)


@pytest.mark.parametrize(
    ("tied", "generation"),
    [(True, "2.5"), (False, "2.5"), (True, "3.5"), pytest.param(False, "3.5", marks=pytest.mark.slow)],
)
def test_each_text_costs_what_it_does_alone(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, generation: str, tied: bool
) -> None:
    checkpoint = Checkpoint.open(tiny(generation, tied=tied))
    monkeypatch.setattr(head, "slopes", lambda _, states, seed: np.flip(states, 2) * np.float32(1e-2))
    texts = [windows.windows(checkpoint.folder, TEXT, 5, 30, checkpoint.model.vocab)]
    texts.append(windows.drawn(8, 30, checkpoint.model.vocab))
    every = {first: [FINE, COARSE] for first in sensitivity.units(checkpoint.model)}
    inputs = {FINE: 64, COARSE: 32}

    def found(given: list[Any]) -> list[dict[str, list[Any]]]:
        return sensitivity.measure(checkpoint, every, inputs, 16, given, empty(tmp_path), quiet, feedback=True)

    monkeypatch.setattr(sensitivity, "APART", 1)
    together, alone = found(texts), [found([text])[0] for text in texts]
    for mine, other in zip(together, alone, strict=True):
        for first in other:
            for one, same in zip(mine[first], other[first], strict=True):
                assert (one.layout, one.bytes) == (same.layout, same.bytes)
                assert one.loss == pytest.approx(same.loss, rel=1e-3)
                assert one.activations == pytest.approx(same.activations, rel=1e-3)
    assert together[0] != together[1]


def test_a_checkpoint_that_is_not_finite_is_named(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    own = Checkpoint.rows
    monkeypatch.setattr(Checkpoint, "rows", lambda *words: own(*words) * np.float32(np.nan))
    with pytest.raises(CorruptInput, match="not finite"):
        measure(Checkpoint.open(tiny("3")), [FINE], tmp_path)


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_one_token_of_so_many_is_looked_at_another_in_each_window(tiny: Build, tmp_path: Path, generation: str) -> None:
    checkpoint = Checkpoint.open(tiny(generation))
    tokens = windows.windows(checkpoint.folder, TEXT, 5, 30, checkpoint.model.vocab)
    found: dict[int, list[tuple[dict[str, Any], ...]]] = {}
    model = Layered(checkpoint)
    for watch in (1, 8):
        states = head.embed(head.exact(checkpoint, head.TABLE), tokens)
        between = gradients.forwards(model, states, tmp_path, quiet)
        slopes = head.slopes(model, states, 1)
        layers = gradients.backwards(model, slopes, between, quiet, watch=watch)
        found[watch] = [(dict(layer.read), dict(layer.written), dict(layer.sizes)) for layer in layers]
    model.close()
    for (*every, sizes), (*some, same) in zip(found[1], found[8], strict=True):
        read, written = every
        for name, size in sizes.items():
            wanted = (read[name].norm(dim=1) * written[name].norm(dim=1)).reshape(5, 30)
            np.testing.assert_allclose(size.numpy(), wanted.numpy(), rtol=1e-5)
            np.testing.assert_array_equal(size.numpy(), same[name].numpy())
        for all_tokens, few in zip(every, some, strict=True):
            assert all_tokens.keys() == few.keys()
            for name, values in few.items():
                windows_of = all_tokens[name].reshape(5, 30, -1)
                wanted = np.concatenate([each[at::8].numpy() for at, each in enumerate(windows_of)])
                np.testing.assert_array_equal(values.numpy(), wanted)


def test_uneven_levels_lose_less_in_as_many_bytes(tiny: Build, tmp_path: Path) -> None:
    pytest.importorskip("llama_cpp", reason="ggml rounds its layouts itself", exc_type=ImportError)
    found = measure(Checkpoint.open(tiny("3")), [COARSE, layout("iq4_nl")], tmp_path).values()
    assert all(uneven.bytes == even.bytes for even, uneven in found)
    assert sum(uneven.loss for _, uneven in found) < sum(even.loss for even, _ in found)
