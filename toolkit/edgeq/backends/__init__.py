"""The engines that edgeq builds for, by name."""

from __future__ import annotations

import importlib
from typing import cast

from edgeq import data
from edgeq.backends.base import Backend
from edgeq.errors import MissingTool, UsageFault

_MODULES = {
    "onnx": "edgeq.backends.onnx",
    "llamacpp": "edgeq.backends.llamacpp",
    "null": "edgeq.backends.null",
}
NAMES = tuple(_MODULES)
_SPELLINGS = {"llama.cpp": "llamacpp"}
_NOT_YET = ("mlc",)


def canonical(name: str) -> str:
    """Name that a backend is recorded under, however people spell it: `llama.cpp` is `llamacpp`."""
    return _SPELLINGS.get(name, name)


def get(name: str) -> Backend:
    """Backend of that name; raises MissingTool for one that is not part of this version, UsageFault for others."""
    name = canonical(name)
    if name in _NOT_YET:
        raise MissingTool(f"backend {name} is not part of this edgeq", why=f"It has {', '.join(NAMES)}.")
    if name not in _MODULES:
        raise UsageFault(f"{name!r} is not a backend", why=data.near(name, NAMES))
    return cast(Backend, importlib.import_module(_MODULES[name]))
