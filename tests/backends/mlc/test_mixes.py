from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast

import msgspec
import numpy as np
import pytest

import in_8_bits
from checkpoints import Build, quiet
from edgeq import bundle, catalog, choosing, recipe, size, target, transformer
from edgeq.backends import mlc
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint
from edgeq.choosing import Sensitivities
from edgeq.model import Model
from edgeq.quantize.mix import Option
from edgeq.quantize.solve import rounded
from edgeq.recipe import Recipe
from edgeq.target import Target
from edgeq.walk import sensitivity
from peers import arithmetic


class Described(msgspec.Struct):
    """A manifest, as far as a session reads it."""

    recipe: str
    context: int
    config: dict[str, object]
    provider: str
    layouts: dict[str, str]


IDS = [(7 * n + 3) % 251 for n in range(40)]


def mixed(model: Model, words: Iterable[str]) -> Recipe:
    """A recipe with layouts in turn."""
    units = sensitivity.units(model)
    empty = Sensitivities({first: [] for first in units}, units, 0)
    joined = choosing._joined(empty, mlc.JOINED).units
    turns = zip(itertools.cycle(words), joined.values(), strict=False)
    chosen = [(name, recipe.layout(word)) for word, names in turns for name in names]
    return dataclasses.replace(recipe.parse("mix-rtn"), chosen=tuple(chosen))


def test_units_that_are_stored_as_one_cost_the_sum_of_theirs() -> None:
    layout = recipe.layout("w4g32")
    names = {part: f"model.layers.0.mlp.{part}_proj.weight" for part in ("gate", "up", "down")}
    options = {name: [Option(layout, 10**n, 2.0**n, 4.0**n)] for n, name in enumerate(names.values())}
    found = choosing._joined(Sensitivities(options, {name: [name] for name in options}, 7), mlc.JOINED)
    assert found.units == {names["gate"]: [names["gate"], names["up"]], names["down"]: [names["down"]]}
    assert found.options[names["gate"]] == [Option(layout, 11, 3.0, 5.0)]
    assert found.options[names["down"]] == options[names["down"]]
    assert found.other_bytes == 7


@pytest.mark.parametrize("name", ["x86-avx2", "jetson", "apple-m4", "steam-deck-oled", "web-browser"])
def test_a_mix_has_room_for_a_larger_library(tiny: Build, name: str) -> None:
    checkpoint, device = Checkpoint.open(tiny("3")), target.load(name)
    fixed, mix = (recipe.parse(words) for words in ("w4g32-e8-rtn-kv16", "mix4.5-rtn-kv16"))
    sizes = [mlc.beside_bytes(Job(checkpoint, each, device, 256, quiet)) for each in (fixed, mix)]
    assert size.float_bytes(checkpoint.model) < sizes[0] < sizes[1]


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_a_mix_computes_what_its_layouts_stand_for(tiny: Build, here: Target, tmp_path: Path, generation: str) -> None:
    import torch

    checkpoint = Checkpoint.open(tiny(generation, tied=False))
    wanted = mixed(checkpoint.model, ["w2g64", "w4g64", "w4g32", "w8g32"])
    made = tmp_path / "made"
    made.mkdir()
    mlc.build(Job(checkpoint, wanted, here, 256, quiet), made)
    exact = transformer.instantiate(checkpoint, lambda _: True)
    for name in filter(size.is_quantized, checkpoint.model.tensors()):
        exact.get_parameter(name).data = torch.from_numpy(rounded(checkpoint, wanted, name))
    layouts = {name: layout.name for name, layout in wanted.chosen}
    described = Described(str(wanted), 256, checkpoint.model.config(), "cpu", layouts)
    manifest = cast(bundle.Bundle, described)
    with torch.inference_mode():
        expected = exact(input_ids=torch.tensor([IDS])).logits[0].numpy()
        in_8_bits.make(exact)
        in_bytes = exact(input_ids=torch.tensor([IDS])).logits[0].numpy()
    np.testing.assert_allclose(logits(*arithmetic.float_mlc(made, manifest)), expected, rtol=0, atol=5e-5)
    found = logits(made, manifest)
    assert np.abs(found - in_bytes).max() < 0.1
    assert np.median(np.abs(found - in_bytes)) < 6e-3
    told = made / "compiled.json"
    told.write_bytes(msgspec.json.encode(msgspec.json.decode(told.read_bytes()) | {"isa": ["of another machine"]}))
    np.testing.assert_allclose(logits(made, manifest), found, rtol=0, atol=1e-4)


def logits(folder: Path, manifest: bundle.Bundle) -> Any:
    """Logits of a folder that is loaded, on this CPU."""
    session = mlc.load(folder, manifest)
    try:
        return session.logits(IDS)
    finally:
        session.close()


@pytest.mark.slow
def test_every_matrix_product_of_a_mix_has_a_rule_made_for_it(here: Target) -> None:
    """Eight layers of Qwen3.5-0.8B for the Jetson."""
    from edgeq.backends.mlc import compiler, devices, kernels

    shape = catalog.load("qwen3.5-0.8b").model
    model = dataclasses.replace(shape, layer_types=shape.layer_types[:8])
    how = compiler.precision(dataclasses.replace(mixed(model, mlc.MIXED), kv_bits=16), "bfloat16")
    with kernels.kept_as_source():
        made = compiler.compile_model(model, how, devices.tvm_target(target.load("jetson")), 256)
    products = [kernel for kernel in made.kernels if "matmul" in kernel.name]
    assert {bits for bits in (2, 4, 8) if any(f"_{bits}_bits" in each.name for each in products)} == {2, 4, 8}
    assert {each.rule for each in products} == {"Matmul", "GEMV", "LowBatchGEMV"}
