"""Token windows that calibrated methods fit matrices to: a bundled text, one's own, or what the model itself writes."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import chat, data, transformer
from edgeq.backends.base import Progress
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UsageFault
from edgeq.walk.windows import FITTED

WINDOWS, LENGTH = FITTED, 512
"""Windows that matrices are fitted to, and tokens of each."""
TUNED = 128
"""Windows over which scales are tuned: what has more freedom wants more text."""
BUNDLED, SELF = "bundled", "self"
_SUFFIXES = (".txt", ".md")
_CHAT_CHARACTERS = 2000
_QUESTION = "What is the question?"
_SEED = 7


@dataclass(frozen=True)
class Calibration:
    """Token windows, int32 [count, length], their source, and the SHA-256 of its text, or of tokens a model wrote."""

    windows: NDArray[np.int32]
    source: str
    sha256: str

    @property
    def note(self) -> str | None:
        """What to tell people of a text that is short; None of one that suffices."""
        count, length = self.windows.shape
        if count >= WINDOWS:
            return None
        return (
            f"calibration: the text fills {count} windows of {length} tokens, {WINDOWS} are wanted; "
            "what is fitted to little text loses more on others"
        )


def read(
    checkpoint: Checkpoint, source: str, demo: bool, longest: int, progress: Progress, *, tuned: bool = False
) -> Calibration:
    """Windows from a source: `bundled`, `self`, a text file, or a folder of .txt and .md files.

    At most `WINDOWS` of `LENGTH` tokens (`TUNED` for scales that are tuned), or of `longest` where that is less, spread
    over the text; where the checkpoint has a chat template every other piece of a text is put into it, as a question
    and its answer. demo: the bundled text is that of the demo checkpoints. Raises UsageFault when a text is absent,
    fills no window, or is the one that losses are measured on; CorruptInput when it is not UTF-8; what the checkpoint's
    tokenizer and template raise.
    """
    count, length = TUNED if tuned else WINDOWS, min(LENGTH, longest)
    if source == SELF:
        found = written(checkpoint, count, length, progress)
        return Calibration(found, SELF, hashlib.sha256(found.tobytes()).hexdigest())
    text = _bundled(demo) if source == BUNDLED else _text(Path(source))
    digest = hashlib.sha256(text.encode()).hexdigest()
    if data.held_out().strip() in text:
        raise UsageFault(
            f"--calibration {source}: holds the text that the loss is measured on",
            why="A loss measured on what a model was fitted to says nothing.",
            run="edgeq build ... --calibration with another text",
        )
    template = None if demo else checkpoint.chat_template()
    pieces = [text] if template is None else list(_as_chat(text, template))
    return Calibration(_cut(_tokens(checkpoint, pieces), count, length, source), source, digest)


def _bundled(demo: bool) -> str:
    if demo:
        return (data.folder("demo") / "calibration.txt").read_text(encoding="utf-8")
    return _text(data.folder("texts"))


def _text(path: Path) -> str:
    """Text of a file, or of all text files of a folder in the order of their names."""
    files = sorted(each for each in path.rglob("*") if each.suffix in _SUFFIXES) if path.is_dir() else [path]
    if not files:
        raise UsageFault(
            f"--calibration {path}: no {' or '.join(_SUFFIXES)} file is in this folder",
            run="edgeq build ... --calibration FILE",
        )
    found = []
    for file in files:
        try:
            found.append(file.read_text(encoding="utf-8"))
        except OSError as error:
            raise UsageFault(
                f"--calibration {file}: {error.strerror}", run="edgeq build ... --calibration FILE"
            ) from error
        except UnicodeDecodeError as error:
            raise CorruptInput(
                f"{file}: not UTF-8 text", why=str(error), run="edgeq build ... --calibration with a text file"
            ) from error
    return "\n\n".join(found)


def _as_chat(text: str, template: str) -> Iterator[str]:
    """Pieces of a text, every other one as a question and an answer in a template, cut between paragraphs."""
    before, _, after = chat.render(template, [{"role": "user", "content": _QUESTION}]).partition(_QUESTION)
    piece: list[str] = []
    turn = 0
    for paragraph in [*filter(str.strip, text.split("\n\n")), ""]:
        if paragraph and sum(map(len, piece)) < _CHAT_CHARACTERS:
            piece.append(paragraph)
            continue
        if turn % 2 and len(piece) > 1:
            yield before + piece[0] + after + "\n\n".join(piece[1:])
        elif piece:
            yield "\n\n".join(piece)
        piece, turn = [paragraph], turn + 1


def _tokens(checkpoint: Checkpoint, pieces: list[str]) -> NDArray[np.int32]:
    from tokenizers import Tokenizer

    path = checkpoint.folder / "tokenizer.json"
    try:
        tokenizer = Tokenizer.from_file(str(path))
        found = np.array([token for each in tokenizer.encode_batch(pieces) for token in each.ids], np.int32)
    except Exception as error:
        raise CorruptInput(f"{path}: cannot tokenize", why=str(error)) from error
    if found.size and found.max() >= checkpoint.model.vocab:
        raise CorruptInput(f"{path}: gives token {found.max()}, the model has {checkpoint.model.vocab}")
    return found


def _cut(tokens: NDArray[np.int32], wanted: int, length: int, source: str) -> NDArray[np.int32]:
    count = min(wanted, len(tokens) // length)
    if count == 0:
        raise UsageFault(
            f"--calibration {source}: the text has {len(tokens)} tokens",
            why=f"A window has {length}; some {wanted * length} tokens are wanted.",
            run="edgeq build ... --calibration with a longer text",
        )
    starts = np.linspace(0, len(tokens) - length, count).astype(int)
    return np.stack([tokens[start : start + length] for start in starts])


def written(checkpoint: Checkpoint, count: int, length: int, progress: Progress) -> NDArray[np.int32]:
    """Windows [count, length] that the float model writes, each from a first token drawn from all, at temperature 1.

    As LLM-QAT (https://arxiv.org/abs/2305.17888) does. Holds the float32 model: raises OutOfMemory where it cannot be.
    """
    import torch

    transformer.check_memory(checkpoint.model, beside=count * length * checkpoint.model.kv_bytes_per_token(4))
    model = transformer.instantiate(checkpoint, lambda _: True)
    rng = np.random.default_rng(_SEED)
    tokens = np.empty((count, length), np.int32)
    tokens[:, 0] = rng.integers(0, checkpoint.model.vocab, count)
    cache: Any = None
    with torch.no_grad():
        for place in range(1, length):
            progress("text", place, length)
            step = torch.from_numpy(tokens[:, place - 1 : place].astype(np.int64))
            output = model(input_ids=step, past_key_values=cache, use_cache=True)
            cache = output.past_key_values
            chances = torch.softmax(output.logits[:, -1].double(), 1).numpy()
            tokens[:, place] = [
                min(int(np.searchsorted(np.cumsum(row), mark)), len(row) - 1)
                for row, mark in zip(chances, rng.random(count), strict=True)
            ]
    return tokens
