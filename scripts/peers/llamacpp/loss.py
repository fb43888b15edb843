"""Loss at equal layout: edgeq's rounding against llama.cpp's own quantizer, from one file, over one reference."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import cast

import numpy as np

from edgeq import accuracy, data, reference, sources
from edgeq.accuracy import Losses, Reference
from edgeq.backends.llamacpp.session import LlamaSession
from edgeq.bundle import Bundle
from edgeq.checkpoint import Checkpoint
from edgeq.machine import physical_cores
from peers.figures import Goal, Row
from peers.llamacpp import files
from peers.llamacpp.programs.edgeq_write import write
from peers.llamacpp.programs.quantize import quantize

PLAIN = {"w4g32-e8-rtn": "Q4_0", "w8g32-e8-rtn": "Q8_0"}
GGML = {f"{name}-e8-rtn": name.upper() for name in ("q4_1", "iq4_nl", "q4_k", "q5_k", "q6_k")}
NO_WORSE, ALL = Goal("ratio", "at most", 1), Goal("ratio", "at least", 1)
RULES = {
    "Q4_0": "edgeq divides by the scale as stored in float16, ggml by the float32 one before it is rounded",
    "Q8_0": "edgeq's scale is largest / -128, the largest keeping its sign; ggml's is |largest| / 127",
}


def rows(folder: Path) -> Iterator[Row]:
    """Loss and equal blocks of each demo checkpoint."""
    text = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")
    for model in sources.DEMOS:
        print(f"bench_peers: {model}, loss", file=sys.stderr)
        checkpoint = Checkpoint.open(sources.find(model, offline=True).folder)
        known = reference.full(checkpoint, text, lambda *_: None)
        with files.scratch(folder) as scratch:
            float32 = _edgeq(checkpoint, "f32", scratch)
            for recipe, kind in PLAIN.items():
                ours, theirs = _edgeq(checkpoint, recipe, scratch), _peer(float32, scratch / kind, kind)
                files.require_one_layout(ours, theirs)
                yield from _losses(checkpoint, known, model, recipe, ours, theirs)
                yield from plain_rows(f"loss {model}", kind, files.against_weights(ours, theirs, kind, float32))
            for recipe, kind in GGML.items():
                ours, theirs = _edgeq(checkpoint, recipe, scratch), _peer(float32, scratch / kind, kind)
                blocks, same = files.same_blocks(ours, theirs, kind)
                yield _counted(f"loss {model}", f"{kind}: blocks with the same bytes", same, blocks, ALL)


def _losses(
    checkpoint: Checkpoint, known: Reference, model: str, recipe: str, ours: Path, theirs: Path
) -> Iterator[Row]:
    """KL divergence as llama.cpp runs the files, and of the weights alone: back in float32, with such activations."""
    for how in ("as run", "weights alone"):
        if how == "weights alone":
            ours, theirs = (_peer(file, file.parent / "dequantized", "F32", "F32") for file in (ours, theirs))
        edgeq, peer = (_kl(losses(checkpoint, known, file)) for file in (ours, theirs))
        what = f"{recipe}: KL divergence {how}"
        yield Row(part=f"loss {model}", what=what, unit="nats", edgeq=edgeq, peer=peer, middle="mean", goal=NO_WORSE)


def losses(checkpoint: Checkpoint, known: Reference, file: Path) -> list[Losses]:
    """What a file loses on each window of the reference, through edgeq's session."""
    config, context = checkpoint.model.config(), known.windows.shape[1]
    described = SimpleNamespace(context=context, config=config, recipe="w16", provider="cpu")
    session = LlamaSession(file.parent, cast(Bundle, described))
    try:
        return [
            accuracy.compare(known, index, session.logits(window.tolist()))
            for index, window in enumerate(known.windows)
        ]
    finally:
        session.close()


def plain_rows(part: str, kind: str, found: files.Plain) -> Iterator[Row]:
    """What two files of Q4_0 or Q8_0 share, and which is nearer to the weights where they differ."""
    same_rule = ALL if kind == "Q4_0" else None
    yield _counted(part, f"{kind}: scales equal", found.same_scales, found.blocks, same_rule)
    yield _counted(part, f"{kind}: codes equal", found.codes - found.different_codes, found.codes, None, RULES[kind])
    if kind == "Q4_0" and found.different_codes:
        yield _counted(part, f"{kind}: codes that differ, edgeq's as near", found.nearer, found.different_codes, ALL)
    errors = (found.first_error,), (found.second_error,)
    what = f"{kind}: squared error of the weights"
    yield Row(part=part, what=what, unit="", edgeq=errors[0], peer=errors[1], goal=NO_WORSE)


def _counted(part: str, what: str, edgeq: int, peer: int, goal: Goal | None, note: str = "") -> Row:
    return Row(part=part, what=what, unit="count", edgeq=(edgeq,), peer=(peer,), goal=goal, note=note)


def _kl(found: Sequence[Losses]) -> tuple[float, ...]:
    """Mean of each window."""
    return tuple(float(np.mean(each.kl)) for each in found)


def _edgeq(checkpoint: Checkpoint, recipe: str, scratch: Path) -> Path:
    out = scratch / recipe
    out.mkdir()
    write(checkpoint, recipe, out)
    return out / files.MODEL


def _peer(source: Path, out: Path, kind: str, table: str = "Q8_0") -> Path:
    out.mkdir()
    quantize(str(source), str(out / files.MODEL), kind, table, physical_cores())
    return out / files.MODEL
