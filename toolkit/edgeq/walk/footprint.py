"""How much memory a walk takes, from shapes alone."""

from __future__ import annotations

import math
import sys

from edgeq.errors import OutOfMemory
from edgeq.machine import physical_cores, this_machine
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.size import TABLES, is_quantized
from edgeq.walk.run import LOGITS
from edgeq.walk.windows import Held

_LIBRARY_BYTES = 700_000_000  # torch, transformers and ONNX Runtime, as measured
_FLOAT = 4
_ROWS = 1024


def predict(model: Model, held: Held, recipe: Recipe | None, tokens: int = 0) -> int:
    """Bytes of anonymous memory at the peak of a walk over held-out windows and `tokens` of calibration.

    recipe: None for the float model alone. Counted are one layer of each model, hidden states, the table's codes, the
    logits of some windows, and for a calibrated recipe the second moments of the widest input: as they are, crossed
    with the float model's, their factor, and what factoring takes. Calibrating a cache takes less than the logits.
    """
    shapes = model.tensors()
    layers: list[int] = [0] * model.layers
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            layers[int(name.split(".")[2])] += math.prod(shape)
    table: int = max(math.prod(shapes[name]) for name in TABLES if name in shapes)
    models = 1 if recipe is None else 2
    total: int = _LIBRARY_BYTES + _FLOAT * models * (max(layers) + model.hidden * int(held.windows.size))
    ends: int = _FLOAT * (2 + models) * max(LOGITS, held.windows.shape[1] * model.vocab)
    if recipe is None:
        return total + ends
    ends += 2 * table if recipe.table.is_float else table
    if not recipe.calibrated:
        return total + ends
    inputs = max(shape[1] for name, shape in shapes.items() if is_quantized(name) and name not in TABLES)
    sides = 2 if recipe.guided else 1
    solving: int = _FLOAT * inputs * ((3 + sides) * inputs + 8 * physical_cores() * _ROWS)
    return total + _FLOAT * sides * model.hidden * tokens + max(solving, ends)


def require(model: Model, held: Held, recipe: Recipe | None, tokens: int = 0) -> None:
    """Raise OutOfMemory, with the prediction, when a walk would not fit this machine's memory."""
    import psutil

    needed = predict(model, held, recipe, tokens)
    available = min(psutil.virtual_memory().available, this_machine().memory_bytes or sys.maxsize)
    if needed > available:
        raise OutOfMemory(
            f"comparing with the float32 model needs about {needed / 1e9:.1f} GB of memory, "
            f"{available / 1e9:.1f} GB are free",
            why="A layer of the checkpoint, its table and the states of the texts are held in float32.",
            run="close other programs, or use a machine with more memory; a bundle itself runs without torch",
        )
