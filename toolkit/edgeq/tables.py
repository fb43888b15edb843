"""Documents as the tables that people read; `cli` prints them."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import zip_longest
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group, RenderableType
from rich.control import strip_control_codes
from rich.padding import Padding
from rich.table import Table
from rich.text import Text

from edgeq.estimating.memory import MEMORY_ERROR
from edgeq.sources import DEMOS
from edgeq.target import Figure
from edgeq.units import show_bytes

if TYPE_CHECKING:
    from edgeq.building import Built
    from edgeq.bundle import Gate, MemoryPlan
    from edgeq.catalog import Entry
    from edgeq.detect import BackendState
    from edgeq.doctor import Check
    from edgeq.estimating.estimate import Estimate
    from edgeq.estimating.speed import Range
    from edgeq.profiles import Load, Profile, Speculation, Spread
    from edgeq.recommending.document import Candidate, Recommendation
    from edgeq.sheets import Detection, ModelSheet, PlanSheet
    from edgeq.target import Target
    from edgeq.verifying import Verified

PIPED_CELL = 60
_METHODS = (
    "methods: rtn and mse look at the weights alone; gptq, guided and tuned fit them to a text, in the same bytes: "
    "w4g32-e8-tuned. mix<bits>-<method> gives each matrix its own layout: mix4.5-tuned."
)
_UNLIMITED = 1000  # columns, wider than any table's longest words


def built(document: Built) -> Table:
    """What a build made."""
    compiled = []
    if document.kernels is not None:
        compiled.append(("kernels", f"{document.kernels} for {document.provider}"))
    if document.memory is not None:
        compiled.append(("memory", _planned(document.memory)))
    return _facts(
        ("bundle", document.bundle),
        ("model", f"{document.model} (Qwen{document.generation})"),
        ("target", f"{document.target}, {document.backend} on {document.provider}"),
        ("recipe", f"{document.recipe}, {document.bits_per_weight:.2f} bits per weight"),
        ("size", show_bytes(document.bytes)),
        *compiled,
        ("gate", _gate(document.gate)),
        ("build", f"{document.seconds:.1f} s, peak memory {show_bytes(document.peak_rss_bytes)}"),
        ("next", f"edgeq profile {document.bundle}"),
    )


def _planned(memory: MemoryPlan) -> str:
    """Memory that compiled code wants."""
    words = [
        f"weights {show_bytes(memory.weights_bytes)}",
        f"{memory.kv_cache_bytes_per_token / 1024:.3g} KiB per token of context",
        f"temporaries {show_bytes(max(memory.temporary_bytes.values(), default=0))} at most",
    ]
    if memory.state_bytes:
        words.append(f"state {show_bytes(memory.state_bytes)}")
    return ", ".join(words)


def plan(document: PlanSheet) -> Table:
    """What a build would make; estimates start with ~."""
    predicted = "" if document.predicted_loss is None else f"; of this mix ~{document.predicted_loss:.2g}"
    size = "" if document.bundle_bytes is None else f", ~{show_bytes(document.bundle_bytes)}"
    if size and document.max_bytes is not None:
        size += f" of {show_bytes(document.max_bytes)}"
    return _facts(
        ("model", f"{document.model} (Qwen{document.generation})"),
        ("target", f"{document.target}, {document.backend}"),
        ("recipe", f"{document.recipe}, ~{document.bits_per_weight:.2f} bits per weight"),
        ("weights", f"~{show_bytes(document.weights_bytes)}"),
        *([("layouts", _layouts(document.layouts))] if document.layouts else []),
        ("context", f"{document.context} tokens"),
        ("gate", f"KL divergence <= {document.max_loss:g} nats per token{predicted}"),
        ("bundle", f"{document.bundle} (not built{size})"),
    )


def _layouts(chosen: dict[str, str]) -> str:
    """Matrices of one layout on a line; --json has each by its full name."""
    names: dict[str, list[str]] = {}
    for name, layout in chosen.items():
        short = name.removeprefix("model.").removesuffix(".weight").replace("self_attn.", "").replace("mlp.", "")
        names.setdefault(layout, []).append(short.replace("layers.", ""))
    return "\n".join(f"{layout}: {' '.join(found)}" for layout, found in sorted(names.items()))


def estimate(document: Estimate) -> Table:
    """What a model would need and reach; estimates start with ~."""
    usable = show_bytes(document.usable_bytes)
    assumed = f" ({document.memory_reason})" if document.memory_reason else ""
    close = document.usable_bytes is not None and document.total_bytes * MEMORY_ERROR > document.usable_bytes
    marginal = f", marginal: up to {MEMORY_ERROR - 1:.0%} more may be needed" if close else ""
    verdict = {
        True: f"yes, of {usable} usable{marginal}{assumed}",
        False: f"no, {usable} usable{assumed}",
        None: f"-{assumed}",
    }
    return _facts(
        ("model", f"{document.model} {document.recipe}"),
        ("target", f"{document.target}, {document.backend}"),
        ("memory", f"~{show_bytes(document.total_bytes)}"),
        (
            "",
            f"weights ~{show_bytes(document.weights_bytes)}, cache of {document.context} tokens "
            f"~{show_bytes(document.kv_cache_bytes)}, states ~{show_bytes(document.state_bytes)}, "
            f"engine ~{show_bytes(document.runtime_bytes)}",
        ),
        ("fits", verdict[document.fits]),
        ("context", _fitting(document)),
        ("prefill", _estimated(document.prefill_tokens_per_s, document.prefill_reason)),
        (f"decode at {document.depth}", _estimated(document.decode_tokens_per_s, document.decode_reason)),
        (
            "first token",
            f"- ({document.first_token_reason})"
            if document.first_token_s is None
            else f"~{document.first_token_s:.2f} s after a prompt of {document.prompt} tokens",
        ),
        ("basis", document.basis.replace("; ", "\n")),
    )


def _fitting(document: Estimate) -> str:
    longest = document.max_context
    if longest is None:
        return f"- ({document.memory_reason})"
    return (
        f"{longest} tokens fit, the model's own limit"
        if longest == document.model_context
        else f"~{longest} tokens fit"
    )


def _estimated(rate: Range | None, reason: str | None) -> str:
    if rate is None:
        return f"- ({reason})"
    low, mid, high = (f"{each:.{0 if rate.mid >= 100 else 1}f}" for each in (rate.low, rate.mid, rate.high))
    return f"~{mid} [{low}, {high}] tokens/s"


def verified(document: Verified) -> Table:
    """Result of verify."""
    return _facts(
        ("bundle", document.bundle),
        ("files", f"{document.files}, every digest right"),
        ("gate here", _gate(document.gate)),
        ("at build", _gate(document.gate_at_build)),
    )


def profile(document: Profile) -> Table:
    """One measured row, and what makes it less than comparable."""
    loss, memory = document.accuracy, document.memory
    phases = (("load", memory.load), ("prefill", memory.prefill), ("decode", memory.decode))
    rows = [
        ("model", f"{document.model} {document.recipe}, {document.bundle.bits_per_weight:.2f} bits per weight"),
        ("size", show_bytes(document.bundle.bytes)),
        ("runs on", "; ".join(f"{each.provider} {each.device}: {each.layers} layers" for each in document.placement)),
        ("machine", f"{document.target}: {document.machine.cpu_model}, {', '.join(document.tools)}"),
        *((f"prefill {each.tokens}", f"{_rate(each.tokens_per_s)} tokens/s") for each in document.prefill),
        *((f"decode at {each.depth}", f"{_rate(each.tokens_per_s)} tokens/s") for each in document.decode),
        *((f"{each.method}, {each.text}", _speculation(each)) for each in document.speculation or ()),
        ("first token", f"{document.first_token_s.median * 1e3:.1f} ms from {document.first_token_from}"),
        ("load", _load(document.load)),
        ("peak memory", show_bytes(memory.peak_rss_bytes)),
        ("", ", ".join(f"{name} {show_bytes(phase.rss_bytes)}" for name, phase in phases)),
    ]
    if loss:
        rows += [
            ("perplexity", f"{loss.perplexity_reference:.3f} float32 -> {loss.perplexity:.3f}, {loss.tokens} tokens"),
            ("KL divergence", f"{loss.kl_mean:.5f} [{loss.kl_low:.5f}, {loss.kl_high:.5f}] nats per token"),
            ("top-1", f"{loss.top1_agreement:.3f} agreement, {loss.flips.lost} lost, {loss.flips.gained} gained"),
            ("reference", loss.reference),
        ]
    rows.append(("grade", "; ".join((document.grade, *document.reasons))))
    return _facts(*rows)


def checks(document: Sequence[Check]) -> Table:
    """Doctor's findings."""
    table = _table("check", "status", "expected", "observed", "remedy")
    for check in document:
        table.add_row(check.name, check.status, check.expected, check.observed, check.remedy or "")
    return table


