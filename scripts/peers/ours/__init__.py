"""edgeq itself, as one more side: whole builds by its command line, run by its own sessions."""

from __future__ import annotations

import sys
from pathlib import Path

from peers.base import Side
from peers.serving import AS_RUN, WEIGHTS_ONLY

NAME = "edgeq"
FOLDER = Path(__file__).parent
PACKAGES = ("onnxruntime", "llama-cpp-python", "torch", "transformers")
HOWS = (AS_RUN, WEIGHTS_ONLY)
RECIPES = {f"w4g32-e8-rtn@{backend}": ("w4g32-e8-rtn", backend) for backend in ("onnx", "llamacpp")}
SPEED = RECIPES


def python() -> Path:
    """Python that runs this."""
    return Path(sys.executable)


def side(name: str) -> Side:
    """Side of a name such as `w4g32-e8-rtn@onnx`, or `w4g32-e8-gptq@onnx:self`, which writes its calibration text."""
    recipe, _, place = name.partition("@")
    backend, _, text = place.partition(":")
    return Side(sys.modules[__name__], name, (recipe, backend or "onnx", *filter(None, [text])))
