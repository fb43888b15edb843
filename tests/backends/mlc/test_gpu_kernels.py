"""The kernels that a GPU gets, with the schedules that it gets, run on the processor and held against NumPy."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Collection, Sequence
from functools import cache
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

import gpu_kernels
from checkpoints import Build, config_of, quiet
from edgeq import recipe, target
from edgeq.backends.base import Job
from edgeq.backends.mlc import packing
from edgeq.checkpoint import Checkpoint
from edgeq.model import read_config
from edgeq.quantize.solve import rounded
from edgeq.size import is_quantized

tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")

Floats = NDArray[Any]
GPUS: dict[str, tuple[Callable[[], gpu_kernels.Device], str]] = {
    "opencl": (gpu_kernels.OpenCL, "orange-pi-5"),
    "webgpu": (gpu_kernels.WebGPU, "web-browser"),
}
"""What plays the GPU, and the target to whose limits schedules keep."""
KINDS = [("opencl", "float32"), ("webgpu", "float32"), ("webgpu", "float16")]
"""PoCL has no float16."""
CLOSE = {"float32": 2e-5, "float16": 5e-3}
"""Largest difference to arithmetic in float64, where the largest value is about 1."""
RECIPE = "w4g32-e8-rtn"
OUTPUTS, INPUTS = 64, 256
ROWS = {"GEMV": ((1, 1), 1), "LowBatchGEMV": (("b", 1), 5), "Matmul": ((1, "n"), 33)}
"""By the rule that should take it: shape of x without its last axis, and how many rows it gets here."""
HEADS = {"2.5": (7, 1, 64, 64), "3": (4, 2, 128, 128), "3.5": (8, 2, 256, 64)}
"""Query heads, key heads, size of a head, and how much of it is rotated: those of small models."""
PAGE, THETA = 16, 1e6
ATTENTION = {
    "fused_rope",
    "tir_kv_cache_transpose_append",
    "batch_prefill_ragged_kv",
    "batch_prefill_paged_kv",
    "batch_decode_paged_kv",
    "tir_attention_merge_state",
}
IDS = [(7 * n + 3) % 256 for n in range(60)]


@dataclasses.dataclass(frozen=True)
class Gpu:
    """A device, and TVM's target for it."""

    device: gpu_kernels.Device
    target: Any


@pytest.fixture(scope="session")
def gpu() -> Callable[[str, str], Gpu]:
    """A device that has a dtype: gpu("webgpu", "float16")."""

    @cache
    def find(kind: str) -> Gpu:
        from edgeq.backends.mlc import devices

        device, name = GPUS[kind]
        return Gpu(device(), devices.tvm_target(target.load(name)).with_host(devices.this_cpu()))

    def having(kind: str, dtype: str) -> Gpu:
        found = find(kind)
        if dtype == "float16" and not found.device.float16:
            pytest.skip(f"this {kind} device has no float16")
        return found

    return having


Find = Callable[[str, str], Gpu]


