"""What bench_peers makes of its sides' logits and times, on sides that need no peer's environment."""

from __future__ import annotations

import io
import sys
from pathlib import Path
from types import MappingProxyType
from typing import Any

import msgspec
import numpy as np
import pytest
from rich.console import Console
from rich.table import Table

from checkpoints import Build
from edgeq import calibration, data, sources
from edgeq.checkpoint import Checkpoint
from peers import arithmetic, bandwidth, base, build, child, figures, loss, ours, serving, shown, speed, texts
from peers.base import Side, Unavailable
from peers.everyone import PEERS
from peers.llamacpp import reorder
from peers.loss import Loss
from peers.served import Served
from peers.speed import Speed

PROGRAM = """
import numpy as np
from peers import serving
class Engine:
    weights_bytes, read_bytes = 80, 60
    def __init__(self, folder, how, threads):
        print("a library's greeting")
        self.words = (folder / "words").read_text(), how
    def logits(self, ids):
        if self.words[1] != "as run":
            raise SystemExit("no such arithmetic")
        return np.eye(4, dtype=np.float32)[ids]
    def moments(self, ids, tokens):
        if self.words[0] == "short" and tokens > 2:
            raise SystemExit("no more tokens")
        return serving.moments(iter(range(tokens)))
def make(checkpoint, calibration, out, *words):
    if "broken" in words:
        raise SystemExit("it does not export")
    (out / "words").write_text(" ".join(words))
serving.main(make, Engine)
"""


class Small:
    """A peer of four tokens."""

    NAME, PACKAGES, HOWS = "small", ("numpy",), (serving.AS_RUN,)
    RECIPES = SPEED = MappingProxyType({"plain": ("a", "b")})

    def __init__(self, folder: Path) -> None:
        self.FOLDER = folder
        (folder / "program.py").write_text(PROGRAM)

    def python(self) -> Path:
        return Path(sys.executable)


def lost(side: str, bits: float, kl: float, **words: Any) -> Loss:
    given = {"model": "demo", "text": texts.HELD_OUT, "how": serving.AS_RUN} | words
    return Loss(side=side, bits=bits, bytes=1, kl=((kl, kl * 1.1),), **given)


def rendered(table: Table) -> str:
    console = Console(width=250, record=True, file=io.StringIO())
    console.print(table)
    return console.export_text()


def test_the_divergence_is_exact_over_the_vocabulary_and_not_moved_by_a_constant() -> None:
    random = np.random.default_rng(0)
    one, other = random.normal(size=(2, 3, 5, 7)).astype(np.float32)
    p, q = (np.exp(x.astype(np.float64)) / np.exp(x.astype(np.float64)).sum(-1, keepdims=True) for x in (one, other))
    expected = (p * np.log(p / q)).sum(-1).mean(1)
    np.testing.assert_allclose(loss.divergence(one, other), expected, rtol=1e-9)
    np.testing.assert_allclose(loss.divergence(one, one + np.float32(2)), 0, atol=1e-12)


def test_a_rival_has_a_name_of_the_goal_the_same_circumstances_and_no_fewer_bits() -> None:
    mine = lost("edgeq w4@onnx", 5.0, 0.1)
    others = [
        lost("OpenVINO int4 asym g128", 4.6, 0.01),
        lost("OpenVINO int4 asym g32", 5.0 - loss.BITS_APART / 2, 0.4),
        lost("OpenVINO int8", 8.1, 0.001),
        lost("genai builder int4", 5.1, 0.5),
        lost("genai builder int4", 5.1, 0.2, text=texts.FOREIGN),
        Loss(model="demo", text="", how="", side="OpenVINO int4 sym", reason="no"),
    ]
    assert loss.rival(mine, others, loss.FOUR_BITS) == others[1]
    assert loss.rival(mine, others[:1], loss.FOUR_BITS) is None


