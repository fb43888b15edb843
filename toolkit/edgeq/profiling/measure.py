"""Measure one bundle on this machine: load, speed, memory, energy and accuracy loss, in one row."""

from __future__ import annotations

import importlib.metadata
import tempfile
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from edgeq import backends, bundle, model, profiles, recipe
from edgeq.errors import UsageFault
from edgeq.loss import Accuracy
from edgeq.machine import Machine, physical_cores
from edgeq.profiles import Identity, Load, Memory, Placement, Profile
from edgeq.profiling import messages, process, rows
from edgeq.target import Target
from edgeq.version import VERSION

_TIMEOUT_S = 1800.0
_ACCURACY = ("none", "quick", "full")
_CACHES_OFF = {
    "CUDA_CACHE_DISABLE": "1",
    "__GL_SHADER_DISK_CACHE": "0",
    "MESA_SHADER_CACHE_DISABLE": "1",
    "NEO_CACHE_PERSISTENT": "0",
    "POCL_KERNEL_CACHE": "0",
}
"""Kernels that drivers keep: CUDA, NVIDIA's Vulkan, Mesa, Intel's OpenCL, PoCL (the manuals of each)."""
_CACHE_FOLDERS = ("EDGEQ_KERNEL_CACHE", "XDG_CACHE_HOME")
_KV_BYTES = {32: 4.0, 16: 2.0, 8: 1.0}
_Q8_0_BYTES = 34 / 32  # GGML's blocks of 32: a float16 scale in each; ONNX Runtime's scales are fixed weights

Progress = Callable[[str, int, int], None]


@dataclass(frozen=True)
class Plan:
    """What to measure: prompt lengths, tokens to decode, depths to decode at, valid repetitions, accuracy loss.

    With `require_accelerator` nothing is measured when a layer stays on the CPU.
    """

    prompts: tuple[int, ...] = (128, 512)
    tokens: int = 128
    depths: tuple[int, ...] = (0,)
    repetitions: int = 5
    accuracy: str = "quick"
    require_accelerator: bool = False


def profile(
    folder: Path,
    target: Target,
    machine: Machine,
    plan: Plan,
    *,
    progress: Progress,
    full_reference: Path | None = None,
) -> Profile:
    """Row of a bundle whose files were verified before; each child process may take 30 minutes.

    Accuracy is against `full_reference` where it is given, else against the reference that the bundle carries.

    Prefill is measured after nothing (depth 0), decode after a prompt of each depth: a session has no way to read a
    second prompt on top of a first. Speed and memory come from one process, accuracy from another, so that its logits
    do not count as memory. Raises UsageFault when the plan does not suit the bundle, what the backend raises, and
    BackendFault or BackendKilled when it fails, MissingTool when an accelerator is required and missing.
    """
    manifest = bundle.read(folder)
    _check(plan, manifest)
    children = process.Children(progress, machine.memory_bytes, _TIMEOUT_S)
    cold = children.run(messages.ColdJob(folder=str(folder)), messages.Cold)
    if plan.require_accelerator:
        profiles.require_accelerator(cold.placement, manifest.target, manifest.provider)
    first_s, no_first = _first(children, folder, manifest, machine, cold.placement)
    speed = children.run(
        messages.SpeedJob(
            folder=str(folder),
            prompts=tuple(dict.fromkeys(plan.prompts)),
            tokens=plan.tokens,
            depths=tuple(dict.fromkeys(plan.depths)),
            repetitions=plan.repetitions,
        ),
        messages.Speed,
    )
    loss, no_loss = _accuracy(children, folder, plan, full_reference)
    load = Load(warm_s=speed.warm_s, cold_s=cold.seconds, reason=cold.reason, first_s=first_s, first_reason=no_first)
    return _row(manifest, target, machine, plan, load, speed, loss, no_loss)


def _row(
    manifest: bundle.Bundle,
    target: Target,
    machine: Machine,
    plan: Plan,
    load: Load,
    speed: messages.Speed,
    loss: Accuracy | None,
    no_loss: str | None,
) -> Profile:
    done, engine = speed.repetitions, backends.get(manifest.backend).ENGINE
    prefills, decodes = (rows.counting(done, phase, plan.repetitions) for phase in ("prefill", "decode"))
    first_token_s, first_token_from = rows.first_token(prefills, plan.prompts[0])
    valid, grade, reasons = rows.verdict(
        [*prefills, *decodes], done, plan.repetitions, speed.placement, manifest.provider
    )
    if any(plan.depths):
        reasons += ("prefill is measured at depth 0 only",)
    return Profile(
        schema=profiles.SCHEMA,
        bundle=Identity(digest=manifest.digest, bytes=manifest.bytes, bits_per_weight=manifest.bits_per_weight),
        model=manifest.model,
        generation=manifest.generation,
        recipe=manifest.recipe,
        backend=manifest.backend,
        provider=profiles.provider(speed.placement),
        placement=speed.placement,
        target=target.name,
        tools=(f"edgeq {VERSION}", *(f"{name} {importlib.metadata.version(name)}" for name in engine)),
        threads=physical_cores(),
        machine=machine,
        load=load,
        first_token_s=first_token_s,
        first_token_from=first_token_from,
        prefill=rows.prefill(prefills),
        decode=rows.decode(decodes),
        speculation=rows.speculation(speed.guessed, plan.repetitions) or None,
        speculation_reason=speed.guessed_reason,
        memory=_memory(manifest, speed),
        energy=speed.energy,
        accuracy=loss,
        accuracy_reason=no_loss,
        sustained=None,
        sustained_reason="no long run was made",
        health=rows.health(done, speed.health_reason),
        valid=valid,
        grade=grade,
        reasons=reasons,
    )


