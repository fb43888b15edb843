"""How much each token matters: the gradient of the model's own log-likelihood at each layer's output.

A change d of a layer's output at one token changes the prediction by a KL divergence of about (g . d)^2 / 2, where g is
the gradient of log p(y) there and y is drawn from the prediction: Fisher's information. Errors that a quantized matrix
makes at tokens with large gradients are the ones to avoid, so they weigh more in its second moments (as in GuidedQuant,
https://arxiv.org/abs/2505.07004, with one weight for all outputs of a layer). The weight is the gradient's norm; its
square, which the theory gives, rests on too few tokens.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import Progress
from edgeq.walk import head
from edgeq.walk.layered import Layered

_SEED = 20


def token_weights(model: Layered, tokens: NDArray[np.int32], scratch: Path, progress: Progress) -> NDArray[np.float32]:
    """Weights of each token for each layer, [layers, windows, length], with mean 1 in each layer.

    Walks forwards and backwards; the states between layers are kept in the file `scratch`, 2 bytes a value.
    """
    import torch

    windows, length = tokens.shape
    weights = np.empty((model.count, windows, length), np.float32)
    states = head.embed(head.exact(model.checkpoint, head.TABLE), tokens)
    kept = np.memmap(scratch, np.uint16, "w+", shape=(model.count, *states.shape))
    total = 2 * model.count
    for index in range(model.count):
        progress("gradients", index, total)
        kept[index] = torch.from_numpy(states).to(torch.bfloat16).view(torch.uint16).numpy()
        with model.layer(index):
            model.advance(index, states)
    slopes = head.slopes(model, states, _SEED)
    for index in reversed(range(model.count)):
        progress("gradients", total - 1 - index, total)
        weights[index] = np.linalg.norm(slopes, axis=2)
        with model.layer(index):

            def back(window: int, index: int = index) -> None:
                before = torch.from_numpy(kept[index, window]).view(torch.bfloat16).to(torch.float32)
                slopes[window] = _pull_back(model, index, before, torch.from_numpy(slopes[window])).numpy()

            model.parallel(back, range(windows))
    progress("gradients", total, total)
    scratch.unlink()
    weights /= weights.mean(axis=(1, 2), keepdims=True)
    return weights


def _pull_back(model: Layered, index: int, before: Any, slope: Any) -> Any:
    """Gradient before a layer from that after it."""
    import torch

    with torch.enable_grad():
        before = before.clone().requires_grad_(True)
        (found,) = torch.autograd.grad(model.run(index, before), before, slope.clone())
    return found
