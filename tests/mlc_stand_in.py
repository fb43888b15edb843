"""A stand-in for the official MLC compiler: as strict about arguments and configs, but it compiles nothing.

Run as `python -m mlc_llm`, it ends with 2 at any argument that edgeq must not give, with 1 and a traceback where the
real one raises, and writes `mlc-chat-config.json` and a "library": the 64 bytes of an ELF header, then the description
that a real one holds. It imports the standard library alone.

`RECORDED` is what mlc_llm of July 2026 (79d603f0) on TVM 0.26.0 asked for, from libraries of the tiny checkpoints.
"""

from __future__ import annotations

import argparse
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import NoReturn

FAULTS = "MLC_STAND_IN_FAULTS"
"""Environment variable: what to do wrong, words joined by commas, such as those in `faulty`."""
LOCK = "MLC_STAND_IN_LOCK"
"""Environment variable: file that the program started by the fault `hang` holds locked while it lives."""
HANG_S = 20
_Layer = tuple[tuple[str, tuple[int, ...]], ...]
_MLP: _Layer = (
    ("mlp.gate_up_proj.weight", (256, 64)),
    ("mlp.down_proj.weight", (64, 128)),
    ("input_layernorm.weight", (64,)),
    ("post_attention_layernorm.weight", (64,)),
)
_ATTENTION: _Layer = (
    ("self_attn.o_proj.weight", (64, 128)),
    ("self_attn.q_norm.weight", (32,)),
    ("self_attn.k_norm.weight", (32,)),
)
_QWEN2: _Layer = (
    ("self_attn.c_attn.weight", (128, 64)),
    ("self_attn.c_attn.bias", (128,)),
    ("self_attn.o_proj.weight", (64, 64)),
    *_MLP,
)
_DELTA_NET: _Layer = (
    ("linear_attn.in_proj_qkv.weight", (256, 64)),
    ("linear_attn.in_proj_z.weight", (128, 64)),
    ("linear_attn.in_proj_a.weight", (4, 64)),
    ("linear_attn.in_proj_b.weight", (4, 64)),
    ("linear_attn.out_proj.weight", (64, 128)),
    ("linear_attn.conv1d_weight", (256, 1, 4)),
    ("linear_attn.A_log", (4,)),
    ("linear_attn.dt_bias", (4,)),
    ("linear_attn.norm.weight", (32,)),
    *_MLP,
)
RECORDED: dict[str, tuple[_Layer, ...]] = {
    "qwen2": (_QWEN2,) * 2,
    "qwen3": ((("self_attn.c_attn.weight", (256, 64)), *_ATTENTION, *_MLP),) * 2,
    "qwen3_5_text": (*(_DELTA_NET,) * 3, (("self_attn.c_attn.weight", (384, 64)), *_ATTENTION, *_MLP)),
}
"""Name and shape of each layer's parameters, unquantized, in the library's order."""
_NEEDED = {
    "qwen2": ("rope_theta", "intermediate_size", "num_key_value_heads", "rms_norm_eps"),
    "qwen3": ("rope_theta", "intermediate_size", "num_key_value_heads", "rms_norm_eps", "attention_bias"),
    "qwen3_5_text": ("full_attention_interval", "linear_num_key_heads", "partial_rotary_factor"),
}
"""Keys without which the real one raises TypeError, or takes a default that edgeq must not leave to it."""
_TEMPLATES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_5_text": "qwen3_5"}
_MACHINES = {"x86_64": 62, "aarch64": 183}


def install(folder: Path, *, parts: tuple[str, ...] = ("__main__.py", "cli/__init__.py"), package: str = "") -> Path:
    """A Python in `folder` that has the stand-in and nothing else but the standard library.

    parts: the files of `mlc_llm`, none for no module at all; package: name of an installed package, of version 0.0.1.
    """
    folder.mkdir(parents=True, exist_ok=True)
    for part in parts:
        file = folder / "mlc_llm" / part
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text("import mlc_stand_in\n\nmlc_stand_in.main()\n" if part == "__main__.py" else "")
    if package:
        facts = folder / f"{package.replace('-', '_')}-0.0.1.dist-info" / "METADATA"
        facts.parent.mkdir()
        facts.write_text(f"Metadata-Version: 2.1\nName: {package}\nVersion: 0.0.1\n")
    python = folder / "python"
    path = f"{folder}{os.pathsep}{Path(__file__).parent}"
    python.write_text(f'#!/bin/sh\nPYTHONPATH="{path}" exec "{sys.executable}" -S "$@"\n')
    python.chmod(0o755)
    return python


