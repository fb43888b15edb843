"""AutoRound, the quantizer that learns its rounding: its weights, dequantized, run by transformers in float32.

What it leaves out of its 4 bits, the table above all, is rounded to 8 bits in groups of 32 as edgeq's `e8` is, since
the question is who makes better 4-bit layers of equal size; AutoRound itself would keep 16 bits. Version 0.16.1 hands
the mask of Qwen3.5's first delta net to its full-attention layers too, which refuse it: there it gives nothing.
"""

from __future__ import annotations

from pathlib import Path

from peers import base
from peers.serving import WEIGHTS_ONLY

NAME = "AutoRound"
FOLDER = Path(__file__).parent
PACKAGES = ("auto-round", "transformers", "torch")
HOWS = (WEIGHTS_ONLY,)
RECIPES = {"w4g32": ("32",), "w4g128": ("128",)}
SPEED: dict[str, tuple[str, ...]] = {}


def python() -> Path:
    """Python of AutoRound's environment."""
    return base.virtual_environment("autoround", FOLDER / "requirements.txt", "auto_round")
