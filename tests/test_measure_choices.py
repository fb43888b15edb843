"""What scripts/measure_choices compares, and that its children run; nothing is timed against anything here."""

from __future__ import annotations

import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest

from checkpoints import Build
from edgeq.backends.onnx.weights import MODEL
from script_files import SCRIPTS, imported


@pytest.fixture
def script() -> Iterator[Any]:
    with imported("measure_choices") as module:
        yield module


class Known:
    """A side whose speeds are known, and which notes when it was asked."""

    def __init__(self, name: str, speed: float, asked: list[str]) -> None:
        self.name, self.speed, self.asked = name, speed, asked

    def measure(self) -> tuple[float, float]:
        self.asked.append(self.name)
        return 10 * self.speed, self.speed


def test_every_choice_differs_from_the_base_in_one_thing(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(script, "physical_cores", lambda: 4)
    base, *others = map(msgspec.structs.asdict, script.choices("w4g32-e8-rtn"))
    assert "1 thread" in [other["name"] for other in others]
    for other in others:
        assert sum(other[key] != base[key] for key in base if key != "name") == 1
    monkeypatch.setattr(script, "physical_cores", lambda: 1)
    assert all(other.threads == 0 for other in script.choices("w4g32-e8-rtn"))


def test_sides_take_turns_and_the_ratio_is_that_of_the_choice(script: Any) -> None:
    asked: list[str] = []
    prefill, decode = script.compare(Known("base", 2, asked), Known("other", 3, asked), "faster", 4)
    assert asked == ["other", "base", "base", "other"] * 2
    assert (prefill.edgeq, prefill.peer) == ((30.0,) * 4, (20.0,) * 4)
    assert (decode.edgeq, decode.peer) == ((3.0,) * 4, (2.0,) * 4)


def test_kernels_compute_at_the_accuracy_that_is_asked_for(script: Any, built: Build, tmp_path: Path) -> None:
    import onnx

    shutil.copyfile(built("3", "w4g32-e8-rtn") / MODEL, tmp_path / MODEL)
    found = []
    for level in (None, 1):
        if level is not None:
            script.compute(tmp_path, level)
        nodes = onnx.load(str(tmp_path / MODEL), load_external_data=False).graph.node
        named = (attribute for node in nodes for attribute in node.attribute if attribute.name == "accuracy_level")
        found.append({attribute.i for attribute in named})
    assert found == [{4}, {1}]


@pytest.mark.slow
def test_a_tiny_checkpoint_is_measured_to_the_last_line(tiny: Build) -> None:
    command = [sys.executable, str(SCRIPTS / "measure_choices"), str(tiny("3")), "--rounds", "1", "--depth", "16"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "spinning, not between tokens" in done.stdout
    assert "float32 activations" in done.stdout
    assert "w4g32-e8-rtn-kv8" in done.stdout
    assert "w4g128-e4-rtn" not in done.stdout  # whose groups are wider than a row
    assert "memory is read at" in done.stdout
