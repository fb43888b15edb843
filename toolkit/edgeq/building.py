"""Build: a checkpoint in, a verified bundle out, or an error and nothing."""

from __future__ import annotations

import platform
import shutil
import time
from dataclasses import dataclass
from pathlib import Path

import msgspec

from edgeq import accuracy, backends, bundle, chat, data, detect, gate, recipe, reference, size, sources, store
from edgeq.backends.base import Job, Progress
from edgeq.bundle import Bundle, Gate
from edgeq.checkpoint import Checkpoint
from edgeq.errors import MissingTool, NothingFits, OutOfMemory, UsageFault
from edgeq.profiles import Phase
from edgeq.profiling import memory
from edgeq.recipe import Recipe
from edgeq.target import Target

CONTEXT = 4096
_FLOAT_BYTES = 4
_OTHER_BYTES = 800_000_000
_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TEMPLATE = "chat_template.jinja"


@dataclass(frozen=True)
class Plan:
    """What a build will do, before it does it: `bytes` and `bits_per_weight` are predictions, `notes` for people."""

    origin: sources.Origin
    checkpoint: Checkpoint
    target: Target
    recipe: Recipe
    backend: str
    context: int
    out: Path
    max_loss: float
    bytes: int
    bits_per_weight: float
    notes: tuple[str, ...]


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """The document that `edgeq build --json` prints.

    peak_rss_bytes is the kernel's own peak; peak_anonymous_bytes the highest seen between steps, since the kernel keeps
    no peak of it.
    """

    bundle: str
    digest: str
    model: str
    generation: str
    target: str
    recipe: str
    backend: str
    provider: str
    bytes: int
    bits_per_weight: float
    seconds: float
    peak_rss_bytes: int | None
    peak_anonymous_bytes: int | None
    gate: Gate
    notes: tuple[str, ...]


def plan(
    model: str,
    *,
    target: str,
    recipe_name: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    out: Path | None = None,
    max_size: int | None = None,
    max_loss: float | None = None,
    offline: bool = False,
) -> Plan:
    """Decide everything that `build` needs, reading headers only.

    Raises UsageFault for unknown words, MissingTool when no backend of the target can build here, and NothingFits
    when no recipe stays within `max_size` bytes.
    """
    device = detect.resolve(target)
    chosen, notes = _backend(device, backend)
    origin = sources.find(model, offline=offline)
    checkpoint = Checkpoint.open(origin.folder)
    wanted = _recipe(checkpoint, device, recipe_name, max_size)
    if checkpoint.model.has_vision:
        notes += ("the vision tower is left out: this edgeq builds the text model",)
    if checkpoint.model.has_mtp:
        notes += ("the multi-token-prediction head is left out",)
    if device.cpu.arch != platform.machine():
        notes += (f"the gate runs the same graph on this {platform.machine()} CPU, not on {device.cpu.arch}",)
    length = context or min(CONTEXT, checkpoint.model.context)
    if length > checkpoint.model.context:
        raise UsageFault(
            f"--context {length} is beyond the checkpoint's {checkpoint.model.context} tokens",
            run=f"edgeq build ... --context {checkpoint.model.context}",
        )
    place = out or Path("bundles", device.name, f"{origin.short_name}.{wanted}.{chosen}")
    return Plan(
        origin=origin,
        checkpoint=checkpoint,
        target=device,
        recipe=wanted,
        backend=chosen,
        context=length,
        out=place,
        max_loss=wanted.max_loss if max_loss is None else max_loss,
        bytes=size.weight_bytes(checkpoint.model, wanted),
        bits_per_weight=size.bits_per_weight(checkpoint.model, wanted),
        notes=notes,
    )


