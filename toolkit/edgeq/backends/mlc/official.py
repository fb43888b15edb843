"""The official compiler, `mlc_llm`, where its maker's packages are installed: run from outside, its products checked.

It needs shapes alone. Weights are edgeq's own, in the layouts and under the names that its libraries ask for: what its
converter would write is plain rounding, with norms in bfloat16.
"""

from __future__ import annotations

import json
import math
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from edgeq.backends.mlc import OFFICIAL_PYTHON, devices
from edgeq.backends.mlc.library import file_name, link_command, require
from edgeq.bundle import Compiled, MemoryPlan
from edgeq.errors import BackendFault, BackendKilled, MissingTool, UnsupportedModel, UsageFault
from edgeq.model import Model
from edgeq.recipe import Recipe
from edgeq.target import Target

if TYPE_CHECKING:
    from edgeq.backends.base import Job
    from edgeq.backends.mlc.official_weights import Parameters

VARIABLE = OFFICIAL_PYTHON
"""Environment variable: a Python that has mlc_llm, whose packages bring a TVM of their own."""
BUILT_IN = "the built-in compiler: pip install 'edgeq[tvm]'"
INSTALL = (
    "python -m venv mlc && mlc/bin/python -m pip install --pre -U -f https://mlc.ai/wheels mlc-llm-nightly-cpu "
    f'mlc-ai-nightly-cpu && export {VARIABLE}="$PWD/mlc/bin/python"'
)
"""The maker's own line (its page of wheels is the only place that has them), in an environment of its own."""
CHUNK = 256
LIMIT_S = 1800.0
"""Time for one compilation: minutes on two slow cores."""
_PROBE_LIMIT_S = 60.0
_PROBE = """
import importlib.metadata, importlib.util, json, pathlib
spec = importlib.util.find_spec("mlc_llm")
roots = [pathlib.Path(each) for each in spec.submodule_search_locations or ()] if spec else []
names = {each.metadata["Name"]: each.version for each in importlib.metadata.distributions()}
print(json.dumps({
    "complete": any((root / "__main__.py").is_file() and (root / "cli").is_dir() for root in roots),
    "packages": {name: version for name, version in names.items() if name and name.startswith(("mlc-", "mlc_"))},
}))
"""
_QUANTIZATIONS = {
    ("w4g32", "w4g32", 16): "q4f16_1",
    ("w4g32", "w4g32", 32): "q4f32_1",
    ("f16", "f16", 16): "q0f16",
    ("f32", "f32", 32): "q0f32",
}
"""MLC's names by body, table and bits of the cache, whose type is that of scales, norms and activations too."""
_TEMPLATES = {"qwen2": "qwen2", "qwen3": "qwen3", "qwen3_5_text": "qwen3_5"}
_COLOURS = re.compile(r"\x1b\[[0-9;]*m")
_ERROR = re.compile(r"^(?:\w+\.)*\w*Error: .*", re.MULTILINE)


@dataclass(frozen=True)
class Official:
    """An installation: the Python that has it, and the package's name and version."""

    python: Path
    version: str


def without(target: Target) -> str:
    """What can be done for a target without this compiler."""
    return 'kind = "opencl" in the target\'s [mlc] table' if target.code_generator == "vulkan" else BUILT_IN


def is_chosen(target: Target) -> bool:
    """Whether it compiles for a target: where EDGEQ_MLC_PYTHON asks for it, or the built-in one cannot."""
    return bool(os.environ.get(VARIABLE)) or target.code_generator == "vulkan"


def build(job: Job, out: Path) -> Compiled:
    """Write library, weights and report into `out`; raises as `find`, `quantization` and `compile_library` do."""
    from edgeq.backends.mlc import official_weights, report
    from edgeq.backends.mlc.official_weights import DTYPES

    target, wanted = job.target, quantization(job.recipe)
    path = out / file_name(target.host)
    job.progress("compile", 0, 1)
    parameters = compile_library(
        find(without(target)),
        job.checkpoint.model,
        wanted,
        device=devices.description(target),
        host=target.host,
        context=job.context,
        chunk=CHUNK,
        library=path,
    )
    job.progress("compile", 1, 1)
    made = report.Report(
        compiler="mlc_llm", isa=target.cpu.isa, dtype=DTYPES[wanted], floats=DTYPES[wanted], kernels=()
    )
    report.write(made, out)
    official_weights.write(job, parameters, out)
    check(out, path, target.host)
    return Compiled(kernels="unchecked", memory=memory(path, target.host))


