"""Device kernels of a compiled executable: their sources, and what this machine's compilers say about them.

TVM translates a model to source code of the device's API. CUDA C++ becomes machine code here where nvcc is installed,
so that the device compiles nothing; OpenCL C is checked by clang; Metal and WGSL have no compiler that runs anywhere.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, NamedTuple

from edgeq.errors import BackendFault, MissingTool

State = Literal["compiled", "unchecked"]

_KERNEL = {
    "cuda": re.compile(r"__global__ void (?:__\w+\([^)]*\) )*(\w+)\("),
    "metal": re.compile(r"^kernel void (\w+)\(", re.MULTILINE),
    "opencl": re.compile(r"__kernel (?:__\w+\(\([^;{]*?\)\)\) )?void (\w+)\("),
    "webgpu": re.compile(r"@compute[^\n]*\s+fn (\w+)\("),
}
"""How a kernel's declaration begins in the source of each kind of TVM target."""
_NVCC = Path("/usr/local/cuda/bin/nvcc")
"""Where NVIDIA's packages and JetPack put it, which is not on PATH of itself."""
_CL_OPTIONS = ("-x", "cl", "-cl-std=CL2.0", "-target", "spir64", "-Xclang", "-finclude-default-header")
_SHOWN_LINES = 5
_COMPILER = "tvm_callback_cuda_compile"
"""TVM's name for the function that its CUDA runtime gives source to."""


class Source(NamedTuple):
    """One device module; `kind` is that of its TVM target, `names` are its kernels, sorted."""

    kind: str
    text: str
    names: tuple[str, ...]


@dataclass(frozen=True)
class Kernels:
    """All kernels of an executable, and whether a compiler on this machine accepted them.

    `binaries` has machine code for each source text, where that is what the device needs.
    """

    names: tuple[str, ...]
    state: State
    binaries: Mapping[str, bytes] = field(default_factory=dict)


@contextlib.contextmanager
def kept_as_source() -> Iterator[None]:
    """While entered, `relax.build` keeps kernels as source, also where this machine's own GPU could take them.

    TVM would otherwise compile for that GPU, or fail, whatever the target says.
    """
    name = "TVM_COMPILE_FORCE_FALLBACK"
    before = os.environ.get(name)
    os.environ[name] = "1"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def modules(executable: Any) -> list[Any]:
    """The runtime modules of a VMExecutable or runtime.Module, root first, each once."""
    found = [getattr(executable, "mod", executable)]
    for each in found:
        found += [module for module in each.imports if module not in found]
    return found


def sources(executable: Any) -> list[Source]:
    """Source of every device module of an executable; empty when all runs on the CPU."""
    found = []
    for module in modules(executable):
        if module.kind in _KERNEL:
            text = str(module.inspect_source())
            found.append(Source(module.kind, text, tuple(sorted(set(_KERNEL[module.kind].findall(text))))))
    return found


def check(executable: Any, kind: str, arch: str = "") -> Kernels:
    """Kernels of an executable for a kind of TVM target (`llvm`, `cuda`, ...), compiled where a compiler is installed.

    `arch` is CUDA's, such as sm_87. An executable for the CPU has no kernels and is compiled.

    Raises BackendFault when a compiler refuses them, or an executable for a GPU has none.
    """
    if kind == "llvm":
        return Kernels((), "compiled")
    found = [source for source in sources(executable) if source.kind == kind]
    names = tuple(sorted(name for source in found for name in source.names))
    if not names:
        raise BackendFault(f"the executable has no {kind} kernels", why="All of it would run on the CPU.")
    if kind == "cuda" and (nvcc := _nvcc(arch)):
        return Kernels(names, "compiled", {each.text: _compile(nvcc, each.text, arch) for each in found})
    if kind == "opencl" and (clang := shutil.which("clang")):
        for source in found:
            _parse(clang, source.text)
        return Kernels(names, "compiled")
    return Kernels(names, "unchecked")


