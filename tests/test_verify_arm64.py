"""What scripts/verify_arm64 says and decides; nothing is emulated here."""

from __future__ import annotations

import json
import platform
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

import null_bundles
import script_files
from edgeq import backends, bundle, machine, target
from edgeq.backends.null import NullSession
from edgeq.errors import MissingTool

A76_HWCAP = 0x119FFB
A72_HWCAP = 0x8FB
"""What qemu 7.2 hands to a process on these cores."""
GATE = {
    "kl_mean": 0.002,
    "kl_weights_only": 0.0018,
    "max_loss": 0.3,
    "top1_agreement": 0.93,
    "ran_on": "aarch64",
    "passed": True,
    "tokens": 1016,
}
LOGITS = np.random.default_rng(0).normal(size=(6, 20)).astype(np.float32)


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("verify_arm64") as module:
        yield module


@pytest.fixture
def judge(script: Any, tmp_path: Path) -> Callable[..., Any]:
    """Fault and figures of a process that printed GATE with changes and left these logits."""

    def make(logits: Any = LOGITS, code: int = 0, stderr: str = "", **changes: object) -> Any:
        np.save(tmp_path / "logits.npy", logits)
        printed = json.dumps({"bundle": "b", "gate": GATE | changes, "gate_at_build": GATE})
        done = subprocess.CompletedProcess([], code, "" if code else f"progress\n{printed}\n", stderr)
        return script.judged(done, tmp_path / "logits.npy", LOGITS)

    return make


def runs(script: Any, fault: str = "") -> list[Any]:
    """One engine and generation on both cores, the second with a fault."""
    figures = {"kl_mean": 0.0019, "kl_limit": 0.0043, "kl_rounding": 2.5e-5, "top1_agreement": 0.931}
    return [
        script.Run("onnx", "3.5", "cortex-a76", "", figures),
        script.Run("onnx", "3.5", "cortex-a72", fault, {} if fault else figures | {"kl_mean": 0.0018}),
    ]


@pytest.mark.parametrize(
    ("core", "hwcap", "model", "isa"),
    [
        (0, A76_HWCAP, "Cortex-A76", ("neon", "dotprod", "fp16")),
        (1, A72_HWCAP, "Cortex-A72", ("neon",)),
    ],
)
def test_edgeq_reads_the_core_from_its_cpuinfo(
    script: Any, tmp_path: Path, core: int, hwcap: int, model: str, isa: tuple[str, ...]
) -> None:
    (tmp_path / "proc").mkdir()
    text = script.cpuinfo(script.CORES[core], script.features(hwcap), 4)
    (tmp_path / "proc/cpuinfo").write_text(text, encoding="utf-8")
    found = machine.this_machine(tmp_path)
    assert (found.cpu_model, found.arch, found.isa, found.threads) == (model, "aarch64", isa, 4)
    assert script.CORES[core].dotprod == ("dotprod" in found.isa)


def test_features_are_named_bit_by_bit(script: Any) -> None:
    assert script.features(0) == ()
    assert script.features(0b11) == ("fp", "asimd")
    assert script.features(1 << 20 | 1 << 22) == ("asimddp", "sve")
    assert len(script.features(0xFFFFFFFF)) == 32


def test_a_sound_run_has_no_fault_and_the_limit_of_the_gate(judge: Callable[..., Any]) -> None:
    fault, figures = judge()
    assert fault == ""
    assert figures["kl_mean"] == 0.002
    assert figures["kl_limit"] == pytest.approx(0.0018 * 1.25 + 0.002)
    assert figures["kl_rounding"] == pytest.approx(0, abs=1e-12)
    assert judge(max_loss=0.003)[1]["kl_limit"] == 0.003


def test_a_process_that_failed_is_a_fault_in_its_words(judge: Callable[..., Any]) -> None:
    assert judge(code=4, stderr="edgeq: KL too large\n") == ("exit code 4: edgeq: KL too large", {})
    assert judge(code=132)[0] == "exit code 132: no message"


