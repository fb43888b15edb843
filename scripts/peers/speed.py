"""How fast each side decodes and reads a prompt, at its best settings: true shapes, the same threads, in turns."""

from __future__ import annotations

import contextlib
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgeq.checkpoint import Checkpoint
from edgeq.machine import physical_cores
from peers import bandwidth, figures
from peers.base import Side, Unavailable
from peers.figures import Goal, Row
from peers.llamacpp import files
from peers.served import Served
from peers.serving import AS_RUN

PROMPT, TOKENS, SHORT = 512, 64, 16
DECODE, PREFILL, SHARE = (Goal("ratio", "at least", limit) for limit in (1.3, 1.0, 0.7))


class Speed(msgspec.Struct, frozen=True, kw_only=True):
    """One side: tokens per second of each round, bytes of weights and of memory, share of the read bandwidth.

    `bandwidth` is the best that was measured, `bandwidths` has each round's, for other tenants of a shared machine slow
    reading and decoding alike; an old file has none. `peak_rss_bytes` is the kernel's own peak, `anonymous_bytes` the
    highest that was seen between requests. Without rounds, the reason.
    """

    model: str
    side: str
    words: tuple[str, ...]
    decode: tuple[float, ...] = ()
    prefill: tuple[float, ...] = ()
    weights_bytes: int | None = None
    read_bytes: int | None = None
    peak_rss_bytes: int | None = None
    anonymous_bytes: int | None = None
    bandwidth: float | None = None
    bandwidths: tuple[float, ...] = ()
    load: tuple[float, ...] = ()
    reason: str = ""

    @property
    def share(self) -> float:
        """Share of the read bandwidth that decoding reaches with the weights that a token reads."""
        limits = self.bandwidths or (self.bandwidth or np.nan,) * len(self.decode)
        return float(np.median(np.divide(self.decode, limits))) * (self.read_bytes or 0)


def measure(sides: Sequence[Side], checkpoint: Checkpoint, model: str, folder: Path, rounds: int) -> Iterator[Speed]:
    """Speeds of all sides, each in a process of its own, all loaded, one at work at a time; the first takes turns."""
    random = np.random.default_rng(0)
    prompt = random.integers(0, 256, PROMPT).tolist()
    short = prompt[:SHORT]
    with contextlib.ExitStack() as stack:
        scratch = Path(stack.enter_context(files.scratch(folder)))
        np.save(scratch / "calibration.npy", random.integers(0, 256, (8, 512)).astype(np.int32))
        served: dict[Side, Served] = {}
        for number, side in enumerate(sides):
            print(f"bench_peers: {model}, {side}: making", file=sys.stderr)
            out = scratch / str(number)
            out.mkdir()
            try:
                side.make(checkpoint.folder, scratch / "calibration.npy", out)
                served[side] = stack.enter_context(Served(side.run(out, AS_RUN), side.environment()))
                served[side].moments(short, 2)
            except Unavailable as missing:
                served.pop(side, None)
                yield Speed(model=model, side=str(side), words=side.words, reason=str(missing))
        limits: list[float] = []
        samples: dict[Side, list[tuple[float, float]]] = {side: [] for side in served}
        load = []
        order = list(served)
        for turn in range(rounds):
            print(f"bench_peers: {model}, round {turn + 1} of {rounds}", file=sys.stderr)
            load.append(os.getloadavg()[0])
            limits.append(bandwidth.measure(physical_cores()))
            for side in tuple(order):
                child = served[side]
                try:
                    samples[side].append(speeds(child.moments(prompt, 1), child.moments(short, TOKENS + 1)))
                except Unavailable as missing:
                    order.remove(side)
                    del served[side]
                    yield Speed(model=model, side=str(side), words=side.words, reason=str(missing))
            order = [*order[1:], *order[:1]]
        for side, child in served.items():
            prefill, decode = zip(*samples[side], strict=True)
            yield Speed(
                model=model,
                side=str(side),
                words=side.words,
                decode=decode,
                prefill=prefill,
                weights_bytes=child.weights_bytes,
                read_bytes=child.read_bytes,
                peak_rss_bytes=child.peak.rss_bytes,
                anonymous_bytes=child.peak.anonymous_bytes,
                bandwidth=max(limits),
                bandwidths=tuple(limits),
                load=tuple(load),
            )


def speeds(prompt: Sequence[float], continuation: Sequence[float]) -> tuple[float, float]:
    """Tokens per second of a prompt whose first token came when it did, and of a continuation after its first token."""
    return PROMPT / prompt[0], (len(continuation) - 1) / (continuation[-1] - continuation[0])


def goals(found: Sequence[Speed]) -> Iterator[Row]:
    """Each of edgeq's sides against the fastest peer, and its share of the bandwidth."""
    peers = [each for each in found if each.decode and not each.side.startswith("edgeq ")]
    for ours in (each for each in found if each.decode and each.side.startswith("edgeq ")):
        part = f"speed {ours.model} {ours.side}"
        for what, goal in (("decode", DECODE), ("prefill", PREFILL)):
            if peers:
                best = max(peers, key=lambda each: figures.median(getattr(each, what)))
                yield Row(
                    part=part,
                    what=f"{what} against {best.side}",
                    unit="tok/s",
                    edgeq=getattr(ours, what),
                    peer=getattr(best, what),
                    goal=goal,
                    load=ours.load,
                )
        limits = ours.bandwidths or (ours.bandwidth or np.nan,) * len(ours.decode)
        reading = tuple(speed * (ours.read_bytes or 0) for speed in ours.decode)
        note = "the peer is the machine's own read bandwidth"
        yield Row(
            part=part,
            what="bytes read by decoding, per second",
            unit="B",
            edgeq=reading,
            peer=limits,
            goal=SHARE,
            load=ours.load,
            note=note,
        )
