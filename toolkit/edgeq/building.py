"""Build: carry out a plan, a checkpoint in, a verified bundle out, or an error and nothing."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import math
import shutil
import time
from contextlib import ExitStack
from pathlib import Path
from typing import Literal

import msgspec
import numpy as np

from edgeq import accuracy, backends, bundle, calibration, chat, choosing, data, gate, sources, store
from edgeq.accuracy import Reference
from edgeq.backends.base import Backend, Job, Progress
from edgeq.bundle import Bundle, Gate, MemoryPlan, Source
from edgeq.calibration import Calibration
from edgeq.checkpoint import Checkpoint
from edgeq.errors import NothingFits
from edgeq.planning import Plan
from edgeq.profiles import Phase
from edgeq.profiling import memory
from edgeq.version import VERSION
from edgeq.walk import footprint, ranges, windows
from edgeq.walk import run as walk
from edgeq.walk.run import Walked
from edgeq.walk.windows import WITH_DRAWN, Held, fitted, with_drawn

_COPIED = ("tokenizer.json", "tokenizer_config.json", "generation_config.json")
_TEMPLATE = "chat_template.jinja"
_CHOICES = 3
_PREDICTED = 1.02  # bytes of a whole bundle, of what it gets: up to 1.01 on the demos
_ROOM = 0.95  # of a loss that is a budget: predictions of what the engine's arithmetic costs are not exact
_MORE_BITS = "choose a recipe with more bits (edgeq models show MODEL), or allow the loss with --max-loss"
_BROKEN = "report it with the output of edgeq doctor; another recipe may work"


class Built(msgspec.Struct, frozen=True, kw_only=True):
    """The document that `edgeq build --json` prints.

    peak_rss_bytes is the kernel's own peak; peak_anonymous_bytes the highest seen between steps, since the kernel keeps
    no peak of it. predicted_loss: of a mix, in nats per token, before the gate measured it; None for other recipes.
    """

    bundle: str
    digest: str
    model: str
    source: str
    revision: str | None
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
    kernels: Literal["compiled", "unchecked"] | None
    memory: MemoryPlan | None
    predicted_loss: float | None
    gate: Gate
    notes: tuple[str, ...]


def build(work: Plan, progress: Progress) -> Built:
    """Carry out a plan: fetch, scan, reference, build, gate, seal, rename into place.

    Raises GateFailed when the bundle is too far from the reference, OutOfMemory when the reference would not fit,
    NothingFits when the bundle is larger than the plan allows, and what reading, writing and the backend raise; then
    nothing is left at the plan's place, and an older bundle there stays as it was.
    """
    started = time.monotonic()
    memory.reset()
    peak = memory.NOTHING

    def step(phase: str, done: int, total: int) -> None:
        nonlocal peak
        peak = memory.highest(peak, memory.read())
        progress(phase, done, total)

    engine = backends.get(work.backend)
    tools = (f"edgeq {VERSION}", *engine.tools(work.target))
    origin = sources.find(work.model, offline=work.offline)
    checkpoint = Checkpoint.open(origin.folder)
    template = checkpoint.chat_template()
    if template is not None:
        chat.render(template, chat.SAMPLE)
    held = windows.quick(checkpoint, data.held_out(), work.context - accuracy.CONTINUATION)
    footprint.require(checkpoint.model, held, work.recipe, WITH_DRAWN * calibration.LENGTH)
    with store.staging(work.out, work.bytes) as folder, ExitStack() as stack:
        if not work.recipe.mixed:
            _check_size(work, int(choosing.bundle_bytes(work, checkpoint) / _PREDICTED), "would have about")
        checkpoint.scan(lambda done, total: step("scan", done, total))
        source, text, cache = origin.source(checkpoint), None, None
        if work.calibration is not None:
            longest, demo = checkpoint.model.context, source.kind == "demo"
            text = calibration.read(checkpoint, work.calibration, demo, longest, step, tuned=work.recipe.tuned)
            work = dataclasses.replace(work, notes=(*work.notes, *filter(None, [text.note])))
            if engine.calibrates_cache(work.recipe):
                cache = ranges.cache_ranges(checkpoint, fitted(text.windows), step)
        work, walked, predicted = _walk(work, checkpoint, held, source, text, folder.parent, stack, step)
        _copy_side_files(checkpoint, template, folder)
        compiled = engine.build(
            Job(checkpoint, work.recipe, work.target, work.context, step, walked.solutions.folder, cache), folder
        )
        accuracy.save(walked.reference, folder / bundle.REFERENCE)
        draft = _describe(work, source, checkpoint, folder, engine.provider(work.target), tools)
        if compiled is not None:
            draft = msgspec.structs.replace(draft, kernels=compiled.kernels, memory=compiled.memory)
        if text is not None:
            recorded = bundle.Calibration(text.source, text.sha256, int(text.windows.size))
            draft = msgspec.structs.replace(draft, calibration=recorded)
        _check_size(work, draft.bytes, "has")
        result, record = _gate(engine, folder, draft, checkpoint, walked, work.max_loss, step)
        lossy = result.kl_mean is not None and result.kl_mean > work.max_loss
        what = f"{work.name} {work.recipe} on {work.backend}, no bundle was kept"
        gate.require(result, what, _MORE_BITS if lossy else _BROKEN)
        accuracy.save(record, folder / bundle.REFERENCE)
        draft = msgspec.structs.replace(draft, gate=result, predicted_loss=predicted)
        sealed = bundle.seal(msgspec.structs.replace(draft, files=bundle.files_in(folder)))
        (folder / bundle.MANIFEST).write_bytes(data.to_json(sealed))
    return _report(work, sealed, time.monotonic() - started, peak)


def _walk(
    work: Plan,
    checkpoint: Checkpoint,
    held: Held,
    source: Source,
    text: Calibration | None,
    parent: Path,
    stack: ExitStack,
    progress: Progress,
) -> tuple[Plan, Walked, float | None]:
    """Walk of a plan's recipe; `stack` removes the folder of its solutions, which a calibrated one has.

    A mixed recipe is settled first; one that then loses more than its budget is chosen again, by what it lost. What the
    last choice was predicted to lose, nats per token, comes with the walk; None where there was none.
    """
    windows = None if text is None else text.windows
    found, scale, resumed, choice = None, None, None, None
    if text is not None and work.recipe.mixed:
        found = choosing.measure(work, checkpoint, source, text, progress)
    for left in reversed(range(_CHOICES)):
        if found is not None:
            work, choice = choosing.settle(work, found, scale)
        if text is not None and work.recipe.calibrated:
            resumed = stack.enter_context(store.resumable(parent, _walk_key(work, source, text, held)))
            tokens = int(with_drawn(fitted(text.windows), checkpoint.model.vocab).size)
            needed = footprint.disk(checkpoint.model, work.recipe, tokens, int(text.windows.size))
            store.require_rest(resumed, work.bytes + needed)
        walked = walk.quantize(checkpoint, work.recipe, held, windows, resumed, progress)
        if not left or choice is None or not work.loss_is_budget or not math.isfinite(walked.weights_only):
            break
        if walked.weights_only + choice.cost - choice.loss <= _ROOM * work.max_loss:
            break
        scale = (scale or 1.0) * walked.weights_only / choice.loss
    return work, walked, None if choice is None else choice.cost


def _gate(
    engine: Backend,
    folder: Path,
    draft: Bundle,
    checkpoint: Checkpoint,
    walked: Walked,
    max_loss: float,
    progress: Progress,
) -> tuple[Gate, Reference]:
    """Gate's result, and the reference with what the bundle wrote."""
    session = engine.load(folder, draft)
    try:
        result = gate.check(
            walked.reference,
            session,
            max_loss,
            walked.weights_only,
            progress,
            lambda tokens: walk.logits(checkpoint, tokens, progress),
        )
        written = np.array(gate.decoded(walked.reference, session) if result.passed else [], np.int32)
    finally:
        session.close()
    return result, dataclasses.replace(walked.reference, continuation=written)


