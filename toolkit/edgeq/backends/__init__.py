"""The engines that edgeq builds for, by name."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, cast

from edgeq import data, size
from edgeq.errors import UnsupportedModel, UsageFault
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.target import Target

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


def check(name: str, model: Model, recipe: Recipe, target: Target | None = None) -> None:
    """Raise what says why a backend cannot hold a recipe of a model for a target; None: for any.

    UsageFault, with a recipe or a backend that works, or UnsupportedModel where the runtime does not load the model.
    """
    engine = get(name)
    if recipe.mixed and not engine.MIXED:
        raise UsageFault(f"{recipe}: {name} has one layout for all matrices", run="edgeq build ... --backend onnx")
    if not recipe.mixed:
        size.check_groups(model, recipe)
    engine.check(model, recipe)
    if target and engine.calibrates_cache(recipe) and engine.provider(target) != "cpu":
        raise UsageFault(
            f"{recipe}: the {name} backend keeps an 8-bit cache on processors only",
            why=f"It was not tried on {engine.provider(target)}, the provider of {target.name}.",
            run=f"edgeq build ... --recipe {str(recipe).removesuffix('-kv8')}"
            + (", or --backend llamacpp" if "llamacpp" in target.backends else ""),
        )


def holds(name: str, model: Model, recipe: Recipe, target: Target | None = None) -> bool:
    """Whether `check` raises nothing."""
    try:
        check(name, model, recipe, target)
    except (UsageFault, UnsupportedModel):
        return False
    return True
