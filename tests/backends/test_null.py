from __future__ import annotations

from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from checkpoints import Build
from edgeq import backends, recipe, target
from edgeq.backends import null
from edgeq.backends.base import Job
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault

NO_BUNDLE: Any = SimpleNamespace()


def test_decoding_counts_upwards_and_wraps_at_the_vocabulary() -> None:
    assert list(null.NullSession(10).generate([3, 7], 5)) == [8, 9, 0, 1, 2]
    assert list(null.NullSession(10).generate([3], 0)) == []


def test_decoding_is_lazy() -> None:
    assert list(islice(null.NullSession(10).generate([0], 10**12), 2)) == [1, 2]


def test_logits_favour_the_token_that_decoding_gives() -> None:
    session = null.NullSession(10)
    logits = session.logits([3, 9])
    assert logits.shape == (2, 10)
    assert logits.dtype == np.float32
    assert logits.argmax(axis=1).tolist() == [4, 0]
    assert np.sort(logits, axis=1)[:, -2:].tolist() == [[0, null.FAVOUR]] * 2
    assert next(session.generate([3, 9], 1)) == 0


def test_a_build_is_loaded_with_the_models_vocabulary(tiny: Build, tmp_path: Path) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    steps = []
    job = Job(checkpoint, recipe.parse("w16"), target.load("x86-avx2"), 64, lambda *step: steps.append(step))
    null.build(job, tmp_path)
    session = null.load(tmp_path, NO_BUNDLE)
    assert session.vocab == checkpoint.model.vocab
    assert session.logits([1]).shape == (1, checkpoint.model.vocab)
    assert steps == [("null", 1, 1)]
    session.close()


@pytest.mark.parametrize("raw", [b"", b"[]", b"{}", b'{"vocab": "9"}', b'{"vocab": 0}', b'{"vocab": -1}', b"\xff"])
def test_a_damaged_file_is_a_backend_fault_that_names_it(tmp_path: Path, raw: bytes) -> None:
    (tmp_path / "null.json").write_bytes(raw)
    with pytest.raises(BackendFault, match=r"null\.json: cannot be read") as caught:
        null.load(tmp_path, NO_BUNDLE)
    assert caught.value.exit_code == 30


def test_a_missing_file_is_a_backend_fault(tmp_path: Path) -> None:
    with pytest.raises(BackendFault, match=r"null\.json: cannot be read"):
        null.load(tmp_path, NO_BUNDLE)


def test_the_null_backend_is_found_by_its_name() -> None:
    device = target.load("x86-avx2")
    found = backends.get("null")
    assert found.provider(device) == "null"
    assert found.tools(device) == ("null 1",)
