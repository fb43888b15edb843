"""A profile: what was measured of one bundle on one machine, as one JSON document.

Quantities are in base units, their unit in the key; what was not measured is null, with the `reason` beside it.
"""

from __future__ import annotations

import os
import re
from collections.abc import Sequence
from pathlib import Path

import msgspec

from edgeq import data
from edgeq.errors import CorruptInput, MissingTool
from edgeq.loss import Accuracy
from edgeq.machine import Machine

SCHEMA = 1


class Spread(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Median of samples, its 95 % interval, coefficient of variation (null below two samples), and the samples."""

    median: float
    low: float
    high: float
    cv: float | None
    samples: tuple[float, ...]


class Identity(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Which bundle: digest of its manifest, bytes that the device needs, average bits of a weight."""

    digest: str
    bytes: int
    bits_per_weight: float


class Load(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds from nothing to a session in a new process, the engine's import included.

    warm: files in the page cache; cold: evicted from it first. first: as warm, but up to one token, with no kernel
    compiled before: what someone waits for who starts a bundle for the first time, or after the driver changed.
    """

    warm_s: float
    cold_s: float | None
    reason: str | None
    first_s: float | None = None
    first_reason: str | None = None


class Prefill(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speed of reading a prompt of so many tokens, after `depth` tokens."""

    tokens: int
    depth: int
    tokens_per_s: Spread


class Gaps(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Seconds between one token and the next (inter-token latency), over all repetitions that count."""

    p50: float
    p90: float
    p99: float
    max: float


class Decode(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speed of writing n = `tokens` one by one after `depth` tokens (one at depth 0): (n - 1) / (t_last - t_first)."""

    tokens: int
    depth: int
    tokens_per_s: Spread
    gap_s: Gaps


class Speculation(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Speed of writing n = `tokens` with some guessed and checked several in a step, and of plain decoding beside it.

    The two ways took turns on the same prompts of `prompt` tokens. method: "prompt lookup", or "prediction head"
    (Qwen3.5's own for several tokens). text: "ordinary" (held-out text to be continued) or
    "repeating" (a shorter passage of it, two and a half times). tokens_per_step: mean; plain decoding writes 1. same:
    share of the continuations whose tokens were all those of plain decoding. valid: enough were undisturbed.
    """

    method: str
    text: str
    prompt: int
    tokens: int
    tokens_per_s: Spread
    plain_tokens_per_s: Spread
    tokens_per_step: float
    same: float
    valid: bool
    reason: str | None


class Phase(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Peak resident bytes during a phase; anonymous and file-backed bytes as they are at its end."""

    rss_bytes: int | None
    anonymous_bytes: int | None
    file_bytes: int | None


class Memory(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Memory of the process that ran the engine, its tokenizer not loaded."""

    peak_rss_bytes: int | None
    load: Phase
    prefill: Phase
    decode: Phase
    device_peak_bytes: int | None
    kv_cache_bytes_per_token: int | None
    reason: str | None


class Placement(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """What of a loaded bundle lives on one device.

    provider: the API ("cpu", "cuda", "vulkan", ...); device: its own name; layers: of the model's, the output counted
    as one more; bytes: buffers that the engine says it holds there; software: a GPU that the CPU imitates.
    """

    provider: str
    device: str
    layers: int
    bytes: int | None
    software: bool = False


class Energy(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Joules per token, idle power included; `scope` is the part of the machine that the sensor sees."""

    decode_j_per_token: float | None
    prefill_j_per_token: float | None
    sensor: str | None
    scope: str | None
    reason: str | None


class Repetition(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One timed phase and the machine's state during it.

    wait: share of runnable time spent waiting for a core; steal: share of busy time that the hypervisor took;
    throttled: share of time that a CPU quota took.
    """

    phase: str
    tokens: int
    depth: int
    seconds: float
    tokens_per_s: float
    wait: float | None
    steal: float | None
    throttled: float | None
    temperature_c: float | None
    clock_hz: int | None
    throttle_events: int | None
    valid: bool
    reason: str | None


class Health(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """Worst wait, steal, temperature and clock (of the fastest core), all throttle events, and every repetition."""

    wait: float | None
    steal: float | None
    temperature_c: float | None
    clock_hz: int | None
    throttle_events: int | None
    reason: str | None
    repetitions: tuple[Repetition, ...]


class Profile(msgspec.Struct, frozen=True, kw_only=True, forbid_unknown_fields=True):
    """One row: identity, speed, memory, energy and accuracy of a bundle on a machine, and the verdict.

    `tools` are edgeq and the engine's packages in the versions that ran, `threads` what the engine was given.
    `valid` says whether enough repetitions were undisturbed; grade A or B may be compared, C is only reported.
    `sustained` needs a long run, which this version does not make.
    """

    schema: int
    bundle: Identity
    model: str
    generation: str
    recipe: str
    backend: str
    provider: str
    placement: tuple[Placement, ...] = ()
    target: str
    tools: tuple[str, ...]
    threads: int
    machine: Machine
    load: Load
    first_token_s: Spread
    first_token_from: str
    prefill: tuple[Prefill, ...]
    decode: tuple[Decode, ...]
    speculation: tuple[Speculation, ...] | None = None
    speculation_reason: str | None = "not measured by the version of edgeq that made this row"
    memory: Memory
    energy: Energy
    accuracy: Accuracy | None
    accuracy_reason: str | None
    sustained: None
    sustained_reason: str
    health: Health
    valid: bool
    grade: str
    reasons: tuple[str, ...]


def provider(placement: Sequence[Placement]) -> str:
    """API that most layers run on; with the device's name where that is no real one, as in `vulkan (llvmpipe)`."""
    most = max(placement, key=lambda place: place.layers)
    return f"{most.provider} ({most.device.partition(' ')[0]})" if most.software else most.provider


def require_accelerator(placement: Sequence[Placement], target: str, provider: str) -> None:
    """Raise MissingTool when a layer of a bundle stayed on the CPU, or none is known to be elsewhere.

    `target` and `provider` are what the bundle is made for.
    """
    if provider == "cpu":
        raise MissingTool(
            "this bundle is made for the CPU", run="edgeq build ... --backend llamacpp, for a target with a GPU"
        )
    total = sum(place.layers for place in placement)
    if not total:
        raise MissingTool("the engine does not say where its layers run", run=f"edgeq doctor --target {target}")
    left = [place for place in placement if place.provider == "cpu" and place.layers]
    if left:
        raise MissingTool(
            f"{left[0].layers} of {total} layers run on the CPU ({left[0].device})",
            why="--require-accelerator asks for a GPU that runs all of them.",
            run=f"edgeq doctor --target {target}",
        )


def path(target: str, model: str, recipe: str, backend: str, root: Path) -> Path:
    """Where the profile of this combination belongs below `root`."""
    target, model, recipe, backend = (_file_name(word) for word in (target, model, recipe, backend))
    return root / target / f"{model}.{recipe}.{backend}.json"


def _file_name(word: str) -> str:
    return re.sub(r"[^\w.+-]+", "-", word).strip(".") or "unnamed"


def write(profile: Profile, path: Path) -> None:
    """Write a profile as JSON, in one step that leaves no half file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.write_bytes(data.to_json(profile))
    partial.replace(path)


def read(path: Path) -> Profile:
    """Profile that `write` wrote; raises CorruptInput when a field is missing, unknown or of another type."""
    profile = data.read_json(path, Profile)
    if profile.schema != SCHEMA:
        raise CorruptInput(f"{path}: schema {profile.schema} is unknown", why=f"This edgeq reads schema {SCHEMA}.")
    return profile
