from __future__ import annotations

import math
import zipfile
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray

from edgeq import accuracy
from edgeq.accuracy import Losses, Reference
from edgeq.errors import CorruptInput

VOCAB, LENGTH = 50, 9


def random_logits(seed: int, scale: float = 3.0) -> NDArray[np.float32]:
    return (scale * np.random.default_rng(seed).standard_normal((LENGTH, VOCAB))).astype(np.float32)


def reference_of(logits: list[NDArray[np.float32]], k: int = VOCAB, seed: int = 0) -> Reference:
    windows = np.random.default_rng(seed).integers(0, VOCAB, (len(logits), LENGTH)).astype(np.int32)
    kept = [accuracy.likeliest(each[:-1], k) for each in logits]
    following = [
        np.take_along_axis(every, window[1:, None].astype(np.int64), axis=1)[:, 0]
        for window, (_, _, every) in zip(windows, kept, strict=True)
    ]
    return Reference(
        windows=windows,
        ids=np.array([ids for ids, _, _ in kept]),
        log_probs=np.array([log_probs for _, log_probs, _ in kept]),
        next_log_probs=np.array(following),
        continuation=np.arange(10, dtype=np.int32),
        text_sha256="ab" * 32,
        vocab=VOCAB,
    )


def exact_log_softmax(logits: NDArray[np.float32]) -> NDArray[np.float64]:
    wide = logits.astype(np.float64)
    shifted = wide - wide.max(axis=1, keepdims=True)
    result: NDArray[np.float64] = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    return result


def exact_kl(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> NDArray[np.float64]:
    log_p, log_q = exact_log_softmax(ours[:-1]), exact_log_softmax(theirs[:-1])
    result: NDArray[np.float64] = (np.exp(log_p) * (log_p - log_q)).sum(axis=1)
    return result


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.floats(0, 1), st.floats(0.1, 20))
def test_the_divergence_is_that_of_the_full_distributions_in_float64(seed: int, noise: float, scale: float) -> None:
    ours = random_logits(seed, scale)
    theirs = ours + np.float32(noise) * random_logits(seed + 1)
    found = accuracy.compare(reference_of([ours]), 0, theirs).kl
    np.testing.assert_allclose(found, exact_kl(ours, theirs), rtol=1e-4, atol=1e-7)


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, VOCAB), st.floats(0.1, 20))
def test_a_model_has_no_divergence_from_itself(seed: int, k: int, scale: float) -> None:
    logits = random_logits(seed, scale)
    losses = accuracy.compare(reference_of([logits], k), 0, logits)
    assert np.abs(losses.kl).max() < 1e-12
    assert losses.agree.all()
    np.testing.assert_array_equal(losses.nll, losses.nll_reference)


def test_a_constant_added_to_the_logits_changes_nothing() -> None:
    logits = random_logits(3)
    losses = accuracy.compare(reference_of([logits]), 0, logits + np.float32(100))
    assert 0 < np.abs(losses.kl).max() < 1e-9


@settings(max_examples=50)
@given(st.integers(0, 2**32), st.integers(1, VOCAB - 1))
@example(97118, VOCAB - 1)  # a tail of 6e-7, of 8e-9 by the other model
def test_keeping_fewer_tokens_never_raises_the_divergence(seed: int, k: int) -> None:
    ours, theirs = random_logits(seed), random_logits(seed + 1)
    full = accuracy.compare(reference_of([ours]), 0, theirs).kl
    kept = accuracy.compare(reference_of([ours], k), 0, theirs).kl
    order = np.argsort(-exact_log_softmax(ours[:-1]), axis=1)[:, k:]
    p, q = (np.exp(np.take_along_axis(exact_log_softmax(each[:-1]), order, axis=1)).sum(1) for each in (ours, theirs))
    unknown = np.where(q > 1e-6, 1e-7 * p / q, p * np.log(q / accuracy._TINY))  # of 1 the kept ones leave q +- 1e-7
    assert (kept <= full + 1e-5 + unknown).all()
    assert (kept >= -1e-12).all()


