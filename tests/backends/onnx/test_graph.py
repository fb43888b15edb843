from __future__ import annotations

import json
import logging
from collections import Counter

import pytest

from checkpoints import Build
from edgeq.backends.onnx import graph, weights


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_no_float_matrix_is_left_but_the_two_small_ones_of_a_delta_net(built: Build, generation: str) -> None:
    import onnx_ir as ir

    graph = ir.load(built(generation, "w4g32-e8-rtn") / weights.MODEL).graph
    left = [node.name for node in graph if node.op_type == "MatMul"]
    assert all("/a_proj/" in name or "/b_proj/" in name for name in left)
    assert len(left) == (6 if generation == "3.5" else 0)
    assert Counter(node.op_type for node in graph)["GatherBlockQuantized"] == 1


def test_rotary_caches_and_genai_config_are_cut_to_the_bundles_context(built: Build) -> None:
    import onnx_ir as ir

    folder = built("3", "w4g32-e8-rtn")
    assert ir.load(folder / weights.MODEL).graph.initializers["cos_cache"].shape[0] == 256
    config = json.loads((folder / "genai_config.json").read_text())
    assert config["search"]["max_length"] == config["model"]["context_length"] == 256


@pytest.mark.parametrize(("generation", "kind"), [("2.5", "qwen2"), ("3", "qwen3"), ("3.5", "qwen3_5_text")])
def test_genai_config_names_the_generation(built: Build, generation: str, kind: str) -> None:
    config = json.loads((built(generation, "w4g32-e8-rtn") / "genai_config.json").read_text())
    assert config["model"]["type"] == kind
    stops = config["model"]["eos_token_id"]
    assert 258 in (stops if isinstance(stops, list) else [stops])


def test_building_leaves_the_root_logger_as_it_was() -> None:
    root = logging.getLogger()
    before = root.handlers[:], root.level
    with graph._own_logging():
        root.addHandler(logging.NullHandler())
        root.setLevel(logging.DEBUG)
    assert (root.handlers, root.level) == before
