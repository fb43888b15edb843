from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

import edgeq
from checkpoints import Build
from edgeq import cli, recipe

HEAVY = ("torch", "transformers", "onnxruntime", "onnx_ir", "numpy", "huggingface_hub", "rich", "jinja2", "tokenizers")


def run(capsys: pytest.CaptureFixture[str], *words: str) -> tuple[int, str, str]:
    code = cli.main(list(words))
    printed = capsys.readouterr()
    return code, printed.out, printed.err


def test_help_imports_nothing_heavy() -> None:
    script = (
        "import sys; from edgeq import cli; code = cli.main(['--help']); "
        f"loaded = [name for name in {HEAVY!r} if name in sys.modules]; print(loaded, file=sys.stderr); sys.exit(code)"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr.strip()) == (0, "[]")
    for command in ("build", "profile", "run", "verify", "targets", "models", "doctor", "recommend"):
        assert command in child.stdout


def test_an_unknown_option_is_a_usage_error(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "build", "--nonsense")[0] == 2


def test_errors_say_what_why_and_what_to_run_next_on_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    code, out, err = run(capsys, "build", "demo-qwen3", "--target", "jetsn")
    assert (code, out) == (2, "")
    assert "'jetsn' is not a target" in err
    assert "jetson" in err
    assert "Next: edgeq targets list" in err


@pytest.mark.parametrize("command", ["build", "recommend"])
def test_a_command_without_its_target_says_so(capsys: pytest.CaptureFixture[str], command: str) -> None:
    code, _, err = run(capsys, command)
    assert code == 2
    assert "--target is missing" in err


