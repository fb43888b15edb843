"""What a build will do, decided before it does it: from names and shapes alone, without weights."""

from __future__ import annotations

import contextlib
import math
from dataclasses import dataclass, replace
from pathlib import Path

from edgeq import accuracy, backends, calibration, catalog, detect, recipe, size, sources
from edgeq.backends.base import Backend
from edgeq.errors import MissingTool, NothingFits, UsageFault
from edgeq.machine import this_machine
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.recommending import recommend
from edgeq.target import Target

CONTEXT = 4096
MIX = "mix-guided"
SHORTEST_CONTEXT = 2 * accuracy.PROMPT + accuracy.CONTINUATION


@dataclass(frozen=True)
class Plan:
    """One build: `model` as it was named, `shape` what that is.

    `calibration` is the text that matrices or a cache are fitted to. `bytes` of weights and `bits_per_weight` are
    predictions, `context` counts tokens, `max_loss` is in nats per token, `max_size` in bytes; `loss_is_budget` says
    that someone asked for `max_loss`, which a mixed recipe then spends; `notes` are for people.
    """

    model: str
    offline: bool
    name: str
    shape: Model
    target: Target
    recipe: Recipe
    backend: str
    context: int
    out: Path
    max_loss: float
    max_size: int | None
    loss_is_budget: bool
    calibration: str | None
    bytes: int
    bits_per_weight: float
    notes: tuple[str, ...]


def plan(
    model: str | None,
    *,
    target: str,
    recipe_name: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    out: Path | None = None,
    max_size: int | None = None,
    max_loss: float | None = None,
    calibration_text: str | None = None,
    offline: bool = False,
) -> Plan:
    """Decide everything that `building.build` needs; of a model on a hub only its configuration is fetched.

    model None: the one that `recommend` chooses for the target, among what can be built here.
    Raises UsageFault for unknown words, MissingTool when no backend of the target can build here, NothingFits when no
    recipe is predicted to stay within `max_size` bytes, and what opening a folder raises.
    """
    device = detect.resolve(target)
    advice: tuple[str, ...] = ()
    if model is None:
        choice = recommend.for_build(
            target, recipe_name=recipe_name, backend=backend, context=context, max_size=max_size
        )
        asked = f"--target {target}" + (f" --context {context}" if context else "")
        advice = (f"{choice.title}: {choice.reasons[0]}; edgeq recommend {asked} says more",)
        model, backend = choice.model, choice.backend
        if recipe_name == "auto" and max_size is None and max_loss is None:
            recipe_name = choice.recipe
    name, shape = sources.shape(model, offline=offline)
    chosen, notes = _backend(device, backend, shape, recipe_name)
    engine = backends.get(chosen)
    wanted = _recipe(shape, device, chosen, recipe_name, max_size, budget=max_size is not None or max_loss is not None)
    return Plan(
        model=model,
        offline=offline,
        name=name,
        shape=shape,
        target=device,
        recipe=wanted,
        backend=chosen,
        context=_context(shape, context),
        out=out or Path("bundles", device.name, f"{name}.{wanted}.{chosen}"),
        max_loss=wanted.max_loss if max_loss is None else _max_loss(max_loss),
        max_size=max_size,
        loss_is_budget=max_loss is not None and wanted.mixed_bits is None,
        calibration=_calibration(wanted, engine, calibration_text),
        bytes=size.weight_bytes(shape, wanted, engine.scale_bits(wanted)),
        bits_per_weight=size.bits_per_weight(shape, wanted, engine.scale_bits(wanted)),
        notes=(*advice, *notes, *_notes(model, shape, device, chosen)),
    )


def _backend(target: Target, name: str, shape: Model, recipe_name: str) -> tuple[str, tuple[str, ...]]:
    """Backend to use, the first that holds the recipe, and what to tell people about the choice."""
    notes = []
    if name == "auto":
        states = detect.usable_backends(target)
        able = [state.name for state in states if state.builds]
        if not able:
            raise MissingTool(
                f"no backend of {target.name} can build here",
                why="; ".join(f"{state.name}: {state.reason}" for state in states),
                run="edgeq doctor",
            )
        wanted = [recipe.parse(each) for each in (target.recipes if recipe_name == "auto" else [recipe_name])]
        fitting = [each for each in able if any(backends.holds(each, shape, one, target) for one in wanted)]
        name = (fitting or able)[0]
        held = "holds the model" if recipe_name == "auto" else f"knows {recipe_name}"
        which = "is installed here" if name == able[0] else f"is installed here and {held}"
        notes.append(f"backend {name}: the first of {target.name}'s that {which}")
        better = states[: [state.name for state in states].index(name)]
        notes += [
            f"backend {state.name} would suit the device better: {state.reason}" for state in better if not state.builds
        ]
    name = backends.canonical(name)
    if name not in (*target.backends, "null"):
        raise UsageFault(
            f"{target.name} has no backend {name}",
            why=f"Its backends: {', '.join(target.backends)}; edgeq targets show {target.name} has its notes.",
            run=f"edgeq build ... --backend {target.backends[0]}",
        )
    engine = backends.get(name)
    engine.tools(target)
    if target.api != "cpu" and engine.provider(target) == "cpu":
        notes.append(
            f"backend {name} uses no GPU there: this bundle runs on the {target.cpu.arch} CPU of {target.title}"
        )
    return name, tuple(notes)