@pytest.mark.parametrize("k", [1, 5, 30])
def test_the_tokens_that_are_not_kept_count_as_one(k: int) -> None:
    ours, theirs = random_logits(0), random_logits(1)
    log_p, log_q = exact_log_softmax(ours[:-1]), exact_log_softmax(theirs[:-1])
    order = np.argsort(-log_p, axis=1)
    p, q = (np.exp(np.take_along_axis(each, order, axis=1)) for each in (log_p, log_q))
    merged_p, merged_q = (np.column_stack([each[:, :k], each[:, k:].sum(axis=1)]) for each in (p, q))
    expected = (merged_p * np.log(merged_p / merged_q)).sum(axis=1)
    found = accuracy.compare(reference_of([ours], k), 0, theirs).kl
    np.testing.assert_allclose(found, expected, rtol=1e-4, atol=1e-6)


def test_keeping_most_tokens_comes_close_to_the_full_divergence() -> None:
    ours = random_logits(0)
    theirs = ours + np.float32(0.1) * random_logits(1)
    full = accuracy.compare(reference_of([ours]), 0, theirs).kl.mean()
    assert full > 0.01
    assert accuracy.compare(reference_of([ours], 40), 0, theirs).kl.mean() == pytest.approx(full, rel=0.02)
    assert accuracy.compare(reference_of([ours], 1), 0, theirs).kl.mean() < 0.9 * full


def test_the_likeliest_tokens_come_first_and_ties_go_to_the_lower_id() -> None:
    logits = np.zeros((3, 64), np.float32)
    logits[1, [9, 40, 7]] = 2.0
    logits[2, 63] = 1.0
    ids, log_probs, every = accuracy.likeliest(logits, 5)
    assert ids[1, :3].tolist() == [7, 9, 40]
    assert ids[2, 0] == 63
    np.testing.assert_array_equal(ids[1:, 0], every.argmax(axis=1)[1:])
    assert (np.diff(log_probs, axis=1) <= 0).all()
    np.testing.assert_array_equal(log_probs, np.take_along_axis(every, ids.astype(np.int64), axis=1))


def test_log_probabilities_of_extreme_logits_stay_finite() -> None:
    logits = np.array([[1e30, -1e30, 0.0], [88.0, 89.0, -200.0]], np.float32)
    found = accuracy.log_softmax(logits)
    assert np.isfinite(found).all()
    np.testing.assert_allclose(np.exp(found).sum(axis=1), 1, rtol=1e-6)


def losses_of(reference: Reference, logits: list[NDArray[np.float32]]) -> list[Losses]:
    return [accuracy.compare(reference, index, each) for index, each in enumerate(logits)]


def test_the_summary_is_the_arithmetic_of_all_tokens() -> None:
    ours = [random_logits(seed) for seed in range(4)]
    theirs = [each + np.float32(0.3) * random_logits(10 + seed) for seed, each in enumerate(ours)]
    reference = reference_of(ours)
    found = accuracy.summarize(reference, losses_of(reference, theirs))
    kl = np.concatenate([exact_kl(a, b) for a, b in zip(ours, theirs, strict=True)])
    following = reference.windows[:, 1:]

    def perplexity(logits: list[NDArray[np.float32]]) -> float:
        picked = [
            np.take_along_axis(exact_log_softmax(each[:-1]), next_ids[:, None], axis=1)
            for each, next_ids in zip(logits, following, strict=True)
        ]
        return float(np.exp(-np.mean(picked)))

    agreement = np.mean([a[:-1].argmax(axis=1) == b[:-1].argmax(axis=1) for a, b in zip(ours, theirs, strict=True)])
    assert found.tokens == 4 * (LENGTH - 1)
    assert found.kl_mean == pytest.approx(kl.mean(), rel=1e-5)
    assert found.kl_max == pytest.approx(kl.max(), rel=1e-5)
    assert found.kl_p50 == pytest.approx(np.median(kl), rel=1e-5)
    assert found.perplexity_reference == pytest.approx(perplexity(ours), rel=1e-5)
    assert found.perplexity == pytest.approx(perplexity(theirs), rel=1e-5)
    assert found.ln_ratio.value == pytest.approx(math.log(found.perplexity / found.perplexity_reference), rel=1e-9)
    assert found.ln_ratio.low <= found.ln_ratio.value <= found.ln_ratio.high
    assert found.kl_low <= found.kl_mean <= found.kl_high
    assert found.top1_agreement == pytest.approx(agreement)
    assert found.text_sha256 == reference.text_sha256