def targets(document: Iterable[Target]) -> Table:
    """All targets, those of one API and one class of device together."""
    table = _table("target", "device", "api", "class", "memory", "bandwidth", "aliases")
    for each in sorted(document, key=lambda each: (each.api, each.device_class or "", each.name)):
        speed = each.memory.bandwidth_bytes_per_s
        table.add_row(
            each.name,
            each.title,
            each.api,
            each.device_class or "-",
            show_bytes(int(each.memory.total_bytes.value)) if each.memory.total_bytes else "-",
            f"{speed.value / 1e9:.0f} GB/s" if speed else "-",
            " ".join(each.aliases),
        )
    return table


def target(document: Target) -> Table:
    """One target, every figure with its source."""
    table = _table("field", "value", "source")
    for field, value in _leaves(document):
        if isinstance(value, Figure):
            table.add_row(field, f"{value.value:g}", value.source)
        elif value not in (None, (), False):
            between = " " if field == "notes" else ", "
            table.add_row(field, between.join(map(str, value)) if isinstance(value, tuple) else str(value), "")
    return table


def detected(document: Detection) -> Table:
    """What this machine is."""
    rows = [(f"backend {state.name}", _usable(state)) for state in document.backends]
    return _facts(
        ("target", document.target or "none of the catalogue"),
        ("cpu", document.cpu),
        ("isa", " ".join(document.isa)),
        ("memory", _limited(document.memory_bytes, document.ram_bytes)),
        ("accelerators", ", ".join(map(str, document.accelerators)) or "none found"),
        *rows,
    )


