from __future__ import annotations

import os
from pathlib import Path

import pytest

from edgeq.errors import BackendFault, BackendKilled, EdgeqError, MissingTool, OutOfMemory
from edgeq.profiling import messages, process

_IMPOSTOR = """
import os, signal, sys, time
from edgeq.backends.null import NullSession
from edgeq.errors import MissingTool

def load(folder, bundle):
    print("noise on stdout", flush=True)
    os.write(1, b"noise below Python\\n")
    return Session(bundle.config["vocab_size"])

class Session(NullSession):
    def generate(self, ids, tokens):
        if {when} <= len(ids):
            {what}
        return super().generate(ids, tokens)
"""
_TAKEOVER = "from edgeq import backends\nbackends._MODULES['null'] = 'impostor'\n"


def _children(timeout_s: float = 60.0) -> process.Children:
    return process.Children(lambda label, done, total: None, 2 << 30, timeout_s)


def _speed(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, when: int = 0, timeout_s: float = 60.0
) -> messages.Speed:
    """Run a child whose null backend does `what` when it is asked to read at least `when` tokens."""
    (tmp_path / "impostor.py").write_text(_IMPOSTOR.format(what=what, when=when))
    (tmp_path / "sitecustomize.py").write_text(_TAKEOVER)
    monkeypatch.setenv("PYTHONPATH", f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}")
    job = messages.SpeedJob(folder=str(folder), prompts=(8,), tokens=4, depths=(0, 9), repetitions=1)
    return _children(timeout_s).run(job, messages.Speed)


def test_what_the_engine_prints_does_not_disturb(
    null_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert _speed(null_bundle, tmp_path, monkeypatch, "pass").repetitions


def test_telemetry_is_off_in_the_child(null_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("ORT_DISABLE_TELEMETRY", raising=False)
    assert _speed(null_bundle, tmp_path, monkeypatch, "assert os.environ['ORT_DISABLE_TELEMETRY'] == '1'").repetitions


def test_a_killed_child_names_the_signal_and_the_peak(
    null_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(BackendKilled, match="SIGKILL") as caught:
        _speed(null_bundle, tmp_path, monkeypatch, "os.kill(os.getpid(), signal.SIGKILL)", when=9)
    assert "MiB, the machine has 2048 MiB." in caught.value.why


def test_a_hanging_child_is_stopped(null_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(BackendKilled, match="stopped after 1 s"):
        _speed(null_bundle, tmp_path, monkeypatch, "signal.pause()", timeout_s=1)


@pytest.mark.parametrize(
    ("what", "kind", "words"),
    [
        ("raise MissingTool('no engine', why='not installed', run='pip install it')", MissingTool, "pip install it"),
        ("raise ValueError('bad shape')", BackendFault, "ValueError: bad shape"),
        ("raise MemoryError", OutOfMemory, "memory ran out"),
        ("print('last words', file=sys.stderr); os._exit(3)", BackendFault, "exit code 3 and no result\nlast words"),
        ("os._exit(0)", BackendFault, "exit code 0 and no result"),
    ],
    ids=["own", "other", "memory", "exit", "silent"],
)
def test_errors_come_back(
    null_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, what: str, kind: type[EdgeqError], words: str
) -> None:
    with pytest.raises(kind) as caught:
        _speed(null_bundle, tmp_path, monkeypatch, what)
    assert words in str(caught.value)


def test_a_failing_progress_ends_the_child(null_bundle: Path) -> None:
    def interrupt(label: str, done: int, total: int) -> None:
        raise KeyboardInterrupt

    job = messages.SpeedJob(folder=str(null_bundle), prompts=(8,), tokens=4, depths=(0,), repetitions=1)
    with pytest.raises(KeyboardInterrupt):
        process.Children(interrupt, None, 60.0).run(job, messages.Speed)
