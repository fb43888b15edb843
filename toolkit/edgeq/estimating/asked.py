"""`edgeq estimate`: from what people write to the arguments of an estimate."""

from __future__ import annotations

import re
from pathlib import Path

import msgspec

from edgeq import backends, data, detect, profiles, recipe, size, sources
from edgeq.errors import CorruptInput, UnsupportedModel, UsageFault
from edgeq.estimating import anchors, formats, published, rates
from edgeq.estimating.estimate import Estimate, estimate
from edgeq.model import Model
from edgeq.profiles import Profile
from edgeq.recipe import Recipe
from edgeq.target import Target

CONTEXT = 4096
_PROFILE = "edgeq profile BUNDLE --save"
_RECIPE = re.compile(r"w\d|mix|.+-e")  # no published quantization begins so
BITS_PER_WEIGHT = (1, 64)
"""Of a file: what is outside is no size of this model, its vision tower counted."""


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
    published figures; auto: the target's first that holds the recipe. anchor: file of a profile, else the
    largest model that was measured on the target is taken.
    Raises UsageFault for unknown words, for a recipe that the backend cannot hold, for a runtime without figures of the
    target's API and for a size that cannot be the model's; UnsupportedModel for a model that the backend does not run;
    and what `sources.configured`, `profiles.read` and `estimate` raise.
    """
    device = detect.resolve(target)
    name, shape = sources.configured(model, offline=offline)
    like = recipe_name
    if weights_bytes is not None:
        _check_size(shape, name, weights_bytes)
        like = formats.name_of_size(shape, weights_bytes) if recipe_name == "auto" else recipe_name
    runtime = _first(device, shape, like) if backend == "auto" else rates.canonical(backend)
    _check_runtime(device, runtime)
    tokens = min(CONTEXT, shape.context) if context is None else context
    if not 0 <= depth <= tokens <= shape.context:
        least = min(max(tokens, depth), shape.context)
        raise UsageFault(
            f"--context {tokens} with --depth {depth} is not possible",
            why=f"{name} has {shape.context} tokens of context at most, and --depth is within --context.",
            run=f"edgeq estimate ... --context {least}" + (f" --depth {min(depth, least)}" if depth else ""),
        )
    if recipe_name == "auto" and weights_bytes is None and runtime not in backends.NAMES:
        recipe_name = formats.usual(runtime)
    published_bytes = formats.weight_bytes(shape, recipe_name)
    if published_bytes:
        wanted = _published(recipe_name, runtime)
    elif recipe_name == "auto" and weights_bytes is not None:
        wanted = recipe.parse(formats.recipe_like(like))
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
        weights_bytes=published_bytes if weights_bytes is None else weights_bytes,
        anchor=_anchor(device, runtime) if anchor is None else _read(anchor),
    )
    return msgspec.structs.replace(found, recipe=recipe_name) if published_bytes else found


def _anchor(target: Target, runtime: str) -> Profile | None:
    return anchors.by_backend(anchors.measured_rows(target).values()).get(runtime)


def _read(path: Path) -> Profile:
    if not path.is_file():
        raise UsageFault(f"{data.readable(path)}: no such profile", run=_PROFILE)
    try:
        return profiles.read(path)
    except CorruptInput as fault:
        raise CorruptInput(fault.what, why=fault.why, run=_PROFILE) from fault


def _check_runtime(target: Target, runtime: str) -> None:
    """Raise UsageFault for a runtime of others without a figure of the device, its family or its API."""
    if runtime in (*backends.NAMES, *target.calibration):
        return
    api = rates.api_of(target, runtime)
    able = {row.runtime for row in published.read().rows if row.api == api}
    if runtime not in able:
        known = sorted(able | {*target.backends, *target.calibration})
        raise UsageFault(
            f"there are no published figures of {runtime} on {api}, which {target.name} has",
            why=f"Estimated there: {', '.join(known)}.",
            run=f"edgeq estimate ... --target {target.name} --backend {target.backends[0]}",
        )


def _check_size(shape: Model, name: str, weights_bytes: int) -> None:
    bits, (least, most) = 8 * weights_bytes / shape.parameters, BITS_PER_WEIGHT
    if not least <= bits <= most:
        raise UsageFault(
            f"--weights-bytes {weights_bytes} is not possible",
            why=f"{name} has {shape.parameters / 1e9:.3g} billion weights: that is {bits:.2g} bits for each.",
            run="edgeq estimate ... --weights-bytes BYTES, or a size such as 450MB",
        )


def _first(target: Target, shape: Model, recipe_name: str) -> str:
    """The target's first backend that holds a recipe or a published quantization, its very first where none does."""
    return next((each for each in target.backends if _holds(shape, target, each, recipe_name)), target.backends[0])


def _holds(shape: Model, target: Target, runtime: str, name: str) -> bool:
    if name == "auto":
        return True
    try:
        if formats.known(name):
            _published(name, runtime)
        else:
            _check_held(shape, target, _parse(name), runtime)
    except (UsageFault, UnsupportedModel):
        return False
    return True


def _published(name: str, runtime: str) -> Recipe:
    """Recipe like a published quantization; raises UsageFault for GGML's blocks and a backend that has none."""
    wanted = recipe.parse(formats.recipe_like(name))
    if wanted.body.is_ggml and runtime in ("onnx", "mlc"):
        raise UsageFault(f"{name}: {runtime} does not know GGML's layouts", run="edgeq estimate ... --backend llamacpp")
    return wanted


def _check_held(shape: Model, target: Target, wanted: Recipe, runtime: str) -> None:
    """Raise what a build with the backend would for a recipe that it cannot hold, in words of an estimate."""
    try:
        if runtime in backends.NAMES:
            backends.check(runtime, shape, wanted, target)
        else:
            size.check_groups(shape, wanted)
    except (UsageFault, UnsupportedModel) as fault:
        raise type(fault)(fault.what, why=fault.why, run=fault.run.replace("edgeq build", "edgeq estimate")) from fault


def _parse(name: str) -> Recipe:
    try:
        return recipe.parse(name)
    except UsageFault as fault:
        why = fault.why
        if not _RECIPE.match(name):
            nearest = data.suggested(name, formats.NAMES)
            why = f"{why} Published quantizations: {', '.join(formats.NAMES)}. {nearest}".rstrip()
        raise UsageFault(fault.what, why=why, run=fault.run) from fault


def _recipe(shape: Model, target: Target, runtime: str, name: str) -> Recipe:
    """Recipe by name, or the target's first that the backend holds: `onnx` keeps no cache in 16 bits."""
    if name != "auto":
        wanted = _parse(name)
        if wanted.mixed and wanted.mixed_bits is None:
            raise UsageFault(
                f"{wanted} has no size before its budget is known",
                run=f"edgeq estimate ... --recipe mix4.5-{wanted.method}",
            )
        _check_held(shape, target, wanted, runtime)
        return wanted
    suited = [each for each in map(recipe.parse, target.recipes) if runtime != "onnx" or each.kv_bits != 16]
    return next((each for each in suited if size.divides(shape, each)), recipe.parse("w16"))
