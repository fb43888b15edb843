"""A bundle on ONNX Runtime: past and present states share one buffer each, bound once for a text."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.onnx.weights import MODEL, SCORER
from edgeq.bundle import Bundle
from edgeq.errors import BackendFault, MissingTool, UsageFault
from edgeq.machine import physical_cores
from edgeq.model import read_config
from edgeq.profiles import Placement

PROMPT_CHUNK = 512
SCORE_CHUNK = 128


class OnnxSession:
    """Greedy decoding and logits of one bundle; batch size 1, float32 states.

    One graph is loaded at a time: the one that gives the last token's logits for `generate`, the one that gives all for
    `logits`. Chunks bound the memory: of activations in a prompt, of logits in a text that is scored. Threads do not
    spin while they wait: beside any other work, spinning halves the decode speed.
    Raises BackendFault when ONNX Runtime refuses the model, UsageFault when tokens exceed the bundle's context.
    """

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        self._folder = folder
        self._context = bundle.context
        model = read_config(bundle.config)
        self._head_dim = model.head_dim
        self.placement = (Placement(provider="cpu", device="CPU", layers=model.layers + 1, bytes=None),)
        self._graph = ""
        self._load(MODEL)

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation; end-of-sequence tokens are not special here."""
        self._load(MODEL)
        self._reset(len(ids) + tokens)
        for start in range(0, len(ids), PROMPT_CHUNK):
            logits = self._step(ids[start : start + PROMPT_CHUNK])
        for _ in range(tokens - 1):
            token = int(logits[-1].argmax())
            yield token
            logits = self._step([token])
        yield int(logits[-1].argmax())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        self._load(SCORER)
        self._reset(len(ids))
        starts = range(0, len(ids), SCORE_CHUNK)
        return np.concatenate([self._step(ids[start : start + SCORE_CHUNK]) for start in starts])

    def close(self) -> None:
        """Release the engine and its buffers."""
        self._binding: Any = None
        self._engine: Any = None
        self._graph = ""

    def _load(self, graph: str) -> None:
        if self._graph == graph:
            return
        self.close()
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        try:
            import onnxruntime as ort
        except ImportError as error:
            raise MissingTool("onnxruntime cannot be imported", why=str(error), run="pip install edgeq") from error
        options = ort.SessionOptions()
        options.intra_op_num_threads = physical_cores()
        options.inter_op_num_threads = 1
        options.add_session_config_entry("session.intra_op.allow_spinning", "0")
        options.log_severity_level = 3
        path = str(self._folder / graph)
        try:
            self._engine = ort.InferenceSession(path, options, providers=["CPUExecutionProvider"])
        except Exception as error:
            raise BackendFault(f"{path}: ONNX Runtime {ort.__version__} cannot load it", why=str(error)) from error
        self._graph = graph
        self._inputs = {entry.name: entry.shape for entry in self._engine.get_inputs()}

    def _reset(self, capacity: int) -> None:
        """Empty states with room for `capacity` tokens."""
        import onnxruntime as ort

        if capacity > self._context:
            raise UsageFault(
                f"{capacity} tokens do not fit the bundle's context of {self._context}",
                run="edgeq build ... --context with a larger number",
            )
        sizes = {"batch_size": 1, "past_sequence_length": capacity, "kv_cache_dim": self._head_dim}
        self._length = 0
        self._binding = self._engine.io_binding()
        for name, shape in self._inputs.items():
            if name.startswith("past"):
                zeros = np.zeros([sizes.get(size, size) for size in shape], np.float32)
                state = ort.OrtValue.ortvalue_from_numpy(zeros)
                self._binding.bind_ortvalue_input(name, state)
                self._binding.bind_ortvalue_output(
                    name.replace("past_key_values", "present").replace("past", "present"), state
                )

    def _step(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Run some tokens after those already seen; logits [1 or len(ids), vocabulary]."""
        binding, total = self._binding, self._length + len(ids)
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self._inputs:
            positions = np.arange(self._length, total, dtype=np.int64)
            binding.bind_cpu_input("position_ids", np.broadcast_to(positions, (3, 1, len(ids))).copy())
        binding.bind_output("logits", "cpu")
        try:
            self._engine.run_with_iobinding(binding)
        except Exception as error:
            raise BackendFault(f"{self._folder / self._graph}: ONNX Runtime failed", why=str(error)) from error
        self._length = total
        return np.asarray(binding.get_outputs()[-1].numpy()[0])
