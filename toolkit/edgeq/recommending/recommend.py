"""Which model, recipe and backend for a device: candidates, constraints, the front and one choice with its reasons."""

from __future__ import annotations

import functools
from collections import Counter
from collections.abc import Iterable

import msgspec

from edgeq import backends, data, detect, recipe
from edgeq.errors import MissingTool, NothingFits, UsageFault
from edgeq.estimating import doubts, memory, rates
from edgeq.recommending import candidates, constraints, front, ordering
from edgeq.recommending.constraints import Miss
from edgeq.recommending.document import Candidate, Constraints, Recommendation
from edgeq.target import Target

CONTEXT = 4096
_STEP = 256  # tokens that a context named in a remedy is a multiple of


def recommend(
    target: str,
    *,
    context: int | None = None,
    wanted: Constraints | None = None,
    recipes: Iterable[str] = (),
    engines: Iterable[str] = (),
    largest: int | None = None,
) -> Recommendation:
    """Candidates for a target, best first, with the choice or null when none meets all constraints.

    context: tokens that the cache has room for, 4096 when None; half of them are in it when speeds are compared.
    recipes, engines: instead of the target's own; largest: bytes of weights, above which candidates are left out.
    Raises UsageFault for unknown words.
    """
    wanted = wanted or Constraints()
    constraints.check(wanted)
    device, context = detect.resolve(target), context or CONTEXT
    usable = memory.usable_bytes(device)
    found = front.timed(candidates.find(device, context, recipes=recipes, engines=engines))
    judged = [
        (each, constraints.missed(each, wanted, usable))
        for each in found
        if largest is None or each.weights_bytes <= largest
    ]
    eligible = front.marked([each for each, missed in judged if not missed])
    rejected = [_rejected(*each) for each in sorted((each for each in judged if each[1]), key=_distance)]
    choice = front.choose(eligible) if eligible else None
    if choice is not None:
        eligible = [_judged(each, choice, eligible) for each in eligible]
        choice = next(each for each in eligible if each.verdict == "chosen")
    return Recommendation(
        target=device.name,
        context=context,
        usable_bytes=usable,
        constraints=wanted,
        choice=choice,
        closest=None if choice or not rejected else rejected[0],
        excluded=dict(Counter(miss.constraint for _, missed in judged for miss in missed).most_common()),
        rule=front.RULE,
        notes=(*_notes(choice, found, wanted, device), *_doubts(choice, found, device)),
        candidates=(*sorted(eligible, key=_place), *rejected),
    )


def for_build(
    target: str,
    *,
    recipe_name: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    max_size: int | None = None,
) -> Candidate:
    """The choice among what can be built on this machine, of `max_size` bytes of weights at most.

    Raises NothingFits when there is none, MissingTool when no backend of the target builds here, UsageFault for a
    backend that the target does not have.
    """
    device = detect.resolve(target)
    if backend != "auto" and backends.canonical(backend) not in device.backends:
        raise UsageFault(
            f"{device.name} has no backend {backend}",
            why=data.near(backend, device.backends),
            run=f"edgeq build ... --backend {device.backends[0]}",
        )
    states = detect.usable_backends(device) if backend == "auto" else ()
    if backend == "auto" and not any(state.builds for state in states):
        raise MissingTool(
            f"no backend of {target} can build here",
            why="; ".join(f"{state.name}: {state.reason}" for state in states),
            run=f"edgeq doctor --target {target}",
        )
    search = functools.partial(
        recommend,
        target,
        context=context,
        recipes=() if recipe_name == "auto" or recipe.parse(recipe_name).mixed else (recipe_name,),
        engines=[state.name for state in states if state.builds] or [backend],
    )
    found = search(largest=max_size)
    if found.candidates and found.choice is None and found.usable_bytes is None:
        raise NothingFits(
            f"no model can be chosen for {found.target}",
            why="How much memory it has is not known.",
            run=f"edgeq recommend --target {target} --max-memory 8GB, then edgeq build MODEL --target {target}",
        )
    if max_size is not None and not found.candidates and (every := search().candidates):
        smallest = min(every, key=lambda each: (each.verdict == "rejected", each.weights_bytes))
        raise NothingFits(
            f"no model fits {max_size / 1e6:.1f} MB",
            why=f"The smallest, {smallest.title}, needs ~{smallest.weights_bytes / 1e6:.1f} MB.",
            run=f"edgeq build --target {target} --max-size {smallest.weights_bytes / 1e6 + 1:.0f}MB",
        )
    return require(found, "build")


def require(found: Recommendation, command: str = "recommend") -> Candidate:
    """The choice; raises NothingFits with the constraint that excluded most and the closest miss."""
    if found.choice is not None:
        return found.choice
    if not found.candidates:
        raise NothingFits(
            f"no backend of {found.target} holds any of these recipes", run=f"edgeq targets show {found.target}"
        )
    name, count = max(found.excluded.items(), key=lambda item: item[1])
    total = len(found.candidates)
    raise NothingFits(
        f"none of {total} candidates for {found.target} meets all constraints: {name} excluded most, {count}",
        why=f"The closest miss is {found.closest.title}: {'; '.join(found.closest.reasons)}." if found.closest else "",
        run=_remedy(found, command),
    )


