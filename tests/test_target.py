from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edgeq import data, recipe, target
from edgeq.backends.llamacpp import install
from edgeq.errors import CorruptInput, UsageFault
from edgeq.target import Figure, Target

SHIPPED = target.names()
LLVM = {
    **{name: name for name in ("avx2", "fma", "f16c", "avx512f", "avx512bw", "avx512dq", "avx512vl")},
    **{name: name for name in ("neon", "dotprod", "i8mm", "bf16", "sve2")},
    **{"fullfp16": "fp16", "avx512vnni": "avx512_vnni", "avxvnni": "avx_vnni", "amx-int8": "amx_int8"},
}
"""Instruction sets by LLVM's names of them."""


def figures(value: object) -> Iterator[Figure]:
    if isinstance(value, Figure):
        yield value
    elif isinstance(value, dict):
        for each in value.values():
            yield from figures(each)
    elif isinstance(value, msgspec.Struct):
        for name in value.__struct_fields__:
            yield from figures(getattr(value, name))


@pytest.fixture
def changed(tmp_path: Path) -> Callable[[str, str], str]:
    """Path of the Raspberry Pi's file with one text replaced."""

    def change(old: str, new: str) -> str:
        text = (data.folder("targets") / "raspberry-pi-5-8gb.toml").read_text()
        assert old in text
        path = tmp_path / "changed.toml"
        path.write_text(text.replace(old, new, 1))
        return str(path)

    return change


@pytest.mark.parametrize("name", SHIPPED)
def test_every_shipped_file_is_a_target_of_its_own_name(name: str) -> None:
    found = target.load(name)
    assert found.name == name
    assert all(recipe.parse(word) for word in found.recipes)
    assert len(set(found.backends)) == len(found.backends)
    assert set(found.match.isa) <= set(found.cpu.isa)
    assert not set(found.match.without) & set(found.cpu.isa)


@pytest.mark.parametrize("name", SHIPPED)
def test_every_source_is_public(name: str) -> None:
    found = target.load(name)
    for source in (*found.sources, *(figure.source for figure in figures(found))):
        assert source.strip()
        assert not source.startswith(("/", "E/"))


def test_names_and_aliases_belong_to_one_target_each() -> None:
    words = [word for name in SHIPPED for word in (name, *target.load(name).aliases)]
    assert len(set(words)) == len(words)
    assert "host" not in words


def test_jetson_is_the_orin_nano_super_in_any_case() -> None:
    assert target.load("Jetson").name == target.load("JETSON-ORIN-NANO-SUPER-8GB").name == "jetson-orin-nano-super-8gb"


@pytest.mark.parametrize(
    ("alias", "name", "api"),
    [
        ("steamdeck", "steam-deck-oled", "vulkan"),
        ("thor", "jetson-agx-thor", "cuda"),
        ("rtx-4060-laptop", "geforce-rtx-4060-laptop-8gb", "cuda"),
        ("mac-m1", "apple-m1", "metal"),
        ("mac-m2", "apple-m2", "metal"),
        ("mac-m3", "apple-m3", "metal"),
        ("mac-m4", "apple-m4", "metal"),
        ("mac-m5", "apple-m5", "metal"),
        ("opi5", "orange-pi-5", "vulkan"),
        ("x-elite", "snapdragon-x-elite-laptop", "vulkan"),
        ("browser", "web-browser", "webgpu"),
        ("pi5", "raspberry-pi-5-8gb", "cpu"),
        ("pi4", "raspberry-pi-4-8gb", "cpu"),
        ("rk3588", "orange-pi-5", "vulkan"),
        ("m4", "apple-m4", "metal"),
        ("m4-max", "apple-m4-max", "metal"),
        ("orin-nano", "jetson-orin-nano-8gb", "cuda"),
        ("agx-orin", "jetson-agx-orin-64gb", "cuda"),
        ("jetson-nano", "jetson-nano-4gb", "cuda"),
        ("strix-halo", "amd-strix-halo-128gb", "vulkan"),
        ("graviton4", "aws-graviton4", "cpu"),
        ("n100", "intel-n150-minipc", "cpu"),
    ],
)
def test_devices_by_their_short_names(alias: str, name: str, api: str) -> None:
    found = target.load(alias)
    assert (found.name, found.api) == (name, api)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_gpu_is_used_by_the_backend_that_can(name: str) -> None:
    found = target.load(name)
    assert found.backends[0] == {"cpu": "onnx", "webgpu": "mlc"}.get(found.api, "llamacpp")
    assert found.recipes[0].endswith("-kv16"), "half the cache, and faster by llama.cpp"
    assert set(found.recipes) >= {"w4g32-e8-rtn", "w16"}, "onnx on a CPU has no float16 cache"


