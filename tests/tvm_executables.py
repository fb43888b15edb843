"""A tiny model compiled by TVM: log(2 x) over 64 numbers, as one kernel or more."""

from __future__ import annotations

from typing import Any

import pytest

GPUS = {
    "cuda": {"kind": "cuda", "arch": "sm_87", "max_threads_per_block": 1024},
    "metal": {"kind": "metal", "max_threads_per_block": 1024},
    "opencl": {"kind": "opencl", "max_threads_per_block": 256},
    "webgpu": {"kind": "webgpu", "max_num_threads": 256},
}
SIZE = 64


def build(kind: str, triple: str) -> Any:
    """A VMExecutable with function `main`; kernels for a GPU stay source. Skips the test where TVM is not installed."""
    tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from tvm import relax
    from tvm.s_tir import dlight

    from edgeq.backends.mlc import kernels

    host = {"kind": "llvm", "mtriple": triple}
    target = tvm.target.Target(host) if kind == "llvm" else tvm.target.Target(GPUS[kind], host)
    builder = relax.BlockBuilder()
    x = relax.Var("x", relax.TensorType((SIZE,), "float32"))
    with builder.function("main", [x]):
        with builder.dataflow():
            out = builder.emit_output(relax.op.log(relax.op.add(x, x)))
        builder.emit_func_output(out)
    with target, kernels.kept_as_source():
        module = relax.transform.LegalizeOps()(builder.get())
        if kind != "llvm":
            module = dlight.ApplyDefaultSchedule(dlight.gpu.Fallback())(module)
        return relax.build(module, target)
