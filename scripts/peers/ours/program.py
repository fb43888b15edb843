"""edgeq's bundle, made and run: program.py make CHECKPOINT CALIBRATION OUT RECIPE BACKEND [TEXT].

The calibration windows are not used: edgeq is given the text that they are of, and cuts it likewise, or another TEXT.
"""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from edgeq import backends, bundle
from edgeq.backends.base import Session
from edgeq.backends.llamacpp.gguf import MODEL as GGUF
from edgeq.backends.onnx.weights import MODEL as ONNX
from edgeq.bundle import Bundle
from edgeq.model import read_config
from edgeq.recipe import parse
from peers import arithmetic, serving, texts

BUNDLE = "bundle"
ANY_LOSS = "1000"


def make(checkpoint: Path, _: Path, out: Path, recipe: str, backend: str, text: str = str(texts.CALIBRATION)) -> None:
    """Write a bundle, whatever it loses: what it loses is the question."""
    words = ["build", str(checkpoint), "--target", "host", "--recipe", recipe, "--backend", backend]
    words += ["--output", str(out / BUNDLE), "--max-loss", ANY_LOSS]
    if parse(recipe).calibrated:
        words += ["--calibration", text]
    subprocess.run([sys.executable, "-m", "edgeq.cli", *words], check=True)


class Engine:
    """A session of the bundle's backend."""

    def __init__(self, folder: Path, how: str, threads: int) -> None:
        place = folder / BUNDLE
        made = bundle.read(place)
        self.weights_bytes, self.read_bytes = _sizes(place, made)
        if how == serving.WEIGHTS_ONLY:
            match made.backend:
                case "llamacpp":
                    place = arithmetic.float_gguf(place, GGUF, threads)
                case "onnx":
                    place = arithmetic.float_onnx(place)
                case _:
                    place, made = arithmetic.float_mlc(place, made)
        self._session: Session = backends.get(made.backend).load(place, made)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text on its own."""
        return self._session.logits(ids)

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Seconds until each token of the session's continuation."""
        return serving.moments(self._session.generate(ids, tokens))


def _sizes(place: Path, made: Bundle) -> tuple[int, int]:
    """Bytes of weights in all, and of those that a token reads; a compiled model's are those that were predicted."""
    match made.backend:
        case "llamacpp":
            return arithmetic.gguf_bytes(place / GGUF)
        case "onnx":
            return arithmetic.onnx_bytes(place / ONNX)
    predicted = round(made.bits_per_weight * read_config(made.config).parameters / 8)
    return predicted, predicted


if __name__ == "__main__":
    serving.main(make, Engine)
