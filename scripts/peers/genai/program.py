"""The builder's artifact, made and run: program.py make CHECKPOINT CALIBRATION OUT [KEY=VALUE...].

`python -m onnxruntime_genai.models.builder -p int4 -e cpu` with the words as extra options; accuracy level 4, 8-bit
activations, and a table that serves as the output layer too are its defaults.
"""

from __future__ import annotations

import json
import runpy
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import arithmetic, serving

BUILDER = "onnxruntime_genai.models.builder"
MODEL, CONFIG = "model.onnx", "genai_config.json"
QWEN3_5 = "Qwen3_5ForConditionalGeneration"
CONTEXT = 1024
_TYPES = {"tensor(float)": np.float32, "tensor(float16)": np.float16}


def make(checkpoint: Path, _: Path, out: Path, *options: str) -> None:
    """Write graph, data and configuration.

    Of Qwen3.5 the builder knows the checkpoint with a vision tower alone, by its name, and on a CPU no extra prediction
    layer.
    """
    command = ["builder", "-p", "int4", "-e", "cpu", "-o", str(out)]
    with tempfile.TemporaryDirectory(dir=out.parent) as scratch:
        source = Path(scratch, "checkpoint")
        source.mkdir()
        for file in checkpoint.iterdir():
            (source / file.name).symlink_to(file)
        config = json.loads((checkpoint / "config.json").read_text())
        extra = ["hf_token=false", *options]
        if config["model_type"].startswith("qwen3_5"):
            (source / "config.json").unlink()
            (source / "config.json").write_text(json.dumps(config | {"architectures": [QWEN3_5]}))
            extra.append("exclude_mtp=true")
        cache = ["-c", str(Path(scratch, "cache"))]
        sys.argv = [*command, *cache, "-i", str(source), "--extra_options", *extra]
        runpy.run_module(BUILDER, run_name="__main__")  # in this process, whose memory is watched


class Engine:
    """Logits through ONNX Runtime, decoding through onnxruntime-genai; each is loaded when it is first asked for."""

    def __init__(self, folder: Path, how: str, threads: int) -> None:
        self._folder = arithmetic.float_onnx(folder) if how == serving.WEIGHTS_ONLY else folder
        self._threads = threads
        self._session: Any = None
        self._model: Any = None
        self._head_size = json.loads((folder / CONFIG).read_text())["model"]["decoder"]["head_size"]
        self.weights_bytes, self.read_bytes = arithmetic.onnx_bytes(folder / MODEL)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text on its own."""
        import onnxruntime as ort

        if self._session is None:
            options = ort.SessionOptions()
            options.intra_op_num_threads = self._threads
            options.log_severity_level = 3
            self._session = ort.InferenceSession(self._folder / MODEL, options, providers=["CPUExecutionProvider"])
        sizes = {"batch_size": 1, "past_sequence_length": 0, "kv_cache_dim": self._head_size}
        feed: dict[str, NDArray[Any]] = {}
        for entry in self._session.get_inputs():
            match entry.name:
                case "input_ids":
                    feed[entry.name] = np.array([ids], np.int64)
                case "attention_mask":
                    feed[entry.name] = np.ones((1, len(ids)), np.int64)
                case "position_ids":
                    rows = (3, 1) if len(entry.shape) == 3 else (1,)
                    feed[entry.name] = np.broadcast_to(np.arange(len(ids), dtype=np.int64), (*rows, len(ids))).copy()
                case _:
                    feed[entry.name] = np.zeros([sizes.get(size, size) for size in entry.shape], _TYPES[entry.type])
        found: NDArray[np.float32] = self._session.run(["logits"], feed)[0][0]
        return found

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Seconds until each token of genai's own generator."""
        if self._model is None:
            self._model = self._loaded()
        return serving.moments(self._generate(ids, tokens))

    def _loaded(self) -> Any:
        import onnxruntime_genai as genai

        path = self._folder / CONFIG
        config = json.loads(path.read_text())
        config["model"]["decoder"].setdefault("session_options", {})["intra_op_num_threads"] = self._threads
        path.write_text(json.dumps(config))
        return genai.Model(str(self._folder))

    def _generate(self, ids: Sequence[int], tokens: int) -> Iterator[int]:
        import onnxruntime_genai as genai

        parameters = genai.GeneratorParams(self._model)
        parameters.set_search_options(do_sample=False, max_length=CONTEXT, min_length=CONTEXT)
        generator = genai.Generator(self._model, parameters)
        generator.append_tokens(np.array(ids, np.int32))
        for _ in range(tokens):
            generator.generate_next_token()
            yield int(generator.get_next_tokens()[0])


if __name__ == "__main__":
    serving.main(make, Engine)
