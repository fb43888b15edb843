from __future__ import annotations

from pathlib import Path
from typing import Any

import msgspec
import pytest

from edgeq import profiles
from edgeq.errors import CorruptInput, MissingTool

_SHIPPED = Path(__file__).parents[1] / "profiles"
_SPREAD = {"median": 35.1, "low": 34.8, "high": 35.5, "cv": 0.01, "samples": [34.8, 35.1, 35.5]}
_PHASE = {"rss_bytes": 3 << 20, "anonymous_bytes": 1 << 20, "file_bytes": 2 << 20}
_DOCUMENT: dict[str, Any] = {
    "schema": 1,
    "bundle": {"digest": "d" * 64, "bytes": 1000, "bits_per_weight": 4.5},
    "model": "qwen3-0.6b",
    "generation": "3",
    "recipe": "w4g32-e8-rtn",
    "backend": "null",
    "provider": "null",
    "target": "a-board",
    "tools": ["edgeq 0.1.0"],
    "threads": 4,
    "placement": [{"provider": "cpu", "device": "CPU", "layers": 25, "bytes": None, "software": False}],
    "machine": {
        "cpu_model": "a processor",
        "arch": "aarch64",
        "isa": ["neon"],
        "cores": 4,
        "threads": 4,
        "memory_bytes": 1 << 30,
        "ram_bytes": 1 << 30,
        "swap_bytes": None,
        "os": "Linux",
        "kernel": None,
        "device_tree": None,
        "governor": None,
        "accelerators": [],
        "python": "3.11",
        "product": None,
        "compatible": [],
    },
    "load": {
        "warm_s": 0.5,
        "cold_s": None,
        "reason": "the page cache keeps the files",
        "first_s": 12.5,
        "first_reason": None,
    },
    "first_token_s": _SPREAD,
    "first_token_from": "text",
    "prefill": [{"tokens": 128, "depth": 0, "tokens_per_s": _SPREAD}],
    "decode": [
        {"tokens": 128, "depth": 0, "tokens_per_s": _SPREAD, "gap_s": {"p50": 0.1, "p90": 0.2, "p99": 0.3, "max": 0.4}}
    ],
    "speculation": [
        {
            "method": "prompt lookup",
            "text": "repeating",
            "prompt": 128,
            "tokens": 64,
            "tokens_per_s": _SPREAD,
            "plain_tokens_per_s": _SPREAD,
            "tokens_per_step": 2.5,
            "same": 1.0,
            "valid": True,
            "reason": None,
        }
    ],
    "speculation_reason": None,
    "memory": {
        "peak_rss_bytes": 3 << 20,
        "load": _PHASE,
        "prefill": _PHASE,
        "decode": _PHASE,
        "device_peak_bytes": None,
        "kv_cache_bytes_per_token": 4096,
        "reason": "device: no counter",
    },
    "energy": {
        "decode_j_per_token": None,
        "prefill_j_per_token": None,
        "sensor": None,
        "scope": None,
        "reason": "no sensor",
    },
    "accuracy": None,
    "accuracy_reason": "not asked for",
    "sustained": None,
    "sustained_reason": "no long run was made",
    "health": {
        "wait": 0.01,
        "steal": None,
        "temperature_c": 41.5,
        "clock_hz": 2_400_000_000,
        "throttle_events": 0,
        "reason": None,
        "repetitions": [],
    },
    "valid": True,
    "grade": "A",
    "reasons": [],
}


def _profile(**changes: object) -> profiles.Profile:
    return msgspec.convert(_DOCUMENT | changes, profiles.Profile)


def _placed(*places: tuple[str, str, int, bool]) -> list[profiles.Placement]:
    return [
        profiles.Placement(provider=provider, device=device, layers=layers, bytes=None, software=software)
        for provider, device, layers, software in places
    ]


def test_the_provider_is_the_api_of_most_layers() -> None:
    assert profiles.provider(_placed(("cpu", "CPU", 1, False), ("cuda", "Orin", 28, False))) == "cuda"
    assert profiles.provider(_placed(("cpu", "CPU", 20, False), ("cuda", "Orin", 9, False))) == "cpu"


