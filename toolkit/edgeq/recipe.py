"""Recipes: how weights are quantized. The name is the definition.

    w16                 weights stay in 16 bits
    w4g32-e8-rtn        4-bit weights, one scale per 32 inputs; 8-bit embedding table; plain rounding

`w<bits>g<group>` is the body (every matrix of the layers), `e<bits>` the embedding table, which is
also the output layer when the checkpoint ties them, and the last word the method.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeq.errors import UsageFault

SCALE_BITS = 32
METHODS = ("rtn",)
SHIPPED = ("w16", "w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn")
_GRAMMAR = re.compile(r"w(?P<bits>4|8)g(?P<group>16|32|64|128)-e(?P<table>4|8)-(?P<method>[a-z]+)")
_MAX_LOSS = {16: 1e-3, 8: 0.02, 4: 0.3}


@dataclass(frozen=True)
class Recipe:
    """Weight bits of the body and of the table, inputs per scale (0: none), and the rounding method."""

    bits: int
    group: int
    table_bits: int
    method: str

    def __str__(self) -> str:
        if self.bits == 16:
            return "w16"
        return f"w{self.bits}g{self.group}-e{self.table_bits}-{self.method}"

    @property
    def max_loss(self) -> float:
        """Default limit of the gate: mean KL divergence from the float32 reference, nats per token."""
        return _MAX_LOSS[self.bits]

    def stored_bits(self, bits: int) -> float:
        """Bits per weight of one matrix at `bits`, its float32 scales counted."""
        return float(bits) if bits == 16 else bits + SCALE_BITS / self.group


def parse(name: str) -> Recipe:
    """Recipe that a name defines; raises UsageFault when the grammar does not hold."""
    if name == "w16":
        return Recipe(16, 0, 16, "none")
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise UsageFault(
            f"{name!r} is not a recipe",
            why="A recipe is w16, or w<4|8>g<16|32|64|128>-e<4|8>-<method>, for example w4g32-e8-rtn.",
            run="edgeq models show qwen3-0.6b",
        )
    if match["method"] not in METHODS:
        raise UsageFault(f"{name!r}: unknown method {match['method']!r}", why=f"Known: {', '.join(METHODS)}")
    return Recipe(int(match["bits"]), int(match["group"]), int(match["table"]), match["method"])
