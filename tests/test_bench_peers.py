"""What scripts/bench_peers derives from its samples; nothing is timed against anything here."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

from checkpoints import Build
from edgeq.checkpoint import Checkpoint
from peers import child, figures
from peers.figures import Goal, Row

SCRIPTS = Path(__file__).parents[1] / "scripts"
AT_MOST = Goal("ratio", "at most", 0.7)
ALLOCATE = "import time; block = b'1' * {size}; time.sleep(0.3)"


def row(edgeq: tuple[float, ...], peer: tuple[float, ...], goal: Goal | None = AT_MOST, **words: Any) -> Row:
    return Row(part="build", what="wall time", unit="s", edgeq=edgeq, peer=peer, goal=goal, **words)


def test_the_ratio_is_the_median_of_paired_ratios_or_that_of_the_means() -> None:
    edgeq, peer = (1.0, 4.0, 9.0), (2.0, 4.0, 3.0)
    assert figures.ratio(row(edgeq, peer)).value == 1.0
    assert figures.ratio(row(edgeq, peer, middle="mean")).value == pytest.approx(14 / 9)
    assert figures.middle(row(edgeq, peer), edgeq) == 4.0


def test_the_interval_holds_the_ratio_and_is_a_point_for_one_pair() -> None:
    samples = np.random.default_rng(0).normal(10, 0.1, 30)
    found = figures.ratio(row(tuple(samples * 1.02), tuple(samples)))
    assert found.low == pytest.approx(found.high) == pytest.approx(1.02)
    noisy = figures.ratio(row(tuple(samples), tuple(samples[::-1])))
    assert noisy.low < noisy.value < noisy.high
    assert figures.ratio(row((3.0,), (4.0,))) == figures.Ratio(0.75, 0.75, 0.75)


@pytest.mark.parametrize(
    ("edgeq", "goal", "expected"),
    [
        ((6.0, 6.0, 6.0), AT_MOST, "met"),
        ((8.0, 8.0, 8.0), AT_MOST, "missed"),
        ((6.0, 8.0, 8.0), AT_MOST, "within noise"),
        ((9.95, 9.95, 9.95), Goal("ratio", "at least", 0.99), "met"),
        ((9.8, 9.8, 9.8), Goal("ratio", "at least", 0.99), "missed"),
        ((8.0, 8.0, 8.0), Goal("edgeq", "at most", 8), "met"),
        ((8.0, 8.1, 8.1), Goal("edgeq", "at most", 8), "missed"),
        ((8.0, 8.0, 8.0), None, ""),
        ((float("nan"),) * 3, AT_MOST, "missed"),
    ],
)
def test_verdicts(edgeq: tuple[float, ...], goal: Goal | None, expected: str) -> None:
    assert figures.verdict(row(edgeq, (10.0, 10.0, 10.0), goal)) == expected


def test_the_table_names_both_sides_goal_and_load() -> None:
    console = Console(width=200, record=True, file=io.StringIO())
    rows = [row((6.0, 6.0, 6.2), (10.0, 10.0, 10.0), load=(0.5, 2.0, 1.0)), row((1.0,), (4.0,), None)]
    console.print(figures.table(rows))
    heading, part, first, second = console.export_text().splitlines()
    assert heading.split()[:3] == ["what", "edgeq", "peer"]
    assert part.strip() == "build"
    assert "0.6000" in first
    assert "at most 0.7x" in first
    assert "met" in first
    assert "0.5 to 2.0" in first
    assert second.split() == ["wall", "time", "1", "s", "4", "s", "0.2500"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_s_anonymous_memory_is_seen() -> None:
    size = 64 << 20
    small = child.run([sys.executable, "-c", ALLOCATE.format(size=1)], os.environ)
    large = child.run([sys.executable, "-c", ALLOCATE.format(size=size)], os.environ)
    for grown in (
        large.peak_anonymous_bytes - small.peak_anonymous_bytes,
        large.peak_rss_bytes - small.peak_rss_bytes,
    ):
        assert abs(grown - size) < 4 << 20


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_child_that_fails_says_why() -> None:
    with pytest.raises(RuntimeError, match=r"exit code 3\nno disk"):
        child.run([sys.executable, "-c", "print('no disk'); raise SystemExit(3)"], os.environ)


def test_steps_in_turn_add_their_times_and_share_their_peak() -> None:
    steps = [child.Cost(2.0, 1.5, 100, 80, 0.5), child.Cost(1.0, 1.5, 300, 20, 0.7)]
    assert child.one_after_the_other(steps) == child.Cost(3.0, 3.0, 300, 80, 0.7)


def test_the_help_needs_no_model(tmp_path: Path) -> None:
    command = [sys.executable, str(SCRIPTS / "bench_peers"), "--help"]
    shown = subprocess.run(command, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert "--repetitions" in shown
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_another_order_of_hidden_units_computes_the_same(tiny: Build, tmp_path: Path, generation: str) -> None:
    import torch

    from edgeq import transformer
    from peers.llamacpp import reorder

    checkpoint = Checkpoint.open(tiny(generation))
    logits = []
    for seed in (0, 1):
        made = reorder.write(checkpoint, seed, tmp_path / str(seed))
        with torch.inference_mode():
            model = transformer.instantiate(made, lambda _: True)
            logits.append(model(input_ids=torch.tensor([[5, 9, 60, 17]])).logits.numpy())
    np.testing.assert_allclose(logits[0], logits[1], atol=2e-5)
    tables = [Checkpoint.open(tmp_path / seed).tensor("model.embed_tokens.weight") for seed in "01"]
    assert (tables[0] != tables[1]).any()


def test_blocks_are_taken_apart_and_compared(tiny: Build, tmp_path: Path) -> None:
    """The same rule twice is equal in every block; a file of 4 bits against one of 8 is another layout."""
    pytest.importorskip("llama_cpp")
    from peers.llamacpp import files
    from peers.llamacpp.programs.edgeq_write import write

    checkpoint = Checkpoint.open(tiny("3"))
    made = {}
    for name in ("f32", "w4g32-e8-rtn", "w8g32-e8-rtn"):
        (tmp_path / name).mkdir()
        write(checkpoint, name, tmp_path / name)
        made[name] = tmp_path / name / files.MODEL
    four, eight = made["w4g32-e8-rtn"], made["w8g32-e8-rtn"]
    files.require_one_layout(four, four)
    with pytest.raises(RuntimeError, match="the files differ"):
        files.require_one_layout(four, eight)
    blocks, same = files.same_blocks(four, four, "Q4_0")
    assert blocks == same > 0
    for file, kind, bits in ((four, "Q4_0", 4), (eight, "Q8_0", 8)):
        found = files.against_weights(file, file, kind, made["f32"])
        assert found.different_codes == found.nearer == 0
        assert found.same_scales == found.blocks
        assert found.codes == 32 * found.blocks
        assert 0 < found.first_error == found.second_error < found.codes * 4.0**-bits


def test_ggml_rounds_as_its_quantizer_does_and_edgeq_s_codes_are_nearer(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Layouts with blocks of 256 do not fit the tiny checkpoint."""
    pytest.importorskip("llama_cpp")
    from peers.llamacpp import layout

    monkeypatch.setattr(layout, "GGML", {"q4_1-e8-rtn": "Q4_1", "iq4_nl-e8-rtn": "IQ4_NL"})
    rows = list(layout.block_rows("layout", Checkpoint.open(tiny("3")), tmp_path))
    assert {figures.verdict(each) for each in rows if each.goal} == {"met"}
    assert sum(each.edgeq == each.peer for each in rows) >= 3


def test_readmes_tables_are_those_of_the_reports_that_are_kept() -> None:
    files = sorted((SCRIPTS.parent / "profiles" / "peers").rglob("*.json"))
    assert files
    words = [word for file in files for word in ("--show", str(file))]
    command = [sys.executable, str(SCRIPTS / "bench_peers"), *words]
    printed = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    readme = (SCRIPTS.parent / "README.md").read_text(encoding="utf-8")
    section = readme[readme.index("## Against its peers") :].partition("\n## ")[0]
    shown = [line for block in section.split("```")[1::2] for line in block.strip().splitlines()]
    known = {" ".join(line.split()) for line in printed.splitlines()}
    assert shown
    assert [line for line in shown if " ".join(line.split()) not in known] == []
