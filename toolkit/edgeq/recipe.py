"""Recipes: how weights and the key/value cache are stored. The name is the definition.

    w16                   weights stay in the checkpoint's 16 bits
    w4g32-e8-rtn          4-bit weights, one scale per 32 inputs; 8-bit embedding table; plain rounding
    w4g32-e8-rtn-kv16     the same, with keys and values in float16 instead of float32
    w4ag64-e16-mse        zero points beside the scales; the table in the checkpoint's 16 bits; clipped grid
    w8gcol-e8-rtn         one scale for each row of a matrix
    q4_k-eq6_k-rtn        GGML's layouts by their names, rounded by GGML's own rule
    w4g32-e8-guided       matrices fitted to what they read in a calibration text
    w4g32-e8-tuned        the same, then all scales tuned together so that the model predicts as before: takes longest
    mix-guided            a layout for each matrix, the best within a size or a loss that is given beside it
    mix4.5-guided         the same within 4.5 bits per weight

The first word is the body (every matrix of the layers): `w<bits>[a]g<group>`, where `a` means asymmetric, or one of
GGML's layouts; `e...` is the embedding table, which is also the output layer when the checkpoint ties them (its codes
are symmetric, in groups as the body's); then the method, then the cache.
`f16`, `bf16` and `f32` store every matrix in that type.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, replace

from edgeq import data
from edgeq.errors import UsageFault

METHODS = ("rtn", "mse", "gptq", "guided", "tuned")
SHIPPED = (
    "w16",
    "w8g32-e8-rtn",
    "w8gcol-e8-rtn",
    "w4g32-e8-rtn",
    "w4g32-e8-mse",
    "w4ag32-e8-mse",
    "w4g128-e8-mse",
    "w4g32-e4-rtn",
    "w2ag32-e8-mse",
    "q6_k-eq6_k-rtn",
    "q5_k-eq6_k-rtn",
    "q4_k-eq6_k-rtn",
    "iq4_xs-eq6_k-rtn",
    "q3_k-eq6_k-rtn",
    "q2_k-eq6_k-rtn",
)
"""The recipes that `edgeq models show` lists."""
COLUMN = -1
"""Group of a layout with one scale for all inputs of a row, before `Layout.of` says how many these are."""
_SMALLEST_RUN, _LONGEST_GROUP = 16, 128
_MAX_LOSS = {32: 1e-3, 16: 1e-3, 8: 0.02, 6: 0.05, 5: 0.1, 4: 0.3, 3: 1.0, 2: 3.0}


@dataclass(frozen=True)
class Layout:
    """How one matrix is stored.

    bits: of a code, or of a float where `group` is 0; group: inputs that share a scale; block: inputs that are stored
    together, whose `bits_of_block` is 0 where it is the codes and one scale for each group; symmetric: no zero points.
    """

    name: str
    bits: int
    group: int = 0
    block: int = 1
    bits_of_block: int = 0
    symmetric: bool = True

    @property
    def is_float(self) -> bool:
        """Whether values are stored as they are."""
        return self.group == 0

    @property
    def is_ggml(self) -> bool:
        """Whether only GGML knows it: scales of scales, minimums, or uneven levels."""
        return self.bits_of_block > 0

    @property
    def run(self) -> int:
        """Inputs for which a plain group's scale is stored once, as `run_of` says."""
        return run_of(self.group)

    def of(self, inputs: int) -> Layout:
        """The layout for a matrix of so many inputs, which a group `COLUMN` takes all."""
        return replace(self, group=inputs) if self.group == COLUMN else self

    def stored_bits(self, scale_bits: int) -> float:
        """Bits per weight, scales and zero points counted, of a layout whose group is known.

        scale_bits: what an engine stores for a scale of a plain layout.
        """
        if self.is_float:
            return float(self.bits)
        if self.is_ggml:
            return self.bits_of_block / self.block
        return self.bits + (scale_bits + (0 if self.symmetric else self.bits)) / self.run


def run_of(group: int) -> int:
    """Inputs for which the scale of a group is stored once: the largest power of two that divides it.

    A long group, which is a column, has two runs at least: with one, TVM's schedule of a matrix times a vector is not
    taken.
    """
    run = group & -group
    return run // 2 if run == group > _LONGEST_GROUP else run


FLOATS = {
    "w16": Layout("w16", 16),
    "f16": Layout("f16", 16),
    "bf16": Layout("bf16", 16),
    "f32": Layout("f32", 32),
}
GGML = {
    "q2_k": Layout("q2_k", 2, 16, 256, 8 * 84),
    "q3_k": Layout("q3_k", 3, 16, 256, 8 * 110),
    "q4_1": Layout("q4_1", 4, 32, 32, 8 * 20),
    "iq4_nl": Layout("iq4_nl", 4, 32, 32, 8 * 18),
    "q5_0": Layout("q5_0", 5, 32, 32, 8 * 22),
    "q5_1": Layout("q5_1", 5, 32, 32, 8 * 24),
    "iq4_xs": Layout("iq4_xs", 4, 32, 256, 8 * 136),
    "q4_k": Layout("q4_k", 4, 32, 256, 8 * 144),
    "q5_k": Layout("q5_k", 5, 32, 256, 8 * 176),
    "q6_k": Layout("q6_k", 6, 16, 256, 8 * 210),
}
"""Block sizes: ggml's `ggml-common.h`."""
_NAMES = "|".join(GGML)
_GRAMMAR = re.compile(
    rf"(?:(?P<float>{'|'.join(FLOATS)})"
    r"|mix(?P<mixed_bits>\d+(?:\.\d+)?)?-(?P<mix>[a-z]+)"
    rf"|(?P<body>w(?P<bits>[248])(?P<zeros>a?)g(?P<group>16|32|64|128|col)|{_NAMES})"
    rf"-e(?P<table>4|8|16|{_NAMES})-(?P<method>[a-z]+))"
    r"(?:-kv(?P<kv>8|16))?"
)


