"""The files that scripts/refit writes: calibration tables of targets, and what is pooled by API and runtime."""

from __future__ import annotations

import functools
import math
from pathlib import Path

from edgeq import data, target
from edgeq.estimating import published
from edgeq.estimating.published import Row, processor
from edgeq.estimating.rates import ANY, api_of
from edgeq.estimating.speed import NINETY, Rate
from edgeq.target import Target
from fitting import Place, Rates, effects, place_of

BACKENDS = ("llamacpp", "mlc", "onnx")
_POOLED = """\
# What runtimes reach where a target has no calibration of its own, by API and runtime; `any` stands for all others.
# Written by scripts/refit from published.toml. states, cache: share of eta that kernels of recurrent states and of
# attention reach (cache by runtime, with the deviation of its logarithm); k_quant: what GGML's K layouts add to
# logit(eta); figure_sd: deviation of the logarithm of one figure. pooled: see `Calibration` in edgeq.target.
"""


def peak(host: str, api: str) -> float | None:
    """Peak arithmetic of a host's processor in float16 operations per second, where it is known."""
    if host in published.read().bandwidth_bytes_per_s:
        return None
    found = target.load(host)
    figure = found.cpu.fp16_flop_per_s if api == "cpu" else found.gpu and found.gpu.fp16_flop_per_s
    return figure.value if figure else None


def rates() -> Rates:
    """The model of the shipped figures, with every place that is written down."""
    found = published.read()
    wanted = [place for name in target.names() for place in places(target.load(name)).values()]
    likes = [(host, api, each.like) for host, api, name in wanted if (each := found.relation(api, name))]
    return Rates(found, [*wanted, *likes, *_combinations()], peak)


def rates_of_rows() -> Rates:
    """The same with the places of the figures alone, which is smaller and says the same of them."""
    return Rates(published.read(), [], peak)


def places(device: Target) -> dict[str, Place]:
    """Place of each runtime that a target is calibrated for: edgeq's backends, and those with figures of its family.

    The API is the target's, unless figures of the device itself are of others alone; that of the figures otherwise.
    """
    if device.memory.bandwidth_bytes_per_s is None:
        return {}
    alike = [row for row in published.read().rows if _alike(row, device.name)]
    found: dict[str, Place] = {}
    for runtime in sorted({*(name for name in BACKENDS if name in device.backends), *(row.runtime for row in alike)}):
        own = {row.api for row in alike if row.runtime == runtime and row.host == device.name}
        if runtime not in BACKENDS:
            own = own or {row.api for row in alike if row.runtime == runtime}
        usual = api_of(device, runtime)
        found[runtime] = (device.name, usual if usual in own or not own else min(own), runtime)
    return found


def _alike(row: Row, host: str) -> bool:
    """Whether a row is of a host or of its processor's family."""
    family = published.read().family(host, processor(row.api))
    return row.host == host or (family is not None and family == published.read().family(row.host, processor(row.api)))


def files(found: Rates) -> dict[Path, str]:
    """Whole text of every file that refit writes."""
    fit, compute = found.fit(found.fitted), found.fit_compute(found.fitted)

    def table(head: str, place: Place) -> str:
        host, api, runtime = place
        if (relation := found.published.relation(api, runtime)) is None:
            return _table(head, found.rate(fit, compute, place, _source(found, place)))
        like = (host, api, relation.like)
        source = f"{_source(found, like)}; {runtime} x {relation.decode}, measured beside it: {relation.source}"
        return _table(head, found.rate(fit, compute, like).scaled(relation.decode, relation.prefill, source))

    texts = {}
    for name in target.names():
        path = data.folder("targets") / f"{name}.toml"
        tables = [table(f"calibration.{runtime}", place) for runtime, place in places(target.load(name)).items()]
        body = without_tables(path.read_text(encoding="utf-8"))
        texts[path] = body + "".join(f"\n{each}" for each in tables)
    shared = found.shares(fit, ANY)
    lines = [_POOLED, f"states = {_number(math.exp(shared.states))}", f"k_quant = {_number(shared.k_quant)}"]
    lines += [f"figure_sd = {_number(shared.figure_sd)}", "", "[cache]"]
    for runtime in [ANY, *sorted({place[2] for place in found.places} - {ANY})]:
        of_runtime = found.shares(fit, runtime)
        lines.append(f"{runtime} = [{_number(math.exp(of_runtime.cache))}, {_number(of_runtime.cache_sd)}]")
    tables = [table(f"pooled.{api}.{runtime}", ("", api, runtime)) for _, api, runtime in _combinations()]
    texts[data.folder("estimating") / "rates.toml"] = "\n".join(lines) + "\n\n" + "\n".join(tables)
    return texts


