"""onnxruntime-genai's model builder as shipped, run by ONNX Runtime and onnxruntime-genai; in edgeq's own environment.

Left out: `is_symmetric=false`, whose file does not load with a shared table.
"""

from __future__ import annotations

import sys
from pathlib import Path

from peers.serving import AS_RUN, WEIGHTS_ONLY

NAME = "genai builder"
FOLDER = Path(__file__).parent
PACKAGES = ("onnxruntime-genai", "onnxruntime", "transformers", "torch")
HOWS = (AS_RUN, WEIGHTS_ONLY)
RECIPES = {
    "int4": (),
    "int4 g128": ("block_size=128",),
    **{f"int4 {name}": (f"algo_config={name}",) for name in ("rtn_last", "k_quant", "k_quant_last", "k_quant_mixed")},
}
SPEED = {
    "int4 pruned head": ("prune_lm_head=true",),
    "int4 g128 pruned head": ("block_size=128", "prune_lm_head=true"),
}


def python() -> Path:
    """Python of edgeq's environment, whose build extra holds the builder."""
    return Path(sys.executable)
