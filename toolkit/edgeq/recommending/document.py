"""The document of `edgeq recommend`: what was asked, the choice, and every candidate with its reasons."""

from __future__ import annotations

import msgspec

from edgeq.estimating.speed import Range
from edgeq.recommending.ordering import Quality, ThinkingScore
from edgeq.recommending.quantization import Loss


class Constraints(msgspec.Struct, frozen=True, kw_only=True):
    """What a candidate must meet; null is no wish.

    min_tps: decoded tokens per second; max_ttft_s: seconds to the first token of a prompt; max_memory_bytes: of
    weights, cache, states and engine; max_loss: share of the quality that quantization may cost; license: "open" for
    models that may be used commercially; capability: all of vision, video, thinking; evidence: "measured", "estimated"
    or "any".
    """

    min_tps: float | None = None
    max_ttft_s: float | None = None
    max_memory_bytes: int | None = None
    max_loss: float | None = None
    license: str | None = None
    capability: tuple[str, ...] = ()
    evidence: str = "any"


class Thinking(msgspec.Struct, frozen=True, kw_only=True):
    """What thinking before the answer gives and costs: its published score, and seconds for each 1000 tokens of it."""

    always: bool
    published: ThinkingScore | None
    direct_score: float | None
    seconds_per_1000_tokens: Range | None


class Candidate(msgspec.Struct, frozen=True, kw_only=True):
    """One model under one recipe, run by one backend.

    Speeds are with `depth` tokens in the cache, memory is with room for the whole context. quality: of the model as
    floats; score: what quantization leaves of it. considered: not an estimate for which another one, that differs in
    its backend alone, stands. answer_s: seconds to read a prompt and write an answer; answer_without_prompt: of writing
    alone, the least that it takes, where no time of reading is known. measured_depth: where decoding was measured, if
    it is carried from there to `depth`. unknown: why a speed is null. front: no other eligible candidate is at least as
    good in quality, speed and memory. excluded_by: constraints that it misses; reasons: one sentence each.
    """

    model: str
    hub: str | None
    generation: str
    recipe: str
    backend: str
    context: int
    depth: int
    weights_bytes: int
    memory_bytes: int | None
    decode_tokens_per_s: Range | None
    prefill_tokens_per_s: Range | None
    first_token_s: Range | None
    answer_s: float | None = None
    answer_without_prompt: bool = False
    measured_depth: int | None = None
    unknown: str | None = None
    quality: Quality | None
    loss: Loss
    score: float | None
    thinking: Thinking | None
    evidence: str
    basis: str
    license: str | None
    commercial: bool | None
    considered: bool = True
    front: bool = False
    verdict: str = "rejected"
    excluded_by: tuple[str, ...] = ()
    reasons: tuple[str, ...] = ()

    @property
    def title(self) -> str:
        """Model, recipe and backend."""
        return f"{self.model} {self.recipe} {self.backend}"

    @property
    def exact_speed(self) -> bool:
        """Whether decoding was measured at this depth."""
        return self.evidence == "measured" and self.measured_depth is None


class Recommendation(msgspec.Struct, frozen=True, kw_only=True):
    """The choice for a target, or null, and all candidates: the chosen one, eligible ones, rejected ones.

    usable_bytes: of the target, for a model; null where unknown. excluded: how many candidates each constraint
    excluded; closest: the candidate that missed by least when nothing fits. rule: how one of the eligible candidates
    was chosen.
    """

    target: str
    context: int
    usable_bytes: int | None = None
    constraints: Constraints
    choice: Candidate | None
    closest: Candidate | None
    excluded: dict[str, int]
    rule: str
    notes: tuple[str, ...]
    candidates: tuple[Candidate, ...]
