"""A library and its weights in TVM's Relax virtual machine, whichever compiler made the library."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import DRAFT
from edgeq.backends.mlc import tensor_cache
from edgeq.bundle import Bundle
from edgeq.errors import BackendFault, OutOfMemory, UsageFault
from edgeq.model import read_config
from edgeq.profiles import Placement

PAGE = 16
_STEP = 256  # tokens by which the cache grows
_HYBRID = "hybrid"
_PLAIN = "plain"


class MlcSession:
    """Greedy decoding and logits of one bundle; one sequence, keys and values as the recipe says.

    module: an executable, or a library that was loaded; device: TVM's. Prompts run in chunks of the sizes that the
    library was compiled for. The cache grows to the longest sequence asked for, in steps of 256 tokens.
    Tokens are taken back from the cache, which is TVM's paged one or, for a processor, tensors. States are copied
    before a step whose tokens may be taken back, and what stays of them runs again in the next.
    Raises BackendFault when library and weights do not belong together, OutOfMemory when there is no room for the
    cache, UsageFault when tokens exceed the bundle's context or are not in its vocabulary.
    """

    def __init__(self, module: Any, device: Any, folder: Path, bundle: Bundle) -> None:
        from tvm import runtime
        from tvm.runtime.vm import VirtualMachine

        self._runtime, self._device = runtime, device
        self._limit, self._model = bundle.context, read_config(bundle.config)
        devices = [device] if _api(device) == "cpu" else [device, runtime.cpu()]
        self._vm = VirtualMachine(module, devices)
        self._metadata: Mapping[str, Any] = json.loads(str(self._vm["_metadata"]()))
        self._chunk = int(self._metadata["prefill_chunk_size"])
        self._verify_chunk = int(self._metadata.get("verify_chunk_size", self._chunk))
        self._functions = {name: self._function(name) for name in ("embed", "batch_prefill", "batch_verify")}
        self._decode = self._function("decode", "batch_decode")
        self._parameters, size = self._load(folder)
        self._kv: Any = None
        self._plain = self._metadata.get("kv_state_kind") == _PLAIN
        self._past = 0
        self._recurrent: Any = None
        self._states: list[Any] = []
        self._capacity = 0
        layers = self._model.layers + 1
        self.placement = (Placement(provider=_api(device), device=_name(device), layers=layers, bytes=size),)

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation; end-of-sequence tokens are not special here."""
        self._refuse_unknown(ids)
        self._reset(len(ids) + tokens)
        logits = self._prefill(ids)
        for _ in range(tokens - 1):
            token = int(logits.argmax())
            yield token
            logits = self._run(self._decode, [token])[0]
        yield int(logits.argmax())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        self._refuse_unknown(ids)
        self._reset(len(ids))
        found = np.empty((len(ids), self._model.vocab), np.float32)
        for start in range(0, len(ids), self._verify_chunk):
            part = ids[start : start + self._verify_chunk]
            found[start : start + len(part)] = self._run(self._functions["batch_verify"], part)
        return found

    @property
    def one_way(self) -> str | None:
        """MLC's own object for the states of linear attention keeps one of them."""
        return "mlc_llm's linear attention keeps no state to go back to" if self._has_rnn_state() else None

    def drafter(self) -> None:
        """The model brings none here."""

    def begin(self, tokens: int) -> None:
        """Forget everything, and have room for `tokens` tokens."""
        self._reset(tokens)
        self._again: list[int] = []

    def advance(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Logits [keep, vocabulary] after the last of some tokens; a refused call changes nothing."""
        self._refuse_unknown(ids)
        total = self._past + len(self._again) + len(ids)
        if self._plain and total > self._capacity:
            raise UsageFault(f"{total} tokens do not fit the {self._capacity} that this session began with")
        if len(self._again) > DRAFT:
            self._prefill(self._again)
            self._again = []
        ids, self._again = [*self._again, *ids], []
        if keep > 1:
            self._last, self._before = ids, [state.copyto(self._device) for state in self._states]
            return self._run(self._functions["batch_verify"], ids)[-keep:]
        return self._run(self._decode, ids) if len(ids) == 1 else self._prefill(ids)[None]

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""
        if count and self._states:
            self._states, self._again = self._before, self._last[:-count]
            count = len(self._last)
        if self._plain:
            self._past -= count
        elif count:
            self._builtin("kv_state_popn")(self._kv, 0, count)

    def close(self) -> None:
        """Release weights, cache and states."""
        self._kv, self._recurrent, self._states, self._parameters = None, None, [], None

    def _refuse_unknown(self, ids: Sequence[int]) -> None:
        if outside := [token for token in ids if not 0 <= token < self._model.vocab]:
            raise UsageFault(f"token {outside[0]} is not in the vocabulary of {self._model.vocab}")

    def _function(self, *names: str) -> Any:
        for name in names:
            try:
                return self._vm[name]
            except (AttributeError, ValueError):
                continue
        raise BackendFault(f"the library has no function {' or '.join(names)}", run="edgeq build ... again")

    def _load(self, folder: Path) -> tuple[Any, int]:
        """Parameters in the library's order, on the device, and their bytes."""
        held = tensor_cache.records(folder)
        names = [parameter["name"] for parameter in self._metadata["params"]]
        for parameter in self._metadata["params"]:
            record = held.get(parameter["name"])
            wanted = list(parameter["shape"]), parameter["dtype"]
            if record is None or (record["shape"], record["dtype"]) != wanted:
                raise BackendFault(
                    f"{folder}: library and weights do not belong together",
                    why=f"The library wants {parameter['name']} as {wanted[1]} {wanted[0]}, the weights have "
                    + ("none." if record is None else f"{record['dtype']} {record['shape']}."),
                    run="edgeq build ... again",
                )
        load = self._builtin("tensor_cache.load")
        load(str(folder), self._device.dlpack_device_type(), self._device.index)
        parameters = self._builtin("param_array_from_cache_by_name")(names)
        self._builtin("tensor_cache.clear")()
        return parameters, sum(held[name]["nbytes"] for name in names)

    def _reset(self, capacity: int) -> None:
        """Empty cache and states with room for `capacity` tokens."""
        if capacity > self._limit:
            raise UsageFault(
                f"{capacity} tokens do not fit the bundle's context of {self._limit}",
                run="edgeq build ... --context with a larger number",
            )
        if capacity > self._capacity:
            self._kv, self._capacity = None, 0
            tokens = -(-capacity // _STEP) * _STEP
            try:
                self._kv = self._keys_and_values(tokens)
            except (RuntimeError, ValueError, MemoryError) as error:
                raise OutOfMemory(f"no room for a cache of {tokens} tokens", why=str(error)[-300:]) from error
            self._capacity = tokens
        self._past = 0
        self._recurrent = self._function("create_rnn_state")(*self._rnn_sizes()) if self._has_rnn_state() else None
        for state in self._caches():
            self._builtin("kv_state_clear")(state)
            self._builtin("kv_state_add_sequence")(state, 0)
        self._states = [
            self._runtime.tensor(np.zeros((1, *state["shape"]), state["dtype"]), self._device)
            for state in self._metadata.get("states", ())
        ]

    def _keys_and_values(self, tokens: int) -> Any:
        """A cache for so many tokens: TVM's paged one, or tensors whose axis of blocks has -1 in the metadata."""
        if self._plain:
            shapes = [
                [tokens // PAGE if size == -1 else size for size in each["shape"]] for each in self._metadata["caches"]
            ]
            kinds = [each["dtype"] for each in self._metadata["caches"]]
            return [self._tensor(np.zeros(*each)) for each in zip(shapes, kinds, strict=True)]
        sizes = (1, tokens, self._chunk, PAGE, 0)
        create = self._function("create_tir_paged_kv_cache")
        return create(*(self._runtime.ShapeTuple([size]) for size in sizes))

    def _tensor(self, values: NDArray[Any]) -> Any:
        return self._runtime.tensor(values, self._device)

    def _has_rnn_state(self) -> bool:
        """Whether the states of linear attention are MLC's own object, not tensors."""
        return self._metadata.get("kv_state_kind") == _HYBRID and "states" not in self._metadata

    def _rnn_sizes(self) -> tuple[Any, Any]:
        return self._runtime.ShapeTuple([1]), self._runtime.ShapeTuple([1])

    def _caches(self) -> list[Any]:
        if self._plain:
            return []
        return [self._kv] if self._recurrent is None else [self._kv, self._recurrent]

    def _prefill(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits [vocabulary] after the last of some tokens."""
        logits = np.empty((0, self._model.vocab), np.float32)
        for start in range(0, len(ids), self._chunk):
            part = ids[start : start + self._chunk]
            last = self._runtime.tensor(np.array([len(part) - 1], np.int32), self._device)
            logits = self._run(self._functions["batch_prefill"], part, last)
        found: NDArray[np.float32] = logits[0]
        return found

    def _run(self, function: Any, ids: Sequence[int], *positions: Any) -> NDArray[np.float32]:
        """Run some tokens after those already seen; logits [positions, vocabulary]."""
        shape = self._runtime.ShapeTuple
        tokens = self._runtime.tensor(np.array(ids, np.int32), self._device)
        x = self._functions["embed"](tokens, self._parameters)
        x = x._create_view((1, len(ids), x.shape[-1]))
        for state in self._caches():
            self._builtin("kv_state_begin_forward")(state, shape([0]), shape([len(ids)]))
        own = [self._states] if self._states else []
        if self._plain:
            own.insert(0, [self._tensor(np.array([self._past], np.int32)), *self._kv])
        result = function(x, *positions, *self._caches(), *own, self._parameters)
        self._past += len(ids)
        for state in self._caches():
            self._builtin("kv_state_end_forward")(state)
        if self._states:
            self._states = list(result[2])
        logits: NDArray[np.float32] = result[0].numpy()[0]
        return logits

    @staticmethod
    def _builtin(name: str) -> Any:
        import tvm

        return tvm.get_global_func(f"vm.builtin.{name}")


def _api(device: Any) -> str:
    return str(device.__device_type_name__())


def _name(device: Any) -> str:
    """The device's own name; a CPU has none in TVM."""
    return "CPU" if _api(device) == "cpu" else str(device.device_name)