def test_a_build_without_a_model_takes_what_is_recommended_and_says_so(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, err = run(capsys, "build", "--target", "jetson", "-c", "8k", "--dry-run", "--offline", "--json")
    assert code == 0, err
    document = json.loads(printed.splitlines()[-1])
    assert "edgeq recommend --target jetson --context 8192 says more" in err
    assert f"{document['model']} {document['recipe']} {document['backend']}: best balance" in err
    assert document["model"] in ("qwen3.5-4b", "qwen3-4b-instruct-2507")
    assert document["target"] == "jetson-orin-nano-super-8gb"


def test_a_build_without_a_model_keeps_the_words_that_were_given(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["build", "-t", "pi5", "--dry-run", "--offline", "--backend", "onnx", "--recipe", "w4g64-e8-rtn", "--json"]
    code, printed, err = run(capsys, *words)
    assert code == 0, err
    document = json.loads(printed.splitlines()[-1])
    assert (document["recipe"], document["backend"]) == ("w4g64-e8-rtn", "onnx")


def test_a_recommendation_that_nothing_meets_is_printed_and_exits_with_3(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["recommend", "--target", "jetson", "--min-tps", "1000"]
    code, printed, err = run(capsys, *words, "--json")
    assert code == 3
    document = json.loads(printed.splitlines()[-1])
    assert document["choice"] is None
    assert document["closest"]["reasons"]
    assert "min-tps excluded most" in err
    code, printed, err = run(capsys, *words)
    assert code == 3
    assert "none meets all constraints" in printed


def test_a_recommendation_is_a_table_with_a_plot_where_one_is_wanted(capsys: pytest.CaptureFixture[str]) -> None:
    words = [
        "recommend",
        "-t",
        "jetson",
        "--max-memory",
        "4GB",
        "--license",
        "open",
        "--capability",
        "vision",
        "--plot",
    ]
    code, printed, err = run(capsys, *words, "--context", "8k", "--max-ttft", "60", "--max-loss", "0.5")
    assert (code, err) == (0, "")
    assert "front: no other is better" in printed
    assert "why not" in printed
    assert "vision tower is left out" in printed
    assert " quality\n" in printed
    assert "~" in printed
    model, name, backend = printed.partition(": ")[2].split()[:3]
    command = f"build {model} --target jetson-orin-nano-super-8gb --recipe {name} --backend {backend} --context 8192"
    assert f"Next: edgeq {command}" in " ".join(printed.split())


def test_a_targets_notes_are_sentences_one_after_the_other(capsys: pytest.CaptureFixture[str]) -> None:
    _, printed, _ = run(capsys, "targets", "show", "x86-avx512-vnni")
    assert ".," not in printed
    assert "another target." in " ".join(printed.split())


def test_a_build_for_the_jetson_says_on_stderr_which_backend_it_took_and_what_would_suit_better(
    capsys: pytest.CaptureFixture[str], tiny: Build, tmp_path: Path
) -> None:
    out = tmp_path / "out"
    words = ["build", str(tiny("2.5")), "--target", "jetson", "-o", str(out), "--context", "256", "--json"]
    code, printed, err = run(capsys, *words)
    assert code == 0, err
    assert "backend llamacpp: the first" in err or "llamacpp would suit the device better" in err
    document = json.loads(printed.splitlines()[-1])
    assert document["target"] == "jetson-orin-nano-super-8gb"
    assert Path(document["bundle"]) == out
    assert (out / "edgeq.json").is_file()


def test_a_dry_run_builds_nothing(capsys: pytest.CaptureFixture[str], tiny: Build, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["build", str(tiny("3")), "-t", "x86-avx2", "--recipe", "w4g32-e8-rtn", "-o", str(out), "--dry-run"]
    code, printed, _ = run(capsys, *words)
    assert code == 0
    assert re.search(r"not built, ~\d+ KiB", " ".join(printed.split()))
    assert not out.exists()


def test_verify_and_run_work_on_a_bundle(capsys: pytest.CaptureFixture[str], built: Build) -> None:
    folder = str(built("3", "w4g32-e8-rtn"))
    code, printed, err = run(capsys, "verify", folder, "--json")
    assert code == 0, err
    assert json.loads(printed)["gate"]["passed"] is True
    assert run(capsys, "run", folder, "Hello", "--max-tokens", "4")[0] == 0


def test_run_guesses_tokens_where_it_is_told_to(
    capsys: pytest.CaptureFixture[str], built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = ("run", str(built("3", "w16")), "Hello hello hello", "--max-tokens", "30")
    plain = run(capsys, *words)
    assert run(capsys, *words, "--draft", "lookup") == plain
    assert run(capsys, *words, "--draft", "head")[0] == 2
    monkeypatch.setattr("edgeq.backends.onnx.session.POSITIONS", "no such input")
    code, printed, err = run(capsys, *words, "--draft", "lookup")
    assert (code, printed) == plain[:2]
    assert "token by token: the bundle's graph gives the last" in err


def test_a_folder_that_is_no_bundle_is_a_usage_error(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    for command in ("verify", "profile", "run"):
        code, _, err = run(capsys, command, str(tmp_path))
        assert code == 2
        assert "is not a bundle" in err


def test_a_profile_of_another_device_is_refused(
    capsys: pytest.CaptureFixture[str], built: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("edgeq.detect.mismatch", lambda target, machine: "The machine is a toaster.")
    code, _, err = run(capsys, "profile", str(built("3", "w4g32-e8-rtn")), "--target", "jetson")
    assert code == 7
    assert "this machine is not jetson-orin-nano-super-8gb" in err


@pytest.mark.parametrize(
    "words",
    [
        ["targets", "list"],
        ["targets", "show", "jetson"],
        ["targets", "detect"],
        ["models", "list"],
        ["models", "show", "qwen3.5-4b"],
        ["doctor", "--target", "jetson"],
    ],
)
def test_the_looking_commands_print_a_table_and_one_json_document(
    capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    code, table, err = run(capsys, *words)
    assert (code, err) == (0, "")
    assert len(table.splitlines()) > 3
    code, printed, _ = run(capsys, *words, "--json")
    assert code == 0
    assert json.loads(printed.splitlines()[-1])


def test_what_only_looks_needs_no_engine_and_no_numpy() -> None:
    looking = [
        ["targets", "list"],
        ["targets", "show", "jetson"],
        ["targets", "detect"],
        ["targets", "validate"],
        ["models", "list"],
        ["models", "show", "qwen3-0.6b"],
        ["recommend", "--target", "jetson"],
    ]
    heavy = ("torch", "onnxruntime", "numpy", "tvm", "llama_cpp", "transformers")
    script = (
        f"import sys; from edgeq import cli; codes = [cli.main(words) for words in {looking!r}]; "
        f"print(codes, [name for name in {heavy!r} if name in sys.modules], file=sys.stderr)"
    )
    child = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert child.stderr.strip() == f"{[0] * len(looking)} []"


def test_detect_has_the_promised_keys(capsys: pytest.CaptureFixture[str]) -> None:
    document = json.loads(run(capsys, "targets", "detect", "--json")[1])
    assert document.keys() >= {"target", "cpu", "isa", "memory_bytes", "accelerators", "backends"}
    assert document["backends"][0].keys() >= {"name", "usable", "reason"}


def test_a_target_file_of_ones_own_is_validated(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    from edgeq import data

    good = tmp_path / "mine.toml"
    text = (data.folder("targets") / "x86-avx2.toml").read_text()
    good.write_text(text)
    assert run(capsys, "targets", "validate", str(good))[0] == 0
    good.write_text(text + "\n[surprise]\n")
    code, _, err = run(capsys, "targets", "validate", str(good))
    assert code == 10
    assert "surprise" in err


def test_sizes_and_tokens_are_read_as_people_write_them(capsys: pytest.CaptureFixture[str], tiny: Build) -> None:
    words = ["build", str(tiny("3")), "-t", "x86-avx2", "--recipe", "w4g32-e8-rtn", "--dry-run"]
    assert run(capsys, *words, "--max-size", "1MB", "--context", "0.25k")[0] == 0
    code, _, err = run(capsys, *words, "--max-size", "lots")
    assert code == 2
    assert "450MB" in err


def test_python_has_the_same_words(tiny: Build, tmp_path: Path) -> None:
    made = edgeq.build(str(tiny("2.5")), target="x86-avx2", recipe="w4g32-e8-rtn", context=256, out=tmp_path / "out")
    assert (made.recipe, made.predicted_loss) == ("w4g32-e8-rtn", None)


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_stopped_build_exits_with_130_and_leaves_nothing(tiny: Build, tmp_path: Path, name: str) -> None:
    script = (
        "import os, signal, sys; from edgeq import cli; from edgeq.walk import run; "
        f"run.quantize = lambda *_: os.kill(os.getpid(), signal.{name}); sys.exit(cli.main(sys.argv[1:]))"
    )
    place = tmp_path / "place"
    words = ["build", str(tiny("3")), "-t", "x86-avx2", "--backend", "null", "-o", str(place / "out")]
    child = subprocess.run([sys.executable, "-c", script, *words], capture_output=True, text=True, check=False)
    assert child.returncode == 130, child.stderr
    assert f"stopped by {name}" in child.stderr
    assert not place.exists()


def test_square_brackets_of_an_install_line_are_printed(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    from edgeq import doctor

    line = doctor.Check(name="tool", status="FAILED", expected="x", observed="y", remedy="pip install 'edgeq[build]'")
    monkeypatch.setattr(doctor, "checks", lambda _: [line])
    assert "pip install 'edgeq[build]'" in run(capsys, "doctor")[1]


def test_a_signal_inside_a_library_call_is_no_failure_of_that_library(built: Build) -> None:
    script = (
        "import os, signal, sys, onnxruntime; from edgeq import cli; "
        "onnxruntime.InferenceSession = lambda *_, **__: os.kill(os.getpid(), signal.SIGINT); "
        "sys.exit(cli.main(sys.argv[1:]))"
    )
    words = [sys.executable, "-c", script, "verify", str(built("3", "w4g32-e8-rtn"))]
    child = subprocess.run(words, capture_output=True, text=True, check=False)
    assert (child.returncode, child.stderr.strip()) == (130, "edgeq: stopped by SIGINT")


def test_a_prompt_of_several_lines_is_one_word(capsys: pytest.CaptureFixture[str], built: Build) -> None:
    assert run(capsys, "run", str(built("3", "w4g32-e8-rtn")), "Hello\nthere", "--max-tokens", "2")[0] == 0


@pytest.mark.parametrize("package", ["apache-tvm", "apache-tvm-ffi"])
def test_a_backend_whose_engine_is_absent_or_another_version_is_a_missing_tool(
    capsys: pytest.CaptureFixture[str], tiny: Build, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    installed = {"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.13.post2"}
    words = ["build", str(tiny("3")), "-t", "jetson", "--backend", "mlc", "--dry-run"]
    for version, told in ((None, f"needs {package}"), ("0.1.15", f"{package} 0.1.15 is installed")):
        monkeypatch.setattr("edgeq.backends.mlc.checks.version", (installed | {package: version}).get)
        code, _, err = run(capsys, *words)
        assert (code, told in err, "pip install 'edgeq[tvm]'" in err) == (5, True, True), err


@pytest.mark.parametrize("words", [["-f", "json"], ["--format", "json"], ["--json"]])
def test_json_has_a_short_form(capsys: pytest.CaptureFixture[str], words: list[str]) -> None:
    assert len(json.loads(run(capsys, "targets", "list", *words)[1])) >= 4


@pytest.mark.parametrize("word", ["-f", "--format"])
def test_another_format_is_refused_with_the_one_there_is(capsys: pytest.CaptureFixture[str], word: str) -> None:
    code, _, err = run(capsys, "targets", "list", word, "xml")
    assert (code, "'xml' is not a format" in err, "--json" in err) == (2, True, True), err


def test_piped_tables_have_no_spaces_at_the_end_and_no_wide_gaps(capsys: pytest.CaptureFixture[str]) -> None:
    lines = run(capsys, "targets", "show", "pi5")[1].splitlines()
    assert not any(line.endswith(" ") or " " * 80 in line for line in lines)
    assert any(line.startswith("memory.total_bytes ") and line.endswith("LPDDR4X-4267 SDRAM") for line in lines)


def test_predicted_sizes_of_a_model_start_with_a_tilde(capsys: pytest.CaptureFixture[str]) -> None:
    (row,) = (line for line in run(capsys, "models", "show", "qwen3-0.6b")[1].splitlines() if line.startswith("w16 "))
    assert row.count("iB") == row.count(", ~") > 0


def test_what_a_build_has_to_say_of_its_text_is_printed(
    capsys: pytest.CaptureFixture[str], tiny: Build, tmp_path: Path
) -> None:
    (tmp_path / "text.txt").write_text("A short text. " * 600)
    words = ["--target", "x86-avx2", "--backend", "onnx", "--recipe", "w4g32-e8-gptq", "-c", "256"]
    words += ["--calibration", str(tmp_path / "text.txt"), "-o", str(tmp_path / "out")]
    code, _, err = run(capsys, "build", str(tiny("3")), *words)
    assert (code, "calibration: the text fills " in err) == (0, True), err


def test_methods_are_told_beside_the_recipes_of_a_model(capsys: pytest.CaptureFixture[str]) -> None:
    printed = run(capsys, "models", "show", "qwen3-0.6b")[1]
    for method in recipe.METHODS:
        assert method in printed.rpartition("methods: ")[2]


def test_without_a_terminal_a_line_every_half_a_minute_says_how_far_it_is(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    now = 100.0
    monkeypatch.setattr("time.monotonic", lambda: now)
    with cli._progress() as step:
        for done in range(9):
            step("layers", done, 9)
            now += 10
    assert capsys.readouterr() == ("", "layers 3 of 9\nlayers 6 of 9\n")


def test_every_shipped_target_is_valid(capsys: pytest.CaptureFixture[str]) -> None:
    code, printed, _ = run(capsys, "targets", "validate")
    assert code == 0
    assert len(printed.splitlines()) >= 4