def find(otherwise: str = BUILT_IN) -> Official:
    """Installation that EDGEQ_MLC_PYTHON names, else that of this Python; `otherwise`: what can be done without one.

    Raises MissingTool with the maker's command when there is none, or only packages that took its name and are empty.
    """
    named = os.environ.get(VARIABLE)
    python = Path(shutil.which(named or sys.executable) or named or sys.executable).absolute()
    what = f"mlc_llm, the official MLC compiler, is not installed in {python}"
    try:
        asked = subprocess.run([python, "-c", _PROBE], cwd=python.parent, capture_output=True, timeout=_PROBE_LIMIT_S)
        found = json.loads(asked.stdout)
        complete, named_packages = bool(found["complete"]), dict(found["packages"])
    except (OSError, subprocess.TimeoutExpired, ValueError, KeyError, TypeError) as error:
        raise MissingTool(
            f"{VARIABLE}={named} is no Python that works",
            why=str(error),
            run=f"unset {VARIABLE}, for {otherwise}; or {INSTALL}",
        ) from error
    packages = [f"{name} {version}" for name, version in sorted(named_packages.items())]
    if not complete:
        why = f"Placeholders took its name, packages without a compiler: {', '.join(packages)}." if packages else ""
        raise MissingTool(what, why=why, run=f"{INSTALL}; or {otherwise}")
    llm = [package for package in packages if package[4:].startswith("llm")]
    return Official(python, (llm or ["mlc_llm of unknown version"])[0])


def quantization(recipe: Recipe) -> str:
    """MLC's name of what a recipe stores; raises UsageFault, with a recipe that works, when it has none."""
    found = _QUANTIZATIONS.get((recipe.body.name, recipe.table.name, recipe.kv_bits))
    if found is None:
        near = "f16-kv16" if recipe.body.is_float else f"w4g32-e4-rtn{'-kv16' if recipe.kv_bits < 32 else ''}"
        raise UsageFault(
            f"{recipe}: the official MLC compiler has no such layout",
            why="It has 4 bits in groups of 32, the table included, and floats; scales and cache are of one type.",
            run=f"edgeq build ... --recipe {near}, or use {BUILT_IN}",
        )
    return found


def config(model: Model) -> dict[str, Any]:
    """`config.json` as mlc_llm's three Qwen classes read it, text only.

    Raises UnsupportedModel where those classes would take another shape than the checkpoint's.
    """
    found = model.config()
    if model.model_type == "qwen2" and model.heads * model.head_dim != model.hidden:
        raise _unsupported("head_dim other than hidden_size / num_attention_heads")
    if model.model_type == "qwen3":
        found["attention_bias"] = False
    if model.linear is not None:
        interval = model.layers // max(1, model.full_attention_layers)
        kinds = ["linear_attention"] * (interval - 1) + ["full_attention"]
        if list(model.layer_types) != [kinds[index % interval] for index in range(model.layers)]:
            raise _unsupported("layer_types without a fixed interval")
        found["full_attention_interval"] = interval
    return found


def compile_library(
    official: Official,
    model: Model,
    quantization: str,
    *,
    device: Mapping[str, object],
    host: str,
    context: int,
    chunk: int,
    library: Path,
    limit_s: float = LIMIT_S,
) -> Parameters:
    """Compile a model's library for one sequence at a time; its parameters in the library's own order.

    device: TVM's target, so that no device is needed here; host: triple such as aarch64-linux-gnu; context and chunk:
    tokens of a sequence, and of a prompt that run at once; limit_s: for each of the compiler's two steps.
    Raises MissingTool without a linker for the host, BackendFault when the compiler fails or makes something else than
    was asked for, BackendKilled when it takes longer or is killed.
    """
    from edgeq.backends.mlc import official_weights

    with tempfile.TemporaryDirectory(prefix="edgeq-mlc-") as folder:
        scratch = Path(folder)
        environment = _linker(host, scratch)
        (scratch / "config.json").write_text(json.dumps(config(model)), encoding="utf-8")
        template = _TEMPLATES[model.model_type]
        words = ["--quantization", quantization, "--conv-template", template, "-o", folder]
        _run(official, ["gen_config", folder, *words], scratch, limit_s, environment)
        made = scratch / "mlc-chat-config.json"
        if not made.is_file():
            raise BackendFault(f"mlc_llm gen_config ended well and wrote no {made.name}", why=official.version)
        overrides = f"context_window_size={context};prefill_chunk_size={chunk};max_batch_size=1"
        words = ["--device", json.dumps(dict(device)), "--host", host, "--opt", "O0", "--overrides", overrides]
        _run(official, ["compile", str(made), *words, "-o", str(library.absolute())], scratch, limit_s, environment)
    metadata = describe(library, host)
    asked = {"quantization": quantization, "context_window_size": context, "prefill_chunk_size": chunk}
    if wrong := [f"{key} {metadata.get(key)!r}" for key, value in asked.items() if metadata.get(key) != value]:
        raise BackendFault(f"{library}: the library has {', '.join(wrong)}", why=f"Asked for: {asked}.")
    found, wanted = _parameters(metadata), official_weights.parameters(model, quantization)
    if odd := sorted(name for name in found.keys() | wanted.keys() if found.get(name) != wanted.get(name)):
        raise BackendFault(
            f"{official.version} asks for other weights than edgeq writes",
            why=f"{odd[0]}: it has {found.get(odd[0])}, edgeq {wanted.get(odd[0])}; {len(odd)} differ.",
            run=f"use {BUILT_IN}",
        )
    return found


