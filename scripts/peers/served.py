"""One side's model in a process of its own, asked over stdin and stdout, so that only one side works at a time."""

from __future__ import annotations

import json
import subprocess
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from edgeq.profiles import Phase
from edgeq.profiling import memory
from peers.base import Unavailable, reason


class Served:
    """A child that has loaded a model; raises Unavailable with its last words when it fails."""

    def __init__(self, command: Sequence[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as the child is)
        self._process = subprocess.Popen(
            command, env=environment, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, text=True
        )
        self.peak = memory.NOTHING
        sizes = self._answer()
        self.weights_bytes: int = sizes["weights_bytes"]
        self.read_bytes: int = sizes["read_bytes"]

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """End the child."""
        if self._process.stdin and self._process.stdout:
            self._process.stdin.close()
            self._process.stdout.close()
        self._process.wait()
        self._log.close()

    def logits(self, windows: Path, scratch: Path) -> NDArray[np.float32]:
        """Logits [windows, length, vocabulary] of token windows in a file."""
        found = scratch / "logits.npy"
        self._ask(windows=str(windows), logits=str(found))
        logits: NDArray[np.float32] = np.load(found)
        found.unlink()
        return logits

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Seconds from the start of the prompt until each token of its continuation."""
        found: list[float] = self._ask(ids=list(ids), tokens=tokens)["moments"]
        return found

    def _ask(self, **request: object) -> dict[str, Any]:
        assert self._process.stdin
        try:
            print(json.dumps(request), file=self._process.stdin, flush=True)
        except BrokenPipeError:
            raise self._failed() from None
        return self._answer()

    def _answer(self) -> dict[str, Any]:
        assert self._process.stdout
        line = self._process.stdout.readline()
        if not line:
            raise self._failed()
        self.peak = self._sampled()
        answer: dict[str, Any] = json.loads(line)
        return answer

    def _sampled(self) -> Phase:
        return memory.highest(self.peak, memory.read(Path("/proc", str(self._process.pid))))

    def _failed(self) -> Unavailable:
        code = self._process.wait()
        self._log.seek(0)
        said = self._log.read().decode(errors="replace")
        return Unavailable(f"exit code {code}: {reason(said)}")
