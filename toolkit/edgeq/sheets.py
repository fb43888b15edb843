"""What is known before anything is built: a model's sheet, and a build's plan, as documents."""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from edgeq import backends, catalog, data, detect, recipe, size, sources
from edgeq.accelerators import Accelerator
from edgeq.errors import UsageFault
from edgeq.machine import Machine
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.target import HOST

if TYPE_CHECKING:
    from edgeq.choosing import Prediction
    from edgeq.planning import Plan


class BackendSize(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted weights of a model under one recipe as one backend stores them."""

    backend: str
    bits_per_weight: float
    weights_bytes: int


class RecipeSize(msgspec.Struct, frozen=True, kw_only=True):
    """Predicted weights of a model under one recipe, with float32 scales and by each backend that runs it."""

    recipe: str
    bits_per_weight: float
    weights_bytes: int
    backends: tuple[BackendSize, ...]


class ModelSheet(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `edgeq models show`; license and catalogue facts are null for a checkpoint outside it.

    scores: published ones by mode, each with its source.
    """

    name: str
    generation: str
    parameters: int
    layers: int
    full_attention_layers: int
    hidden: int
    vocabulary: int
    tied: bool
    context: int
    kv_cache_bytes_per_token: int
    hub: str | None
    license: str | None
    commercial: bool | None
    thinking: str | None
    modality: tuple[str, ...]
    left_out: tuple[str, ...]
    recipes: tuple[RecipeSize, ...]
    scores: dict[str, catalog.Scores]


class PlanSheet(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `edgeq build --dry-run`; sizes are predictions.

    predicted_loss: of a mix as run, nats per token. `bundle_bytes` are None where the checkpoint is not on this machine
    yet.
    """

    model: str
    generation: str
    target: str
    recipe: str
    backend: str
    context: int
    bundle: str
    weights_bytes: int
    bits_per_weight: float
    max_loss: float
    max_bytes: int | None
    notes: tuple[str, ...]
    layouts: dict[str, str] | None = None
    predicted_loss: float | None = None
    bundle_bytes: int | None = None


class Detection(msgspec.Struct, frozen=True, kw_only=True):
    """The document of `edgeq targets detect`: the closest target's name or null, and what the machine has.

    `memory_bytes` is a container's limit where that is below `ram_bytes`.
    """

    target: str | None
    cpu: str
    isa: tuple[str, ...]
    memory_bytes: int | None
    ram_bytes: int | None
    accelerators: tuple[Accelerator, ...]
    backends: tuple[detect.BackendState, ...]


def detection(machine: Machine) -> Detection:
    """What a machine is, and which backends of its target work here."""
    found = detect.closest(machine)
    return Detection(
        target=found.name if found else None,
        cpu=machine.cpu_model,
        isa=machine.isa,
        memory_bytes=machine.memory_bytes,
        ram_bytes=machine.ram_bytes,
        accelerators=machine.accelerators,
        backends=detect.usable_backends(detect.resolve(HOST, machine)),
    )


def model(name: str, *, offline: bool) -> ModelSheet:
    """Sheet of a catalogue model by name or hub id, without the network, or of what `sources.configured` knows."""
    try:
        entry = catalog.load(name)
    except UsageFault:
        short_name, shape = sources.configured(name, offline=offline)
        return _sheet(short_name, shape, None)
    return _sheet(entry.name, entry.model, entry)


def plan(work: Plan, predicted: Prediction) -> PlanSheet:
    """Document of a build's plan, with what `choosing.preview` predicts of it."""
    return PlanSheet(
        model=work.name,
        generation=work.shape.generation,
        target=work.target.name,
        recipe=str(work.recipe),
        backend=work.backend,
        context=work.context,
        bundle=data.readable(work.out),
        weights_bytes=work.bytes,
        bits_per_weight=work.bits_per_weight,
        max_loss=work.max_loss,
        max_bytes=work.max_size,
        notes=work.notes,
        layouts={name: layout.name for name, layout in work.recipe.chosen} or None,
        predicted_loss=predicted.loss,
        bundle_bytes=predicted.bytes,
    )


def _sizes(shape: Model, wanted: Recipe) -> RecipeSize:
    found = []
    for name in backends.NAMES:
        if name != "null" and backends.holds(name, shape, wanted):
            scale_bits = backends.get(name).scale_bits(wanted)
            total = size.weight_bytes(shape, wanted, scale_bits)
            found.append(BackendSize(backend=name, bits_per_weight=8 * total / shape.parameters, weights_bytes=total))
    return RecipeSize(
        recipe=str(wanted),
        bits_per_weight=size.bits_per_weight(shape, wanted),
        weights_bytes=size.weight_bytes(shape, wanted),
        backends=tuple(found),
    )


def _sheet(name: str, shape: Model, entry: catalog.Entry | None) -> ModelSheet:
    sizes = tuple(_sizes(shape, recipe.parse(each)) for each in recipe.SHIPPED)
    return ModelSheet(
        name=name,
        generation=shape.generation,
        parameters=shape.parameters,
        layers=shape.layers,
        full_attention_layers=shape.full_attention_layers,
        hidden=shape.hidden,
        vocabulary=shape.vocab,
        tied=shape.tied,
        context=shape.context,
        kv_cache_bytes_per_token=shape.kv_bytes_per_token(4),
        hub=entry.hub if entry else None,
        license=entry.license if entry else None,
        commercial=entry.commercial if entry else None,
        thinking=entry.thinking if entry else None,
        modality=entry.modality if entry else ("text",),
        left_out=(("vision",) if shape.has_vision else ()) + (("mtp",) if shape.has_mtp else ()),
        recipes=sizes,
        scores=entry.scores if entry else {},
    )
