"""llama.cpp's own quantizer: quantize.py GGUF OUT BODY TABLE THREADS."""

from __future__ import annotations

import sys

_FILE_TYPES = {"F32": "ALL_F32", "Q4_K": "MOSTLY_Q4_K_S", "Q5_K": "MOSTLY_Q5_K_S"}
_FLOATS = (b"ssm_alpha", b"ssm_beta")


def quantize(source: str, out: str, body: str, table: str, threads: int) -> None:
    """Write a file with one type for the matrices of the layers and one for token embedding and output layer.

    The types have GGML's names. Left alone, as edgeq leaves them: the narrow matrices of Qwen3.5's delta nets. Files
    that are quantized already are taken too. Raises RuntimeError when llama.cpp fails.
    """
    import gguf
    import llama_cpp

    kinds = gguf.GGMLQuantizationType
    overrides = (llama_cpp.llama_model_tensor_override * (len(_FLOATS) + 1))()
    for override, name in zip(overrides, _FLOATS, strict=False):
        override.pattern, override.type = name, kinds.F32
    parameters = llama_cpp.llama_model_quantize_default_params()
    parameters.nthread = threads
    parameters.ftype = gguf.LlamaFileType[_FILE_TYPES.get(body, f"MOSTLY_{body}")]
    parameters.token_embedding_type = parameters.output_tensor_type = kinds[table]
    parameters.tt_overrides = overrides
    parameters.allow_requantize = parameters.pure = True
    if code := llama_cpp.llama_model_quantize(source.encode(), out.encode(), parameters):
        raise RuntimeError(f"llama.cpp could not quantize {source} to {body} (code {code})")


if __name__ == "__main__":
    source, out, body, table, threads = sys.argv[1:]
    quantize(source, out, body, table, int(threads))
