from __future__ import annotations

import hashlib
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from numpy.typing import NDArray
from tokenizers import Tokenizer

import checkpoints
from checkpoints import Build, quiet
from edgeq import building, bundle, calibration, data, planning, store
from edgeq.backends.base import Progress
from edgeq.calibration import Calibration
from edgeq.checkpoint import Checkpoint
from edgeq.errors import CorruptInput, DiskFault, GateFailed, Interrupted, UsageFault
from edgeq.walk import gradients
from edgeq.walk.layered import Layered

DEMO = (data.folder("demo") / "calibration.txt").read_text(encoding="utf-8")


def read(checkpoint: Checkpoint, source: str | Path, demo: bool = False, longest: int = 64) -> Calibration:
    return calibration.read(checkpoint, str(source), demo, longest, quiet)


@pytest.fixture
def checkpoint(tiny: Build) -> Checkpoint:
    return Checkpoint.open(tiny("3"))


def test_the_demos_text_shares_no_task_with_the_held_out_text() -> None:
    held = data.held_out()
    assert hashlib.sha256(DEMO.encode()).digest() != hashlib.sha256(held.encode()).digest()
    lines, others = ({line for line in text.split("\n") if len(line) > 60} for text in (held, DEMO))
    assert lines
    assert others
    assert not lines & others


def test_the_bundled_text_of_a_demo_is_cut_into_windows_from_start_to_end(checkpoint: Checkpoint) -> None:
    found = read(checkpoint, "bundled", demo=True)
    assert found.windows.shape == (calibration.WINDOWS, 64)
    assert found.sha256 == hashlib.sha256(DEMO.encode()).hexdigest()
    assert found.source == "bundled"
    ids = Tokenizer.from_file(str(checkpoint.folder / "tokenizer.json")).encode(DEMO).ids
    assert found.windows[0].tolist() == ids[:64]
    assert found.windows[-1].tolist() == ids[-64:]


@pytest.mark.parametrize("file", sorted(data.folder("texts").iterdir()), ids=lambda file: file.name)
def test_a_shipped_text_is_utf8_and_no_mere_fragment(file: Path) -> None:
    assert file.suffix == ".txt"
    assert len(file.read_text(encoding="utf-8")) > 2000


def test_the_shipped_texts_fill_every_window_of_other_checkpoints(checkpoint: Checkpoint) -> None:
    found = read(checkpoint, "bundled", longest=calibration.LENGTH)
    assert found.windows.shape == (calibration.WINDOWS, calibration.LENGTH)


def test_a_text_that_fills_all_windows_is_taken_without_a_note() -> None:
    for count, short in ((1, True), (calibration.WINDOWS - 1, True), (calibration.WINDOWS, False)):
        found = Calibration(np.zeros((count, 64), np.int32), "text", "")
        assert (found.note is not None) == short


def test_a_file_and_a_folder_of_files_in_the_order_of_their_names(checkpoint: Checkpoint, tmp_path: Path) -> None:
    for name, text in (("b.md", "second " * 40), ("a.txt", "first " * 40), ("c.bin", "third " * 40)):
        (tmp_path / name).write_text(text, encoding="utf-8")
    one = read(checkpoint, tmp_path / "a.txt", demo=True)
    assert one.sha256 == hashlib.sha256(b"first " * 40).hexdigest()
    assert one.source == str(tmp_path / "a.txt")
    assert len(one.windows) == 3
    both = read(checkpoint, tmp_path, demo=True)
    assert both.sha256 == hashlib.sha256(b"first " * 40 + b"\n\n" + b"second " * 40).hexdigest()


def test_every_other_piece_is_a_question_and_its_answer_in_the_template(checkpoint: Checkpoint, tmp_path: Path) -> None:
    paragraphs = [f"paragraph {number} " + "word " * 100 for number in range(30)]
    (tmp_path / "text.md").write_text("\n\n".join(paragraphs), encoding="utf-8")
    pieces = list(calibration._as_chat("\n\n".join(paragraphs), checkpoint.chat_template() or ""))
    assert [piece.startswith("<|im_start|>user\n") for piece in pieces] == [
        turn % 2 == 1 for turn in range(len(pieces))
    ]
    assert len(pieces) > 3
    for number, paragraph in enumerate(paragraphs):
        assert sum(f"paragraph {number} " in piece for piece in pieces) == 1, paragraph
    question, _, answer = pieces[1].partition("<|im_end|>")
    assert question.count("paragraph") == 1
    assert answer.startswith("\n<|im_start|>assistant\nparagraph")
    found = read(checkpoint, tmp_path / "text.md", longest=512)
    assert 257 in found.windows
    assert 257 not in read(checkpoint, tmp_path / "text.md", demo=True, longest=512).windows


