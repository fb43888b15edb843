"""GGUF files side by side: that their layouts are one, and how many of their blocks are."""

from __future__ import annotations

import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple, cast

import gguf
import numpy as np
from numpy.typing import NDArray

from edgeq.backends.llamacpp.gguf import MODEL as MODEL
from edgeq.bundle import Bundle


class Matrix(NamedTuple):
    """A quantized matrix in a file: GGML's name of its type and its blocks, uint8 [blocks, bytes of a block]."""

    kind: str
    blocks: NDArray[np.uint8]


class Plain(NamedTuple):
    """Two files of Q4_0 or Q8_0 against the weights: counts, and squared errors of the first and of the second file.

    `nearer` counts those of the codes that differ which stand for a value at least as near to the weight in the first.
    """

    blocks: int
    same_scales: int
    codes: int
    different_codes: int
    nearer: int
    first_error: float
    second_error: float


def described(config: Mapping[str, Any], context: int, recipe: str = "w16") -> Bundle:
    """As much of a bundle as edgeq's session asks for, of a file that is in none."""
    return cast(Bundle, SimpleNamespace(context=context, config=config, recipe=recipe, provider="cpu", target="host"))


@contextmanager
def scratch(folder: Path) -> Iterator[Path]:
    """Folder inside another one, gone afterwards."""
    with tempfile.TemporaryDirectory(dir=folder, prefix="bench_peers-") as name:
        yield Path(name)


def matrices(path: Path) -> dict[str, Matrix]:
    """Quantized matrices of a file by name."""
    found = {}
    for tensor in gguf.GGUFReader(path).tensors:
        _, size = gguf.GGML_QUANT_SIZES[tensor.tensor_type]
        if gguf.GGML_QUANT_SIZES[tensor.tensor_type][0] > 1:
            found[tensor.name] = Matrix(tensor.tensor_type.name, tensor.data.reshape(-1, size))
    return found


def require_one_layout(one: Path, other: Path) -> None:
    """Raise RuntimeError unless two files hold the same tensors in the same types."""
    found = [
        {each.name: (each.tensor_type.name, each.shape.tolist()) for each in gguf.GGUFReader(path).tensors}
        for path in (one, other)
    ]
    if odd := sorted(name for name in found[0].keys() | found[1].keys() if found[0].get(name) != found[1].get(name)):
        raise RuntimeError(f"the files differ: {odd[0]} is {found[0].get(odd[0])} and {found[1].get(odd[0])}")


def same_blocks(one: Path, other: Path, kind: str) -> tuple[int, int]:
    """How many blocks of a type two files of one layout have, and how many of them are the same bytes in both."""
    found, others = matrices(one), matrices(other)
    same = [(each.blocks == others[name].blocks).all(axis=1) for name, each in found.items() if each.kind == kind]
    return sum(map(len, same)), sum(int(each.sum()) for each in same)


def against_weights(one: Path, other: Path, kind: str, weights: Path) -> Plain:
    """Scales, codes and errors of all blocks of Q4_0 or Q8_0, a file of float32 holding the weights."""
    others = matrices(other)
    original = {tensor.name: tensor.data for tensor in gguf.GGUFReader(weights).tensors}
    sums = np.zeros(len(Plain._fields))
    for name, each in matrices(one).items():
        if each.kind != kind:
            continue
        (scales, codes), (other_scales, other_codes) = (_taken_apart(*matrix) for matrix in (each, others[name]))
        wanted = original[name].reshape(codes.shape).astype(np.float64)
        error, other_error = np.abs(wanted - codes * scales), np.abs(wanted - other_codes * other_scales)
        different = codes != other_codes
        sums += [
            len(scales),
            (scales == other_scales).sum(),
            codes.size,
            different.sum(),
            (error <= other_error)[different].sum(),
            np.square(error).sum(),
            np.square(other_error).sum(),
        ]
    return Plain(*(int(each) for each in sums[:5]), *sums[5:].tolist())


def _taken_apart(kind: str, blocks: NDArray[np.uint8]) -> tuple[NDArray[np.float64], NDArray[np.int16]]:
    """Scales [blocks, 1] and codes around zero [blocks, 32]."""
    scales = np.ascontiguousarray(blocks[:, :2]).view("<f2").astype(np.float64)
    stored = blocks[:, 2:]
    if kind == "Q8_0":
        return scales, stored.view(np.int8).astype(np.int16)
    return scales, np.concatenate([stored & 15, stored >> 4], axis=1).astype(np.int16) - 8
