from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from numpy.typing import NDArray

from edgeq import recipe
from edgeq.quantize import ggml, gptq, mse, rtn
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.quantize.solve import joined
from edgeq.recipe import Layout

Found = Solution | BlockSolution
PLAIN = [
    recipe.plain(bits, group, symmetric=symmetric)
    for bits in (2, 4, 8)
    for group in (32, recipe.COLUMN)
    for symmetric in (True, False)
]
LAYOUTS = [*PLAIN, *recipe.GGML.values()]
each_layout = pytest.mark.parametrize("layout", LAYOUTS, ids=lambda layout: layout.name)
each_plain = pytest.mark.parametrize("layout", PLAIN, ids=lambda layout: layout.name)
INPUTS = 256


@pytest.fixture(autouse=True)
def _library(request: pytest.FixtureRequest) -> None:
    layout = getattr(request.node, "callspec", None) and request.node.callspec.params.get("layout")
    if layout and layout.is_ggml:
        pytest.importorskip("llama_cpp", reason="ggml rounds its layouts itself", exc_type=ImportError)


def weights(outputs: int = 12, inputs: int = INPUTS, seed: int = 0) -> NDArray[np.float32]:
    return np.random.default_rng(seed).normal(0, 0.05, (outputs, inputs)).astype(np.float32)


