"""A bundle: the folder that `edgeq build` makes, described and sealed by its `edgeq.json`."""

from __future__ import annotations

import hashlib
import platform
from pathlib import Path
from typing import Literal

import msgspec

from edgeq import data
from edgeq.errors import CorruptInput, DigestMismatch, UnsafeInput, UsageFault

MANIFEST = "edgeq.json"
REFERENCE = "reference.npz"
SCHEMA = 1


class File(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A file by its path inside the folder, its size in bytes and its SHA-256 in hex."""

    path: str
    bytes: int
    sha256: str


class Source(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Where the weights came from: `kind` is demo, folder or hub; `revision` the hub's commit."""

    kind: str
    name: str
    revision: str | None
    files: tuple[File, ...]


class Calibration(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """What matrices, or scales of a cache, were fitted to: bundled, self or a path.

    sha256: of the text, or of tokens that the model wrote.
    """

    source: str
    sha256: str
    tokens: int


class Gate(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Result of the accuracy gate: KL divergences in nats per token, agreement from 0 to 1.

    kl_weights_only is the loss of the quantized weights without the engine; `max_loss` the limit that was asked for.
    """

    passed: bool
    kl_mean: float | None
    kl_weights_only: float
    top1_agreement: float | None
    perplexity_reference: float | None
    perplexity: float | None
    reason: str | None
    max_loss: float
    tokens: int
    text_sha256: str
    ran_on: str

    @classmethod
    def failed(cls, reason: str, kl_weights_only: float, max_loss: float, text_sha256: str) -> Gate:
        """Result of a bundle whose loss could not be computed."""
        here = platform.machine()
        return cls(False, None, kl_weights_only, None, None, None, reason, max_loss, 0, text_sha256, here)


class MemoryPlan(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """Bytes that compiled code wants, read from the code: `temporary_bytes` of each function, at its longest input.

    state_bytes: of linear attention, whatever the number of tokens; None where the code does not say.
    """

    weights_bytes: int
    kv_cache_bytes_per_token: int
    state_bytes: int | None
    temporary_bytes: dict[str, int]


class Compiled(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What is known of compiled code.

    `kernels`: whether the device's own compiler took its kernels, in all or for want of that compiler not; None where
    there are none but the CPU's.
    """

    kernels: Literal["compiled", "unchecked"] | None
    memory: MemoryPlan


class Bundle(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True, omit_defaults=True):
    """Contents of `edgeq.json`; `config` is the text-only configuration of the checkpoint.

    `kernels` and `memory` are there where the model was compiled, as `Compiled` describes them; `layouts` and
    `predicted_loss`, in nats per token as run, where they were chosen within a budget.
    """

    schema: int
    digest: str
    model: str
    generation: str
    config: dict[str, object]
    source: Source
    recipe: str
    bits_per_weight: float
    target: str
    backend: str
    provider: str
    context: int
    tools: tuple[str, ...]
    notes: tuple[str, ...]
    files: tuple[File, ...]
    gate: Gate
    kernels: Literal["compiled", "unchecked"] | None = None
    memory: MemoryPlan | None = None
    calibration: Calibration | None = None
    layouts: dict[str, str] | None = None
    predicted_loss: float | None = None

    @property
    def bytes(self) -> int:
        """Bytes that the device needs to run: every file but the recorded reference."""
        return sum(file.bytes for file in self.files if file.path != REFERENCE)


def sha256(path: Path) -> str:
    """SHA-256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def files_in(folder: Path) -> tuple[File, ...]:
    """Every file below a folder but its manifest, sorted by path; raises UnsafeInput at a link."""
    found = []
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_symlink():
            raise UnsafeInput(f"{path}: a bundle may not hold links", why="A link can reach outside the folder.")
        if path.is_file() and name != MANIFEST:
            found.append(File(name, path.stat().st_size, sha256(path)))
    return tuple(found)


def seal(bundle: Bundle) -> Bundle:
    """The same bundle with its digest: SHA-256 of the manifest's JSON with an empty digest."""
    blank = msgspec.structs.replace(bundle, digest="")
    return msgspec.structs.replace(bundle, digest=hashlib.sha256(msgspec.json.encode(blank)).hexdigest())


def read(folder: Path) -> Bundle:
    """Manifest of a bundle folder, its own digest checked; the files are not read.

    Raises UsageFault when the folder is no bundle, CorruptInput or DigestMismatch when the manifest is damaged.
    """
    path = folder / MANIFEST
    if not path.is_file():
        raise UsageFault(
            f"{folder} is not a bundle", why=f"It holds no {MANIFEST}.", run="edgeq build MODEL --target host"
        )
    bundle = data.read_json(path, Bundle)
    if bundle.schema != SCHEMA:
        raise CorruptInput(f"{path}: schema {bundle.schema} is unknown", why=f"This edgeq reads schema {SCHEMA}.")
    if seal(bundle).digest != bundle.digest:
        raise DigestMismatch(f"{path}: changed after it was written", run="build the bundle again")
    return bundle


def verify_files(folder: Path, bundle: Bundle) -> None:
    """Check every file against the manifest; raises DigestMismatch at the first that is missing, extra or changed."""
    present = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if _is_entry(path)} - {MANIFEST}
    recorded = {file.path for file in bundle.files}
    if odd := sorted(present ^ recorded):
        state = "missing" if odd[0] in recorded else "not part of the bundle"
        raise DigestMismatch(f"{folder / odd[0]}: {state}", run="build the bundle again, or copy it again")
    for path in (folder / MANIFEST, *(folder / file.path for file in bundle.files)):
        if path.is_symlink() or not path.is_file():
            raise DigestMismatch(f"{path}: is a link or no plain file", run="copy the bundle again, links followed")
    for file in bundle.files:
        path = folder / file.path
        if path.stat().st_size != file.bytes or sha256(path) != file.sha256:
            raise DigestMismatch(f"{path}: changed after the build", run="build the bundle again, or copy it again")


def _is_entry(path: Path) -> bool:
    """Whether a path is anything but a real folder: a link to one counts, since it can reach outside."""
    return path.is_symlink() or not path.is_dir()
