"""How much memory a walk takes, and how much of a disk, from shapes alone."""

from __future__ import annotations

import math
import sys

from edgeq.errors import OutOfMemory
from edgeq.machine import physical_cores, this_machine
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.size import TABLES, is_quantized, layout_of
from edgeq.walk import tuning
from edgeq.walk.layers import PIECE
from edgeq.walk.moments import AT_ONCE
from edgeq.walk.run import LOGITS
from edgeq.walk.sensitivity import APART
from edgeq.walk.windows import SENSED, Held

_LIBRARY_BYTES = 700_000_000  # torch, transformers and ONNX Runtime, as measured
_FLOAT = 4
_SOLVED = (0.7, 1.2)  # bytes of a kept weight of up to 4 bits, and of one of more, with its scales
_ARRAYS, _WINDOW = 8, 512  # temporaries of a thread that solves; tokens of a calibration window
_GRAPH = 3  # attention's scores in a thread that goes backwards


def predict(model: Model, held: Held, recipe: Recipe | None, tokens: int = 0) -> int:
    """Bytes of anonymous memory at the peak of a walk over held-out windows and `tokens` of calibration.

    recipe: None for the float model alone. The largest of: a layer with what solving it takes, and the ends of the
    model, logits of some windows and the table's codes. Solving takes the second moments of the widest input, their
    factor, for a guided recipe what the layers before have lost, what some windows read, the solved matrix, and room
    for each thread; hidden states are in files then. Gradients of a guided recipe, or a mix, are held once while
    they are made from logits, and are in files while each thread goes back through a layer; a mix is measured with what
    all matrices of a layer read and write at one token of eight, and so are scales tuned, over a step's. Calibrating a
    cache takes less than the logits.
    """
    shapes = model.tensors()
    sizes, channels = [0] * model.layers, [0] * model.layers
    for name, shape in shapes.items():
        if name.startswith("model.layers."):
            index = int(name.split(".")[2])
            sizes[index] += math.prod(shape)
            channels[index] += sum(shape) if is_quantized(name) else 0
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
        matrices = [shape for name, shape in shapes.items() if is_quantized(name) and name not in TABLES]
        widest = max(inputs for _, inputs in matrices)
        solving = 2 * AT_ONCE * _WINDOW * widest + _ARRAYS * physical_cores() * PIECE
        solving += max(_solving(outputs, inputs, recipe.guided) for outputs, inputs in matrices)
        logits = 3 * min(tokens, _WINDOW) * model.vocab
        graphs = physical_cores() * _WINDOW * (max(channels) + _GRAPH * model.heads * _WINDOW)
        if recipe.guided:
            ends = max(ends, _FLOAT * max(model.hidden * tokens + logits, layer + graphs))
        if recipe.mixed:
            seen = SENSED * _WINDOW
            watched = seen // APART * max(channels)
            ends = max(ends, _FLOAT * max(seen * model.hidden + logits, layer + graphs + watched))
        if recipe.tuned:
            step = tuning.WINDOWS * tuning.LENGTH
            logits = 3 * tuning.LENGTH * model.vocab
            watched = 2 * step * max(channels)
            codes = table if model.tied else 2 * table
            ends = max(ends, codes + _FLOAT * (2 * step * model.hidden + max(layer + watched + graphs, logits)))
        layer += solving
    return int(_LIBRARY_BYTES + _FLOAT * states + max(_FLOAT * layer, ends))


def _solving(outputs: int, inputs: int, guided: bool) -> int:
    """Values that are held to solve one matrix: moments, their factor, codes and values, what was lost before."""
    return 2 * inputs * inputs + outputs * inputs + (min(outputs, inputs) * inputs if guided else 0)


def disk(model: Model, recipe: Recipe, tokens: int, tuned: int = 0) -> int:
    """Bytes of files that a walk over `tokens` of calibration holds at its peak: states, what a layer reads, solutions.

    States are held twice, before and after a layer; before them a guided recipe has what `gradients` says. Tuning, over
    `tuned` tokens, has the float model's last states, what scales are multiplied by with two moments, all of that
    twice, and the solutions again.
    """
    if not recipe.calibrated:
        return 0
    inputs, codes, scales = [0] * model.layers, 0.0, 0
    for name, shape in filter(lambda each: is_quantized(each[0]), model.tensors().items()):
        if name not in TABLES:
            inputs[int(name.split(".")[2])] += shape[1]
        layout = layout_of(model, recipe, name)
        codes += math.prod(shape) * _SOLVED[layout.bits > 4]
        scales += math.prod(shape) * (2 if layout.is_ggml else 1) // max(layout.block, layout.group)
    states = model.hidden * tokens
    walking = _FLOAT * (2 * states + (2 * states + max(inputs) * tokens if recipe.guided else 0))
    tuning_bytes = int(codes) + _FLOAT * (model.hidden * tuned + 6 * scales) if recipe.tuned else 0
    return int(codes) + max(walking, gradients(model, tokens) if recipe.guided else 0) + tuning_bytes


def gradients(model: Model, tokens: int) -> int:
    """Bytes of files that a walk backwards over so many tokens holds at its peak, as for a mix, or a guided recipe.

    The states before each layer, 2 bytes a value; gradients, and the states after a layer, twice.
    """
    return (2 * model.layers + 4 * _FLOAT) * model.hidden * tokens


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
