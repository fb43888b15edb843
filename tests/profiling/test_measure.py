from __future__ import annotations

import importlib.metadata
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import msgspec
import pytest
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace

from edgeq import bundle, data, profiles
from edgeq.errors import UsageFault
from edgeq.machine import Machine, physical_cores
from edgeq.profiling.measure import Plan, profile
from edgeq.target import Target
from edgeq.version import VERSION

_PLAN = Plan(prompts=(8, 24), tokens=6, depths=(0, 16), repetitions=2)
_PROMISED: dict[str, Any] = {
    "schema": {},
    "bundle": {"digest", "bytes", "bits_per_weight"},
    "model": {},
    "generation": {},
    "recipe": {},
    "backend": {},
    "provider": {},
    "target": {},
    "tools": {},
    "threads": {},
    "machine": {"cpu_model", "arch", "isa", "memory_bytes"},
    "load": {"warm_s", "cold_s", "first_s", "first_reason"},
    "first_token_s": {"median", "low", "high", "cv", "samples"},
    "prefill": {},
    "decode": {},
    "speculation": {},
    "speculation_reason": {},
    "memory": {"peak_rss_bytes", "load", "prefill", "decode", "device_peak_bytes", "kv_cache_bytes_per_token"},
    "energy": {"decode_j_per_token", "prefill_j_per_token", "sensor", "scope", "reason"},
    "accuracy": {
        *("reference", "tokens", "text_sha256", "perplexity_reference", "perplexity", "ln_ratio", "kl_mean", "kl_low"),
        *("kl_high", "kl_p50", "kl_p99", "kl_max", "top1_agreement", "flips"),
    },
    "sustained": {},
    "health": {"repetitions"},
    "valid": {},
    "grade": {},
    "reasons": {},
}


_QWEN3 = {
    "model_type": "qwen3",
    "num_hidden_layers": 28,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "head_dim": 128,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1e6,
    "tie_word_embeddings": True,
}


def _silent(label: str, done: int, total: int) -> None:
    assert 0 <= done <= total


def test_a_row_of_the_null_backend(null_bundle: Path, target: Target, machine: Machine, tmp_path: Path) -> None:
    row = profile(null_bundle, target, machine, _PLAN, progress=_silent)
    document = json.loads(data.to_json(row))
    for key, inner in _PROMISED.items():
        assert set(inner) <= (set(document[key]) if inner else set()), key
        assert key in document
    assert [(one["tokens"], one["depth"]) for one in document["prefill"]] == [(8, 0), (24, 0)]
    assert [(one["tokens"], one["depth"]) for one in document["decode"]] == [(6, 0), (6, 16)]
    assert all(len(one["tokens_per_s"]["samples"]) >= 2 for one in document["prefill"] + document["decode"])
    assert set(document["decode"][0]["gap_s"]) == {"p50", "p90", "p99", "max"}
    assert [(one["text"], one["tokens"]) for one in document["speculation"]] == [("repeating", 6), ("ordinary", 6)]
    assert document["speculation_reason"] is None
    assert all(one["same"] == 1 for one in document["speculation"])
    assert document["accuracy"]["kl_max"] < 1e-9
    assert document["accuracy"]["tokens"] == 4 * 23
    assert document["first_token_from"] == "ids"
    assert (row.tools, row.threads) == ((f"edgeq {VERSION}",), physical_cores())
    assert "prefill is measured at depth 0 only" in document["reasons"]
    profiles.write(row, tmp_path / "row.json")
    assert profiles.read(tmp_path / "row.json") == row


def test_what_is_null_has_a_reason(null_bundle: Path, target: Target, machine: Machine) -> None:
    row = profile(null_bundle, target, machine, Plan((8,), 4, (0,), 1, "none"), progress=_silent)
    assert (row.accuracy, row.accuracy_reason) == (None, "not asked for")
    assert row.sustained is None
    assert row.sustained_reason
    assert "KV cache" in (row.memory.reason or "")
    assert (row.load.cold_s is None) == (row.load.reason is not None)
    assert (row.load.first_s is None) == (row.load.first_reason is not None)
    assert row.energy.decode_j_per_token is not None or row.energy.reason


_RECORDER = """
import json, os
from edgeq.backends.null import NullSession

def load(folder, bundle):
    cache = os.environ.get("EDGEQ_KERNEL_CACHE")
    seen = [None if cache is None else os.listdir(cache), os.environ.get("CUDA_CACHE_DISABLE")]
    with open({log!r}, "a") as log:
        log.write(json.dumps(seen) + "\\n")
    return NullSession(bundle.config["vocab_size"])
"""


