from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from pathlib import Path
from types import ModuleType

import pytest

ROOT = Path(__file__).parent.parent


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    loader = importlib.machinery.SourceFileLoader("proof_table", str(ROOT / "scripts" / "proof_table"))
    spec = importlib.util.spec_from_loader("proof_table", loader)
    assert spec is not None
    module = importlib.util.module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "proof_table", module)
    monkeypatch.setattr(sys, "dont_write_bytecode", True)
    loader.exec_module(module)
    return module


def test_what_was_not_recorded_is_not_proven(script: ModuleType) -> None:
    proof = script.proofs.Proof("Vulkan", "llama.cpp", "3", "executed", "a driver", {})
    lines = script.table([proof]).splitlines()
    assert "| Vulkan | llama.cpp | not proven | executed: a driver | not proven |" in lines
    assert "| Metal | llama.cpp | not proven | not proven | not proven |" in lines
    assert len(lines) == 2 + len(script.ROWS)


def test_a_record_of_another_api_gets_a_row_of_its_own(script: ModuleType) -> None:
    lines = script.table([script.proofs.Proof("OpenCL", "mlc", "3", "compiled", "a compiler", {})]).splitlines()
    assert lines[-1] == "| OpenCL | mlc | not proven | compiled: a compiler | not proven |"


def test_the_readmes_table_is_the_one_that_the_records_give(
    script: ModuleType, capsys: pytest.CaptureFixture[str]
) -> None:
    script.main()
    assert capsys.readouterr().out in (ROOT / "README.md").read_text(encoding="utf-8")
