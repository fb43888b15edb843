from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import calibrations
import edgeq
from edgeq import catalog, cli, data, target
from edgeq.errors import CorruptInput, UsageFault
from edgeq.estimating import asked, published
from edgeq.estimating.published import Row

PROMISED = """
    model target recipe backend context weights_bytes kv_cache_bytes state_bytes runtime_bytes total_bytes usable_bytes
    fits max_context prefill_tokens_per_s decode_tokens_per_s first_token_s basis
"""


def test_json_has_every_promised_key(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "qwen3.5-4b", "--target", "jetson", "--context", "8k", "--depth", "4k", "--json"]) == 0
    found = json.loads(capsys.readouterr().out.splitlines()[-1])
    assert set(PROMISED.split()) <= set(found)
    assert (found["target"], found["context"], found["depth"]) == ("jetson-orin-nano-super-8gb", 8192, 4096)
    assert set(found["decode_tokens_per_s"]) == {"low", "mid", "high"}
    parts = ("weights_bytes", "kv_cache_bytes", "state_bytes", "runtime_bytes")
    assert found["total_bytes"] == sum(found[part] for part in parts)


def test_what_is_estimated_starts_with_a_tilde(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "qwen3-0.6b", "--target", "pi5"]) == 0
    lines = {line[:12].strip(): line[12:].strip() for line in capsys.readouterr().out.splitlines()}
    for row in ("memory", "prefill", "decode at 0", "first token"):
        assert next(text for name, text in lines.items() if row.startswith(name) and name).startswith("~"), row


def test_a_runtime_that_edgeq_does_not_build_for() -> None:
    found = edgeq.estimate("qwen3-4b", target="apple-m4-max", recipe="4bit", backend="mlx")
    assert (found.recipe, found.backend) == ("4bit", "mlx")
    assert found.decode_tokens_per_s is not None
    assert found.decode_tokens_per_s.mid == pytest.approx(163, rel=0.1)  # published.toml


def test_a_published_quantization_moves_like_its_blocks() -> None:
    plain = asked.ask("qwen3.5-4b", target="jetson", recipe_name="w4g32-e8-rtn-kv16", weights_bytes=2_700_000_000)
    blocks = asked.ask("qwen3.5-4b", target="jetson", recipe_name="Q4_K_M", weights_bytes=2_700_000_000)
    assert plain.decode_tokens_per_s is not None
    assert blocks.decode_tokens_per_s is not None
    assert blocks.decode_tokens_per_s.mid < plain.decode_tokens_per_s.mid


@pytest.mark.parametrize("name", ["demo-qwen2.5", "demo-qwen3", "demo-qwen3.5"])
def test_a_folder_needs_its_configuration_alone(name: str, tmp_path: Path) -> None:
    shutil.copy(data.folder("demo") / name / "config.json", tmp_path)
    found = asked.ask(str(tmp_path), target="jetson")
    assert found.weights_bytes == asked.ask(name, target="jetson").weights_bytes > 0


def test_auto_takes_what_the_backend_holds() -> None:
    assert asked.ask("qwen3-0.6b", target="jetson").recipe == "w4g32-e8-rtn-kv16"
    assert asked.ask("qwen3-0.6b", target="jetson", backend="onnx").recipe == "w4g32-e8-rtn"


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"context": 1 << 20}, "is not possible"),
        ({"context": 100, "depth": 200}, "is not possible"),
        ({"backend": "tensorflow"}, "neither a backend"),
        ({"recipe_name": "w5g32"}, "is not a recipe"),
        ({"anchor": Path("nowhere.json")}, "no such profile"),
    ],
)
def test_impossible_questions(options: dict[str, object], message: str) -> None:
    with pytest.raises(UsageFault, match=message):
        asked.ask("qwen3-0.6b", target="jetson", **options)  # type: ignore[arg-type]


def test_near_names_of_published_quantizations_are_suggested() -> None:
    with pytest.raises(UsageFault) as caught:
        asked.ask("qwen3-0.6b", target="jetson", recipe_name="Q4_K_N")
    assert "Did you mean q4_k_m" in caught.value.why


def test_a_recipe_that_no_published_name_is_like_is_told_of_recipes_alone() -> None:
    with pytest.raises(UsageFault) as caught:
        asked.ask("qwen3-0.6b", target="jetson", recipe_name="w4g32-e8-rnt")
    assert caught.value.why == "Did you mean rtn?"
    assert caught.value.run == "edgeq models show qwen3-0.6b"


