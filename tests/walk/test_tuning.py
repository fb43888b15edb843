from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from checkpoints import GENERATIONS, Build, quiet
from edgeq import data, transformer
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, Interrupted
from edgeq.quantize.kept import Solutions
from edgeq.quantize.solution import BlockSolution
from edgeq.quantize.solve import solve
from edgeq.recipe import Recipe, parse
from edgeq.size import TABLES, is_quantized
from edgeq.walk import factors, gradients, head, run, tuning, windows
from edgeq.walk.factors import Factors
from edgeq.walk.layered import Layered
from edgeq.walk.run import Walked

TOKENS = np.random.default_rng(3).integers(0, 256, (5, 48)).astype(np.int32)
STEPS = -(-len(TOKENS) // tuning.WINDOWS)
TEXT = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")[:2000]


def rounded(checkpoint: Checkpoint, recipe: Recipe, folder: Path) -> Solutions:
    """Solutions of every matrix, without calibration, kept in a folder."""
    folder.mkdir(exist_ok=True)
    solutions = Solutions(checkpoint, recipe, folder)
    for name in filter(is_quantized, checkpoint.model.tensors()):
        solutions.keep(solve(checkpoint, recipe, name))
    return solutions


def gradients_of_the_whole_model(checkpoint: Checkpoint, solutions: Solutions) -> dict[str, NDArray[np.float32]]:
    """Gradient of the mean KL divergence with respect to the logarithm of each scale, by autograd."""
    exact, model = (transformer.instantiate(checkpoint, lambda _: True) for _ in range(2))
    exponents, values = {}, {}
    for name in filter(is_quantized, checkpoint.model.tensors()):
        solution = solutions(name)
        if name in TABLES:
            values[name] = torch.from_numpy(solution.dequantize())
            continue
        given = factors._given(solution)
        columns = next(iter(factors._scales(solution).values())).shape[1]
        exponents[name] = torch.zeros(len(given), len(given[0]), columns, requires_grad=True)
        each = given[0].shape[1] // columns
        values[name] = sum(
            torch.from_numpy(part) * exponent.exp().repeat_interleave(each, 1)
            for part, exponent in zip(given, exponents[name], strict=True)
        )
    if checkpoint.model.tied:
        values["lm_head.weight"] = values["model.embed_tokens.weight"]
    tokens = torch.from_numpy(TOKENS.astype(np.int64))
    with torch.no_grad():
        wanted = exact(input_ids=tokens).logits.log_softmax(-1)
    found = torch.func.functional_call(model, values, kwargs={"input_ids": tokens}).logits.log_softmax(-1)
    (wanted.exp() * (wanted - found)).sum(-1).mean().backward()
    return {name: each.grad.numpy() for name, each in exponents.items()}


@pytest.mark.parametrize("generation", GENERATIONS)
@pytest.mark.parametrize("name", ["w4ag32-e8-tuned", "q4_1-e8-tuned"])
def test_factors_move_along_the_gradient_of_the_whole_models_divergence(
    tiny: Build, tmp_path: Path, generation: str, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny(generation, tied=generation != "3"))
    solutions = rounded(checkpoint, parse(name), tmp_path / "kept")
    wanted = gradients_of_the_whole_model(checkpoint, solutions)
    seen: dict[str, NDArray[np.float32]] = {}
    move = Factors.move

    def note(self: Factors, model: Layered, solution: BlockSolution, *words: object) -> None:
        move(self, model, solution, *words)  # type: ignore[arg-type]
        seen.setdefault(solution.name, self._of(solution.name)[1] / (1 - factors._DECAY))

    monkeypatch.setattr(Factors, "move", note)
    monkeypatch.setattr(tuning, "WINDOWS", len(TOKENS))
    monkeypatch.setattr(tuning, "EPOCHS", 1)
    exact = Layered(checkpoint)
    tuning.tune(exact, solutions, TOKENS, quiet)
    exact.close()
    assert seen.keys() == wanted.keys()
    for each, found in seen.items():
        assert np.linalg.norm(found - wanted[each]) < 0.03 * np.linalg.norm(wanted[each]), each  # states in 16 bits


def test_divergences_of_windows_are_those_of_their_logits_and_their_gradients_are_of_the_mean(tiny: Build) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    model, rng = Layered(checkpoint), np.random.default_rng(4)
    wanted, states = rng.standard_normal((2, 3, 16, checkpoint.model.hidden)).astype(np.float32)
    rows = head.exact(checkpoint, head.output(checkpoint))
    slopes, lost = head.divergence_slopes(model, wanted, states, rows, rows)
    table = torch.from_numpy(rows(slice(0, checkpoint.model.vocab)))
    here = torch.from_numpy(states).requires_grad_(True)
    of, other = (torch.log_softmax(model.final_norm(each) @ table.T, -1) for each in (torch.from_numpy(wanted), here))
    divergence = (of.exp() * (of - other)).sum(-1).mean(-1)
    divergence.mean().backward()
    model.close()
    np.testing.assert_allclose(lost, divergence.detach().numpy(), rtol=1e-4)
    assert here.grad is not None
    np.testing.assert_allclose(slopes, here.grad.numpy(), atol=1e-3 * float(here.grad.abs().max()))


def test_a_window_counts_by_what_the_others_lose_at_most(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    losses, seen = iter([1.0, 1.0, 2.0, 40.0, 1.0, 1.0] * tuning.EPOCHS), list[float]()

    def slopes(model: Layered, targets: object, states: NDArray[np.float32], *rows: object) -> object:
        return np.ones_like(states), [next(losses) for _ in states]

    def backwards(model: Layered, slopes: NDArray[np.float32], *words: object, **more: object) -> list[object]:
        assert (slopes == slopes[:, :1, :1]).all()
        seen.extend(slopes[:, 0, 0].tolist())
        return []

    monkeypatch.setattr(head, "divergence_slopes", slopes)
    monkeypatch.setattr(gradients, "backwards", backwards)
    exact = Layered(checkpoint)
    tuning.tune(
        exact, rounded(checkpoint, parse("w4g32-e8-tuned"), tmp_path / "kept"), TOKENS[[0, 1, 2, 3, 4, 0]], quiet
    )
    exact.close()
    assert seen == pytest.approx([1, 1, 1.5 / 2, 1.5 * 1.5 / 40, 1, 1] * tuning.EPOCHS)


@pytest.mark.parametrize("name", ["w4g32-e8-tuned", "q4_1-e8-tuned"])
def test_tuning_changes_scales_alone_and_leaves_the_tables(tiny: Build, tmp_path: Path, name: str) -> None:
    checkpoint = Checkpoint.open(tiny("2.5", tied=False))
    solutions = rounded(checkpoint, parse(name), tmp_path / "kept")
    exact = Layered(checkpoint)
    tuned = tuning.tune(exact, solutions, TOKENS, quiet)
    exact.close()
    for each in filter(is_quantized, checkpoint.model.tensors()):
        before, after = solutions(each), tuned(each)
        np.testing.assert_array_equal(before.codes, after.codes)
        same = (before.dequantize() == after.dequantize()).all()
        assert same == (each in TABLES), each


def walked(checkpoint: Checkpoint, folder: Path, progress: object = quiet) -> Walked:
    folder.mkdir(exist_ok=True)
    held = windows.quick(checkpoint, TEXT, 64)
    return run.quantize(checkpoint, parse("w4g32-e8-tuned"), held, TOKENS, folder, progress)  # type: ignore[arg-type]


def stop_in_the_second_pass(phase: str, done: int, total: int) -> None:
    if (phase, done) == ("tuning", STEPS + 1):
        raise Interrupted("stopped")


@pytest.mark.slow
def test_tuning_that_was_stopped_goes_on_after_its_last_pass_to_the_same_bits(tiny: Build, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    straight = walked(checkpoint, tmp_path / "straight")
    with pytest.raises(Interrupted):
        walked(checkpoint, tmp_path / "stopped", stop_in_the_second_pass)
    steps: list[int] = []

    def note(phase: str, done: int, total: int) -> None:
        if phase == "tuning":
            steps.append(done)

    again = walked(checkpoint, tmp_path / "stopped", note)
    assert steps == list(range(STEPS, STEPS * tuning.EPOCHS + 1))
    assert again.weights_only == straight.weights_only
    for each in filter(is_quantized, checkpoint.model.tensors()):
        np.testing.assert_array_equal(again.solutions.values(each), straight.solutions.values(each), err_msg=each)


@pytest.mark.parametrize("broken", ["tuning.json", "tuning.1.npy"])
def test_factors_that_are_damaged_are_not_gone_on_with(tiny: Build, tmp_path: Path, broken: str) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    with pytest.raises(Interrupted):
        walked(checkpoint, tmp_path / "kept", stop_in_the_second_pass)
    (tmp_path / "kept" / broken).write_bytes(b"{")
    with pytest.raises(CorruptInput, match="not what a walk kept"):
        walked(checkpoint, tmp_path / "kept")
