"""llama.cpp's artifact, made and run: program.py make CHECKPOINT CALIBRATION OUT TYPE [imatrix].

Its own converter, then its own quantizer to a TYPE such as Q4_K_M with its own choice of types for each tensor. The
tool that measures importance is not in the wheel: what it collects, the mean square of every input of every matrix of
the layers over the calibration windows, is taken from the float32 transformers model and handed to the quantizer.
"""

from __future__ import annotations

import ctypes
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from edgeq.backends.llamacpp import tensors
from edgeq.backends.llamacpp.gguf import MODEL
from edgeq.backends.llamacpp.session import LlamaSession, _listen
from edgeq.checkpoint import Checkpoint
from edgeq.machine import physical_cores
from edgeq.size import TABLES
from peers import arithmetic, serving
from peers.llamacpp import files

CONFIG = "config.json"
CONTEXT = 1024
BATCH = 512


def make(folder: Path, calibration: Path, out: Path, kind: str, *words: str) -> None:
    """Write one GGUF file, and the checkpoint's configuration beside it."""
    from peers.llamacpp import tools

    _listen()
    checkpoint = Checkpoint.open(folder)
    converted = out / "converted.gguf"
    tools.convert(folder, checkpoint.model, converted)
    importance = mean_squares(checkpoint, np.load(calibration)) if "imatrix" in words else {}
    quantize(converted, out / MODEL, kind, importance)
    converted.unlink()
    (out / CONFIG).write_text(json.dumps(checkpoint.model.config()))


def mean_squares(checkpoint: Checkpoint, windows: NDArray[np.int32]) -> dict[str, NDArray[np.float32]]:
    """Mean square of each input of each matrix, float32 [inputs], by GGUF's names and in the file's order of columns.

    The two tables have none, as in llama.cpp's tool.
    """
    import torch

    from edgeq import transformer

    model = transformer.instantiate(checkpoint, lambda _: True)
    sums: dict[str, Any] = {}

    def collect(name: str) -> Any:
        def hook(_module: Any, inputs: tuple[Any, ...]) -> None:
            sums[name] = sums.get(name, 0) + inputs[0].double().square().sum(dim=(0, 1))

        return hook

    for name, shape in checkpoint.model.tensors().items():
        if len(shape) == 2 and name not in TABLES:
            model.get_submodule(name.removesuffix(".weight")).register_forward_pre_hook(collect(name))
    with torch.inference_mode():
        for window in windows:
            model(input_ids=torch.from_numpy(window[None].astype(np.int64)))
    found = {}
    for name, squares in sums.items():
        means = (squares / windows.size).numpy().astype(np.float32)
        order = tensors.columns(checkpoint.model, name)
        found[tensors.gguf_name(checkpoint.model, name)] = means if order is None else means[order]
    return found


def quantize(source: Path, out: Path, kind: str, importance: dict[str, NDArray[np.float32]]) -> None:
    """llama.cpp's quantizer with its defaults; raises RuntimeError when it fails."""
    import gguf
    import llama_cpp

    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = physical_cores()
    parameters.ftype = gguf.LlamaFileType[f"MOSTLY_{kind}"]
    entries = (llama_cpp.llama_model_imatrix_data * (len(importance) + 1))()
    kept = [np.ascontiguousarray(values) for values in importance.values()]
    for entry, name, values in zip(entries, importance, kept, strict=False):
        entry.name, entry.size = name.encode(), values.size
        entry.data = values.ctypes.data_as(ctypes.POINTER(ctypes.c_float))
    if importance:
        parameters.imatrix = entries
    if code := llama_cpp.llama_model_quantize(str(source).encode(), str(out).encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize to {kind} (code {code})")


class Engine:
    """Logits with keys and values in float32; decoding with llama.cpp's defaults: float16 cache, batches of 512."""

    def __init__(self, folder: Path, how: str, threads: int) -> None:
        _listen()
        self._folder = arithmetic.float_gguf(folder, MODEL, threads) if how == serving.WEIGHTS_ONLY else folder
        self._config = json.loads((folder / CONFIG).read_text())
        self._threads = threads
        self._session: LlamaSession | None = None
        self._context: Any = None
        self.weights_bytes, self.read_bytes = arithmetic.gguf_bytes(folder / MODEL)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text on its own, through edgeq's session."""
        if self._session is None:
            self._session = LlamaSession(self._folder, files.described(self._config, CONTEXT))
        return self._session.logits(ids)

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Seconds until each token of llama.cpp's own simple loop."""
        import llama_cpp

        if self._context is None:
            model = llama_cpp.llama_model_load_from_file(
                str(self._folder / MODEL).encode(), llama_cpp.llama_model_default_params()
            )
            parameters = llama_cpp.llama_context_default_params()
            parameters.n_ctx, parameters.n_batch, parameters.n_ubatch = CONTEXT, BATCH, BATCH
            parameters.n_threads = parameters.n_threads_batch = self._threads
            self._context = llama_cpp.llama_init_from_model(model, parameters)
            self._sampler = llama_cpp.llama_sampler_init_greedy()
        return serving.moments(greedy(self._context, self._sampler, ids, tokens))


def greedy(context: Any, sampler: Any, ids: Sequence[int], tokens: int) -> Iterator[int]:
    """Greedy continuation as llama.cpp's own simple example makes it: decode, sample, again."""
    import llama_cpp

    llama_cpp.llama_memory_clear(llama_cpp.llama_get_memory(context), True)
    prompt = (llama_cpp.llama_token * len(ids))(*ids)
    batch = llama_cpp.llama_batch_get_one(prompt, len(ids))
    token = (llama_cpp.llama_token * 1)()
    for _ in range(tokens):
        if llama_cpp.llama_decode(context, batch):
            raise RuntimeError("llama_decode failed")
        token[0] = llama_cpp.llama_sampler_sample(sampler, context, -1)
        yield token[0]
        batch = llama_cpp.llama_batch_get_one(token, 1)


if __name__ == "__main__":
    serving.main(make, Engine)
