"""Which share of its roofline a runtime reaches on a device."""

from __future__ import annotations

from edgeq.estimating.speed import Rate
from edgeq.target import Target


def find(target: Target, backend: str) -> Rate:
    """Rate of a runtime on a target."""
    return Rate(0.65, 1e-4, 2.0, 0.3, 3.0, f"no figure of {backend} on {target.name} is known")
