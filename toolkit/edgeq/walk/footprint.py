"""How much memory a walk takes, from shapes alone."""

from __future__ import annotations

import math
import sys

from edgeq.errors import OutOfMemory
from edgeq.machine import physical_cores, this_machine
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.size import TABLES, is_quantized
from edgeq.walk.layers import PIECE
from edgeq.walk.moments import AT_ONCE
from edgeq.walk.run import LOGITS
from edgeq.walk.windows import Held

_LIBRARY_BYTES = 700_000_000  # torch, transformers and ONNX Runtime, as measured
_FLOAT = 4
_ARRAYS, _WINDOW = 8, 512  # temporaries of a thread that solves; tokens of a calibration window


def predict(model: Model, held: Held, recipe: Recipe | None, tokens: int = 0) -> int:
    """Bytes of anonymous memory at the peak of a walk over held-out windows and `tokens` of calibration.

    recipe: None for the float model alone. Hidden states are held throughout; beside them, what is larger of a layer
    with what solving it takes, and the ends of the model: logits of some windows and the table's codes. Solving takes
    the second moments of the widest input, their factor, for a guided recipe those with the float model's input and a
    second layer, what some windows read, the solved matrix, and room for each thread. Calibrating a cache takes less
    than the logits.
    """
    shapes = model.tensors()
    sizes: list[int] = [0] * model.layers
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            sizes[int(name.split(".")[2])] += math.prod(shape)
    layer = max(sizes)
    count, length = map(int, held.windows.shape)
    at_once = min(count, max(1, LOGITS // (length * model.vocab)))
    states = model.hidden * int(held.windows.size)
    logits: int = at_once * length * model.vocab
    if recipe is None:
        return int(_LIBRARY_BYTES + _FLOAT * (states + max(layer, 3 * logits)))
    table: int = max(math.prod(shapes[name]) for name in TABLES if name in shapes)
    ends = 4 * _FLOAT * logits + table * (2 if recipe.table.is_float else 1)
    states *= 2
    if recipe.calibrated:
        sides = 2 if recipe.guided else 1
        matrices = [shape for name, shape in shapes.items() if is_quantized(name) and name not in TABLES]
        inputs = max(shape[1] for shape in matrices)
        states += sides * model.hidden * tokens
        layer = sides * (layer + AT_ONCE * _WINDOW * inputs) + max(map(math.prod, matrices))
        layer += (1 + sides) * inputs * inputs + _ARRAYS * physical_cores() * PIECE
    if recipe.guided:
        ends = max(ends, 3 * _FLOAT * min(tokens, _WINDOW) * model.vocab)
    return int(_LIBRARY_BYTES + _FLOAT * states + max(_FLOAT * layer, ends))


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
