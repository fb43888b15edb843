from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import script_files

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("proof_table") as module:
        yield module


def test_what_was_not_recorded_is_not_proven(script: Any) -> None:
    proof = script.proofs.Proof("Vulkan", "llama.cpp", "3", "executed", "a driver", {})
    lines = script.table([proof]).splitlines()
    assert "| Vulkan | llama.cpp | not proven | executed: a driver | not proven |" in lines
    assert "| Metal | llama.cpp | not proven | not proven | not proven |" in lines
    assert len(lines) == 2 + len(script.ROWS)


def test_a_record_of_another_api_gets_a_row_of_its_own(script: Any) -> None:
    lines = script.table([script.proofs.Proof("SYCL", "TVM", "3", "compiled", "a compiler", {})]).splitlines()
    assert lines[-1] == "| SYCL | TVM | not proven | compiled: a compiler | not proven |"


def test_of_two_proofs_the_stronger_is_shown_whichever_comes_first(script: Any) -> None:
    states = ("unchecked", "executed", "compiled")
    found = [script.proofs.Proof("OpenCL", "TVM", "3", state, "here", {}) for state in states]
    for order in (found, found[::-1]):
        assert "| OpenCL | TVM | not proven | executed: here | not proven |" in script.table(order)


def test_the_readmes_table_is_the_one_that_the_records_give(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    script.main()
    assert capsys.readouterr().out in (ROOT / "README.md").read_text(encoding="utf-8")
