"""How exact a matrix's sensitivity is: seen at some tokens, against two other sets of windows seen at all.

One row for each layout: the standard deviation over a demo's matrices of the logarithm of what 23 windows of 512
tokens say over what twice as many others do. `plain`: the mean at one of 1, 2, 4 or 8 tokens; `by sizes`: at one of 8,
relative to the sizes that are known of all, as `edgeq.walk.sensitivity` does. Usage:
.venv/bin/python scripts/sensitivity_error.py demo-qwen3 w4g32 w4g128
"""

from __future__ import annotations

import argparse
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from edgeq import calibration, recipe, sources
from edgeq.checkpoint import Checkpoint
from edgeq.walk import gradients, head, sensitivity
from edgeq.walk.layered import Layered

SETS = 3
APART = (1, 2, 4, 8)

Changes = dict[tuple[str, str], list[tuple[NDArray[np.float32], NDArray[np.float32]]]]


def main() -> None:
    """Print the rows of one demo."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("demo", choices=sources.DEMOS)
    parser.add_argument("layouts", nargs="+")
    options = parser.parse_args()
    checkpoint = Checkpoint.open(sources.find(options.demo, offline=True).folder)
    text = calibration.read(
        checkpoint, calibration.BUNDLED, True, checkpoint.model.context, lambda *_: None, tuned=True
    ).windows
    sets = [changes(checkpoint, text[first::SETS], first, options.layouts) for first in range(SETS)]
    print(f"{options.demo:<14}{''.join(f'plain/{each:<6}' for each in APART)}by sizes/8")
    for layout in options.layouts:
        errors: dict[Any, list[float]] = {}
        for name in {name for name, each in sets[0] if each == layout}:
            mine, *others = (each[name, layout] for each in sets)
            wanted = np.mean([loss(np.concatenate([change for change, _ in each])).mean() for each in others])
            for apart in APART:
                errors.setdefault(apart, []).append(np.log(plain(mine, apart) / wanted))
            errors.setdefault("sizes", []).append(np.log(by_sizes(mine, APART[-1]) / wanted))
        print(f"{layout:<14}{''.join(f'{np.std(found):<12.2f}' for found in errors.values())}")


def changes(checkpoint: Checkpoint, tokens: NDArray[np.int32], seed: int, layouts: list[str]) -> Changes:
    """Of each matrix of a layer and layout, for each window: changes of log-likelihoods, and sizes of tokens."""
    found: Changes = {}
    model = Layered(checkpoint)
    with tempfile.TemporaryDirectory() as folder:
        states = head.embed(head.exact(checkpoint, head.TABLE), tokens)
        between = gradients.forwards(model, states, Path(folder), lambda *_: None)
        slopes = head.slopes(model, states, seed)
        for layer in gradients.backwards(model, slopes, between, lambda *_: None, watch=1):
            for name in layer.read:
                for word in layouts:
                    lost = torch.from_numpy(
                        sensitivity._lost(checkpoint, name, recipe.layout(word))(slice(0, len(checkpoint.tensor(name))))
                    )
                    moved = (layer.written[name] * (layer.read[name] @ lost.T)).sum(1)
                    windows = zip(moved.reshape(tokens.shape).numpy(), layer.sizes[name].numpy(), strict=True)
                    found[name, word] = list(windows)
    model.close()
    return found


def loss(change: NDArray[np.float32]) -> NDArray[np.float64]:
    """KL divergence of a change of a log-likelihood, to the second order and bounded, as sensitivities have it."""
    return sensitivity._divergence(change)


def plain(windows: list[tuple[NDArray[np.float32], NDArray[np.float32]]], apart: int) -> float:
    """Mean over one of so many tokens."""
    return float(np.concatenate([loss(each[at % apart :: apart]) for at, (each, _) in enumerate(windows)]).mean())


def by_sizes(windows: list[tuple[NDArray[np.float32], NDArray[np.float32]]], apart: int) -> float:
    """The same, relative to sizes that are known of all tokens."""
    seen = np.concatenate([each[at % apart :: apart] for at, (_, each) in enumerate(windows)])
    relative = np.concatenate([loss(each[at % apart :: apart]) for at, (each, _) in enumerate(windows)]) / seen
    every = np.concatenate([each for _, each in windows])
    return float(relative.mean() / seen.mean() * np.square(every, dtype=np.float64).mean())


if __name__ == "__main__":
    main()
