"""A bundle on llama.cpp, through llama-cpp-python's low-level interface."""

from __future__ import annotations

import ctypes
import os
import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq import recipe
from edgeq.backends.base import DRAFT
from edgeq.backends.llamacpp import devices, drafting
from edgeq.backends.llamacpp.gguf import MODEL
from edgeq.bundle import Bundle
from edgeq.errors import BackendFault, OutOfMemory, UsageFault
from edgeq.machine import physical_cores
from edgeq.model import read_config

CHUNK = 128
_STEP = 256
_ALL_LAYERS = 999
_KV_TYPES = {32: 0, 16: 1, 8: 8}  # ggml_type: F32, F16, Q8_0
_log: list[str] = []


class LlamaSession:
    """Greedy decoding and logits of one bundle; batch size 1, keys and values as the recipe says.

    All layers go to the devices of the bundle's provider, or to the CPU where llama.cpp sees none; `placement` says
    what llama.cpp itself reported.

    Prompts run in chunks of `CHUNK` tokens, and logits are copied out chunk by chunk, so that neither the context nor
    the prompt multiplies the vocabulary. The cache grows to the longest sequence asked for, in steps of 256 tokens.
    OpenMP's threads spin for microseconds before they sleep, unless OMP_WAIT_POLICY says otherwise or OpenMP was loaded
    before this backend: spinning on costs up to 50 times the speed beside other work, sleeping at once half of it
    without.
    Raises BackendFault when llama.cpp refuses the model, OutOfMemory when it finds no room for the cache, UsageFault
    when tokens exceed the bundle's context.

    Tokens are taken back by removing them from the cache. The recurrent states of Qwen3.5 are kept after each of the
    last tokens for that (llama.cpp's `n_rs_seq`), in a context of its own: plain decoding does without that memory.
    """

    one_way: str | None = None

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        import llama_cpp

        _listen()
        self._context_limit = bundle.context
        model = read_config(bundle.config)
        self._vocab, self._hidden, self._recurrent = model.vocab, model.hidden, model.linear is not None
        self._file, self._target = folder / MODEL, bundle.target
        self._head: drafting.Head | None = None
        self._asked: drafting.Head | None = None
        self._kv_bits = recipe.parse(bundle.recipe).kv_bits
        self._capacity = self._length = self._kept_states = 0
        self._context: Any = None
        self._batch: Any = None
        self._devices = devices.found()
        self._chosen = [each for each in self._devices if each.api == bundle.provider != "cpu"]
        handles = [*(each.handle for each in self._chosen), None]
        self._handles = (ctypes.c_void_p * len(handles))(*handles)
        self._open(with_head=False)
        self._batch = llama_cpp.llama_batch_init(CHUNK, 0, 1)

    def _open(self, with_head: bool) -> None:
        """Load the model; its multi-token-prediction head too where that is wanted."""
        import llama_cpp

        parameters = llama_cpp.llama_model_default_params()
        parameters.devices = ctypes.cast(self._handles, ctypes.c_void_p)
        parameters.n_gpu_layers = _ALL_LAYERS if self._chosen else 0
        parameters.load_mtp = self._with_head = with_head
        _log.clear()
        self._model: Any = llama_cpp.llama_model_load_from_file(os.fsencode(self._file), parameters)
        if not self._model:
            raise BackendFault(
                f"{self._file}: llama.cpp (llama-cpp-python {llama_cpp.__version__}) cannot load it", why=_said()
            )
        self._loading = list(_log)
        self.placement = devices.placement(self._loading, self._devices)
        if not sum(place.layers for place in self.placement):
            self.close()
            raise BackendFault(
                f"llama-cpp-python {llama_cpp.__version__} does not say where the layers are",
                why="Its log has other words than those of the version that edgeq is made for.",
                run=f"edgeq doctor --target {self._target}",
            )

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation; end-of-sequence tokens are not special here."""
        self._reset(len(ids) + tokens)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            logits = self._step(part, keep=1)
        for _ in range(tokens - 1):
            token = int(logits[-1].argmax())
            yield token
            logits = self._step([token], keep=1)
        yield int(logits[-1].argmax())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        self._reset(len(ids))
        found = np.empty((len(ids), self._vocab), np.float32)
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            found[start : start + len(part)] = self._step(part, keep=len(part))
        return found

    def drafter(self) -> drafting.Head | None:
        """The multi-token-prediction head for the text that begins next, loaded when first asked for; or None."""
        import llama_cpp

        if llama_cpp.llama_model_n_layer_nextn(self._model) != 1:
            return None
        if not self._with_head:
            self._release()
            llama_cpp.llama_model_free(self._model)
            self._open(with_head=True)
        self._asked = drafting.Head(self._hidden, self._vocab)
        return self._asked

    def begin(self, tokens: int) -> None:
        """Forget everything, and have room for `tokens` tokens."""
        from llama_cpp import llama_cpp_ext

        self._drop_head()
        self._reset(tokens, DRAFT if self._recurrent else 0)
        self._head, self._asked = self._asked, None
        if self._recurrent:
            llama_cpp_ext.llama_set_embeddings_nextn(self._context, self._head is not None, False)
        if self._head:
            self._head.begin(self._new_context(beside=self._context))

    def advance(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Logits [keep, vocabulary] after the last of some tokens, valid until the next step."""
        for start in range(0, len(ids), CHUNK):
            part = ids[start : start + CHUNK]
            logits = self._step(part, keep)
            if self._head:
                self._head.note(drafting.last_states(self._context, len(part), self._hidden))
        return logits

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens; raises BackendFault when llama.cpp cannot."""
        import llama_cpp

        if not count:
            return
        self._length -= count
        memory = llama_cpp.llama_get_memory(self._context)
        if not llama_cpp.llama_memory_seq_rm(memory, 0, self._length, -1):
            raise BackendFault(f"llama.cpp cannot take back {count} tokens", run="edgeq verify BUNDLE")
        if self._head:
            self._head.forget(count)

    def close(self) -> None:
        """Release the model and its context."""
        import llama_cpp

        self._release()
        if self._batch is not None:
            llama_cpp.llama_batch_free(self._batch)
            self._batch = None
        if self._model:
            llama_cpp.llama_model_free(self._model)
            self._model = None

    def _drop_head(self) -> None:
        if self._head:
            self._head.close()
            self._head = None

    def _release(self) -> None:
        import llama_cpp

        self._drop_head()
        if self._context:
            llama_cpp.llama_free(self._context)
            self._context = None

    def _reset(self, capacity: int, kept_states: int = 0) -> None:
        """Empty states with room for `capacity` tokens, and recurrent ones for the last `kept_states` tokens too."""
        import llama_cpp

        if capacity > self._context_limit:
            raise UsageFault(
                f"{capacity} tokens do not fit the bundle's context of {self._context_limit}",
                run="edgeq build ... --context with a larger number",
            )
        self._length = 0
        if self._context and capacity <= self._capacity and kept_states == self._kept_states:
            llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(self._context), True)
            return
        self._release()
        self._capacity, self._kept_states = -(-capacity // _STEP) * _STEP, kept_states
        self._context = self._new_context()
        self.placement = devices.placement([*self._loading, *_log], self._devices)

    def _new_context(self, beside: Any = None) -> Any:
        """Context of the capacity: the model's, or that of its head beside the model's."""
        import llama_cpp

        parameters = llama_cpp.llama_context_default_params()
        parameters.n_ctx = self._capacity
        parameters.n_batch = parameters.n_ubatch = CHUNK
        parameters.n_threads = parameters.n_threads_batch = physical_cores()
        parameters.type_k = parameters.type_v = _KV_TYPES[self._kv_bits]
        if beside is None:
            parameters.n_rs_seq = self._kept_states
        else:
            parameters.ctx_type, parameters.ctx_other = llama_cpp.LLAMA_CONTEXT_TYPE_MTP, beside
        if not self._chosen:
            parameters.offload_kqv = parameters.op_offload = False
        if self._kv_bits == 32:  # fused attention on a GPU rounds float32 keys and values to float16
            parameters.flash_attn_type = llama_cpp.LLAMA_FLASH_ATTN_TYPE_DISABLED
        _log.clear()
        if context := llama_cpp.llama_init_from_model(self._model, parameters):
            return context
        kind = OutOfMemory if re.search("alloc|memory", _said()) else BackendFault
        raise kind(f"llama.cpp cannot make a context of {self._capacity} tokens", why=_said())

    def _step(self, ids: Sequence[int], keep: int) -> NDArray[np.float32]:
        """Run some tokens after those already seen; logits [keep, vocabulary] of the last, valid until the next."""
        import llama_cpp

        batch, first = self._batch, len(ids) - keep
        batch.n_tokens = len(ids)
        for index, token in enumerate(ids):
            batch.token[index] = token
            batch.pos[index] = self._length + index
            batch.n_seq_id[index] = 1
            batch.seq_id[index][0] = 0
            batch.logits[index] = index >= first
        _log.clear()
        if code := llama_cpp.llama_decode(self._context, batch):
            raise BackendFault(f"llama.cpp failed to run {len(ids)} tokens (code {code})", why=_said())
        llama_cpp.llama_synchronize(self._context)
        self._length += len(ids)
        start = llama_cpp.llama_get_logits_ith(self._context, first)
        return np.ctypeslib.as_array(start, (keep, self._vocab))


@cache
def _listen() -> Any:
    """Keep what llama.cpp logs, for placement and error messages, instead of printing it; returns the callback."""
    import llama_cpp

    callback = llama_cpp.llama_log_callback(lambda _level, text, _data: _log.append(text.decode("utf-8", "replace")))
    llama_cpp.llama_log_set(callback, ctypes.c_void_p(0))
    return callback


def _said() -> str:
    """Last lines of the log."""
    return "".join(_log).strip()[-600:] or "It gave no reason."