def _check(plan: Plan, manifest: bundle.Bundle) -> None:
    """Raise UsageFault when a figure of the plan is impossible, or longer than the bundle's context."""
    if plan.accuracy not in _ACCURACY:
        raise UsageFault(f"accuracy {plan.accuracy!r} is unknown", why=f"Known: {', '.join(_ACCURACY)}.")
    if not plan.prompts or min(plan.prompts) < 1 or not plan.depths or min(plan.depths) < 0:
        raise UsageFault("a profile needs prompts of at least 1 token and depths of at least 0")
    if plan.tokens < 2 or plan.repetitions < 1:
        raise UsageFault("a profile needs at least 2 tokens to decode and 1 repetition")
    longest = max(*plan.prompts, *plan.depths, 1)
    if longest + plan.tokens > manifest.context:
        raise UsageFault(
            f"{longest} tokens and {plan.tokens} more do not fit the bundle's context of {manifest.context}",
            run="build with a longer --context, or profile with shorter -p, -d and -n",
        )


def _first(
    children: process.Children, folder: Path, manifest: bundle.Bundle, machine: Machine, placement: Sequence[Placement]
) -> tuple[float | None, str | None]:
    """Seconds of the first load and its first token with no kernel compiled before, or why that was not measured."""
    if manifest.provider == "cpu":
        return None, "nothing is compiled on loading for the CPU"
    total = sum(place.layers for place in placement)
    there = sum(place.layers for place in placement if place.provider == manifest.provider)
    if not there or there < total:
        return None, f"{there} of {total} layers run on {manifest.provider}"
    if machine.os.startswith("macOS"):
        return None, "macOS keeps compiled kernels itself, and cannot be told to forget them"
    with tempfile.TemporaryDirectory() as empty:
        environment = _CACHES_OFF | dict.fromkeys(_CACHE_FOLDERS, empty)
        return children.run(messages.FirstJob(folder=str(folder)), messages.First, environment).seconds, None


def _accuracy(
    children: process.Children, folder: Path, plan: Plan, full_reference: Path | None
) -> tuple[Accuracy | None, str | None]:
    """Accuracy loss, or the reason why it was not measured."""
    if plan.accuracy == "none":
        return None, "not asked for"
    if plan.accuracy == "full" and full_reference is None:
        return None, "there is no full reference"
    reference = full_reference or folder / bundle.REFERENCE
    if not reference.is_file():
        return None, f"the bundle holds no {bundle.REFERENCE}"
    job = messages.AccuracyJob(folder=str(folder), reference=str(reference))
    return children.run(job, messages.Loss).accuracy, None


def _memory(manifest: bundle.Bundle, speed: messages.Speed) -> Memory:
    """Peaks of the engine's process, and what it says it holds on GPUs; the KV cache is arithmetic on the shape."""
    held = [place.bytes for place in speed.placement if place.provider != "cpu"]
    device = sum(size for size in held if size is not None) or None
    reasons = [speed.memory_reason]
    if device is None:
        reasons.append(f"device: no counter of its own for provider {profiles.provider(speed.placement)}")
    cache = None
    if manifest.backend == "null":
        reasons.append("KV cache: the null backend has none")
    else:
        values = model.read_config(manifest.config).kv_bytes_per_token(1)
        cache = int(values * _value_bytes(manifest))
    return Memory(
        peak_rss_bytes=speed.peak_rss_bytes,
        load=speed.load,
        prefill=speed.prefill,
        decode=speed.decode,
        device_peak_bytes=device,
        kv_cache_bytes_per_token=cache,
        reason="; ".join(reason for reason in reasons if reason) or None,
    )


def _value_bytes(manifest: bundle.Bundle) -> float:
    """Bytes of one key or value in the cache."""
    bits = recipe.parse(manifest.recipe).kv_bits
    if bits == 8 and manifest.backend == "llamacpp":
        return _Q8_0_BYTES
    half = (manifest.backend, manifest.provider) == ("onnx", "cuda")  # whose graph is in float16
    return _KV_BYTES[16 if half else bits]