@pytest.mark.parametrize("name", SHIPPED)
def test_every_device_says_what_estimates_need(name: str) -> None:
    found = target.load(name)
    assert found.device_class
    if name.startswith(("x86-av", "x86-amx", "web-")):
        return
    memory = found.memory
    assert memory.total_bytes
    assert memory.usable_share
    assert memory.bandwidth_bytes_per_s
    for key, rate in memory.measured.items():
        assert rate.value <= 1.2 * memory.bandwidth_bytes_per_s.value, key


TOO_OLD_FOR_CUDA_13 = ("sm_53", "sm_72")


@pytest.mark.parametrize("name", SHIPPED)
def test_mlc_knows_the_limits_of_a_gpu_and_the_processor(name: str) -> None:
    found = target.load(name)
    assert ("mlc" in found.backends) == (found.gpu is None or found.gpu.arch not in TOO_OLD_FOR_CUDA_13)
    assert found.code_generator == found.mlc.kind
    assert all(found.mlc.limits().values()) == (found.mlc.kind != "llvm")
    assert bool(found.mlc.mcpu) == (found.cpu.arch != "wasm32")


@pytest.mark.parametrize("name", [name for name in SHIPPED if target.load(name).mlc.mcpu])
def test_code_for_the_processor_runs_on_every_such_device(name: str) -> None:
    codegen = pytest.importorskip("tvm.target.codegen", reason="apache-tvm is not installed")
    found = target.load(name)
    assert codegen.llvm_is_valid_cpu(found.mlc.mcpu, found.host)
    kind = {"kind": "llvm", "mtriple": found.host, "mcpu": found.mlc.mcpu}
    features = {str(each) for each in codegen.llvm_get_cpu_features(codegen.Target(kind))}
    assert {LLVM[each] for each in features & set(LLVM)} <= set(found.cpu.isa)


def test_every_generator_of_the_index_has_a_target() -> None:
    cuda = {found.gpu.arch for found in map(target.load, SHIPPED) if found.gpu and found.api == "cuda"}
    assert cuda == {"sm_53", "sm_72", "sm_86", "sm_87", "sm_89", "sm_110"}
    assert {target.load(name).code_generator for name in SHIPPED} == {"llvm", "cuda", "metal", "opencl", "webgpu"}


def test_the_generator_is_the_apis_own_unless_the_file_says_so(changed: Callable[[str, str], str]) -> None:
    assert target.load(changed('kind = "llvm"\n', "")).code_generator == "llvm"
    assert target.load("steamdeck").code_generator == "opencl"


def test_options_of_an_engine_are_the_targets_own(changed: Callable[[str, str], str]) -> None:
    assert target.load("pi5").onnx.provider == "cpu"
    assert target.load(changed("[match]", '[onnx]\nprovider = "webgpu"\n\n[match]')).onnx.provider == "webgpu"
    found = target.load(changed('packages = ["build', 'cmake_args = ["-DGGML_NATIVE=OFF"]\npackages = ["build'))
    assert found.llamacpp.cmake_args == ("-DGGML_NATIVE=OFF",)
    assert found.llamacpp.packages == ("build-essential",)


def test_a_file_of_ones_own_is_a_target(changed: Callable[[str, str], str]) -> None:
    assert target.load(changed("Raspberry Pi 5 8GB", "Mine")).title == "Mine"


def test_an_unknown_name_suggests_the_nearest() -> None:
    with pytest.raises(UsageFault, match="Did you mean jetson"):
        target.load("jetsn")


def test_a_missing_file_is_the_users_fault() -> None:
    with pytest.raises(UsageFault, match="no such target file"):
        target.load("nowhere/board.toml")


