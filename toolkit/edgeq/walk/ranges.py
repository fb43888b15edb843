"""What an 8-bit cache has to hold: the largest keys and values of the float model, a layer at a time."""

from __future__ import annotations

import threading
from collections.abc import Callable
from contextlib import closing
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import CacheRanges, Progress
from edgeq.checkpoint import Checkpoint
from edgeq.walk import head
from edgeq.walk.layered import Layered


def cache_ranges(checkpoint: Checkpoint, windows: NDArray[np.int32], progress: Progress) -> CacheRanges:
    """Ranges over token windows [count, length], layers with attention first to last.

    Keys are read before they are rotated: a rotation leaves the length of a pair of channels as it is, so that length
    bounds both channels at every position, those beyond the windows too.
    """
    shape = checkpoint.model
    keys: list[_Largest] = []
    values: list[_Largest] = []
    with closing(Layered(checkpoint)) as model:
        states = head.embed(head.exact(checkpoint, head.TABLE), windows)
        for index, kind in enumerate(shape.layer_types):
            progress("calibrate cache", index, model.count)
            with model.layer(index) as layer:
                if kind == "full_attention":
                    attention, heads = layer.self_attn, (shape.kv_heads, shape.head_dim)
                    key = getattr(attention, "k_norm", attention.k_proj)
                    keys.append(_Largest(key, heads, lambda found: _lengths(found, model.rotated_pairs)))
                    values.append(_Largest(attention.v_proj, heads, abs))
                model.advance(index, states)
        progress("calibrate cache", model.count, model.count)
    return CacheRanges(*(np.array([each.found for each in seen], np.float32) for seen in (keys, values)))


class _Largest:
    """The largest magnitudes [heads, size] among all that a module (torch.nn.Module) puts out, in whatever thread."""

    def __init__(self, module: Any, heads: tuple[int, int], magnitude: Callable[[Any], Any]) -> None:
        self.found = np.zeros(heads, np.float32)
        self._magnitude = magnitude
        self._lock = threading.Lock()
        module.register_forward_hook(self._see)

    def _see(self, _module: Any, _inputs: Any, output: Any) -> None:
        largest = self._magnitude(output.reshape(-1, *self.found.shape)).amax(0).numpy()
        with self._lock:
            np.maximum(self.found, largest, out=self.found)


def _lengths(keys: Any, pairs: int) -> Any:
    """Magnitudes [tokens, heads, size] after any rotation: channels i and i + pairs turn together, others stay."""
    import torch

    first, second, still = keys.tensor_split((pairs, 2 * pairs), dim=-1)
    length = first.hypot(second)
    return torch.cat([length, length, still.abs()], dim=-1)