@pytest.mark.parametrize("bits", [2, 4, 8])
@pytest.mark.parametrize("rule", ROWS)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_a_packed_matrix_times_tokens(gpu: Find, kind: str, dtype: str, rule: str, bits: int) -> None:
    from tvm.relax.frontend.nn import spec

    from edgeq.backends.mlc import schedules
    from edgeq.backends.mlc.layers import Linear, Precision

    found, random = gpu(kind, dtype), np.random.default_rng(0)
    layout = recipe.parse(f"w{bits}g32-e8-rtn").body
    shape, rows = ROWS[rule]
    with found.target:
        linear = Linear(
            Precision(layout, layout, dtype, dtype, "float32"), "model.layers.0.mlp.down_proj.weight", INPUTS, OUTPUTS
        )
        x = spec.Tensor([*shape, INPUTS], dtype)
        module, _ = linear.export_tvm({"forward": {"x": x, "$": {"param_mode": "plain", "effect_mode": "none"}}})
        taken: dict[str, str] = {}
        module = schedules.apply(found.target, taken)(module)
    ((name, by),) = taken.items()
    assert by == rule
    codes = random.integers(0, 1 << bits, (OUTPUTS, INPUTS), np.uint8)
    scales = (random.standard_normal((OUTPUTS, INPUTS // 32)) / (1 << bits)).astype(dtype)
    given = (random.standard_normal((rows, INPUTS)) / 16).astype(dtype)
    batched = (rows, 1) if shape[0] == "b" else (1, rows)
    out = np.zeros((*batched, OUTPUTS), dtype)
    call = gpu_kernels.functions(only(module, {name}), found.target, found.device)
    call(name, given.reshape(*batched, INPUTS), packing.words(codes, bits), scales, out)
    weights = (codes - np.float64(packing.middle(bits))) * np.repeat(scales.astype(np.float64), 32, axis=1)
    np.testing.assert_allclose(out.reshape(rows, OUTPUTS), given @ weights.T, rtol=0, atol=CLOSE[dtype])


@pytest.mark.parametrize("kind", GPUS)
def test_the_delta_rule(gpu: Find, kind: str) -> None:
    from edgeq.backends.mlc import delta

    found, random = gpu(kind, "float32"), np.random.default_rng(0)
    batch, n, key_heads, value_heads, key_size, value_size = 2, 9, 2, 4, 64, 32
    with found.target:
        module = tvm.IRModule({"delta_rule": delta.kernel(key_heads, value_heads, key_size, value_size)})
    q, k = (random.standard_normal((batch, n, key_heads, key_size), np.float32) / np.float32(8) for _ in range(2))
    v = random.standard_normal((batch, n, value_heads, value_size), np.float32)
    decay, beta = (random.random((batch, n, value_heads), np.float32) for _ in range(2))
    state = random.standard_normal((batch, value_heads, key_size, value_size), np.float32)
    memory, wanted = state.astype(np.float64), np.zeros(v.shape)
    for t in range(n):
        key, query = (np.repeat(each[:, t], value_heads // key_heads, axis=1)[..., None] for each in (k, q))
        memory *= decay[:, t, :, None, None]
        memory += key * ((v[:, t] - (memory * key).sum(axis=2)) * beta[:, t, :, None])[:, :, None]
        wanted[:, t] = (memory * query).sum(axis=2)
    out = np.zeros_like(v)
    call = gpu_kernels.functions(module, found.target, found.device)
    call("delta_rule", q, k, v, decay, beta, state, out)
    np.testing.assert_allclose(out, wanted, rtol=0, atol=2e-5)
    np.testing.assert_allclose(state, memory, rtol=0, atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("generation", HEADS)
@pytest.mark.parametrize(("kind", "dtype"), KINDS)
def test_attention_over_chunks_and_decoded_tokens(gpu: Find, kind: str, dtype: str, generation: str) -> None:
    """The second chunk sees cached pages and a second sequence begins beside it, both decode, then go on by chunks."""
    attention = PagedAttention(gpu(kind, dtype), dtype, *HEADS[generation])
    random = np.random.default_rng(0)
    for lengths in ([21], [18, 5], [1, 1], [3, 2]):
        parts = [random.standard_normal((n, attention.all_heads, attention.size)).astype(dtype) for n in lengths]
        for output, wanted in zip(attention.step(parts), attention.wanted(parts), strict=True):
            np.testing.assert_allclose(output, wanted, rtol=0, atol=CLOSE[dtype], err_msg=f"lengths {lengths}")


class PagedAttention:
    """Attention of one layer as TVM's runtime puts it together from kernels, and the same in float64 without pages.

    Sequences keep their places; new ones come last. Pages are taken in no order, and what was not written is NaN.
    """

    def __init__(self, gpu: Gpu, dtype: str, heads: int, kv_heads: int, size: int, rotated: int) -> None:
        self.heads, self.kv_heads, self.size, self.rotated = heads, kv_heads, size, rotated
        self.all_heads = heads + 2 * kv_heads
        self._call = gpu_kernels.functions(self._kernels(gpu.target, dtype), gpu.target, gpu.device)
        self._free = list(np.random.default_rng(1).permutation(12))
        self._pages = np.full((len(self._free), 2, kv_heads, PAGE, size), np.nan, dtype)
        self._tables: list[list[int]] = []
        self._seen: list[Floats] = []
        self._lengths: list[int] = []

    def step(self, parts: Sequence[Floats]) -> list[Floats]:
        """Outputs [n, heads, size] for the next queries, keys and values [n, all heads, size] of each sequence."""
        for _ in parts[len(self._lengths) :]:
            self._tables.append([])
            self._lengths.append(0)
        qkv = np.concatenate(parts)
        counts = [len(part) for part in parts]
        positions = ints(*(length + i for length, n in zip(self._lengths, counts, strict=True) for i in range(n)))
        q, k, v = (
            np.zeros((len(qkv), each, self.size), qkv.dtype) for each in (self.heads, self.kv_heads, self.kv_heads)
        )
        self._call("fused_rope", qkv, positions, q, k, v, 1)
        out, sums = np.zeros_like(q), np.zeros(q.shape[:2], np.float32)
        bounds, none, scales = ints(0, *accumulate(counts)), np.zeros(len(parts), np.int32), (0, 1.0, THETA)
        scaled = (*scales, self.size**-0.5)
        if max(counts) == 1:
            self._append(k, v, counts)
            self._call("batch_decode_paged_kv", q, *self._table(), none, positions, out, sums, *scaled)
        else:
            own = (q, bounds, k, v, bounds, positions, none, out, sums)
            self._call("batch_prefill_ragged_kv", *own, 1, *scaled)
            if any(self._lengths):
                other, others = np.zeros_like(out), np.zeros_like(sums)
                cached = (q, bounds, *self._table(), none, positions, other, others)
                self._call("batch_prefill_paged_kv", *cached, 0, *scaled)
                self._call("tir_attention_merge_state", out, sums, other, others)
            self._append(k, v, counts)
        return np.split(out, bounds[1:-1])

    def wanted(self, parts: Sequence[Floats]) -> list[Floats]:
        """The same by the definition of attention; call it after `step`, with the same."""
        found = []
        for at, part in enumerate(parts):
            before = self._seen[at] if at < len(self._seen) else part[:0]
            self._seen[at:] = [np.concatenate([before, part]), *self._seen[at + 1 :]]
            q, k, v = np.split(self._seen[at].astype(np.float64), [self.heads, self.heads + self.kv_heads], axis=1)
            q, k = self._rotate(q)[len(before) :], self._rotate(k)
            k, v = (np.repeat(each, self.heads // self.kv_heads, axis=1) for each in (k, v))
            scores = np.einsum("qhd,khd->hqk", q, k) * self.size**-0.5
            scores[:, np.triu(np.ones(scores.shape[1:], bool), 1 + len(before))] = -np.inf
            weights = np.exp(scores - scores.max(axis=-1, keepdims=True))
            found.append(np.einsum("hqk,khd->qhd", weights / weights.sum(axis=-1, keepdims=True), v))
        return found

    def _kernels(self, gpu: Any, dtype: str) -> Any:
        """What the decoder of a model with these heads gives its cache, scheduled."""
        from edgeq.backends.mlc import schedules
        from edgeq.backends.mlc.layers import Precision
        from edgeq.backends.mlc.models import qwen3

        rope = {"rope_theta": THETA, "partial_rotary_factor": self.rotated / self.size}
        shape: dict[str, Any] = {"heads": self.heads, "kv_heads": self.kv_heads, "head_dim": self.size, "rope": rope}
        model = dataclasses.replace(read_config(config_of("3")), **shape)
        named, create = recipe.parse(RECIPE), "create_tir_paged_kv_cache"
        with gpu:
            decoder = qwen3.decoder(model, Precision(named.body, named.table, dtype, dtype, "float32"), gpu)
            module, _ = decoder.export_tvm({create: decoder.functions()[create]})
            return schedules.apply(gpu, {})(only(module, ATTENTION))

    def _append(self, k: Floats, v: Floats, counts: Sequence[int]) -> None:
        """Put keys and values of the next tokens into pages."""
        slots = []
        for at, n in enumerate(counts):
            for position in range(self._lengths[at], self._lengths[at] + n):
                if position % PAGE == 0:
                    self._tables[at].append(int(self._free.pop()))
                slots.append(self._tables[at][-1] * PAGE + position % PAGE)
            self._lengths[at] += n
        self._call("tir_kv_cache_transpose_append", self._pages, k, v, ints(*slots))

    def _table(self) -> tuple[Floats, ...]:
        """Pages, where each sequence's begin in the list of page numbers, that list, tokens in each last page."""
        begins = ints(0, *accumulate(map(len, self._tables)))
        last = ints(*((length - 1) % PAGE + 1 if length else 0 for length in self._lengths))
        return self._pages, begins, ints(*(page for table in self._tables for page in table)), last

    def _rotate(self, x: Floats) -> Floats:
        """x [n, heads, size] from position 0 on. (Su et al. 2021, in halves as in GPT-NeoX)"""
        half = self.rotated // 2
        angles = np.arange(len(x))[:, None] * THETA ** (-np.arange(half) / half)
        cos, sin = np.cos(angles)[:, None], np.sin(angles)[:, None]
        first, second, rest = np.split(x, [half, self.rotated], axis=2)
        return np.concatenate([first * cos - second * sin, second * cos + first * sin, rest], axis=2)


@pytest.mark.slow
@pytest.mark.parametrize("generation", HEADS)
@pytest.mark.parametrize("kind", GPUS)
def test_a_whole_model(gpu: Find, tiny: Build, tmp_path: Path, kind: str, generation: str) -> None:
    """Logits of a prompt in two chunks are those of transformers, and decoded tokens its likeliest."""
    from edgeq.backends.mlc import compiler, weights
    from edgeq.backends.mlc.session import MlcSession

    found, checkpoint, named = gpu(kind, "float32"), Checkpoint.open(tiny(generation)), recipe.parse(RECIPE)
    with gpu_kernels.running_on(found.device):
        how = compiler.precision(named, "bfloat16")
        made = compiler.compile_model(checkpoint.model, how, found.target, context=256)
    weights.write(Job(checkpoint, named, target.load("x86-avx2"), 256, quiet), made.parameters, tmp_path)
    bundle: Any = SimpleNamespace(context=256, config=json.loads((checkpoint.folder / "config.json").read_text()))
    session = MlcSession(made.executable, tvm.cpu(), tmp_path, bundle)
    assert compiler.VERIFY_CHUNK < len(IDS) < 2 * compiler.VERIFY_CHUNK
    np.testing.assert_allclose(session.logits(IDS), reference(checkpoint, IDS), rtol=0, atol=5e-5)
    tokens = list(session.generate(IDS[:40], 6))
    likely = reference(checkpoint, IDS[:40] + tokens)[39:-1]
    np.testing.assert_allclose(likely[np.arange(6), tokens], likely.max(axis=1), atol=1e-4)


def reference(checkpoint: Checkpoint, ids: Sequence[int]) -> Floats:
    """Logits of transformers over the values that the recipe's weights stand for."""
    import torch

    from edgeq import transformer

    with torch.inference_mode():
        model = transformer.instantiate(checkpoint, lambda _: True)
        for name, parameter in model.named_parameters():
            if is_quantized(name):
                parameter.copy_(torch.from_numpy(rounded(checkpoint, recipe.parse(RECIPE), name)))
        found: Floats = model(input_ids=torch.tensor([list(ids)])).logits[0].numpy()
    return found


def only(module: Any, names: Collection[str]) -> Any:
    """The functions of these names."""
    return tvm.IRModule({symbol: each for symbol, each in module.functions_items() if symbol.name_hint in names})


def ints(*values: int) -> NDArray[np.int32]:
    """Values as TVM's indices."""
    return np.array(values, np.int32)
