"""Recipes: how weights and the key/value cache are stored. The name is the definition.

    w16                   weights stay in the checkpoint's 16 bits
    w4g32-e8-rtn          4-bit weights, one scale per 32 inputs; 8-bit embedding table; plain rounding
    w4g32-e8-rtn-kv16     the same, with keys and values in float16 instead of float32
    q4_k-eq6_k-rtn        GGML's layouts by their names, rounded by GGML's own rule

The first word is the body (every matrix of the layers): `w<bits>g<group>`, or one of GGML's layouts; `e...` is the
embedding table, which is also the output layer when the checkpoint ties them; then the method, then the cache.
`f16`, `bf16` and `f32` store every matrix in that type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass

from edgeq.errors import UsageFault

METHODS = ("rtn",)
SHIPPED = ("w16", "w8g32-e8-rtn", "w4g32-e8-rtn", "w4g32-e4-rtn")
_MAX_LOSS = {32: 1e-3, 16: 1e-3, 8: 0.02, 6: 0.05, 5: 0.1, 4: 0.3}


@dataclass(frozen=True)
class Layout:
    """How one matrix is stored.

    bits: of a code, or of a float where `group` is 0; group: inputs that share a scale; block: inputs that are stored
    together, whose `bits_of_block` is 0 where it is the codes and one scale for each group.
    """

    name: str
    bits: int
    group: int = 0
    block: int = 1
    bits_of_block: int = 0

    @property
    def is_float(self) -> bool:
        """Whether values are stored as they are."""
        return self.group == 0

    @property
    def is_ggml(self) -> bool:
        """Whether only GGML knows it: scales of scales, minimums, or uneven levels."""
        return self.bits_of_block > 0

    def stored_bits(self, scale_bits: int) -> float:
        """Bits per weight, scales counted; `scale_bits` is what an engine stores for the scale of a plain group."""
        if self.is_float:
            return float(self.bits)
        return self.bits_of_block / self.block if self.is_ggml else self.bits + scale_bits / self.group


FLOATS = {
    "w16": Layout("w16", 16),
    "f16": Layout("f16", 16),
    "bf16": Layout("bf16", 16),
    "f32": Layout("f32", 32),
}
GGML = {
    "q4_1": Layout("q4_1", 4, 32, 32, 8 * 20),
    "iq4_nl": Layout("iq4_nl", 4, 32, 32, 8 * 18),
    "q4_k": Layout("q4_k", 4, 32, 256, 8 * 144),
    "q5_k": Layout("q5_k", 5, 32, 256, 8 * 176),
    "q6_k": Layout("q6_k", 6, 16, 256, 8 * 210),
}
"""Block sizes: ggml's `ggml-common.h`."""
_NAMES = "|".join(GGML)
_GRAMMAR = re.compile(
    rf"(?:(?P<float>{'|'.join(FLOATS)})"
    rf"|(?P<body>w(?P<bits>[48])g(?P<group>16|32|64|128)|{_NAMES})-e(?P<table>[48]|{_NAMES})-(?P<method>[a-z]+))"
    r"(?:-kv(?P<kv>8|16))?"
)


@dataclass(frozen=True)
class Recipe:
    """Layout of the body and of the table, the rounding method, and bits of a key or value in the cache."""

    body: Layout
    table: Layout
    method: str
    kv_bits: int = 32

    def __str__(self) -> str:
        cache = "" if self.kv_bits == 32 else f"-kv{self.kv_bits}"
        if self.body.is_float:
            return self.body.name + cache
        table = self.table.name if self.table.is_ggml else str(self.table.bits)
        return f"{self.body.name}-e{table}-{self.method}{cache}"

    @property
    def max_loss(self) -> float:
        """Default limit of the gate: mean KL divergence from the float32 reference, nats per token."""
        return _MAX_LOSS[self.body.bits]


def plain(bits: int, group: int) -> Layout:
    """Codes of so many bits and one scale per group of inputs."""
    return Layout(f"w{bits}g{group}", bits, group, group)


def parse(name: str) -> Recipe:
    """Recipe that a name defines; raises UsageFault when the grammar does not hold."""
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise UsageFault(
            f"{name!r} is not a recipe",
            why=f"A recipe is {', '.join(FLOATS)}, or <body>-e<table>-<method>, then -kv16 or -kv8 if wanted; the body "
            f"is w<4|8>g<16|32|64|128> or one of {', '.join(GGML)}; the table is 4, 8 or one of these.",
            run="edgeq models show qwen3-0.6b",
        )
    kv_bits = int(match["kv"] or 32)
    if match["float"]:
        return Recipe(FLOATS[match["float"]], FLOATS[match["float"]], "none", kv_bits)
    if match["method"] not in METHODS:
        raise UsageFault(f"{name!r}: unknown method {match['method']!r}", why=f"Known: {', '.join(METHODS)}")
    body = GGML.get(match["body"]) or plain(int(match["bits"]), int(match["group"]))
    table = GGML.get(match["table"]) or plain(int(match["table"]), 32 if body.is_ggml else body.group)
    return Recipe(body, table, match["method"], kv_bits)
