"""Profile: check that bundle, target and machine belong together, then measure and maybe save."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgeq import accuracy, bundle, data, detect, profiles, sources
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, DigestMismatch, InvalidMeasurement, MissingTool, UsageFault
from edgeq.machine import Machine, this_machine
from edgeq.profiles import Profile
from edgeq.profiling import measure
from edgeq.target import Target


def profile(
    folder: Path,
    *,
    target: str | None,
    progress: Callable[[str, int, int], None],
    plan: measure.Plan | None = None,
    text: Path | None = None,
    save: bool = False,
) -> Profile:
    """Row of a bundle on this machine; `target` is the bundle's own when None. `save` keeps a valid row only.

    Raises DigestMismatch when the bundle changed, InvalidMeasurement when this machine is not the target, and what
    measuring raises. `plan.accuracy` full (or a `text`) runs the float32 reference here and needs the checkpoint.
    """
    plan = plan or measure.Plan()
    words = data.held_out() if text is None else _read(text)
    if text is not None:
        plan = dataclasses.replace(plan, accuracy="full")
    made = bundle.read(folder)
    bundle.verify_files(folder, made)
    machine = this_machine()
    device = _device(target, made.target, machine)
    if why := detect.mismatch(device, machine):
        raise InvalidMeasurement(
            f"this machine is not {device.name}",
            why=f"{why} A profile holds only what the named device really did.",
            run=f"run edgeq profile on the device; {_here(made, folder)}",
        )
    with tempfile.TemporaryDirectory() as scratch:
        full = _full_reference(made, words, Path(scratch), progress) if plan.accuracy == "full" else None
        row = measure.profile(folder, device, machine, plan, progress=progress, full_reference=full)
    if save and row.valid:
        profiles.write(row, saved_path(row))
    return row


def _here(made: bundle.Bundle, folder: Path) -> str:
    """How to measure on this machine instead."""
    if made.provider in ("cpu", "null"):
        return f"for this machine: edgeq profile {folder} --target host"
    return f"for this machine: edgeq build {made.model} --target host, then profile that"


def _device(target: str | None, recorded: str, machine: Machine) -> Target:
    """Target that was asked for, else the bundle's own; a bundle for a target of one's own knows only its name."""
    try:
        return detect.resolve(target or recorded, machine)
    except UsageFault as error:
        if target is not None:
            raise
        run = "give its file with --target FILE"
        raise UsageFault(f"the bundle's target {recorded!r} is not a shipped one", why=error.why, run=run) from error


def _read(text: Path) -> str:
    try:
        return text.read_text(encoding="utf-8")
    except OSError as error:
        raise UsageFault(f"{text}: {error.strerror}", run="edgeq profile ... --text FILE") from error
    except UnicodeDecodeError as error:
        raise CorruptInput(f"{text}: not UTF-8 text", why=str(error)) from error


def saved_path(row: Profile) -> Path:
    """Where `save` keeps a row: profiles/<target>/<model>.<recipe>.<backend>.json below the current folder."""
    return profiles.path(row.target, row.model, row.recipe, row.backend, Path("profiles"))


def _full_reference(made: bundle.Bundle, words: str, scratch: Path, progress: Callable[[str, int, int], None]) -> Path:
    """Reference over much of a text, as a file."""
    from edgeq.walk import footprint, windows
    from edgeq.walk import run as walk

    name = made.source.name if made.source.kind != "hub" else f"{made.source.name}@{made.source.revision}"
    try:
        origin = sources.find(name, offline=True)
    except (UsageFault, MissingTool) as error:
        raise UsageFault(
            f"the float32 reference needs the checkpoint {name}, which is not here",
            why=error.what,
            run=f"edgeq profile from the folder that holds {name}, or --accuracy quick: its reference is in the bundle",
        ) from error
    checkpoint = Checkpoint.open(origin.folder)
    if checkpoint.files() != made.source.files:
        raise DigestMismatch(
            f"{origin.folder}: not the checkpoint that the bundle was made of",
            why="Its files have other digests than the bundle recorded.",
            run="edgeq profile ... --accuracy quick, or build again from this checkpoint",
        )
    path = scratch / bundle.REFERENCE
    held = windows.full(checkpoint, words)
    footprint.require(checkpoint.model, held, None)
    accuracy.save(walk.reference(checkpoint, held, progress), path)
    return path
