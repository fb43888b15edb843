"""ONNX Runtime on the CPU, WebGPU or CUDA: the model builder's graph, edgeq's weights, a plain InferenceSession."""

from __future__ import annotations

import contextlib
import importlib.metadata
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq import size
from edgeq.bundle import Bundle
from edgeq.errors import MissingTool, UsageFault
from edgeq.model import Model
from edgeq.recipe import COLUMN, Layout, Recipe, plain
from edgeq.target import Target

if TYPE_CHECKING:
    from edgeq.backends.base import Job, Session

ENGINE = ("onnxruntime",)
MIXED = ("w2g64", "w4g128", "w4g64", "w4g32", "w4ag32", "w8g128", "w8g32")
SIZED = True
_SMALL_CACHE_BITS = 8
_KLEIDI_BITS = 4
_GRAPH_BYTES = 24_000  # of a layer in both graphs
_BUILD_TOOLS = (*ENGINE, "onnxruntime-genai", "onnx-ir", "transformers", "torch", "numpy", "ml-dtypes")


def provider(target: Target) -> str:
    """`cpu`, `webgpu` or `cuda`, as the target says."""
    return target.onnx.provider


def scale_bits(recipe: Recipe) -> int:  # noqa: ARG001
    """MatMulNBits keeps them in the type of its input, float32."""
    return 32


def activation_group(target: Target, layout: Layout) -> int:
    """Those of a group on processors (accuracy level 4), a whole row for some on ARM; GPUs multiply floats.

    On ARM with dot products MLAS hands 4 bits without zero points to KleidiAI, which has one scale for a row
    (`UseKleidiAI` in `qnbitgemm_kernel_neon.cpp`; read, not run).
    """
    if provider(target) != "cpu":
        return 0
    by_row = "dotprod" in target.cpu.isa and layout.bits == _KLEIDI_BITS and layout.symmetric
    return sys.maxsize if by_row else layout.run


def calibrates_cache(recipe: Recipe) -> bool:
    """An 8-bit one: ONNX Runtime reads its scales from the graph."""
    return recipe.kv_bits == _SMALL_CACHE_BITS


def beside_bytes(job: Job) -> int:
    """Predicted bytes of vectors, of the tables of rotations, and of the graphs."""
    model = job.checkpoint.model
    rotations = 4 * job.context * model.head_dim
    return size.float_bytes(model) + rotations + _GRAPH_BYTES * (model.layers + 1)


def check(model: Model, recipe: Recipe) -> None:  # noqa: ARG001
    """Raise UsageFault for GGML's layouts, 2 bits in groups without a kernel, and caches in float16.

    ONNX Runtime 1.32 has a kernel of 2 bits for groups of 32 to 128. It unpacks groups of 16 again for each token, more
    than 100 times as slow, and refuses a column.
    """
    if recipe.body.is_ggml or recipe.table.is_ggml:
        raise UsageFault(
            f"{recipe}: ONNX Runtime does not know GGML's layouts", run="edgeq build ... --backend llamacpp"
        )
    if recipe.body.bits == 2 and recipe.body.group not in (32, 64, 128):
        group = 128 if recipe.body.group == COLUMN else 32
        near = replace(recipe, body=plain(2, group, symmetric=recipe.body.symmetric))
        raise UsageFault(
            f"{recipe}: ONNX Runtime has no fast kernel for {recipe.body.name}", run=f"edgeq build ... --recipe {near}"
        )
    if recipe.kv_bits == 16:
        raise UsageFault(
            f"{recipe}: the onnx backend keeps keys and values in float32 or in 8 bits",
            why="ONNX Runtime's attention keeps them in the type of its activations, or in 8 bits.",
            run=f"edgeq build ... --recipe {str(recipe).rpartition('-')[0]}-kv8, or without -kv8",
        )


def tools(target: Target) -> tuple[str, ...]:  # noqa: ARG001
    """Names and versions of the packages that build; raises MissingTool when one is absent."""
    found = []
    for name in _BUILD_TOOLS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingTool(
                f"the onnx backend needs {name}",
                why="It is part of the extra edgeq[build], which a build host needs and a device does not.",
                run="pip install 'edgeq[build]'",
            ) from error
    return tuple(found)


def build(job: Job, out: Path) -> None:
    """Write model.onnx, its weights and genai_config.json into `out`.

    Raises BackendFault for CUDA on a machine whose installed onnxruntime has no kernels for its GPU.
    """
    from edgeq.backends.onnx import cuda, graph, keyvalues, weights

    if provider(job.target) == "cuda":
        with contextlib.suppress(MissingTool):  # a build host needs no GPU, but one without kernels is no device
            cuda.find()
    model = graph.skeleton(job, out)
    if calibrates_cache(job.recipe):
        assert job.cache is not None
        keyvalues.store(model, job.cache)
    weights.write(model, job, out)


def load(folder: Path, bundle: Bundle) -> Session:
    """Session of a built folder on its provider, or on the CPU where that is absent."""
    from edgeq.backends.onnx.session import OnnxSession

    return OnnxSession(folder, bundle)
