"""WebGPU: ONNX Runtime's plug-in provider, Dawn over Vulkan (Linux), Metal (macOS) or Direct3D 12 (Windows).

Its graph is in float32: an adapter may have no 16-bit arithmetic (WebGPU's `shader-f16` is optional), which one the
device has is unknown when building, and the CPU provider can run the very same graph, as gate and where no GPU is
found. Weights have the recipe's bits all the same; activations and states are twice as wide as they could be.
Activations are not rounded to 8 bits, as they are for the CPU: each provider rounds them in a way of its own, so that
a gate on the CPU would say nothing of the GPU's.
"""

from __future__ import annotations

from functools import cache
from typing import Any

from edgeq.backends.onnx.device import Device
from edgeq.errors import MissingTool

INSTALL = "pip install 'edgeq[webgpu]'"
OPTIONS = {"enableGraphCapture": "0", "validationMode": "basic"}
"""A captured graph has fixed shapes, which a growing text has not; basic validation finds faults of drivers."""
SOFTWARE_CHUNK = 16
"""On SwiftShader a run of 32 tokens or more has wrong attention from its fifth token on, whatever the weights' bits.

Its subgroups have 4 lanes, which may be why. A GPU is not limited: `edgeq verify` on it scores longer runs.
"""
_LIBRARY = "edgeq-webgpu"


def find() -> Device:
    """The WebGPU device; raises MissingTool when the provider's package, a driver or an adapter is absent.

    A processor that plays a GPU counts only when the environment says ORT_WEBGPU_EP_ALLOW_SOFTWARE_ADAPTER=1.
    """
    found = _ep_device()
    software = found.device.type.name == "CPU"
    if software:
        name = "software adapter (a processor that plays a GPU)"
    else:
        name = " ".join(filter(None, (found.device.vendor, found.device.metadata.get("Description", "GPU"))))

    def open_session(path: str, options: Any) -> Any:
        import onnxruntime as ort

        options.add_provider_for_devices([found], OPTIONS)
        return ort.InferenceSession(path, options)

    return Device("webgpu", found.ep_name, name, "webgpu", software, SOFTWARE_CHUNK if software else None, open_session)


def _ep_device() -> Any:
    """ONNX Runtime's own description of the device."""
    try:
        import onnxruntime as ort
        import onnxruntime_ep_webgpu as plugin
    except ImportError as error:
        raise MissingTool("the WebGPU provider is not installed", why=str(error), run=INSTALL) from error
    try:
        _register(plugin.get_library_path())
    except Exception as error:
        raise MissingTool("the WebGPU provider cannot be used", why=str(error), run=INSTALL) from error
    devices = [each for each in ort.get_ep_devices() if each.ep_name == plugin.get_ep_name()]
    if not devices:
        raise MissingTool(
            "the WebGPU provider sees no GPU",
            why="It needs a GPU with a driver for Vulkan, Metal or Direct3D 12.",
            run="vulkaninfo --summary",
        )
    return devices[0]


@cache
def _register(library: str) -> None:
    """Make the provider known to ONNX Runtime, which may be done once in a process."""
    import onnxruntime as ort

    ort.set_default_logger_severity(3)  # `placement` says what its warning about software adapters says
    ort.register_execution_provider_library(_LIBRARY, library)
