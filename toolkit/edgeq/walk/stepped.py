"""Values that change in steps, kept where a walk may be stopped."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.walk import scratch


class Stepped:
    """Float32 values in two files of a folder in turn: a step that is stopped leaves what the ones before it made.

    shape: of the values; begin: those before the first step, if none were kept. values: those after `done` steps, which
    only a step may change. Raises CorruptInput when what was kept cannot be read.
    """

    def __init__(
        self, folder: Path, name: str, shape: tuple[int, ...], begin: Callable[[], NDArray[np.float32]]
    ) -> None:
        self._folder, self._name, self.done = folder, name, 0
        if not self._marker.is_file():
            self.values = scratch.copied(self._path(0), begin())
            scratch.mark(self._marker, 0)
            return
        try:
            self.done = int(self._marker.read_text())
            values: NDArray[np.float32] = np.load(self._path(self.done), mmap_mode="c")
            self.values = values.reshape(shape)
        except (ValueError, TypeError, EOFError, FileNotFoundError) as error:
            raise scratch.damaged(folder, str(error)) from error

    @contextmanager
    def step(self) -> Iterator[NDArray[np.float32]]:
        """The values, to be changed; they are kept when the block ends well."""
        values = scratch.copied(self._path(self.done + 1), self.values)
        yield values
        values.flush()  # type: ignore[attr-defined]
        self.done += 1
        scratch.mark(self._marker, self.done)
        self.values = values

    @property
    def _marker(self) -> Path:
        return self._folder / f"{self._name}.json"

    def _path(self, step: int) -> Path:
        return self._folder / f"{self._name}.{step % 2}.npy"
