from __future__ import annotations

import pytest

from edgeq import catalog, recipe
from edgeq.estimating import formats, published
from edgeq.estimating.published import Row


def _files() -> list[Row]:
    """Published sizes of whole files of models whose shape is known, one row for each file."""
    rows = {
        (row.model, row.quantization): row
        for row in published.read().rows
        if row.weights_basis == "published file size" and row.model.lower() in catalog.names()
    }
    return [row for row in rows.values() if row.quantization.lower() in formats.NAMES]


@pytest.mark.parametrize("row", _files(), ids=lambda row: f"{row.model}-{row.quantization}")
def test_sizes_are_within_three_percent_of_published_files(row: Row) -> None:
    found = formats.weight_bytes(catalog.load(row.model).model, row.quantization)
    assert found == pytest.approx(row.weights_bytes, rel=0.03)


def test_there_are_enough_files_to_compare_with() -> None:
    assert len(_files()) >= 11


def test_an_untied_table_is_in_the_file_and_not_among_what_is_read() -> None:
    row = next(row for row in published.read().rows if row.model == "Qwen3-8B" and row.quantization == "Q4_K_M")
    model = catalog.load("qwen3-8b").model
    found = formats.weight_bytes(model, "Q4_K_M")
    assert found is not None
    assert found - model.vocab * model.hidden * 4.5 / 8 == pytest.approx(row.weights_bytes, rel=0.03)


def test_unknown_names_have_no_size() -> None:
    assert formats.weight_bytes(catalog.load("qwen3-0.6b").model, "Q4_K_XXL") is None


@pytest.mark.parametrize("name", formats.NAMES)
def test_every_name_has_a_recipe_that_moves_as_much(name: str) -> None:
    model = catalog.load("qwen3-4b").model
    like = recipe.parse(formats.recipe_like(name))
    assert like.kv_bits == 16
    assert like.body.is_ggml == name.startswith("q4_k")
    assert formats.weight_bytes(model, name)
