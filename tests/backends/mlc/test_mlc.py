from __future__ import annotations

import importlib.metadata
import os
import shutil
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import msgspec
import numpy as np
import pytest

from checkpoints import Build, quiet
from edgeq import backends, bundle, recipe, target
from edgeq.backends import mlc
from edgeq.backends.base import Job
from edgeq.backends.mlc import checks, library, official, official_weights
from edgeq.checkpoint import Checkpoint
from edgeq.errors import BackendFault, CorruptInput, MissingTool, UsageFault
from edgeq.target import Target

IDS = [(7 * n + 3) % 251 for n in range(40)]
PINS = {"apache-tvm": "0.26.0", "apache-tvm-ffi": "0.1.13.post2"}
ELSEWHERE = b"\x7fELF\x02\x01" + bytes(12) + struct.pack("<H", 243)
"""The header of a library for RISC-V."""


@pytest.fixture(autouse=True)
def built_in_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """No official compiler is asked for, whatever this machine's environment says."""
    monkeypatch.delenv(official.VARIABLE, raising=False)


@pytest.fixture
def compilations(packed: Build, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Types of floats that models were compiled with for this CPU; each gets the library that is built already."""
    import tvm

    from edgeq.backends.mlc import built_in

    seen: list[str] = []

    def for_this_cpu(described: bundle.Bundle, made: Any) -> Any:
        seen.append(made.floats)
        return tvm.runtime.load_module(str(library.find(packed("3", described.recipe))))

    monkeypatch.setattr(built_in, "for_this_cpu", for_this_cpu)
    return seen


def for_vulkan() -> Target:
    """A device whose kernels are to be Vulkan's; no shipped target asks for them."""
    device = target.load("steam-deck-oled")
    return msgspec.structs.replace(device, mlc=msgspec.structs.replace(device.mlc, kind="vulkan"))


def described(tiny: Build, words: str = "f32", provider: str = "cpu") -> bundle.Bundle:
    """A manifest, as far as a session reads it."""
    config = Checkpoint.open(tiny("3")).model.config()
    fields = {
        "context": 512,
        "config": config,
        "recipe": words,
        "layouts": None,
        "provider": provider,
        "target": "jetson",
    }
    return cast(bundle.Bundle, SimpleNamespace(**fields))


def copied(folder: Path, out: Path, **report: object) -> Path:
    """A built folder with another report."""
    shutil.copytree(folder, out)
    path = out / "compiled.json"
    path.write_bytes(msgspec.json.encode(msgspec.json.decode(path.read_bytes()) | report))
    return out


def logits(folder: Path, manifest: bundle.Bundle) -> np.ndarray:
    """Logits of a folder that is loaded, on this CPU."""
    session = mlc.load(folder, manifest)
    try:
        assert [place.provider for place in session.placement] == ["cpu"]
        return session.logits(IDS)
    finally:
        session.close()


def test_it_is_a_backend_by_its_name() -> None:
    assert backends.get("mlc").build.__module__ == mlc.__name__
    assert mlc.ENGINE == ("apache-tvm", "apache-tvm-ffi")


@pytest.mark.parametrize(
    ("name", "provider"),
    [
        ("x86-avx2", "cpu"),
        ("jetson", "cuda"),
        ("apple-m4", "metal"),
        ("steam-deck-oled", "opencl"),
        ("web-browser", "webgpu"),
    ],
)
def test_the_provider_is_what_the_code_generator_is_for(name: str, provider: str) -> None:
    assert mlc.provider(target.load(name)) == provider
    assert mlc.provider(for_vulkan()) == "vulkan"


@pytest.mark.parametrize(("words", "bits"), [("w4g32-e8-rtn", 32), ("w4g32-e8-rtn-kv16", 16), ("f32", 32)])
def test_scales_have_the_type_of_the_cache(words: str, bits: int) -> None:
    assert mlc.scale_bits(recipe.parse(words)) == bits


def test_recipes_that_it_cannot_hold_are_refused_with_what_works(tiny: Build) -> None:
    model = Checkpoint.open(tiny("3")).model
    for words in ("q4_k-eq6_k-rtn", "q4_1-e8-rtn", "w4g32-eq6_k-rtn"):
        with pytest.raises(UsageFault, match="does not know GGML's layouts") as raised:
            mlc.check(model, recipe.parse(words))
        assert raised.value.run.endswith("--backend llamacpp")
    for words, near in (("w4ag32-e8-mse", "w4g32-e8-mse"), ("w2agcol-e16-rtn-kv16", "w2gcol-e16-rtn-kv16")):
        with pytest.raises(UsageFault, match="no room for zero points") as raised:
            mlc.check(model, recipe.parse(words))
        assert raised.value.run.endswith(f"--recipe {near}")
        mlc.check(model, recipe.parse(near))
    for words in ("w4g32-e8-rtn-kv8", "f16-kv8"):
        with pytest.raises(UsageFault, match="keeps keys and values in float32 or float16") as raised:
            mlc.check(model, recipe.parse(words))
        mlc.check(model, recipe.parse(raised.value.run.split()[-1]))


def test_what_the_official_compiler_lacks_is_refused_where_it_is_chosen(
    tiny: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = Checkpoint.open(tiny("3")).model
    mlc.check(model, recipe.parse("w4g32-e8-rtn"))
    monkeypatch.setenv(official.VARIABLE, sys.executable)
    mlc.check(model, recipe.parse("w4g32-e4-rtn"))
    with pytest.raises(UsageFault, match="the official MLC compiler has no such layout"):
        mlc.check(model, recipe.parse("w4g32-e8-rtn"))


def test_the_official_compiler_is_chosen_by_the_variable_and_for_vulkan(monkeypatch: pytest.MonkeyPatch) -> None:
    devices = [for_vulkan(), *map(target.load, target.names())]
    assert [official.is_chosen(each) for each in devices] == [True, *[False] * len(target.names())]
    monkeypatch.setenv(official.VARIABLE, sys.executable)
    assert all(map(official.is_chosen, devices))


def test_builds_go_to_the_compiler_that_is_chosen(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    from edgeq.backends.mlc import built_in

    called: list[str] = []
    monkeypatch.setattr(official, "build", lambda job, out: called.append("official"))
    monkeypatch.setattr(built_in, "build", lambda job, out: called.append("built in"))
    for device, wanted in ((target.load("jetson"), "built in"), (for_vulkan(), "official")):
        job = Job(Checkpoint.open(tiny("3")), recipe.parse("w4g32-e4-rtn"), device, 256, quiet)
        mlc.build(job, tmp_path)
        assert called.pop() == wanted


def installed(versions: dict[str, str]) -> Callable[[str], str]:
    """`importlib.metadata.version` where only these packages are installed."""

    def version(name: str) -> str:
        if name not in versions:
            raise importlib.metadata.PackageNotFoundError(name)
        return versions[name]

    return version


def test_tools_are_named_with_their_versions(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", installed(PINS | {"ziglang": "0.15.1"}))
    monkeypatch.setattr(checks, "pinned", lambda: PINS)
    found = official.Official(Path(sys.executable), "mlc-llm-nightly-cpu 0.20")
    monkeypatch.setattr(official, "find", lambda _: found)
    every = ("apache-tvm 0.26.0", "apache-tvm-ffi 0.1.13.post2", "ziglang 0.15.1")
    assert mlc.tools(target.load("jetson")) == every
    monkeypatch.setenv(official.VARIABLE, sys.executable)
    assert mlc.tools(target.load("jetson")) == (*every, "mlc-llm-nightly-cpu 0.20")


@pytest.mark.parametrize("absent", ["apache-tvm", "apache-tvm-ffi", "ziglang"])
def test_an_absent_tool_is_named_with_the_line_that_installs_it(monkeypatch: pytest.MonkeyPatch, absent: str) -> None:
    versions = PINS | {"ziglang": "0.15.1"}
    del versions[absent]
    monkeypatch.setattr(importlib.metadata, "version", installed(versions))
    monkeypatch.setattr(checks, "pinned", lambda: PINS)
    with pytest.raises(MissingTool, match=rf"the mlc backend needs {absent}\b") as raised:
        mlc.tools(target.load("jetson"))
    assert raised.value.run.startswith("pip install 'edgeq[")
    assert "tvm]'" in raised.value.run


@pytest.mark.parametrize("name", PINS)
def test_another_version_of_tvm_is_refused_to_build_and_to_load(
    tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str
) -> None:
    monkeypatch.setattr(importlib.metadata, "version", installed(PINS | {name: "0.1", "ziglang": "0.15.1"}))
    monkeypatch.setattr(checks, "pinned", lambda: PINS)
    for call in (lambda: mlc.tools(target.load("jetson")), lambda: mlc.load(tmp_path, described(tiny))):
        with pytest.raises(MissingTool, match=rf"{name} 0\.1 is installed, edgeq needs {PINS[name]}") as raised:
            call()
        assert raised.value.run == "pip install 'edgeq[tvm]'"


def test_without_tvm_a_bundle_is_not_loaded(tiny: Build, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(importlib.metadata, "version", installed({}))
    with pytest.raises(MissingTool, match="the mlc backend needs apache-tvm") as raised:
        mlc.load(tmp_path, described(tiny))
    assert raised.value.run == checks.INSTALL


def test_a_library_for_this_machine_is_run_as_it_is(tiny: Build, packed: Build, compilations: list[str]) -> None:
    assert logits(packed("3", "f32"), described(tiny)).shape == (40, 288)
    assert compilations == []


def test_threads_give_way_unless_the_environment_says_otherwise(
    tiny: Build, packed: Build, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("TVM_THREAD_POOL_SPIN_COUNT", "TVM_BIND_THREADS"):
        monkeypatch.setenv(name, "of one's own")
        monkeypatch.delenv(name)
    monkeypatch.setenv("TVM_NUM_THREADS", "1")
    mlc.load(packed("3", "f32"), described(tiny)).close()
    assert (os.environ["TVM_THREAD_POOL_SPIN_COUNT"], os.environ["TVM_BIND_THREADS"]) == ("100", "0")
    monkeypatch.setenv("TVM_BIND_THREADS", "1")
    mlc.load(packed("3", "f32"), described(tiny)).close()
    assert (os.environ["TVM_NUM_THREADS"], os.environ["TVM_BIND_THREADS"]) == ("1", "1")


@pytest.mark.parametrize("why", ["instructions", "machine", "device"])
def test_a_library_that_cannot_run_here_is_compiled_again_for_this_cpu(
    tiny: Build, packed: Build, compilations: list[str], tmp_path: Path, why: str
) -> None:
    from edgeq.backends.mlc import devices

    isa = ["avx2", "amx_of_2040"] if why == "instructions" else []
    folder = copied(packed("3", "f32"), tmp_path / "copy", isa=isa, floats="float32")
    if why == "machine":
        library.find(folder).write_bytes(ELSEWHERE)
    if why == "device" and devices.find("cuda") is not None:
        pytest.skip("this machine has a CUDA device")
    manifest = described(tiny, provider="cuda" if why == "device" else "cpu")
    np.testing.assert_array_equal(logits(folder, manifest), logits(packed("3", "f32"), described(tiny)))
    assert compilations == ["float32"]


def test_a_bundle_of_the_official_compiler_runs_on_this_cpu(
    tiny: Build, packed: Build, here: Target, compilations: list[str], tmp_path: Path
) -> None:
    folder = tmp_path / "bundle"
    folder.mkdir()
    job = Job(Checkpoint.open(tiny("3")), recipe.parse("f32"), here, 512, quiet)
    official_weights.write(job, official_weights.parameters(job.checkpoint.model, "q0f32"), folder)
    (folder / "model.so").write_bytes(ELSEWHERE)
    report = {"compiler": "mlc_llm", "isa": [], "dtype": "float32", "floats": "float32", "kernels": []}
    (folder / "compiled.json").write_bytes(msgspec.json.encode(report))
    np.testing.assert_array_equal(logits(folder, described(tiny)), logits(packed("3", "f32"), described(tiny)))
    assert compilations == ["float32"]
    assert sorted(path.name for path in folder.iterdir()) == [
        *("compiled.json", "model.so", "params_shard_0.bin", "tensor-cache.json")
    ]


@pytest.mark.slow
def test_a_model_is_really_compiled_for_this_cpu(tiny: Build, packed: Build, tmp_path: Path) -> None:
    words = "w4g32-e8-rtn-kv16"
    folder = copied(packed("3", words), tmp_path / "copy", isa=["of another machine"])
    again = logits(folder, described(tiny, words))
    np.testing.assert_allclose(again, logits(packed("3", words), described(tiny, words)), rtol=0, atol=1e-3)


def test_a_folder_without_library_or_with_a_damaged_report_is_told(tiny: Build, packed: Build, tmp_path: Path) -> None:
    folder = copied(packed("3", "f32"), tmp_path / "copy")
    library.find(folder).unlink()
    with pytest.raises(BackendFault, match="has no library"):
        mlc.load(folder, described(tiny))
    (folder / "compiled.json").write_text("{")
    with pytest.raises(CorruptInput, match=r"compiled\.json"):
        mlc.load(folder, described(tiny))


def test_code_that_wants_other_memory_than_predicted_is_a_fault(tiny: Build, packed: Build) -> None:
    from edgeq.backends.mlc import built_in

    words, model = recipe.parse("w4g32-e8-rtn-kv16"), Checkpoint.open(tiny("3")).model
    made = msgspec.json.decode(packed("3", str(words)).with_suffix(".json").read_bytes(), type=bundle.Compiled)
    built_in._hold_against_plan(model, words, made.memory)
    for name in ("weights_bytes", "kv_cache_bytes_per_token"):
        wrong = msgspec.structs.replace(made.memory, **{name: getattr(made.memory, name) * 103 // 100})
        with pytest.raises(BackendFault, match=f"the compiled code has {name}"):
            built_in._hold_against_plan(model, words, wrong)


@pytest.mark.slow
def test_a_bundle_for_the_jetson_is_built_here_and_runs_on_this_cpu(tiny: Build, here: Target, tmp_path: Path) -> None:
    from edgeq.backends.mlc import devices, kernels, report

    if devices.find("cuda") is not None:
        pytest.skip("this machine has a CUDA device")
    words, device = "w4g32-e8-rtn-kv16", target.load("jetson")
    job = Job(Checkpoint.open(tiny("3")), recipe.parse(words), device, 512, quiet)
    made = mlc.build(job, tmp_path)
    assert made.kernels == ("compiled" if kernels._nvcc("sm_87") else "unchecked")
    assert library.inspect(library.find(tmp_path)) == library.Format("ELF", 64, "aarch64")
    told = report.read(tmp_path)
    assert (told.compiler, told.isa) == ("edgeq", device.cpu.isa)
    assert "GEMV" in {kernel.rule for kernel in told.kernels}
    assert logits(tmp_path, described(tiny, words, "cuda")).shape == (40, 288)


@pytest.mark.parametrize(
    "lines",
    [
        "import edgeq.backends.mlc",
        "from edgeq import backends, cli; backends.get('mlc'); sys.argv = ['edgeq', 'targets', 'list']; cli.main()",
        "from edgeq import target; from edgeq.backends import mlc; mlc.tools(target.load('jetson'))",
    ],
)
def test_tvm_is_not_loaded_before_it_is_needed(lines: str) -> None:
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    code = f"import sys\ntry:\n    {lines}\nexcept SystemExit as end:\n    assert not end.code\n"
    code += "print([name for name in sys.modules if name.partition('.')[0] in ('tvm', 'tvm_ffi', 'torch')])"
    shown = subprocess.run([sys.executable, "-c", code], env=os.environ, capture_output=True, text=True, check=True)
    assert shown.stdout.splitlines()[-1] == "[]"
