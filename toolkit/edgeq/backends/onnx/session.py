"""A bundle on ONNX Runtime: past and present states share one buffer each on the device, bound once for a text."""

from __future__ import annotations

import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.base import DRAFT
from edgeq.backends.onnx import cuda, device, webgpu
from edgeq.backends.onnx.graph import POSITIONS
from edgeq.backends.onnx.states import Recurrent
from edgeq.backends.onnx.weights import MODEL, SCORER
from edgeq.bundle import Bundle
from edgeq.errors import BackendFault, MissingTool, UsageFault
from edgeq.machine import physical_cores
from edgeq.model import read_config
from edgeq.profiles import Placement

PROMPT_CHUNK = 512
SCORE_CHUNK = 128
SPIN_MICROSECONDS, PIECES = 5, 8
"""How long a thread spins before it sleeps, and pieces of an operator's work for each thread."""
_FIND = {"cpu": device.cpu, "webgpu": webgpu.find, "cuda": cuda.find}
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16, "tensor(int8)": np.int8}
_LAYER = re.compile(r"/model/layers\.(\d+)/|/lm_head/")


class OnnxSession:
    """Greedy decoding and logits of one bundle; batch size 1.

    One graph is loaded at a time: the one that gives the last token's logits for `generate`, the one that gives all for
    `logits`. Chunks bound the memory: of activations in a prompt, of logits in a text that is scored.
    Where the bundle's accelerator is absent the CPU runs the same graph: `placement` says what runs where, `fallback`
    why the accelerator does not (empty when it does).
    Tokens are taken back by overwriting their keys and values. Recurrent states cannot go back: a step whose tokens may
    be taken back keeps the old ones, and what stays of its tokens runs again in the next.
    Raises BackendFault when ONNX Runtime refuses the model, UsageFault when tokens exceed the bundle's context.
    """

    placement: tuple[Placement, ...]
    one_way: str | None

    def __init__(self, folder: Path, bundle: Bundle) -> None:
        os.environ.setdefault("ORT_DISABLE_TELEMETRY", "1")
        self._folder = folder
        self._context = bundle.context
        self._model = read_config(bundle.config)
        self._graph = ""
        self.fallback = ""
        if bundle.provider not in _FIND:
            raise BackendFault(f"{folder}: provider {bundle.provider!r} is unknown", run="pip install --upgrade edgeq")
        try:
            self._device = _FIND[bundle.provider]()
        except MissingTool as missing:
            self._fall_back(str(missing))
        self._load(MODEL)
        chooses = any(entry.name == POSITIONS for entry in self._engine.get_overridable_initializers())
        self.one_way = None if chooses else "the bundle's graph gives the last token's logits alone: build it again"

    def generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        """Greedy continuation; end-of-sequence tokens are not special here."""
        self._load(MODEL)
        self._reset(len(ids) + tokens)
        for chunk in self._chunks(ids, PROMPT_CHUNK):
            logits = self._step(chunk)
        for _ in range(tokens - 1):
            token = int(logits[-1].argmax())
            yield token
            logits = self._step([token])
        yield int(logits[-1].argmax())

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token, shape [len(ids), vocabulary]."""
        self._load(SCORER)
        self._reset(len(ids))
        return np.concatenate([self._step(chunk) for chunk in self._chunks(ids, SCORE_CHUNK)])

    def drafter(self) -> None:
        """The model brings none here."""

    def begin(self, tokens: int) -> None:
        """Forget everything, and have room for `tokens` tokens."""
        self._load(MODEL)
        self._reset(tokens)
        self._again: list[int] = []

    def advance(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Logits [keep, vocabulary] after the last of some tokens."""
        if len(self._again) > DRAFT:
            self._recurrent.overwrite()
            self._step(self._again)
            self._again = []
        ids, self._again = [*self._again, *ids], []
        if keep > 1 and self._recurrent:
            self._recurrent.keep()
            self._last = ids
        else:
            self._recurrent.overwrite()
        for chunk in self._chunks(ids, PROMPT_CHUNK):
            logits = self._step(chunk, keep)
        return logits

    def rewind(self, count: int) -> None:
        """Forget the last `count` tokens."""
        self._length -= count
        if count and self._recurrent:
            self._recurrent.back()
            self._again = self._last[:-count]
            self._length -= len(self._again)

    def close(self) -> None:
        """Release the engine and its buffers."""
        self._binding: Any = None
        self._engine: Any = None
        self._graph = ""

    def _chunks(self, ids: Sequence[int], most: int) -> Iterator[Sequence[int]]:
        step = min(most, self._device.chunk or most)
        return (ids[start : start + step] for start in range(0, len(ids), step))

    def _fall_back(self, reason: str) -> None:
        self.fallback = reason
        self._device = device.cpu()

    def _load(self, graph: str) -> None:
        if self._graph == graph:
            return
        self.close()
        path = str(self._folder / graph)
        if self._device.provider != "cpu":
            try:
                chosen = options()
                chosen.add_session_config_entry("session.record_ep_graph_assignment_info", "1")
                self._engine = self._device.open(path, chosen)
            except Exception as error:
                self._fall_back(f"{self._device.name} cannot be used\n{_reason(error)}")
        if self._engine is None:
            self._engine = _open_on_cpu(path)
        self._graph = graph
        self._inputs = {entry.name: entry for entry in self._engine.get_inputs()}
        self.placement = self._placed()

    def _placed(self) -> tuple[Placement, ...]:
        """Layers on the device, and those of which a part is left to the CPU; ONNX Runtime tells no bytes."""
        place, layers = self._device, self._model.layers + 1
        left = 0 if place.provider == "cpu" else len(self._elsewhere())
        placed = Placement(
            provider=place.provider, device=place.name, layers=layers - left, bytes=None, software=place.software
        )
        if not left:
            return (placed,)
        return placed, Placement(provider="cpu", device=device.cpu().name, layers=left, bytes=None)

    def _elsewhere(self) -> set[int]:
        """Numbers of the layers with a node that is not on the device; the output comes after the last."""
        parts = self._engine.get_provider_graph_assignment_info()
        nodes = (node for part in parts if part.ep_name != self._device.engine for node in part.get_nodes())
        last = self._model.layers
        return {min(int(match[1] or last), last) for node in nodes if (match := _LAYER.match(node.name))}

    def _reset(self, capacity: int) -> None:
        """Empty states with room for `capacity` tokens."""
        import onnxruntime as ort

        if capacity > self._context:
            raise UsageFault(
                f"{capacity} tokens do not fit the bundle's context of {self._context}",
                run="edgeq build ... --context with a larger number",
            )
        sizes = {"batch_size": 1, "past_sequence_length": capacity, "kv_cache_dim": self._model.head_dim}
        self._length = 0
        self._binding = self._engine.io_binding()
        self._recurrent = Recurrent(self._binding, self._device.memory)
        self._kept = 1
        for name, entry in self._inputs.items():
            if name.startswith("past"):
                zeros = np.zeros([sizes.get(size, size) for size in entry.shape], _TYPES[entry.type])
                state = ort.OrtValue.ortvalue_from_numpy(zeros, self._device.memory)
                self._binding.bind_ortvalue_input(name, state)
                self._binding.bind_ortvalue_output(
                    name.replace("past_key_values", "present").replace("past", "present"), state
                )
                if name.startswith("past."):
                    self._recurrent.add(name, state)

    def _step(self, ids: Sequence[int], keep: int = 1) -> NDArray[np.float32]:
        """Run some tokens after those already seen; logits [keep, vocabulary], of the scorer [len(ids), vocabulary]."""
        binding, total = self._binding, self._length + len(ids)
        binding.bind_cpu_input("input_ids", np.array([ids], np.int64))
        binding.bind_cpu_input("attention_mask", np.ones((1, total), np.int64))
        if "position_ids" in self._inputs:
            positions = np.arange(self._length, total, dtype=np.int64)
            binding.bind_cpu_input("position_ids", np.broadcast_to(positions, (3, 1, len(ids))).copy())
        if keep != self._kept:
            self._keep(keep)
        binding.bind_output("logits", "cpu")
        try:
            self._engine.run_with_iobinding(binding)
        except Exception as error:
            raise BackendFault(f"{self._folder / self._graph}: ONNX Runtime failed", why=str(error)) from error
        self._length = total
        return np.asarray(binding.get_outputs()[-1].numpy()[0], np.float32)

    def _keep(self, keep: int) -> None:
        """Ask for the logits of the last `keep` tokens of each step."""
        import onnxruntime as ort

        positions = ort.OrtValue.ortvalue_from_numpy(np.arange(-keep, 0, dtype=np.int64))
        self._binding.bind_ortvalue_input(POSITIONS, positions)
        self._kept = keep