def test_a_gate_that_ran_elsewhere_proves_nothing(judge: Callable[..., Any]) -> None:
    assert judge(ran_on="x86_64")[0] == "it ran on x86_64"


def test_logits_away_from_those_of_the_same_weights_are_a_fault(judge: Callable[..., Any]) -> None:
    noise = np.random.default_rng(1).normal(size=LOGITS.shape).astype(np.float32)
    assert judge(LOGITS + 0.005 * noise)[0] == ""
    fault, figures = judge(LOGITS + 0.1 * noise)
    assert "from the same weights, limit 3e-04" in fault
    assert 1e-3 < figures["kl_rounding"] < 1e-1
    assert "KL divergence nan" in judge(np.full_like(LOGITS, np.nan))[0]


def test_the_table_has_a_row_for_each_run_and_lines_up(script: Any) -> None:
    heading, first, second = script.table(runs(script, "exit code 132: no message")).splitlines()
    assert first.split() == ["onnx", "3.5", "cortex-a76", "0.00190", "0.00430", "2.5e-05", "3e-04", "0.931", "yes"]
    assert second.split() == ["onnx", "3.5", "cortex-a72", "nan", "nan", "nan", "3e-04", "nan", "no"]
    assert heading.index("passed") == first.index("yes") == second.index("no")


def test_failures_name_engine_generation_core_and_reason(script: Any) -> None:
    assert script.failures(runs(script)) == []
    assert script.failures(runs(script, "exit code 132: no message")) == [
        "onnx, Qwen3.5 on cortex-a72: exit code 132: no message"
    ]


def test_one_proof_holds_the_figures_of_both_cores(script: Any) -> None:
    (proof,) = script.proven(runs(script), "qemu-user 7.2")
    assert (proof.api, proof.engine, proof.generation, proof.state) == ("ARM CPU", "onnxruntime", "3.5", "executed")
    assert proof.how == "qemu-user 7.2, cortex-a76 and cortex-a72"
    assert proof.figures["cortex_a76_kl_mean"] == 0.0019
    assert proof.figures["cortex_a72_kl_mean"] == 0.0018
    assert len(proof.figures) == 8


@pytest.mark.parametrize("fault", ["", "exit code 132: no message"])
def test_only_a_proof_without_a_failure_is_recorded(
    script: Any,
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    fault: str,
) -> None:
    recorded: list[Any] = []
    monkeypatch.setattr(sys, "argv", ["verify_arm64", "--save"])
    monkeypatch.setattr(script, "check_host", lambda: None)
    monkeypatch.setattr(script, "Guest", lambda *_: None)
    monkeypatch.setattr(script, "run_all", lambda *_: runs(script, fault))
    monkeypatch.setattr(script, "versions", lambda *_: {"onnxruntime": "1"})
    monkeypatch.setattr(script, "debian", lambda: "12")
    monkeypatch.setattr(script.proofs, "need", lambda *_: None)
    monkeypatch.setattr(script.proofs, "once", lambda folder, make: tmp_path)
    monkeypatch.setattr(script.proofs, "debian_version", lambda _: "1:7.2+dfsg-7")
    monkeypatch.setattr(script.proofs, "record", lambda *words: recorded.append(words))
    if fault:
        with pytest.raises(SystemExit, match=r"verify_arm64: onnx, Qwen3\.5 on cortex-a72: exit code 132"):
            script.main()
        assert recorded == []
    else:
        script.main()
        ((proofs, versions, save),) = recorded
        assert [proof.how for proof in proofs] == ["qemu-user 7.2, cortex-a76 and cortex-a72"]
        assert (versions, save) == ({"onnxruntime": "1"}, True)
    assert "cortex-a72" in capsys.readouterr().out


def test_another_processor_is_a_skip(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SystemExit) as caught:
        script.check_host()
    assert caught.value.code == 77
    assert "x86-64 Linux only" in capsys.readouterr().err


