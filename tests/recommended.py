"""Candidates of known figures, for tests of what is chosen among them."""

from __future__ import annotations

from typing import Any

import msgspec

from edgeq.estimating.speed import Range
from edgeq.recommending import ordering
from edgeq.recommending.document import Candidate
from edgeq.recommending.quantization import Loss

NO_LOSS = Loss(value=0.0, low=0.0, high=0.0, evidence="none", basis="floats")


def around(mid: float, factor: float = 1.25) -> Range:
    """Interval of a figure within a factor."""
    return Range(mid / factor, mid, mid * factor)


def candidate(
    model: str = "qwen3-4b", score: float = 75.0, tps: float = 20.0, memory: int = 3 << 30, **more: Any
) -> Candidate:
    """Candidate of a catalogue model with these figures; `more` are other fields."""
    entry = ordering.of_catalogue().entries[model]
    made = Candidate(
        model=model,
        hub=entry.hub,
        generation=entry.generation,
        recipe="w4g32-e8-rtn",
        backend="llamacpp",
        context=4096,
        depth=2048,
        weights_bytes=memory // 2,
        memory_bytes=memory,
        decode_tokens_per_s=around(tps),
        prefill_tokens_per_s=around(20 * tps),
        first_token_s=around(512 / (20 * tps)),
        quality=ordering.of_catalogue().quality(model),
        loss=NO_LOSS,
        score=score,
        thinking=None,
        evidence="estimated",
        basis="made up",
        license=entry.license,
        commercial=entry.commercial,
    )
    return msgspec.structs.replace(made, **more)
