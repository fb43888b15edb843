from __future__ import annotations

import dataclasses
import math

import pytest

from edgeq import catalog, recipe
from edgeq.loss import Accuracy, Flips, Interval
from edgeq.recommending import ordering, quantization

SIZES = ("qwen3-0.6b", "qwen3-1.7b", "qwen3-4b", "qwen3-8b")


def loss(model: str, name: str) -> float:
    return quantization.estimated(catalog.load(model).model, recipe.parse(name)).value


def accuracy(ln_ratio: Interval) -> Accuracy:
    return Accuracy(
        reference="float32",
        tokens=1000,
        text_sha256="0" * 64,
        perplexity_reference=10.0,
        perplexity=10.5,
        ln_ratio=ln_ratio,
        kl_mean=0.04,
        kl_low=0.03,
        kl_high=0.05,
        kl_p50=0.01,
        kl_p99=0.5,
        kl_max=2.0,
        top1_agreement=0.9,
        flips=Flips(60, 40, 0.05),
    )


@pytest.mark.parametrize("name", ["w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn", "q3_k-eq6_k-rtn"])
def test_losses_grow_as_models_shrink(name: str) -> None:
    found = [loss(model, name) for model in SIZES]
    assert found == sorted(found, reverse=True)
    assert found[0] > 1.5 * found[-1]


def test_losses_grow_as_bits_shrink() -> None:
    names = (
        "w16",
        "w8g32-e8-rtn",
        "q6_k-eq6_k-rtn",
        "q5_k-eq6_k-rtn",
        "w4g32-e8-rtn",
        "q3_k-eq6_k-rtn",
        "q2_k-eq6_k-rtn",
    )
    found = [loss("qwen3-4b", name) for name in names]
    assert found == sorted(found)
    assert found[0] == 0.0


def test_the_ladders_own_model_loses_what_was_published() -> None:
    published = quantization.published().ladder
    by_bits = {rung.bits_per_weight: 1 - rung.score / published.float_score for rung in published.rungs}
    assert loss("qwen3-4b-instruct-2507", "w4g32-e4-rtn") == pytest.approx(by_bits[4.5], rel=0.01)
    assert loss("qwen3-4b-instruct-2507", "w8g32-e8-rtn") == pytest.approx(by_bits[8.5], rel=0.01)


def test_the_law_agrees_with_losses_that_it_was_not_made_of() -> None:
    seven = catalog.load("qwen2.5-7b").model
    found = quantization.estimated(seven, recipe.parse("w4g32-e4-rtn"))
    gptq_7b = 1 - 64.1 / 66.9
    assert found.low < gptq_7b < found.high


@pytest.mark.parametrize("method", ["gptq", "guided", "tuned"])
def test_a_fitted_recipe_loses_less_of_its_layers_by_what_was_published_and_may_lose_as_much(method: str) -> None:
    model = catalog.load("qwen3-4b").model
    rounded, fitted = (quantization.estimated(model, recipe.parse(f"w4g32-e4-{each}")) for each in ("rtn", method))
    assert min(quantization.fitted()) * rounded.value < fitted.value < rounded.value
    assert fitted.low < rounded.low
    assert fitted.high == rounded.high
    assert "[0.65, 0.99] as GPTQ of three Qwen2 models" in fitted.basis
    assert "GPTQ" not in rounded.basis
    assert loss("qwen3-4b", f"w8g32-e8-{method}") == loss("qwen3-4b", "w8g32-e8-rtn")


def test_published_gptq_is_of_shapes_in_the_catalogue_and_an_estimate_of_it_is_near() -> None:
    for sizes in quantization.published().sizes:
        for one, name in zip(sizes.models, ("qwen2.5-7b", "qwen2.5-1.5b", "qwen2.5-0.5b"), strict=True):
            shapes = catalog.load(name).model.tensors()
            layers = [shape for each, shape in shapes.items() if each.startswith("model.layers.") and len(shape) == 2]
            assert (one.parameters, one.quantized) == (
                catalog.load(name).model.parameters,
                sum(math.prod(shape) for shape in layers),
            )
            if sizes.layout == "GPTQ int4":
                found = quantization.estimated(catalog.load(name).model, recipe.parse("w4g128-e16-gptq"))
                assert found.value == pytest.approx(one.lost, rel=0.3)
                assert found.low < one.lost < found.high


def test_a_table_in_8_bits_saves_most_where_the_table_is_most_of_the_model() -> None:
    def saved(model: str) -> float:
        return 1 - loss(model, "w4g32-e8-rtn") / loss(model, "w4g32-e4-rtn")

    assert saved("qwen3.5-0.8b") > saved("qwen3-0.6b") > saved("qwen3-4b") > 0.05


def test_a_14b_in_2_bits_is_worse_than_a_4b_in_4_bits() -> None:
    eight = catalog.load("qwen3-8b").model
    fourteen = dataclasses.replace(eight, layer_types=("full_attention",) * 40, hidden=5120, ffn=17408, heads=40)
    assert 14e9 < fourteen.parameters < 15.5e9
    four = ordering.of_catalogue().quality("qwen3-4b")
    assert four is not None
    kept = four.score * (1 - loss("qwen3-4b", "w4g32-e8-rtn"))
    for name in ("q2_k-eq6_k-rtn", "w2ag32-e8-mse"):
        lost = quantization.estimated(fourteen, recipe.parse(name)).value
        assert 100 * (1 - lost) < kept


def test_an_estimate_names_its_source_and_has_an_interval() -> None:
    found = quantization.estimated(catalog.load("qwen3-0.6b").model, recipe.parse("w4g32-e8-rtn"))
    assert found.evidence == "published"
    assert "mlx-lm" in found.basis
    assert found.low < found.value < found.high
    assert found.kl_mean is None


def test_a_measured_loss_is_the_share_of_likelihood_that_was_lost() -> None:
    found = quantization.measured(accuracy(Interval(0.05, 0.03, 0.07)))
    assert found.evidence == "measured"
    assert found.value == pytest.approx(0.04877, rel=1e-3)
    assert found.low == pytest.approx(0.02955, rel=1e-3)
    assert found.kl_mean == 0.04
    assert quantization.measured(accuracy(Interval(-0.01, -0.02, 0.01))).value == 0.0


def test_every_published_loss_has_a_source() -> None:
    found = quantization.published()
    for source in (found.ladder.source, found.few_bits.source, *(one.source for one in found.sizes)):
        assert source.startswith("GitHub ")
    assert quantization.law().power < -0.2
