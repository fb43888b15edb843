"""How much a comparison takes."""

from __future__ import annotations

from pathlib import Path

import msgspec

PARTS = ("build", "loss", "speed", "layout", "session")


class Plan(msgspec.Struct, frozen=True, kw_only=True):
    """`parts` that are wanted, of the `peers` of these names; `folder` for what is made, random checkpoints stay there.

    `ours` are edgeq's sides, such as `w4g32-e8-rtn@onnx`; `demos` the checkpoints whose loss counts, `build_model` and
    `speed_models` names of the catalogue. `repetitions` builds and `rounds` of each side; `orders` of hidden units that
    the loss is averaged over, `windows` of each text.
    """

    parts: tuple[str, ...]
    peers: tuple[str, ...]
    ours: tuple[str, ...]
    folder: Path
    demos: tuple[str, ...]
    build_model: str
    speed_models: tuple[str, ...]
    repetitions: int
    rounds: int
    orders: int
    windows: int