def test_an_imitated_gpu_is_called_by_its_name() -> None:
    assert profiles.provider(_placed(("vulkan", "llvmpipe (LLVM 15, 256 bits)", 28, True))) == "vulkan (llvmpipe)"


def test_a_required_accelerator_must_run_every_layer() -> None:
    profiles.require_accelerator(_placed(("cpu", "CPU", 0, False), ("cuda", "Orin", 29, False)), "jetson", "cuda")
    with pytest.raises(MissingTool, match="1 of 29 layers run on the CPU") as caught:
        profiles.require_accelerator(_placed(("cpu", "CPU", 1, False), ("cuda", "Orin", 28, False)), "jetson", "cuda")
    assert (caught.value.exit_code, caught.value.run) == (5, "edgeq doctor --target jetson")
    with pytest.raises(MissingTool, match="does not say where its layers run"):
        profiles.require_accelerator(_placed(("cuda", "Orin", 0, False)), "jetson", "cuda")
    with pytest.raises(MissingTool, match="made for the CPU"):
        profiles.require_accelerator(_placed(("cpu", "CPU", 29, False)), "pi5", "cpu")


def test_a_row_from_before_speculation_was_measured_is_read_and_says_so() -> None:
    older = {key: value for key, value in _DOCUMENT.items() if not key.startswith("speculation")}
    row = msgspec.convert(older, profiles.Profile)
    assert row.speculation is None
    assert "not measured" in str(row.speculation_reason)


def test_document_keeps_every_key_and_survives_a_round_trip(tmp_path: Path) -> None:
    file = tmp_path / "a" / "b.json"
    profiles.write(_profile(), file)
    assert msgspec.json.decode(file.read_bytes()) == _DOCUMENT
    assert profiles.read(file) == _profile()
    assert [path.name for path in file.parent.iterdir()] == ["b.json"]


def test_a_profile_from_before_first_loads_were_timed_is_read(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(_DOCUMENT | {"load": {"warm_s": 0.5, "cold_s": 0.9, "reason": None}}))
    found = profiles.read(file).load
    assert (found.cold_s, found.first_s, found.first_reason) == (0.9, None, None)


@pytest.mark.parametrize(
    "document",
    [
        _DOCUMENT | {"tokens_per_second": 35},
        {key: value for key, value in _DOCUMENT.items() if key != "grade"},
        _DOCUMENT | {"valid": "yes"},
        _DOCUMENT | {"schema": 2},
    ],
    ids=["unknown", "missing", "type", "schema"],
)
def test_read_is_strict(tmp_path: Path, document: dict[str, Any]) -> None:
    file = tmp_path / "profile.json"
    file.write_bytes(msgspec.json.encode(document))
    with pytest.raises(CorruptInput, match=r"profile\.json"):
        profiles.read(file)


@pytest.mark.parametrize(
    "shipped", [None, *sorted(set(_SHIPPED.rglob("*.json")) - set(_SHIPPED.glob("peers/**/*.json")))], ids=str
)
def test_a_profile_lies_where_its_fields_say(shipped: Path | None, tmp_path: Path) -> None:
    root, file = _SHIPPED, shipped
    if file is None:
        root, file = tmp_path, tmp_path / "a-board" / "qwen3-0.6b.w4g32-e8-rtn.null.json"
        profiles.write(_profile(), file)
    row = profiles.read(file)
    assert profiles.path(row.target, row.model, row.recipe, row.backend, root) == file


@pytest.mark.parametrize("model", ["../../etc/passwd", "Qwen/Qwen3-0.6B", "/tmp/model", "..", "a\\b"])
def test_path_stays_below_its_target(tmp_path: Path, model: str) -> None:
    found = profiles.path("..", model, "r", "b", tmp_path)
    assert found.parent == tmp_path / "unnamed"
    assert found.resolve() == found
