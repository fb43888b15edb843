"""Which schedule each kernel gets: dlight's rules on GPUs, two of our own on CPUs, and a list of who took what."""

from __future__ import annotations

import inspect
import math
from collections.abc import Iterator, Sequence
from typing import Any

import tvm
from tvm import s_tir, tirx
from tvm.s_tir import dlight
from tvm.s_tir.dlight.analysis import normalize_prim_func
from tvm.s_tir.dlight.base import try_inline

from edgeq.errors import BackendFault

# TVM's scripts ask `inspect` who called them, which looks at every module for the frames of the import system itself:
# 20 of the 24 seconds that its tensor intrinsics take to import.
for _name in ("importlib._bootstrap", "importlib._bootstrap_external"):
    inspect.modulesbyfile[f"<frozen {_name}>"] = _name

_FEW = 4  # tokens or sequences that one weight is read for in a low-batch GEMV
_LANES = 16
_SERIAL = 1 << 16  # elements that one thread has computed before others are awake
SCHEDULED = "tirx.is_scheduled"
OWN = "its own"
FALLBACK = "Fallback"


def apply(target: Any, taken: dict[str, str]) -> Any:
    """Pass that schedules every kernel for a target; `taken` gets the rule's name by the kernel's.

    A kernel that came with its schedule (attention, the delta rule) is entered as `its own`.
    """
    rules: list[Any] = [_MatrixOnCpu(), _LoopsOnCpu()]
    if target.kind.name != "llvm":
        gpu = dlight.gpu
        rules = [gpu.Matmul(), gpu.GEMV(), gpu.Reduction(), gpu.GeneralReduction(), gpu.Fallback()]

    @tvm.transform.module_pass(opt_level=0, name="edgeq_schedules")
    def run(module: Any, _: Any) -> Any:
        for variable, function in list(module.functions_items()):
            if not isinstance(function, tirx.PrimFunc):
                continue
            name = str(variable.name_hint)
            if function.attrs.get(SCHEDULED, 0):
                taken[name] = OWN
                continue
            few = [dlight.gpu.LowBatchGEMV(_FEW)] if target.kind.name != "llvm" and _is_few_rows(function) else []
            rule, schedule = next(_tries([*few, *rules], function, target), (None, None))
            if schedule is None:  # loops run as they are written, which only a CPU can do
                if target.kind.name != "llvm":
                    raise BackendFault(f"no schedule rule takes the kernel {name}")
                taken[name] = OWN
                continue
            module[variable] = schedule.mod["main"].with_attr(SCHEDULED, True)
            taken[name] = type(rule).__name__.lstrip("_")
        if target.kind.name != "llvm":
            _hold_to_limit(module, target)
        return module

    return run


def _hold_to_limit(module: Any, target: Any) -> None:
    """Raise BackendFault when a kernel has more threads in a block than the target allows."""
    limit = int(target.attrs.get("max_threads_per_block") or target.attrs["max_num_threads"])
    for variable, function in module.functions_items():
        if isinstance(function, tirx.PrimFunc) and (threads := _threads(function)) > limit:
            raise BackendFault(
                f"kernel {variable.name_hint} has {threads} threads in a block, the target allows {limit}"
            )


def _threads(function: Any) -> int:
    """Threads in a block of a scheduled kernel, where that is known."""
    extents: dict[str, int] = {}

    def visit(node: Any) -> None:
        if isinstance(node, tirx.For) and node.thread_binding is not None and isinstance(node.extent, tirx.IntImm):
            axis = str(node.thread_binding.thread_tag)
            if axis.startswith("threadIdx"):
                extents[axis] = max(extents.get(axis, 1), int(node.extent))

    tirx.stmt_functor.post_order_visit(function.body, visit)
    return math.prod(extents.values())


def _tries(rules: list[Any], function: Any, target: Any) -> Iterator[tuple[Any, Any]]:
    """Rules that take a function, each with its schedule."""
    for rule in rules:
        found = rule.apply(function, target, False)
        if found is not None:
            yield rule, found[0] if isinstance(found, list) else found


def _is_few_rows(function: Any) -> bool:
    """Whether an argument is [b, 1, inputs] with unknown b: a decoding step of several sequences."""
    return any(len(sizes) == 3 and sizes[:2] == [None, 1] for sizes in _shapes(function))


def _has_chunk(function: Any) -> bool:
    """Whether an argument is [1, n, inputs] with unknown n: a chunk of a prompt."""
    return any(len(sizes) == 3 and sizes[:2] == [1, None] for sizes in _shapes(function))