def test_goals_are_those_of_the_text_the_engine_and_the_arithmetic() -> None:
    found = []
    for how in (serving.AS_RUN, serving.WEIGHTS_ONLY):
        for text in (texts.HELD_OUT, texts.FOREIGN):
            found += [
                lost("edgeq q4_k@llamacpp", 4.7, 0.24, how=how, text=text),
                lost("llama.cpp Q4_K_M", 4.8, 2.0, how=how, text=text),
                lost("llama.cpp Q4_K_M imatrix", 4.8, 1.0, how=how, text=text),
                lost("AutoRound w4g32", 4.9, 0.2, how=how, text=text),
            ]
    rows = list(loss.goals(found))
    assert [(row.goal.limit if row.goal else None, figures.verdict(row)) for row in rows] == [
        (0.3, "met"),
        (0.25, "met"),
        (0.5, "met"),
        (0.5, "met"),
        (0.8, "missed"),
    ]
    assert rows[0].what == "edgeq q4_k@llamacpp against llama.cpp Q4_K_M imatrix"
    assert figures.ratio(rows[0]).value == pytest.approx(0.24)
    assert not list(loss.goals([lost("edgeq w4@onnx", 5, 0.1), lost("llama.cpp Q4_K_M", 4.8, 0.5)]))


def test_losses_of_several_orders_are_averaged_by_window_and_shown_with_their_bits() -> None:
    averaged = Loss(
        model="demo",
        text=texts.HELD_OUT,
        how=serving.AS_RUN,
        side="small",
        bits=4.5,
        bytes=9,
        kl=((0.1, 0.2), (0.3, 0.4)),
    )
    assert averaged.windows == pytest.approx((0.2, 0.3))
    missing = Loss(model="demo", text="", how="", side="MLC q4f32_1", reason="not on the index")
    lines = rendered(shown.losses([averaged, missing])).splitlines()
    assert lines[1].split() == ["demo", "small", "4.500", "0.250000"]
    assert lines[2].split()[-5:] == ["null", "not", "on", "the", "index"]


def test_speeds_leave_the_first_token_out_and_count_the_prompt_by_it() -> None:
    prefill, decode = speed.speeds([2.0], [0.5, 0.6, 0.7, 0.75])
    assert prefill == speed.PROMPT / 2
    assert decode == pytest.approx(3 / 0.25)


def test_speed_is_held_against_the_fastest_peer_and_the_bandwidth() -> None:
    common: dict[str, Any] = {"model": "m", "words": ("x",), "read_bytes": 10**8, "bandwidth": 10**10}
    found = [
        Speed(side="edgeq w4@onnx", decode=(60.0,) * 3, prefill=(100.0,) * 3, **common),
        Speed(side="llama.cpp Q4_0", decode=(50.0,) * 3, prefill=(200.0,) * 3, **common),
        Speed(side="OpenVINO int4", decode=(40.0,) * 3, prefill=(90.0,) * 3, **common),
        Speed(model="m", side="MLC", words=(), reason="not on the index"),
    ]
    rows = list(speed.goals(found))
    assert [figures.ratio(row).value for row in rows] == pytest.approx([1.2, 0.5, 0.6])
    assert [figures.verdict(row) for row in rows] == ["missed"] * 3
    assert {row.what.rpartition(" against ")[2] for row in rows[:2]} == {"llama.cpp Q4_0"}
    (share,) = speed.goals([msgspec.structs.replace(found[0], bandwidths=(12e9, 8e9, 7e9))])
    assert figures.ratio(share).value == pytest.approx(0.75)
    lines = rendered(shown.speeds(found)).splitlines()
    assert "60%" in lines[1]
    assert "not on the index" in lines[4]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_side_makes_and_serves_in_its_own_process(tmp_path: Path) -> None:
    side = Side(Small(tmp_path), "plain", ("a", "b"))
    side.make(tmp_path, tmp_path, tmp_path)
    assert (tmp_path / "words").read_text() == "a b"
    np.save(tmp_path / "windows.npy", np.array([[0, 3], [2, 1]], np.int32))
    with Served(side.run(tmp_path, serving.AS_RUN), side.environment()) as served:
        assert (served.weights_bytes, served.read_bytes) == (80, 60)
        logits = served.logits(tmp_path / "windows.npy", tmp_path)
        np.testing.assert_array_equal(logits.argmax(-1), [[0, 3], [2, 1]])
        assert len(served.moments([1, 2], 5)) == 5
        assert (served.peak.rss_bytes or 0) > (served.peak.anonymous_bytes or 0) > 0