def models(document: Iterable[Entry]) -> Group:
    """The catalogue, and the names of the bundled demos."""
    table = _table("model", "hub id", "parameters", "context", "license", "thinking", "input", "released")
    for each in document:
        license_ = each.license if each.commercial else f"{each.license} (not for commercial use)"
        parameters = f"{each.parameters / 1e9:.2f} B"
        facts = (license_, each.thinking, " ".join(each.modality), str(each.released))
        table.add_row(each.name, each.hub, parameters, str(each.context), *facts)
    return Group(table, "", f"bundled, for trying out: {', '.join(DEMOS)}")


def model(document: ModelSheet) -> Group:
    """One model and its size under each recipe."""
    facts = [
        ("model", f"{document.name} (Qwen{document.generation})"),
        ("parameters", f"{document.parameters / 1e6:.1f} M{', table tied' if document.tied else ''}"),
        ("layers", f"{document.layers}, {document.full_attention_layers} with full attention"),
        (
            "context",
            f"{document.context} tokens, {show_bytes(document.kv_cache_bytes_per_token)} of float32 KV cache each",
        ),
    ]
    if document.hub:
        commercial = "" if document.commercial else ", not for commercial use"
        facts += [
            ("hub", document.hub),
            ("license", f"{document.license}{commercial}"),
            ("thinking", str(document.thinking)),
            ("input", " ".join(document.modality)),
        ]
    if document.left_out:
        facts.append(("left out", ", ".join(document.left_out)))
    for mode, scores in document.scores.items():
        values = ", ".join(f"{name} {value:g}" for name, value in scores.values.items())
        facts.append((f"scores, {mode.replace('_', ' ')}", f"{values} ({scores.source})"))
    engines = list(dict.fromkeys(size.backend for each in document.recipes for size in each.backends))
    sizes = _table("recipe", *(f"{name}: bits per weight, weights" for name in engines))
    for each in document.recipes:
        held = {
            size.backend: f"~{size.bits_per_weight:.2f}, ~{show_bytes(size.weights_bytes)}" for size in each.backends
        }
        sizes.add_row(each.recipe, *(held.get(name, "-") for name in engines))
    return Group(_facts(*facts), "", sizes, "", _METHODS)


