from __future__ import annotations

import tempfile
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest

import checkpoints
import null_bundles
from edgeq.backends import null
from edgeq.backends.null import NullSession
from edgeq.chatting import Chat
from edgeq.errors import CorruptInput, DigestMismatch, UsageFault

HELLO = [{"role": "user", "content": "Hi"}]
THINKING = checkpoints.CHAT_TEMPLATE + "{{ 'a' if enable_thinking else 'm' }}"
ENDOFTEXT, IM_START, IM_END = 256, 257, 258


class Scripted(NullSession):
    """Says what it is told, and remembers what it was asked."""

    def __init__(self, tokens: Sequence[int]) -> None:
        super().__init__(null_bundles.VOCAB)
        self.tokens, self.asked, self.closed = tokens, list[tuple[list[int], int]](), False

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        self.asked.append((list(ids), tokens))
        yield from self.tokens[:tokens]

    def close(self) -> None:
        self.closed = True


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def scripted(folder: Path, monkeypatch: pytest.MonkeyPatch, tokens: Sequence[int]) -> tuple[Chat, Scripted]:
    session = Scripted(tokens)
    monkeypatch.setattr(null, "load", lambda *_: session)
    return Chat(folder), session


@cache
def tokenizer() -> Any:
    """The byte-level tokenizer of the tiny checkpoints."""
    from tokenizers import Tokenizer

    with tempfile.TemporaryDirectory() as place:
        return Tokenizer.from_file(str(checkpoints.write(Path(place), "3") / "tokenizer.json"))


def prompt_of(text: str) -> list[int]:
    return list(tokenizer().encode(text, add_special_tokens=False).ids)


def test_the_answer_comes_in_pieces_as_it_is_decoded(folder: Path) -> None:
    null_bundles.write(folder, template=THINKING)
    chat = Chat(folder)
    assert list(chat.reply(HELLO, 5, thinking=True)) == ["b", "c", "d", "e", "f"]
    assert list(chat.reply(HELLO, 3, thinking=False)) == ["n", "o", "p"]
    assert "".join(chat.reply(HELLO, 2)) == "no"
    chat.close()


def test_the_answer_is_lazy(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder)
    chat, session = scripted(folder, monkeypatch, prompt_of("abc"))
    answer = chat.reply(HELLO, 3)
    assert session.asked == []
    assert next(answer) == "a"


