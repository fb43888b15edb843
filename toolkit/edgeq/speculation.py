"""Several tokens in one step: guessed from the text or by the model's own head, and kept where the model says the same.

A draft is run behind the last certain token in one `advance`, which reads the weights once. Greedy decoding takes the
likeliest token after each position: as long as that is the drafted one the draft was right, and the first that differs
is the model's own (Leviathan et al. 2023, "Fast Inference from Transformers via Speculative Decoding", greedy case).
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Sequence

from edgeq.backends.base import DRAFT, Drafter, Session
from edgeq.errors import UsageFault

SIZES = (3, 2, 1)


class Lookup:
    """Guesses that what followed the last few tokens before follows them again.

    The longest run of `SIZES` tokens that occurred before decides, at its latest place; what follows is read on into
    the guess itself, so that a repetition goes on (Saxena 2023, "Prompt Lookup Decoding"; there, the first place).
    """

    def __init__(self) -> None:
        self._text: list[int] = []
        self._next: dict[tuple[int, ...], int] = {}

    def guess(self, found: Sequence[int], most: int) -> list[int]:
        """Empty when none of the last tokens occurred before."""
        text = self._text
        for token in found:
            for size in SIZES:
                self._next[tuple(text[-size:])] = len(text)
            text.append(token)
        for size in SIZES:
            if start := self._next.get(tuple(text[-size:])):
                return [text[start + n % (len(text) - start)] for n in range(most)]
        return []


def drafter(session: Session, way: str) -> Drafter:
    """What guesses for the text that begins next: by `lookup`, or by the model's own `head`.

    Raises UsageFault for another way, and for a head where the bundle or its engine has none.
    """
    if way == "lookup":
        return Lookup()
    if way != "head":
        raise UsageFault(f"{way!r} is no way to guess tokens", why="Known: lookup, head.")
    if (own := session.drafter()) is None:
        raise UsageFault(
            "this bundle has no multi-token-prediction head",
            why="Checkpoints of Qwen3.5 carry one, and the llamacpp backend runs it.",
            run="--draft lookup",
        )
    return own


def generate(session: Session, ids: Sequence[int], tokens: int, way: str) -> Iterator[int]:
    """Greedy continuation of `ids` with guessed tokens; plain where the session cannot take tokens back.

    The tokens are those of `session.generate`, up to rounding: engines add numbers in another order for several tokens
    than for one, and where two tokens are equally likely to within that, either may come. Over 60 prompts of 100 tokens
    of each demo, all tokens were the same with float32 matrices (onnx `w16`, llamacpp `f32`), for demo-qwen3.5, and
    with onnx `-kv8` on AVX-512 VNNI, where every logit was the same to the bit (ONNX Runtime's AVX2 kernels add one
    token's in another order than those of several). Elsewhere, activations rounded to 8 bits turn the last bit of a
    float into logits that differ by 0.2 at most: with w4g32-e8-rtn the first other token came once in 6000 tokens to
    once in 550, always between two that were within 0.04 of a logit (AMD EPYC).
    Raises what `drafter` and the session raise.
    """
    if session.one_way is not None:
        return session.generate(ids, tokens)
    return itertools.chain.from_iterable(steps(session, ids, tokens, drafter(session, way)))


def steps(session: Session, ids: Sequence[int], tokens: int, guessing: Drafter) -> Iterator[list[int]]:
    """Greedy continuation of `ids`, the tokens of each step together; the first step is the prefill.

    A draft is as long as the drafter was right lately: nothing is risked until it guessed a token that came anyway, a
    guess that held makes the next longer by what it gave, one that failed makes it as short as what was right of it.
    """
    if tokens < 1:
        return
    session.begin(len(ids) + tokens)
    found = [int(session.advance(ids)[-1].argmax())]
    unseen, trust = [*ids, *found], 0
    yield found
    while tokens := tokens - len(found):
        length = min(trust, tokens - 1)
        guess = guessing.guess(unseen, max(length, 1))
        draft = guess[:length]
        likeliest = session.advance([found[-1], *draft], 1 + len(draft)).argmax(axis=1).tolist()
        right = _agreement(draft, likeliest)
        session.rewind(len(draft) - right)
        unseen = found = likeliest[: right + 1]
        held = _agreement(guess, found)
        trust = min(trust + len(found), DRAFT) if held == len(guess) > 0 else held
        yield found


def _agreement(guess: Sequence[int], found: Sequence[int]) -> int:
    """How many tokens are the same before the first that differs."""
    pairs = zip(guess, found, strict=False)
    return sum(1 for _ in itertools.takewhile(lambda pair: pair[0] == pair[1], pairs))
