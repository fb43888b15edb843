"""Chat with a bundle: its own template, its own tokenizer, greedy decoding, text as it comes."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import msgspec

from edgeq import backends, bundle, chat, data, profiles, speculation
from edgeq.errors import CorruptInput, UsageFault


class GenerationConfig(msgspec.Struct):
    """What edgeq reads of `generation_config.json`: the ids that end an answer."""

    eos_token_id: int | list[int] | None = None


class Chat:
    """A loaded bundle that answers messages; close it when done."""

    def __init__(self, folder: Path, *, draft: str | None = None) -> None:
        """Check and load a bundle; raises DigestMismatch when its bytes changed, UsageFault without a template.

        With `draft`, `lookup` or `head`, tokens are guessed that way and checked several at once; `no_draft` says why
        not, where the engine cannot. It is not the default, since engines round: of two tokens that are equally likely
        to within that, it may take the other one than decoding one by one does (see `speculation.generate`).
        """
        from tokenizers import Tokenizer

        made = bundle.read(folder)
        bundle.verify_files(folder, made)
        template = folder / "chat_template.jinja"
        if not template.is_file():
            raise UsageFault(f"{folder}: the checkpoint came without a chat template", why="It is no chat model.")
        self.template = template.read_text(encoding="utf-8")
        self.context = made.context
        try:
            self._tokenizer: Any = Tokenizer.from_file(str(folder / "tokenizer.json"))
        except Exception as error:
            raise CorruptInput(f"{folder / 'tokenizer.json'}: not a tokenizer", why=str(error)) from error
        self._stops = _stops(folder, self._tokenizer)
        self._session = backends.get(made.backend).load(folder, made)
        self.no_draft = self._session.one_way if draft else None
        self._generate = partial(speculation.generate, self._session, way=draft) if draft else self._session.generate
        self.placement = self._session.placement
        self.target, self.provider = made.target, made.provider
        self.elsewhere = _elsewhere(made, profiles.provider(self.placement))

    def reply(self, messages: Sequence[dict[str, str]], tokens: int, thinking: bool | None = None) -> Iterator[str]:
        """Pieces of the answer to messages, at most `tokens` tokens.

        Raises UsageFault when the prompt leaves no room in the context, or when `thinking` is set and the template
        has no such switch.
        """
        from tokenizers.decoders import DecodeStream

        if thinking is not None and not chat.knows_thinking(self.template):
            raise UsageFault(
                "this model's chat template has no thinking switch", run="edgeq run BUNDLE without --think / --no-think"
            )
        prompt = self._tokenizer.encode(chat.render(self.template, messages, thinking), add_special_tokens=False).ids
        room = self.context - len(prompt)
        if room < 1:
            raise UsageFault(
                f"the conversation has {len(prompt)} tokens, the bundle's context is {self.context}",
                run="start a new conversation, or build with a larger --context",
            )
        stream = DecodeStream(skip_special_tokens=False)
        for token in self._generate(prompt, min(tokens, room)):
            if token in self._stops:
                return
            if piece := stream.step(self._tokenizer, token):
                yield piece

    def close(self) -> None:
        """Release the engine."""
        self._session.close()


def _elsewhere(made: bundle.Bundle, found: str) -> str | None:
    """What to tell people when a bundle does not run where it was made for."""
    if found.partition(" ")[0] == made.provider:
        return None
    doctor = f"edgeq doctor --target {made.target}, or its file"
    return f"this bundle is made for {made.provider} and runs on {found} here; next: {doctor}"


def _stops(folder: Path, tokenizer: Any) -> set[int]:
    """Ids that end an answer: those of generation_config.json and the end of a ChatML turn."""
    path = folder / "generation_config.json"
    given = data.read_json(path, GenerationConfig).eos_token_id if path.is_file() else None
    found = given if isinstance(given, list) else [given]
    return {stop for stop in (*found, tokenizer.token_to_id("<|im_end|>")) if stop is not None}