def test_the_prompt_is_the_template_with_the_assistants_turn_open(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    null_bundles.write(folder)
    chat, session = scripted(folder, monkeypatch, [])
    assert list(chat.reply(HELLO, 7)) == []
    expected = prompt_of("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n")
    assert session.asked == [(expected, 7)]
    assert expected.count(IM_START) == 2


@pytest.mark.parametrize("stop", [IM_END, ENDOFTEXT])
def test_the_answer_ends_at_every_stop_token_without_showing_it(
    folder: Path, monkeypatch: pytest.MonkeyPatch, stop: int
) -> None:
    null_bundles.write(folder)
    chat, _ = scripted(folder, monkeypatch, [*prompt_of("yes"), stop, *prompt_of("never")])
    assert "".join(chat.reply(HELLO, 20)) == "yes"


@pytest.mark.parametrize(
    ("text", "stops"),
    [
        (None, [IM_END]),
        ("{}", [IM_END]),
        ('{"eos_token_id": null}', [IM_END]),
        ('{"eos_token_id": 257, "temperature": 0.7}', [IM_END, IM_START]),
        ('{"eos_token_id": [257, 256]}', [IM_END, IM_START, ENDOFTEXT]),
    ],
)
def test_stop_tokens_come_from_the_generation_config_and_chatml(
    folder: Path, monkeypatch: pytest.MonkeyPatch, text: str | None, stops: list[int]
) -> None:
    null_bundles.write(folder)
    (folder / "generation_config.json").unlink()
    if text is not None:
        (folder / "generation_config.json").write_text(text)
    null_bundles.seal(folder)
    for token in (ENDOFTEXT, IM_START, IM_END):
        chat, _ = scripted(folder, monkeypatch, [token, *prompt_of("x")])
        assert ("".join(chat.reply(HELLO, 2)) == "") is (token in stops)


@pytest.mark.parametrize("text", ["", "[]", '{"eos_token_id": "258"}', '{"eos_token_id": [[258]]}'])
def test_a_damaged_generation_config_is_corrupt_input(folder: Path, text: str) -> None:
    null_bundles.write(folder)
    (folder / "generation_config.json").write_text(text)
    null_bundles.seal(folder)
    with pytest.raises(CorruptInput, match=r"generation_config\.json"):
        Chat(folder)


@pytest.mark.parametrize("text", ["", "{}", "[]"])
def test_a_damaged_tokenizer_is_corrupt_input(folder: Path, text: str) -> None:
    null_bundles.write(folder)
    (folder / "tokenizer.json").write_text(text)
    null_bundles.seal(folder)
    with pytest.raises(CorruptInput, match=r"tokenizer\.json"):
        Chat(folder)


def test_a_letter_of_several_tokens_comes_whole(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder)
    chat, _ = scripted(folder, monkeypatch, prompt_of("é四🙂!"))
    assert list(chat.reply(HELLO, 50)) == ["é", "四", "🙂", "!"]


def test_tokens_that_the_tokenizer_does_not_know_break_nothing(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder)
    chat, _ = scripted(folder, monkeypatch, [*prompt_of("a"), null_bundles.VOCAB - 1, *prompt_of("b")])
    assert "".join(chat.reply(HELLO, 50)) == "ab"


@pytest.mark.parametrize("thinking", [True, False])
def test_the_thinking_switch_is_refused_where_the_template_has_none(folder: Path, thinking: bool) -> None:
    null_bundles.write(folder)
    chat = Chat(folder)
    with pytest.raises(UsageFault, match="no thinking switch") as caught:
        next(chat.reply(HELLO, 5, thinking))
    assert caught.value.exit_code == 2
    assert next(chat.reply(HELLO, 5))


def test_a_full_context_is_said_with_both_numbers(folder: Path) -> None:
    null_bundles.write(folder, context=64)
    long = [{"role": "user", "content": "x" * 64}]
    with pytest.raises(UsageFault, match=r"the conversation has \d+ tokens, the bundle's context is 64") as caught:
        next(Chat(folder).reply(long, 5))
    assert "new conversation" in caught.value.run


def test_the_answer_never_outgrows_the_context(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = len(prompt_of("<|im_start|>user\nHi<|im_end|>\n<|im_start|>assistant\n"))
    for context, room in ((used + 1, 1), (used + 4, 4)):
        null_bundles.write(folder, context=context)
        chat, session = scripted(folder, monkeypatch, prompt_of("abcdefgh"))
        assert len("".join(chat.reply(HELLO, 100))) == room
        assert session.asked[0][1] == room
    null_bundles.write(folder, context=used)
    chat, _ = scripted(folder, monkeypatch, prompt_of("abcdefgh"))
    with pytest.raises(UsageFault, match="context"):
        next(chat.reply(HELLO, 1))


def test_a_bundle_without_a_template_is_no_chat_model(folder: Path) -> None:
    null_bundles.write(folder)
    (folder / "chat_template.jinja").unlink()
    null_bundles.seal(folder)
    with pytest.raises(UsageFault, match="without a chat template"):
        Chat(folder)


@pytest.mark.parametrize("name", ["chat_template.jinja", "tokenizer.json", "generation_config.json", "null.json"])
def test_a_changed_file_is_a_digest_mismatch(folder: Path, name: str) -> None:
    null_bundles.write(folder)
    with (folder / name).open("a") as stream:
        stream.write(" ")
    with pytest.raises(DigestMismatch, match=name):
        Chat(folder)


def test_closing_the_chat_closes_the_session(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder)
    chat, session = scripted(folder, monkeypatch, [])
    chat.close()
    assert session.closed


def test_lookup_answers_the_same_in_fewer_steps(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder, template=THINKING)
    chat, led = Chat(folder), Chat(folder, draft="lookup")
    begun: list[int] = []
    monkeypatch.setattr(NullSession, "begin", lambda self, tokens: begun.append(tokens))
    wanted = "".join(chat.reply(HELLO, 20))
    assert not begun
    assert "".join(led.reply(HELLO, 20)) == wanted
    assert len(begun) == 1
    assert led.no_draft is None


@pytest.mark.parametrize(
    ("way", "words"), [("head", "no multi-token-prediction head"), ("luck", "Known: lookup, head")]
)
def test_a_way_to_guess_that_is_not_there_is_a_usage_error(folder: Path, way: str, words: str) -> None:
    null_bundles.write(folder, template=THINKING)
    with pytest.raises(UsageFault) as caught:
        list(Chat(folder, draft=way).reply(HELLO, 20))
    assert words in str(caught.value)


def test_lookup_on_a_session_that_cannot_take_tokens_back_is_plain_and_says_why(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    null_bundles.write(folder, template=THINKING)
    monkeypatch.setattr(NullSession, "one_way", "it only counts")
    chat = Chat(folder, draft="lookup")
    assert chat.no_draft == "it only counts"
    assert "".join(chat.reply(HELLO, 20)) == "".join(Chat(folder).reply(HELLO, 20))
    assert Chat(folder).no_draft is None
