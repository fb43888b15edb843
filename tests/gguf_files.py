"""Read GGUF files with gguf's own reader, for tests."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np

from edgeq.backends.llamacpp import gguf, tensors
from edgeq.model import Model


def reader(folder: Path) -> Any:
    """gguf's reader of the file in a folder."""
    from gguf import GGUFReader

    return GGUFReader(folder / gguf.MODEL)


def dequantized(found: Any) -> dict[str, np.ndarray]:
    """Every tensor of a file as float32, in the shape of the checkpoint."""
    from gguf import dequantize

    return {each.name: dequantize(each.data, each.tensor_type) for each in found.tensors}


def in_file_order(model: Model, name: str, values: np.ndarray) -> np.ndarray:
    """A checkpoint's matrix with rows and columns in the order of the file."""
    rows = np.concatenate([np.arange(*run) for run in tensors.row_runs(model, name)])
    order = tensors.columns(model, name)
    found: np.ndarray = values[rows] if order is None else values[rows][:, order]
    return found