def _recipe(shape: Model, target: Target, backend: str, name: str, max_size: int | None, *, budget: bool) -> Recipe:
    """Recipe by name, or the target's best that the backend can hold.

    Within a budget that is a mixed one with the best one's cache, where the backend can mix, else the best that fits
    `max_size` predicted bytes.
    """
    engine = backends.get(backend)
    if name != "auto" and (wanted := recipe.parse(name)).mixed:
        backends.check(backend, shape, wanted, target)
        return _budgeted(wanted, budget=budget or wanted.mixed_bits is not None)
    if name == "auto":
        candidates = [
            each for each in map(recipe.parse, target.recipes) if backends.holds(backend, shape, each, target)
        ]
        if not candidates:
            with contextlib.suppress(UsageFault):
                backends.check(backend, shape, recipe.parse(target.recipes[0]), target)
            raise NothingFits(
                f"none of {target.name}'s recipes ({', '.join(target.recipes)}) suits the model and its backend",
                run="edgeq build ... --recipe w16",
            )
        mixed = replace(recipe.parse(MIX), kv_bits=candidates[0].kv_bits)
        if budget and backends.holds(backend, shape, mixed, target):
            return mixed
    else:
        candidates = [recipe.parse(name)]
        backends.check(backend, shape, candidates[0], target)
    if max_size is None:
        return candidates[0]
    sizes = {each: size.weight_bytes(shape, each, engine.scale_bits(each)) for each in candidates}
    fitting = [each for each in candidates if sizes[each] <= max_size]
    if not fitting:
        smallest = min(sizes, key=lambda each: sizes[each])
        raise NothingFits(
            f"no recipe of the target fits {max_size / 1e6:.1f} MB"
            if name == "auto"
            else f"{name} does not fit {max_size / 1e6:.1f} MB",
            why=f"The weights need {sizes[smallest] / 1e6:.1f} MB{f' in the smallest, {smallest}' * (name == 'auto')}.",
            run=f"edgeq build ... --max-size {sizes[smallest] / 1e6 + 1:.0f}MB",
        )
    return fitting[0]


def _budgeted(wanted: Recipe, *, budget: bool) -> Recipe:
    if not budget:
        raise UsageFault(
            f"{wanted} needs a budget",
            why="Layouts are chosen within a size or a loss.",
            run=f"edgeq build ... --recipe mix4.5-{wanted.method}, or --max-size 450MB, or --max-loss 0.02",
        )
    return wanted


def _max_loss(wanted: float) -> float:
    if not 0 < wanted < math.inf:
        raise UsageFault(
            f"--max-loss {wanted} is not possible",
            why="It is a KL divergence in nats, above 0.",
            run="edgeq build ... --max-loss 0.02",
        )
    return wanted


def _calibration(wanted: Recipe, engine: Backend, source: str | None) -> str | None:
    needed = wanted.calibrated or wanted.mixed or engine.calibrates_cache(wanted)
    if source is not None and not needed:
        fitted = "w4g32-e8-guided" if wanted.body.is_float else str(wanted).replace(f"-{wanted.method}", "-guided")
        raise UsageFault(
            f"--calibration has no use for {wanted}",
            why="It looks at weights alone.",
            run=f"edgeq build ... --recipe {fitted}",
        )
    if source not in (None, calibration.BUNDLED, calibration.SELF) and not Path(source).exists():
        raise UsageFault(
            f"--calibration {source}: no such file or folder",
            run="edgeq build ... --calibration FILE, DIR, self or bundled",
        )
    return source or calibration.BUNDLED if needed else None


def _context(shape: Model, wanted: int | None) -> int:
    context = min(CONTEXT, shape.context) if wanted is None else wanted
    if not SHORTEST_CONTEXT <= context <= shape.context:
        raise UsageFault(
            f"--context {context} is not possible",
            why=f"The gate needs {SHORTEST_CONTEXT} tokens, the checkpoint has {shape.context} tokens at most.",
            run=f"edgeq build ... --context {min(CONTEXT, shape.context)}",
        )
    return context


def _notes(model: str, shape: Model, target: Target, backend: str) -> list[str]:
    """What people should know that the result does not show."""
    notes = [target.install_doubt] if target.install_doubt else []
    if model.lower() in catalog.names() and Path(model).is_dir():
        notes.append(f"{model} is taken as the folder of that name here, not as the catalogue's model")
    if shape.has_vision:
        notes.append("the vision tower is left out: this edgeq builds the text model")
    if shape.has_mtp and backend != "llamacpp":
        notes.append("the multi-token-prediction head is left out")
    if why := detect.mismatch(target, this_machine()):
        notes.append(f"the gate runs on this machine's CPU, which is not {target.name}: {why}")
    return notes
