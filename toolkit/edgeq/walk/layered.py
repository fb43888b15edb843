"""A checkpoint as transformers' own layers in float32, one of them in memory at a time."""

from __future__ import annotations

import contextlib
import ctypes
import threading
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from edgeq import transformer
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.machine import physical_cores
from edgeq.size import is_quantized

Item = TypeVar("Item")
Result = TypeVar("Result")


class Layered:
    """Layers of a checkpoint; what is not loaded is on the meta device.

    matrices: values of those that recipes quantize, by name; the checkpoint's own without.

    Windows are run in threads of one core each, so that no result depends on how many cores there are.
    """

    def __init__(self, checkpoint: Checkpoint, matrices: Callable[[str], NDArray[np.float32]] | None = None) -> None:
        self.checkpoint, self._matrices = checkpoint, matrices
        self._model = transformer.instantiate(checkpoint, lambda _: False)
        self._layers = list(self._model.model.layers)
        self._calls: dict[int, list[dict[str, Any]]] = {}
        self._recording = threading.Lock()
        self._pool = ThreadPoolExecutor(physical_cores(), initializer=_one_thread)

    def close(self) -> None:
        """End the threads."""
        self._pool.shutdown()

    @property
    def count(self) -> int:
        """Number of layers."""
        return len(self._layers)

    @property
    def rotated_pairs(self) -> int:
        """Pairs of a head's channels that turn with the position."""
        return len(self._model.model.rotary_emb.inv_freq)

    @contextmanager
    def layer(self, index: int) -> Iterator[Any]:
        """One layer (torch.nn.Module) with its weights, as long as the block lasts."""
        import torch

        def read(name: str) -> Any:
            values = self._matrices if self._matrices and is_quantized(name) else self.checkpoint.tensor
            return torch.from_numpy(values(name))

        module, prefix = self._layers[index], f"model.layers.{index}."
        names = [name for name in self.checkpoint.model.tensors() if name.startswith(prefix)]
        for name, values in zip(names, self.parallel(read, names), strict=True):
            _assign(module, name.removeprefix(prefix), values)
        try:
            yield module
        finally:
            module.to_empty(device="meta")

    def matrices(self, index: int) -> list[str]:
        """Names of a layer's matrices that recipes quantize, as the checkpoint has them."""
        prefix = f"model.layers.{index}."
        return [name for name in self.checkpoint.model.tensors() if name.startswith(prefix) and is_quantized(name)]

    def linear(self, name: str) -> Any:
        """The module (torch.nn.Linear) that holds a matrix."""
        return self._model.get_submodule(name.removesuffix(".weight"))

    def replace(self, name: str, values: NDArray[np.float32]) -> None:
        """Put other values into a matrix of a loaded layer."""
        import torch

        _assign(self.linear(name), "weight", torch.from_numpy(values))

    def run(self, index: int, hidden: Any) -> Any:
        """Output of a loaded layer for one window, both tensors [length, hidden]."""
        found = self._layers[index](hidden[None], **self._arguments(len(hidden))[index])
        return (found[0] if isinstance(found, tuple) else found)[0]

    def advance(self, index: int, states: NDArray[np.float32]) -> None:
        """Replace hidden states [windows, length, hidden] by what a loaded layer makes of them."""
        import torch

        def step(window: int) -> None:
            states[window] = self.run(index, torch.from_numpy(states[window])).numpy()

        self.parallel(step, range(len(states)))

    def through(self, states: NDArray[np.float32], phase: str, progress: Progress) -> None:
        """Replace hidden states [windows, length, hidden] before the first layer by those after the last one."""
        for index in range(self.count):
            progress(phase, index, self.count)
            with self.layer(index):
                self.advance(index, states)
        progress(phase, self.count, self.count)

    def final_norm(self, hidden: Any) -> Any:
        """Hidden states [length, hidden] after the last layer as the output layer reads them."""
        import torch

        norm = self._model.model.norm
        _assign(norm, "weight", torch.from_numpy(self.checkpoint.tensor("model.norm.weight")))
        return norm(hidden)

    def parallel(self, call: Callable[[Item], Result], items: Sequence[Item]) -> list[Result]:
        """Results of a call for each item, without gradients."""
        import torch

        def quietly(item: Item) -> Result:
            with torch.no_grad():
                return call(item)

        return list(self._pool.map(quietly, items))

    def _arguments(self, length: int) -> list[dict[str, Any]]:
        """What transformers passes to each layer beside the hidden states of a window of that length."""
        with self._recording:
            if length not in self._calls:
                self._calls[length] = self._recorded(length)
        return self._calls[length]

    def _recorded(self, length: int) -> list[dict[str, Any]]:
        import torch

        inner, found = self._model.model, list[dict[str, Any]]()

        def record(hidden: Any, **arguments: Any) -> Any:
            found.append(arguments)
            return hidden

        norm, inner.norm = inner.norm, torch.nn.Identity()
        for layer in self._layers:
            layer.forward = record
        with torch.no_grad():
            inner(inputs_embeds=torch.zeros(1, length, self.checkpoint.model.hidden), use_cache=False)
        for layer in self._layers:
            del layer.forward
        inner.norm = norm
        return found


def give_back() -> None:
    """Return what the process freed to the system, as far as the C library can (glibc)."""
    with contextlib.suppress(AttributeError, OSError):
        ctypes.CDLL(None).malloc_trim(0)


def _assign(module: Any, name: str, value: Any) -> None:
    import torch

    owner, _, leaf = name.rpartition(".")
    setattr(module.get_submodule(owner), leaf, torch.nn.Parameter(value, requires_grad=False))


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)
