"""What a compiled module will do, read from its code: kernels of a decoded token, bytes they move, temporary memory."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import msgspec
import tvm
from tvm import relax, tirx

from edgeq import data
from edgeq.backends.mlc import schedules
from edgeq.errors import CorruptInput

FILE = "compiled.json"
BUILT_IN = "edgeq"
_TOKEN = ("embed", "decode")
_STORAGE = "relax.memory.alloc_storage"
_CREATE_CACHE = "create_tir_paged_kv_cache"
_CACHE = "vm.builtin.paged_attention_kv_cache_create"
_LAYERS, _KEY_VALUES, _SIZES, _LIKE = 1, 3, (4, 5), 12
"""Its arguments: bounds of layers, heads of keys and values, sizes of keys and values, a value of the dtype."""


class Kernel(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A kernel, the schedule rule that took it (`its own` for one that came with its schedule), and for one token how
    often it runs and how many bytes it moves.
    """

    name: str
    rule: str
    calls: int
    bytes: int


class Report(msgspec.Struct, frozen=True, forbid_unknown_fields=True, kw_only=True):
    """What was compiled: by whom, the instruction sets of host code, types, kernels.

    dtype: of activations; floats: of matrices where a recipe quantizes none; tiles: matrices are stored as processors
    read them.
    """

    compiler: str
    isa: tuple[str, ...]
    dtype: str
    floats: str
    kernels: tuple[Kernel, ...]
    tiles: bool = False


def write(report: Report, folder: Path) -> None:
    """Write a report into a bundle's folder."""
    (folder / FILE).write_bytes(data.to_json(report))


def read(folder: Path) -> Report:
    """Report that `write` wrote; raises CorruptInput when it is missing or damaged."""
    if not (folder / FILE).is_file():
        raise CorruptInput(f"{folder / FILE}: missing", run="edgeq build ... again")
    return data.read_json(folder / FILE, Report)


def fallback_share(kernels: Iterable[Kernel]) -> float:
    """Share of a decoded token's bytes that kernels of the fallback rule move; attention's cache is not counted."""
    kernels = list(kernels)
    total = sum(kernel.bytes for kernel in kernels)
    return sum(kernel.bytes for kernel in kernels if kernel.rule == schedules.FALLBACK) / total


def measure(found: dict[str, Any]) -> Any:
    """Pass that enters the bytes that each kernel moves for one token under `bytes`."""

    def look(module: Any) -> None:
        found["bytes"] = {
            str(variable.name_hint): _bytes(function)
            for variable, function in module.functions_items()
            if isinstance(function, tirx.PrimFunc)
        }

    return _looking("measure", look)


def count(found: dict[str, Any]) -> Any:
    """Pass that enters how often `embed` and `decode` call each kernel under `calls`."""

    def look(module: Any) -> None:
        calls = found["calls"] = {}

        def visit(node: Any) -> None:
            if isinstance(node, relax.Call) and node.args and isinstance(node.args[0], tvm.ir.GlobalVar):
                name = str(node.args[0].name_hint)
                calls[name] = calls.get(name, 0) + 1

        for name in _TOKEN:
            relax.analysis.post_order_visit(module[name], visit)

    return _looking("count", look)


def plan(found: dict[str, Any]) -> Any:
    """Pass that enters what memory each function and a token of the cache take.

    Entered are bytes of storage by function as `temporary_bytes`, and `kv_cache_bytes_per_token`.
    """

    def look(module: Any) -> None:
        found["temporary_bytes"] = {
            str(variable.name_hint): sum(
                math.prod(int(size) for size in call.args[0]) for call in _calls(function, _STORAGE)
            )
            for variable, function in module.functions_items()
            if isinstance(function, relax.Function)
        }
        if _CREATE_CACHE not in found["temporary_bytes"]:  # a processor's cache is tensors that it is given
            return
        (cache,) = _calls(module[_CREATE_CACHE], _CACHE)
        layers, heads, *sizes = (cache.args[index] for index in (_LAYERS, _KEY_VALUES, *_SIZES))
        values = int(list(layers)[-1]) * int(heads.value) * sum(int(size.value) for size in sizes)
        found["kv_cache_bytes_per_token"] = values * tvm.DataType(str(cache.args[_LIKE].ty.dtype)).bits // 8

    return _looking("plan", look)


def _looking(name: str, look: Callable[[Any], None]) -> Any:
    """Pass that looks at a module and changes nothing."""

    @tvm.transform.module_pass(opt_level=0, name=f"edgeq_{name}")
    def run(module: Any, _: Any) -> Any:
        look(module)
        return module

    return run


def _bytes(function: Any) -> int:
    """Bytes that a kernel reads and writes for one token: each argument once, but no more than its loops reach.

    A kernel that came with its schedule has loops inside loops, and reaches all of its arguments.
    """
    loops: list[int] = []

    def visit(node: Any) -> None:
        if isinstance(node, tirx.SBlockRealize):
            loops.append(math.prod(_size(each.dom.extent) for each in node.block.iter_vars))

    tirx.stmt_functor.post_order_visit(function.body, visit)
    own = function.attrs.get(schedules.SCHEDULED, 0)
    steps = sys.maxsize if own else max(loops, default=0)
    buffers = [each.ty for each in function.params if hasattr(each.ty, "shape")]
    reached = ((min(math.prod(map(_size, each.shape)), steps), tvm.DataType(str(each.dtype)).bits) for each in buffers)
    return sum(count * bits // 8 for count, bits in reached)


def _size(extent: Any) -> int:
    """A size as it is for one token of one sequence."""
    return int(extent) if isinstance(extent, tirx.IntImm | int) else 1


def _calls(function: Any, name: str) -> list[Any]:
    """Calls of an operator or a function of the runtime."""
    calls: list[Any] = []

    def visit(node: Any) -> None:
        if isinstance(node, relax.Call):
            called = getattr(node.op, "name", None) or getattr(node.op, "global_symbol", None)
            calls.extend([node] if called == name else [])

    relax.analysis.post_order_visit(function, visit)
    return calls
