"""Loss at equal layout: edgeq's rounding against llama.cpp's own quantizer, from one file, over one reference."""

from __future__ import annotations

import sys
from collections.abc import Iterable, Iterator
from pathlib import Path

import msgspec
import numpy as np

from edgeq import accuracy, data, sources
from edgeq.accuracy import Losses, Reference
from edgeq.backends.llamacpp import session
from edgeq.checkpoint import Checkpoint
from edgeq.machine import physical_cores
from edgeq.walk import run as walk
from edgeq.walk import windows
from peers.figures import Goal, Row
from peers.llamacpp import files, reorder
from peers.llamacpp.programs.edgeq_write import write
from peers.llamacpp.programs.quantize import quantize

PLAIN = {"w4g32-e8-rtn": "Q4_0", "w8g32-e8-rtn": "Q8_0"}
GGML = {f"{name}-e8-rtn": name.upper() for name in ("q4_1", "iq4_nl", "q4_k", "q5_k", "q6_k")}
NO_WORSE, ALL = Goal("ratio", "at most", 1), Goal("ratio", "at least", 1)
RULES = {
    "Q4_0": "edgeq divides by the scale as float16 holds it, ggml by the one before: both are one for bfloat16 weights",
    "Q8_0": "edgeq's scale is largest / -128, the largest keeping its sign; ggml's is |largest| / 127",
}


def rows(demos: Iterable[str], folder: Path, orders: int) -> Iterator[Row]:
    """Loss and equal blocks of each demo checkpoint, the loss over so many orders of its hidden units."""
    session._listen()  # else llama.cpp prints all that it does
    text = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")
    for model in demos:
        checkpoint = Checkpoint.open(sources.find(model, offline=True).folder)
        known = walk.reference(checkpoint, windows.full(checkpoint, text), lambda *_: None)
        print(f"bench_peers: {model}, layout", file=sys.stderr)
        yield from loss_rows(model, checkpoint, known, folder, orders)
        with files.scratch(folder) as scratch:
            yield from block_rows(f"layout {model}", checkpoint, scratch)


def loss_rows(model: str, checkpoint: Checkpoint, known: Reference, folder: Path, orders: int) -> Iterator[Row]:
    """Mean KL divergence in each order, as llama.cpp runs the files and of the weights alone, dequantized to float32.

    One order says little: it draws the rounding errors once, and another one ranks the two sides otherwise.
    """
    found: dict[str, list[list[float]]] = {}
    for seed in range(orders):
        with files.scratch(folder) as scratch:
            same = reorder.write(checkpoint, seed, scratch / "checkpoint")
            float32 = _edgeq(same, "f32", scratch)
            for recipe, kind in PLAIN.items():
                sides = [_edgeq(same, recipe, scratch), _peer(float32, scratch / kind, kind)]
                files.require_one_layout(*sides)
                exact = [_peer(side, side.parent / "dequantized", "F32", "F32") for side in sides]
                for how, pair in (("as run", sides), ("of weights alone", exact)):
                    samples = found.setdefault(f"{recipe}: KL divergence {how}", [[], []])
                    for side, file in zip(samples, pair, strict=True):
                        side.append(float(np.mean([each.kl for each in losses(same, known, file)])))
    for what, (edgeq, peer) in found.items():
        row = Row(part=f"layout {model}", what=what, unit="nats", edgeq=tuple(edgeq), peer=tuple(peer), goal=NO_WORSE)
        yield msgspec.structs.replace(row, middle="mean")


def block_rows(part: str, checkpoint: Checkpoint, scratch: Path) -> Iterator[Row]:
    """What the files of one layout share: everything, where ggml itself rounds for edgeq."""
    float32 = _edgeq(checkpoint, "f32", scratch)
    for recipe, kind in PLAIN.items():
        ours, theirs = _edgeq(checkpoint, recipe, scratch), _peer(float32, scratch / kind, kind)
        yield from plain_rows(part, kind, files.against_weights(ours, theirs, kind, float32))
    for recipe, kind in GGML.items():
        ours, theirs = _edgeq(checkpoint, recipe, scratch), _peer(float32, scratch / kind, kind)
        blocks, same = files.same_blocks(ours, theirs, kind)
        yield _counted(part, f"{kind}: blocks with the same bytes", same, blocks, ALL)


def losses(checkpoint: Checkpoint, known: Reference, file: Path) -> list[Losses]:
    """What a file loses on each window of the reference, through edgeq's session."""
    config, context = checkpoint.model.config(), known.windows.shape[1]
    loaded = session.LlamaSession(file.parent, files.described(config, context))
    try:
        return [
            accuracy.compare(known, index, loaded.logits(window.tolist())) for index, window in enumerate(known.windows)
        ]
    finally:
        loaded.close()


def plain_rows(part: str, kind: str, found: files.Plain) -> Iterator[Row]:
    """What two files of Q4_0 or Q8_0 share, and which is nearer to the weights where they differ."""
    goal = ALL if kind == "Q4_0" else None
    yield _counted(part, f"{kind}: scales equal", found.same_scales, found.blocks, goal)
    yield _counted(part, f"{kind}: codes equal", found.codes - found.different_codes, found.codes, goal, RULES[kind])
    if kind == "Q4_0" and found.different_codes:
        yield _counted(part, f"{kind}: codes that differ, edgeq's as near", found.nearer, found.different_codes, ALL)
    errors = (found.first_error,), (found.second_error,)
    what = f"{kind}: squared error of the weights"
    yield Row(part=part, what=what, unit="", edgeq=errors[0], peer=errors[1], goal=NO_WORSE)


def _counted(part: str, what: str, edgeq: int, peer: int, goal: Goal | None, note: str = "") -> Row:
    return Row(part=part, what=what, unit="count", edgeq=(edgeq,), peer=(peer,), goal=goal, note=note)


def _edgeq(checkpoint: Checkpoint, recipe: str, scratch: Path) -> Path:
    out = scratch / recipe
    out.mkdir()
    write(checkpoint, recipe, out)
    return out / files.MODEL


def _peer(source: Path, out: Path, kind: str, table: str = "Q8_0") -> Path:
    out.mkdir()
    quantize(str(source), str(out / files.MODEL), kind, table, physical_cores())
    return out / files.MODEL
