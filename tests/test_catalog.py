from __future__ import annotations

import dataclasses

import pytest

from edgeq import catalog, data
from edgeq.errors import UsageFault
from edgeq.model import read_config

NAMES = catalog.names()
MODES = {"base", "instruct", "thinking", "non_thinking", "vision_thinking", "vision_non_thinking", "video"}


def test_the_catalogue_goes_by_generation_and_size() -> None:
    assert len(NAMES) == 14
    assert set(NAMES) == {path.stem for path in data.folder("catalog").glob("*.toml")}
    assert (NAMES[0], NAMES[4], NAMES[-1]) == ("qwen2.5-0.5b", "qwen3-0.6b", "qwen3.5-9b")


@pytest.mark.parametrize("name", NAMES)
def test_every_file_is_a_model_that_agrees_with_its_configuration(name: str) -> None:
    entry = catalog.load(name)
    model = read_config(entry.config)
    assert entry.name == name
    assert entry.model == dataclasses.replace(model, context=entry.context)
    assert model.generation == entry.generation
    assert model.parameters == entry.parameters
    assert entry.context <= model.context
    assert model.has_vision == ("image" in entry.modality) == (entry.vision_parameters is not None)
    assert entry.hub.startswith("Qwen/")
    assert entry.commercial == (entry.license == "Apache-2.0") == (entry.license_note is None)


@pytest.mark.parametrize("name", NAMES)
def test_every_score_has_a_public_source_and_a_known_mode(name: str) -> None:
    entry = catalog.load(name)
    assert entry.scores
    assert set(entry.scores) <= MODES
    for scores in entry.scores.values():
        assert scores.source.strip()
        assert scores.values
        assert all(0 <= value <= 100 for value in scores.values.values())
    for source in (*entry.sources, *(scores.source for scores in entry.scores.values())):
        assert "E/" not in source.split()


@pytest.mark.parametrize("name", NAMES)
def test_parameters_and_shapes_are_those_that_transformers_builds(name: str) -> None:
    import torch
    import transformers

    model = catalog.load(name).model
    config = transformers.AutoConfig.for_model(**model.config())
    with torch.device("meta"):
        built = transformers.AutoModelForCausalLM.from_config(config)
    shapes = {key: tuple(tensor.shape) for key, tensor in built.named_parameters()}
    assert shapes == model.tensors()
    assert built.num_parameters() == catalog.load(name).parameters


def test_the_only_small_qwen_that_may_not_be_sold_says_so() -> None:
    assert [name for name in NAMES if not catalog.load(name).commercial] == ["qwen2.5-3b"]


def test_a_hub_id_finds_its_entry_in_any_case() -> None:
    assert catalog.load("qwen/qwen2.5-0.5b-instruct").name == "qwen2.5-0.5b"
    assert catalog.load("Qwen3-0.6B").hub == "Qwen/Qwen3-0.6B"


def test_an_unknown_model_suggests_the_nearest() -> None:
    with pytest.raises(UsageFault, match=r"Did you mean .*qwen3-0\.6b"):
        catalog.load("qwen3-0.5b")