def test_what_the_model_itself_writes_is_the_same_each_time(checkpoint: Checkpoint) -> None:
    one, other = (read(checkpoint, "self", longest=8) for _ in range(2))
    assert one.windows.shape == (calibration.WINDOWS, 8)
    np.testing.assert_array_equal(one.windows, other.windows)
    assert one.source == "self"
    assert one.sha256 == other.sha256 == hashlib.sha256(one.windows.tobytes()).hexdigest()
    assert len(np.unique(one.windows)) > 40
    assert one.windows.max() < checkpoint.model.vocab


def test_the_held_out_text_is_refused(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "held.txt").write_text("\n" + data.held_out() + "\n\n", encoding="utf-8")
    with pytest.raises(UsageFault, match="the text that the loss is measured on") as caught:
        read(checkpoint, tmp_path / "held.txt")
    assert caught.value.exit_code == UsageFault.exit_code == 2


def test_texts_that_cannot_be_used_are_refused_with_their_reason(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "short.txt").write_text("short", encoding="utf-8")
    with pytest.raises(UsageFault, match="the text has 5 tokens"):
        read(checkpoint, tmp_path / "short.txt", demo=True)
    with pytest.raises(UsageFault, match=r"none\.txt: No such file"):
        read(checkpoint, tmp_path / "none.txt")
    (tmp_path / "empty").mkdir()
    with pytest.raises(UsageFault, match=r"no \.txt or \.md file is in this folder"):
        read(checkpoint, tmp_path / "empty")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9 " * 100)
    with pytest.raises(CorruptInput, match=r"latin\.txt: not UTF-8") as caught:
        read(checkpoint, tmp_path / "latin.txt")
    assert caught.value.exit_code == CorruptInput.exit_code


def plan(model: Path, out: Path, text: Path, **options: object) -> planning.Plan:
    words: dict[str, object] = {"target": "x86-avx2", "recipe_name": "w4g32-e8-gptq", "backend": "onnx", "context": 256}
    return planning.plan(str(model), out=out, calibration_text=str(text), **(words | options))  # type: ignore[arg-type]


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "own.txt"
    path.write_text(DEMO[:6000], encoding="utf-8")
    return path


def hidden(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir() if path.name.startswith(".edgeq"))


