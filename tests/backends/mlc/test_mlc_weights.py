from __future__ import annotations

from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import pytest
from numpy.typing import NDArray

from checkpoints import Build, quiet
from edgeq import recipe
from edgeq.backends.base import Job
from edgeq.backends.mlc import tensor_cache, weights
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault
from edgeq.quantize.solve import rounded
from edgeq.target import Target

Parameters = dict[str, tuple[tuple[int, ...], str]]
Floats = NDArray[np.float32]
HEADS, HEAD = 4, 32

NORMS = {"input_layernorm.weight": (64,), "post_attention_layernorm.weight": (64,)}
MLP = {"mlp.gate_up_proj": (256, 64), "mlp.down_proj": (64, 128)}
HEAD_NORMS = {"self_attn.q_norm.weight": (32,), "self_attn.k_norm.weight": (32,)}
QWEN2 = {"self_attn.qkv_proj": (128, 64), "self_attn.qkv_proj.bias": (128,), "self_attn.o_proj": (64, 64)}
QWEN3 = {"self_attn.qkv_proj": (256, 64), "self_attn.o_proj": (64, 128), **HEAD_NORMS}
GATED = {**QWEN3, "self_attn.q_gate_proj": (128, 64)}
DELTA_NET = {
    "linear_attn.in_proj_qkv": (256, 64),
    "linear_attn.in_proj_z": (128, 64),
    "linear_attn.in_proj_ba.weight": (8, 64),
    "linear_attn.conv1d.weight": (256, 4),
    "linear_attn.A_log": (4,),
    "linear_attn.dt_bias": (4,),
    "linear_attn.norm.weight": (32,),
    "linear_attn.out_proj": (64, 128),
}
LAYERS: dict[str, list[dict[str, tuple[int, ...]]]] = {
    "2.5": [QWEN2] * 2,
    "3": [QWEN3] * 2,
    "3.5": [DELTA_NET] * 3 + [GATED],
}
"""Parameters of each layer beside norms and feed-forward; those that end with `_proj`, `_qkv` or `_z` are quantized."""
VARIANTS: list[tuple[str, dict[str, Any]]] = [
    ("2.5", {"tied": False}),
    ("3", {"shards": 3}),
    ("3", {"tied": False}),
    ("3.5", {"tied": False}),
    ("3.5", {"multimodal": True, "shards": 2}),
]
JOINED = {
    "qkv_proj": ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"),
    "gate_up_proj": ("mlp.gate_proj", "mlp.up_proj"),
    "in_proj_ba": ("linear_attn.in_proj_b", "linear_attn.in_proj_a"),
}


