"""Tokens guessed by a model's own multi-token-prediction head, in a context of llama.cpp beside the main one."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.errors import BackendFault

_MOST = 3  # each costs a run of the head and of the output layer, and the later ones are right more rarely
_CHUNK = 128


class Head:
    """Guesses for one text. It has keys and values of its own, of each token but the first with the state before it.

    The session tells the last hidden state after every token that it runs, and of how many to forget. The head's own
    state after a guess stands for the one that the model would have for the next.
    """

    def __init__(self, hidden: int, vocab: int) -> None:
        self._hidden, self._vocab = hidden, vocab
        self._context: Any = None
        self._batch: Any = None

    def begin(self, context: Any) -> None:
        """Start a text in an empty context of its own, which is freed by `close`."""
        import llama_cpp
        from llama_cpp import llama_cpp_ext

        self.close()
        self._context, self._batch = context, llama_cpp.llama_batch_init(_CHUNK, 0, 1)
        llama_cpp_ext.llama_set_embeddings_nextn(context, True, False)
        self._states = np.empty((0, self._hidden), np.float32)
        self._tokens: list[int] = []
        self._length = 0

    def note(self, states: NDArray[np.float32]) -> None:
        """Keep the states [tokens, hidden] after some tokens until the tokens that follow them are known."""
        self._states = np.concatenate([self._states, states])

    def forget(self, count: int) -> None:
        """Drop the states after the last `count` tokens."""
        self._states = self._states[: len(self._states) - count]

    def guess(self, found: Sequence[int], most: int) -> list[int]:
        """The tokens that the head thinks likeliest, at most three."""
        self._tokens += found if self._length or self._tokens else found[1:]
        assert len(self._tokens) == len(self._states)
        for start in range(0, len(self._tokens), _CHUNK):
            token, state = self._run(self._tokens[start : start + _CHUNK], self._states[start : start + _CHUNK])
        self._tokens, self._states = [], self._states[:0]
        certain, guessed = self._length, [token]
        while len(guessed) < min(most, _MOST):
            token, state = self._run([token], state)
            guessed.append(token)
        self._length = certain
        self._forget_after(certain)
        return guessed

    def close(self) -> None:
        """Release the context."""
        import llama_cpp

        if self._context:
            self._batch.embd = None
            llama_cpp.llama_batch_free(self._batch)
            llama_cpp.llama_free(self._context)
            self._context = None

    def _run(self, tokens: Sequence[int], states: NDArray[np.float32]) -> tuple[int, NDArray[np.float32]]:
        """Run tokens, each with the state before it; the likeliest token after the last, and its state [1, hidden]."""
        import llama_cpp

        batch, rows = self._batch, np.ascontiguousarray(states)
        batch.n_tokens, batch.embd = len(tokens), rows.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
        for index, token in enumerate(tokens):
            batch.token[index] = token
            batch.pos[index] = self._length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index == len(tokens) - 1
        if code := llama_cpp.llama_decode(self._context, batch):
            raise BackendFault(f"llama.cpp failed to run the multi-token-prediction head (code {code})")
        llama_cpp.llama_synchronize(self._context)
        self._length += len(tokens)
        start = llama_cpp.llama_get_logits_ith(self._context, len(tokens) - 1)
        logits = np.ctypeslib.as_array(start, (self._vocab,))
        return int(logits.argmax()), last_states(self._context, len(tokens), self._hidden)[-1:]

    def _forget_after(self, length: int) -> None:
        import llama_cpp

        memory = llama_cpp.llama_get_memory(self._context)
        llama_cpp.llama_memory_seq_rm(memory, 0, length, -1)


def last_states(context: Any, tokens: int, hidden: int) -> NDArray[np.float32]:
    """Hidden states [tokens, hidden] behind the last norm, of the tokens that a context ran last; a copy."""
    from llama_cpp import llama_cpp_ext

    start = llama_cpp_ext.llama_get_embeddings_nextn(context)
    return np.ctypeslib.as_array(start, (tokens, hidden)).copy()