def parameters(model_type: str, quantization: str) -> list[dict[str, object]]:
    """Parameters of a library, as its description lists them."""
    dtype = "float16" if "f16" in quantization else "float32"
    layers = [
        (f"model.layers.{at}.{name}", shape) for at, layer in enumerate(RECORDED[model_type]) for name, shape in layer
    ]
    found: list[dict[str, object]] = []
    for name, shape in (("model.embed_tokens.weight", (288, 64)), *layers, ("model.norm.weight", (64,))):
        stem = name.removesuffix("weight")
        if quantization.startswith("q4") and len(shape) == 2:
            found.append({"name": f"{stem}q_weight", "shape": [shape[0], shape[1] // 8], "dtype": "uint32"})
            found.append({"name": f"{stem}q_scale", "shape": [shape[0], shape[1] // 32], "dtype": dtype})
        else:
            wide = name.endswith(("A_log", "dt_bias"))
            found.append({"name": name, "shape": list(shape), "dtype": "float32" if wide else dtype})
    return found


def main() -> None:
    """Entry of `python -m mlc_llm`."""
    command, *words = sys.argv[1:]
    faulty(command)
    {"gen_config": gen_config, "compile": compile_library}[command](words)


def faulty(command: str) -> None:
    """What goes wrong before anything is read."""
    if "hang" in faults():
        with Path(os.environ[LOCK]).open("w") as file:
            fcntl.flock(file, fcntl.LOCK_EX)
            subprocess.run(["sleep", str(HANG_S)], pass_fds=[file.fileno()], check=False)
    if f"kill-{command}" in faults():
        os.kill(os.getpid(), 9)
    if f"raise-{command}" in faults():
        fail("\x1b[91mInternalError: Check failed: (false)\x1b[0m", "KeyError: 'seen first'")
    if f"mute-{command}" in faults():
        sys.exit(1)


def gen_config(words: list[str]) -> None:
    """Read `config.json`, write `mlc-chat-config.json`."""
    parser = Strict("MLC LLM Configuration Generator")
    parser.add_argument("config", type=Path)
    parser.add_argument("--quantization", required=True, choices=quantizations())
    parser.add_argument("--conv-template", required=True, choices=list(_TEMPLATES.values()))
    parser.add_argument("-o", dest="output", required=True, type=Path)
    given = parser.parse_args(words)
    config = json.loads((given.config / "config.json").read_text())
    kind = config["model_type"]
    if kind not in RECORDED:
        fail(f"ValueError: Unknown model type: {kind}")
    if missing := [key for key in _NEEDED[kind] if key not in config]:
        fail(f"TypeError: __init__() missing 1 required positional argument: '{missing[0]}'")
    if "full_attention_interval" in config and len(RECORDED[kind]) != config["num_hidden_layers"]:
        fail("AssertionError: layers")
    if _TEMPLATES[kind] != given.conv_template:
        fail(f"AssertionError: {given.conv_template} is not the template of {kind}")
    if "no-config" not in faults():
        made = {"model_type": kind, "quantization": given.quantization, "model_config": config}
        (given.output / "mlc-chat-config.json").write_text(json.dumps(made))


def compile_library(words: list[str]) -> None:
    """Read `mlc-chat-config.json`, write the library."""
    parser = Strict("mlc_llm compile")
    parser.add_argument("model", type=Path)
    parser.add_argument("--device", required=True, type=json.loads)
    parser.add_argument("--host", required=True)
    parser.add_argument("--opt", required=True, choices=["O0"])
    parser.add_argument("--overrides", required=True, type=overrides)
    parser.add_argument("-o", dest="output", required=True, type=Path)
    given = parser.parse_args(words)
    config = json.loads(given.model.read_text())
    if "kind" not in given.device:
        fail(f"ValueError: Invalid target: {given.device}")
    arch = given.host.partition("-")[0]
    if f" -target {given.host}." not in Path(os.environ["CXX"]).read_text():
        fail("RuntimeError: Compilation error: file in wrong format")
    metadata = {
        "model_type": config["model_type"],
        "quantization": config["quantization"],
        "sliding_window_size": -1,
        "kv_state_kind": "hybrid" if "3_5" in config["model_type"] else "kv_cache",
        **given.overrides,
        "params": parameters(config["model_type"], config["quantization"]),
    }
    if "other-context" in faults():
        metadata["context_window_size"] += 1
    if "other-parameters" in faults():
        metadata["params"][0]["dtype"] = "int8"
    if "no-parameters" in faults():
        del metadata["params"]
    told = b"" if "no-description" in faults() else json.dumps(metadata).encode()
    if "no-library" not in faults():
        given.output.write_bytes(elf_header("x86_64" if "wrong-machine" in faults() else arch) + told + bytes(8))


def elf_header(arch: str) -> bytes:
    """Header of a 64-bit little-endian shared object for Linux, with no sections and no segments."""
    identity = b"\x7fELF\x02\x01\x01" + bytes(9)
    kind, machine, version = (3).to_bytes(2, "little"), _MACHINES[arch].to_bytes(2, "little"), b"\x01\0\0\0"
    return (identity + kind + machine + version + bytes(28) + b"\x40\0").ljust(64, b"\0")


def overrides(text: str) -> dict[str, int]:
    """Exactly the three settings that edgeq gives."""
    found = {key: int(value) for key, value in (each.split("=") for each in text.split(";"))}
    if list(found) != ["context_window_size", "prefill_chunk_size", "max_batch_size"]:
        raise argparse.ArgumentTypeError(text)
    return found


def quantizations() -> list[str]:
    """Names that are known; the fault `old` is a version that knows fewer."""
    return ["q0f16", "q0f32"] if "old" in faults() else ["q0f16", "q0f32", "q4f16_1", "q4f32_1"]


def faults() -> list[str]:
    """What to do wrong."""
    return os.environ.get(FAULTS, "").split(",")


def fail(*errors: str) -> NoReturn:
    """End as Python does at an exception, the last error first; TVM's listings follow the message."""
    for error in reversed(errors):
        sys.stderr.write(f"Traceback (most recent call last):\n  File x\n{error}\n")
    sys.stderr.write("    batch_size = T.int64()\n\x1b[1m(... 5327 lines skipped ...)\x1b[0m\n")
    sys.exit(1)


class Strict(argparse.ArgumentParser):
    """As mlc_llm's own: usage on stdout, the message alone on stderr; nothing may be abbreviated."""

    def __init__(self, name: str) -> None:
        super().__init__(name, allow_abbrev=False)

    def error(self, message: str) -> NoReturn:
        self.print_help()
        sys.stderr.write(f"{message}\n")
        sys.exit(2)