def recommendation(document: Recommendation) -> Group:
    """The choice and its reasons, the front each other model by its best candidate, and why not these."""
    shown, models = [], set()
    for each in document.candidates:
        if each.front or each.model not in models:
            shown.append(each)
        models.add(each.model)
    table = _table("", "model", "recipe", "backend", "memory", "tokens/s", "answer", "quality", "evidence")
    for each in shown:
        mark = {"chosen": "*", "rejected": "-"}.get(each.verdict, "front" if each.front else "")
        about = "" if each.evidence == "measured" else "~"
        table.add_row(
            mark,
            each.model,
            each.recipe,
            each.backend,
            about + show_bytes(each.memory_bytes),
            _interval(each.decode_tokens_per_s, "" if each.exact_speed else "~"),
            _answer(each),
            "-" if each.score is None else f"~{each.score:.1f}",
            each.evidence,
        )
    choice, rest = document.choice, len(document.candidates) - len(shown)
    others = [f"{each.title}: {'; '.join(each.reasons)}" for each in shown if each is not choice]
    return Group(
        f"{document.target}, {document.context} tokens of context"
        + (f": {choice.title}" if choice else ": none meets all constraints"),
        *([f"  {reason}" for reason in choice.reasons] if choice else []),
        *(f"  {note}" for note in document.notes),
        "",
        table,
        "marks: * chosen; front: no other is better in quality, speed and memory at once; - misses a constraint",
        "",
        "why not",
        *(f"  {line}" for line in others),
        *([f"  {rest} other recipes and backends of these models: --json has each with its reason"] if rest else []),
        *([f"chosen is {document.rule}", f"Next: {_build(document, choice)}"] if choice else []),
    )


def _build(document: Recommendation, choice: Candidate) -> str:
    """The command that builds a choice."""
    words = f"edgeq build {choice.model} --target {document.target}"
    return f"{words} --recipe {choice.recipe} --backend {choice.backend} --context {choice.context}"


def _answer(candidate: Candidate) -> str:
    if candidate.answer_s is None:
        return "-"
    least = ">= " if candidate.answer_without_prompt else ""
    return f"{least}{'' if candidate.exact_speed else '~'}{candidate.answer_s:.0f} s"


def _interval(rate: Range | None, about: str) -> str:
    return "-" if rate is None else f"{about}{rate.mid:.1f} [{rate.low:.1f}, {rate.high:.1f}]"


def _leaves(part: Any, prefix: str = "") -> Iterable[tuple[str, Any]]:
    fields = (
        part.items() if isinstance(part, dict) else [(name, getattr(part, name)) for name in part.__struct_fields__]
    )
    for field, value in fields:
        if isinstance(value, dict) or (hasattr(value, "__struct_fields__") and not isinstance(value, Figure)):
            yield from _leaves(value, f"{prefix}{field}.")
        else:
            yield prefix + field, value


def _limited(size: int | None, ram: int | None) -> str:
    if size and ram and size < ram:
        return f"{show_bytes(size)} (container's limit; the machine has {show_bytes(ram)})"
    return show_bytes(size)


def _usable(state: BackendState) -> str:
    if state.usable:
        return "builds and runs" if state.builds else f"runs bundles; cannot build: {state.reason}"
    return f"not usable: {state.reason}"


