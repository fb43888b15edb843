from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest

from checkpoints import Build, quiet
from edgeq import building, bundle, planning

pytestmark = pytest.mark.slow
OPTIMUM = Path(sys.executable).with_name("optimum-cli")


def test_optimum_cli_export_edgeq_makes_the_same_bundle(tiny: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["--model", str(tiny("2.5")), "--target", "x86-avx2", "--recipe", "w4g32-e8-rtn", str(out)]
    child = subprocess.run([str(OPTIMUM), "export", "edgeq", *words], capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    plan = planning.plan(str(tiny("2.5")), target="x86-avx2", recipe_name="w4g32-e8-rtn", out=tmp_path / "same")
    building.build(plan, quiet)
    assert bundle.read(out).files == bundle.read(plan.out).files


def test_optimum_gets_edgeqs_exit_code(tmp_path: Path) -> None:
    words = ["--model", str(tmp_path / "nowhere"), "--target", "x86-avx2", str(tmp_path / "out")]
    child = subprocess.run([str(OPTIMUM), "export", "edgeq", *words], capture_output=True, text=True, check=False)
    assert child.returncode == 2
    assert "is no folder, demo, catalogue name or hub id" in child.stderr
