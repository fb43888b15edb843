"""OpenVINO: exported by optimum-intel, compressed by NNCF as optimum-intel calls it, run by OpenVINO and its GenAI.

torchvision, which optimum-intel asks for, is left out: text models do not import it, and its wheels want another torch.
transformers 5.2 is the newest that exports Qwen3.5.
"""

from __future__ import annotations

from pathlib import Path

from peers import base
from peers.serving import AS_RUN, WEIGHTS_ONLY

NAME = "OpenVINO"
FOLDER = Path(__file__).parent
PACKAGES = ("openvino", "openvino-genai", "nncf", "optimum-intel", "transformers", "torch")
HOWS = (AS_RUN, WEIGHTS_ONLY)
RECIPES = {
    "int8": ("float32", "INT8_ASYM"),
    "int4 asym g128": ("float32", "INT4_ASYM", "128"),
    **{
        f"int4 {kind} g{group} awq+scale": ("float32", f"INT4_{kind.upper()}", group, "awq", "scale_estimation")
        for kind in ("asym", "sym")
        for group in ("32", "64", "128")
    },
    **{
        f"int4 {kind} g32 awq+gptq": ("float32", f"INT4_{kind.upper()}", "32", "awq", "gptq")
        for kind in ("asym", "sym")
    },
}
SPEED = {"int4 sym g128": ("float16", "INT4_SYM", "128"), "int4 asym g64": ("float16", "INT4_ASYM", "64")}


def python() -> Path:
    """Python of OpenVINO's environment."""
    return base.virtual_environment("openvino", FOLDER / "requirements.txt", "optimum.intel.openvino, openvino_genai")
