"""Overhead of edgeq's session: its decoding against the smallest loop over llama.cpp's own interface."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from edgeq.backends.llamacpp.session import LlamaSession
from edgeq.checkpoint import Checkpoint
from peers.figures import Goal, Row
from peers.llamacpp import files
from peers.llamacpp.program import greedy
from peers.llamacpp.programs.edgeq_write import write

DEMO = "demo-qwen3"
RECIPE = "w4g32-e8-rtn"
PROMPT, TOKENS, CONTEXT = tuple(range(40, 56)), 24, 256
OVERHEAD = Goal("ratio", "at least", 0.99)


def rows(checkpoint: Checkpoint, name: str, folder: Path, rounds: int, goal: Goal | None) -> Iterator[Row]:
    """Decoding speed of both loops in turns, and the processor time of a token, in one model and one context.

    So nothing but the loop differs: not the weights' place in memory, nor threads, nor the cache.
    """
    with files.scratch(folder) as scratch:
        write(checkpoint, RECIPE, scratch)
        session = LlamaSession(scratch, files.described(checkpoint.model.config(), CONTEXT, RECIPE))
        try:
            yield from compare(session, name, rounds, goal)
        finally:
            session.close()


def compare(session: LlamaSession, name: str, rounds: int, goal: Goal | None) -> Iterator[Row]:
    """Rows of a loaded session; raises RuntimeError when the two loops decode different tokens."""
    import llama_cpp

    sampler = llama_cpp.llama_sampler_init_greedy()
    loops: list[Callable[[], Iterator[int]]] = [
        lambda: session.generate(PROMPT, TOKENS),
        lambda: greedy(session._context, sampler, PROMPT, TOKENS),
    ]
    expected, found = (list(loop()) for loop in loops)
    if expected != found:
        raise RuntimeError(f"edgeq decoded {expected}, llama.cpp's own loop {found}")
    samples: list[list[tuple[float, float]]] = [[], []]
    load = []
    print(f"bench_peers: {name}, {rounds} rounds of decoding", file=sys.stderr)
    for turn in range(rounds):
        load.append(os.getloadavg()[0])
        for side in (0, 1) if turn % 2 else (1, 0):
            samples[side].append(timed(loops[side]()))
    llama_cpp.llama_sampler_free(sampler)
    (wall, cpu), (peer_wall, peer_cpu) = (tuple(zip(*side, strict=True)) for side in samples)
    part = f"decoding {name} {RECIPE}"
    speeds, peer_speeds = (tuple(1 / each for each in side) for side in (wall, peer_wall))
    yield Row(part=part, what="speed", unit="tok/s", edgeq=speeds, peer=peer_speeds, goal=goal, load=tuple(load))
    yield Row(part=part, what="processor time of a token", unit="s", edgeq=cpu, peer=peer_cpu, load=tuple(load))


def timed(tokens: Iterator[int]) -> tuple[float, float]:
    """Wall and processor seconds of a token, the first left out."""
    next(tokens)
    wall, cpu = time.perf_counter(), time.process_time()
    count = sum(1 for _ in tokens)
    return (time.perf_counter() - wall) / count, (time.process_time() - cpu) / count
