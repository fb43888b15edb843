"""`python -m edgeq.profiling.child`: one job as JSON on stdin, progress and one answer as JSON lines on stdout.

Whatever the engine itself prints goes to stderr.
"""

from __future__ import annotations

import os
import sys
import time
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import msgspec
import numpy as np

from edgeq import accuracy, backends, bundle
from edgeq.errors import BackendFault, EdgeqError
from edgeq.profiles import Energy
from edgeq.profiling import energy, health, memory, messages, pagecache, repetitions, speculating
from edgeq.profiling.messages import Timed
from edgeq.profiling.repetitions import Configuration, Stopwatch

_TOKENIZER = "tokenizer.json"
_ENERGY_SEED = 1 << 21
_ENERGY_S = 10.0
_FIRST_PROMPT = 8

Say = Callable[[messages.Answer | messages.Progress], None]


def main() -> None:
    """Do the job that stdin describes; every outcome, an error too, is one line of stdout."""
    with os.fdopen(os.dup(1), "wb") as channel:
        os.dup2(2, 1)

        def say(message: messages.Answer | messages.Progress) -> None:
            channel.write(msgspec.json.encode(message) + b"\n")
            channel.flush()

        say(_answer(sys.stdin.buffer.read(), say))


def _answer(request: bytes, say: Say) -> messages.Answer:
    try:
        job = msgspec.json.decode(request, type=messages.Job)
        if isinstance(job, messages.ColdJob):
            return cold(Path(job.folder))
        if isinstance(job, messages.FirstJob):
            return first(Path(job.folder))
        if isinstance(job, messages.AccuracyJob):
            return loss(Path(job.folder), Path(job.reference), say)
        return speed(job, say)
    except EdgeqError as error:
        return messages.Fault(kind=type(error).__name__, what=error.what, why=error.why, run=error.run)
    except MemoryError:
        smaller = "build with fewer bits per weight or a shorter --context"
        return messages.Fault(kind="OutOfMemory", what="memory ran out in the backend", why="", run=smaller)
    except Exception as error:
        traceback.print_exc()
        last = traceback.format_exception_only(error)[-1].strip()
        return messages.Fault(kind="BackendFault", what="the backend failed", why=last, run="edgeq verify BUNDLE")


def cold(folder: Path) -> messages.Cold:
    """Time of one load from the disk; loads in any case, so that the next load is warm."""
    manifest = bundle.read(folder)
    backend = backends.get(manifest.backend)
    reason = pagecache.evict(folder)
    start = time.perf_counter()
    session = backend.load(folder, manifest)
    seconds = time.perf_counter() - start
    placement = session.placement
    session.close()
    return messages.Cold(seconds=None if reason else seconds, placement=placement, reason=reason)


def first(folder: Path) -> messages.First:
    """Time of one load and one token, whatever the environment says of kernels that were compiled before."""
    manifest = bundle.read(folder)
    ids = repetitions.prompt_ids(_vocabulary(manifest), _FIRST_PROMPT, 0)
    backend = backends.get(manifest.backend)
    start = time.perf_counter()
    session = backend.load(folder, manifest)
    next(iter(session.generate(ids, 1)))
    seconds = time.perf_counter() - start
    session.close()
    return messages.First(seconds=seconds)


def loss(folder: Path, reference: Path, say: Say) -> messages.Loss:
    """Difference from a recorded reference, window by window."""
    recorded, manifest = accuracy.load(reference), bundle.read(folder)
    session = backends.get(manifest.backend).load(folder, manifest)
    losses = []
    for window, ids in enumerate(recorded.windows):
        logits = session.logits([int(token) for token in ids])
        if not np.isfinite(logits).all():
            raise BackendFault("the backend's logits are not finite", run="edgeq verify BUNDLE")
        losses.append(accuracy.compare(recorded, window, logits))
        say(_progress("accuracy", window + 1, len(recorded.windows)))
    session.close()
    return messages.Loss(accuracy=accuracy.summarize(recorded, losses))


