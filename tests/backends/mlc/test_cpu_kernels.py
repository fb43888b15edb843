"""A processor's own kernels against NumPy, with every dot product that this machine can run."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Sequence
from functools import cache
from typing import Any
from unittest import mock

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays
from numpy.typing import NDArray

from edgeq.backends.mlc import packing
from edgeq.machine import this_machine

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

Floats = NDArray[Any]
PROCESSORS: dict[str, tuple[dict[str, Any], set[str], int]] = {
    "avx512-vnni": ({"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]}, {"avx512f", "avx512_vnni"}, 0),
    "avx-vnni": ({"mcpu": "x86-64-v3", "mattr": ["+avxvnni"]}, {"avx2", "avx_vnni"}, 1),
    "avx-vnni by avx512": ({"mcpu": "x86-64-v4", "mattr": ["+avx512vnni"]}, {"avx512f", "avx512_vnni"}, 1),
    "avx2": ({"mcpu": "x86-64-v3"}, {"avx2"}, 2),
    "plain": ({}, set(), 4),
}
"""LLVM's words for a processor, what this machine needs to run its code, and which dot product is tried there."""
QUICK = ("avx512-vnni", "avx2")
INPUTS, OUTPUTS, GROUP = 384, 48, 64
THETA = 1e4


@pytest.fixture(
    params=[pytest.param(each, marks=() if each in QUICK else pytest.mark.slow) for each in PROCESSORS],
)
def processor(request: pytest.FixtureRequest) -> str:
    """Name of a processor whose code this machine runs."""
    _, needs, _ = PROCESSORS[request.param]
    if missing := needs - set(this_machine().isa):
        pytest.skip(f"this processor has no {', '.join(sorted(missing))}")
    name: str = request.param
    return name


@pytest.mark.parametrize("name", [each for each in PROCESSORS if each != "avx-vnni by avx512"])
def test_a_processor_gets_the_fastest_dot_product_that_it_has(name: str) -> None:
    from edgeq.backends.mlc.cpu import lanes

    words, _, index = PROCESSORS[name]
    assert lanes.dot(tvm.target.Target({"kind": "llvm", **words})) is lanes.DOTS[index]
    arm = {"kind": "llvm", "mtriple": "aarch64-linux-gnu"}
    assert lanes.dot(tvm.target.Target(arm | {"mattr": ["+dotprod"]})) is lanes.DOTS[3]
    assert lanes.dot(tvm.target.Target(arm)) is lanes.DOTS[4]


def compiled(
    processor: Any, build: Callable[..., Any], **arguments: tuple[Sequence[int | str], str]
) -> Callable[..., Floats]:
    """Function that a graph of one operator makes; shapes may have symbols."""
    from tvm import relax
    from tvm.relax.frontend import nn

    graph = nn.Module()
    graph.run = build
    words = {name: nn.spec.Tensor(list(shape), dtype) for name, (shape, dtype) in arguments.items()}
    modes = {"$": {"param_mode": "none", "effect_mode": "none"}}
    with processor:
        module, _ = graph.export_tvm({"run": words | modes})
        machine = relax.VirtualMachine(relax.build(module, target=processor), tvm.cpu())

    def run(*values: Any) -> Floats:
        """NumPy's arrays are copied, TVM's tensors are used where they are."""
        held = (
            tvm.runtime.tensor(np.ascontiguousarray(each)) if isinstance(each, np.ndarray) else each for each in values
        )
        found: Floats = machine["run"](*held).numpy()
        return found

    return run


