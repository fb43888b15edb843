"""llama.cpp: one GGUF file, run through llama-cpp-python on CUDA, Metal, Vulkan or the CPU."""

from __future__ import annotations

import importlib.metadata
import os
from pathlib import Path
from typing import TYPE_CHECKING

from edgeq.backends.llamacpp import install, limits
from edgeq.bundle import Bundle
from edgeq.errors import MissingTool
from edgeq.model import Model
from edgeq.recipe import Layout, Recipe
from edgeq.target import Target

if TYPE_CHECKING:
    from edgeq.backends.base import Job, Session

ENGINE = ("llama-cpp-python",)
MIXED = ("q2_k", "q3_k", "iq4_xs", "q4_k", "iq4_nl", "w4g32", "q5_k", "q5_0", "q5_1", "q6_k", "w8g32")
SIZED = True
_TOOLS = ("gguf", *ENGINE)

# OpenMP reads this when its library is loaded, which torch does too, and the reference needs torch before the engine.
if "OMP_WAIT_POLICY" not in os.environ:
    os.environ.setdefault("GOMP_SPINCOUNT", "5000")


def provider(target: Target) -> str:
    """The target's own API: llama.cpp has them all."""
    return target.api


def scale_bits(recipe: Recipe) -> int:  # noqa: ARG001
    """GGML's plain blocks have float16 scales."""
    return 16


def activation_group(target: Target, layout: Layout) -> int:
    """Those of a block on processors, 32 on CUDA and Vulkan; Metal's and OpenCL's kernels multiply floats.

    ggml's `vec_dot_type` in `ggml-cpu.c` (Q8_0 and Q8_1, or Q8_K for blocks of 256), `quantize_q8_1` in its kernels for
    GPUs; Vulkan has that where the device has integer dot products.
    """
    if target.api == "cpu":
        return layout.block
    return limits.BLOCK if target.api in ("cuda", "vulkan") else 0


def calibrates_cache(recipe: Recipe) -> bool:  # noqa: ARG001
    """GGML finds the scale of each block of a cache when it is written."""
    return False


def beside_bytes(job: Job) -> int:
    """Bytes of vectors, metadata with the vocabulary, and a prediction head."""
    from edgeq.backends.llamacpp import gguf

    return gguf.beside_bytes(job)


def check(model: Model, recipe: Recipe) -> None:
    """Raise UsageFault when GGML's blocks cannot hold a recipe, UnsupportedModel for what llama.cpp cannot load."""
    limits.check(model, recipe)
    limits.full_attention_interval(model)


def tools(target: Target) -> tuple[str, ...]:
    """Names and versions of the packages that build; raises MissingTool with the line for the target's API."""
    found = []
    for name in _TOOLS:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError as error:
            raise MissingTool(
                f"the llamacpp backend needs {name}",
                why="llama-cpp-python is compiled on installation: a C++ compiler is needed, and some minutes.",
                run=install.lines(target),
            ) from error
    _check_version(install.again(target, install.pinned() or ""))
    return tuple(found)


def build(job: Job, out: Path) -> None:
    """Write model.gguf into `out`."""
    from edgeq.backends.llamacpp import gguf

    gguf.write(job, out)


def load(folder: Path, bundle: Bundle) -> Session:
    """Session of a built folder, on a device of the bundle's provider where llama.cpp sees one, else on the CPU."""
    try:
        import llama_cpp  # noqa: F401
    except (ImportError, OSError, RuntimeError) as error:
        raise MissingTool(
            "llama-cpp-python cannot be imported", why=str(error), run=f"edgeq doctor --target {bundle.target}"
        ) from error
    _check_version(f"edgeq doctor --target {bundle.target}")
    from edgeq.backends.llamacpp.session import LlamaSession

    return LlamaSession(folder, bundle)


def _check_version(run: str) -> None:
    """Raise MissingTool when llama-cpp-python is another one than edgeq is made for."""
    wanted, found = install.pinned(), importlib.metadata.version(*ENGINE)
    if wanted not in (None, found):
        raise MissingTool(
            f"llama-cpp-python {found} is installed, edgeq needs {wanted}",
            why="Its structures and its log change from version to version.",
            run=run,
        )
