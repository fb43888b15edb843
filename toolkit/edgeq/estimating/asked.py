"""`edgeq estimate`: from what people write to the arguments of an estimate."""

from __future__ import annotations

from pathlib import Path

import msgspec

from edgeq import backends, data, detect, profiles, recipe, size, sources
from edgeq.errors import UsageFault
from edgeq.estimating import anchors, formats, rates
from edgeq.estimating.estimate import Estimate, estimate
from edgeq.model import Model
from edgeq.profiles import Profile
from edgeq.recipe import Recipe
from edgeq.target import Target

CONTEXT = 4096


def ask(
    model: str,
    *,
    target: str,
    recipe_name: str = "auto",
    backend: str = "auto",
    context: int | None = None,
    depth: int = 0,
    weights_bytes: int | None = None,
    anchor: Path | None = None,
    offline: bool = False,
) -> Estimate:
    """Estimate of a model by name, hub id or folder with a `config.json`; of a hub id only that file is fetched.

    recipe_name: also the name of a published quantization such as Q4_K_M; auto: the target's best that the backend
    holds, for a file of `weights_bytes` what has its bits, for other runtimes a usual one. backend: also a runtime with
    published figures; auto: the target's first. anchor: file of a profile, else the largest model that was measured on
    the target is taken.
    Raises UsageFault for unknown words and what `sources.configured`, `profiles.read` and `estimate` raise.
    """
    device = detect.resolve(target)
    name, shape = sources.configured(model, offline=offline)
    runtime = rates.canonical(device.backends[0] if backend == "auto" else backend)
    tokens = min(CONTEXT, shape.context) if context is None else context
    if not 0 <= depth <= tokens <= shape.context:
        raise UsageFault(
            f"--context {tokens} with --depth {depth} is not possible",
            why=f"{name} has {shape.context} tokens of context at most, and --depth is within --context.",
        )
    if recipe_name == "auto" and weights_bytes is None and runtime not in backends.NAMES:
        recipe_name = formats.usual(runtime)
    published = formats.weight_bytes(shape, recipe_name)
    if published:
        wanted = recipe.parse(formats.recipe_like(recipe_name))
    elif recipe_name == "auto" and weights_bytes is not None:
        wanted = recipe.parse(formats.recipe_like(formats.name_of_size(shape, weights_bytes)))
    else:
        wanted = _recipe(shape, device, runtime, recipe_name)
    found = estimate(
        shape,
        name,
        wanted,
        device,
        runtime,
        context=tokens,
        depth=depth,
        weights_bytes=published if weights_bytes is None else weights_bytes,
        anchor=_anchor(device, runtime) if anchor is None else _read(anchor),
    )
    return msgspec.structs.replace(found, recipe=recipe_name) if published else found


def _anchor(target: Target, runtime: str) -> Profile | None:
    return anchors.by_backend(anchors.measured_rows(target).values()).get(runtime)


def _read(path: Path) -> Profile:
    if not path.is_file():
        raise UsageFault(f"{data.readable(path)}: no such profile", run="edgeq profile BUNDLE --save")
    return profiles.read(path)


def _recipe(shape: Model, target: Target, runtime: str, name: str) -> Recipe:
    """Recipe by name, or the target's first that the backend holds: `onnx` keeps no cache in 16 bits."""
    if name != "auto":
        wanted = recipe.parse(name)
        size.check_groups(shape, wanted)
        return wanted
    suited = [each for each in map(recipe.parse, target.recipes) if runtime != "onnx" or each.kv_bits != 16]
    return next((each for each in suited if size.divides(shape, each)), recipe.parse("w16"))
