"""How much each token matters: the gradient of the model's own log-likelihood at each layer's output.

A change d of a layer's output at one token changes the prediction by a KL divergence of about (g . d)^2 / 2, where g is
the gradient of log p(y) there and y is drawn from the prediction: Fisher's information. Errors that a quantized matrix
makes at tokens with large gradients are the ones to avoid, so they weigh more in its second moments (as in GuidedQuant,
https://arxiv.org/abs/2505.07004, with one weight for all outputs of a layer). The weight is the gradient's norm; its
square, which the theory gives, rests on too few tokens.
"""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Progress
from edgeq.walk import head, scratch
from edgeq.walk.layered import Layered
from edgeq.walk.stepped import Stepped

_SEED = 20


@dataclass
class Backward:
    """What a walk backwards finds at one layer; gradients are those of the windows' log-likelihood.

    norms: of the gradient at each token of its output, float32 [windows, length]; read and written: for each matrix
    that is watched what it reads, and the gradient at what it writes, a tensor [tokens, ...] of the windows in their
    order; sizes: the norm of the one times that of the other, at all tokens, a tensor [windows, length].
    """

    index: int
    norms: NDArray[np.float32]
    read: dict[str, Any] = field(default_factory=dict)
    written: dict[str, Any] = field(default_factory=dict)
    sizes: dict[str, Any] = field(default_factory=dict)


