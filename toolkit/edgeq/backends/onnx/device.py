"""What ONNX Runtime runs a graph on: the CPU, or an accelerator behind another of its providers."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from edgeq.machine import this_machine


@dataclass(frozen=True)
class Device:
    """One device.

    `provider` is a bundle's word for it, `engine` ONNX Runtime's; `memory` is where states live, by ONNX Runtime's
    name; `chunk` the most tokens that one run is right for (None: any); `open` makes an InferenceSession of a path and
    SessionOptions.
    """

    provider: str
    engine: str
    name: str
    memory: str
    software: bool
    chunk: int | None
    open: Callable[[str, Any], Any]


def cpu() -> Device:
    """The processor: always there."""
    engine = "CPUExecutionProvider"

    def open_session(path: str, options: Any) -> Any:
        import onnxruntime as ort

        return ort.InferenceSession(path, options, providers=[engine])

    return Device("cpu", engine, this_machine().cpu_model, "cpu", False, None, open_session)
