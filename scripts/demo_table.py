"""Build, gate and profile the bundled checkpoints for this machine; print the table that README.md shows."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgeq import building, planning
from edgeq.errors import EdgeqError
from edgeq.profiles import Profile
from edgeq.profiling import run
from edgeq.profiling.measure import Plan
from edgeq.sources import DEMOS
from edgeq.units import show_bytes

RECIPES = ("w8g32-e8-rtn", "w4g32-e8-rtn")
PLAN = Plan(prompts=(512,), tokens=128, repetitions=5, accuracy="full")
COLUMNS = (
    *("model", "recipe", "size", "bits/weight", "prefill tok/s", "decode tok/s", "first token", "peak memory"),
    *("ppl float32", "ppl bundle", "KL", "top-1", "grade"),
)


def main() -> None:
    """Six bundles into bundles/, six rows onto stdout, progress onto stderr."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, default=Path("bundles"))
    out = parser.parse_args().out
    started = time.monotonic()
    rows = [measure(model, recipe, out) for model in DEMOS for recipe in RECIPES]
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for row in rows:
        table.add_row(*cells(row))
    machine = rows[0].machine
    console = Console(width=200)
    console.print(table)
    print(
        f"{machine.cpu_model}, {machine.cores} cores, {show_bytes(machine.memory_bytes)}, {machine.os}; "
        f"onnx on its CPU, {time.monotonic() - started:.0f} s in all"
    )
    for row in rows:
        if not row.valid:
            print(f"{row.model} {row.recipe} is not a valid measurement: {'; '.join(row.reasons)}")


def measure(model: str, recipe: str, out: Path) -> Profile:
    """Profile of a fresh build."""
    say(f"{model} {recipe}: build")
    plan = planning.plan(model, target="host", recipe_name=recipe, out=out / f"{model}.{recipe}.onnx")
    building.build(plan, lambda *_: None)
    say(f"{model} {recipe}: profile")
    return run.profile(plan.out, target="host", plan=PLAN, progress=lambda *_: None)


def cells(row: Profile) -> list[str]:
    """One row of the table, as text."""
    assert row.accuracy is not None
    return [
        row.model,
        row.recipe,
        show_bytes(row.bundle.bytes),
        f"{row.bundle.bits_per_weight:.2f}",
        f"{row.prefill[0].tokens_per_s.median:.0f}",
        f"{row.decode[0].tokens_per_s.median:.0f}",
        f"{row.first_token_s.median * 1e3:.1f} ms",
        show_bytes(row.memory.peak_rss_bytes),
        f"{row.accuracy.perplexity_reference:.3f}",
        f"{row.accuracy.perplexity:.3f}",
        f"{row.accuracy.kl_mean:.5f}",
        f"{row.accuracy.top1_agreement:.3f}",
        row.grade,
    ]


def say(text: str) -> None:
    """Progress, onto stderr."""
    print(text, file=sys.stderr)


if __name__ == "__main__":
    try:
        main()
    except EdgeqError as error:
        say(f"demo: {error}")
        sys.exit(error.exit_code)