def test_a_side_that_fails_says_so_in_its_last_words(tmp_path: Path) -> None:
    side = Side(Small(tmp_path), "odd", ("broken",))
    with pytest.raises(Unavailable, match="it does not export"):
        side.make(tmp_path, tmp_path, tmp_path)
    (tmp_path / "words").write_text("")
    np.save(tmp_path / "windows.npy", np.zeros((1, 2), np.int32))
    with (
        Served(side.run(tmp_path, serving.WEIGHTS_ONLY), side.environment()) as served,
        pytest.raises(Unavailable, match="exit code 1: no such arithmetic"),
    ):
        served.logits(tmp_path / "windows.npy", tmp_path)


def test_the_reason_is_the_error_and_not_the_progress_bar_after_it() -> None:
    assert base.reason("Traceback\nRuntimeError: no mask\n 75% |###  | 3/4\n") == "RuntimeError: no mask"
    assert base.reason("a warning\nlast words\n") == "last words"
    assert base.reason("") == "it gave no reason"


def test_every_peer_has_what_the_comparison_asks_for() -> None:
    for peer in PEERS.values():
        assert set(peer.HOWS) <= {serving.AS_RUN, serving.WEIGHTS_ONLY}
        assert peer.RECIPES
        assert (peer.FOLDER / "program.py").is_file() or peer.NAME == "MLC"
    with pytest.raises(Unavailable):
        PEERS["mlc"].python()
    assert ours.side("q4_k-eq6_k-gptq@llamacpp").words == ("q4_k-eq6_k-gptq", "llamacpp")
    assert ours.side("w4g32-e8-gptq@onnx:self").words == ("w4g32-e8-gptq", "onnx", "self")


@pytest.mark.parametrize("name", ["openvino", "autoround"])
def test_environments_are_pinned_to_the_last_package(name: str) -> None:
    lines = (PEERS[name].FOLDER / "requirements.txt").read_text().splitlines()
    assert all(line.count("==") == 1 for line in lines)
    assert set(PEERS[name].PACKAGES) <= {line.partition("==")[0] for line in lines}


