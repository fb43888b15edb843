"""The layout of each matrix of a mixed recipe, from measured sensitivities and a budget."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import importlib.metadata
import itertools
import math
import tempfile
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from edgeq import backends, calibration, detect, recipe, sensitivities, size, sources, store
from edgeq.backends.base import Job, Progress
from edgeq.bundle import Source
from edgeq.calibration import Calibration
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, EdgeqError, NothingFits, UsageFault
from edgeq.model import Model
from edgeq.planning import Plan
from edgeq.quantize import mix
from edgeq.quantize.mix import Choice, Option
from edgeq.recipe import Layout
from edgeq.target import HOST
from edgeq.version import VERSION
from edgeq.walk import footprint, sensitivity
from edgeq.walk.run import FORMAT
from edgeq.walk.windows import sensed

# Loss of a whole model against what error feedback leaves of each matrix. Guided q4_k and q5_k lost 0.35 on demo-qwen3
# and 0.10 on demo-qwen2.5, where few matrices cost most; it is more, since other texts lose more. The others relative
# to that, from w4g128-e8 on the demos.
_FITTED = {"gptq": 0.5, "guided": 0.4, "tuned": 0.3}
# Of a table, which guided recipes alone fit; assumed, with 0.15 demos mix the same.
_FITTED_TABLE = {"guided": 0.3, "tuned": 0.3}
_TWO_BITS = 1.6  # how much more of it 2 bits leave, on the demos, measured with one share for all matrices
_AIM = 0.9
_DOUBT = 3.0  # by how much less than predicted a mix may lose: 0.4 on demo-qwen2.5


@dataclass(frozen=True)
class Sensitivities:
    """Options of each unit of matrices, which are the bundle's bytes beside them, and the names in each unit."""

    options: Mapping[str, Sequence[Option]]
    units: Mapping[str, Sequence[str]]
    other_bytes: int


class Prediction(NamedTuple):
    """What a bundle is predicted to lose as run, KL divergence in nats per token, and its bytes; None: not known."""

    loss: float | None
    bytes: int | None


def preview(work: Plan, progress: Progress) -> tuple[Plan, Prediction]:
    """A plan whose mixed recipe is settled, without building it: the checkpoint is fetched, and sensitivities measured.

    Other plans come back as they are. Nothing is fetched for them: their bytes are known where the checkpoint is on
    this machine already.
    """
    if not work.recipe.mixed:
        return work, Prediction(None, _bytes_here(work))
    origin = sources.find(work.model, offline=work.offline)
    checkpoint = Checkpoint.open(origin.folder)
    wanted = work.calibration or calibration.BUNDLED
    longest, demo = checkpoint.model.context, origin.kind == "demo"
    text = calibration.read(checkpoint, wanted, demo, longest, progress, tuned=work.recipe.tuned)
    found = measure(work, checkpoint, origin.source(checkpoint), text, progress)
    settled, choice = settle(work, found)
    return settled, Prediction(choice.cost, choice.bytes + found.other_bytes)


def measure(work: Plan, checkpoint: Checkpoint, source: Source, text: Calibration, progress: Progress) -> Sensitivities:
    """Sensitivities over some windows of the calibration text and a few of random tokens.

    Those that were measured before are taken from the user's cache. Raises CorruptInput when they are not finite, and
    before they are measured NothingFits when no mix has the size.
    """
    engine = backends.get(work.backend)
    units = sensitivity.units(checkpoint.model)
    words = [recipe.layout(word) for word in engine.MIXED]
    layouts = {first: _possible(checkpoint.model, first, words) for first in units}
    if odd := [first for first, possible in layouts.items() if not possible]:
        raise UsageFault(
            f"{work.recipe}: no layout of {work.backend} divides the inputs of {odd[0]}",
            run="edgeq build ... --recipe w4g16-e8-guided, or w16",
        )
    scale_bits, other = engine.scale_bits(work.recipe), _other_bytes(work, checkpoint)
    sizes = sensitivity.sizes(checkpoint.model, layouts, scale_bits)
    unmeasured = {first: [Option(*each, 0.0) for each in found.items()] for first, found in sizes.items()}
    settle(work, _joined(Sensitivities(unmeasured, units, other), engine.JOINED))
    found = _costs(work, checkpoint, source, text, layouts, progress)
    for first, options in found.items():
        share = (_FITTED_TABLE if first in size.TABLES else _FITTED).get(work.recipe.method)
        if share is not None:
            found[first] = [dataclasses.replace(each, loss=_remaining(each, share) * each.loss) for each in options]
    return _joined(Sensitivities(found, units, other), engine.JOINED)


