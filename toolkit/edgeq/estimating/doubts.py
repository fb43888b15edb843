"""What makes an estimate less certain than its numbers look: figures of others or of another API, a guessed peak."""

from __future__ import annotations

import re

from edgeq import backends
from edgeq.estimating import rates
from edgeq.target import Target

_API = re.compile(r"scripts/refit: [\w.-]+ on (?P<api>\w+)")
_ALIKE = re.compile(r"\d+ of (it|the device|its family)\b")


def of(target: Target, backend: str, source: str) -> list[str]:
    """Sentences about a rate's source on a target, and about where its peak arithmetic is from."""
    found = of_figures(target, backend, source)
    part = target.cpu if rates.api_of(target, backend) == "cpu" else target.gpu
    if part and part.fp16_flop_per_s:
        found.append(f"the peak arithmetic is {part.fp16_flop_per_s.source}")
    return found


def of_figures(target: Target, backend: str, source: str) -> list[str]:
    """Sentences about the published figures that a rate is from."""
    found = []
    api, fitted = rates.api_of(target, backend), _API.match(source)
    if backend in backends.NAMES and fitted and fitted["api"] != api:
        found.append(f"the figures are of {fitted['api']}, edgeq's {backend} runs on {api} there")
    if not _ALIKE.search(source):
        found.append(f"no published figure is of {target.name} or of a device like it")
    return found
