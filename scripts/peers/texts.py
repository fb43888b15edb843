"""The texts of a comparison: what peers calibrate with, and what all sides are asked about."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import proofs
from edgeq import calibration, data, transformer
from edgeq.checkpoint import Checkpoint

CALIBRATION = data.folder("demo") / "calibration.txt"
"""What every side calibrates with; the grammar keeps the instances of the held-out text out of it."""
LENGTH = 256
HELD_OUT, SAMPLED, FOREIGN = "held-out", "sampled", "foreign"
TEXTS = (HELD_OUT, SAMPLED, FOREIGN)


def calibration_windows(checkpoint: Checkpoint, *, tuned: bool = True) -> NDArray[np.int32]:
    """The windows, int32 [count, length], that edgeq itself tunes a demo checkpoint's scales over, or fits it to."""
    length = calibration.LENGTH
    return calibration.read(checkpoint, calibration.BUNDLED, True, length, lambda *_: None, tuned=tuned).windows


def windows(checkpoint: Checkpoint, text: str, count: int) -> NDArray[np.int32]:
    """At most `count` windows of 256 tokens, int32 [windows, length], of one of TEXTS.

    Held-out text; text that the float32 model itself samples at temperature 1; plain English, which no demo checkpoint
    was trained on: the licence.
    """
    if text == SAMPLED:
        return sampled(checkpoint, count)
    file = data.folder("demo") / "heldout.txt" if text == HELD_OUT else proofs.ROOT / "LICENSE"
    return _windows(checkpoint, file.read_text(encoding="utf-8"), count, LENGTH)


def sampled(checkpoint: Checkpoint, count: int) -> NDArray[np.int32]:
    """Windows that the float32 model wrote itself, each after one token of the calibration text; the seed is fixed."""
    import torch

    starts = calibration_windows(checkpoint, tuned=False).reshape(-1)
    draws = np.random.default_rng(0).integers(0, starts.size, count)
    random = torch.Generator().manual_seed(0)
    model = transformer.instantiate(checkpoint, lambda _: True)
    step = torch.from_numpy(starts[draws, None].astype(np.int64))
    found, cache = [step], None
    with torch.inference_mode():
        while len(found) < LENGTH:
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            step = torch.multinomial(output.logits[:, -1].softmax(-1), 1, generator=random)
            found.append(step)
    tokens: NDArray[Any] = torch.cat(found, dim=1).numpy()
    return tokens.astype(np.int32)


def reference(checkpoint: Checkpoint, found: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [windows, length, vocabulary] of the float32 transformers model."""
    import torch

    model = transformer.instantiate(checkpoint, lambda _: True)
    with torch.inference_mode():
        logits = [
            model(input_ids=torch.from_numpy(window[None].astype(np.int64))).logits[0].numpy() for window in found
        ]
    return np.stack(logits)


def _windows(checkpoint: Checkpoint, text: str, count: int, length: int) -> NDArray[np.int32]:
    from tokenizers import Tokenizer

    ids = Tokenizer.from_file(str(Path(checkpoint.folder, "tokenizer.json"))).encode(text).ids
    count = min(count, len(ids) // length)
    return np.array(ids[: count * length], np.int32).reshape(count, length)