def _joined(found: Sensitivities, joined: Mapping[str, str]) -> Sensitivities:
    """Sensitivities where the units that a backend stores as one matrix are one."""
    parts: dict[str, list[str]] = {}
    for name in found.options:
        kind = name.split(".")[-2]
        parts.setdefault(name.replace(kind, joined.get(kind, kind)), []).append(name)
    options = {
        first: [mix.added(each) for each in zip(*(found.options[name] for name in names), strict=True)]
        for first, names in parts.items()
    }
    units = {first: [each for name in names for each in found.units[name]] for first, names in parts.items()}
    return Sensitivities(options, units, found.other_bytes)


def _costs(
    work: Plan,
    checkpoint: Checkpoint,
    source: Source,
    text: Calibration,
    layouts: Mapping[str, Sequence[Layout]],
    progress: Progress,
) -> dict[str, list[Option]]:
    """What layouts cost each unit where the plan's device runs them, before anything is fitted."""
    engine = backends.get(work.backend)
    groups = _activation_groups(work, list(dict.fromkeys(itertools.chain(*layouts.values()))))
    texts, scale_bits = sensed(text.windows, checkpoint.model.vocab), engine.scale_bits(work.recipe)
    feedback = work.recipe.calibrated
    names = [(first, [each.name for each in possible]) for first, possible in layouts.items()]
    rounded = [(layout.name, group) for layout, group in groups.items()]
    key = _key(source, texts, engine.tools(work.target), names, rounded, scale_bits, feedback)
    if (kept := sensitivities.find(key)) is not None:
        return kept
    with _scratch(work.out, key) as folder:
        store.require_rest(folder, footprint.gradients(checkpoint.model, sum(each.size for each in texts)))
        read, unread = sensitivity.measure(
            checkpoint, layouts, groups, scale_bits, texts, folder, progress, feedback=feedback
        )
        found = mix.hedged(read, unread)
        if not all(math.isfinite(option.cost) for options in found.values() for option in options):
            raise CorruptInput(
                "the checkpoint's own float32 logits are not finite", run="download the checkpoint again"
            )
        sensitivities.keep(key, found)
    return found


def _key(source: Source, texts: Iterable[NDArray[np.int32]], *parts: object) -> str:
    """Digest of what sensitivities depend on: files, token windows, the packages that compute, and other parts."""
    packages = [(name, importlib.metadata.version(name)) for name in ("torch", "transformers", "numpy")]
    digests = [*(file.sha256 for file in source.files), *(hashlib.sha256(each.tobytes()).hexdigest() for each in texts)]
    return hashlib.sha256(repr((VERSION, FORMAT, packages, digests, parts)).encode()).hexdigest()[:32]


@contextlib.contextmanager
def _scratch(out: Path, key: str) -> Iterator[Path]:
    """Folder beside a bundle's place where what was stopped goes on; a temporary one where nothing can be written."""
    with contextlib.ExitStack() as stack:
        try:
            parent = stack.enter_context(store.parent_of(out))
            folder = stack.enter_context(store.resumable(parent, key))
        except OSError:
            folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="edgeq.")))
        yield folder


def _activation_groups(work: Plan, layouts: Sequence[Layout]) -> dict[Layout, int]:
    """Inputs that share a scale, by the target's arithmetic; within a loss the coarser of that and the gate's, here."""
    engine = backends.get(work.backend)
    where = [work.target, detect.resolve(HOST)] if work.loss_is_budget else [work.target]
    return {layout: max(engine.activation_group(each, layout) for each in where) for layout in layouts}


def _remaining(option: Option, share: float) -> float:
    return share * (_TWO_BITS if option.layout.bits == 2 else 1.0)