@dataclass(frozen=True)
class Recipe:
    """Layout of the body and of the table, the rounding method, and bits of a key or value in the cache.

    mixed: each matrix has a layout of its own, found by measuring, so that a weight of the model has `mixed_bits` at
    most where that is given; `chosen` are names and layouts once they are known.
    """

    body: Layout
    table: Layout
    method: str
    kv_bits: int = 32
    mixed: bool = False
    mixed_bits: float | None = None
    chosen: tuple[tuple[str, Layout], ...] = ()

    @property
    def calibrated(self) -> bool:
        """Whether matrices are fitted to what they read in a calibration text."""
        return self.method in ("gptq", "guided", "tuned")

    @property
    def guided(self) -> bool:
        """Whether the float model's states and gradients guide the fit, besides the quantized model's own states."""
        return self.method in ("guided", "tuned")

    @property
    def tuned(self) -> bool:
        """Whether all scales are tuned together at the end, for the predictions of the whole model."""
        return self.method == "tuned"

    def __str__(self) -> str:
        cache = "" if self.kv_bits == 32 else f"-kv{self.kv_bits}"
        if self.mixed:
            return f"mix{f'{self.mixed_bits:g}' if self.mixed_bits else ''}-{self.method}{cache}"
        if self.body.is_float:
            return self.body.name + cache
        table = self.table.name if self.table.is_ggml else str(self.table.bits)
        return f"{self.body.name}-e{table}-{self.method}{cache}"

    @property
    def max_loss(self) -> float:
        """Default limit of the gate: mean KL divergence from the float32 reference, nats per token."""
        return _MAX_LOSS[self.body.bits]


def plain(bits: int, group: int, *, symmetric: bool = True) -> Layout:
    """Codes of so many bits and one scale per group of inputs, which may be `COLUMN`; a zero point if asymmetric."""
    word = f"w{bits}{'' if symmetric else 'a'}g{'col' if group == COLUMN else group}"
    return Layout(word, bits, group, _SMALLEST_RUN if group == COLUMN else group, symmetric=symmetric)


def layout(word: str) -> Layout:
    """Layout that a word of a recipe's body defines."""
    return parse(f"{word}-e8-rtn").body


def parse(name: str) -> Recipe:
    """Recipe that a name defines; raises UsageFault when the grammar does not hold."""
    match = _GRAMMAR.fullmatch(name)
    if match is None:
        raise UsageFault(
            f"{name!r} is not a recipe",
            why=f"{data.near(name, SHIPPED)} A recipe is {', '.join(FLOATS)}, mix<bits>-<method>, or "
            "<body>-e<table>-<method>, then -kv16 or -kv8 if wanted; the body is w<2|4|8>g<16|32|64|128|col>, "
            "w<2|4|8>ag... with zero points, or one of "
            f"{', '.join(GGML)}; the table is 4, 8, 16 or one of these; the method is one of {', '.join(METHODS)}. "
            "Three bits are q3_k.",
            run="edgeq models show qwen3-0.6b",
        )
    kv_bits = int(match["kv"] or 32)
    if match["float"]:
        return Recipe(FLOATS[match["float"]], FLOATS[match["float"]], "none", kv_bits)
    method = match["mix"] or match["method"]
    if method not in METHODS:
        near = data.near(method, METHODS)
        raise UsageFault(f"{name!r}: unknown method {method!r}", why=near, run="edgeq models show qwen3-0.6b")
    if match["mix"]:
        bits = float(match["mixed_bits"]) if match["mixed_bits"] else None
        return Recipe(plain(4, 32), plain(8, 32), method, kv_bits, mixed=True, mixed_bits=bits)
    if match["body"] in GGML:
        body, group = GGML[match["body"]], 32
    else:
        group = COLUMN if match["group"] == "col" else int(match["group"])
        body = plain(int(match["bits"]), group, symmetric=not match["zeros"])
    if body.is_ggml and method == "mse":
        raise UsageFault(
            f"{name!r}: ggml rounds {body.name} by its own search of scales",
            run=f"edgeq build ... --recipe {name.replace('-mse', '-rtn')}",
        )
    tables = GGML | {"16": FLOATS["w16"], **{str(bits): plain(bits, group) for bits in (4, 8)}}
    return Recipe(body, tables[match["table"]], method, kv_bits)
