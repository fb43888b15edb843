"""llama.cpp, as llama-cpp-python holds it: build cost, loss at equal layout, overhead of edgeq's session."""

from __future__ import annotations

from collections.abc import Iterator

from edgeq import sources
from edgeq.checkpoint import Checkpoint
from peers.figures import Row
from peers.llamacpp import build, loss, speed, tools
from peers.plan import Plan

NAME = "llama.cpp"
PARTS = ("build", "loss", "speed")
DEMO = "demo-qwen3"


def rows(plan: Plan) -> Iterator[Row]:
    """Figures of the parts that are wanted."""
    if "build" in plan.parts:
        yield from build.rows(plan.build_model, plan.folder, plan.repetitions)
    if "loss" in plan.parts:
        yield from loss.rows(plan.folder, plan.orders)
    if "speed" in plan.parts:
        demo = Checkpoint.open(sources.find(DEMO, offline=True).folder)
        yield from speed.rows(demo, DEMO, plan.folder, plan.rounds, goal=None)
        checkpoint = build.random_checkpoint(plan.speed_model, plan.folder)
        yield from speed.rows(checkpoint, plan.speed_model, plan.folder, plan.rounds, goal=speed.OVERHEAD)


def versions() -> dict[str, str]:
    """Packages that took part."""
    return tools.versions()
