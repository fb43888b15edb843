"""Import scripts, which have no ending, as modules."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

SCRIPTS = Path(__file__).parents[1] / "scripts"


@contextmanager
def imported(name: str) -> Iterator[Any]:
    """Module of a script, its neighbours importable meanwhile; no bytecode is written beside it."""
    loader = importlib.machinery.SourceFileLoader(name, str(SCRIPTS / name))
    spec = importlib.util.spec_from_loader(name, loader)
    assert spec
    module = importlib.util.module_from_spec(spec)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, name, module)
        patch.setattr(sys, "dont_write_bytecode", True)
        patch.syspath_prepend(str(SCRIPTS))
        loader.exec_module(module)
        yield module
