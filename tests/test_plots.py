from __future__ import annotations

import msgspec

from edgeq import plots
from edgeq.recommending.document import Candidate, Constraints, Recommendation
from recommended import candidate


def document(*given: Candidate) -> Recommendation:
    return Recommendation(
        target="somewhere",
        context=4096,
        constraints=Constraints(),
        choice=None,
        closest=None,
        excluded={},
        rule="",
        notes=(),
        candidates=given,
    )


def test_the_choice_the_front_and_the_others_have_marks_of_their_own() -> None:
    choice = candidate(score=80, tps=10, verdict="chosen", front=True)
    quick = candidate("qwen3-0.6b", score=40, tps=100, verdict="eligible", front=True)
    other = candidate("qwen3-1.7b", score=50, tps=20, verdict="eligible")
    hidden = candidate("qwen3-8b", score=90, tps=1)
    drawn = plots.front(document(choice, quick, other, hidden))
    picture, legend = drawn.split(" tokens/s\n", 1)
    rows = [line.partition("|")[2] for line in picture.splitlines() if "|" in line]
    assert rows[0].startswith("*")
    assert rows[-1].endswith("a")
    assert sum(row.count(".") for row in rows) == 1
    assert "* qwen3-4b" in legend
    assert ": ~10.0 tokens/s, quality ~80.0" in legend
    assert "a qwen3-0.6b" in legend
    assert "qwen3-8b" not in drawn
    assert "80 |" in picture
    assert "40 |" in picture


def test_the_legend_tells_estimates_from_what_was_measured() -> None:
    choice = candidate(score=80, tps=10, verdict="chosen", front=True, evidence="measured")
    quick = candidate("qwen3-0.6b", score=40, tps=100, verdict="eligible", front=True)
    legend = plots.front(document(choice, quick)).splitlines()
    assert any(line.startswith("* ") and line.endswith(": 10.0 tokens/s, quality ~80.0") for line in legend)
    assert any(line.startswith("a ") and line.endswith(": ~100.0 tokens/s, quality ~40.0") for line in legend)


def test_one_point_is_a_plot_too() -> None:
    assert "*" in plots.front(document(candidate(verdict="chosen", front=True)))


def test_nothing_to_draw_is_said_in_words() -> None:
    assert plots.front(document()).startswith("nothing to draw")
    unknown = msgspec.structs.replace(candidate(verdict="chosen"), decode_tokens_per_s=None)
    assert plots.front(document(unknown)).startswith("nothing to draw")


def test_a_picture_is_as_narrow_as_the_terminal() -> None:
    choice = candidate(score=80, tps=10, verdict="chosen", front=True)
    quick = candidate("qwen3-0.6b", score=40, tps=100, verdict="eligible", front=True)
    for columns, widest in ((200, 74), (60, 60), (5, 34)):
        drawn = plots.front(document(choice, quick), columns).split(" tokens/s\n", 1)[0] + " tokens/s"
        assert max(map(len, drawn.splitlines())) == widest
