"""Build and profile a random checkpoint of a real model's shape on this machine: build cost, size, speed, memory.

Its weights are noise, so accuracy says nothing here; usage: .venv/bin/python scripts/true_size.py qwen3-0.6b DIR
"""

from __future__ import annotations

import argparse
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.table import Table

from edgeq import building, planning
from edgeq.profiling import run
from edgeq.profiling.measure import Plan
from edgeq.units import show_bytes

RECIPES = ("w8g32-e8-rtn", "w4g32-e8-rtn")
PLAN = Plan(prompts=(128, 512), tokens=64, repetitions=5, accuracy="none")
COLUMNS = (
    *("model", "recipe", "build", "build peak", "size", "bits/weight"),
    *("prefill 128", "prefill 512", "decode tok/s", "peak memory", "grade"),
)


def main() -> None:
    """One row for each recipe onto stdout; the checkpoint is made below DIR unless it is there."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    options = parser.parse_args()
    checkpoint = options.folder / f"random-{options.model}"
    if not checkpoint.is_dir():
        maker = Path(__file__).with_name("make_random_checkpoint")
        subprocess.run([sys.executable, str(maker), options.model, str(checkpoint)], check=True)
    table = Table(*COLUMNS, box=None, pad_edge=False)
    for recipe in RECIPES:
        out = options.folder / f"{options.model}.{recipe}.onnx"
        plan = planning.plan(str(checkpoint), target="host", recipe_name=recipe, out=out)
        made = building.build(plan, lambda *_: None)
        row = run.profile(out, target="host", plan=PLAN, progress=lambda *_: None)
        speeds = [f"{each.tokens_per_s.median:.1f}" for each in row.prefill]
        speeds += [f"{each.tokens_per_s.median:.1f}" for each in row.decode]
        build = (f"{made.seconds:.0f} s", show_bytes(made.peak_rss_bytes))
        size = (show_bytes(made.bytes), f"{made.bits_per_weight:.2f}")
        table.add_row(options.model, recipe, *build, *size, *speeds, show_bytes(row.memory.peak_rss_bytes), row.grade)
    Console(width=200).print(table)
    print(f"{row.machine.cpu_model}, {row.threads} threads, {', '.join(row.tools)}")


if __name__ == "__main__":
    main()
