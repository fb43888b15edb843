"""The engines that edgeq builds for, by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from edgeq import data, size
from edgeq.errors import UnsupportedModel, UsageFault
from edgeq.model import Model
from edgeq.recipe import Recipe

if TYPE_CHECKING:
    from edgeq.backends.base import Backend

_MODULES = {
    "onnx": "edgeq.backends.onnx",
    "llamacpp": "edgeq.backends.llamacpp",
    "mlc": "edgeq.backends.mlc",
    "null": "edgeq.backends.null",
}
NAMES = tuple(_MODULES)
_SPELLINGS = {"llama.cpp": "llamacpp"}


def canonical(name: str) -> str:
    """Name that a backend is recorded under, however people spell it: `llama.cpp` is `llamacpp`."""
    return _SPELLINGS.get(name, name)


def get(name: str) -> Backend:
    """Backend of that name; raises UsageFault for any other."""
    name = canonical(name)
    if name not in _MODULES:
        raise UsageFault(f"{name!r} is not a backend", why=data.near(name, NAMES))
    return cast("Backend", importlib.import_module(_MODULES[name]))


def holds(name: str, model: Model, recipe: Recipe) -> bool:
    """Whether a backend's format has room for a recipe of a model, and its runtime loads the result."""
    if not size.divides(model, recipe):
        return False
    try:
        get(name).check(model, recipe)
    except (UsageFault, UnsupportedModel):
        return False
    return True
