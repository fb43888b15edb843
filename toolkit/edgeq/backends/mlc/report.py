"""What a compiled module will do, read from its code: kernels of a decoded token, bytes they move, temporary memory."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import relax, tirx

from edgeq.backends.mlc import schedules

_TOKEN = ("embed", "decode")


@dataclass(frozen=True)
class Kernel:
    """A kernel, the schedule rule that took it, and how often it runs and how many bytes it moves for one token."""

    name: str
    rule: str
    calls: int
    bytes: int


def fallback_share(kernels: Iterable[Kernel]) -> float:
    """Share of a decoded token's bytes that kernels of the fallback rule move; attention's cache is not counted."""
    kernels = list(kernels)
    total = sum(kernel.bytes for kernel in kernels)
    return sum(kernel.bytes for kernel in kernels if kernel.rule == schedules.FALLBACK) / total


def measure(found: dict[str, Any]) -> Any:
    """Pass that enters the bytes that each kernel moves for one token under `bytes`; changes nothing."""

    @tvm.transform.module_pass(opt_level=0, name="edgeq_measure")
    def run(module: Any, _: Any) -> Any:
        found["bytes"] = {
            variable.name_hint: _bytes(function)
            for variable, function in module.functions_items()
            if isinstance(function, tirx.PrimFunc)
        }
        return module

    return run


def count(found: dict[str, Any]) -> Any:
    """Pass that enters how often `embed` and `decode` call each kernel under `calls`; changes nothing."""

    @tvm.transform.module_pass(opt_level=0, name="edgeq_count")
    def run(module: Any, _: Any) -> Any:
        calls: dict[str, int] = {}

        def visit(node: Any) -> None:
            if isinstance(node, relax.Call) and node.args and isinstance(node.args[0], tvm.ir.GlobalVar):
                name = node.args[0].name_hint
                calls[name] = calls.get(name, 0) + 1

        for name in _TOKEN:
            relax.analysis.post_order_visit(module[name], visit)
        found["calls"] = calls
        return module

    return run


def _bytes(function: Any) -> int:
    """Bytes that a kernel reads and writes for one token: each argument once, but no more than its loops reach."""
    loops: list[int] = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.SBlockRealize):
            loops.append(math.prod(_size(each.dom.extent) for each in node.block.iter_vars))

    tirx.stmt_functor.post_order_visit(function.body, visit)
    steps = max(loops, default=0)
    buffers = [each.ty for each in function.params if hasattr(each.ty, "shape")]
    return sum(
        min(math.prod(map(_size, buffer.shape)), steps) * tvm.DataType(str(buffer.dtype)).bits // 8 for buffer in buffers
    )


def _size(extent: Any) -> int:
    """A size as it is for one token of one sequence."""
    return int(extent) if isinstance(extent, tirx.IntImm | int) else 1


def plan(found: dict[str, Any]) -> Any:
    """Pass that enters the bytes of storage that each function allocates under `temporary_bytes`; changes nothing."""

    @tvm.transform.module_pass(opt_level=0, name="edgeq_plan")
    def run(module: Any, _: Any) -> Any:
        found["temporary_bytes"] = {
            variable.name_hint: _storage(function)
            for variable, function in module.functions_items()
            if isinstance(function, relax.Function) and function.attrs and "global_symbol" in function.attrs
        }
        return module

    return run


def _storage(function: Any) -> int:
    total = 0

    def visit(node: Any) -> None:
        nonlocal total
        if isinstance(node, relax.Call) and node.op == tvm.ir.Op.get("relax.memory.alloc_storage"):
            total += math.prod(int(value) for value in node.args[0])

    relax.analysis.post_order_visit(function, visit)
    return total
