"""The float32 reference: transformers over windows of a held-out text, recorded for gate, verify and profile."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import accuracy, transformer
from edgeq.accuracy import CONTINUATION, PROMPT, TOP_K, Reference, likeliest
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault
from edgeq.quantize.solve import float_type, rounded
from edgeq.recipe import Recipe
from edgeq.size import is_quantized

LENGTH = 128
QUICK_WINDOWS = 8
FULL_WINDOWS = 48
FULL_TOP_K = 4096
_NUMPY = {"BF16": "bfloat16", "F16": "float16", "F32": "float32"}


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


def full(checkpoint: Checkpoint, text: str, progress: Progress) -> Reference:
    """Reference over much of a text, more of it kept than in `quick`. Holds the model in float32, 4 bytes a weight."""
    vocab = checkpoint.model.vocab
    found = windows(checkpoint.folder, text, FULL_WINDOWS, LENGTH, vocab)
    model = transformer.instantiate(checkpoint, lambda _: True)
    return _record(model, found, text, min(FULL_TOP_K, vocab), progress)


def quick(
    checkpoint: Checkpoint, recipe: Recipe, text: str, context: int, progress: Progress
) -> tuple[Reference, float]:
    """The reference that a bundle carries, and the loss of the recipe's weights alone.

    That loss is the KL divergence, in nats per token, of the same transformers model with every matrix replaced by what
    the recipe makes of it: what an engine loses beyond it is the engine's. Holds the model in float32.
    """
    length = min(LENGTH, context - CONTINUATION)
    found = windows(checkpoint.folder, text, QUICK_WINDOWS, length, checkpoint.model.vocab)
    model = transformer.instantiate(checkpoint, lambda _: True)
    reference = _record(model, found, text, min(TOP_K, checkpoint.model.vocab), progress)
    return reference, _weights_only(model, checkpoint, recipe, reference, progress)


def _record(model: Any, found: NDArray[np.int32], text: str, keep: int, progress: Progress) -> Reference:
    """Reference over token windows, keeping the `keep` likeliest tokens of each position."""
    import torch

    length = found.shape[1]
    ids = np.empty((len(found), length - 1, keep), np.uint32)
    log_probs = np.empty(ids.shape, np.float32)
    following = np.empty(ids.shape[:2], np.float32)
    with torch.inference_mode():
        for index, window in enumerate(found):
            progress("reference", index, len(found))
            logits = _logits(model, window)[:-1]
            if not np.isfinite(logits).all():
                raise CorruptInput(
                    "the checkpoint's own float32 logits are not finite", run="download the checkpoint again"
                )
            ids[index], log_probs[index], all_log_probs = likeliest(logits, keep)
            following[index] = np.take_along_axis(all_log_probs, window[1:, None].astype(np.int64), axis=1)[:, 0]
        continuation = _continue(model, found[0, :PROMPT])
    progress("reference", len(found), len(found))
    digest = hashlib.sha256(text.encode()).hexdigest()
    vocab = int(model.config.vocab_size)
    return Reference(found, ids, log_probs, following, np.array(continuation, np.int32), digest, vocab)


def _weights_only(
    model: Any, checkpoint: Checkpoint, recipe: Recipe, reference: Reference, progress: Progress
) -> float:
    """Loss of a model whose matrices are replaced in place by what a recipe makes of them."""
    import torch

    names = [name for name in checkpoint.model.tensors() if is_quantized(name)]
    if recipe.body.is_float and all(_stored_exactly(checkpoint, recipe, name) for name in names):
        return 0.0
    total = len(names) + len(reference.windows)
    with torch.inference_mode():
        for done, name in enumerate(names):
            progress("weights only", done, total)
            model.get_parameter(name).data = torch.from_numpy(rounded(checkpoint, recipe, name))
        losses = []
        for window, tokens in enumerate(reference.windows):
            progress("weights only", len(names) + window, total)
            losses.append(accuracy.compare(reference, window, _logits(model, tokens)))
    progress("weights only", total, total)
    return accuracy.summarize(reference, losses).kl_mean


def _stored_exactly(checkpoint: Checkpoint, recipe: Recipe, name: str) -> bool:
    """Whether a recipe of floats keeps every value of a matrix."""
    return recipe.body.name == "f32" or float_type(checkpoint, recipe, name).name == _NUMPY[checkpoint.dtype(name)]


def _logits(model: Any, tokens: NDArray[np.int32]) -> NDArray[np.float32]:
    """Logits [length, vocabulary] of one window."""
    import torch

    logits: NDArray[np.float32] = model(input_ids=torch.from_numpy(tokens[None].astype(np.int64))).logits[0].numpy()
    return logits


def _continue(model: Any, prompt: Sequence[int] | NDArray[np.int32]) -> list[int]:
    """Greedy continuation of the reference, `CONTINUATION` tokens."""
    import torch

    tokens, cache = [], None
    step = torch.tensor([list(map(int, prompt))])
    for _ in range(CONTINUATION):
        output = model(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        tokens.append(int(output.logits[0, -1].argmax()))
        step = torch.tensor([[tokens[-1]]])
    return tokens