@pytest.mark.parametrize(
    ("recipe_name", "backend"),
    [("Q4_K_M", "llamacpp"), ("q4_k-eq6_k-rtn", "llamacpp"), ("w4g32-e8-rtn", "onnx"), ("Q4_0", "onnx")],
)
def test_auto_is_the_first_backend_that_holds_the_recipe_as_in_a_build(recipe_name: str, backend: str) -> None:
    assert asked.ask("qwen3-0.6b", target="pi5", recipe_name=recipe_name).backend == backend


def test_what_recommend_calls_marginal_an_estimate_calls_so_too(capsys: pytest.CaptureFixture[str]) -> None:
    words = ["estimate", "qwen3.5-9b", "--target", "m1", "--recipe"]
    assert cli.main([*words, "w4g32-e4-rtn-kv16"]) == 0
    assert "yes, of 5.76 GiB usable, marginal: up to 5% more may be needed" in capsys.readouterr().out
    assert cli.main(["estimate", "qwen3.5-4b", "--target", "m1"]) == 0
    assert "marginal" not in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "remedy"),
    [
        ({"context": 65536}, "--context 32768"),
        ({"context": 4096, "depth": 8192}, "--context 8192 --depth 8192"),
        ({"context": 65536, "depth": 40000}, "--context 32768 --depth 32768"),
    ],
)
def test_a_context_that_is_not_possible_has_a_remedy(options: dict[str, int], remedy: str) -> None:
    with pytest.raises(UsageFault) as caught:
        asked.ask("qwen3-4b", target="jetson", **options)  # type: ignore[arg-type]
    assert caught.value.run == f"edgeq estimate ... {remedy}"
    words = remedy.split()
    possible = {word.removeprefix("--"): int(number) for word, number in zip(words[::2], words[1::2], strict=True)}
    assert asked.ask("qwen3-4b", target="jetson", **possible).context == possible["context"]  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("backend", "recipe_name", "remedy"),
    [
        ("mlc", "q4_k-eq6_k-rtn", "--backend llamacpp"),
        ("mlc", "w4g32-e8-rtn-kv8", "--recipe w4g32-e8-rtn-kv16"),
        ("mlc", "Q4_K_M", "--backend llamacpp"),
        ("llamacpp", "w4g128-e8-rtn", "--recipe w4g32-e8-rtn"),
        ("onnx", "w4g32-e8-rtn-kv16", "--recipe w4g32-e8-rtn-kv8"),
        ("onnx", "w2g16-e8-rtn", "--recipe w2g32-e8-rtn"),
        ("onnx", "Q4_K_M", "--backend llamacpp"),
    ],
)
def test_what_cannot_be_built_is_not_estimated(backend: str, recipe_name: str, remedy: str) -> None:
    with pytest.raises(UsageFault) as caught:
        asked.ask("qwen3-0.6b", target="jetson", backend=backend, recipe_name=recipe_name)
    assert caught.value.run.startswith(f"edgeq estimate ... {remedy}")


@pytest.mark.parametrize(
    ("device", "runtime", "api"),
    [
        ("pi4", "mlx", "cpu"),
        ("pi4", "tensorrt-edge-llm", "cpu"),
        ("iphone-17-pro", "tensorrt-edge-llm", "metal"),
        ("apple-m1", "vllm", "metal"),
    ],
)
def test_a_runtime_is_estimated_where_figures_of_its_api_are(device: str, runtime: str, api: str) -> None:
    with pytest.raises(UsageFault, match=f"no published figures of {runtime} on {api}") as caught:
        asked.ask("qwen3-0.6b", target=device, backend=runtime)
    assert "llamacpp" in caught.value.why


def test_a_hub_id_of_the_catalogue_needs_no_network() -> None:
    assert asked.ask("Qwen/Qwen3-0.6B", target="jetson", offline=True) == asked.ask("qwen3-0.6b", target="jetson")


