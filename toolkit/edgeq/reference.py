"""The float32 reference: transformers over windows of a held-out text, recorded for gate, verify and profile."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import transformer
from edgeq.accuracy import PROMPT, TOP_K, Reference, likeliest
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault

LENGTH = 128
QUICK_WINDOWS = 8
FULL_WINDOWS = 48
_CONTINUATION = 48


def windows(folder: Path, text: str, count: int, length: int, vocab: int) -> NDArray[np.int32]:
    """Token windows [count, length] spread evenly over a text, by the tokenizer of `folder`.

    Fewer when the text is short; raises UsageFault when it does not fill one, CorruptInput when the tokenizer
    is damaged or gives ids beyond the model's vocabulary.
    """
    from tokenizers import Tokenizer

    try:
        ids = Tokenizer.from_file(str(folder / "tokenizer.json")).encode(text).ids
    except Exception as error:
        raise CorruptInput(f"{folder / 'tokenizer.json'}: cannot tokenize", why=str(error)) from error
    if max(ids, default=0) >= vocab:
        raise CorruptInput(f"{folder / 'tokenizer.json'}: gives token {max(ids)}, the model has {vocab}")
    count = min(count, len(ids) // length)
    if count == 0:
        raise UsageFault(f"the text has {len(ids)} tokens", why=f"The accuracy check needs at least {length}.")
    starts = np.linspace(0, len(ids) - length, count).astype(int)
    return np.array([ids[start : start + length] for start in starts], np.int32)


def record(
    checkpoint: Checkpoint, text: str, count: int, keep: int, progress: Progress, length: int = LENGTH
) -> Reference:
    """Reference over `count` windows of `length` tokens, keeping the `keep` likeliest tokens of each position.

    Holds the model in float32 (4 bytes a weight) while it runs; raises CorruptInput at logits that are not finite.
    """
    import torch

    vocab = checkpoint.model.vocab
    found = windows(checkpoint.folder, text, count, length, vocab)
    keep = min(keep, vocab)
    model = transformer.instantiate(checkpoint, lambda _: True)
    ids = np.empty((len(found), length - 1, keep), np.uint32)
    log_probs = np.empty(ids.shape, np.float32)
    following = np.empty(ids.shape[:2], np.float32)
    with torch.inference_mode():
        for index, window in enumerate(found):
            progress("reference", index, len(found))
            logits = model(input_ids=torch.from_numpy(window[None].astype(np.int64))).logits[0, :-1].numpy()
            if not np.isfinite(logits).all():
                raise CorruptInput(
                    f"{checkpoint.folder}: the checkpoint's own float32 logits are not finite",
                    run="download the checkpoint again",
                )
            ids[index], log_probs[index], all_log_probs = likeliest(logits, keep)
            following[index] = np.take_along_axis(all_log_probs, window[1:, None].astype(np.int64), axis=1)[:, 0]
        continuation = _continue(model, found[0, :PROMPT])
    progress("reference", len(found), len(found))
    digest = hashlib.sha256(text.encode()).hexdigest()
    return Reference(found, ids, log_probs, following, np.array(continuation, np.int32), digest, vocab)


def quick(checkpoint: Checkpoint, text: str, context: int, progress: Progress) -> Reference:
    """The reference that a bundle carries."""
    return record(checkpoint, text, QUICK_WINDOWS, TOP_K, progress, min(LENGTH, context - _CONTINUATION))


def _continue(model: Any, prompt: Sequence[int] | NDArray[np.int32]) -> list[int]:
    """Greedy continuation of the reference, `_CONTINUATION` tokens."""
    import torch

    tokens, cache = [], None
    step = torch.tensor([list(map(int, prompt))])
    for _ in range(_CONTINUATION):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        step = torch.tensor([[tokens[-1]]])
    return tokens