def cubin(source: str, arch: str) -> bytes:
    """CUDA C++ source as machine code for an architecture such as sm_87, by this machine's nvcc.

    Raises MissingTool when there is no nvcc that knows the architecture, BackendFault when it refuses the source.
    """
    if nvcc := _nvcc(arch):
        return _compile(nvcc, source, arch)
    raise MissingTool(
        f"there is no nvcc that knows {arch}",
        why="This library holds CUDA source, since the build host had no nvcc either.",
        run="install the CUDA toolkit here, or there and build again",
    )


def cache_folder() -> Path:
    """Where compiled kernels are kept on a device: EDGEQ_KERNEL_CACHE, or a folder of the user's cache."""
    if chosen := os.environ.get("EDGEQ_KERNEL_CACHE"):
        return Path(chosen)
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "edgeq" / "kernels"


@contextlib.contextmanager
def cache_compiled(folder: Path, compile_source: Callable[[str, str], bytes] = cubin, arch: str = "") -> Iterator[None]:
    """While entered, CUDA source in a library that is loaded is compiled once for all processes, and kept in `folder`.

    `compile_source` gets source and architecture; `arch` is by default that of the first GPU. Files are named by the
    SHA-256 of both, the architecture first. For a library that holds machine code, nothing is called.

    Raises what `compile_source` raises, where TVM would raise RuntimeError with its text.
    """
    import tvm
    import tvm.support.nvcc  # registers TVM's own compiler, which is replaced here

    refused: list[Exception] = []

    def compiled(source: str) -> bytes:
        wanted = arch or "sm_" + tvm.cuda(0).compute_version.replace(".", "")
        file = folder / f"{hashlib.sha256((wanted + source).encode()).hexdigest()}.cubin"
        if file.is_file():
            return file.read_bytes()
        try:
            code = compile_source(source, wanted)
        except Exception as error:
            refused.append(error)
            raise
        with contextlib.suppress(OSError):  # where nothing can be kept, it is compiled each time
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryDirectory(dir=folder) as scratch:
                made = Path(scratch) / file.name
                made.write_bytes(code)
                made.replace(file)
        return code

    before = tvm.get_global_func(_COMPILER)
    tvm.register_global_func(_COMPILER, compiled, override=True)
    try:
        yield
    except RuntimeError as error:
        raise (refused or [error])[0] from None
    finally:
        tvm.register_global_func(_COMPILER, before, override=True)


def _nvcc(arch: str) -> str | None:
    """This machine's nvcc, if it knows the architecture."""
    nvcc = shutil.which("nvcc") or shutil.which(_NVCC)
    known = subprocess.run([nvcc, "--list-gpu-code"], capture_output=True, text=True).stdout if nvcc else ""
    return nvcc if arch in known.split() else None


def _compile(nvcc: str, source: str, arch: str) -> bytes:
    with tempfile.TemporaryDirectory() as scratch:
        _run([nvcc, "-cubin", f"-arch={arch}", "-O3", "-w", "-o", "out.cubin"], "kernels.cu", source, Path(scratch))
        return Path(scratch, "out.cubin").read_bytes()


def _parse(clang: str, source: str) -> None:
    with tempfile.TemporaryDirectory() as scratch:
        _run([clang, *_CL_OPTIONS, "-fsyntax-only", "-w"], "kernels.cl", source, Path(scratch))


def _run(command: Sequence[str], name: str, source: str, folder: Path) -> None:
    """Run a compiler in `folder` on a file there; raises BackendFault with its first errors unless it succeeds."""
    (folder / name).write_text(source, encoding="utf-8")
    done = subprocess.run([*command, name], cwd=folder, capture_output=True, text=True, errors="replace")
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        errors = [line for line in said if re.search(r"\b(error|fatal)\s*:", line)] or said
        why = "\n".join(errors[:_SHOWN_LINES]) or f"It ended with code {done.returncode}."
        raise BackendFault(f"{Path(command[0]).name} refuses the kernels", why=why)
