from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest

import mlc_stand_in
from checkpoints import Build, quiet
from edgeq import recipe, target
from edgeq.backends.base import Job
from edgeq.backends.mlc import official, official_weights, tensor_cache
from edgeq.backends.mlc.official import Official
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, BackendKilled, CorruptInput, MissingTool, UnsupportedModel, UsageFault
from edgeq.model import Model, read_config
from edgeq.quantize.solve import rounded
from edgeq.size import is_quantized
from script_files import SCRIPTS

HOST = "aarch64-linux-gnu"
ORIN = {"kind": "cuda", "arch": "sm_87", "max_threads_per_block": 1024, "max_shared_memory_per_block": 49152}
ORIN["thread_warp_size"] = 32
MAKERS = "python -m pip install --pre -U -f https://mlc.ai/wheels mlc-llm-nightly-cpu mlc-ai-nightly-cpu"
RECIPES = {"w4g32-e4-rtn": "q4f32_1", "w4g32-e4-rtn-kv16": "q4f16_1", "f32": "q0f32", "f16-kv16": "q0f16"}


@pytest.fixture(scope="session")
def stand_in(tmp_path_factory: pytest.TempPathFactory) -> Official:
    """Installation of the stand-in, which compiles nothing."""
    return Official(mlc_stand_in.install(tmp_path_factory.mktemp("mlc")), "the stand-in")


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> pytest.MonkeyPatch:
    """A process without the variable, whatever this machine has."""
    monkeypatch.delenv(official.VARIABLE, raising=False)
    return monkeypatch


def model_of(folder: Path) -> Model:
    return Checkpoint.open(folder).model


def compiled(
    by: Official, model: Model, quantization: str, library: Path, limit_s: float = 60
) -> official_weights.Parameters:
    return official.compile_library(
        by, model, quantization, device=ORIN, host=HOST, context=256, chunk=64, library=library, limit_s=limit_s
    )


def recorded(model: Model, quantization: str) -> official_weights.Parameters:
    """What the real compiler's libraries asked for."""
    listed: Any = mlc_stand_in.parameters(model.model_type, quantization)
    return {each["name"]: (tuple(each["shape"]), each["dtype"]) for each in listed}