def options() -> Any:
    """SessionOptions for arithmetic on this machine's processor.

    Threads sleep when an operator has nothing for them for `SPIN_MICROSECONDS`: spinning on costs a quarter of the
    decode speed beside other work, sleeping at once a sixth of it without. They take work in pieces, so that one that
    was held up leaves the rest to the others.
    """
    import onnxruntime as ort

    found = ort.SessionOptions()
    found.intra_op_num_threads = physical_cores()
    found.inter_op_num_threads = 1
    found.add_session_config_entry("session.intra_op.spin_duration_us", str(SPIN_MICROSECONDS))
    found.add_session_config_entry("session.dynamic_block_base", str(PIECES))
    found.log_severity_level = 3
    return found


def _open_on_cpu(path: str) -> Any:
    try:
        import onnxruntime as ort
    except ImportError as error:
        raise MissingTool("onnxruntime cannot be imported", why=str(error), run="pip install edgeq") from error
    try:
        return device.cpu().open(path, options())
    except Exception as error:
        raise BackendFault(f"{path}: ONNX Runtime {ort.__version__} cannot load it", why=str(error)) from error


def _reason(error: Exception) -> str:
    lines = str(error).strip().splitlines() or [type(error).__name__]
    return lines[-1].rpartition(" was false. ")[2]
