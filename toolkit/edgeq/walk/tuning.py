"""All scales tuned together, codes kept: the quantized model's predictions are pulled towards the float model's.

Layers that are fitted one after the other cannot trade errors with each other; gradients of the whole model's KL
divergence can (end-to-end training of quantization parameters, as in EfficientQAT, https://arxiv.org/abs/2407.11062,
here with the float model as the teacher). Each scale is multiplied by exp(x), and Adam
(https://arxiv.org/abs/1412.6980) finds the x. Both models are walked a layer at a time.

Few windows lose many times what others do, and jump with any small change of the weights. Their gradients are clipped
(https://arxiv.org/abs/1211.5063): a window counts as if it lost at most 1.5 times the median of the last 64, itself
among them.
"""

from __future__ import annotations

import math
import shutil
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Progress
from edgeq.quantize.kept import Solutions
from edgeq.walk import gradients, head, scratch
from edgeq.walk.factors import Factors
from edgeq.walk.layered import Layered

EPOCHS = 4
"""Passes over the text."""
WINDOWS, LENGTH = 4, 128
"""Windows of a step, and tokens of a window: many small steps do more than few large ones."""
_RATE, _WARM = 6e-4, 0.1
_USUAL, _RECENT = 1.5, 64
_SEED = 22


def tune(exact: Layered, solutions: Solutions, tokens: NDArray[np.int32], progress: Progress) -> Solutions:
    """Solutions with tuned scales, in a folder within that of the ones given.

    tokens: windows [count, length] of a calibration text. What was found is kept after each pass over them, and a walk
    that was stopped goes on there; raises CorruptInput when that cannot be read.
    """
    folder = solutions.folder
    assert folder is not None
    length = min(LENGTH, tokens.shape[1])
    windows = tokens[:, : tokens.shape[1] // length * length].reshape(-1, length)
    names = [name for index in range(exact.count) for name in exact.matrices(index)]
    factors = Factors(solutions, names, folder)
    targets = scratch.moved(folder, head.embed(head.exact(exact.checkpoint, head.TABLE), windows))
    exact.through(targets, "teacher", progress)
    quantized = Layered(exact.checkpoint, lambda name: factors.applied(solutions(name)).dequantize())
    try:
        step = _Step(exact, quantized, solutions, factors, folder)
        count = -(-len(windows) // WINDOWS)
        while factors.epoch < EPOCHS:
            order = np.random.default_rng((_SEED, factors.epoch)).permutation(len(windows))
            with factors.passing():
                step.forget()
                for index in range(count):
                    done = factors.epoch * count + index
                    progress("tuning", done, EPOCHS * count)
                    batch = order[index * WINDOWS : (index + 1) * WINDOWS]
                    step(windows[batch], targets[batch], done, EPOCHS * count)
        progress("tuning", EPOCHS * count, EPOCHS * count)
    finally:
        quantized.close()
    return _kept(solutions, factors, folder / "tuned")


def _rate(done: int, steps: int) -> float:
    """How far a step may go: rising at first, then falling along a cosine."""
    return _RATE * min(1.0, (done + 1) / (_WARM * steps)) * (1 + math.cos(math.pi * done / steps)) / 2


class _Step:
    """One step: gradients of the divergence over some windows, and what they move."""

    def __init__(
        self, exact: Layered, quantized: Layered, solutions: Solutions, factors: Factors, folder: Path
    ) -> None:
        self._quantized, self._solutions, self._factors, self._folder = quantized, solutions, factors, folder
        output = head.output(exact.checkpoint)
        self._outputs = head.exact(exact.checkpoint, output), solutions.rows(output)
        self._table = self._outputs[1] if exact.checkpoint.model.tied else solutions.rows(head.TABLE)
        self._lost: list[float] = []

    def forget(self) -> None:
        """Forget what windows lost: a pass over the text must not depend on whether the one before was stopped."""
        self._lost = []

    def __call__(self, windows: NDArray[np.int32], targets: NDArray[np.float32], done: int, steps: int) -> None:
        """Move the factors. windows: [count, length]; targets: states of the float model after its last layer."""
        model = self._quantized
        states = head.embed(self._table, windows)
        between = gradients.forwards(model, states, self._folder, _silent)
        slopes, lost = head.divergence_slopes(model, targets, states, *self._outputs)
        for slope, each in zip(slopes, lost, strict=True):
            slope *= self._share(each)
        for layer in gradients.backwards(model, slopes, between, _silent, watch=1):
            for name in model.matrices(layer.index):
                solution = self._factors.applied(self._solutions(name))
                self._factors.move(model, solution, layer.read[name], layer.written[name], _rate(done, steps), done + 1)

    def _share(self, lost: float) -> float:
        """Share of a window's gradient that counts, by what it lost."""
        self._lost = [*self._lost, lost][-_RECENT:]
        most = _USUAL * float(np.median(self._lost))
        return most / lost if lost > most else 1.0


def _kept(solutions: Solutions, factors: Factors, folder: Path) -> Solutions:
    """Solutions with their factors applied, in another folder, and those that have none as they are."""
    folder.mkdir(exist_ok=True)
    tuned = solutions.within(folder)
    for path in folder.parent.glob("*.zip"):
        if path.stem in factors.names:
            tuned.keep(factors.applied(solutions(path.stem)))
        else:
            shutil.copyfile(path, folder / path.name)
    return tuned


def _silent(phase: str, done: int, total: int) -> None:
    """Progress of a step, which is one of many."""