def _shapes(function: Any) -> list[list[int | None]]:
    """Shapes of a kernel's arguments; None for a size that is not known."""
    shapes = [parameter.ty.shape for parameter in function.params if hasattr(parameter.ty, "shape")]
    return [[int(size) if isinstance(size, tirx.IntImm) else None for size in shape] for shape in shapes]


class _LoopsOnCpu(dlight.ScheduleRule):
    """Whatever can be inlined is; the last axis of the rest goes in vectors, the others in parallel."""

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:  # noqa: ARG002
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule)
        if blocks is None:
            return None
        for block in try_inline(schedule, blocks):
            kinds = list(zip(schedule.get_loops(block.block_rv), block.dom_kind(), strict=False))
            outer = [loop for loop, kind in kinds if kind == "S"]
            inner = [loop for loop, kind in kinds if kind != "S"]
            schedule.reorder(*outer, *inner)
            wakes = _is_worth_waking_threads_for(schedule, outer)
            if outer and not inner:
                _vectorize(schedule, outer.pop())
            if outer and wakes:
                schedule.parallel(schedule.fuse(*outer))
        return schedule


def _vectorize(schedule: Any, loop: Any) -> None:
    extent = schedule.get(loop).extent
    lanes = math.gcd(int(extent), _LANES) if isinstance(extent, tirx.IntImm) else 1
    if lanes > 1:
        schedule.vectorize(schedule.split(loop, [None, lanes])[1])


def _is_worth_waking_threads_for(schedule: Any, loops: Sequence[Any]) -> bool:
    """Whether there are many elements, or as many as there are tokens."""
    extents = [schedule.get(loop).extent for loop in loops]
    known = [int(extent) for extent in extents if isinstance(extent, tirx.IntImm)]
    return len(known) < len(extents) or math.prod(known) > _SERIAL


class _MatrixOnCpu(dlight.ScheduleRule):
    """Matrix products: rows of the matrix in parallel, tokens inside, 4 vectors of 8 partial sums along the inputs.

    A packed row is unpacked once for all tokens of a chunk.
    """

    _LANES = 8
    _VECTORS = 4

    def apply(self, func: Any, target: Any, tunable: bool) -> Any:  # noqa: ARG002
        schedule = s_tir.Schedule(func)
        blocks = normalize_prim_func(schedule)
        if blocks is None:
            return None
        unpacked = [block for block in blocks if block.name == "dequantize" and _has_chunk(func)]
        blocks = try_inline(schedule, [block for block in blocks if block not in unpacked])
        sums = [block for block in blocks if block.is_reduction()]
        if len(sums) != 1 or len(blocks) > 2 or sums[0].dom_kind().count("R") != 1:
            return None
        block, width = sums[0].block_rv, self._LANES * self._VECTORS
        kinds = list(zip(schedule.get_loops(block), sums[0].dom_kind(), strict=False))
        *tokens, row = [loop for loop, kind in kinds if kind == "S"] or [None]
        (inner,) = [loop for loop, kind in kinds if kind == "R"]
        extent = schedule.get(inner).extent
        if row is None or not isinstance(extent, tirx.IntImm) or int(extent) % width:
            return None
        outer = len(tokens) + 1
        wakes = _is_worth_waking_threads_for(schedule, [row, *tokens, inner])
        schedule.reorder(row, *tokens, inner)
        partial = schedule.rfactor(schedule.split(inner, [None, width])[1], 0)
        loops = schedule.get_loops(block)
        if wakes:
            schedule.parallel(loops[0])
        schedule.compute_at(partial, loops[outer - 1], preserve_unit_loops=True)
        schedule.set_scope(partial, 0, "local")
        for each in unpacked:
            schedule.compute_at(each.block_rv, loops[0])
            schedule.vectorize(schedule.split(schedule.get_loops(each.block_rv)[-1], [None, self._LANES])[1])
        inside = schedule.get_loops(partial)[outer:]
        lane = max(inside, key=lambda loop: int(schedule.get(loop).extent) == width)
        step = [loop for loop in inside if not schedule.get(loop).same_as(schedule.get(lane))][-1]
        vectors, lanes = schedule.split(lane, [self._VECTORS, self._LANES])
        schedule.reorder(step, vectors, lanes)
        schedule.vectorize(lanes)
        schedule.unroll(vectors)
        schedule.vectorize(schedule.get_loops(schedule.decompose_reduction(partial, step))[-1])
        if len(blocks) == 2:
            schedule.reverse_compute_at(
                blocks[1].block_rv, schedule.get_loops(block)[outer - 1], preserve_unit_loops=True
            )
            if blocks[1].dom_kind().count("S") > sums[0].dom_kind().count("S"):  # a norm's values, for a sum each
                _vectorize(schedule, schedule.get_loops(blocks[1].block_rv)[-1])
        return schedule
