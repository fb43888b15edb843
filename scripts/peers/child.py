"""What one command costs: wall and processor time, and peak memory, in a process of its own."""

from __future__ import annotations

import os
import subprocess
import tempfile
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

import msgspec

from edgeq.profiling import memory

INTERVAL_S = 0.02


class Cost(msgspec.Struct, frozen=True):
    """Time and memory of a command, or of several that ran one after the other; `load` is the load average before.

    The kernel keeps the peak of resident memory, but none of anonymous memory (what no file backs): that is the highest
    of samples every 20 ms.
    """

    wall_s: float
    cpu_s: float
    peak_rss_bytes: int
    peak_anonymous_bytes: int
    load: float


def run(command: Sequence[str], environment: Mapping[str, str]) -> Cost:
    """Run a command to its end; raises RuntimeError with the end of its output when it fails. Linux only."""
    load = os.getloadavg()[0]
    with tempfile.TemporaryFile() as log:
        started = time.perf_counter()
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=subprocess.STDOUT)
        peak = memory.NOTHING
        ended = 0
        while not ended:
            peak = memory.highest(peak, memory.read(Path("/proc", str(process.pid))))
            time.sleep(INTERVAL_S)
            ended, status, usage = os.wait4(process.pid, os.WNOHANG)
        wall_s = time.perf_counter() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        if process.returncode:
            log.seek(0)
            said = log.read().decode(errors="replace").strip()
            raise RuntimeError(f"{' '.join(command)}: exit code {process.returncode}\n{said[-2000:]}")
    cpu_s = usage.ru_utime + usage.ru_stime
    return Cost(wall_s, cpu_s, peak.rss_bytes or 0, peak.anonymous_bytes or 0, load)


def one_after_the_other(costs: Sequence[Cost]) -> Cost:
    """Cost of commands that ran in turn: times add up, peaks do not."""
    return Cost(
        wall_s=sum(cost.wall_s for cost in costs),
        cpu_s=sum(cost.cpu_s for cost in costs),
        peak_rss_bytes=max(cost.peak_rss_bytes for cost in costs),
        peak_anonymous_bytes=max(cost.peak_anonymous_bytes for cost in costs),
        load=max(cost.load for cost in costs),
    )