def moments(inputs: int = INPUTS, seed: int = 1) -> Any:
    """Second moments of inputs that go together, as those of hidden states do."""
    random = np.random.default_rng(seed)
    mixed = random.normal(size=(4 * inputs, inputs // 4)) @ random.normal(size=(inputs // 4, inputs))
    read = mixed + random.normal(size=(4 * inputs, inputs)) * random.uniform(0.1, 2, inputs)
    return torch.from_numpy((read.T @ read / len(read)).astype(np.float32))


@cache
def curved(inputs: int = INPUTS, seed: int = 1) -> gptq.Curvature:
    return gptq.curvature(moments(inputs, seed))


def solved(values: NDArray[np.float32], curvature: gptq.Curvature, layout: Layout) -> Found:
    return gptq.quantize(values, curvature, layout.of(values.shape[1]), "matrix")


def rounded(values: NDArray[np.float32], layout: Layout) -> NDArray[np.float32]:
    """What rounding to nearest makes of them."""
    layout = layout.of(values.shape[1])
    if layout.is_ggml:
        return ggml.unpack(ggml.quantize(values, layout), layout, "matrix").dequantize()
    made = rtn.quantize(values, layout.bits, layout.group, symmetric=layout.symmetric)
    return Solution("matrix", layout.bits, layout.group, *made).dequantize()


def lost(values: NDArray[np.float32], found: NDArray[np.float32], hessian: Any) -> NDArray[np.float64]:
    """(w - q) H (w - q)^T of each output."""
    missed = values.astype(np.float64) - found
    error: NDArray[np.float64] = ((missed @ hessian.numpy().astype(np.float64)) * missed).sum(1)
    return error


def same(one: Found, other: Found) -> None:
    for field, value in vars(one).items():
        np.testing.assert_array_equal(value, getattr(other, field), err_msg=field)


def textbook(values: NDArray[np.float32], hessian: Any, layout: Layout) -> NDArray[np.uint8]:
    """Codes by optimal brain surgery in float64: each column rounded, the rest moved, the inverse without it taken."""
    rows, inverse = values.astype(np.float64), np.linalg.inv(hessian.numpy().astype(np.float64))
    codes = np.empty(values.shape, np.uint8)
    pivots = np.empty(len(inverse))
    reduced = inverse.copy()
    for index in range(len(inverse)):
        pivots[index] = reduced[index, index]
        reduced -= np.outer(reduced[:, index], reduced[index]) / pivots[index]
    reduced, top, group = inverse.copy(), (1 << layout.bits) - 1, layout.group
    for index in range(len(inverse)):
        if index % group == 0:
            here = slice(index, index + group)
            grouped, importance = rows[:, None, here].astype(np.float32), (1 / pivots[None, here]).astype(np.float32)
            scales, zeros = mse.grid(grouped, layout.bits, symmetric=layout.symmetric, importance=importance)
        step, zero = scales[:, 0].astype(np.float64), zeros[:, 0].astype(np.float64)
        code = np.clip(np.rint(rows[:, index] / step + zero), 0, top)
        codes[:, index] = code
        error = (rows[:, index] - (code - zero) * step) / pivots[index]
        rows[:, index + 1 :] -= np.outer(error, reduced[index, index + 1 :])
        reduced -= np.outer(reduced[:, index], reduced[index]) / pivots[index]
    return codes


@each_plain
def test_one_pass_gives_the_codes_of_the_textbook(layout: Layout, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    values, curvature = weights(), curved()
    found = solved(values, curvature, layout)
    assert isinstance(found, Solution)
    wanted = textbook(values, curvature.hessian, layout.of(INPUTS))
    assert (found.codes != wanted).mean() < 0.002  # float32 puts a value that lies in the middle on the other side


@each_layout
def test_sweeps_never_raise_the_error_and_all_of_it_is_below_rounding(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    values, curvature = weights(), curved()
    swept = lost(values, solved(values, curvature, layout).dequantize(), curvature.hessian)
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    once = lost(values, solved(values, curvature, layout).dequantize(), curvature.hessian)
    assert (swept <= once * (1 + 1e-5)).all()
    assert swept.sum() < once.sum()
    assert once.sum() < lost(values, rounded(values, layout), curvature.hessian).sum()


@each_plain
def test_scales_that_are_fitted_never_raise_the_error_beyond_their_rounding(
    layout: Layout, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(gptq, "SWEEPS", 0)
    values, curvature = weights(), curved()
    fitted = solved(values, curvature, layout)
    monkeypatch.setattr(gptq._Grids, "fit", lambda *_: None)
    chosen = solved(values, curvature, layout)
    after, before = (lost(values, each.dequantize(), curvature.hessian) for each in (fitted, chosen))
    assert isinstance(fitted, Solution)
    assert isinstance(chosen, Solution)
    np.testing.assert_array_equal(fitted.codes, chosen.codes)
    assert (after <= before * (1 + 1e-4)).all()
    assert after.sum() < before.sum()


@each_layout
def test_any_cut_of_the_rows_gives_the_same(layout: Layout) -> None:
    values, curvature = weights(40), curved()
    whole = solved(values, curvature, layout)
    for cut in (1, 7, 32):
        parts = joined([solved(values[:cut], curvature, layout), solved(values[cut:], curvature, layout)])
        if layout.is_ggml:
            np.testing.assert_array_equal(parts.codes, whole.codes)
            np.testing.assert_allclose(parts.dequantize(), whole.dequantize(), rtol=1.1 / 1024)
        else:
            same(whole, parts)


@each_layout
def test_what_is_lost_of_the_outputs_shrinks_with_the_bits(layout: Layout) -> None:
    values, curvature = weights(), curved()
    error = lost(values, solved(values, curvature, layout).dequantize(), curvature.hessian).sum()
    everything = lost(values, 0 * values, curvature.hessian).sum()
    assert np.sqrt(error / everything) < 1.2 / 2**layout.bits


@each_layout
def test_inputs_that_are_never_read_do_no_harm(layout: Layout) -> None:
    values, dead = weights(), moments()
    unread = np.r_[0, 5, 64:96, INPUTS - 1]
    dead[unread] = 0
    dead[:, unread] = 0
    curvature = gptq.curvature(dead)
    found = solved(values, curvature, layout).dequantize()
    assert np.isfinite(found).all()
    without = lost(values, found, curvature.hessian).sum()
    assert without < lost(values, rounded(values, layout), curvature.hessian).sum()


@each_layout
def test_where_nothing_is_read_at_all_the_matrix_is_rounded(layout: Layout) -> None:
    values = weights()
    found = solved(values, gptq.curvature(torch.zeros(INPUTS, INPUTS)), layout).dequantize()
    error, everything = np.square(values - found).sum(), np.square(values).sum()
    assert np.sqrt(error / everything) < 2.2 / 2**layout.bits


@each_layout
def test_zeros_stay_zeros(layout: Layout) -> None:
    found = solved(0 * weights(), curved(), layout).dequantize()
    assert (found == 0).all()


@pytest.mark.parametrize("layout", PLAIN, ids=lambda layout: layout.name)
@settings(max_examples=15, deadline=None)
@given(
    at=st.tuples(st.integers(0, 3), st.integers(0, 63)),
    bad=st.sampled_from([np.nan, np.inf, -np.inf, 1e38]),
    values=arrays(np.float32, (4, 64), elements=st.floats(-1, 1, width=16)),
)
def test_weights_that_are_not_finite_never_become_finite(
    layout: Layout, at: tuple[int, int], bad: float, values: NDArray[np.float32]
) -> None:
    clean = solved(values, curved(64), layout)
    assert isinstance(clean, Solution)
    spoiled = values.copy()
    spoiled[at] = bad
    with np.errstate(all="ignore"):
        found = solved(spoiled, curved(64), layout)
    assert isinstance(found, Solution)
    assert not np.isfinite(found.scales[at[0]]).all()
    others = np.arange(4) != at[0]
    np.testing.assert_array_equal(found.scales[others], clean.scales[others])
    np.testing.assert_array_equal(found.codes[others], clean.codes[others])


@pytest.mark.parametrize("bad", [np.nan, np.inf])
def test_second_moments_that_are_not_finite_are_refused(bad: float) -> None:
    spoiled = moments(64)
    spoiled[3, 5] = spoiled[5, 3] = bad
    with pytest.raises(torch.linalg.LinAlgError):
        gptq.curvature(spoiled)


def test_curvature_is_what_it_says() -> None:
    hessian = moments(64).double().numpy()
    found = gptq.curvature(moments(64))
    damped = hessian + gptq.DAMPING * np.diag(hessian).mean() * np.eye(64)
    np.testing.assert_allclose(found.hessian.numpy(), damped, rtol=1e-5)
    assert (np.tril(found.factor.numpy(), -1) == 0).all()
    factor = found.factor.double().numpy()
    np.testing.assert_allclose(factor.T @ factor @ damped, np.eye(64), atol=2e-3)


def test_compensation_is_the_closed_form_and_lowers_what_the_layers_before_have_lost() -> None:
    random = np.random.default_rng(5)
    read = random.normal(size=(4000, 32)) @ random.normal(size=(32, 64)) + random.normal(size=(4000, 64))
    exact = read + read @ random.normal(0, 0.05, (64, 64))
    cross = torch.from_numpy(((exact - read).T @ read / len(read)).astype(np.float32))
    curvature = gptq.curvature(torch.from_numpy((read.T @ read / len(read)).astype(np.float32)))
    values = weights(8, 64)
    found = gptq.compensated(values, torch.from_numpy(values) @ cross, curvature)
    inverse = np.linalg.inv(curvature.hessian.double().numpy())
    wanted = values + gptq.SHARE * values.astype(np.float64) @ cross.double().numpy() @ inverse
    np.testing.assert_allclose(found, wanted, rtol=2e-3, atol=1e-5)
    before, after = (np.square(exact @ values.T - read @ each.T).sum() for each in (values, found))
    assert after < before


def test_the_error_is_that_of_the_outputs() -> None:
    values, found, hessian = weights(), weights(seed=3), moments()
    assert gptq.error(values, found, hessian) == pytest.approx(lost(values, found, hessian).sum(), rel=1e-4)


def test_nothing_of_a_solved_matrix_is_held_afterwards() -> None:
    import gc

    weights = np.random.default_rng(0).standard_normal((8, 64)).astype(np.float32)
    gptq.quantize(weights, gptq.curvature(torch.eye(64)), recipe.plain(4, 32, symmetric=False), "m")
    gc.collect()
    assert not [each for each in gc.get_objects() if type(each).__name__ == "_Grids"]
