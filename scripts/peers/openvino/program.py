"""OpenVINO's artifact, made and run: program.py make CHECKPOINT CALIBRATION OUT FLOAT MODE [GROUP] [ALGORITHM...].

Exported without weight compression in FLOAT (float32 or float16), then compressed by `nncf.compress_weights` with the
arguments that optimum-intel gives it for `--weight-format int4 --ratio 1.0 --group-size GROUP --group-size-fallback
ignore`: every layer but the table has 4 bits. ALGORITHM is awq, scale_estimation or gptq. Logits come from the plain
runtime, which gives all of a prompt's; speed is that of the GenAI pipeline.
"""

from __future__ import annotations

import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import serving

MODEL = "openvino_model.xml"
EXACT = {"INFERENCE_PRECISION_HINT": "f32", "DYNAMIC_QUANTIZATION_GROUP_SIZE": "0", "KV_CACHE_PRECISION": "f32"}


def make(checkpoint: Path, calibration: Path, out: Path, kind: str, mode: str, *words: str) -> None:
    """Write openvino_model.xml and .bin, and the configuration beside them."""
    import nncf  # type: ignore[import-not-found]
    import openvino  # type: ignore[import-not-found]
    from optimum.exporters.openvino import main_export
    from optimum.intel import OVConfig

    with tempfile.TemporaryDirectory(dir=out.parent) as exported:
        main_export(
            str(checkpoint),
            exported,
            task="text-generation-with-past",
            library_name="transformers",
            ov_config=OVConfig(dtype={"float32": "fp32", "float16": "fp16"}[kind]),
            convert_tokenizer=False,
        )
        model = openvino.Core().read_model(Path(exported, MODEL))
        arguments: dict[str, Any] = {"mode": nncf.CompressWeightsMode[mode]}
        if words:
            group, *algorithms = words
            arguments |= {"ratio": 1.0, "group_size": int(group), **dict.fromkeys(algorithms, True)}
            arguments["advanced_parameters"] = nncf.AdvancedCompressionParameters(
                group_size_fallback_mode=nncf.GroupSizeFallbackMode.IGNORE  # Qwen3.5's rotary product is no layer
            )
            if algorithms:
                windows: list[NDArray[np.int32]] = list(np.load(calibration))
                arguments["dataset"] = nncf.Dataset(windows, lambda window: inputs(model, window.tolist()))
                arguments["subset_size"] = len(windows)
        openvino.save_model(nncf.compress_weights(model, **arguments), out / MODEL, compress_to_fp16=False)
        for file in Path(exported).glob("*.json"):
            (out / file.name).write_bytes(file.read_bytes())


class Engine:
    """The stateful model; each of the two ways to run it is loaded when it is first asked for.

    As run: OpenVINO's own choice of precisions. Weights only: float32 activations and cache.
    """

    def __init__(self, folder: Path, how: str, threads: int) -> None:
        import openvino

        self._folder = folder
        self._settings: dict[str, Any] = {"INFERENCE_NUM_THREADS": threads}
        if how == serving.WEIGHTS_ONLY:
            self._settings |= EXACT
        self._request: Any = None
        self._pipeline: Any = None
        self._model = openvino.Core().read_model(folder / MODEL)
        constants = [node for node in self._model.get_ordered_ops() if node.get_type_name() == "Constant"]
        self.weights_bytes = self.read_bytes = sum(node.get_byte_size() for node in constants)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text on its own."""
        import openvino

        if self._request is None:
            compiled = openvino.Core().compile_model(self._model, "CPU", self._settings)
            self._request = compiled.create_infer_request()
        self._request.reset_state()
        found: NDArray[np.float32] = self._request.infer(inputs(self._model, ids))["logits"][0].copy()
        return found

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Seconds until each token, by the pipeline's own record."""
        import openvino
        import openvino_genai  # type: ignore[import-not-found]

        if self._pipeline is None:
            tokenizer = openvino_genai.Tokenizer(str(self._folder))
            settings = {**self._settings, "PERFORMANCE_HINT": "LATENCY"}
            self._pipeline = openvino_genai.LLMPipeline(str(self._folder), tokenizer, "CPU", **settings)
        prompt = openvino.Tensor(np.array([ids], np.int64))
        mask = openvino.Tensor(np.ones((1, len(ids)), np.int64))
        words = {"max_new_tokens": tokens, "ignore_eos": True, "do_sample": False}
        started = time.perf_counter()
        result = self._pipeline.generate(
            openvino_genai.TokenizedInputs(prompt, mask), openvino_genai.GenerationConfig(**words)
        )
        elapsed = time.perf_counter() - started
        steps = np.array(result.perf_metrics.raw_metrics.m_durations) / 1e6  # between tokens
        found: list[float] = (elapsed - steps.sum() + np.array([0, *np.cumsum(steps)])).tolist()
        return found


def inputs(model: Any, ids: Sequence[int]) -> dict[str, NDArray[Any]]:
    """Arrays that the exported model takes for a text from its first token on."""
    found: dict[str, NDArray[Any]] = {}
    for port in model.inputs:
        match port.get_any_name():
            case "input_ids":
                found["input_ids"] = np.array([ids], np.int64)
            case "attention_mask":
                found["attention_mask"] = np.ones((1, len(ids)), np.int64)
            case "beam_idx":
                found["beam_idx"] = np.zeros(1, np.int32)
            case "position_ids":
                positions = np.arange(len(ids), dtype=np.int64)
                shape = port.get_partial_shape()
                rows = (1,) if len(shape) == 2 else (shape[0].get_length(), 1)
                found["position_ids"] = np.broadcast_to(positions, (*rows, len(ids))).copy()
    return found


if __name__ == "__main__":
    serving.main(make, Engine)
