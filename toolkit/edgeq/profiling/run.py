"""Profile: check that bundle, target and machine belong together, then measure and maybe save."""

from __future__ import annotations

import dataclasses
import tempfile
from collections.abc import Callable
from pathlib import Path

from edgeq import accuracy, bundle, data, detect, profiles, sources
from edgeq.checkpoint import Checkpoint
from edgeq.errors import DigestMismatch, InvalidMeasurement, UsageFault
from edgeq.machine import this_machine
from edgeq.profiles import Profile
from edgeq.profiling import measure


def profile(
    folder: Path,
    *,
    target: str | None,
    progress: Callable[[str, int, int], None],
    plan: measure.Plan | None = None,
    text: Path | None = None,
    save: bool = False,
) -> Profile:
    """Row of a bundle on this machine; `target` is the bundle's own when None.

    Raises DigestMismatch when the bundle changed, InvalidMeasurement when this machine is not the target, and what
    measuring raises. `plan.accuracy` full (or a `text`) runs the float32 reference here and needs the checkpoint.
    """
    plan = plan or measure.Plan()
    if text is not None:
        plan = dataclasses.replace(plan, accuracy="full")
    made = bundle.read(folder)
    bundle.verify_files(folder, made)
    machine = this_machine()
    device = detect.resolve(target or made.target, machine)
    if why := detect.mismatch(device, machine):
        raise InvalidMeasurement(
            f"this machine is not {device.name}",
            why=f"{why} A profile holds only what the named device really did.",
            run=f"edgeq profile {folder} --target host, or run edgeq profile on the device",
        )
    with tempfile.TemporaryDirectory() as scratch:
        full = _full_reference(made, text, Path(scratch), progress) if plan.accuracy == "full" else None
        row = measure.profile(folder, device, machine, plan, progress=progress, full_reference=full)
    if save:
        profiles.write(row, saved_path(row))
    return row


def saved_path(row: Profile) -> Path:
    """Where `save` keeps a row: profiles/<target>/<model>.<recipe>.<backend>.json below the current folder."""
    return profiles.path(row.target, row.model, row.recipe, row.backend, Path("profiles"))


def _full_reference(
    made: bundle.Bundle, text: Path | None, scratch: Path, progress: Callable[[str, int, int], None]
) -> Path:
    """Reference over more of the held-out text (or over the user's), as a file."""
    from edgeq import reference

    name = made.source.name if made.source.kind != "hub" else f"{made.source.name}@{made.source.revision}"
    try:
        origin = sources.find(name, offline=True)
    except UsageFault as error:
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
    words = (text or data.folder("demo") / "heldout.txt").read_text(encoding="utf-8")
    path = scratch / bundle.REFERENCE
    accuracy.save(reference.full(checkpoint, words, progress), path)
    return path