def listed(generation: str, name: str, tied: bool, *, tiles: bool = False) -> Parameters:
    """Every parameter that a library of a tiny checkpoint has, spelled out from the table above, in tiles or rows."""
    wanted = recipe.parse(name)
    dtype = "float16" if wanted.kv_bits == 16 else "float32"
    shapes: dict[str, tuple[int, ...]] = {"model.embed_tokens": (288, 64), "model.norm.weight": (64,)}
    for index, layer in enumerate(LAYERS[generation]):
        shapes |= {f"model.layers.{index}.{each}": shape for each, shape in {**layer, **NORMS, **MLP}.items()}
    if not tied:
        shapes["lm_head"] = (288, 64)
    found: Parameters = {}
    for stem, shape in shapes.items():
        layout = wanted.table if stem in ("model.embed_tokens", "lm_head") else wanted.body
        if not stem.endswith(("_proj", "_qkv", "_z", "embed_tokens", "lm_head")):
            found[stem] = shape, dtype if stem.endswith(".bias") and not tiles else "float32"
        elif layout.is_float:
            halved = layout.name in ("bf16", "w16")
            stored = {"f32": "float32", "f16": "float16"}.get(layout.name, "uint32")
            found[f"{stem}.weight"] = (shape[0], shape[1] // 2) if halved else shape, stored
        elif tiles:
            found[f"{stem}.q_weight"] = (shape[0] // 16, shape[1] // 32, layout.bits, 16), "uint32"
            found[f"{stem}.q_scale"] = (shape[0] // 16, shape[1] // layout.group, 16), dtype
        else:
            found[f"{stem}.q_weight"] = (shape[0], shape[1] * layout.bits // 32), "uint32"
            found[f"{stem}.q_scale"] = (shape[0], shape[1] // layout.group), dtype
    return found


def expected(checkpoint: Checkpoint, name: str, stem: str) -> Floats:
    """Values that a parameter stands for, put together from the checkpoint's tensors by hand."""
    tensors = checkpoint.model.tensors()
    if stem not in tensors:
        stem = stem.removesuffix(".weight")
    before, _, last = stem.rpartition(".")
    layer = ".".join(stem.split(".")[:3])

    def one(tensor: str) -> Floats:
        if tensor.endswith(("_proj.weight", "_qkv.weight", "_z.weight", "embed_tokens.weight", "lm_head.weight")):
            return rounded(checkpoint, recipe.parse(name), tensor)
        return checkpoint.tensor(tensor)

    if last == "bias":
        return np.concatenate([one(f"{layer}.self_attn.{part}_proj.bias") for part in "qkv"])
    if last == "q_gate_proj":
        both = one(f"{before}.q_proj.weight")
        return np.concatenate([both[2 * HEAD * head + HEAD : 2 * HEAD * (head + 1)] for head in range(HEADS)])
    if last in JOINED:
        parts = [one(f"{layer}.{part}.weight") for part in JOINED[last]]
        if last == "qkv_proj" and checkpoint.model.generation == "3.5":
            parts[0] = np.concatenate([parts[0][2 * HEAD * h : 2 * HEAD * h + HEAD] for h in range(HEADS)])
        return np.concatenate(parts)
    values = one(next(each for each in (stem, f"{stem}.weight") if each in tensors))
    if stem.endswith("conv1d.weight"):
        return values[:, 0]
    around_zero = checkpoint.model.generation == "3.5" and stem.endswith("norm.weight") and "linear_attn" not in stem
    return values + np.float32(1) if around_zero else values


def from_tiles(words: NDArray[np.uint32], scales: Floats) -> Floats:
    """What words and scales in tiles stand for, in groups of 32."""
    tiles, blocks, bits, rows = words.shape
    found = np.empty((tiles * rows, blocks * 32), np.float32)
    for column in range(found.shape[1]):
        part, rest = divmod(column % 32, 4 * bits)
        shift = np.uint32(8 * (rest % 4) + bits * part)
        codes = words[:, column // 32, rest // 4] >> shift & np.uint32((1 << bits) - 1)
        found[:, column] = ((codes.astype(np.float32) - (2 ** (bits - 1) - 1)) * scales[:, column // 32]).ravel()
    return found


def stored(folder: Path, stem: str) -> Floats:
    """Values of a parameter in a tensor cache, as float32."""
    held = tensor_cache.records(folder)
    if f"{stem}.q_weight" in held:
        words = tensor_cache.read(folder, held[f"{stem}.q_weight"])
        scales = tensor_cache.read(folder, held[f"{stem}.q_scale"]).astype(np.float32)
        if words.ndim == 4:
            return from_tiles(words, scales)
        bits = words.shape[1] // scales.shape[1]  # in groups of 32
        codes = (words[:, :, None] >> np.arange(0, 32, bits, dtype=np.uint32) & (2**bits - 1)).reshape(len(words), -1)
        found: NDArray[np.float32] = (codes.astype(np.float32) - (2 ** (bits - 1) - 1)) * np.repeat(scales, 32, axis=1)
        return found
    values = tensor_cache.read(folder, held[stem if stem in held else f"{stem}.weight"])
    if values.dtype == np.uint32:
        values = values.view(ml_dtypes.bfloat16)
    floats: NDArray[np.float32] = values.astype(np.float32)
    return floats


def write(folder: Path, name: str, here: Target, out: Path, parameters: Parameters) -> Checkpoint:
    checkpoint = Checkpoint.open(folder)
    weights.write(Job(checkpoint, recipe.parse(name), here, 256, quiet), parameters, out)
    return checkpoint


def stems(parameters: Parameters) -> list[str]:
    """Parameters without what a layout adds to the names of matrices."""
    endings = (".q_weight", ".q_scale")
    return list(dict.fromkeys(name.removesuffix(endings[0]).removesuffix(endings[1]) for name in parameters))


@pytest.mark.parametrize("name", ["w4g32-e8-rtn", "w8g32-e4-rtn-kv16", "f32", "w2g32-e16-mse"])
@pytest.mark.parametrize(("generation", "options"), VARIANTS)
@pytest.mark.parametrize("tiles", [False, True])
def test_every_parameter_has_the_checkpoints_values(
    tiny: Build, here: Target, tmp_path: Path, generation: str, options: dict[str, Any], name: str, tiles: bool
) -> None:
    parameters = listed(generation, name, options.get("tied", True), tiles=tiles)
    checkpoint = write(tiny(generation, **options), name, here, tmp_path, parameters)
    held = tensor_cache.records(tmp_path)
    assert {each: (tuple(held[each]["shape"]), held[each]["dtype"]) for each in held} == parameters
    tensor_cache.check(tmp_path)
    for stem in stems(parameters):
        wanted = expected(checkpoint, name, stem)
        if parameters.get(stem, ((), ""))[1] == "float16":
            wanted = wanted.astype(np.float16).astype(np.float32)
        np.testing.assert_array_equal(stored(tmp_path, stem), wanted, err_msg=stem)


@pytest.mark.parametrize(
    ("name", "dtype", "kept"),
    [
        ("f16", "bf16", "float16"),
        ("bf16", "f32", "bfloat16"),
        ("w16", "bf16", "bfloat16"),
        ("w16", "f16", "float16"),
        ("w16", "f32", "bfloat16"),
    ],
)
def test_matrices_of_floats_are_kept_in_their_type(
    tiny: Build, here: Target, tmp_path: Path, name: str, dtype: str, kept: str
) -> None:
    """Bfloat16 lies two to a word, the first in the lower half."""
    parameters = listed("3", kept.replace("bfloat", "bf").replace("float", "f"), tied=False)
    checkpoint = write(tiny("3", tied=False, dtype=dtype), name, here, tmp_path, parameters)
    for stem in stems(parameters):
        np.testing.assert_array_equal(stored(tmp_path, stem), expected(checkpoint, name, stem))
    held = tensor_cache.records(tmp_path)["lm_head.weight"]
    if kept == "bfloat16":
        first = int(tensor_cache.read(tmp_path, held)[0, 0])
        values = rounded(checkpoint, recipe.parse(name), "lm_head.weight")[0, :2].view(np.uint32) >> 16
        assert (first & 0xFFFF, first >> 16) == tuple(values.tolist())


@pytest.mark.parametrize(
    ("generation", "name", "options"),
    [
        ("2.5", "w4g32-e4-rtn", {"tied": False}),
        ("3", "f32", {}),
        ("3", "w4g32-e8-rtn-kv16", {}),
        ("3.5", "w4g32-e4-rtn", {"multimodal": True}),
    ],
)
def test_compiled_libraries_want_these_parameters(
    packed: Build, generation: str, name: str, options: dict[str, Any]
) -> None:
    held = tensor_cache.records(packed(generation, name, **options))
    found = {each: (tuple(held[each]["shape"]), held[each]["dtype"]) for each in held}
    assert found == listed(generation, name, options.get("tied", True), tiles=True)


def test_another_shape_than_the_library_wants_is_a_fault_and_leaves_no_index(
    tiny: Build, here: Target, tmp_path: Path
) -> None:
    parameters = listed("3", "w4g32-e8-rtn", tied=True)
    parameters["model.layers.1.mlp.down_proj.q_scale"] = (64, 2), "float32"
    with pytest.raises(BackendFault, match=r"down_proj\.q_scale has shape \[64, 4\], the library wants \[64, 2\]"):
        write(tiny("3"), "w4g32-e8-rtn", here, tmp_path, parameters)
    assert not (tmp_path / tensor_cache.INDEX).exists()


def test_progress_counts_the_parameters(tiny: Build, here: Target, tmp_path: Path) -> None:
    seen: list[tuple[str, int, int]] = []

    def report(phase: str, done: int, total: int) -> None:
        seen.append((phase, done, total))

    job = Job(Checkpoint.open(tiny("3")), recipe.parse("f32"), here, 256, report)
    weights.write(job, listed("3", "f32", tied=True), tmp_path)
    assert seen == [("weights", done, 18) for done in range(19)]