def _remedy(found: Recommendation, command: str) -> str:
    """The command whose constraints the closest miss meets; where none is, what else there is to choose from."""
    closest = found.closest
    if closest is None or "quality" in closest.excluded_by:
        return "edgeq models list"
    words = dict.fromkeys(_relaxed(name, closest, found.usable_bytes) for name in closest.excluded_by)
    if None in words:
        return "edgeq targets list"
    return " ".join([f"edgeq {command} ...", *sorted(filter(None, words), key=lambda word: word.startswith("without"))])


def _relaxed(constraint: str, closest: Candidate, usable: int | None) -> str | None:
    """The option that a candidate meets in place of the one that it misses; None where no option helps."""
    speed, wait, needs = closest.decode_tokens_per_s, closest.first_token_s, closest.memory_bytes or 0
    if constraint == "min-tps" and speed:
        return f"--min-tps {speed.low - 0.05:.1f}"
    if constraint == "max-ttft" and wait:
        return f"--max-ttft {wait.high + 0.05:.1f}"
    if constraint == "max-loss":
        return f"--max-loss {closest.loss.high + 0.0005:.3f}"
    if constraint == "max-memory":
        return f"--max-memory {needs * memory.MEMORY_ERROR / 1e9 + 0.05:.1f}GB"
    if constraint == "memory" and usable is None:
        return "--max-memory 8GB"
    if constraint in ("memory", "context"):
        tokens = _context(closest, usable)
        return f"--context {tokens}" if tokens else None
    if constraint in ("evidence", "license"):
        return f"--{constraint} any"
    return f"without --{constraint}"


def _context(closest: Candidate, usable: int | None) -> int:
    """Most tokens that a model reads, and that fit into the memory where that is what it misses."""
    entry = ordering.of_catalogue().entries[closest.model]
    if usable is None or "memory" not in closest.excluded_by:
        return entry.context
    needed = memory.needed(entry.model, recipe.parse(closest.recipe), closest.backend, context=closest.context)
    fitting = memory.largest_context(entry.model, needed, int(usable / memory.MEMORY_ERROR))
    return min(entry.context, fitting - fitting % _STEP or fitting)


def _judged(each: Candidate, choice: Candidate, eligible: list[Candidate]) -> Candidate:
    if each == choice:
        return msgspec.structs.replace(each, verdict="chosen", reasons=front.why_chosen(each, eligible))
    return msgspec.structs.replace(each, verdict="eligible", reasons=(front.why_lost(each, choice, eligible),))


def _rejected(each: Candidate, missed: list[Miss]) -> Candidate:
    return msgspec.structs.replace(
        each,
        excluded_by=tuple(miss.constraint for miss in missed),
        reasons=tuple(miss.reason for miss in missed),
    )


def _distance(judged: tuple[Candidate, list[Miss]]) -> tuple[bool, bool, int, float, int, float]:
    """How far a candidate is from what is wanted: by how many constraints, by the largest factor, by its size.

    What has no published scores is last: no wish that is given up makes it comparable.
    """
    candidate, missed = judged
    factor = max(miss.factor for miss in missed)
    never, size, score = factor == constraints.NEVER, candidate.memory_bytes or 0, candidate.score or 0.0
    return candidate.quality is None, never, len(missed), factor, size, -score


def _place(each: Candidate) -> tuple[bool, bool, bool, bool, float]:
    """Order of eligible candidates: the choice, measured before estimated, the front by quality, others by balance."""
    worth = (each.score or 0.0) if each.front else front.balance(each)
    return each.verdict != "chosen", each.evidence != "measured", not each.front, not each.considered, -worth


def _doubts(choice: Candidate | None, found: list[Candidate], device: Target) -> list[str]:
    """What makes the choice's speed less certain than its interval, unless its backend was measured there."""
    if choice is None or choice.decode_tokens_per_s is None:
        return []
    if any(each.evidence == "measured" and each.quality and each.backend == choice.backend for each in found):
        return []
    source = rates.find(device, choice.backend).source
    return [f"speeds with {choice.backend}: {each}" for each in doubts.of_figures(device, choice.backend, source)]


def _notes(choice: Candidate | None, found: list[Candidate], wanted: Constraints, device: Target) -> tuple[str, ...]:
    notes = [device.install_doubt] if device.install_doubt else []
    if assumed := memory.assumed_share(device):
        notes.append(assumed)
    if {"vision", "video"} & set(wanted.capability):
        notes.append("edgeq builds the text model alone: the vision tower is left out of memory and speed")
    if not any(each.decode_tokens_per_s and each.quality for each in found):
        cautious = "no speed is known here, so the choice is a cautious one" if choice else "no speed is known here"
        notes.append(
            f"{cautious}; one measured model of 100 MB or more gives those of its backend: on the device, "
            "edgeq build MODEL --target host (or the target's file), then edgeq profile BUNDLE --save"
        )
    measured = [each for each in found if each.evidence == "measured"]
    if not any(each.quality for each in measured):
        what = "no model with published scores" if measured else "nothing"
        rest = "figures of all others" if measured else "all figures"
        notes.append(f"{what} was measured on this target: {rest} are estimates; edgeq profile --save replaces them")
    return tuple(notes)
