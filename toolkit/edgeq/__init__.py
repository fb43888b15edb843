"""edgeq: quantize, build, check and measure small Qwen models for edge devices."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.version import VERSION

if TYPE_CHECKING:
    from edgeq.building import Built
    from edgeq.estimating.estimate import Estimate
    from edgeq.profiles import Profile
    from edgeq.recommending.document import Recommendation

__version__ = VERSION
__all__ = ["__version__", "build", "estimate", "profile", "recommend"]


def build(model: str | None = None, *, target: str, recipe: str = "auto", **options: Any) -> Built:
    """Build a bundle, of what `recommend` chooses without a model.

    `options` are those of `planning.plan`, and the errors are its and `building.build`'s.
    """
    from edgeq import building, planning

    return building.build(planning.plan(model, target=target, recipe_name=recipe, **options), lambda *_: None)


def recommend(target: str, *, context: int | None = None, **constraints: Any) -> Recommendation:
    """Which model, recipe and backend suit a device; `constraints`: fields of `recommending.document.Constraints`.

    The choice is None when no candidate meets them all. Raises UsageFault for unknown words.
    """
    from edgeq.recommending import recommend
    from edgeq.recommending.document import Constraints

    return recommend.recommend(target, context=context, wanted=Constraints(**constraints))


def profile(bundle: str | Path, *, target: str | None = None, **options: Any) -> Profile:
    """Measure a bundle on this machine; `options` are those of `profiling.run.profile`, the errors too."""
    from edgeq.profiling import run

    return run.profile(Path(bundle), target=target, progress=lambda *_: None, **options)


def estimate(model: str, *, target: str, recipe: str = "auto", **options: Any) -> Estimate:
    """Estimate bytes and speed on a device; `options` are those of `estimating.asked.ask`, the errors too."""
    from edgeq.estimating import asked

    return asked.ask(model, target=target, recipe_name=recipe, **options)