def test_a_manifest_records_the_text_and_nothing_else_is_left(tiny: Build, tmp_path: Path, text: Path) -> None:
    work = plan(tiny("3"), tmp_path / "out", text)
    built = building.build(work, quiet)
    assert built.gate.passed
    found = bundle.read(work.out).calibration
    assert found is not None
    note = f"calibration: the text fills {found.tokens // 512} windows of 512 tokens, 32 are wanted; "
    assert [each.startswith(note) for each in built.notes[len(work.notes) :]] == [True]
    assert found.sha256 == hashlib.sha256(text.read_bytes()).hexdigest()
    assert found.tokens % 512 == 0
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "count", "fitted"),
    [("w4g32-e8-guided", 2, 3), pytest.param("w4g32-e8-tuned", 5, 3, marks=pytest.mark.slow)],
)
def test_scales_are_tuned_over_more_windows_than_matrices_are_fitted_to(
    tiny: Build, tmp_path: Path, text: Path, name: str, count: int, fitted: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(calibration, "WINDOWS", 2)
    monkeypatch.setattr("edgeq.walk.windows.FITTED", 2)
    monkeypatch.setattr(calibration, "TUNED", 5)
    seen: list[NDArray[np.int32]] = []
    find = gradients.token_weights

    def note(model: Layered, tokens: NDArray[np.int32], text: int, folder: Path, progress: Progress) -> object:
        assert text == len(tokens) - 1
        seen.append(tokens)
        return find(model, tokens, text, folder, progress)

    monkeypatch.setattr(gradients, "token_weights", note)
    checkpoint = tiny("3")
    building.build(plan(checkpoint, tmp_path / "out", text, recipe_name=name), quiet)
    length = Checkpoint.open(checkpoint).model.context
    found = bundle.read(tmp_path / "out").calibration
    assert found is not None
    assert found.tokens == count * min(calibration.LENGTH, length)
    assert [len(tokens) for tokens in seen] == [fitted]


def test_a_stopped_build_keeps_its_walk_and_a_later_one_makes_the_same_bundle(
    tiny: Build, tmp_path: Path, text: Path
) -> None:
    def stop(phase: str, done: int, total: int) -> None:
        if (phase, done) == ("layers", 1):
            raise Interrupted("stopped")

    work = plan(tiny("3"), tmp_path / "out", text)
    with pytest.raises(Interrupted):
        building.build(work, stop)
    (name,) = hidden(tmp_path)
    assert (tmp_path / name / "states.json").is_file()
    building.build(work, quiet)
    assert hidden(tmp_path) == []
    (tmp_path / "straight").mkdir()
    straight = plan(tiny("3"), tmp_path / "straight" / "out", text)
    building.build(straight, quiet)
    assert bundle.read(straight.out).files == bundle.read(work.out).files


def test_a_failed_gate_leaves_nothing_of_a_walk(tiny: Build, tmp_path: Path, text: Path) -> None:
    with pytest.raises(GateFailed):
        building.build(plan(tiny("3"), tmp_path / "out", text, max_loss=1e-7), quiet)
    assert hidden(tmp_path) == []


def test_two_walks_with_one_key_do_not_meet(tmp_path: Path) -> None:
    with store.resumable(tmp_path, "key") as one:
        (one / "file").write_text("one")
        with store.resumable(tmp_path, "key") as other:
            assert other != one
            assert list(other.iterdir()) == []
        assert (one / "file").read_text() == "one"
        assert not other.exists()
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(
    ("error", "stays"), [(Interrupted("x"), True), (MemoryError(), True), (GateFailed("x"), False)]
)
def test_what_was_stopped_stays_and_what_failed_goes(tmp_path: Path, error: BaseException, stays: bool) -> None:
    def work() -> None:
        with store.resumable(tmp_path, "key") as folder:
            (folder / "file").write_text("mine")
            raise error

    folder = tmp_path / ".edgeq.walk.key"
    with pytest.raises(type(error)):
        work()
    assert folder.exists() == stays
    with store.resumable(tmp_path, "key") as again:
        assert again == folder
        assert (again / "file").exists() == stays
    assert not folder.exists()


def test_a_walk_that_was_stopped_before_it_found_anything_leaves_nothing(tmp_path: Path) -> None:
    with pytest.raises(DiskFault), store.resumable(tmp_path, "key"):
        raise DiskFault("full", run="free some space")
    assert hidden(tmp_path) == []


@pytest.mark.parametrize(("name", "near"), [("w4g64-e8-rtn", "w4g64-e8-guided"), ("w16", "w4g32-e8-guided")])
def test_a_text_without_a_calibrated_recipe_is_refused_with_one_that_is(
    tiny: Build, tmp_path: Path, text: Path, name: str, near: str
) -> None:
    with pytest.raises(UsageFault, match=f"--calibration has no use for {name}") as caught:
        plan(tiny("3"), tmp_path / "out", text, recipe_name=name)
    assert near in (caught.value.run or "")


def test_checkpoints_without_a_template_are_read_as_plain_text(tmp_path: Path, text: Path) -> None:
    folder = checkpoints.write(tmp_path / "plain", "3")
    (folder / "chat_template.jinja").unlink()
    plain = read(Checkpoint.open(folder), text)
    np.testing.assert_array_equal(plain.windows, read(Checkpoint.open(folder), text, demo=True).windows)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["w4g32-e8-gptq", "w4g32-e8-tuned"])
def test_a_bundle_is_the_same_bytes_whatever_the_threads_and_the_order_of_sets(
    tiny: Build, tmp_path: Path, text: Path, name: str
) -> None:
    program = "import sys; from edgeq import cli; sys.exit(cli.main(sys.argv[1:]))"
    made = []
    for threads, seed in (("1", "1"), ("4", "2")):
        out = tmp_path / threads / "out"
        words = ["build", str(tiny("3.5")), "-t", "x86-avx2", "--backend", "onnx", "--recipe", name, "-o", str(out)]
        words += ["--calibration", str(text), "--context", "256"]
        environment = os.environ | {"OMP_NUM_THREADS": threads, "PYTHONHASHSEED": seed}
        subprocess.run([sys.executable, "-c", program, *words], env=environment, check=True, capture_output=True)
        made.append(bundle.read(out).files)
    assert made[0] == made[1]


def test_the_held_out_text_is_found_among_other_texts(checkpoint: Checkpoint, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text(data.held_out(), encoding="utf-8")
    (tmp_path / "b.txt").write_text("Something else.", encoding="utf-8")
    with pytest.raises(UsageFault, match="the text that the loss is measured on"):
        calibration.read(checkpoint, str(tmp_path), False, 256, quiet)


def test_blank_runs_of_a_text_make_no_empty_questions() -> None:
    text = "\n\n\n\n".join(f"{number} " + "words " * 400 for number in range(6))
    template = "{% for message in messages %}<q>{{ message.content }}</q>{% endfor %}"
    pieces = list(calibration._as_chat(text, template))
    assert not any("<q></q>" in piece for piece in pieces)
    assert "".join(pieces).count("words") == 6 * 400


def test_a_text_that_is_absent_is_refused_before_anything_is_built(tiny: Build, tmp_path: Path) -> None:
    with pytest.raises(UsageFault, match="no such file or folder") as caught:
        plan(tiny("3"), tmp_path / "out", tmp_path / "none.txt")
    assert "self or bundled" in caught.value.run
