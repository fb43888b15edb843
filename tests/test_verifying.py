from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import pytest

import null_bundles
from checkpoints import quiet
from edgeq import bundle, verifying
from edgeq.backends import null
from edgeq.backends.null import NullSession
from edgeq.errors import BackendFault, CorruptInput, DigestMismatch, GateFailed, UsageFault


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "bundle"


def test_a_sound_bundle_is_verified(folder: Path) -> None:
    made = null_bundles.write(folder)
    found = verifying.verify(folder, quiet)
    assert found.bundle == str(folder)
    assert found.digest == made.digest
    assert found.files == len(made.files)
    assert found.gate.passed
    assert found.gate.kl_mean == pytest.approx(0, abs=1e-12)
    assert found.gate.max_loss == made.gate.max_loss
    assert found.gate_at_build == made.gate
    msgspec.json.encode(found)


@pytest.mark.parametrize("name", ["null.json", "tokenizer.json", bundle.REFERENCE, "chat_template.jinja"])
def test_a_changed_file_is_a_digest_mismatch(folder: Path, name: str) -> None:
    null_bundles.write(folder)
    with (folder / name).open("ab") as stream:
        stream.write(b" ")
    with pytest.raises(DigestMismatch, match=name) as caught:
        verifying.verify(folder, quiet)
    assert caught.value.exit_code == 12


def test_files_are_checked_before_anything_is_loaded(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder)
    (folder / "extra").touch()
    monkeypatch.setattr(null, "load", lambda *_: pytest.fail("loaded"))
    with pytest.raises(DigestMismatch, match="extra"):
        verifying.verify(folder, quiet)


def test_a_loss_above_the_limit_of_the_build_fails_the_gate_and_names_the_bundle(folder: Path) -> None:
    reference = null_bundles.reference()
    other = (reference.ids + 1) % null_bundles.VOCAB
    null_bundles.write(folder, replace(reference, ids=other))
    with pytest.raises(GateFailed, match="KL divergence") as caught:
        verifying.verify(folder, quiet)
    assert str(folder) in caught.value.what
    assert caught.value.exit_code == 4


class Counting(NullSession):
    closed = 0

    def close(self) -> None:
        Counting.closed += 1


def test_the_session_is_closed_whether_the_gate_passes_or_breaks(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    null_bundles.write(folder)
    monkeypatch.setattr(Counting, "closed", 0)
    monkeypatch.setattr(null, "load", lambda *_: Counting(null_bundles.VOCAB))
    verifying.verify(folder, quiet)

    def broken(*_: Any) -> Any:
        raise BackendFault("the engine broke")

    monkeypatch.setattr(Counting, "logits", broken)
    with pytest.raises(BackendFault):
        verifying.verify(folder, quiet)
    assert Counting.closed == 2


def test_a_bundle_without_its_reference_is_corrupt_input(folder: Path) -> None:
    null_bundles.write(folder)
    (folder / bundle.REFERENCE).unlink()
    null_bundles.seal(folder)
    with pytest.raises(CorruptInput, match=r"reference\.npz"):
        verifying.verify(folder, quiet)


def test_a_bundle_of_an_unknown_backend_is_refused_with_the_known_ones(folder: Path) -> None:
    null_bundles.write(folder, backend="nul")
    with pytest.raises(UsageFault, match="'nul' is not a backend") as caught:
        verifying.verify(folder, quiet)
    assert "null" in caught.value.why