def test_flips_are_counted_by_direction() -> None:
    reference = reference_of([np.zeros((LENGTH, VOCAB), np.float32)])
    right_reference = np.array([1, 1, 1, 0, 0, 1, 0, 0], bool)
    right = np.array([0, 0, 1, 1, 0, 0, 0, 0], bool)
    nothing = np.zeros(8)
    row = Losses(nothing, right_reference == right, nothing, nothing, right_reference, right)
    flips = accuracy.summarize(reference, [row]).flips
    assert (flips.lost, flips.gained, flips.p) == (3, 1, 0.625)


@pytest.mark.parametrize(
    ("lost", "gained", "p"),
    [(10, 2, 0.03857421875), (2, 10, 0.03857421875), (0, 0, 1.0), (5, 5, 1.0), (6, 5, 1.0), (0, 1, 1.0), (8, 0, 2**-7)],
)
def test_the_exact_mcnemar_test_gives_known_values(lost: int, gained: int, p: float) -> None:
    assert accuracy.mcnemar(lost, gained) == p


def test_the_exact_mcnemar_test_stands_thousands_of_flips() -> None:
    assert accuracy.mcnemar(1500, 1500) == 1.0
    assert 0 < accuracy.mcnemar(2000, 1500) < 1e-10
    assert accuracy.mcnemar(6000, 0) == 0.0


@settings(max_examples=30)
@given(st.lists(st.floats(-100, 100), min_size=1, max_size=60))
def test_the_bootstrap_interval_contains_the_mean(values: list[float]) -> None:
    low, high = accuracy.interval(np.array(values))
    slack = 1e-12 * (1 + max(map(abs, values)))
    assert low - slack <= float(np.mean(values)) <= high + slack
    assert min(values) - slack <= low <= high <= max(values) + slack


def test_the_bootstrap_interval_is_the_same_each_time_and_that_of_the_normal_law() -> None:
    values = np.random.default_rng(1).standard_normal(400)
    low, high = accuracy.interval(values)
    assert (low, high) == accuracy.interval(values.copy())
    half = 1.96 * values.std() / math.sqrt(400)
    assert (high - low) / 2 == pytest.approx(half, rel=0.1)


@pytest.mark.parametrize(
    ("tokens", "looping"),
    [
        ([], False),
        ([5, 5, 5], False),
        ([1, 2, 5, 5, 5, 5], True),
        ([5, 5, 5, 5, 1], False),
        ([9] + [1, 2] * 4, True),
        ([1, 2] * 3 + [2, 1], False),
        ([0] + [1, 2, 3] * 4, True),
        (list(range(8)) * 4, True),
        (list(range(9)) * 4, False),
        (list(range(8)) * 3, False),
        (list(range(100)), False),
    ],
)
def test_a_loop_is_a_short_phrase_said_four_times_at_the_end(tokens: list[int], looping: bool) -> None:
    assert accuracy.loops(tokens) is looping


def test_a_reference_says_how_complete_it_is() -> None:
    logits = [random_logits(0)]
    assert reference_of(logits).exact
    assert "all of 50" in reference_of(logits).describe()
    assert not reference_of(logits, 10).exact
    assert "10 likeliest of 50" in reference_of(logits, 10).describe()


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "reference.npz"


@pytest.mark.parametrize("k", [10, VOCAB])
def test_a_saved_reference_is_loaded_as_it_was(file: Path, k: int) -> None:
    reference = reference_of([random_logits(0), random_logits(1)], k)
    accuracy.save(reference, file)
    found = accuracy.load(file)
    for field in fields(Reference):
        before, after = getattr(reference, field.name), getattr(found, field.name)
        np.testing.assert_array_equal(after, before)
        assert type(after) is type(before)
        assert not isinstance(before, np.ndarray) or after.dtype == before.dtype


def test_a_reference_is_saved_as_the_same_bytes_each_time(file: Path, tmp_path: Path) -> None:
    reference = reference_of([random_logits(0)])
    accuracy.save(reference, file)
    accuracy.save(reference, tmp_path / "again.npz")
    assert file.read_bytes() == (tmp_path / "again.npz").read_bytes()


