"""Quantities as people write them: 1.5GB, 450MB, 4k; and as tables show them."""

from __future__ import annotations

import re

from edgeq.errors import UsageFault

_QUANTITY = re.compile(r"(?P<number>[0-9]{1,15}(?P<fraction>\.[0-9]+)?)\s*(?P<unit>[a-zA-Z]*)")
_BYTES = {"b": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "kib": 1 << 10, "mib": 1 << 20, "gib": 1 << 30}
_TOKENS = {"": 1, "k": 1 << 10, "m": 1 << 20}


def parse_bytes(text: str) -> int:
    """Bytes in `450MB`, `1.5GB` (powers of 1000) or `2GiB` (powers of 1024); raises UsageFault otherwise."""
    return _parse(text, _BYTES, "a size", "450MB, 1.5GB or 2GiB")


def parse_tokens(text: str) -> int:
    """Tokens in `4096` or `4k` (k = 1024), one at least; raises UsageFault otherwise."""
    meaning, examples = "a number of tokens", "4096 or 4k"
    tokens = _parse(text, _TOKENS, meaning, examples)
    if tokens < 1:
        raise fault(text, meaning, examples)
    return tokens


def parse_share(text: str) -> float:
    """Share in `0.05` or `5%`; raises UsageFault for what is no number."""
    number = text.strip()
    percent = number.endswith("%")
    try:
        value = float(number.removesuffix("%"))
    except ValueError:
        raise fault(text, "a share", "0.05 or 5%") from None
    return value / 100 if percent else value


def show_bytes(count: int | None) -> str:
    """Bytes in KiB, MiB or GiB, `-` when unknown."""
    if count is None:
        return "-"
    if count < 1 << 20:
        return f"{count / (1 << 10):.0f} KiB"
    return f"{count / (1 << 30):.2f} GiB" if count >= 1 << 30 else f"{count / (1 << 20):.1f} MiB"


def _parse(text: str, units: dict[str, int], meaning: str, examples: str) -> int:
    match = _QUANTITY.fullmatch(text.strip())
    unit = units.get(match["unit"].lower()) if match else None
    if match is None or unit is None or (unit == 1 and match["fraction"]):
        raise fault(text, meaning, examples)
    return round(float(match["number"]) * unit)


def fault(text: str, meaning: str, examples: str) -> UsageFault:
    """What to raise for a word that is not what it should be."""
    return UsageFault(f"{text[:100]!r} is not {meaning}", run=f"write it like {examples}")
