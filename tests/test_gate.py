from __future__ import annotations

import math
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

import null_bundles
from checkpoints import quiet
from edgeq import accuracy, gate
from edgeq.backends.null import NullSession
from edgeq.errors import BackendFault, GateFailed

VOCAB = null_bundles.VOCAB


class Noisy(NullSession):
    """Logits with the same noise at each call."""

    def __init__(self, noise: float) -> None:
        super().__init__(VOCAB)
        self.noise = noise

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        found = super().logits(ids)
        return found + np.float32(self.noise) * np.random.default_rng(0).standard_normal(found.shape, np.float32)


class Odd(NullSession):
    """One logit of the second window is something else."""

    def __init__(self, value: float) -> None:
        super().__init__(VOCAB)
        self.value, self.calls = value, 0

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        found = super().logits(ids)
        self.calls += 1
        if self.calls == 2:
            found[-1, 7] = self.value
        return found


class Repeating(NullSession):
    """After each id the likeliest is 7; right by its own scoring, and a loop."""

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        yield from [7] * tokens

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        found = super().logits(ids)
        if list(ids[-2:]) == [7, 7]:
            found[len(ids) - accuracy.CONTINUATION - 1 :] = np.eye(self.vocab, dtype=np.float32)[7]
        return found


def test_a_backend_passes_against_its_own_logits() -> None:
    reference = null_bundles.reference()
    found = gate.check(reference, NullSession(VOCAB), 1e-9, 0.0, quiet)
    assert found.passed
    assert found.reason is None
    assert found.kl_mean == pytest.approx(0, abs=1e-12)
    assert found.top1_agreement == 1.0
    assert found.perplexity == found.perplexity_reference
    assert found.tokens == 3 * 39
    assert found.text_sha256 == reference.text_sha256
    assert found.ran_on == platform.machine()
    gate.require(found, "bundle", "run")


def test_a_truncated_reference_serves_as_well() -> None:
    assert gate.check(null_bundles.reference(k=16), NullSession(VOCAB), 1e-9, 0.0, quiet).passed


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_logits_that_are_not_finite_fail_and_name_the_window(value: float) -> None:
    found = gate.check(null_bundles.reference(), Odd(value), math.inf, math.inf, quiet)
    assert not found.passed
    assert found.reason == "window 1: logits are not finite"
    assert found.kl_mean is None
    assert found.perplexity is None


def test_a_divergence_above_the_limit_fails_with_both_numbers() -> None:
    loss = gate.check(null_bundles.reference(), Noisy(0.5), math.inf, math.inf, quiet).kl_mean
    assert loss is not None
    assert loss > 0.05
    found = gate.check(null_bundles.reference(), Noisy(0.5), loss / 2, math.inf, quiet)
    assert not found.passed
    assert found.kl_mean == loss
    assert found.reason == f"KL divergence {loss:.4f} nats per token is above the limit of {loss / 2:g}"
    assert gate.check(null_bundles.reference(), Noisy(0.5), loss, math.inf, quiet).passed


def test_a_divergence_that_the_weights_do_not_explain_fails() -> None:
    reference, session = null_bundles.reference(), Noisy(0.5)
    loss = gate.check(reference, session, math.inf, math.inf, quiet).kl_mean
    assert loss is not None
    explained = (loss - gate.ENGINE_FLOOR) / (1 + gate.ENGINE_SHARE)
    assert gate.check(reference, session, math.inf, explained * 1.001, quiet).passed
    found = gate.check(reference, session, math.inf, explained * 0.999, quiet)
    assert not found.passed
    assert "the engine does not run the weights that were quantized" in str(found.reason)
    assert found.kl_weights_only == explained * 0.999


@pytest.mark.parametrize(("limit", "weights_only"), [(math.nan, math.inf), (math.inf, math.nan), (-1.0, math.inf)])
def test_a_limit_that_is_no_limit_lets_nothing_pass(limit: float, weights_only: float) -> None:
    assert not gate.check(null_bundles.reference(), NullSession(VOCAB), limit, weights_only, quiet).passed


