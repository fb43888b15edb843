"""llama.cpp, as llama-cpp-python holds it: its own converter and quantizer; in edgeq's own environment."""

from __future__ import annotations

import sys
from pathlib import Path

from peers.serving import AS_RUN, WEIGHTS_ONLY

NAME = "llama.cpp"
FOLDER = Path(__file__).parent
PACKAGES = ("llama-cpp-python", "gguf", "transformers", "torch")
HOWS = (AS_RUN, WEIGHTS_ONLY)
RECIPES = {
    f"{kind}{' imatrix' * bool(words)}": (kind, *words) for kind in ("Q4_0", "Q4_K_M") for words in ((), ("imatrix",))
}
SPEED = {kind: (kind,) for kind in ("Q4_0", "Q4_K_M")}


def python() -> Path:
    """Python of edgeq's environment, whose llamacpp extra holds llama.cpp."""
    return Path(sys.executable)
