"""The tokenizer as GGUF metadata: tokens in the order of their ids, their kinds, and the merges."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeVar

import msgspec

from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, UnsupportedModel

Document = TypeVar("Document")
PRE_TOKENIZERS = {"2.5": "qwen2", "3": "qwen2", "3.5": "qwen35"}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


class _Added(msgspec.Struct):
    id: int
    content: str
    special: bool = False


class _Bpe(msgspec.Struct, tag_field="type", tag="BPE"):
    vocab: dict[str, int]
    merges: list[str | tuple[str, str]]


class _Tokenizer(msgspec.Struct):
    model: _Bpe
    added_tokens: list[_Added] = []


class _Settings(msgspec.Struct):
    bos_token: str | dict[str, object] | None = None
    eos_token: str | dict[str, object] | None = None
    pad_token: str | dict[str, object] | None = None


@dataclass(frozen=True)
class Vocabulary:
    """`tokens`, and `kinds` by GGUF's numbers, one per row of the embedding table; ids of special roles or None."""

    tokens: tuple[str, ...]
    kinds: tuple[int, ...]
    merges: tuple[str, ...]
    bos: int | None
    eos: int | None
    pad: int | None


def read(checkpoint: Checkpoint) -> Vocabulary:
    """Vocabulary of a checkpoint's byte-level BPE, padded to the model's size.

    Raises CorruptInput when tokenizer.json is damaged, no BPE, or has ids beyond the model's, UnsupportedModel when it
    has no merges, which llama.cpp insists on.
    """
    found = _decode(checkpoint, "tokenizer.json", _Tokenizer)
    settings = _decode(checkpoint, "tokenizer_config.json", _Settings)
    size = checkpoint.model.vocab
    kinds = dict.fromkeys(found.model.vocab, _NORMAL)
    ids = dict(found.model.vocab)
    for added in found.added_tokens:
        ids[added.content] = added.id
        kinds[added.content] = _CONTROL if added.special else _USER_DEFINED
    by_id = {number: word for word, number in ids.items()}
    if odd := [number for number in by_id if not 0 <= number < size]:
        raise CorruptInput(f"{checkpoint.folder / 'tokenizer.json'}: has token {odd[0]}, the model has {size}")
    if not found.model.merges:
        raise UnsupportedModel(
            f"{checkpoint.folder / 'tokenizer.json'}: no merges", why="llama.cpp needs one at least."
        )
    tokens = tuple(by_id.get(number, f"[PAD{number}]") for number in range(size))
    return Vocabulary(
        tokens=tokens,
        kinds=tuple(kinds.get(word, _UNUSED) for word in tokens),
        merges=tuple(pair if isinstance(pair, str) else " ".join(pair) for pair in found.model.merges),
        bos=ids.get(_text(settings.bos_token)),
        eos=ids.get(_text(settings.eos_token)),
        pad=ids.get(_text(settings.pad_token)),
    )


def _decode(checkpoint: Checkpoint, file: str, kind: type[Document]) -> Document:
    try:
        return msgspec.json.decode(checkpoint.text_file(file) or "{}", type=kind)
    except (ValueError, RecursionError) as error:
        raise CorruptInput(f"{checkpoint.folder / file}: cannot be read", why=str(error)) from error


def _text(token: str | dict[str, object] | None) -> str:
    """A special token as text; newer files spell it as an object."""
    return str(token.get("content", "")) if isinstance(token, dict) else token or ""