def test_a_file_in_a_checkpoint_is_told_from_a_hub_id(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    Path("model").mkdir()
    Path("model", "config.json").touch()
    with pytest.raises(UsageFault, match="is a file") as caught:
        asked.ask("model/config.json", target="jetson")
    assert caught.value.run == "the same command with model"


@pytest.mark.parametrize("size", [1, 400_000, 1 << 60])
def test_a_size_that_cannot_be_the_models_is_refused(size: int) -> None:
    with pytest.raises(UsageFault, match=f"--weights-bytes {size} is not possible"):
        asked.ask("qwen3-0.6b", target="jetson", weights_bytes=size)


@pytest.mark.parametrize("text", ["400MB", "400000000"])
def test_the_size_of_a_file_is_written_like_other_sizes(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["estimate", "qwen3-0.6b", "-t", "jetson", "--weights-bytes", text, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["weights_bytes"] == 400_000_000


def test_an_unknown_quantization_is_told_the_published_ones() -> None:
    with pytest.raises(UsageFault, match=r"Published quantizations: .*q4_k_m"):
        asked.ask("qwen3-0.6b", target="jetson", recipe_name="Q4_K_X")


def test_a_mix_without_bits_is_refused_with_one_that_has() -> None:
    with pytest.raises(UsageFault, match="mix-guided has no size") as caught:
        asked.ask("qwen3-0.6b", target="jetson", recipe_name="mix-guided")
    assert caught.value.run.endswith("mix4.5-guided")


def test_an_anchor_that_is_no_profile_has_a_remedy(tmp_path: Path) -> None:
    (tmp_path / "report.json").write_text("{}")
    with pytest.raises(CorruptInput) as caught:
        asked.ask("qwen3-0.6b", target="jetson", anchor=tmp_path / "report.json")
    assert caught.value.run == "edgeq profile BUNDLE --save"


@pytest.mark.parametrize("words", [["qwen3-0.6b"], ["qwen3-0.6b", "--json"], ["demo-qwen3", "--backend", "mlc"]])
def test_no_heavy_library_is_imported(words: list[str]) -> None:
    program = (
        "import sys; from edgeq import cli; code = cli.main(['estimate', *sys.argv[1:], '-t', 'jetson']);"
        "print(sorted({'numpy', 'torch', 'onnxruntime'} & set(sys.modules)), file=sys.stderr); sys.exit(code)"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(sys.path)}
    done = subprocess.run([sys.executable, "-c", program, *words], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    assert done.stderr.splitlines()[-1] == "[]"


def test_a_file_of_unknown_kind_is_taken_for_what_has_its_bits() -> None:
    def kind(size: int) -> str:
        return asked.ask("qwen3-4b", target="pi5", backend="llamacpp", weights_bytes=size).recipe

    assert kind(2_491_081_032) == "q4_k-eq6_k-rtn-kv16"
    assert kind(2_262_638_304) == "w4g32-e4-rtn-kv16"
    assert kind(4_273_492_460) == "w8g32-e8-rtn-kv16"
    assert kind(8_044_936_192) == "f16-kv16"


def test_other_runtimes_run_what_they_usually_run() -> None:
    assert asked.ask("qwen3-4b", target="pi5", backend="ollama").recipe == "Q4_K_M"
    assert asked.ask("qwen3-4b", target="m4", backend="mlx").recipe == "4bit"


def _answerable(row: Row) -> bool:
    """Whether someone can ask for a row: a model and a target that edgeq knows, and the API of its calibration."""
    if row.outside or row.model.lower() not in catalog.names() or row.host not in target.names():
        return False
    return calibrations.places(target.load(row.host))[row.runtime][1] == row.api


@pytest.mark.parametrize(
    "row",
    [row for row in published.read().rows if _answerable(row)],
    ids=lambda row: f"{row.host}-{row.runtime}-{row.model}-{row.quantization}-{row.depth}",
)
def test_published_figures_are_near_the_interval_that_people_are_shown(row: Row) -> None:
    model = catalog.load(row.model).model
    looked_up = 0.0 if model.tied else model.vocab * model.hidden / model.parameters
    found = asked.ask(
        row.model,
        target=row.host,
        backend=row.runtime,
        context=max(4096, row.depth + row.generated),
        depth=row.depth + row.generated // 2,
        weights_bytes=int(row.weights_bytes / (1 - looked_up)),
    ).decode_tokens_per_s
    assert found is not None
    assert found.low / 1.2 < row.decode_tokens_per_s < found.high * 1.2


def test_a_file_of_some_size_is_run_by_a_backend_that_holds_what_it_is_like() -> None:
    found = asked.ask("qwen3-1.7b", target="pi5", weights_bytes=1_100_000_000)
    assert (found.recipe, found.backend) == ("q4_k-eq6_k-rtn-kv16", "llamacpp")
    assert asked.ask("qwen3-1.7b", target="pi5", recipe_name=found.recipe, backend=found.backend).recipe == found.recipe
