"""What the verify_* scripts share; no package is installed here, dpkg and apt-get are small scripts."""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path

import numpy as np
import pytest

sys.path.insert(0, str(Path(__file__).parents[1] / "scripts"))
import proofs

PROOF = proofs.Proof("Vulkan", "llama.cpp", "3", "executed", "Mesa lavapipe 22.3.6", {"layers": 4.0})


@pytest.fixture(autouse=True)
def script(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The script is called verify_this, and its user's cache is a fresh folder."""
    monkeypatch.setattr(sys, "argv", ["scripts/verify_this"])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def programs(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """The only folder on PATH; its dpkg-query knows `present`, whatever it is asked for."""
    folder = tmp_path / "bin"
    folder.mkdir()
    monkeypatch.setenv("PATH", str(folder))
    program(folder, "dpkg-query", 'case "$*" in *present*) printf "install ok installed" ;; *) exit 1 ;; esac')
    return folder


def program(folder: Path, name: str, body: str) -> None:
    (folder / name).write_text(f"#!/bin/sh\n{body}\n")
    (folder / name).chmod(0o755)


def skipped(capsys: pytest.CaptureFixture[str], end: pytest.ExceptionInfo[SystemExit]) -> str:
    """Last line on stderr of a skip."""
    assert end.value.code == 77
    return capsys.readouterr().err.splitlines()[-1]


def test_a_skip_exits_with_77_and_says_why_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as end:
        proofs.skip("needs nvcc")
    assert skipped(capsys, end) == "verify_this: skipped: needs nvcc"


def test_packages_that_are_there_are_not_installed(programs: Path) -> None:
    program(programs, "apt-get", "exit 1")
    proofs.need("present")


def test_missing_packages_are_installed_without_questions(programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: 0)
    program(programs, "apt-get", f'echo "$DEBIAN_FRONTEND $*" >>{programs}/log')
    proofs.need("present", "absent", "lost")
    update, install = (programs / "log").read_text().splitlines()
    assert update == "noninteractive update --quiet"
    assert install == "noninteractive install --yes --quiet --no-install-recommends absent lost"


@pytest.mark.parametrize(
    ("apt", "user", "reason"),
    [
        (None, 0, "needs absent, and this system has no apt-get"),
        ("exit 0", 1000, "next: sudo apt-get install absent"),
        ("echo 'E: Unable to locate package absent' >&2; exit 100", 0, "E: Unable to locate package absent"),
    ],
)
def test_packages_that_cannot_be_installed_are_a_skip_with_the_reason(
    programs: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    apt: str | None,
    user: int,
    reason: str,
) -> None:
    monkeypatch.setattr(os, "geteuid", lambda: user)
    if apt is not None:
        program(programs, "apt-get", apt)
    with pytest.raises(SystemExit) as end:
        proofs.need("present", "absent")
    assert reason in skipped(capsys, end)


def test_a_cache_folder_is_the_users_and_changes_with_each_part_of_its_key(tmp_path: Path) -> None:
    folders = {proofs.cache("wheels", *key) for key in [(), ("1",), ("1", "2"), ("12",), ("2", "1")]}
    assert len(folders) == 5
    assert {folder.parent for folder in folders} == {tmp_path / "cache" / "edgeq"}
    assert proofs.cache("wheels", "1") == proofs.cache("wheels", "1")


def test_a_folder_is_made_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def make(out: Path) -> None:
        calls.append(out)
        (out / "file").write_text("made")

    for _ in range(2):
        folder = proofs.once(tmp_path / "deep" / "folder", make)
        assert (folder / "file").read_text() == "made"
    assert len(calls) == 1
    assert capsys.readouterr().err.count(", once") == 1


def test_a_folder_that_another_run_made_meanwhile_is_taken(tmp_path: Path) -> None:
    folder = tmp_path / "folder"

    def make(out: Path) -> None:
        (out / "file").write_text("ours")
        folder.mkdir()
        (folder / "file").write_text("theirs")

    assert (proofs.once(folder, make) / "file").read_text() == "theirs"


def test_a_folder_that_could_not_be_made_leaves_nothing(tmp_path: Path) -> None:
    def make(out: Path) -> None:
        (out / "half").write_text("")
        raise OSError

    with pytest.raises(OSError):  # noqa: PT011
        proofs.once(tmp_path / "folder", make)
    assert list(tmp_path.iterdir()) == []


def test_a_command_that_fails_is_a_skip_in_its_own_words(capsys: pytest.CaptureFixture[str]) -> None:
    proofs.fetch("true")
    with pytest.raises(SystemExit) as end:
        proofs.fetch("/bin/sh", "-c", "echo no >&2; echo not reached: the index >&2; exit 1")
    assert skipped(capsys, end) == "verify_this: skipped: sh failed: not reached: the index"


@pytest.mark.parametrize(("text", "line"), [("a\nb\n\n", "b"), ("", "it gave no reason"), (" \n", "it gave no reason")])
def test_the_last_line_is_the_last_that_says_something(text: str, line: str) -> None:
    assert proofs.last_line(text) == line


def test_divergence_is_that_of_the_distributions() -> None:
    wanted = np.log(np.array([[0.5, 0.5], [0.9, 0.1]], np.float32))
    found = np.log(np.array([[0.25, 0.75], [0.9, 0.1]], np.float32))
    expected = (0.5 * np.log(0.5 / 0.25) + 0.5 * np.log(0.5 / 0.75)) / 2
    assert proofs.divergence(wanted, found + 7) == pytest.approx(expected, rel=1e-5)
    assert 0 <= proofs.divergence(wanted, wanted + 7) < 1e-12


@pytest.mark.parametrize("save", [False, True])
def test_a_record_is_kept_for_the_readme_only_when_it_is_to_be_saved(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, save: bool
) -> None:
    monkeypatch.setattr(proofs, "SAVED", tmp_path / "saved")
    proofs.record([PROOF], {"mesa": "22.3.6"}, save)
    cached = json.loads((proofs.cache("proofs") / "this.json").read_text())
    assert cached["versions"] == {"mesa": "22.3.6"}
    assert [proofs.Proof(**each) for each in cached["proofs"]] == [PROOF]
    assert (tmp_path / "saved" / "this.json").is_file() == save
