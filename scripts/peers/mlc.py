"""MLC's own compiler with its plain 4 bits (q4f32_1): named here so that its absence is said."""

from __future__ import annotations

from pathlib import Path

from peers.base import Unavailable
from peers.serving import AS_RUN

NAME = "MLC"
FOLDER = Path(__file__).parent
PACKAGES = ()
HOWS = (AS_RUN,)
RECIPES: dict[str, tuple[str, ...]] = {"q4f32_1": ()}
SPEED = RECIPES


def python() -> Path:
    """Raises Unavailable: what bears mlc-llm's name on the package index holds no files."""
    raise Unavailable("mlc-llm is not on the package index")
