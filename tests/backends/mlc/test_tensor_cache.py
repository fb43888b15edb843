from __future__ import annotations

import hashlib
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from numpy.typing import NDArray

from edgeq.backends.mlc import tensor_cache
from edgeq.errors import CorruptInput

MB = 1 << 20
TENSORS: dict[str, NDArray[Any]] = {
    "words": np.arange(24, dtype=np.uint32).reshape(4, 6) * 0x10203040,
    "norm.weight": np.array([1e-45, -0.0, 1.0000001, -3.4e38, np.pi], np.float32),
    "scales": np.array([[0.5, -6e-8], [65504, 1]], np.float16),
    "alone": np.array([7], np.int32),
}


def written(folder: Path, tensors: dict[str, NDArray[Any]]) -> dict[str, Any]:
    with tensor_cache.Writer(folder) as cache:
        for name, values in tensors.items():
            cache.add(name, values)
    index: dict[str, Any] = json.loads((folder / "tensor-cache.json").read_text())
    return index


def test_the_index_describes_every_tensor_as_it_is(tmp_path: Path) -> None:
    index = written(tmp_path, TENSORS)
    (shard,) = index["records"]
    data = (tmp_path / "params_shard_0.bin").read_bytes()
    assert index["metadata"] == {"ParamSize": 4, "ParamBytes": len(data)}
    assert {key: shard[key] for key in shard if key != "records"} == {
        "dataPath": "params_shard_0.bin",
        "format": "raw-shard",
        "nbytes": len(data),
        "md5sum": hashlib.md5(data, usedforsecurity=False).hexdigest(),
    }
    assert shard["records"] == [
        {"name": "words", "shape": [4, 6], "dtype": "uint32", "format": "raw", "nbytes": 96, "byteOffset": 0},
        {"name": "norm.weight", "shape": [5], "dtype": "float32", "format": "raw", "nbytes": 20, "byteOffset": 96},
        {"name": "scales", "shape": [2, 2], "dtype": "float16", "format": "raw", "nbytes": 8, "byteOffset": 116},
        {"name": "alone", "shape": [1], "dtype": "int32", "format": "raw", "nbytes": 4, "byteOffset": 124},
    ]
    assert data == b"".join(values.tobytes() for values in TENSORS.values())


def test_a_view_is_written_in_its_own_order(tmp_path: Path) -> None:
    values = np.arange(12, dtype=np.float32).reshape(3, 4)
    written(tmp_path, {"turned": values.T, "rows": values[::2]})
    for name, wanted in {"turned": values.T, "rows": values[::2]}.items():
        np.testing.assert_array_equal(tensor_cache.read(tmp_path, tensor_cache.records(tmp_path)[name]), wanted)


def test_shards_are_of_32_mb_unless_one_tensor_is_larger(tmp_path: Path) -> None:
    sizes = {"a": 20, "b": 12, "c": 1, "d": 32, "e": 40, "f": 1, "g": 30}
    index = written(tmp_path, {name: np.full(size * MB, ord(name), np.uint8) for name, size in sizes.items()})
    assert [[each["name"] for each in shard["records"]] for shard in index["records"]] == [
        *(["a", "b"], ["c"], ["d"], ["e"], ["f", "g"])
    ]
    assert all((tmp_path / shard["dataPath"]).stat().st_size == shard["nbytes"] for shard in index["records"])
    held = tensor_cache.records(tmp_path)
    assert {name: (held[name]["dataPath"][-5], held[name]["byteOffset"]) for name in "bg"} == {
        "b": ("0", 20 * MB),
        "g": ("4", MB),
    }
    assert all((tensor_cache.read(tmp_path, held[name]) == ord(name)).all() for name in sizes)
    tensor_cache.check(tmp_path)


def test_tvm_reads_every_tensor_to_the_bit(tmp_path: Path) -> None:
    tvm = pytest.importorskip("tvm", reason="apache-tvm is not installed")
    written(tmp_path, TENSORS)
    load, by_name, clear = (
        tvm.get_global_func(f"vm.builtin.{name}")
        for name in ("tensor_cache.load", "param_array_from_cache_by_name", "tensor_cache.clear")
    )
    load(str(tmp_path), tvm.cpu().dlpack_device_type(), 0)
    found = dict(zip(TENSORS, by_name(list(TENSORS)), strict=True))
    clear()
    for name, values in TENSORS.items():
        got = found[name].numpy()
        assert (got.dtype, got.shape, got.tobytes()) == (values.dtype, values.shape, values.tobytes())


def test_an_error_leaves_no_index(tmp_path: Path) -> None:
    def stop_half_way() -> None:
        with tensor_cache.Writer(tmp_path) as cache:
            cache.add("a", np.zeros(33 * MB, np.uint8))
            cache.add("b", np.zeros(1, np.uint8))
            raise RuntimeError("half way")

    with pytest.raises(RuntimeError, match="half way"):
        stop_half_way()
    assert (tmp_path / "params_shard_0.bin").exists()
    assert not (tmp_path / tensor_cache.INDEX).exists()
    with pytest.raises(CorruptInput, match=tensor_cache.INDEX):
        tensor_cache.records(tmp_path)


@pytest.mark.parametrize("text", ["", "[]", '{"records": 3}', '{"records": [{"records": []}]}', '{"records": [{}]}'])
def test_a_damaged_index_is_corrupt_input(tmp_path: Path, text: str) -> None:
    written(tmp_path, TENSORS)
    (tmp_path / tensor_cache.INDEX).write_text(text)
    with pytest.raises(CorruptInput, match="not the index of a tensor cache"):
        tensor_cache.check(tmp_path)


def test_damaged_and_missing_shards_are_corrupt_input_with_their_names(tmp_path: Path) -> None:
    written(tmp_path, TENSORS)
    tensor_cache.check(tmp_path)
    shard = tmp_path / "params_shard_0.bin"
    sound = shard.read_bytes()
    for damaged in (b"\x01" + sound[1:], sound[:-1], sound + b"\0"):
        shard.write_bytes(damaged)
        with pytest.raises(CorruptInput, match=r"params_shard_0\.bin: damaged, its MD5"):
            tensor_cache.check(tmp_path)
    shard.unlink()
    with pytest.raises(CorruptInput, match=r"params_shard_0\.bin: missing"):
        tensor_cache.check(tmp_path)


@pytest.mark.parametrize(
    ("key", "value"),
    [("dataPath", "../outside.bin"), ("byteOffset", 1 << 40), ("byteOffset", -8), ("shape", [1 << 40]), ("nbytes", 7)],
)
def test_a_tensor_that_is_not_in_its_file_is_corrupt_input(tmp_path: Path, key: str, value: Any) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    written(folder, TENSORS)
    (tmp_path / "outside.bin").write_bytes(bytes(1 << 20))
    path = folder / tensor_cache.INDEX
    index = json.loads(path.read_text())
    (index["records"][0] if key == "dataPath" else index["records"][0]["records"][0])[key] = value
    path.write_text(json.dumps(index))
    with pytest.raises(CorruptInput, match=tensor_cache.INDEX):
        tensor_cache.records(folder)