def test_the_first_load_is_timed_without_any_kernel_compiled_before(
    null_bundle: Path, target: Target, machine: Machine, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    log = tmp_path / "loads"
    (tmp_path / "recorder.py").write_text(_RECORDER.format(log=str(log)))
    (tmp_path / "sitecustomize.py").write_text("from edgeq import backends\nbackends._MODULES['null'] = 'recorder'\n")
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    for name in ("EDGEQ_KERNEL_CACHE", "CUDA_CACHE_DISABLE"):
        monkeypatch.delenv(name, raising=False)
    load = profile(null_bundle, target, machine, Plan((8,), 4, (0,), 1, "none"), progress=_silent).load
    cold, first, speed = map(json.loads, log.read_text().splitlines())
    assert (cold, first, speed) == ([None, None], [[], "1"], [None, None])
    assert load.first_s is not None
    assert (load.first_s > 0, load.first_reason) == (True, None)


@pytest.mark.parametrize(
    ("provider", "system", "reason"),
    [
        ("cpu", "Linux", "nothing is compiled on loading for the CPU"),
        ("cuda", "Linux", "0 of 1 layers run on cuda"),
        ("null", "macOS 15.5", "macOS keeps compiled kernels itself, and cannot be told to forget them"),
    ],
)
def test_a_first_load_like_any_other_is_not_timed(
    null_bundle: Path, target: Target, machine: Machine, provider: str, system: str, reason: str
) -> None:
    manifest = msgspec.structs.replace(bundle.read(null_bundle), provider=provider)
    (null_bundle / bundle.MANIFEST).write_bytes(msgspec.json.encode(bundle.seal(manifest)))
    here = msgspec.structs.replace(machine, os=system)
    load = profile(null_bundle, target, here, Plan((8,), 4, (0,), 1, "none"), progress=_silent).load
    assert (load.first_s, load.first_reason) == (None, reason)


def test_without_a_reference_accuracy_and_speculation_say_so(
    null_bundle: Path, target: Target, machine: Machine
) -> None:
    (null_bundle / bundle.REFERENCE).unlink()
    row = profile(null_bundle, target, machine, Plan((8,), 4, (0,), 1), progress=_silent)
    assert (row.accuracy, row.accuracy_reason) == (None, "the bundle holds no reference.npz")
    assert (row.speculation, row.speculation_reason) == (None, "the bundle holds no reference.npz")


def test_a_given_reference_comes_before_the_bundles_own(
    null_bundle: Path, target: Target, machine: Machine, tmp_path: Path
) -> None:
    given = (null_bundle / bundle.REFERENCE).rename(tmp_path / "full.npz")
    row = profile(null_bundle, target, machine, Plan((8,), 4, (0,), 1, "full"), progress=_silent, full_reference=given)
    assert row.accuracy is not None
    assert row.accuracy.kl_mean < 1e-9


def test_a_tokenizer_makes_first_token_start_from_text(null_bundle: Path, target: Target, machine: Machine) -> None:
    tokenizer = Tokenizer(WordLevel({f"word{one}": one for one in range(300)}, unk_token="word0"))
    tokenizer.pre_tokenizer = Whitespace()
    tokenizer.save(str(null_bundle / "tokenizer.json"))
    row = profile(null_bundle, target, machine, Plan((8,), 4, (0,), 1, "none"), progress=_silent)
    assert row.first_token_from == "text"


@pytest.mark.parametrize(("recipe", "value_bytes"), [("w4g32-e8-rtn", 4), ("w4g32-e8-rtn-kv8", 1)])
def test_kv_cache_of_the_onnx_backend_is_predicted(
    null_bundle: Path,
    target: Target,
    machine: Machine,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    recipe: str,
    value_bytes: int,
) -> None:
    (tmp_path / "sitecustomize.py").write_text(
        "from edgeq import backends\nbackends._MODULES['onnx'] = backends._MODULES['null']\n"
    )
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    manifest = msgspec.structs.replace(bundle.read(null_bundle), backend="onnx", config=_QWEN3, recipe=recipe)
    (null_bundle / bundle.MANIFEST).write_bytes(msgspec.json.encode(bundle.seal(manifest)))
    row = profile(null_bundle, target, machine, Plan((8,), 4, (0,), 1, "none"), progress=_silent)
    assert row.memory.kv_cache_bytes_per_token == 2 * 28 * 8 * 128 * value_bytes
    assert row.tools == (f"edgeq {VERSION}", f"onnxruntime {importlib.metadata.version('onnxruntime')}")


@pytest.mark.parametrize(
    ("plan", "words"),
    [
        (Plan(prompts=(200,), tokens=100), "context of 256"),
        (Plan(prompts=(8,), tokens=8, depths=(0, 250)), "context of 256"),
        (Plan(tokens=1), "at least 2 tokens"),
        (Plan(prompts=()), "prompts of at least 1"),
        (Plan(depths=(-1,)), "depths of at least 0"),
        (Plan(repetitions=0), "1 repetition"),
        (Plan(accuracy="some"), "none, quick, full"),
    ],
)
def test_an_impossible_plan_is_refused(
    null_bundle: Path, target: Target, machine: Machine, plan: Plan, words: str
) -> None:
    with pytest.raises(UsageFault) as caught:
        profile(null_bundle, target, machine, plan, progress=_silent)
    assert words in str(caught.value)


def test_measuring_imports_no_engine() -> None:
    heavy = "{'torch', 'transformers', 'onnxruntime', 'tokenizers', 'onnxruntime_genai'}"
    code = f"import sys, edgeq.profiling.measure; print(sorted({heavy} & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
