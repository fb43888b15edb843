"""Vectors in kernels: what TIR spells long, the dot products of bytes that processors have, and the exponential.

A tile has 16 rows, one to a lane; a processor with shorter vectors takes it in halves or quarters.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import tvm
from tvm import tirx
from tvm.ir import register_intrin_lowering
from tvm.script import tirx as T
from tvm.target import codegen
from tvm.tirx import Ramp

LANES = 16
Pairs = Sequence[tuple[Any, Any]]


@dataclass(frozen=True)
class Dot:
    """Integer sums of products of codes and activations.

    lanes: of a vector; tokens: of a prompt that are worked on at once, as many as leave registers; features: what LLVM
    calls what it needs; add: int32 lanes plus four products for each of 8 pairs, a vector of words of four unsigned
    codes and a word of four signed activations; bits: the widest codes that it takes at once.
    """

    lanes: int
    tokens: int
    features: tuple[str, ...]
    add: Callable[[Any, Pairs], Any]
    bits: int = 8


def dot(target: Any) -> Dot:
    """The fastest that a processor has."""
    with target:
        return next(each for each in DOTS if all(map(codegen.target_has_features, each.features)))


def at(start: Any, lanes: int = LANES) -> Any:
    """Index of neighbours."""
    return start if lanes == 1 else Ramp(start, 1, lanes)


def spread(value: Any, lanes: int = LANES) -> Any:
    """A vector with one number in all lanes."""
    return value if lanes == 1 else T.Broadcast(value, lanes)


def kind(dtype: str, lanes: int = LANES) -> str:
    """TVM's name of a vector's type."""
    return dtype if lanes == 1 else f"{dtype}x{lanes}"


def is_one(n: Any) -> bool:
    """Whether an axis of tokens is decoding's, of the only size that is known when kernels are compiled."""
    return isinstance(n, tirx.IntImm | int)


def tokens(*, one: bool) -> tuple[Any, Any]:
    """Size of the axis of tokens in a kernel, and the loop over them: threads are not worth waking for one."""
    return (1, T.serial) if one else (tirx.Var("count", "int64"), T.parallel)


def call(name: str, dtype: str, *arguments: Any) -> Any:
    """Call of one of LLVM's own functions, without side effects."""
    return T.call_llvm_pure_intrin(dtype, T.uint32(codegen.llvm_lookup_intrinsic_id(name)), *arguments)


def prefetch(buffer: Any, *index: Any) -> None:
    """Have a line of a cache fetched for later; it may lie beyond the buffer."""
    name = T.uint32(codegen.llvm_lookup_intrinsic_id("llvm.prefetch.p0"))
    to_read, near, data = T.int32(0), T.int32(3), T.int32(1)
    T.evaluate(T.call_llvm_intrin("void", name, T.address_of(buffer[index]), to_read, near, data))


def exponential(x: Any, lanes: int = LANES) -> Any:
    """exp of float32 lanes; 0 below -87.7, infinite above 88.3, NaN of NaN and infinities.

    Argument reduction and polynomial of Cephes' expf (Moshier 1989), within 2 units in the last place.
    """

    def number(value: float) -> Any:
        return spread(T.float32(value), lanes)

    floats = kind("float32", lanes)
    held = T.max(T.min(x, number(89.0)), number(-88.0))
    power = call("llvm.nearbyint", floats, held * number(1.44269504088896341))
    rest = held - power * number(0.693359375) - power * number(-2.12194440e-4)
    value = number(1.9875691500e-4)
    for each in (1.3981999507e-3, 8.3334519073e-3, 4.1665795894e-2, 1.6666665459e-1, 5.0000001201e-1):
        value = value * rest + number(each)
    value = value * rest * rest + rest + number(1.0)
    exponent = (T.Cast(kind("int32", lanes), power) + spread(T.int32(127), lanes)) << spread(T.int32(23), lanes)
    same = T.reinterpret(floats, T.reinterpret(kind("int32", lanes), x))  # TVM takes x - x for 0, which NaN's is not
    return value * T.reinterpret(floats, exponent) + (same - x)


def _lowered(expression: Any) -> Any:
    """exp in a kernel for a processor; TVM's own calls the C library for each number."""
    (x,) = expression.args
    dtype = tvm.DataType(str(x.ty.dtype))
    if dtype.bits > 32:
        return call("llvm.exp", str(dtype), x)
    return T.Cast(str(dtype), exponential(T.Cast(kind("float32", dtype.lanes), x), dtype.lanes))


register_intrin_lowering("tirx.exp", target="llvm", f=_lowered, level=99)


def _bytes(word: Any, lanes: int) -> Any:
    return T.reinterpret(f"int8x{4 * lanes}", word)


def _one_by_one(add: Callable[[Any, Any, Any], Any]) -> Callable[[Any, Pairs], Any]:
    return lambda acc, pairs: functools.reduce(lambda sums, pair: add(sums, *pair), pairs, acc)


def _vnni(lanes: int) -> Callable[[Any, Any, Any], Any]:
    name = f"llvm.x86.avx512.vpdpbusd.{32 * lanes}"

    def add(acc: Any, codes: Any, x: Any) -> Any:
        return call(name, f"int32x{lanes}", acc, _bytes(codes, lanes), _bytes(spread(x, lanes), lanes))

    return add


def _avx2(acc: Any, pairs: Pairs) -> Any:
    """Sums in 16 bits first, which hold 8 times 2 * 15 * 127."""
    products = [
        call("llvm.x86.avx2.pmadd.ub.sw", "int16x16", _bytes(codes, 8), _bytes(spread(x, 8), 8)) for codes, x in pairs
    ]
    sums = functools.reduce(lambda one, other: one + other, products)
    return acc + call("llvm.x86.avx2.pmadd.wd", "int32x8", sums, spread(T.int16(1), 16))


def _dotprod(acc: Any, codes: Any, x: Any) -> Any:
    """Both signed, so codes to 127."""
    return call("llvm.aarch64.neon.sdot", "int32x4", acc, _bytes(codes, 4), _bytes(spread(x, 4), 4))


def _plain(acc: Any, codes: Any, x: Any) -> Any:
    words = T.reinterpret("int32x4", codes)
    for byte in range(4):
        code = words >> spread(T.int32(8 * byte), 4) & spread(T.int32(255), 4)
        acc = acc + code * spread(x << T.int32(24 - 8 * byte) >> T.int32(24), 4)
    return acc


DOTS = (
    Dot(16, 8, ("avx512vnni",), _one_by_one(_vnni(16))),
    Dot(8, 4, ("avxvnni",), _one_by_one(_vnni(8))),
    Dot(8, 4, ("avx2",), _avx2, bits=4),
    Dot(4, 4, ("dotprod",), _one_by_one(_dotprod), bits=4),
    Dot(4, 4, (), _one_by_one(_plain)),
)