def test_a_file_of_another_ending_is_told_to_be_renamed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("board.txt", "jetson"):
        Path(name).write_text("")
    with pytest.raises(UsageFault, match=r"board\.txt is no target file") as caught:
        target.load("board.txt")
    assert caught.value.run == "rename it to board.toml"
    assert target.load("jetson").api == "cuda"


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        ('api = "cpu"', 'api = "cpu"\nvolts = 5', "unknown field"),
        ('name = "raspberry-pi-5-8gb"', 'name = "host"', "'host' is reserved"),
        ('aliases = ["', 'aliases = ["host", "', "'host' is reserved"),
        ('api = "cpu"', 'api = "abacus"', "abacus"),
        ('api = "cpu"', 'api = "cuda"', "gpu"),
        ('name = "raspberry-pi-5-8gb"', 'name = "Raspberry Pi"', "not a name"),
        ('host = "aarch64-', 'host = "x86_64-', "cpu.arch"),
        ('"w16"]', '"w3"]', "w3"),
        ('"llamacpp", "mlc"]', '"tensorrt"]', "'tensorrt' is not a backend. Known: llamacpp, mlc, null, onnx."),
        ('"llamacpp", "mlc"]', '"onx"]', "'onx' is not a backend. Did you mean onnx"),
        ("value = 4,", "value = -4,", "not positive"),
        ("value = 4,", "", "value"),
        ("usable_share = { value = 0.8", "usable_share = { value = 1.5", "usable_share"),
        ("[memory.measured]", '[memory.measured]\nfast = { value = 1, source = "hope" }', "cpu_copy_bytes_per_s"),
        (
            "[memory.measured]",
            '[memory.measured]\ncpu_read_bytes_per_s = { value = 1, source = "" }',
            "source is empty",
        ),
        ("[match]", '[match]\nby_name_only = "yes"', "bool"),
        ('device_class = "sbc"', 'device_class = "toaster"', "toaster"),
        ("[memory]", '[onnx]\nprovider = "rocm"\n[memory]', "rocm"),
        ("[memory]", "[onnx]\nthreads = 4\n[memory]", "unknown field"),
        ("[memory]", '[gpu]\nmodel = "a GPU"\narch = "sm_87\'; reboot"\n[memory]', "not a name such as sm_87"),
        ("[llamacpp]", '[llamacpp]\ncmake_args = ["-DA=\'; rm"]', "-DNAME=VALUE"),
        ('["build-essential"]', '["build-essential; reboot"]', "not the name of a package"),
        ('kind = "llvm"', 'kind = "rocm"', "rocm"),
        ('kind = "llvm"', 'kind = "cuda"', "'cuda' does not suit api 'cpu'"),
        ('kind = "llvm"', "thread_warp_size = 32", "has limits of a GPU"),
        ('kind = "llvm"', "max_threads_per_block = -1", "max_threads_per_block -1 is not positive"),
        ('"cortex-a76"', '"cortex-a76; reboot"', "not a name such as cortex-a76"),
        ('api = "cpu"', 'api = "cuda"\ngpu = { model = "a GPU", arch = "sm_87" }', "'llvm' does not suit api 'cuda'"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(
    changed: Callable[[str, str], str], old: str, new: str, why: str
) -> None:
    with pytest.raises(CorruptInput, match=why) as caught:
        target.load(changed(old, new))
    assert "reserved" in why or "edgeq targets validate" in caught.value.run


def test_mlc_needs_every_limit_of_a_gpu(tmp_path: Path) -> None:
    text = (data.folder("targets") / "orange-pi-5.toml").read_text()
    path = tmp_path / "board.toml"
    path.write_text(text.replace("thread_warp_size = 1\n", ""))
    with pytest.raises(CorruptInput, match=r"needs mlc\.thread_warp_size for kind 'opencl'"):
        target.load(str(path))
    path.write_text(path.read_text().replace(', "mlc"]', "]"))
    assert target.load(str(path)).mlc.thread_warp_size is None


def test_memory_that_varies_needs_one_of_its_sizes(tmp_path: Path) -> None:
    text = (data.folder("targets") / "x86-avx2.toml").read_text()
    path = tmp_path / "computer.toml"
    path.write_text(text.replace("[memory]\n", "[memory]\nvaries = true\n"))
    with pytest.raises(CorruptInput, match="varies needs total_bytes"):
        target.load(str(path))


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("jetson-nano", "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=53"),
        ("agx-orin", "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=87"),
        ("thor", "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=110"),
        ("rtx-3050-laptop", "-DGGML_CUDA=on -DCMAKE_CUDA_ARCHITECTURES=86"),
        ("strix-halo", "-DGGML_VULKAN=on"),
        ("m4-max", "-DGGML_METAL=on"),
    ],
)
def test_names_determine_the_compile_options(name: str, words: str) -> None:
    assert words in install.line(target.load(name))


def test_a_target_survives_the_way_through_json() -> None:
    found = target.load("jetson")
    assert msgspec.json.decode(data.to_json(found), type=Target) == found