def build(work: Plan, progress: Progress) -> Built:
    """Carry out a plan: scan, reference, build, gate, seal, rename into place.

    Raises GateFailed when the bundle is too far from the reference, OutOfMemory when the reference would not fit, and
    what reading, writing and the backend raise; then nothing is left at the plan's place, and an older bundle there
    stays as it was.
    """
    started = time.monotonic()
    memory.reset()
    peak = memory.NOTHING

    def step(phase: str, done: int, total: int) -> None:
        nonlocal peak
        peak = memory.highest(peak, memory.read())
        progress(phase, done, total)

    engine = backends.get(work.backend)
    tools = engine.tools()
    checkpoint = work.checkpoint
    template = checkpoint.chat_template()
    if template is not None:
        chat.render(template, chat.SAMPLE)
    _check_memory(checkpoint)
    checkpoint.scan(lambda done, total: step("scan", done, total))
    with store.staging(work.out, work.bytes) as folder:
        text = (data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")
        record, weights_only = reference.quick(checkpoint, work.recipe, text, work.context, step)
        _copy_side_files(checkpoint, template, folder)
        engine.build(Job(checkpoint, work.recipe, work.target, work.context, step), folder)
        accuracy.save(record, folder / bundle.REFERENCE)
        draft = _describe(work, folder, engine.PROVIDER, tools)
        session = engine.load(folder, draft)
        try:
            result = gate.check(record, session, work.max_loss, weights_only, step)
        finally:
            session.close()
        gate.require(
            result,
            f"{work.origin.short_name} {work.recipe} on {work.backend}, no bundle was kept",
            "choose a recipe with more bits (edgeq models show MODEL), or allow the loss with --max-loss",
        )
        sealed = bundle.seal(msgspec.structs.replace(draft, gate=result))
        (folder / bundle.MANIFEST).write_bytes(data.to_json(sealed))
    return _report(work, sealed, time.monotonic() - started, peak)


def _check_memory(checkpoint: Checkpoint) -> None:
    """Raise OutOfMemory when the float32 reference, the largest part of a build, cannot be held."""
    import psutil

    needed = _FLOAT_BYTES * checkpoint.model.parameters + _OTHER_BYTES
    available = psutil.virtual_memory().available
    if needed > available:
        raise OutOfMemory(
            f"the build needs about {needed / 1e9:.1f} GB of memory, {available / 1e9:.1f} GB are available",
            why="The float32 reference takes 4 bytes for each of the checkpoint's weights.",
            run="close other programs, or build on a machine with more memory: the bundle runs where it is copied to",
        )


def _backend(target: Target, name: str) -> tuple[str, tuple[str, ...]]:
    """Backend to use, and what to tell people about the choice."""
    if name != "auto":
        backends.get(name).tools()
        return name, ()
    states = detect.usable_backends(target)
    usable = [state for state in states if state.usable]
    if not usable:
        raise MissingTool(
            f"no backend of {target.name} can build here",
            why="; ".join(f"{state.name}: {state.reason}" for state in states),
            run="edgeq doctor",
        )
    chosen = usable[0].name
    better = states[: [state.name for state in states].index(chosen)]
    notes = [f"backend {chosen}: the first of {target.name}'s that is installed here"]
    notes += [f"backend {state.name} would suit the device better: {state.reason}" for state in better]
    if target.api != "cpu":
        notes.append(f"no GPU backend is installed: this bundle runs on the {target.cpu.arch} CPU of {target.title}")
    return chosen, tuple(notes)


def _recipe(checkpoint: Checkpoint, target: Target, name: str, max_size: int | None) -> Recipe:
    """Recipe by name, or the target's best whose predicted size is within `max_size` bytes."""
    candidates = [recipe.parse(each) for each in (target.recipes if name == "auto" else (name,))]
    if max_size is None:
        return candidates[0]
    sizes = {each: size.weight_bytes(checkpoint.model, each) for each in candidates}
    fitting = [each for each in candidates if sizes[each] <= max_size]
    if not fitting:
        smallest = min(sizes, key=lambda each: sizes[each])
        raise NothingFits(
            f"no recipe fits {max_size / 1e6:.0f} MB",
            why=f"The smallest, {smallest}, needs {sizes[smallest] / 1e6:.0f} MB.",
            run=f"edgeq build ... --max-size {sizes[smallest] / 1e6 + 1:.0f}MB",
        )
    return fitting[0]


def _copy_side_files(checkpoint: Checkpoint, template: str | None, folder: Path) -> None:
    for name in _COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if template is not None:
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")


def _describe(work: Plan, folder: Path, provider: str, tools: tuple[str, ...]) -> Bundle:
    """Manifest before the gate ran."""
    return Bundle(
        schema=bundle.SCHEMA,
        digest="",
        model=work.origin.short_name,
        generation=work.checkpoint.model.generation,
        config=work.checkpoint.model.config(),
        source=work.origin.source(work.checkpoint),
        recipe=str(work.recipe),
        bits_per_weight=work.bits_per_weight,
        target=work.target.name,
        backend=work.backend,
        provider=provider,
        context=work.context,
        tools=tools,
        notes=work.notes,
        files=bundle.files_in(folder),
        gate=Gate.failed("not run yet", 0.0, work.max_loss, ""),
    )


def _report(work: Plan, made: Bundle, seconds: float, peak: Phase) -> Built:
    return Built(
        bundle=str(work.out),
        digest=made.digest,
        model=made.model,
        generation=made.generation,
        target=made.target,
        recipe=made.recipe,
        backend=made.backend,
        provider=made.provider,
        bytes=made.bytes,
        bits_per_weight=made.bits_per_weight,
        seconds=seconds,
        peak_rss_bytes=peak.rss_bytes,
        peak_anonymous_bytes=peak.anonymous_bytes,
        gate=made.gate,
        notes=made.notes,
    )
