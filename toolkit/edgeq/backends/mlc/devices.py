"""Where libraries are compiled for and where they run: TVM's targets and devices."""

from __future__ import annotations

import platform
from collections.abc import Sequence
from typing import Any

from edgeq.errors import UsageFault
from edgeq.machine import this_machine
from edgeq.target import Target

_CPU = {"x86_64": {"mcpu": "x86-64-v3"}, "aarch64": {}}
"""What every x86-64 target of edgeq has at least (AVX2, FMA, F16C), and any 64-bit ARM."""

_FEATURES = {
    "avx_vnni": "+avxvnni",
    "avx512_vnni": "+avx512f,+avx512bw,+avx512dq,+avx512vl,+avx512vnni",
    "dotprod": "+dotprod",
}
"""LLVM's names of the instruction sets that kernels ask for by name."""


def tvm_target(target: Target) -> Any:
    """`tvm.target.Target` with its host."""
    from tvm.target import Target as TvmTarget

    device = description(target)
    return TvmTarget(device) if device["kind"] == "llvm" else TvmTarget(device, _host(target))


def description(target: Target) -> dict[str, Any]:
    """TVM's description of a device without its host: code generator, architecture and limits."""
    kind = target.code_generator
    if kind == "llvm":
        return _host(target)
    limits = {name: value for name, value in target.mlc.limits().items() if value is not None}
    if kind == "webgpu":
        limits = {"max_num_threads": limits["max_threads_per_block"]}
    arch = {"arch": target.gpu.arch} if kind == "cuda" and target.gpu else {}
    return {"kind": kind, **arch, **limits}


def this_cpu() -> Any:
    """`tvm.target.Target` of this machine's CPU."""
    from tvm.target import Target as TvmTarget

    return TvmTarget({"kind": "llvm", **_CPU[_arch()], **_features(this_machine().isa)})


def find(provider: str) -> Any | None:
    """TVM's first device of an API; None where the runtime has not that API or sees no device of it."""
    import tvm

    try:
        device = tvm.runtime.device(provider, 0)
        return device if device.exist else None
    except (ValueError, RuntimeError):
        return None


def _host(target: Target) -> dict[str, Any]:
    from tvm.target import codegen

    mcpu = target.mlc.mcpu
    if mcpu and not codegen.llvm_is_valid_cpu(mcpu, target.host):
        raise UsageFault(
            f"mlc.mcpu {mcpu!r} is no processor that LLVM knows for {target.host}",
            why=f"{target.name} names it.",
            run="leave mcpu out of the target's [mlc] table, for any processor of the architecture",
        )
    return {"kind": "llvm", "mtriple": target.host, **_features(target.cpu.isa)} | ({"mcpu": mcpu} if mcpu else {})


def _features(isa: Sequence[str]) -> dict[str, Any]:
    found = [feature for name in isa if name in _FEATURES for feature in _FEATURES[name].split(",")]
    return {"mattr": found} if found else {}


def _arch() -> str:
    return platform.machine().lower().replace("arm64", "aarch64").replace("amd64", "x86_64")
