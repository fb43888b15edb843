"""How much a comparison takes."""

from __future__ import annotations

from pathlib import Path

import msgspec


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`parts` that are wanted; `folder` for what is made, random checkpoints staying there; names of the catalogue.

    `repetitions` builds and `rounds` continuations of each side; `orders` of hidden units that the loss is averaged
    over.
    """

    parts: tuple[str, ...]
    folder: Path
    build_model: str
    speed_model: str
    repetitions: int
    rounds: int
    orders: int
