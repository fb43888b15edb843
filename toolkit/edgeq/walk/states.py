"""Hidden states of both models between two layers, and how they are kept where a walk may be stopped."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import CorruptInput
from edgeq.walk import scratch

_LAYER = "states.json"
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

    def copied(self, folder: Path) -> States:
        """The same states in files of a folder, where a layer may change them; what `save` kept stays as it is."""
        paths = _paths(folder, self.layer + 1)
        return States(self.layer, **{name: scratch.copied(path, getattr(self, name)) for name, path in paths.items()})

    def save(self, folder: Path) -> None:
        """Keep states that were copied into the folder and moved one layer on, in one step."""
        for name in _paths(folder, self.layer):
            getattr(self, name).flush()
        scratch.mark(folder / _LAYER, self.layer)

    @classmethod
    def load(cls, folder: Path) -> States | None:
        """States that `save` kept, None where there are none; raises CorruptInput when they cannot be read."""
        if not (folder / _LAYER).is_file():
            return None
        try:
            layer = int((folder / _LAYER).read_text())
            return cls(layer, **{name: np.load(path, mmap_mode="c") for name, path in _paths(folder, layer).items()})
        except (ValueError, TypeError, EOFError, FileNotFoundError) as error:
            raise CorruptInput(
                f"{folder}: not the states that a walk kept",
                why=str(error),
                run="edgeq build ... again, from the start",
            ) from error


def _paths(folder: Path, layer: int) -> dict[str, Path]:
    """Files of the states before a layer, which those before its neighbours leave alone."""
    names = ("exact_held", "quantized_held", "exact_calibration", "quantized_calibration")
    return {name: folder / f"{name}.{layer % 2}.npy" for name in names}
