"""One measurement in a process of its own, while this one sleeps in a read: polling would slow what is measured."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import tempfile
import threading
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import IO, TypeVar

import msgspec

from edgeq import errors
from edgeq.errors import BackendFault, BackendKilled, EdgeqError
from edgeq.profiling import messages

Progress = Callable[[str, int, int], None]
Result = TypeVar("Result", messages.Cold, messages.First, messages.Speed, messages.Loss)
_COMMAND = (sys.executable, "-P", "-m", "edgeq.profiling.child")
_QUIET = {"ORT_DISABLE_TELEMETRY": "1"}
_AS_IT_IS: Mapping[str, str] = MappingProxyType({})
_LONGEST_LINE = 300
_VERIFY = "edgeq verify BUNDLE"
_MIB = 1 << 20


@dataclass(frozen=True)
class Children:
    """Runs jobs; `memory_bytes` is the machine's, for the message when a child is killed."""

    progress: Progress
    memory_bytes: int | None
    timeout_s: float

    def run(self, job: messages.Job, kind: type[Result], environment: Mapping[str, str] = _AS_IT_IS) -> Result:
        """Answer of a child that does the job, with some environment variables of its own.

        Raises the child's own EdgeqError again; BackendFault when it fails or says nothing, BackendKilled when a
        signal or the time limit ends it.
        """
        expired = threading.Event()
        with (
            tempfile.TemporaryFile() as noise,
            subprocess.Popen(
                _COMMAND,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=noise,
                env={**os.environ, **_QUIET, **environment},
            ) as child,
        ):
            limit = threading.Timer(self.timeout_s, _stop, (child, expired))
            limit.start()
            try:
                answer, peak = _listen(child, job, self.progress)
                child.wait()
            finally:
                limit.cancel()
                child.kill()
            last = _last_line(noise)
        if isinstance(answer, kind):
            return answer
        if isinstance(answer, messages.Fault):
            raise _again(answer)
        if expired.is_set():
            why = self._known(peak)
            raise BackendKilled(f"the backend was stopped after {self.timeout_s:g} s", why=why, run="fewer repetitions")
        if child.returncode < 0:
            what = f"the backend was killed by {_signal(-child.returncode)}"
            raise BackendKilled(what, why=self._known(peak), run="fewer bits per weight or a shorter --context")
        raise BackendFault(f"the backend ended with exit code {child.returncode} and no result", why=last, run=_VERIFY)

    def _known(self, peak: int | None) -> str:
        """What is known of the memory of a child that was killed."""
        known = f"Peak memory before that: {peak // _MIB} MiB" if peak else "Its peak memory is not known"
        return known + (f", the machine has {self.memory_bytes // _MIB} MiB." if self.memory_bytes else ".")


def _stop(child: subprocess.Popen[bytes], expired: threading.Event) -> None:
    expired.set()
    child.kill()


def _listen(
    child: subprocess.Popen[bytes], job: messages.Job, progress: Progress
) -> tuple[messages.Answer | None, int | None]:
    assert child.stdin is not None
    assert child.stdout is not None
    with contextlib.suppress(BrokenPipeError):
        child.stdin.write(msgspec.json.encode(job))
    with contextlib.suppress(BrokenPipeError):
        child.stdin.close()
    answer, peak = None, None
    for line in child.stdout:
        try:
            message = msgspec.json.decode(line, type=messages.Answer | messages.Progress)
        except msgspec.DecodeError:
            continue
        if isinstance(message, messages.Progress):
            peak = message.peak_rss_bytes
            progress(message.label, message.done, message.total)
        else:
            answer = message
    return answer, peak


def _again(fault: messages.Fault) -> EdgeqError:
    kind = getattr(errors, fault.kind, BackendFault)
    return kind(fault.what, why=fault.why, run=fault.run)


def _signal(number: int) -> str:
    try:
        return signal.Signals(number).name
    except ValueError:
        return f"signal {number}"


def _last_line(noise: IO[bytes]) -> str:
    noise.seek(max(0, noise.seek(0, os.SEEK_END) - _LONGEST_LINE))
    lines = noise.read().decode(errors="replace").strip().splitlines()
    return lines[-1] if lines else ""