def test_the_variable_goes_before_this_python(elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    here = mlc_stand_in.install(tmp_path / "here", package="mlc-llm-nightly-cpu")
    named = mlc_stand_in.install(tmp_path / "named")
    elsewhere.setattr(sys, "executable", str(here))
    assert official.find() == Official(here, "mlc-llm-nightly-cpu 0.0.1")
    elsewhere.setenv(official.VARIABLE, str(named))
    assert official.find() == Official(named, "mlc_llm of unknown version")


def test_without_it_the_makers_commands_are_told_in_full(elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    elsewhere.setattr(sys, "executable", str(mlc_stand_in.install(tmp_path, parts=())))
    with pytest.raises(MissingTool, match="not installed") as raised:
        official.find()
    run = raised.value.run
    assert MAKERS.removeprefix("python ") in run
    assert run.endswith("or the built-in compiler: pip install 'edgeq[tvm]'")
    assert raised.value.exit_code == 5


@pytest.mark.parametrize("parts", [(), ("__init__.py",)])
def test_empty_packages_with_its_name_are_called_placeholders(
    elsewhere: pytest.MonkeyPatch, tmp_path: Path, parts: tuple[str, ...]
) -> None:
    python = mlc_stand_in.install(tmp_path, parts=parts, package="mlc-llm-nightly")
    elsewhere.setenv(official.VARIABLE, str(python))
    with pytest.raises(MissingTool, match=r"Placeholders took its name.*: mlc-llm-nightly 0\.0\.1\.") as raised:
        official.find()
    assert str(python) in raised.value.what


def test_a_folder_named_like_it_where_edgeq_is_started_is_not_it(elsewhere: pytest.MonkeyPatch, tmp_path: Path) -> None:
    mlc_stand_in.install(tmp_path / "work")
    elsewhere.chdir(tmp_path / "work")
    elsewhere.setenv(official.VARIABLE, str(mlc_stand_in.install(tmp_path / "empty", parts=())))
    with pytest.raises(MissingTool):
        official.find()


@pytest.mark.parametrize("python", ["no/such/python", "/bin/true"])
def test_a_variable_that_names_no_python_is_told(elsewhere: pytest.MonkeyPatch, python: str) -> None:
    elsewhere.setenv(official.VARIABLE, python)
    with pytest.raises(MissingTool, match=rf"{official.VARIABLE}={python} is no Python that works"):
        official.find()


@pytest.mark.parametrize(("name", "quantization"), RECIPES.items())
def test_recipes_have_mlcs_names(name: str, quantization: str) -> None:
    assert official.quantization(recipe.parse(name)) == quantization


@pytest.mark.parametrize(
    ("name", "near"),
    [
        ("w4g32-e8-rtn", "w4g32-e4-rtn"),
        ("w4g64-e4-rtn-kv16", "w4g32-e4-rtn-kv16"),
        ("w8g32-e8-rtn-kv8", "w4g32-e4-rtn-kv16"),
        ("q4_k-eq6_k-rtn", "w4g32-e4-rtn"),
        *((name, "f16-kv16") for name in ("w16", "f16", "bf16", "f32-kv16")),
    ],
)
def test_other_recipes_are_refused_with_one_that_works(name: str, near: str) -> None:
    with pytest.raises(UsageFault) as raised:
        official.quantization(recipe.parse(name))
    assert f"--recipe {near}, or" in raised.value.run
    assert official.quantization(recipe.parse(near))


@pytest.mark.parametrize("multimodal", [False, True])
def test_configs_have_what_its_classes_do_not_read_from_transformers_5(tiny: Build, multimodal: bool) -> None:
    third = official.config(model_of(tiny("3")))
    assert (third["rope_theta"], third["attention_bias"]) == (1e6, False)
    hybrid = official.config(model_of(tiny("3.5", multimodal=multimodal)))
    assert (hybrid["model_type"], hybrid["rope_theta"], hybrid["full_attention_interval"]) == ("qwen3_5_text", 1e7, 4)
    assert "text_config" not in hybrid


def test_shapes_that_its_classes_would_misread_are_refused(tiny: Build) -> None:
    files = {name: json.loads((tiny(name) / "config.json").read_text()) for name in ("2.5", "3.5")}
    kinds = ["full_attention", *["linear_attention"] * 3]
    for config in (files["2.5"] | {"head_dim": 16}, files["3.5"] | {"layer_types": kinds}):
        with pytest.raises(UnsupportedModel, match="the official MLC compiler cannot hold"):
            official.config(read_config(config))


@pytest.mark.parametrize("quantization", RECIPES.values())
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_parameters_are_those_that_real_libraries_asked_for(tiny: Build, generation: str, quantization: str) -> None:
    model = model_of(tiny(generation))
    assert official_weights.parameters(model, quantization) == recorded(model, quantization)


def test_an_untied_head_is_a_matrix_of_its_own(tiny: Build) -> None:
    found = official_weights.parameters(model_of(tiny("3", tied=False)), "q4f16_1")
    assert found["lm_head.q_scale"] == ((288, 2), "float16")


@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_a_library_is_compiled_in_two_commands(
    stand_in: Official, tiny: Build, tmp_path: Path, generation: str
) -> None:
    library, model = tmp_path / "model.so", model_of(tiny(generation))
    found = compiled(stand_in, model, "q4f16_1", library)
    assert list(found.items()) == list(recorded(model, "q4f16_1").items())
    told = official.describe(library, HOST)
    assert (told["context_window_size"], told["prefill_chunk_size"], told["max_batch_size"]) == (256, 64, 1)


@pytest.mark.parametrize(
    ("faults", "what", "why"),
    [
        ("old", "the stand-in does not take edgeq's arguments for gen_config", "argument --quantization: invalid"),
        ("raise-gen_config", "mlc_llm gen_config failed with exit code 1", "InternalError: Check failed: (false)"),
        ("raise-compile", "mlc_llm compile failed with exit code 1", "InternalError: Check failed: (false)"),
        ("mute-compile", "mlc_llm compile failed with exit code 1", "It gave no reason."),
        ("no-config", "gen_config ended well and wrote no mlc-chat-config.json", ""),
        ("no-library", "the compiler ended well and left no library", ""),
        ("wrong-machine", "model.so is not for aarch64-linux-gnu", "It is 64-bit ELF for x86_64."),
        ("no-description", "the library does not describe itself", ""),
        ("other-context", "the library has context_window_size 257", ""),
        ("no-parameters", "the library does not say which weights it wants", "params"),
        ("other-parameters", "the stand-in asks for other weights than edgeq writes", "model.embed_tokens.q_weight"),
    ],
)
def test_what_goes_wrong_is_told(
    stand_in: Official, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, faults: str, what: str, why: str
) -> None:
    monkeypatch.setenv(mlc_stand_in.FAULTS, faults)
    with pytest.raises(BackendFault) as raised:
        compiled(stand_in, model_of(tiny("3")), "q4f16_1", tmp_path / "model.so")
    assert what in raised.value.what
    assert why in raised.value.why
    assert "\x1b" not in str(raised.value)


def test_a_killed_compiler_is_told_apart(
    stand_in: Official, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(mlc_stand_in.FAULTS, "kill-compile")
    with pytest.raises(BackendKilled, match="mlc_llm compile was killed"):
        compiled(stand_in, model_of(tiny("3")), "q4f16_1", tmp_path / "model.so")


def test_at_the_time_limit_all_that_it_started_ends(
    stand_in: Official, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    lock = tmp_path / "lock"
    monkeypatch.setenv(mlc_stand_in.FAULTS, "hang")
    monkeypatch.setenv(mlc_stand_in.LOCK, str(lock))
    begun = time.monotonic()
    with pytest.raises(BackendKilled, match=r"mlc_llm gen_config was stopped after 1 s"):
        compiled(stand_in, model_of(tiny("3")), "q4f16_1", tmp_path / "model.so", limit_s=1)
    with lock.open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
    assert time.monotonic() - begun < mlc_stand_in.HANG_S / 2


def test_a_mac_is_linked_for_on_a_mac_only(
    stand_in: Official, tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "platform", "linux")
    host = target.load("apple-m4").host
    with pytest.raises(UsageFault, match=rf"links for {host} on such a machine only"):
        official.compile_library(
            stand_in,
            model_of(tiny("3")),
            "q4f16_1",
            device={"kind": "metal"},
            host=host,
            context=256,
            chunk=64,
            library=tmp_path / "model.dylib",
        )


@pytest.mark.parametrize("name", RECIPES)
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_weights_are_what_the_recipe_stands_for(tiny: Build, tmp_path: Path, generation: str, name: str) -> None:
    job, wanted = written(tiny(generation), name, tmp_path)
    assert {at: (tuple(each["shape"]), each["dtype"]) for at, each in tensor_cache.records(tmp_path).items()} == wanted
    for parameter, tensors in official_weights.names(job.checkpoint.model).items():
        values = np.concatenate([expected(job, tensor) for tensor in tensors])
        assert np.array_equal(stored(tmp_path, parameter), values), parameter


def test_a_finished_folder_is_checked_without_being_run(stand_in: Official, tiny: Build, tmp_path: Path) -> None:
    library = tmp_path / "model.so"
    compiled(stand_in, model_of(tiny("3.5")), "q4f16_1", library)
    written(tiny("3.5"), "w4g32-e4-rtn-kv16", tmp_path)
    official.check(tmp_path, library, HOST)
    with pytest.raises(BackendFault, match=r"is not for x86_64-linux-gnu"):
        official.check(tmp_path, library, "x86_64-linux-gnu")
    shard = tmp_path / "params_shard_0.bin"
    shard.write_bytes(b"\xff" + shard.read_bytes()[1:])
    with pytest.raises(CorruptInput, match="MD5"):
        official.check(tmp_path, library, HOST)
    shard.unlink()
    with pytest.raises(CorruptInput, match="missing"):
        official.check(tmp_path, library, HOST)


def test_weights_of_another_library_are_found_out(stand_in: Official, tiny: Build, tmp_path: Path) -> None:
    library = tmp_path / "model.so"
    compiled(stand_in, model_of(tiny("3")), "q4f16_1", library)
    written(tiny("3"), "w4g32-e4-rtn", tmp_path)
    with pytest.raises(BackendFault, match="do not belong together") as raised:
        official.check(tmp_path, library, HOST)
    assert "float16" in raised.value.why


@pytest.mark.slow
@pytest.mark.parametrize("generation", ["2.5", "3", "3.5"])
def test_the_real_compiler_makes_a_library_for_the_jetson(tiny: Build, tmp_path: Path, generation: str) -> None:
    try:
        real = official.find()
    except MissingTool as missing:
        pytest.skip(str(missing))
    library, model = tmp_path / "model.so", model_of(tiny(generation))
    assert compiled(real, model, "q4f16_1", library, official.LIMIT_S) == recorded(model, "q4f16_1")
    written(tiny(generation), "w4g32-e4-rtn-kv16", tmp_path)
    official.check(tmp_path, library, HOST)


def test_the_proof_says_why_it_cannot_run(tmp_path: Path) -> None:
    nothing = str(mlc_stand_in.install(tmp_path, parts=()))
    ran = prove({official.VARIABLE: nothing, "XDG_CACHE_HOME": str(tmp_path)})
    assert (ran.returncode, ran.stdout) == (77, "")
    assert "skipped: mlc_llm, the official MLC compiler, is not installed in" in ran.stderr


def test_the_proof_fails_where_the_compiler_does(tmp_path: Path) -> None:
    python = str(mlc_stand_in.install(tmp_path))
    faults = {official.VARIABLE: python, mlc_stand_in.FAULTS: "raise-compile", "XDG_CACHE_HOME": str(tmp_path)}
    ran = prove(faults)
    assert ran.returncode == 1
    assert ran.stdout == f"found mlc_llm of unknown version in {python}\n"
    assert "verify_mlc: mlc_llm compile failed with exit code 1" in ran.stderr
    assert not (tmp_path / "edgeq").exists()


def prove(environment: dict[str, str]) -> subprocess.CompletedProcess[str]:
    """Run scripts/verify_mlc."""
    command = [sys.executable, str(SCRIPTS / "verify_mlc")]
    return subprocess.run(command, env=os.environ | environment, capture_output=True, text=True, check=False)


def written(checkpoint: Path, name: str, out: Path) -> tuple[Job, official_weights.Parameters]:
    """Weights of a checkpoint in a folder."""
    job = Job(Checkpoint.open(checkpoint), recipe.parse(name), target.load("jetson"), 256, quiet)
    wanted = official_weights.parameters(job.checkpoint.model, official.quantization(job.recipe))
    official_weights.write(job, wanted, out)
    return job, wanted


def expected(job: Job, tensor: str) -> Any:
    """Values of a tensor as transformers multiplies with them, rounded as the recipe says."""
    whole = job.checkpoint.tensor(tensor)
    small = tensor.endswith(("in_proj_a.weight", "in_proj_b.weight")) and not job.recipe.body.is_float
    if is_quantized(tensor) or small:
        return rounded(job.checkpoint, job.recipe, tensor)
    if job.checkpoint.model.generation == "3.5" and tensor.endswith(
        ("layernorm.weight", "q_norm.weight", "k_norm.weight")
    ):
        whole = whole + 1
    if job.checkpoint.model.generation == "3.5" and tensor == "model.norm.weight":
        whole = whole + 1
    wide = tensor.endswith(("A_log", "dt_bias")) or job.recipe.kv_bits == 32
    return whole if wide else whole.astype(np.float16).astype(np.float32)


def stored(folder: Path, parameter: str) -> Any:
    """Values of a parameter in a tensor cache, as float32."""
    stem = parameter.removesuffix("weight")
    if parameter in tensor_cache.records(folder):
        return raw(folder, parameter).astype(np.float32)
    words, scales = raw(folder, f"{stem}q_weight"), raw(folder, f"{stem}q_scale").astype(np.float32)
    codes = (words[:, :, None] >> np.arange(0, 32, 4, dtype=np.uint32) & 15).reshape(len(words), -1, 32)
    return ((codes.astype(np.float32) - 7) * scales[:, :, None]).reshape(len(words), -1)


def raw(folder: Path, name: str) -> Any:
    """A tensor as it is stored."""
    index = json.loads((folder / tensor_cache.INDEX).read_text())
    for shard in index["records"]:
        for each in shard["records"]:
            if each["name"] == name:
                data = (folder / shard["dataPath"]).read_bytes()[each["byteOffset"] :][: each["nbytes"]]
                return np.frombuffer(data, each["dtype"]).reshape(each["shape"])
    raise KeyError(name)


@pytest.mark.parametrize("said", ["{}", "[1, 2]", '{"complete": true, "packages": 3}'])
def test_a_program_that_answers_something_else_is_no_python(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, said: str
) -> None:
    program = tmp_path / "python"
    program.write_text(f"#!/bin/sh\necho '{said}'\n")
    program.chmod(0o755)
    monkeypatch.setenv(official.VARIABLE, str(program))
    with pytest.raises(MissingTool, match="is no Python that works") as raised:
        official.find()
    assert raised.value.run.startswith(f"unset {official.VARIABLE}")


def test_a_vulkan_target_is_not_sent_to_the_compiler_that_has_no_vulkan() -> None:
    board = target.load("steam-deck-oled")
    vulkan = msgspec.structs.replace(board, mlc=msgspec.structs.replace(board.mlc, kind="vulkan"))
    assert "opencl" in official.without(vulkan)
    assert official.without(board) == official.BUILT_IN
