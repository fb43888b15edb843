"""Build cost: edgeq's GGUF writing against llama.cpp's converter and quantizer, to files of one layout."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import proofs
from edgeq.checkpoint import Checkpoint
from peers import child
from peers.figures import Goal, Row
from peers.llamacpp import files, tools

RECIPE, BODY, TABLE = "w4g32-e8-rtn", "Q4_0", "Q8_0"
WALL, ANONYMOUS = Goal("ratio", "at most", 0.7), Goal("edgeq", "at most", 1.5e9)
_WARM_PIECE = 1 << 24


class Build(NamedTuple):
    """One build: its cost, bytes of the file, bytes on the disk that are not needed afterwards."""

    cost: child.Cost
    bytes: int
    temporary_bytes: int


def rows(model: str, folder: Path, repetitions: int) -> Iterator[Row]:
    """Figures of interleaved builds of a random checkpoint of a catalogue model; the side that begins takes turns.

    The page cache holds the checkpoint, and what was written before is on the disk, when a side begins. The checks and
    the reference of `edgeq build` have no counterpart in llama.cpp and are left out.
    """
    checkpoint = random_checkpoint(model, folder)
    edgeq: list[Build] = []
    peer: list[Build] = []
    with files.scratch(folder) as ours, files.scratch(folder) as theirs:
        sides = [(_edgeq, ours, edgeq), (_peer, theirs, peer)]
        for _ in range(repetitions):
            for build, out, builds in sides:
                print(f"bench_peers: {model}, {build.__name__[1:]} builds", file=sys.stderr)
                builds.append(_undisturbed(build, checkpoint, out))
            sides.reverse()
        files.require_one_layout(ours / files.MODEL, theirs / files.MODEL)
    yield from compare(model, edgeq, peer)


def random_checkpoint(model: str, folder: Path) -> Checkpoint:
    """Random checkpoint of a catalogue model below a folder, made unless it is there."""
    out = folder / f"random-{model}"
    if not out.is_dir():
        subprocess.run(
            [sys.executable, str(proofs.ROOT / "scripts" / "make_random_checkpoint"), model, str(out)], check=True
        )
    return Checkpoint.open(out)


def compare(model: str, edgeq: Sequence[Build], peer: Sequence[Build]) -> Iterator[Row]:
    """One row for each figure of pairs of builds."""
    load = tuple(max(ours.cost.load, theirs.cost.load) for ours, theirs in zip(edgeq, peer, strict=True))
    figures: list[tuple[str, str, Goal | None, Callable[[Build], float]]] = [
        ("wall time", "s", WALL, lambda build: build.cost.wall_s),
        ("processor time", "s", None, lambda build: build.cost.cpu_s),
        ("peak anonymous memory", "B", ANONYMOUS, lambda build: build.cost.peak_anonymous_bytes),
        ("peak resident memory", "B", None, lambda build: build.cost.peak_rss_bytes),
        ("size of the file", "B", None, lambda build: build.bytes),
        ("disk beside it", "B", None, lambda build: build.temporary_bytes),
    ]
    for what, unit, goal, figure in figures:
        yield Row(
            part=f"build {model} {RECIPE}",
            what=what,
            unit=unit,
            edgeq=tuple(map(figure, edgeq)),
            peer=tuple(map(figure, peer)),
            goal=goal,
            load=load,
        )


def _undisturbed(build: Callable[[Checkpoint, Path], Build], checkpoint: Checkpoint, out: Path) -> Build:
    for old in out.iterdir():
        old.unlink()
    for weights in checkpoint.weights:
        with weights.open("rb", buffering=0) as stream:
            while stream.read(_WARM_PIECE):
                pass
    os.sync()
    return build(checkpoint, out)


def _edgeq(checkpoint: Checkpoint, out: Path) -> Build:
    cost = tools.write(checkpoint.folder, RECIPE, out)
    return Build(cost, (out / files.MODEL).stat().st_size, 0)


def _peer(checkpoint: Checkpoint, out: Path) -> Build:
    converted = out / "converted.gguf"
    first = tools.convert(checkpoint.folder, checkpoint.model, converted)
    second = tools.quantize(converted, out / files.MODEL, BODY, TABLE)
    temporary = converted.stat().st_size
    return Build(child.one_after_the_other([first, second]), (out / files.MODEL).stat().st_size, temporary)
