"""ONNX Runtime on the CPU: the model builder's graph, edgeq's weights, a plain InferenceSession."""

from __future__ import annotations

import importlib.metadata
from pathlib import Path

from edgeq.backends.base import Job, Session
from edgeq.bundle import Bundle
from edgeq.errors import MissingTool

PROVIDER = "cpu"
ENGINE = ("onnxruntime",)
_BUILD_TOOLS = (*ENGINE, "onnxruntime-genai", "onnx-ir", "transformers", "torch", "numpy", "ml-dtypes")


def tools() -> tuple[str, ...]:
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
    """Write model.onnx, its weights and genai_config.json into `out`."""
    from edgeq.backends.onnx import graph, weights

    model = graph.skeleton(job, out)
    weights.write(model, job, out)


def load(folder: Path, bundle: Bundle) -> Session:
    """Session of a built folder on ONNX Runtime's CPU provider."""
    from edgeq.backends.onnx.session import OnnxSession

    return OnnxSession(folder, bundle)