def memory(library: Path, host: str) -> MemoryPlan:
    """Memory that a library's code wants, as it says itself; its caches and states from the shapes that it names."""
    import numpy as np

    from edgeq.backends.mlc.official_weights import DTYPES

    told = describe(library, host)
    try:
        cache = told["kv_cache"]
        width = np.dtype(DTYPES[told["quantization"]]).itemsize
        values = cache["num_hidden_layers"] * cache["num_key_value_heads"] * cache["head_dim"] * 2
        return MemoryPlan(
            weights_bytes=sum(
                math.prod(shape) * np.dtype(dtype).itemsize for shape, dtype in _parameters(told).values()
            ),
            kv_cache_bytes_per_token=values * width,
            state_bytes=None,
            temporary_bytes=dict(told["memory_usage"]),
        )
    except (KeyError, TypeError) as error:
        raise BackendFault(f"{library}: the library does not say what memory it wants", why=repr(error)) from error


def describe(library: Path, host: str) -> dict[str, Any]:
    """What a library says of itself, read from its bytes, which may be another processor's.

    Raises BackendFault when it is missing, made for another host, or says nothing.
    """
    if not library.is_file():
        raise BackendFault(f"{library}: the compiler ended well and left no library")
    require(library, host)
    content = library.read_bytes()
    told = content[max(content.find(b'{"model_type": '), 0) :].decode("latin-1")
    try:
        found: dict[str, Any] = json.JSONDecoder().raw_decode(told)[0]
    except ValueError as error:
        raise BackendFault(f"{library}: the library does not describe itself", why=str(error)) from error
    return found


def check(folder: Path, library: Path, host: str) -> None:
    """Check a finished bundle's files without running them: host code, digests of the weights, and that they fit.

    Raises what `describe` raises, CorruptInput for damaged weights, BackendFault for those of another library.
    """
    from edgeq.backends.mlc import tensor_cache

    wanted = _parameters(describe(library, host))
    tensor_cache.check(folder)
    held = {name: (tuple(each["shape"]), each["dtype"]) for name, each in tensor_cache.records(folder).items()}
    if held != wanted:
        odd = min(name for name in held.keys() | wanted.keys() if held.get(name) != wanted.get(name))
        raise BackendFault(
            f"{folder}: library and weights do not belong together",
            why=f"{odd}: the library wants {wanted.get(odd)}, the weights have {held.get(odd)}.",
            run="edgeq build ... again",
        )


def _parameters(metadata: Mapping[str, Any]) -> Parameters:
    try:
        return {each["name"]: (tuple(each["shape"]), each["dtype"]) for each in metadata["params"]}
    except (KeyError, TypeError) as error:
        raise BackendFault("the library does not say which weights it wants", why=repr(error)) from error


def _unsupported(what: str) -> UnsupportedModel:
    return UnsupportedModel(f"config.json: the official MLC compiler cannot hold {what}", run=f"use {BUILT_IN}")


def _linker(host: str, scratch: Path) -> dict[str, str]:
    """Environment in which TVM links for a host: by zig for Linux; on a Mac, for a Mac, by Apple's tools."""
    system = host.partition("-")[2]
    if system == "apple-darwin" and sys.platform == "darwin":
        return {}
    if system != "linux-gnu":
        raise UsageFault(f"the official MLC compiler links for {host} on such a machine only", run=f"use {BUILT_IN}")
    script = scratch / "cxx"
    script.write_text(f'#!/bin/sh\nexec {shlex.join(link_command(host, "c++"))} "$@" -lm\n', encoding="utf-8")
    script.chmod(0o700)
    return {"CXX": str(script)}


def _run(
    official: Official, words: Sequence[str], scratch: Path, limit_s: float, environment: Mapping[str, str]
) -> None:
    """Run one of mlc_llm's commands, temporary files in `scratch`; what it started ends with it."""
    command, name = [str(official.python), "-m", "mlc_llm", *words], f"mlc_llm {words[0]}"
    process = subprocess.Popen(
        command,
        cwd=scratch,
        env={**os.environ, "TMPDIR": str(scratch), **environment},
        stdin=subprocess.DEVNULL,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        errors="replace",
        start_new_session=True,
    )
    with process:
        try:
            _, told = process.communicate(timeout=limit_s)
        except subprocess.TimeoutExpired as error:
            os.killpg(process.pid, signal.SIGKILL)
            raise BackendKilled(f"{name} was stopped after {limit_s:g} s", run=f"use {BUILT_IN}") from error
        except BaseException:
            os.killpg(process.pid, signal.SIGKILL)
            raise
    code, told = process.returncode, _COLOURS.sub("", told)
    if code < 0:
        why = f"Signal {-code}: {signal.strsignal(-code)}; 9 without a cause is most often too little memory."
        raise BackendKilled(f"{name} was killed", why=why, run="close other programs and try again")
    if code == 2:
        what = f"{official.version} does not take edgeq's arguments for {words[0]}"
        raise BackendFault(what, why=_last_line(told), run=f"use {BUILT_IN}")
    if code:
        errors = _ERROR.findall(told)
        why = errors[-1] if errors else _last_line(told)
        raise BackendFault(f"{name} failed with exit code {code}", why=why, run=f"use {BUILT_IN}")


def _last_line(text: str) -> str:
    return (text.strip().splitlines() or ["It gave no reason."])[-1]