def token_weights(
    model: Layered, tokens: NDArray[np.int32], text: int, folder: Path, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """Weights of each token for each layer, [layers, windows, length], and states after the last one.

    Their mean is 1 in each layer over the first `text` windows, and over the others: gradients at random tokens were
    three to twelve times as large on the demos. Walks forwards and backwards; states are in files of `folder`, those
    between layers with 2 bytes a value, and a walk that was stopped goes on there after the last finished layer.
    """
    states, between = kept_forwards(model, tokens, folder, progress)
    back = Stepped(folder, "back", states.shape, lambda: head.slopes(model, states, _SEED))
    norms = scratch.kept(folder / "norms", (model.count, *tokens.shape), begun=back.done > 0)
    for layer in kept_backwards(model, back, between, progress):
        norms[layer.index] = layer.norms
        norms.flush()
    weights = np.array(norms)
    for kind in filter(np.size, np.split(weights, [text], axis=1)):
        kind /= kind.mean(axis=(1, 2), keepdims=True)
    return weights, states


def kept_forwards(
    model: Layered, tokens: NDArray[np.int32], folder: Path, progress: Progress
) -> tuple[NDArray[np.float32], NDArray[np.uint16]]:
    """States of windows of tokens after the last layer, and those before each, as `forwards` has them.

    Both are in files of `folder`, where a walk that was stopped goes on after the last finished layer; raises
    CorruptInput when they cannot be read.
    """
    count, shape = model.count, (*tokens.shape, model.checkpoint.model.hidden)
    ahead = Stepped(folder, "ahead", shape, lambda: head.embed(head.exact(model.checkpoint, head.TABLE), tokens))
    between = scratch.kept(folder / "between", (count, *shape), np.uint16, begun=ahead.done > 0)
    while ahead.done < count:
        progress("gradients", ahead.done, 2 * count)
        with ahead.step() as states:
            _forward(model, ahead.done, states, between)
            between.flush()
    return ahead.values, between


def kept_backwards(
    model: Layered, back: Stepped, between: NDArray[np.uint16], progress: Progress, *, watch: int = 0
) -> Iterator[Backward]:
    """Layers that are not done yet, as `backwards` has them; `back` are the gradients after the last one, stepped.

    A layer is done when the next is asked for: what is to be kept of it must be by then.
    """
    count = model.count
    while back.done < count:
        progress("gradients", count + back.done, 2 * count)
        with back.step() as slopes:
            yield _backward(model, count - 1 - back.done, slopes, between, watch=watch)
    progress("gradients", 2 * count, 2 * count)


def forwards(model: Layered, states: NDArray[np.float32], folder: Path, progress: Progress) -> NDArray[np.uint16]:
    """States before each layer, [layers, windows, length, hidden]; those given become the ones after the last layer.

    What is returned holds bfloat16 and lies in a file of `folder` that goes with it.
    """
    between = scratch.unnamed(folder, (model.count, *states.shape), np.uint16)
    for index in range(model.count):
        progress("gradients", index, 2 * model.count)
        _forward(model, index, states, between)
    return between


def backwards(
    model: Layered,
    slopes: NDArray[np.float32],
    between: NDArray[np.uint16],
    progress: Progress,
    *,
    watch: int = 0,
) -> Iterator[Backward]:
    """Every layer from the last to the first, each until the next; `slopes` are the gradients after it, then before it.

    between: as `forwards` found them. watch: find what every matrix that recipes quantize reads, and the gradient at
    what it writes, at one of so many tokens of each window, from another one on in each; 0 for nothing.
    """
    total = 2 * model.count
    for index in reversed(range(model.count)):
        progress("gradients", total - 1 - index, total)
        found = _backward(model, index, slopes, between, watch=watch)
        yield found
        found.read, found.written, found.sizes = {}, {}, {}
    progress("gradients", total, total)


def _forward(model: Layered, index: int, states: NDArray[np.float32], between: NDArray[np.uint16]) -> None:
    """Note states before one layer, and replace them by those after it."""
    import torch

    between[index] = torch.from_numpy(states).to(torch.bfloat16).view(torch.uint16).numpy()
    with model.layer(index):
        model.advance(index, states)


def _backward(
    model: Layered, index: int, slopes: NDArray[np.float32], between: NDArray[np.uint16], *, watch: int = 0
) -> Backward:
    """Replace gradients after one layer by those before it.

    Room for what is watched is made at once: among what each window needs for a while it would keep that from being
    given back.
    """
    import torch

    found = Backward(index, np.empty(slopes.shape[:2], np.float32))
    count, length = found.norms.shape
    watched = model.matrices(index) if watch else []
    tokens = [slice(window % max(watch, 1), None, watch or None) for window in range(count)]
    ends = np.cumsum([len(range(length)[each]) for each in tokens])
    room = threading.Lock()

    def watch_one(window: int, name: str, read: Any, written: Any, same: str) -> None:
        with room:
            if name not in found.sizes:
                shared = found.read.get(same)
                found.read[name] = torch.empty(ends[-1], read.shape[1]) if shared is None else shared
                found.written[name] = torch.empty(ends[-1], written.shape[1])
                found.sizes[name] = torch.empty(count, length)
        here = slice(ends[window] - len(range(length)[tokens[window]]), ends[window])
        found.read[name][here] = read[tokens[window]]
        found.written[name][here] = written[tokens[window]]
        found.sizes[name][window] = read.norm(dim=1) * written.norm(dim=1)

    def back(window: int) -> None:
        before = torch.from_numpy(between[index, window].copy()).view(torch.bfloat16).to(torch.float32)
        found.norms[window] = np.linalg.norm(slopes[window], axis=1)
        slope, seen = _pull_back(model, index, before, torch.from_numpy(slopes[window]), watched)
        slopes[window] = slope.numpy()
        first: dict[int, str] = {}
        for name, read, written in seen:
            watch_one(window, name, read, written, first.setdefault(id(read), name))

    with model.layer(index):
        model.parallel(back, range(count))
    return found


def _pull_back(
    model: Layered, index: int, before: Any, slope: Any, watched: Sequence[str]
) -> tuple[Any, list[tuple[str, Any, Any]]]:
    """Gradient before a layer from that after it; of each watched matrix its name, what it reads and the gradient.

    The gradient is that at what it writes; both are tensors [length, ...].
    """
    import torch

    seen: dict[int, list[tuple[str, Any, Any]]] = defaultdict(list)
    here = threading.get_ident()
    hooks = [
        model.linear(name).register_forward_hook(
            lambda _, inputs, output, name=name: seen[threading.get_ident()].append((name, inputs[0], output))
        )
        for name in watched
    ]
    try:
        with torch.enable_grad():
            before = before.clone().requires_grad_(True)
            after = model.run(index, before)
            wanted = [before, *(output for _, _, output in seen[here])]
            found, *written = torch.autograd.grad(after, wanted, slope.clone())
    finally:
        for hook in hooks:
            hook.remove()
    inputs = {id(values): values.detach().flatten(0, -2) for _, values, _ in seen[here]}
    return found, [
        (name, inputs[id(values)], each.flatten(0, -2))
        for (name, values, _), each in zip(seen[here], written, strict=True)
    ]
