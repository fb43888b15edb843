from __future__ import annotations

import msgspec
import pytest

from edgeq.profiles import Placement, Repetition
from edgeq.profiling import rows
from edgeq.profiling.messages import Timed


def _timed(phase: str, seconds: float, *, depth: int = 0, reason: str | None = None, events: int | None = 0) -> Timed:
    repetition = Repetition(
        phase=phase, tokens=100, depth=depth, seconds=seconds, tokens_per_s=100 / seconds, wait=0.01, steal=None,
        throttled=None, temperature_c=40.0, clock_hz=10, throttle_events=events, valid=reason is None, reason=reason,
    )  # fmt: skip
    gaps = (seconds / 2,) * 2 if phase == "decode" else ()
    return Timed(repetition=repetition, attempt=0, first_token=1, gaps_s=gaps, tokenization_s=None)


_STEADY = [_timed("prefill", 1.0)] * 5 + [_timed("decode", 2.0)] * 5
_CONTENDED = [_timed("decode", 9.0, reason="40% waited for a core")] * 2


def _verdict(done: list[Timed], wanted: int = 5) -> tuple[bool, str, tuple[str, ...]]:
    groups = [group for phase in ("prefill", "decode") for group in rows.counting(done, phase, wanted)]
    return rows.verdict(groups, done, wanted, [], "cpu")


def test_disturbed_repetitions_do_not_count_while_enough_others_do() -> None:
    (group,) = rows.counting([*_CONTENDED, *_STEADY], "decode", 5)
    assert [one.repetition.seconds for one in group] == [2.0] * 5
    (row,) = rows.decode([group])
    assert (row.tokens_per_s.median, row.gap_s.p50) == (50.0, 1.0)
    assert _verdict([*_CONTENDED, *_STEADY]) == (True, "A", ())


def test_a_device_that_the_processor_imitates_is_never_comparable() -> None:
    imitated = Placement(provider="vulkan", device="llvmpipe", layers=5, bytes=1, software=True)
    steady = _STEADY[:5]
    reason = "llvmpipe is no real device: its speed says nothing"
    assert rows.verdict([steady], steady, 5, [], "vulkan") == (True, "A", ())
    assert rows.verdict([steady], steady, 5, [imitated], "vulkan") == (True, "C", (reason,))


def test_too_few_undisturbed_are_reported_all_and_not_valid() -> None:
    done = _STEADY[:9] + _CONTENDED
    (group,) = rows.counting(done, "decode", 5)
    assert len(group) == 6
    valid, grade, reasons = _verdict(done)
    assert (valid, grade) == (False, "C")
    assert reasons == ("contended: 2 of 11 repetitions were disturbed, the last: 40% waited for a core",)


@pytest.mark.parametrize("cause", ["30% stolen", "20% throttled by a CPU quota", "the machine slept for 30.0 s"])
def test_too_few_undisturbed_name_what_disturbed(cause: str) -> None:
    (reason,) = _verdict([_timed("prefill", 1.0), _timed("prefill", 1.0, reason=cause)], 2)[2]
    assert reason == f"contended: 1 of 2 repetitions were disturbed, the last: {cause}"


def test_configurations_are_ordered_by_depth() -> None:
    done = [_timed("decode", 1.0, depth=64), _timed("decode", 1.0)]
    assert [row.depth for row in rows.decode(rows.counting(done, "decode", 1))] == [0, 64]


def test_throttling_costs_the_best_grade() -> None:
    assert _verdict([*_STEADY, _timed("decode", 2.0, events=4)]) == (True, "B", ("4 throttle events",))


def test_a_varying_figure_is_named() -> None:
    assert _verdict([*_STEADY, _timed("decode", 3.0)]) == (True, "C", ("decode at depth 0 varies by 14.4%",))


def test_few_repetitions_are_valid_but_not_comparable() -> None:
    valid, grade, reasons = _verdict([_timed("prefill", 1.0)] * 2, 2)
    assert (valid, grade) == (True, "C")
    assert reasons == ("prefill of 100: 2 repetitions; 5 are needed to compare",)


def test_throttling_that_cannot_be_seen_costs_the_best_grade_too() -> None:
    blind = [_timed("prefill", 1.0, events=None)] * 5
    assert _verdict(blind) == (True, "B", ("throttling cannot be seen here",))


def test_first_token_says_whether_it_starts_from_text() -> None:
    ids, text = _timed("prefill", 1.0), msgspec.structs.replace(_timed("prefill", 1.0), tokenization_s=0.5)
    assert rows.first_token([[ids]], 100)[0].median == 1.0
    assert rows.first_token([[ids]], 100)[1] == "ids"
    assert rows.first_token([[text]], 100)[0].median == pytest.approx(1.5)
    assert rows.first_token([[text]], 100)[1] == "text"


def test_health_is_the_worst_of_all() -> None:
    found = rows.health([*_CONTENDED, _timed("decode", 1.0, events=2)], "no readable clock in sysfs")
    assert (found.wait, found.steal, found.temperature_c, found.throttle_events) == (0.01, None, 40.0, 2)
    assert found.reason == "no readable clock in sysfs"
    assert len(found.repetitions) == 3


@pytest.mark.parametrize(("there", "here"), [(0, 25), (13, 12)])
def test_layers_that_ran_elsewhere_make_no_measurement_of_the_device(there: int, here: int) -> None:
    placement = [
        Placement(provider="cuda", device="Orin", layers=there, bytes=1),
        Placement(provider="cpu", device="CPU", layers=here, bytes=1),
    ]
    steady = _STEADY[:5]
    reason = f"{here} of 25 layers did not run on cuda, which the bundle is made for"
    assert rows.verdict([steady], steady, 5, placement, "cuda") == (False, "C", (reason,))
    assert rows.verdict([steady], steady, 5, placement[:1], "cuda") == (True, "A", ())