def test_a_backend_that_is_not_installed_is_a_skip_with_its_reason(
    script: Any, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def missing(_: str) -> None:
        raise MissingTool("the llamacpp backend needs gguf")

    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sys, "platform", "linux")
    monkeypatch.setattr(backends, "get", missing)
    with pytest.raises(SystemExit) as caught:
        script.check_host()
    assert caught.value.code == 77
    assert "the llamacpp backend needs gguf" in capsys.readouterr().err


def test_a_guest_installs_what_a_device_does_and_the_pinned_llama_cpp(script: Any) -> None:
    requirements, engine = script.packages()
    names = {each.partition(">")[0] for each in requirements}
    assert {"msgspec", "numpy", "onnxruntime", "tokenizers", "diskcache"} <= names
    assert {"apache-tvm", "apache-tvm-ffi"} <= {each.partition("==")[0] for each in requirements}
    assert not {"torch", "transformers"} & names
    pins = script.constraints().read_text(encoding="utf-8").splitlines()
    assert engine.replace("-", "_") in pins


def test_the_guest_prints_verify_s_document_and_leaves_logits(
    script: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    null_bundles.write(tmp_path / "bundle")
    assert script.in_guest(tmp_path / "bundle", tmp_path / "logits.npy") == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["gate"]["passed"] is True
    window = script.first_window(tmp_path / "bundle")
    expected = NullSession(null_bundles.VOCAB).logits(window.tolist())
    np.testing.assert_array_equal(np.load(tmp_path / "logits.npy"), expected)


def test_the_guest_ends_with_verify_s_exit_code(script: Any, tmp_path: Path) -> None:
    null_bundles.write(tmp_path / "bundle")
    with (tmp_path / "bundle" / bundle.REFERENCE).open("ab") as stream:
        stream.write(b" ")
    assert script.in_guest(tmp_path / "bundle", tmp_path / "logits.npy") == 12
    assert not (tmp_path / "logits.npy").exists()


def test_a_library_that_would_be_compiled_anew_proves_nothing(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tvm", reason="needs edgeq[tvm]")
    from edgeq.backends import mlc
    from edgeq.backends.mlc import built_in, report

    told: dict[str, Any] = {"compiler": "edgeq", "isa": (), "dtype": "float32", "floats": "float32", "kernels": ()}
    monkeypatch.setattr(mlc, "load", lambda _, manifest: built_in.for_this_cpu(manifest, report.Report(**told)))
    null_bundles.write(tmp_path / "bundle", backend=script.COMPILED)
    assert script.in_guest(tmp_path / "bundle", tmp_path / "logits.npy") == 30
    assert "the library is not for this processor" in capsys.readouterr().err


def test_compiled_code_runs_on_the_processor_that_it_is_for_the_rest_on_all(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Emulated:
        def __init__(self, core: Any) -> None:
            self.core = core

        def python(self, *words: str, cpu: int) -> subprocess.CompletedProcess[str]:
            return subprocess.CompletedProcess(words, cpu)

    monkeypatch.setattr(script.windows, "QUICK_WINDOWS", script.WINDOWS)
    monkeypatch.setattr(script.edgeq, "build", lambda model, **_: SimpleNamespace(generation=model[len("demo-qwen") :]))
    monkeypatch.setattr(script, "first_window", lambda _: np.arange(3))
    monkeypatch.setattr(script.proofs, "dequantized_logits", lambda *_: LOGITS)
    monkeypatch.setattr(script, "judged", lambda *_: ("", {}))
    found = script.run_all(tmp_path, [Emulated(core) for core in script.CORES])
    cores = {backend: {run.core for run in found if run.backend == backend} for backend in script.ENGINES}
    both = {"cortex-a76", "cortex-a72"}
    assert cores == {"mlc": {"cortex-a76"}, "llamacpp": both, "onnx": both}
    assert len(found) == 3 * (1 + 2 + 2)


def test_the_first_core_has_what_the_target_has(script: Any) -> None:
    assert script.CORES[0].dotprod == ("dotprod" in target.load(script.TARGET).cpu.isa)
    assert target.load(script.TARGET).mlc.mcpu == script.CORES[0].name