@cache
def product(name: str, bits: int, tokens: int | str, dtype: str) -> Callable[..., Floats]:
    """Product with a matrix in tiles."""
    from edgeq.backends.mlc.cpu import lanes, matrices

    words, _, index = PROCESSORS[name]
    with mock.patch.object(matrices, "dot", return_value=lanes.DOTS[index]):
        return compiled(
            tvm.target.Target({"kind": "llvm", **words}),
            lambda x, words, scales: matrices.matmul(x, words, scales, bits),
            x=([1, tokens, INPUTS], "float32"),
            words=([OUTPUTS // 16, INPUTS // 32, bits, 16], "uint32"),
            scales=([OUTPUTS // 16, INPUTS // GROUP, 16], dtype),
        )


def matrix(bits: int, dtype: str) -> tuple[Floats, Floats, Floats]:
    """Words and scales in tiles with codes of all kinds, and the float64 matrix that they stand for."""
    random = np.random.default_rng(bits)
    codes = random.integers(0, 1 << bits, (OUTPUTS, INPUTS)).astype(np.uint8)
    scales = random.normal(0, 0.02, (OUTPUTS, INPUTS // GROUP)).astype(dtype)
    words = packing.in_tiles(packing.words(codes, bits), (OUTPUTS // 16, INPUTS // 32, bits, 16))
    weights = (codes.astype(np.float64) - packing.middle(bits)).reshape(*scales.shape, -1) * scales[:, :, None]
    return words, packing.in_tiles(scales, (OUTPUTS // 16, INPUTS // GROUP, 16)), weights.reshape(codes.shape)


def rounded(x: Floats) -> Floats:
    """x [n, inputs] in 8 bits, groups of 32."""
    groups = x.reshape(len(x), -1, 32)
    scales = np.abs(groups).max(axis=2, keepdims=True) * np.float32(1 / 127)
    inverse = np.divide(1, scales, out=np.zeros_like(scales), where=scales > 0)
    found: Floats = (np.rint(groups * inverse).astype(np.float64) * scales).reshape(x.shape)
    return found


@settings(max_examples=20, deadline=None)
@given(
    bits=st.sampled_from([2, 4, 8]),
    tiles=st.integers(1, 3),
    blocks=st.integers(1, 4),
    data=st.data(),
)
def test_a_tile_holds_each_code_where_it_is_said_to(bits: int, tiles: int, blocks: int, data: st.DataObject) -> None:
    shape = (16 * tiles, 32 * blocks)
    codes = data.draw(arrays.arrays(np.uint8, shape, elements=st.integers(0, (1 << bits) - 1)))
    words = packing.in_tiles(packing.words(codes, bits), (tiles, blocks, bits, 16))
    for row in range(shape[0]):
        for column in range(shape[1]):
            block, within = divmod(column, 32)
            part, rest = divmod(within, 4 * bits)
            word = int(words[row // 16, block, rest // 4, row % 16])
            assert word >> (8 * (rest % 4) + bits * part) & (1 << bits) - 1 == codes[row, column]
    assert np.array_equal(packing.in_rows(words), packing.words(codes, bits))
    scales = np.arange(3 * shape[0], dtype=np.float32).reshape(-1, 3)
    assert np.array_equal(packing.in_rows(packing.in_tiles(scales, (tiles, 3, 16))), scales)


@pytest.mark.parametrize(("bits", "dtype"), [(2, "float16"), (4, "float32"), (8, "float16")])
@pytest.mark.parametrize("tokens", [1, 21])
def test_products_are_those_of_activations_in_8_bits(processor: str, bits: int, tokens: int, dtype: str) -> None:
    words, scales, weights = matrix(bits, dtype)
    x = np.random.default_rng(tokens).normal(0, 2, (tokens, INPUTS)).astype(np.float32)
    x[0, :32] = 0
    x[-1, 40] = 300
    found = product(processor, bits, 1 if tokens == 1 else "n", dtype)(x[None], words, scales)
    wanted = rounded(x) @ weights.T
    assert np.abs(found[0] - wanted).max() <= 2e-6 * np.abs(wanted).max()


@pytest.mark.parametrize(("bits", "dtype"), [(4, "float32"), (8, "float16")])
@pytest.mark.parametrize("tokens", [1, 21])
def test_sums_of_the_largest_codes_and_activations_fit(processor: str, bits: int, tokens: int, dtype: str) -> None:
    codes = np.full((OUTPUTS, INPUTS), (1 << bits) - 1, np.uint8)
    words = packing.in_tiles(packing.words(codes, bits), (OUTPUTS // 16, INPUTS // 32, bits, 16))
    scales = np.ones((OUTPUTS // 16, INPUTS // GROUP, 16), dtype)
    x = np.full((1, tokens, INPUTS), -1, np.float32)
    found = product(processor, bits, 1 if tokens == 1 else "n", dtype)(x, words, scales)
    np.testing.assert_allclose(found, -INPUTS * ((1 << bits) - 1 - packing.middle(bits)), rtol=1e-5)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("tokens", [1, 9])
def test_what_is_not_finite_stays_so(value: float, tokens: int) -> None:
    words, scales, _ = matrix(4, "float16")
    x = np.ones((1, tokens, INPUTS), np.float32)
    x[0, -1, 77] = value
    found = product("plain", 4, 1 if tokens == 1 else "n", "float16")(x, words, scales)
    assert np.isnan(found[0, -1]).all()
    assert np.isfinite(found[0, :-1]).all()


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_rows_of_a_table_are_taken_exactly(bits: int) -> None:
    from edgeq.backends.mlc.cpu import matrices

    words, scales, weights = matrix(bits, "float16")
    take = compiled(
        tvm.target.Target("llvm"),
        lambda words, scales, ids: matrices.take(words, scales, ids, bits),
        words=(words.shape, "uint32"),
        scales=(scales.shape, "float16"),
        ids=(["n"], "int32"),
    )
    ids = np.array([0, 17, 47, 17], np.int32)
    assert np.array_equal(take(words, scales, ids), weights[ids].astype(np.float32))


@pytest.mark.parametrize(("dtype", "error"), [("float16", 2.0**-11), ("float32", 2.0**-22), ("float64", 2.0**-50)])
def test_the_exponential_is_within_two_units_in_the_last_place(dtype: str, error: float) -> None:
    from tvm import te

    from edgeq.backends.mlc.cpu import lanes

    assert lanes.LANES == 16
    x = te.placeholder((4096,), dtype, name="x")
    module = tvm.IRModule({"main": te.create_prim_func([x, te.compute(x.shape, lambda i: te.exp(x[i]), "y")])})
    library = tvm.compile(module, target=tvm.target.Target("llvm"))
    values = np.linspace(-9, 11, 4096).astype(dtype) if dtype == "float16" else np.linspace(-87, 88, 4096).astype(dtype)
    values[:5] = [np.nan, np.inf, 0, -1e4, 1e4]
    found = tvm.runtime.tensor(np.zeros_like(values))
    library["main"](tvm.runtime.tensor(values), found)
    exact = np.exp(values[5:].astype(np.float64))
    assert np.abs(found.numpy()[5:] / exact - 1).max() <= error
    assert not np.isfinite(found.numpy()[:2]).any()
    assert found.numpy()[2:5].tolist() == [1, 0, np.inf]


def attended(queries: Floats, keys: Floats, values: Floats, past: int) -> Floats:
    """Causal attention in float64: [n, heads, size] over [positions, kv heads, size]."""
    n, heads, size = queries.shape
    found = np.empty((n, heads, size))
    for t in range(n):
        for head in range(heads):
            own = head // (heads // keys.shape[1])
            scores = keys[: past + t + 1, own].astype(np.float64) @ queries[t, head] / math.sqrt(size)
            weights = np.exp(scores - scores.max())
            found[t, head] = weights @ values[: past + t + 1, own] / weights.sum()
    return found


def turned(x: Floats, positions: Floats, rotated: int, theta: float) -> Floats:
    """Rotary embedding of [n, heads, size] in float64, the first `rotated` sizes by halves."""
    angles = positions[:, None] / theta ** (np.arange(0, rotated, 2) / rotated)
    cosine, sine = np.cos(angles)[:, None], np.sin(angles)[:, None]
    first, second = x[..., : rotated // 2], x[..., rotated // 2 : rotated]
    return np.concatenate([first * cosine - second * sine, second * cosine + first * sine, x[..., rotated:]], axis=2)


@cache
def attention(
    name: str, tokens: int | str, heads: int, kv_heads: int, size: int, rotated: int, dtype: str
) -> Callable[..., Floats]:
    """Attention over a cache that the caller holds."""
    from edgeq.backends.mlc.cpu import attention, lanes

    words, _, index = PROCESSORS[name]
    with mock.patch.object(attention, "dot", return_value=lanes.DOTS[index]):
        return compiled(
            tvm.target.Target({"kind": "llvm", **words}),
            lambda qkv, past, keys, values: attention.Cache(
                past, [keys, values], THETA, rotated
            ).attention_with_fused_qkv(0, qkv, heads, size**-0.5),
            qkv=([1, tokens, heads + 2 * kv_heads, size], "float32"),
            past=([1], "int32"),
            keys=([kv_heads, "blocks", size, 16], dtype),
            values=([kv_heads, "blocks", 16, size], dtype),
        )


def in_chunks(qkv: Floats, ends: Sequence[int], *shape: Any, name: str = "plain") -> Floats:
    """Outputs for chunks of a prompt that end there; what lies behind is garbage."""
    _, kv_heads, size, _, dtype = shape
    blocks = -(-len(qkv) // 16)
    keys = tvm.runtime.tensor(np.full((kv_heads, blocks, size, 16), np.nan, dtype))
    values = tvm.runtime.tensor(np.full((kv_heads, blocks, 16, size), np.nan, dtype))
    found = []
    for start, end in itertools.pairwise([0, *ends]):
        run = attention(name, 1 if end - start == 1 else "n", *shape)
        found.append(run(qkv[None, start:end], np.array([start], np.int32), keys, values)[0])
    return np.concatenate(found)


@pytest.mark.parametrize(
    ("heads", "kv_heads", "size", "rotated", "dtype"),
    [
        (7, 1, 64, 64, "float16"),
        (6, 3, 24, 8, "float32"),
        pytest.param(4, 2, 128, 128, "float16", marks=pytest.mark.slow),
        pytest.param(4, 2, 128, 128, "float32", marks=pytest.mark.slow),
        pytest.param(6, 3, 24, 8, "float16", marks=pytest.mark.slow),
    ],
)
def test_attention_over_blocks_is_attention_with_the_same_bits_for_any_chunks(
    processor: str, heads: int, kv_heads: int, size: int, rotated: int, dtype: str
) -> None:
    shape, positions = (heads, kv_heads, size, rotated, dtype), np.arange(157)
    qkv = np.random.default_rng(size).normal(0, 1, (157, heads + 2 * kv_heads, size)).astype(np.float32)
    q = turned(qkv[:, :heads].astype(np.float64), positions, rotated, THETA)
    k = turned(qkv[:, heads : heads + kv_heads].astype(np.float64), positions, rotated, THETA)
    found = in_chunks(qkv, [19, 63, 64, 66, 140, 141, 157], *shape, name=processor)
    error = np.abs(found - attended(q, k, qkv[:, heads + kv_heads :], 0)).max()
    assert error <= (2e-5 if dtype == "float32" else 3e-3)
    alone = in_chunks(qkv, range(1, 158), *shape, name=processor)
    np.testing.assert_array_equal(found, alone)


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("part", [0, 2, 3], ids=["query", "key", "value"])
def test_what_is_not_finite_is_seen_by_the_tokens_that_see_it(part: int, value: float) -> None:
    qkv = np.random.default_rng(part).normal(0, 1, (5, 4, 16)).astype(np.float32)
    qkv[2, part, 3] = value
    spoilt = [False, False, True, False, False] if part == 0 else [False, False, True, True, True]
    for ends in ([5], range(1, 6)):
        found = in_chunks(qkv, ends, 2, 1, 16, 16, "float32")
        assert np.isfinite(found).all((1, 2)).tolist() == [not each for each in spoilt]
