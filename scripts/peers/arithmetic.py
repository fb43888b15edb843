"""Artifacts whose weights are computed with in float32, so that what an engine's own arithmetic loses is left out."""

from __future__ import annotations

import math
import shutil
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from edgeq.bundle import Bundle

_BITS = {"FLOAT": 32, "FLOAT16": 16, "BFLOAT16": 16, "UINT8": 8, "INT8": 8, "INT64": 64, "INT32": 32, "UINT4": 4}


def float_onnx(folder: Path) -> Path:
    """Copy of a folder of ONNX graphs whose MatMulNBits multiply float32 activations instead of 8-bit ones."""
    import onnx

    copy = Path(shutil.copytree(folder, folder.with_name(f"{folder.name}.float"), dirs_exist_ok=True))
    for path in copy.glob("*.onnx"):
        model = onnx.load(path, load_external_data=False)
        for node in model.graph.node:
            for attribute in node.attribute:
                if attribute.name == "accuracy_level":
                    attribute.i = 1
        path.write_bytes(model.SerializeToString())
    return copy


def float_mlc(folder: Path, made: Bundle) -> tuple[Path, Bundle]:
    """Copy of a processor's bundle as GPUs have it: weights in rows, multiplied by float32 activations."""
    import msgspec
    import numpy as np

    from edgeq.backends.mlc import library, packing, report, tensor_cache

    copy = folder.with_name(f"{folder.name}.float")
    copy.mkdir(exist_ok=True)
    shutil.copy(library.find(folder), copy)
    told = report.read(folder)
    report.write(msgspec.structs.replace(told, isa=(*told.isa, "none"), tiles=False), copy)
    with tensor_cache.Writer(copy) as cache:
        for name, record in tensor_cache.records(folder).items():
            values = tensor_cache.read(folder, record)
            if name.endswith((".q_weight", ".q_scale")) and values.ndim > 2:
                values = packing.in_rows(values)
            cache.add(name, values.astype(np.float32) if values.dtype == np.float16 else values)
    return copy, msgspec.structs.replace(made, recipe=made.recipe.removesuffix("-kv16"))


def onnx_bytes(graph: Path) -> tuple[int, int]:
    """Bytes of a graph's weights and, of those, what one decoded token reads; rotary caches, which follow from the
    context, count in neither.

    A table that only a Gather reads gives one row to a token.
    """
    import onnx

    model = onnx.load(graph, load_external_data=False)
    readers: dict[str, set[str]] = {}
    for node in model.graph.node:
        for name in node.input:
            readers.setdefault(name, set()).add(node.op_type)
    stored = read = 0
    for tensor in model.graph.initializer:
        if "_cache" in tensor.name:
            continue
        kind = onnx.TensorProto.DataType.Name(tensor.data_type)
        size = math.prod(tensor.dims) * _BITS[kind] // 8
        stored += size
        if not readers.get(tensor.name, set()) <= {"Gather", "GatherBlockQuantized"}:
            read += size
    return stored, read


def float_gguf(folder: Path, name: str, threads: int) -> Path:
    """Folder beside another with its GGUF file's matrices as float32."""
    from peers.llamacpp.programs.quantize import quantize

    copy = folder.with_name(f"{folder.name}.float")
    copy.mkdir(exist_ok=True)
    quantize(str(folder / name), str(copy / name), "F32", "F32", threads)
    return copy


def gguf_bytes(path: Path) -> tuple[int, int]:
    """Bytes of a GGUF file's tensors and, of those, what one decoded token reads."""
    import gguf

    sizes = {tensor.name: int(tensor.n_bytes) for tensor in gguf.GGUFReader(path).tensors}
    stored = sum(sizes.values())
    return stored, stored - (sizes["token_embd.weight"] if "output.weight" in sizes else 0)
