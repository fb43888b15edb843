from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import script_files


@pytest.fixture
def script() -> Iterator[Any]:
    with script_files.imported("verify_kernels") as module:
        yield module


@pytest.mark.slow
def test_tests_that_pass_are_named(script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tests = tmp_path / "test_made_up.py"
    tests.write_text("def test_one():\n    import os\n    assert 'lvp_icd' in os.environ['VK_ICD_FILENAMES']\n")
    monkeypatch.setattr(script, "TESTS", (str(tests),))
    assert script.run() == {"test_one"}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("body", "told"),
    [("assert 1 == 2", "assert 1 == 2"), ("import pytest; pytest.skip('no device')", "skipped: test_one")],
)
def test_a_test_that_fails_or_is_skipped_ends_the_script(
    script: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, body: str, told: str
) -> None:
    tests = tmp_path / "test_made_up.py"
    tests.write_text(f"def test_one():\n    {body}\n")
    monkeypatch.setattr(script, "TESTS", (str(tests),))
    with pytest.raises(SystemExit, match=told):
        script.run()
