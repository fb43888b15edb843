from __future__ import annotations

import re
from pathlib import Path

import pytest

from edgeq import errors

ROOT = Path(__file__).resolve().parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def code_files() -> list[str]:
    code = [*ROOT.glob("toolkit/**/*.py"), *ROOT.glob("scripts/*"), *ROOT.glob(".ci/*")]
    return sorted(str(path.relative_to(ROOT)) for path in code if path.is_file() and path.name != "__init__.py")


@pytest.mark.parametrize("path", code_files())
def test_the_readmes_tree_names_every_file(path: str) -> None:
    tree = README[README.index("## The tree") :]
    assert re.search(rf"(^|[\s(/]){re.escape(Path(path).name)}\b", tree, re.MULTILINE), path


def test_the_readme_names_every_exit_code() -> None:
    kinds = errors.EdgeqError.__subclasses__()
    sentence = README[README.index("**Exit codes.**") :].split("\n\n")[0]
    used = {kind.exit_code for kind in kinds}
    assert used <= set(map(int, re.findall(r"\b\d+\b", sentence)))
