from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path

import msgspec
import pytest

from edgeq import data, recipe, target
from edgeq.errors import CorruptInput, UsageFault
from edgeq.target import Figure, Target

SHIPPED = target.names()


def figures(value: object) -> Iterator[Figure]:
    if isinstance(value, Figure):
        yield value
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
        ("mac-m4", "apple-m4", "metal"),
        ("pi5", "raspberry-pi-5-8gb", "cpu"),
    ],
)
def test_devices_by_their_short_names(alias: str, name: str, api: str) -> None:
    found = target.load(alias)
    assert (found.name, found.api) == (name, api)


@pytest.mark.parametrize("name", SHIPPED)
def test_a_gpu_is_used_by_the_backend_that_can(name: str) -> None:
    found = target.load(name)
    assert found.backends[0] == ("onnx" if found.api == "cpu" else "llamacpp")
    assert found.recipes[0].endswith("-kv16") == (found.api != "cpu")
    assert set(found.recipes) >= {"w4g32-e8-rtn", "w16"}, "backends without a float16 cache need recipes too"


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
        ('"llamacpp"]', '"tensorrt"]', "tensorrt"),
        ("value = 4,", "value = -4,", "not positive"),
        ("value = 4,", "", "value"),
        ("[memory]", '[memory]\nusable_share = { value = 1.5, source = "hope" }', "usable_share"),
        ("[memory]", '[memory]\nusable_share = { value = 0.5, source = "" }', "source is empty"),
        ("[memory]", '[onnx]\nprovider = "rocm"\n[memory]', "rocm"),
        ("[memory]", "[onnx]\nthreads = 4\n[memory]", "unknown field"),
        ("[memory]", '[gpu]\nmodel = "a GPU"\narch = "sm_87\'; reboot"\n[memory]', "not a name such as sm_87"),
        ("[llamacpp]", '[llamacpp]\ncmake_args = ["-DA=\'; rm"]', "-DNAME=VALUE"),
        ('["build-essential"]', '["build-essential; reboot"]', "not the name of a package"),
    ],
)
def test_a_wrong_file_is_refused_with_the_reason(
    changed: Callable[[str, str], str], old: str, new: str, why: str
) -> None:
    with pytest.raises(CorruptInput, match=why):
        target.load(changed(old, new))


def test_a_target_survives_the_way_through_json() -> None:
    found = target.load("jetson")
    assert msgspec.json.decode(data.to_json(found), type=Target) == found
