"""Hidden states of both models between two layers, and how they are kept where a walk may be stopped."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

_FILE = "states.npz"
Hidden = NDArray[np.float32]


@dataclass
class States:
    """Hidden states [windows, length, hidden] before layer `layer`, of the float model and of the quantized one.

    held: of the text that the loss is measured on; calibration: of the text that matrices are fitted to, empty without.
    """

    layer: int
    exact_held: Hidden
    quantized_held: Hidden
    exact_calibration: Hidden
    quantized_calibration: Hidden

    def save(self, folder: Path) -> None:
        """Keep the states in a folder, in one step."""
        partial = folder / f"{_FILE}.{os.getpid()}.partial"
        with partial.open("wb") as stream:
            np.savez(stream, **vars(self))
        partial.replace(folder / _FILE)

    @classmethod
    def load(cls, folder: Path) -> States | None:
        """States that `save` kept, None where there are none."""
        if not (folder / _FILE).is_file():
            return None
        with np.load(folder / _FILE, allow_pickle=False) as arrays:
            return cls(layer=int(arrays["layer"]), **{name: arrays[name] for name in arrays.files if name != "layer"})
