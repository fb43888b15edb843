"""What scripts/verify_tvm decides, and one tiny model through it; compilers of kernels are small scripts."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import msgspec
import pytest

import script_files
from checkpoints import Build
from edgeq import target
from edgeq.backends import mlc
from edgeq.errors import MissingTool
from edgeq.machine import this_machine

FIGURES = {"kernels": 45.0, "library_bytes": 883712.0, "build_s": 12.5, "fallback_share": 0.0049}
AGREES = {"cpu_logit_difference": 5e-5, "cpu_kl_rounding": 4e-13, "cpu_decoding_shortfall": 0.0}


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("verify_tvm") as module:
        yield module


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str, str], None]:
    """Makes programs that say something; there are no others."""
    monkeypatch.setenv("PATH", str(tmp_path))

    def make(name: str, said: str) -> None:
        (tmp_path / name).write_text(f"#!/bin/sh\necho '{said}'\n")
        (tmp_path / name).chmod(0o755)

    return make


def proof(script: Any, case: Any, **changes: float) -> Any:
    figures = FIGURES | (AGREES if case.runs else {}) | changes
    return script.proofs.Proof(case.api, "TVM", "3", "compiled", "a compiler", figures)


def test_every_api_is_compiled_for_a_device_whose_target_has_it(script: Any) -> None:
    kinds = {
        "CUDA": "cuda",
        "Metal": "metal",
        "OpenCL": "opencl",
        "WebGPU": "webgpu",
        "x86 CPU": "llvm",
        "ARM CPU": "llvm",
    }
    assert {each.api for each in script.PROVEN} == kinds.keys()
    assert len(script.PROVEN) == len(kinds) * 3
    for case in (*script.PROVEN, *script.FURTHER):
        device = target.load(case.target)
        assert device.code_generator == kinds[case.api]
        assert "mlc" in device.backends
        assert case.recipe in device.recipes


def test_each_recipe_is_run_for_each_generation(script: Any) -> None:
    ran = {(case.recipe, case.model) for case in script.PROVEN if case.runs}
    assert ran == {(each, model) for each in (script.FLOAT32, script.FLOAT16) for model in script.sources.DEMOS}


@pytest.mark.parametrize(
    ("changes", "fault"),
    [
        ({"cpu_logit_difference": 6e-4}, "cpu_logit_difference 6.0e-04, limit 3e-04"),
        ({"cpu_logit_difference": float("nan")}, "cpu_logit_difference nan, limit 3e-04"),
        ({"cpu_kl_rounding": 2e-4}, "cpu_kl_rounding 2.0e-04, limit 1e-04"),
        ({"cpu_decoding_shortfall": 0.5}, "cpu_decoding_shortfall 5.0e-01, limit 1e-04"),
    ],
)
def test_arithmetic_that_loses_more_than_rounding_activations_is_a_fault(
    script: Any, changes: dict[str, float], fault: str
) -> None:
    assert script.faults(script.FLOAT32, FIGURES | AGREES) == []
    assert script.faults(script.FLOAT32, FIGURES | AGREES | changes) == [fault]


def test_float16_may_differ_by_more_and_what_did_not_run_by_nothing(script: Any) -> None:
    assert script.faults(script.FLOAT16, FIGURES | AGREES | {"cpu_logit_difference": 0.02}) == []
    assert script.faults(script.FLOAT16, FIGURES) == []


def test_what_took_the_kernels_is_named_and_nothing_is_called_measured(
    script: Any, programs: Callable[[str, str], None]
) -> None:
    programs("nvcc", "Cuda compilation tools, release 13.0, V13.0.88")
    programs("clang", "Debian clang version 14.0.6")
    jetson, board, browser, pi = (
        target.load(each) for each in ("jetson", "orange-pi-5", "webgpu", "raspberry-pi-5-8gb")
    )
    assert script.compiled_by("CUDA", jetson, "compiled") == "nvcc 13.0, sm_87, unmeasured"
    assert script.compiled_by("OpenCL", board, "compiled") == "clang 14.0.6, syntax and types, unmeasured"
    assert script.compiled_by("WebGPU", browser, "unchecked") == "source that no compiler here takes, unmeasured"
    assert script.compiled_by("ARM CPU", pi, None) == "linked for aarch64-linux-gnu, unmeasured"


@pytest.mark.parametrize("differs", [5e-5, 5e-3])
def test_all_cases_are_printed_and_recorded_only_when_none_failed(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    differs: float,
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    monkeypatch.setattr(sys, "argv", ["scripts/verify_tvm", "--further"])
    monkeypatch.setattr(mlc, "tools", lambda _: ())
    monkeypatch.setattr(script.importlib.metadata, "version", lambda _: "1.0")
    monkeypatch.setattr(script, "ProcessPoolExecutor", lambda count, mp_context: ThreadPoolExecutor(count))
    monkeypatch.setattr(script, "prove", lambda case: proof(script, case, cpu_logit_difference=differs))
    saved = tmp_path / "edgeq"
    if differs > 1e-4:
        with pytest.raises(SystemExit, match=r"x86-avx2, Qwen3: cpu_logit_difference 5\.0e-03, limit 3e-04"):
            script.main()
        assert not saved.exists()
    else:
        script.main()
        (file,) = saved.rglob("tvm.json")
        assert len(json.loads(file.read_text())["proofs"]) == len(script.PROVEN)
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 1 + len(script.PROVEN) + len(script.FURTHER) + 1 + 6
    assert lines[1].split()[:6] == ["CUDA", "jetson-orin-nano-super-8gb", "3", "45", "863", "KiB"]
    assert lines[0].index("state") == lines[1].index("compiled")


def test_without_tvm_nothing_is_tried(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def absent(_: object) -> tuple[str, ...]:
        raise MissingTool("the mlc backend needs apache-tvm")

    monkeypatch.setattr(sys, "argv", ["verify_tvm"])
    monkeypatch.setattr(mlc, "tools", absent)
    monkeypatch.setattr(script, "demos", lambda *_: pytest.fail("tried"))
    with pytest.raises(MissingTool):
        script.main()


def test_a_true_size_misses_its_goals_one_by_one_and_its_bound_is_called_one(script: Any) -> None:
    found = script.TrueSize(
        seconds=25.0,
        peak_rss_bytes=580 << 20,
        library_bytes=1_500_000,
        kernels=51,
        state="compiled",
        fallback_share=0.0008,
        bytes_per_token=400_000_000,
        temporary_bytes={"decode": 2048, "embed": 0},
        largest=[("matmul", "GEMV", 28, 100_000_000)],
    )
    assert script.missed(found) == []
    slow = msgspec.structs.replace(found, seconds=200.0, fallback_share=0.5)
    assert script.missed(slow) == ["seconds 200, goal 180", "fallback_share 0.5, goal 0.02"]
    text = script.true_size_text("qwen3-0.6b", found, 102e9)
    assert "at most 255 tokens/s: a bound, computed from 102 GB/s, unmeasured" in text
    assert "temporary: decode 2 KiB\n" in text
    assert text.splitlines()[-1].split() == ["25.0%", "95.4", "MiB", "28", "x", "matmul,", "GEMV"]


@pytest.mark.slow
def test_a_tiny_model_runs_as_its_quantized_weights_do(script: Any, tiny: Build) -> None:
    try:
        mlc.tools(target.load("x86-avx2"))
    except MissingTool as missing:
        pytest.skip(str(missing))
    case = script.Case("x86 CPU", "x86-avx2", script.FLOAT32, str(tiny("3")), runs=True)
    found = script.prove(case)
    assert script.faults(case.recipe, found.figures) == []
    if {"avx2", "fma", "f16c"} <= set(this_machine().isa):
        assert (found.state, found.how) == ("executed", this_machine().cpu_model)
    assert found.figures["library_bytes"] > 1e5