def _walk_key(work: Plan, source: Source, text: Calibration, held: Held) -> str:
    """Digest of what a walk's result depends on: sources, recipe, both texts, and the packages that compute."""
    layouts = " ".join(layout.name for _, layout in work.recipe.chosen)
    packages = (f"{name} {importlib.metadata.version(name)}" for name in ("torch", "transformers", "numpy"))
    texts = (hashlib.sha256(each.windows.tobytes()).hexdigest() for each in (text, held))
    parts = (VERSION, str(walk.FORMAT), str(work.recipe), layouts, *packages, *texts, str(held.keep))
    return hashlib.sha256("\n".join((*parts, *(file.sha256 for file in source.files))).encode()).hexdigest()[:16]


def _check_size(work: Plan, found: int, verb: str) -> None:
    if work.max_size is not None and found > work.max_size:
        raise NothingFits(
            f"the bundle {verb} {found / 1e6:.1f} MB, --max-size is {work.max_size / 1e6:.1f} MB",
            why=f"Weights were predicted at {work.bytes / 1e6:.1f} MB; tokenizer, caches and graph come on top.",
            run=f"edgeq build ... --max-size {found / 1e6 + 1:.0f}MB, or a recipe with fewer bits",
        )


def _copy_side_files(checkpoint: Checkpoint, template: str | None, folder: Path) -> None:
    for name in _COPIED:
        if (checkpoint.folder / name).is_file():
            shutil.copyfile(checkpoint.folder / name, folder / name)
    if template is not None:
        (folder / _TEMPLATE).write_text(template, encoding="utf-8")


def _describe(
    work: Plan, source: Source, checkpoint: Checkpoint, folder: Path, provider: str, tools: tuple[str, ...]
) -> Bundle:
    """Manifest before the gate ran."""
    return Bundle(
        schema=bundle.SCHEMA,
        digest="",
        model=work.name,
        generation=checkpoint.model.generation,
        config=checkpoint.model.config(),
        source=source,
        recipe=str(work.recipe),
        bits_per_weight=work.bits_per_weight,
        target=work.target.name,
        backend=work.backend,
        provider=provider,
        context=work.context,
        tools=tools,
        notes=work.notes,
        files=bundle.files_in(folder),
        layouts={name: layout.name for name, layout in work.recipe.chosen} or None,
        gate=Gate.failed("not run yet", 0.0, work.max_loss, ""),
    )


def _report(work: Plan, made: Bundle, seconds: float, peak: Phase) -> Built:
    return Built(
        bundle=data.readable(work.out),
        digest=made.digest,
        model=made.model,
        source=made.source.name,
        revision=made.source.revision,
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
        kernels=made.kernels,
        memory=made.memory,
        predicted_loss=made.predicted_loss,
        gate=made.gate,
        notes=made.notes,
    )
