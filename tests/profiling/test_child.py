from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import msgspec
import pytest

from edgeq import bundle
from edgeq.backends.null import NullSession
from edgeq.errors import UsageFault
from edgeq.profiles import Energy
from edgeq.profiling import child, energy, messages
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


def _energy_of_a_short_prompt(folder: Path, monkeypatch: pytest.MonkeyPatch, sensor: energy.Sensor) -> Energy:
    monkeypatch.setattr(energy, "find", lambda: (sensor, None))
    job = messages.SpeedJob(folder=str(folder), prompts=(8,), tokens=4, depths=(0,), repetitions=1)
    return child.speed(job, lambda message: None).energy


def test_prompts_are_repeated_until_an_energy_counter_can_tell(
    null_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    counter = energy.Sensor("counter", "all", lambda: (10 * time.perf_counter(),), (1e9,))
    found = _energy_of_a_short_prompt(null_bundle, monkeypatch, counter)
    assert 0 < (found.prefill_j_per_token or 0) < 10 * 0.2 / 8
    assert (found.reason or "").startswith("decode: ")


def test_energy_of_a_prompt_is_not_guessed_from_power_around_it(
    null_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rail = energy.Sensor("rail", "all", lambda: (time.perf_counter(),), ())
    found = _energy_of_a_short_prompt(null_bundle, monkeypatch, rail)
    assert found.prefill_j_per_token is None
    assert "prefill: power can be read only before and after a prompt" in (found.reason or "")


def test_a_session_that_cannot_take_tokens_back_is_not_asked_to(
    null_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(NullSession, "one_way", "it only counts")
    job = messages.SpeedJob(folder=str(null_bundle), prompts=(8,), tokens=4, depths=(0,), repetitions=1)
    found = child.speed(job, lambda message: None)
    assert (found.guessed, found.guessed_reason) == ((), "it only counts")


def test_configurations_are_each_prompt_and_each_depth() -> None:
    job = messages.SpeedJob(folder="", prompts=(128, 512), tokens=64, depths=(0, 256), repetitions=1)
    assert child.configurations(job) == [
        Configuration("prefill", 128, 0),
        Configuration("prefill", 512, 0),
        Configuration("decode", 64, 0),
        Configuration("decode", 64, 256),
    ]