def without_tables(text: str) -> str:
    """A target's file without its calibration tables, which may stand anywhere."""
    kept, left_out = [], False
    for line in text.splitlines():
        if line.startswith("["):
            left_out = line.startswith("[calibration.")
        if not left_out:
            kept.append(line)
    return "\n".join(kept).rstrip("\n") + "\n"


def stale(found: Rates) -> dict[Path, str]:
    """Those of `files` that hold another text now, or are missing."""
    return {
        path: text
        for path, text in files(found).items()
        if not path.is_file() or path.read_text(encoding="utf-8") != text
    }


@functools.cache
def _combinations() -> tuple[Place, ...]:
    """Every API with every runtime that has figures there, edgeq's backends, and any other; then any API."""
    rows = published.read().rows
    found: list[Place] = []
    for api in sorted({row.api for row in rows} | {"webgpu"}):
        runtimes = {row.runtime for row in rows if row.api == api} | {*BACKENDS, ANY}
        found += [("", api, runtime) for runtime in sorted(runtimes)]
    return (*found, *(("", ANY, runtime) for runtime in sorted({row.runtime for row in rows} | {*BACKENDS, ANY})))


def _source(found: Rates, place: Place) -> str:
    """Which figures a rate rests on."""

    def count(kind: str) -> int:
        names = [name for each, name in effects(place, found.published) if each == kind]
        return sum(
            (kind, names[0]) in effects(place_of(row), found.published)
            for row in found.rows
            if names and not row.outside
        )

    words = {
        "own": "of it",
        "device": "of the device",
        "family": "of its family",
        "runtime": "of the runtime",
        "api": "of the API",
    }
    known = [f"{number} {text}" for kind, text in words.items() if (number := count(kind))]
    host = f"{place[2]} on {place[1]}" + (f" of {place[0]}" if place[0] else "")
    return f"scripts/refit: {host}, from published figures: {', '.join(known) or 'all of them, none alike'}"


def _table(head: str, rate: Rate) -> str:
    eta = [_share(rate.logit_eta + side * NINETY * rate.eta_sd) for side in (0, -1, 1)]
    layer = [math.exp(rate.log_layer_s + side * NINETY * rate.layer_sd) for side in (0, -1, 1)]
    compute = [math.exp(rate.log_compute + side * NINETY * rate.compute_sd) for side in (0, -1, 1)]
    unpack = [rate.unpack * math.exp(side * NINETY * rate.unpack_sd) for side in (0, -1, 1)]
    lines = [f"[{head}]"]
    written = [("eta", eta), ("layer_s", layer), ("compute", compute), *([("unpack", unpack)] if rate.unpack else [])]
    for name, (mid, low, high) in written:
        lines += [f"{name} = {_number(mid)}", f"{name}_interval = [{_number(low)}, {_number(high)}]"]
    return "\n".join([*lines, f"correlation = {_number(rate.correlation)}", f'source = "{rate.source}"', ""])


def _share(value: float) -> float:
    return 1 / (1 + math.exp(-value))


def _number(value: float) -> str:
    """Three significant digits, which other machines' arithmetic does not change."""
    text = f"{value:.3g}"
    return text if "." in text or "e" in text else f"{text}.0"
