"""Build cost: writing a GGUF file against llama.cpp's tools, an ONNX graph against the builder's int4."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import proofs
from edgeq.checkpoint import Checkpoint
from peers import child, genai
from peers.base import Side
from peers.figures import Goal, Row
from peers.llamacpp import files, tools
from peers.plan import Plan

RECIPE, BODY, TABLE = "w4g32-e8-rtn", "Q4_0", "Q8_0"
LLAMACPP, BUILDER = Goal("ratio", "at most", 0.7), Goal("ratio", "at most", 0.5)
ANONYMOUS = Goal("edgeq", "at most", 1.5e9)
_WARM_PIECE = 1 << 24


class Build(NamedTuple):
    """One build: its cost, bytes of the file, bytes on the disk that are not needed afterwards."""

    cost: child.Cost
    bytes: int
    temporary_bytes: int


Step = Callable[[Checkpoint, Path], Build]


def rows(plan: Plan) -> Iterator[Row]:
    """Figures of interleaved builds of a random checkpoint of a catalogue model; the side that begins takes turns.

    The page cache holds the checkpoint, and what was written before is on the disk, when a side begins. The checks and
    the reference of `edgeq build` have no counterpart at the peers and are left out.
    """
    pairs: dict[str, tuple[Step, Step, Goal]] = {
        "llamacpp": (_gguf, _llamacpp, LLAMACPP),
        "genai": (_onnx, _builder, BUILDER),
    }
    for name in [name for name in pairs if name in plan.peers]:
        ours, theirs, goal = pairs[name]
        checkpoint = random_checkpoint(plan.build_model, plan.folder)
        edgeq: list[Build] = []
        peer: list[Build] = []
        with files.scratch(plan.folder) as our_folder, files.scratch(plan.folder) as their_folder:
            sides = [(ours, our_folder, edgeq), (theirs, their_folder, peer)]
            for _ in range(plan.repetitions):
                for build, out, builds in sides:
                    print(f"bench_peers: {plan.build_model}, {build.__name__[1:]} builds", file=sys.stderr)
                    builds.append(_undisturbed(build, checkpoint, out))
                sides.reverse()
            if name == "llamacpp":
                files.require_one_layout(our_folder / files.MODEL, their_folder / files.MODEL)
        yield from compare(f"build {plan.build_model} {RECIPE} against {name}", edgeq, peer, goal)


def random_checkpoint(model: str, folder: Path) -> Checkpoint:
    """Random checkpoint of a catalogue model below a folder, made unless it is there."""
    out = folder / f"random-{model}"
    if not out.is_dir():
        subprocess.run(
            [sys.executable, str(proofs.ROOT / "scripts" / "make_random_checkpoint"), model, str(out)], check=True
        )
    return Checkpoint.open(out)


def compare(part: str, edgeq: Sequence[Build], peer: Sequence[Build], wall: Goal) -> Iterator[Row]:
    """One row for each figure of pairs of builds."""
    load = tuple(max(ours.cost.load, theirs.cost.load) for ours, theirs in zip(edgeq, peer, strict=True))
    figures: list[tuple[str, str, Goal | None, Callable[[Build], float]]] = [
        ("wall time", "s", wall, lambda build: build.cost.wall_s),
        ("processor time", "s", None, lambda build: build.cost.cpu_s),
        ("peak anonymous memory", "B", ANONYMOUS, lambda build: build.cost.peak_anonymous_bytes),
        ("peak resident memory", "B", None, lambda build: build.cost.peak_rss_bytes),
        ("size on the disk", "B", None, lambda build: build.bytes),
        ("disk beside it", "B", None, lambda build: build.temporary_bytes),
    ]
    for what, unit, goal, figure in figures:
        ours, theirs = tuple(map(figure, edgeq)), tuple(map(figure, peer))
        if any(ours + theirs):
            yield Row(part=part, what=what, unit=unit, edgeq=ours, peer=theirs, goal=goal, load=load)


def _undisturbed(build: Step, checkpoint: Checkpoint, out: Path) -> Build:
    shutil.rmtree(out)
    out.mkdir()
    for weights in checkpoint.weights:
        with weights.open("rb", buffering=0) as stream:
            while stream.read(_WARM_PIECE):
                pass
    os.sync()
    return build(checkpoint, out)


def _gguf(checkpoint: Checkpoint, out: Path) -> Build:
    return Build(tools.write(checkpoint.folder, RECIPE, "llamacpp", out), _size(out), 0)


def _llamacpp(checkpoint: Checkpoint, out: Path) -> Build:
    converted = out / "converted.gguf"
    first = tools.convert(checkpoint.folder, checkpoint.model, converted)
    second = tools.quantize(converted, out / files.MODEL, BODY, TABLE)
    temporary = converted.stat().st_size
    return Build(child.one_after_the_other([first, second]), _size(out) - temporary, temporary)


def _onnx(checkpoint: Checkpoint, out: Path) -> Build:
    return Build(tools.write(checkpoint.folder, RECIPE, "onnx", out), _size(out), 0)


def _builder(checkpoint: Checkpoint, out: Path) -> Build:
    side = Side(genai, "int4", ())
    return Build(child.run(side.making(checkpoint.folder, out, out), side.environment()), _size(out), 0)


def _size(folder: Path) -> int:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file())
