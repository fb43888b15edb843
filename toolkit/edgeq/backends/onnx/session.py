"""A bundle on ONNX Runtime: past and present states share one buffer each, bound once."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.onnx.weights import MODEL
from edgeq.bundle import Bundle
from edgeq.errors import BackendFault, UsageFault
from edgeq.machine import physical_cores
from edgeq.model import read_config

CHUNK = 128


class OnnxSession:
    """Greedy decoding and logits of one bundle; batch size 1, float32 states.

    Prompts run in chunks of `CHUNK` tokens, so that logits of a chunk, not of the prompt, bound the memory. Threads do
    not spin while they wait: beside any other work, spinning halves the decode speed.
    Raises BackendFault when ONNX Runtime refuses the model, UsageFault when tokens exceed the bundle's context.
    """

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        import onnxruntime as ort

        options = ort.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        try:
            self._session: Any = ort.InferenceSession(str(folder / MODEL), options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendFault(
                f"{folder / MODEL}: ONNX Runtime {ort.__version__} cannot load it", why=str(error)
            ) from error
        self._context = bundle.context
        self._head_dim = read_config(bundle.config).head_dim
        self._inputs = {entry.name: entry for entry in self._session.get_inputs()}
        self._states: dict[str, Any] = {}
        self._length = 0
        self._capacity = 0

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation; end-of-sequence tokens are not special here."""
        self._reset(len(ids) + tokens)
        for start in range(0, len(ids), CHUNK):
            logits = self._step(ids[start : start + CHUNK])
        for _ in range(tokens - 1):
            token = int(logits[-1].argmax())
            yield token
            logits = self._step([token])
        yield int(logits[-1].argmax())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        self._reset(len(ids))
        return np.concatenate([self._step(ids[start : start + CHUNK]) for start in range(0, len(ids), CHUNK)])

    def close(self) -> None:
        """Release the session and its buffers."""
        self._states.clear()
        self._session = None

    def _reset(self, capacity: int) -> None:
        """Empty states with room for `capacity` tokens."""
        import onnxruntime as ort

        if capacity > self._context:
            raise UsageFault(
                f"{capacity} tokens do not fit the bundle's context of {self._context}",
                run="edgeq build ... --context with a larger number",
            )
        self._length, self._capacity = 0, capacity
        self._states = {}
        for name, entry in self._inputs.items():
            if name.startswith("past"):
                shape = [size if isinstance(size, int) else self._symbolic(size) for size in entry.shape]
                self._states[name] = ort.OrtValue.ortvalue_from_numpy(np.zeros(shape, np.float32))

    def _symbolic(self, name: str) -> int:
        return {"batch_size": 1, "past_sequence_length": self._capacity, "kv_cache_dim": self._head_dim}[name]

    def _step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Run some tokens after those already seen; logits [len(ids), vocabulary]."""
        binding = self._session.io_binding()
        total = self._length + len(ids)
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self._inputs:
            positions = np.arange(self._length, total, dtype=np.int64)
            binding.bind_cpu_input("position_ids", np.broadcast_to(positions, (3, 1, len(ids))).copy())
        binding.bind_output("logits", "cpu")
        for name, state in self._states.items():
            binding.bind_ortvalue_input(name, state)
            binding.bind_ortvalue_output(name.replace("past_key_values", "present").replace("past", "present"), state)
        self._session.run_with_iobinding(binding)
        self._length = total
        return np.asarray(binding.get_outputs()[0].numpy()[0])