@pytest.mark.slow
def test_an_environment_that_cannot_be_made_says_why(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    (tmp_path / "requirements.txt").write_text("")
    with pytest.raises(Unavailable, match=r"odd's environment: .*no_such_module"):
        base.virtual_environment("odd", tmp_path / "requirements.txt", "no_such_module")
    assert not list((tmp_path / "edgeq").glob("peer-odd-*"))


def test_calibration_text_holds_no_drill_of_the_held_out_text() -> None:
    known = set(texts.CALIBRATION.read_text(encoding="utf-8").splitlines())
    drills = {
        line for line in data.held_out().splitlines() if line.startswith(("Sort ", "Reverse ", "Copy ", "Close "))
    }
    assert len(drills) > 50
    assert not drills & known


def test_edgeq_and_its_peers_calibrate_with_the_same_windows(tmp_path: Path) -> None:
    made = Checkpoint.open(sources.find("demo-qwen3", offline=True).folder)
    copy = loss._plain(reorder.write(made, 1, tmp_path / "copy"))
    found = calibration.read(copy, str(texts.CALIBRATION), False, calibration.LENGTH, lambda *_: None, tuned=True)
    assert len(found.windows) > calibration.WINDOWS
    np.testing.assert_array_equal(found.windows, texts.calibration_windows(made))


def test_sampled_windows_are_the_model_s_own_and_the_same_each_time(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    checkpoint = Checkpoint.open(tiny("3"))
    starts = np.arange(64, dtype=np.int32).reshape(2, 32)
    monkeypatch.setattr(texts, "calibration_windows", lambda _, tuned: starts)
    monkeypatch.setattr(texts, "LENGTH", 6)
    found = texts.sampled(checkpoint, 3)
    assert found.shape == (3, 6)
    np.testing.assert_array_equal(found, texts.sampled(checkpoint, 3))
    assert (found < checkpoint.model.vocab).all()


@pytest.mark.slow
def test_importance_is_the_mean_square_of_each_input(tiny: Build) -> None:
    pytest.importorskip("llama_cpp")
    import torch

    from edgeq import transformer
    from peers.llamacpp.program import mean_squares

    checkpoint = Checkpoint.open(tiny("3"))
    windows = np.array([[5, 9, 60, 17], [8, 1, 2, 3]], np.int32)
    found = mean_squares(checkpoint, windows)
    model = transformer.instantiate(checkpoint, lambda _: True)
    with torch.inference_mode():
        embedded = model.model.embed_tokens(torch.from_numpy(windows.astype(np.int64)))
        normed = model.model.layers[0].input_layernorm(embedded)
    expected = normed.square().mean(dim=(0, 1)).numpy()
    np.testing.assert_allclose(found["blk.0.attn_q.weight"], expected, rtol=1e-5)
    assert "token_embd.weight" not in found
    assert len(found) == 7 * checkpoint.model.layers


def test_graphs_are_weighed_without_caches_and_made_to_multiply_floats(tmp_path: Path) -> None:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    def tensor(name: str, size: int, kind: Any) -> Any:
        return numpy_helper.from_array(np.zeros(size, kind), name)

    node = helper.make_node("MatMulNBits", ["x", "codes", "scales"], ["y"], accuracy_level=4, domain="com.microsoft")
    gather = helper.make_node("Gather", ["table", "ids"], ["z"])
    tensors = [
        tensor("codes", 40, np.uint8),
        tensor("scales", 5, np.float32),
        tensor("table", 25, np.float16),
        tensor("cos_cache", 999, np.float32),
    ]
    value = helper.make_tensor_value_info("x", TensorProto.FLOAT, [1])
    (tmp_path / "made").mkdir()
    onnx.save(
        helper.make_model(helper.make_graph([node, gather], "g", [value], [value], tensors)), tmp_path / "made/m.onnx"
    )
    assert arithmetic.onnx_bytes(tmp_path / "made/m.onnx") == (110, 60)
    changed = onnx.load(arithmetic.float_onnx(tmp_path / "made") / "m.onnx")
    assert changed.graph.node[0].attribute[0].i == 1


def test_the_bandwidth_is_one_of_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bandwidth, "_BYTES", 1 << 20)
    assert bandwidth.measure(1) > 0


def test_costs_that_neither_side_has_are_left_out() -> None:
    pairs = [build.Build(child.Cost(wall, 1.0, 5, 4, 0.1), 10, 0) for wall in (1.0, 3.0)]
    rows = list(build.compare("build", pairs[:1], pairs[1:], build.BUILDER))
    assert "disk beside it" not in [row.what for row in rows]
    assert [figures.verdict(row) for row in rows if row.goal] == ["met", "met"]


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_side_that_dies_between_rounds_is_named_and_the_others_go_on(tmp_path: Path, tiny: Build) -> None:
    folders = [tmp_path / name for name in ("one", "two")]
    for folder in folders:
        folder.mkdir()
    sides = [
        Side(Small(folder), folder.name, words) for folder, words in zip(folders, (("a",), ("short",)), strict=True)
    ]
    found = {each.side: each for each in speed.measure(sides, Checkpoint.open(tiny("3")), "m", tmp_path, 2)}
    assert len(found["small one"].decode) == 2
    assert found["small two"].reason == "exit code 1: no more tokens"
    assert not found["small two"].decode
