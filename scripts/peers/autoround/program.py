"""AutoRound's weights, made and run: program.py make CHECKPOINT CALIBRATION OUT GROUP.

Symmetric 4 bits with its default recipe (200 iterations, batches of 8, learned rounding and ranges) over the
calibration windows, halved to 256 tokens: a demo checkpoint was trained on no longer ones.
"""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from peers import serving

LENGTH = 256
ITERATIONS = 200
BITS, SCALE_BITS, TABLE_BITS, FLOAT_BITS = 4, 16, 8.5, 16


def make(checkpoint: Path, calibration: Path, out: Path, group: str) -> None:
    """Write the model with dequantized weights in float32, and its size as it would be packed."""
    import torch
    from auto_round import AutoRound  # type: ignore[import-not-found]
    from transformers import AutoModelForCausalLM, AutoTokenizer

    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    model = AutoModelForCausalLM.from_pretrained(checkpoint, dtype=torch.float32)
    windows = np.load(calibration)
    data = [torch.from_numpy(window[None].astype(np.int64)) for window in windows.reshape(-1, LENGTH)]
    quantizer = AutoRound(
        model,
        AutoTokenizer.from_pretrained(checkpoint),
        bits=BITS,
        group_size=int(group),
        sym=True,
        iters=ITERATIONS,
        dataset=data,
        seqlen=LENGTH,
        nsamples=len(data),
        device_map="cpu",
        amp=False,
        enable_torch_compile=False,
    )
    model, layers = quantizer.quantize()
    quantized = {f"{name}.weight" for name, words in layers.items() if words["bits"] == BITS}
    with torch.inference_mode():
        for name, parameter in model.named_parameters():
            if name.endswith("embed_tokens.weight"):
                parameter.copy_(_rounded(parameter))
    size = sum(value.numel() * _bits(name, quantized, int(group)) for name, value in model.named_parameters())
    model.float().save_pretrained(out)
    (out / "size.json").write_text(json.dumps(size / 8))


def _bits(name: str, quantized: set[str], group: int) -> float:
    if name in quantized:
        return BITS + SCALE_BITS / group
    return TABLE_BITS if name.endswith("embed_tokens.weight") else FLOAT_BITS


def _rounded(table: Any) -> Any:
    """8-bit codes in groups of 32 with float16 scales, as values."""
    groups = table.unflatten(-1, (-1, 32))
    scales = (groups.abs().amax(-1, keepdim=True) / 127).half().float().clamp_min(1e-12)
    return ((groups / scales).round().clamp(-127, 127) * scales).flatten(-2)


class Engine:
    """The dequantized model in transformers, float32."""

    def __init__(self, folder: Path, _: str, threads: int) -> None:
        import torch
        from transformers import AutoModelForCausalLM

        torch.set_num_threads(threads)
        self._model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
        self.weights_bytes = self.read_bytes = int(json.loads((folder / "size.json").read_text()))

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """Logits after each token of a text on its own."""
        import torch

        with torch.inference_mode():
            found: NDArray[np.float32] = self._model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
        return found

    def moments(self, ids: Sequence[int], tokens: int) -> list[float]:
        """Not asked: dequantized weights have no speed of their own."""
        raise ValueError(f"AutoRound has no engine to time: {len(ids)} tokens, {tokens} more")


if __name__ == "__main__":
    serving.main(make, Engine)
