"""What quantizing costs at a large model's shape: peak anonymous memory, as predicted and as measured, and time.

A walk holds one layer at a time, so that a random checkpoint of a few needs as much memory as one of all. Usage:
.venv/bin/python scripts/walk_cost.py qwen3-4b DIR --layers 2 --recipe w4g32-e8-guided --recipe mix4.5-tuned:dry
(`:dry` stops when a mix is chosen). The checkpoint is made below DIR unless it is there.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from pathlib import Path

from edgeq import calibration, data, recipe
from edgeq.checkpoint import Checkpoint
from edgeq.machine import this_machine
from edgeq.units import show_bytes
from edgeq.walk import footprint, windows
from peers import child


def main() -> None:
    """One row for each recipe onto stdout."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("model")
    parser.add_argument("folder", type=Path)
    parser.add_argument("--layers", type=int, default=2)
    parser.add_argument("--recipe", action="append", required=True)
    parser.add_argument("--backend", default="onnx")
    options = parser.parse_args()
    folder = options.folder / f"random-{options.model}-{options.layers}-layers"
    if not folder.is_dir():
        maker = Path(__file__).with_name("make_random_checkpoint")
        words = [sys.executable, str(maker), options.model, str(folder), "--layers", str(options.layers)]
        subprocess.run(words, check=True)
    checkpoint = Checkpoint.open(folder)
    held = windows.quick(checkpoint, data.held_out(), windows.LENGTH)
    print("| recipe | predicted peak | measured peak | wall | processor time |\n|---|---|---|---|---|")
    for name in options.recipe:
        wanted, _, dry = name.partition(":")
        tokens = windows.WITH_DRAWN * calibration.LENGTH
        predicted = footprint.predict(checkpoint.model, held, recipe.parse(wanted), tokens)
        with tempfile.TemporaryDirectory(dir=options.folder) as out:
            words = [sys.executable, "-m", "edgeq.cli", "build", str(folder), "--target", "host", "--recipe", wanted]
            words += ["--backend", options.backend, "-o", f"{out}/bundle", *(["--dry-run"] if dry else [])]
            cost = child.run(words, os.environ | {"XDG_CACHE_HOME": out})  # nothing that was measured before
        peak = show_bytes(cost.peak_anonymous_bytes)
        print(f"| {name} | {show_bytes(predicted)} | {peak} | {cost.wall_s:.0f} s | {cost.cpu_s:.0f} s |", flush=True)
    print(f"\n{options.model}, {options.layers} layers, {options.backend}; {this_machine().cpu_model}")


if __name__ == "__main__":
    main()