def _gate(gate: Gate) -> str:
    if gate.kl_mean is None:
        return f"failed: {gate.reason}"
    verdict = "passed" if gate.passed else f"failed: {gate.reason}"
    return (
        f"{verdict}; KL {gate.kl_mean:.5f} (weights alone {gate.kl_weights_only:.5f}, limit {gate.max_loss:g}), "
        f"top-1 {gate.top1_agreement:.3f}, "
        f"perplexity {gate.perplexity_reference:.3f} -> {gate.perplexity:.3f}, on {gate.ran_on}"
    )


def _speculation(row: Speculation) -> str:
    """Speed beside that of plain decoding; different tokens and disturbed repetitions are named."""
    words = [
        f"{_rate(row.tokens_per_s)} tokens/s, plain {_rate(row.plain_tokens_per_s)}",
        f"{row.tokens_per_step:.2f} tokens a step",
    ]
    if row.same < 1:
        words.append(f"{1 - row.same:.0%} of the continuations differ")
    return "; ".join([*words, *([row.reason] if row.reason else [])])


def _load(load: Load) -> str:
    known = f"{load.warm_s:.2f} s warm, {_seconds(load.cold_s)} cold"
    return known if load.first_s is None else f"{known}, {load.first_s:.2f} s with kernels to compile"


def _seconds(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f} s"


def _rate(spread: Spread) -> str:
    return f"{spread.median:.1f} [{spread.low:.1f}, {spread.high:.1f}]"


def plain(shown: RenderableType) -> str:
    """Text of a table for a pipe: cells are padded to `PIPED_CELL` columns at most, lines have no spaces at the end."""
    if isinstance(shown, Group):
        return "\n".join(map(plain, shown.renderables))
    if not isinstance(shown, Table):
        return strip_control_codes(str(shown))
    rows = list(zip(*(column.cells for column in shown.columns), strict=True))
    if shown.show_header:
        rows.insert(0, tuple(column.header for column in shown.columns))
    lines = [line for row in rows for line in zip_longest(*(str(cell).split("\n") for cell in row), fillvalue="")]
    widths = [
        max((width for width in map(cell_len, column) if width <= PIPED_CELL), default=0)
        for column in zip(*lines, strict=True)
    ]
    return "\n".join(
        strip_control_codes(
            "  ".join(cell + " " * (width - cell_len(cell)) for cell, width in zip(line, widths, strict=True)).rstrip()
        )
        for line in lines
    )


def fitting(shown: RenderableType, console: Console) -> RenderableType:
    """The same for a terminal: where a table would cut words such as names, each row is a paragraph instead."""
    if isinstance(shown, Group):
        return Group(*(fitting(each, console) for each in shown.renderables))
    unlimited = console.options.update(max_width=_UNLIMITED)
    if not isinstance(shown, Table) or not shown.show_header:
        return shown
    if console.measure(shown, options=unlimited).minimum <= console.width:
        return shown
    headers = [str(column.header) for column in shown.columns]
    rows = zip(*(column.cells for column in shown.columns), strict=True)
    return Group(*(_paragraph(headers, [str(cell) for cell in row]) for row in rows))


def _paragraph(headers: Sequence[str], cells: Sequence[str]) -> RenderableType:
    """A row: its first cell, with what stands before under no header, and below it the others by their headers."""
    named = next(index for index, header in enumerate(headers) if header) + 1
    rest = zip(headers[named:], cells[named:], strict=True)
    words = "; ".join(f"{header}: {cell}" for header, cell in rest if cell)
    return Group(Text(" ".join(filter(None, cells[:named])), style="bold"), Padding(words, (0, 0, 0, 2)))


def _table(*columns: str) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold")
    for column in columns:
        table.add_column(column, overflow="fold")
    return table


def _facts(*rows: tuple[str, str]) -> Table:
    table = Table(box=None, pad_edge=False, show_header=False)
    table.add_column(style="bold")
    table.add_column(overflow="fold")
    for name, value in rows:
        table.add_row(name, value)
    return table