def speed(job: messages.SpeedJob, say: Say) -> messages.Speed:
    """Load time, then speed, memory, energy and health over all repetitions; speculation last, of no part in these."""
    folder = Path(job.folder)
    manifest = bundle.read(folder)
    backend = backends.get(manifest.backend)
    unresettable = memory.reset()
    start = time.perf_counter()
    session = backend.load(folder, manifest)
    warm_s = time.perf_counter() - start
    loaded = memory.read()
    watch = Stopwatch(session, _vocabulary(manifest))
    say(_progress("warm-up", 0, 1))
    repetitions.warm_up(watch, max(job.prompts), job.tokens)
    done = repetitions.repeat(
        watch, configurations(job), job.repetitions, lambda count, total: say(_progress("speed", count, total))
    )
    used = _energy(watch, max(job.prompts), job.tokens)
    phases = (loaded, watch.peaks["prefill"], watch.peaks["decode"])
    peak = max((phase.rss_bytes for phase in phases if phase.rss_bytes is not None), default=None)
    if unresettable:
        phases = (loaded, memory.NOTHING, memory.NOTHING)
    placement = session.placement
    reference = folder / bundle.REFERENCE
    guessed_reason = session.one_way or (None if reference.is_file() else f"the bundle holds no {bundle.REFERENCE}")
    guessed: tuple[messages.Guessed, ...] = ()
    if guessed_reason is None:
        guessed = speculating.measure(
            watch,
            accuracy.load(reference).windows.tolist(),
            max(job.prompts),
            job.tokens,
            job.repetitions,
            lambda count, total: say(_progress("speculation", count, total)),
        )
    session.close()
    return messages.Speed(
        warm_s=warm_s,
        placement=placement,
        repetitions=_with_tokenization(done, folder / _TOKENIZER, watch.vocab),
        peak_rss_bytes=peak,
        load=phases[0],
        prefill=phases[1],
        decode=phases[2],
        memory_reason="this system keeps no peak (VmHWM)" if peak is None else unresettable,
        energy=used,
        health_reason=health.read().reason,
        guessed=guessed,
        guessed_reason=guessed_reason,
    )


def configurations(job: messages.SpeedJob) -> list[Configuration]:
    """Everything to be timed: each prompt, and decode at each depth."""
    prefills = [Configuration("prefill", tokens, 0) for tokens in job.prompts]
    return prefills + [Configuration("decode", job.tokens, depth) for depth in job.depths]


def _vocabulary(manifest: bundle.Bundle) -> int:
    size = manifest.config.get("vocab_size")
    if type(size) is not int or size < 1:
        raise BackendFault(f"the bundle's vocab_size is {size!r}", run="build the bundle again")
    return size


def _progress(label: str, done: int, total: int) -> messages.Progress:
    return messages.Progress(label=label, done=done, total=total, peak_rss_bytes=memory.read().rss_bytes)


def _energy(watch: Stopwatch, prompt: int, tokens: int) -> Energy:
    """Joules per token of prompts and of one continuation, in a pass of its own: reading sensors takes time."""
    sensor, reason = energy.find()
    prefill = decode = None
    if sensor is not None:
        try:
            prefill, no_prefill = _prefill_energy(sensor, watch, prompt)
            ids = repetitions.prompt_ids(watch.vocab, prompt, _ENERGY_SEED)
            stream = watch.prefill(ids, tokens)[0]
            meter = energy.Meter(sensor)
            watch.decode(stream, tokens, meter.tick)
            decode, no_decode = meter.per_token(tokens - 1)
            found = {"prefill": no_prefill, "decode": no_decode}
            reason = "; ".join(f"{phase}: {why}" for phase, why in found.items() if why) or None
        except (OSError, ValueError) as error:
            prefill, decode, reason = None, None, f"{sensor.name} failed: {error}"
    return Energy(
        decode_j_per_token=decode,
        prefill_j_per_token=prefill,
        sensor=sensor.name if sensor else None,
        scope=sensor.scope if sensor else None,
        reason=reason,
    )


def _prefill_energy(sensor: energy.Sensor, watch: Stopwatch, prompt: int) -> tuple[float | None, str | None]:
    """Joules per token of prompts that follow each other until the counter suffices or 10 s are over."""
    if not sensor.wraps_j:
        return None, "power can be read only before and after a prompt"
    count, deadline = 0, time.perf_counter() + _ENERGY_S
    meter = energy.Meter(sensor)
    while not meter.suffices and time.perf_counter() < deadline:
        count += 1
        watch.prefill(repetitions.prompt_ids(watch.vocab, prompt, _ENERGY_SEED + count), 1)
        meter.tick()
    return meter.per_token(count * prompt)


def _with_tokenization(done: Sequence[Timed], path: Path, vocab: int) -> tuple[Timed, ...]:
    """The same repetitions, each prefill with the time of its tokenization when the bundle has a tokenizer.

    Timed after the session is gone, so that the tokenizer's memory does not count as the engine's.
    """
    if not path.is_file():
        return tuple(done)
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))

    def timed(one: Timed) -> Timed:
        text = tokenizer.decode(repetitions.prompt_ids(vocab, one.repetition.tokens, one.attempt))
        start = time.perf_counter()
        tokenizer.encode(text)
        tokenizer.decode([one.first_token])
        return msgspec.structs.replace(one, tokenization_s=time.perf_counter() - start)

    return tuple(timed(one) if one.repetition.phase == "prefill" else one for one in done)


if __name__ == "__main__":
    main()
