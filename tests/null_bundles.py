"""References and bundles of the null backend, written by hand: nothing is built, every answer is known."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import numpy as np

import checkpoints
from edgeq import accuracy, bundle, data
from edgeq.accuracy import Reference
from edgeq.backends.null import NullSession
from edgeq.bundle import Bundle, Gate, Source

WINDOWS, LENGTH, VOCAB = 3, 40, checkpoints.VOCAB


def reference(vocab: int = VOCAB, k: int | None = None) -> Reference:
    """What the null backend predicts over three windows, as if that were the float32 model."""
    session = NullSession(vocab)
    windows = np.random.default_rng(0).integers(0, vocab, (WINDOWS, LENGTH)).astype(np.int32)
    kept = [accuracy.likeliest(session.logits(window)[:-1], k or vocab) for window in windows.tolist()]
    following = [
        np.take_along_axis(every, window[1:, None].astype(np.int64), axis=1)[:, 0]
        for window, (_, _, every) in zip(windows, kept, strict=True)
    ]
    return Reference(
        windows=windows,
        ids=np.array([ids for ids, _, _ in kept]),
        log_probs=np.array([log_probs for _, log_probs, _ in kept]),
        next_log_probs=np.array(following),
        continuation=np.arange(48, dtype=np.int32) % vocab,
        text_sha256="ab" * 32,
        vocab=vocab,
    )


def write(folder: Path, record: Reference | None = None, template: str | None = None, **changes: Any) -> Bundle:
    """A sealed bundle in `folder`, with the tokenizer of the tiny checkpoints; `changes` replace manifest fields."""
    checkpoints.write(folder, "3")
    for name in ("config.json", "model.safetensors"):
        (folder / name).unlink()
    if template is not None:
        (folder / "chat_template.jinja").write_text(template, encoding="utf-8")
    (folder / "null.json").write_bytes(msgspec.json.encode({"vocab": VOCAB}))
    accuracy.save(record or reference(), folder / bundle.REFERENCE)
    return seal(folder, **changes)


def seal(folder: Path, **changes: Any) -> Bundle:
    """Write the manifest of what lies in a folder."""
    draft = Bundle(
        schema=bundle.SCHEMA,
        digest="",
        model="tiny",
        generation="3",
        config=checkpoints.config_of("3"),
        source=Source("folder", "tiny", None, ()),
        recipe="w4g32-e8-rtn",
        bits_per_weight=5.0,
        target="x86-avx2",
        backend="null",
        provider="null",
        context=64,
        tools=("null 1",),
        notes=(),
        files=bundle.files_in(folder),
        gate=Gate(True, 0.0, 0.0, 1.0, 9.0, 9.0, None, 0.3, WINDOWS * (LENGTH - 1), "ab" * 32, "x86_64"),
    )
    made = bundle.seal(msgspec.structs.replace(draft, **changes))
    (folder / bundle.MANIFEST).write_bytes(data.to_json(made))
    return made
