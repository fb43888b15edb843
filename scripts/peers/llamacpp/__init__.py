"""llama.cpp, as llama-cpp-python holds it: build cost, loss at equal layout, overhead of edgeq's session."""

from __future__ import annotations

from collections.abc import Collection, Iterator
from pathlib import Path

from edgeq import sources
from edgeq.checkpoint import Checkpoint
from peers.figures import Row
from peers.llamacpp import build, loss, speed, tools

NAME = "llama.cpp"
PARTS = ("build", "loss", "speed")
DEMO = "demo-qwen3"


def rows(
    parts: Collection[str], folder: Path, build_model: str, speed_model: str, repetitions: int, rounds: int
) -> Iterator[Row]:
    """Figures of the parts that are wanted; checkpoints are made below a folder unless they are there."""
    if "build" in parts:
        yield from build.rows(build_model, folder, repetitions)
    if "loss" in parts:
        yield from loss.rows(folder)
    if "speed" in parts:
        demo = Checkpoint.open(sources.find(DEMO, offline=True).folder)
        yield from speed.rows(demo, DEMO, folder, rounds, goal=None)
        checkpoint = build.random_checkpoint(speed_model, folder)
        yield from speed.rows(checkpoint, speed_model, folder, rounds, goal=speed.OVERHEAD)


def versions() -> dict[str, str]:
    """Packages that took part."""
    return tools.versions()
