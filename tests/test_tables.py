from __future__ import annotations

from io import StringIO

import msgspec
import pytest
from rich.console import Console, Group

from edgeq import catalog, sheets, tables, target
from edgeq.profiles import Speculation
from edgeq.profiling import statistics
from edgeq.recommending.document import Constraints, Recommendation
from recommended import candidate


def test_speculation_is_a_row_of_its_own_with_plain_decoding_beside_it() -> None:
    row = Speculation(
        method="prompt lookup", text="repeating", prompt=128, tokens=64, tokens_per_s=statistics.spread([90.0]),
        plain_tokens_per_s=statistics.spread([30.0]), tokens_per_step=3.2, same=1.0, valid=True, reason=None,
    )  # fmt: skip
    assert tables._speculation(row) == "90.0 [90.0, 90.0] tokens/s, plain 30.0 [30.0, 30.0]; 3.20 tokens a step"
    differing = msgspec.structs.replace(row, same=0.75, valid=False, reason="1 of 4 continuations were undisturbed")
    assert tables._speculation(differing).endswith(
        "a step; 25% of the continuations differ; 1 of 4 continuations were undisturbed"
    )


def test_plain_text_aligns_short_cells_and_lets_long_ones_be_long() -> None:
    table = tables._facts(("a", "one\ntwo"), ("long name", "x" * 100))
    assert tables.plain(Group(table, "", "end")) == f"a          one\n           two\nlong name  {'x' * 100}\n\nend"
    wide = tables._table("name", "value", "source")
    wide.add_row("n", "v" * 100, "s")
    wide.add_row("nn", "v", "s")
    assert tables.plain(wide).splitlines() == ["name  value  source", f"n     {'v' * 100}  s", "nn    v      s"]


def test_a_recommendation_shows_estimates_with_a_tilde_and_measured_figures_without() -> None:
    choice = candidate(evidence="measured", verdict="chosen", front=True, reasons=("best of all",), answer_s=14.0)
    guess = candidate(
        "qwen3-1.7b", score=60, tps=40, memory=2 << 30, verdict="eligible", reasons=("slower",), answer_s=7.0
    )
    document = Recommendation(
        target="somewhere",
        context=4096,
        constraints=Constraints(),
        choice=choice,
        closest=None,
        excluded={},
        rule="the rule",
        notes=("a note",),
        candidates=(choice, guess, msgspec.structs.replace(guess, backend="mlc")),
    )
    console = Console(width=200, record=True, file=StringIO())
    console.print(tables.recommendation(document))
    lines = console.export_text().splitlines()
    (first,) = (line for line in lines if line.startswith("*"))
    assert "3.00 GiB" in first
    assert "20.0 [16.0, 25.0]" in first
    assert "~3.00" not in first
    assert any("~2.00 GiB" in line and "~40.0 [32.0, 50.0]" in line for line in lines)
    assert "  qwen3-1.7b w4g32-e8-rtn llamacpp: slower" in map(str.rstrip, lines)
    assert any(line.startswith("  1 other recipes and backends") for line in lines)
    assert lines[-2].strip() == "chosen is the rule"
    assert lines[-1].startswith(f"Next: edgeq build {choice.model} --target somewhere --recipe {choice.recipe}")


def test_what_was_not_measured_is_no_exact_answer() -> None:
    whole = candidate(evidence="measured", answer_s=14.0)
    assert tables._answer(whole) == "14 s"
    assert tables._answer(msgspec.structs.replace(whole, measured_depth=0)) == "~14 s"
    assert tables._answer(candidate(answer_s=14.0, answer_without_prompt=True)) == ">= ~14 s"
    assert tables._answer(candidate()) == "-"


def test_what_a_model_reads_besides_text_is_shown() -> None:
    (row,) = (
        line
        for line in tables.plain(tables.model(sheets.model("qwen3.5-4b", offline=True))).splitlines()
        if line.startswith("input ")
    )
    assert row.split() == ["input", "text", "image", "video"]
    listed = {line.split()[0]: line for line in tables.plain(tables.models(catalog.entries())).splitlines() if line}
    assert "text image video" in listed["qwen3.5-0.8b"]
    assert "image" not in listed["qwen3-4b"]


@pytest.mark.parametrize("width", [60, 80])
def test_a_narrow_terminal_cuts_no_name(width: int) -> None:
    console = Console(width=width, record=True, file=StringIO())
    devices = [target.load(name) for name in target.names()]
    shown = Group(tables.targets(devices), tables.models(catalog.entries()))
    console.print(tables.fitting(shown, console))
    text = console.export_text()
    assert max(len(line) for line in text.splitlines()) <= width
    words = text.replace(";", " ").split()
    for name in (*target.names(), *catalog.names(), *(entry.hub for entry in catalog.entries())):
        assert name in words


def test_a_row_that_is_a_paragraph_has_its_headers() -> None:
    table = tables._table("", "model", "recipe", "speed")
    table.add_row("*", "qwen3-4b-instruct-2507", "w4g32-e8-rtn-kv16", "-")
    console = Console(width=40, record=True, file=StringIO())
    console.print(tables.fitting(table, console))
    lines = [line.rstrip() for line in console.export_text().splitlines()]
    assert lines == ["* qwen3-4b-instruct-2507", "  recipe: w4g32-e8-rtn-kv16; speed: -"]
    wide = Console(width=60)
    assert tables.fitting(table, wide) is table