def test_a_missing_reference_is_corrupt_input(file: Path) -> None:
    with pytest.raises(CorruptInput, match=r"reference\.npz: not a recorded reference"):
        accuracy.load(file)


@pytest.mark.parametrize("keep", [0, 1, 4, 100, 1000, -1, -22, -60])
def test_a_truncated_reference_is_corrupt_input(file: Path, keep: int) -> None:
    accuracy.save(reference_of([random_logits(0)]), file)
    file.write_bytes(file.read_bytes()[:keep])
    with pytest.raises(CorruptInput, match=r"reference\.npz: not a recorded reference"):
        accuracy.load(file)


@settings(max_examples=200, deadline=None)
@given(st.data())
def test_a_reference_with_any_changed_byte_is_sound_or_corrupt_input(
    tmp_path_factory: pytest.TempPathFactory, data: Any
) -> None:
    file = tmp_path_factory.mktemp("changed") / "reference.npz"
    accuracy.save(reference_of([random_logits(0)], 1), file)
    raw = bytearray(file.read_bytes())
    raw[data.draw(st.integers(0, len(raw) - 1))] ^= data.draw(st.integers(1, 255))
    file.write_bytes(raw)
    try:
        found = accuracy.load(file)
    except CorruptInput:
        return
    assert np.isfinite(accuracy.compare(found, 0, random_logits(0)).kl).all()


def test_a_plain_array_and_a_text_are_no_reference(file: Path) -> None:
    with file.open("wb") as stream:
        np.save(stream, np.zeros(3))
    with pytest.raises(CorruptInput):
        accuracy.load(file)
    file.write_text("not an archive")
    with pytest.raises(CorruptInput):
        accuracy.load(file)


class Trap:
    """Touches a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


def test_pickled_objects_are_refused_and_never_run(file: Path, tmp_path: Path) -> None:
    accuracy.save(reference_of([random_logits(0)]), file)
    with np.load(file) as arrays:
        kept = dict(arrays)
    np.savez(file, **(kept | {"windows": np.array([[Trap(tmp_path / "marker")]], object)}))
    with pytest.raises(CorruptInput, match="not a recorded reference"):
        accuracy.load(file)
    assert not (tmp_path / "marker").exists()


@pytest.mark.parametrize("name", ["windows", "ids", "log_probs", "next_log_probs", "continuation", "vocab"])
def test_a_reference_without_one_of_its_arrays_is_corrupt_input(file: Path, name: str) -> None:
    accuracy.save(reference_of([random_logits(0)]), file)
    shorter = file.with_name("shorter.npz")
    with zipfile.ZipFile(file) as whole, zipfile.ZipFile(shorter, "w") as partly:
        for member in whole.namelist():
            if member != f"{name}.npy":
                partly.writestr(member, whole.read(member))
    with pytest.raises(CorruptInput, match=name):
        accuracy.load(shorter)


@pytest.mark.parametrize(
    "change",
    [
        {"windows": np.zeros((0, LENGTH), np.int32)},
        {"windows": np.zeros(LENGTH, np.int32)},
        {"windows": np.full((1, LENGTH), VOCAB, np.int32)},
        {"windows": np.full((1, LENGTH), -1, np.int32)},
        {"windows": np.zeros((2, LENGTH), np.int32)},
        {"ids": np.full((1, LENGTH - 1, VOCAB), VOCAB, np.uint32)},
        {"ids": np.zeros((1, LENGTH - 1, 3), np.uint32)},
        {"log_probs": np.zeros((1, LENGTH, VOCAB), np.float32)},
        {"log_probs": np.full((1, LENGTH - 1, VOCAB), np.nan, np.float32)},
        {"next_log_probs": np.zeros((1, 2), np.float32)},
        {"continuation": np.array([VOCAB], np.int32)},
        {"continuation": np.array([0.5], np.float32)},
        {"vocab": 3},
    ],
)
def test_arrays_that_do_not_fit_together_are_corrupt_input(file: Path, change: dict[str, Any]) -> None:
    accuracy.save(replace(reference_of([random_logits(0)]), **change), file)
    with pytest.raises(CorruptInput, match="not a recorded reference"):
        accuracy.load(file)
