from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import msgspec
import pytest

from edgeq import bundle
from edgeq.errors import UsageFault
from edgeq.profiling import child, messages
from edgeq.profiling.repetitions import Configuration


def _ask(request: bytes) -> list[messages.Answer | messages.Progress]:
    """Messages of a child; every line of its stdout must be one."""
    done = subprocess.run(
        [sys.executable, "-m", "edgeq.profiling.child"], input=request, capture_output=True, check=True
    )
    kinds = messages.Answer | messages.Progress
    return [msgspec.json.decode(line, type=kinds) for line in done.stdout.splitlines()]


def test_answer_is_the_last_line(null_bundle: Path) -> None:
    job = messages.AccuracyJob(folder=str(null_bundle), reference=str(null_bundle / bundle.REFERENCE))
    *progress, answer = _ask(msgspec.json.encode(job))
    assert isinstance(answer, messages.Loss)
    assert answer.accuracy.kl_mean < 1e-9
    assert [(one.done, one.total) for one in progress if isinstance(one, messages.Progress)] == [
        (1, 4),
        (2, 4),
        (3, 4),
        (4, 4),
    ]


@pytest.mark.parametrize("request_", [b"", b"{}", b'{"type": "SpeedJob"}', b'{"type": "Other"}'])
def test_a_bad_request_is_a_fault(request_: bytes) -> None:
    (answer,) = _ask(request_)
    assert isinstance(answer, messages.Fault)
    assert answer.kind == "BackendFault"


def test_an_error_of_edgeq_keeps_its_class(tmp_path: Path) -> None:
    (answer,) = _ask(msgspec.json.encode(messages.ColdJob(folder=str(tmp_path))))
    assert isinstance(answer, messages.Fault)
    assert answer.kind == UsageFault.__name__
    assert answer.run


def test_a_cold_load_has_a_time_or_a_reason(null_bundle: Path) -> None:
    found = child.cold(null_bundle)
    assert (found.seconds is None) == (found.reason is not None)


def test_configurations_are_each_prompt_and_each_depth() -> None:
    job = messages.SpeedJob(folder="", prompts=(128, 512), tokens=64, depths=(0, 256), repetitions=1)
    assert child.configurations(job) == [
        Configuration("prefill", 128, 0),
        Configuration("prefill", 512, 0),
        Configuration("decode", 64, 0),
        Configuration("decode", 64, 256),
    ]