def _possible(model: Model, name: str, layouts: Sequence[Layout]) -> list[Layout]:
    """Layouts whose blocks divide a matrix's inputs; tables have no zero points."""
    inputs = model.tensors()[name][1]
    return [
        each
        for each in layouts
        if inputs % each.block == 0
        and not size.mixes_heads(model, name, each)
        and (each.symmetric or name not in size.TABLES)
    ]


def bundle_bytes(work: Plan, checkpoint: Checkpoint) -> int:
    """Predicted bytes of a whole bundle of a recipe that is settled."""
    return work.bytes - size.float_bytes(work.shape) + _other_bytes(work, checkpoint)


def _bytes_here(work: Plan) -> int | None:
    """`bundle_bytes` where the checkpoint is on this machine, else None."""
    with contextlib.suppress(EdgeqError):
        return bundle_bytes(work, Checkpoint.open(sources.here(work.model)))
    return None


def _other_bytes(work: Plan, checkpoint: Checkpoint) -> int:
    """Predicted bytes of a bundle beside its quantized matrices: side files, and what the backend writes."""
    files = sum(path.stat().st_size for path in checkpoint.folder.iterdir() if path.suffix in (".json", ".jinja"))
    unsettled = dataclasses.replace(work.recipe, chosen=())
    job = Job(checkpoint, unsettled, work.target, work.context, lambda *_: None)
    return files + backends.get(work.backend).beside_bytes(job)


def settle(work: Plan, found: Sensitivities, scale: float | None = None) -> tuple[Plan, Choice]:
    """The plan with the best layouts for its budget, and the choice with what it is predicted to cost.

    scale: by how much more an earlier choice's weights lost than was predicted; None before there is one, when a
    prediction that is not too far above `max_loss` is left for a walk to confirm. Raises NothingFits when no choice
    keeps the budget.
    """
    room = math.inf if work.max_size is None else float(work.max_size - found.other_bytes)
    if work.recipe.mixed_bits is not None:
        room = min(room, work.recipe.mixed_bits * work.shape.parameters / 8 - size.float_bytes(work.shape))
    options = {
        name: [dataclasses.replace(option, loss=(scale or 1.0) * option.loss) for option in given]
        for name, given in found.options.items()
    }
    choice = mix.choose(options, room, _AIM * work.max_loss if work.loss_is_budget else 0.0)
    if choice.bytes > room:
        least = choice.bytes + found.other_bytes
        unbounded = dataclasses.replace(work.recipe, mixed_bits=None)
        wanted = f"{work.recipe.mixed_bits:g} bits" if work.max_size is None else f"{work.max_size / 1e6:.2f} MB"
        raise NothingFits(
            f"{work.recipe}: no mix of {work.backend} fits {wanted}",
            why=f"The smallest is predicted to have {least / 1e6:.2f} MB: {choice.bytes / 1e6:.2f} MB of weights, "
            f"{found.other_bytes / 1e6:.2f} MB beside them.",
            run=f"edgeq build ... --recipe {unbounded} --max-size {least / 1e6 + 0.01:.2f}MB",
        )
    if work.loss_is_budget and choice.cost > work.max_loss * (_DOUBT if scale is None else 1.0):
        within = f" in {work.max_size / 1e6:.1f} MB" if work.max_size else ""
        other = "a larger --max-size" if work.max_size else "--recipe w16"
        raise NothingFits(
            f"no mix is predicted to lose at most {work.max_loss:g} nats per token{within}",
            why=f"The best loses about {choice.cost:.2g}.",
            run=f"edgeq build ... --max-loss {choice.cost * 1.1:.2g}, or {other}",
        )
    chosen = tuple((name, choice.options[first].layout) for first, names in found.units.items() for name in names)
    settled = dataclasses.replace(work.recipe, chosen=chosen)
    scale_bits = backends.get(work.backend).scale_bits(settled)
    plan = dataclasses.replace(
        work,
        recipe=settled,
        bytes=size.weight_bytes(work.shape, settled, scale_bits),
        bits_per_weight=size.bits_per_weight(work.shape, settled, scale_bits),
    )
    return plan, choice
