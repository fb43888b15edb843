"""Solutions in a folder, one file each, so that a walk that was stopped goes on and engines read what it found."""

from __future__ import annotations

import os
import zipfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput
from edgeq.quantize import ggml
from edgeq.quantize.solution import BlockSolution, Solution
from edgeq.quantize.solve import as_float, part, solve
from edgeq.recipe import Layout, Recipe
from edgeq.size import layout_of

Rows = Callable[[slice | NDArray[np.intp]], NDArray[np.float32]]


class Solutions:
    """Quantized matrices by name: read where they were kept, else solved by the recipe's method without calibration."""

    def __init__(self, checkpoint: Checkpoint, recipe: Recipe, folder: Path | None = None) -> None:
        self._checkpoint, self._recipe, self.folder = checkpoint, recipe, folder

    def __call__(self, name: str) -> Solution | BlockSolution:
        """Solution of one matrix; raises CorruptInput when the kept file is damaged, and what solving raises."""
        path = self._path(name)
        walked = self._recipe.calibrated and name.startswith("model.layers.")
        if path is None or not (path.is_file() or walked):
            return solve(self._checkpoint, self._recipe, name)
        layout = layout_of(self._checkpoint.model, self._recipe, name)
        try:
            with zipfile.ZipFile(path) as file:
                return _read(file, layout, name, outputs=self._checkpoint.model.tensors()[name][0])
        except (ValueError, KeyError, EOFError, FileNotFoundError, zipfile.BadZipFile, zlib.error) as error:
            raise CorruptInput(
                f"{path}: not a solution that was kept", why=str(error), run="edgeq build ... again, from the start"
            ) from error

    def within(self, folder: Path) -> Solutions:
        """Solutions of the same matrices that are kept in another folder."""
        return Solutions(self._checkpoint, self._recipe, folder)

    def values(self, name: str) -> NDArray[np.float32]:
        """What the recipe makes of one matrix, float32 [outputs, inputs]."""
        return self.rows(name)(slice(None))

    def rows(self, name: str) -> Rows:
        """Function from a slice, or from row numbers, to these rows of what the recipe makes of a matrix."""
        if layout_of(self._checkpoint.model, self._recipe, name).is_float:
            stored = as_float(self._checkpoint, self._recipe, name, self._checkpoint.tensor(name))
            return lambda which: stored[which].astype(np.float32)
        solution = self(name)
        return lambda which: part(solution, which).dequantize()

    def keep(self, solution: Solution | BlockSolution) -> None:
        """Write one solution into the folder, in one step."""
        path = self._path(solution.name)
        assert path is not None
        partial = path.with_suffix(f".{os.getpid()}.partial")
        arrays: dict[str, NDArray[Any]]
        if isinstance(solution, BlockSolution):
            arrays = {"blocks": ggml.pack(solution)}
        else:
            codes, scales = _packed(solution.codes, solution.bits), solution.scales.astype(np.float16)
            arrays = {"codes": codes, "scales": scales, "zero_points": solution.zero_points}
        with zipfile.ZipFile(partial, "w") as file:
            for field, values in arrays.items():
                file.writestr(field, values.tobytes())
        partial.replace(path)

    def _path(self, name: str) -> Path | None:
        return None if self.folder is None else self.folder / f"{name}.zip"


def _read(file: zipfile.ZipFile, layout: Layout, name: str, outputs: int) -> Solution | BlockSolution:
    """The solution in a file of bytes alone.

    .npy headers are Python literals, which two threads of Python 3.11 cannot parse at once (SystemError: AST
    constructor recursion depth mismatch).
    """

    def rows(field: str, dtype: type = np.uint8) -> NDArray[Any]:
        return np.frombuffer(file.read(field), dtype).reshape(outputs, -1)

    if layout.is_ggml:
        return ggml.unpack(rows("blocks"), layout, name)
    codes, scales = _unpacked(rows("codes"), layout.bits), rows("scales", np.float16).astype(np.float32)
    return Solution(name, layout.bits, layout.group, codes, scales, rows("zero_points"))


def _packed(codes: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    """Two codes to a byte where they fit."""
    return codes if bits > 4 else codes[:, ::2] | codes[:, 1::2] << np.uint8(4)


def _unpacked(stored: NDArray[np.uint8], bits: int) -> NDArray[np.uint8]:
    if bits > 4:
        return stored
    return np.stack([stored & 15, stored >> 4], axis=2).reshape(len(stored), -1)