LOOPS = "greedy decoding repeats one phrase, the float32 reference does not"


@pytest.mark.parametrize("exact", [None, NullSession(VOCAB).logits])
def test_a_loop_that_the_reference_does_not_have_fails(exact: gate.Scorer | None) -> None:
    found = gate.check(null_bundles.reference(), Repeating(VOCAB), 1.0, 0.0, quiet, exact)
    assert not found.passed
    assert found.reason == LOOPS
    assert found.kl_mean == pytest.approx(0, abs=1e-12)


def test_a_loop_that_the_recorded_continuation_has_too_passes_and_the_float_model_is_not_asked() -> None:
    looping = replace(null_bundles.reference(), continuation=np.full(48, 5, np.int32))
    asked: list[Sequence[int]] = []

    def exact(ids: Sequence[int]) -> NDArray[np.float32]:
        asked.append(ids)
        return NullSession(VOCAB).logits(ids)

    assert gate.check(looping, Repeating(VOCAB), 1.0, 0.0, quiet, exact).passed
    assert asked == []


def test_a_loop_that_the_float_model_would_write_too_passes() -> None:
    asked: list[Sequence[int]] = []

    def exact(ids: Sequence[int]) -> NDArray[np.float32]:
        asked.append(ids)
        return Repeating(VOCAB).logits(ids)

    reference = null_bundles.reference()
    assert gate.check(reference, Repeating(VOCAB), 1.0, 0.0, quiet, exact).passed
    assert asked == [[*reference.windows[0, : accuracy.PROMPT].tolist(), *[7] * accuracy.CONTINUATION]]


def test_a_loop_passes_where_the_float_model_repeats_another_phrase() -> None:
    def exact(ids: Sequence[int]) -> NDArray[np.float32]:
        scores = np.zeros((len(ids), VOCAB), np.float32)
        scores[:, 9] = 5
        return scores

    assert gate.check(null_bundles.reference(), Repeating(VOCAB), 1.0, 0.0, quiet, exact).passed


def test_a_float_model_whose_scores_are_not_finite_excuses_no_loop() -> None:
    def exact(ids: Sequence[int]) -> NDArray[np.float32]:
        return np.full((len(ids), VOCAB), np.nan, np.float32)

    assert gate.check(null_bundles.reference(), Repeating(VOCAB), 1.0, 0.0, quiet, exact).reason == LOOPS


def test_tokens_that_scoring_would_not_choose_fail_the_gate() -> None:
    class Wandering(NullSession):
        def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
            yield from ((7 * step + 100) % VOCAB for step in range(tokens))

    found = gate.check(null_bundles.reference(), Wandering(VOCAB), 1.0, 0.0, quiet)
    assert not found.passed
    assert "decoding and scoring disagree" in str(found.reason)


def test_progress_counts_every_window_to_the_end() -> None:
    steps: list[tuple[str, int, int]] = []
    gate.check(null_bundles.reference(), NullSession(VOCAB), 1.0, 0.0, lambda *step: steps.append(step))
    assert steps == [("gate", done, 3) for done in range(4)]


def test_a_failed_gate_raises_with_its_reason_and_exit_code_4() -> None:
    found = gate.check(null_bundles.reference(), Noisy(0.5), 0.001, 0.0, quiet)
    with pytest.raises(GateFailed, match="the bundle: KL divergence") as caught:
        gate.require(found, "the bundle", "choose more bits")
    assert caught.value.exit_code == 4
    assert caught.value.run == "choose more bits"


def test_logits_of_another_shape_are_the_engines_fault() -> None:
    class Short(NullSession):
        def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
            return super().logits(ids)[1:]

    with pytest.raises(BackendFault, match="logits of shape"):
        gate.check(null_bundles.reference(), Short(VOCAB), math.inf, math.inf, quiet)
