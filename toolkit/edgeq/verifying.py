"""Verify: every digest of a bundle, then load it here and compare it with its recorded reference."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgeq import accuracy, backends, bundle, data, gate
from edgeq.backends.base import Progress
from edgeq.bundle import Gate


class Verified(msgspec.Struct, frozen=True, kw_only=True):
    """The document that `edgeq verify --json` prints: the gate run again on this machine beside the build's own."""

    bundle: str
    digest: str
    files: int
    gate: Gate
    gate_at_build: Gate


def verify(folder: Path, progress: Progress) -> Verified:
    """Check a bundle's bytes and its accuracy on this machine.

    Raises DigestMismatch at a changed, missing or extra file, GateFailed when the loss is above the bundle's limit.
    """
    made = bundle.read(folder)
    bundle.verify_files(folder, made)
    reference = accuracy.load(folder / bundle.REFERENCE)
    session = backends.get(made.backend).load(folder, made)
    try:
        result = gate.check(reference, session, made.gate.max_loss, made.gate.kl_weights_only, progress)
    finally:
        session.close()
    gate.require(result, f"{folder}", "build the bundle again; if it fails again, report the machine with edgeq doctor")
    return Verified(
        bundle=data.readable(folder), digest=made.digest, files=len(made.files), gate=result, gate_at_build=made.gate
    )
