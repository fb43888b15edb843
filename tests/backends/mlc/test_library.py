from __future__ import annotations

import platform
import re
import struct
import sys
import tarfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import tvm_executables
from edgeq.backends.mlc import kernels, library
from edgeq.backends.mlc.library import Format
from edgeq.errors import BackendFault, MissingTool

HERE = f"{platform.machine()}-linux-gnu"
LINKED = {
    "aarch64-linux-gnu": ("model.so", Format("ELF", 64, "aarch64")),
    "x86_64-linux-gnu": ("model.so", Format("ELF", 64, "x86_64")),
    "aarch64-apple-darwin": ("model.dylib", Format("Mach-O", 64, "aarch64")),
    "arm64-apple-darwin": ("model.dylib", Format("Mach-O", 64, "aarch64")),
}
OBJECTS = {
    "aarch64-linux-android": Format("ELF", 64, "aarch64"),
    "wasm32-unknown-unknown-wasm": Format("wasm", 32, "wasm32"),
}


@pytest.fixture
def zig() -> None:
    pytest.importorskip("ziglang", reason="ziglang is not installed")


def elf(machine: int, order: str = "<") -> bytes:
    return b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + bytes(12) + struct.pack(f"{order}H", machine)


def macho(machine: int) -> bytes:
    return struct.pack("<5I", 0xFEEDFACF, machine, 0, 6, 0)


def written(path: Path, data: bytes) -> Path:
    path.write_bytes(data)
    return path


@pytest.mark.usefixtures("zig")
@pytest.mark.parametrize("triple", LINKED)
def test_library_is_linked_for_each_system(triple: str, tmp_path: Path) -> None:
    path = library.export(tvm_executables.build("llvm", triple), tmp_path, triple)
    assert (path.name, library.inspect(path)) == LINKED[triple]
    assert [each.name for each in tmp_path.iterdir()] == [path.name]


@pytest.mark.usefixtures("zig")
@pytest.mark.skipif(sys.platform != "linux", reason="loads a library for Linux")
def test_library_for_this_machine_runs(tmp_path: Path) -> None:
    path = library.export(tvm_executables.build("llvm", HERE), tmp_path, HERE)
    import tvm
    from tvm import relax

    machine = relax.VirtualMachine(tvm.runtime.load_module(str(path)), tvm.cpu())
    x = np.linspace(0.1, 2, tvm_executables.SIZE, dtype=np.float32)
    np.testing.assert_allclose(machine["main"](tvm.runtime.tensor(x)).numpy(), np.log(2 * x), rtol=1e-5)


@pytest.mark.usefixtures("zig")
@pytest.mark.parametrize("triple", ["aarch64-linux-gnu", "aarch64-apple-darwin"])
def test_same_model_gives_same_bytes_in_any_folder(
    triple: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = []
    for name in ("first", "second"):
        folder = tmp_path / name
        folder.mkdir()
        (tmp_path / f"work-{name}").mkdir()
        monkeypatch.chdir(tmp_path / f"work-{name}")
        found.append(library.export(tvm_executables.build("llvm", triple), folder, triple).read_bytes())
        assert not list(Path().iterdir())
    assert found[0] == found[1]
    assert str(tmp_path).encode() not in found[0]


@pytest.mark.usefixtures("zig")
def test_library_needs_no_newer_glibc_than_its_floor(tmp_path: Path) -> None:
    path = library.export(tvm_executables.build("llvm", "aarch64-linux-gnu"), tmp_path, "aarch64-linux-gnu")
    wanted = [int(minor) for minor in re.findall(rb"GLIBC_2\.(\d+)", path.read_bytes())]
    assert wanted
    assert max(wanted) <= 28


@pytest.mark.parametrize("triple", OBJECTS)
def test_objects_of_what_cannot_be_linked_are_archived(triple: str, tmp_path: Path) -> None:
    executable = tvm_executables.build("opencl", triple)
    path = library.export(executable, tmp_path, triple)
    assert library.require(path, triple) == path == tmp_path / "model.tar"
    assert library.inspect(path) == OBJECTS[triple]
    with tarfile.open(path) as archive:
        assert archive.getnames() == ["lib0.o", "devc.o"]
    before = path.read_bytes()
    assert library.export(executable, tmp_path, triple).read_bytes() == before


def test_machine_code_takes_the_place_of_cuda_source(tmp_path: Path) -> None:
    executable = tvm_executables.build("cuda", "wasm32-unknown-unknown-wasm")
    (source,) = kernels.sources(executable)
    held = {}
    for name, binaries in (("source", {}), ("binary", {source.text: b"made-up machine code"})):
        (tmp_path / name).mkdir()
        held[name] = library.export(executable, tmp_path / name, "wasm32-unknown-unknown-wasm", binaries).read_bytes()
    assert source.text.encode() in held["source"]
    assert b"__global__" not in held["binary"]
    assert b"made-up machine code" in held["binary"]


@pytest.mark.usefixtures("zig")
@pytest.mark.skipif(sys.platform != "linux", reason="loads a library for Linux")
def test_runtime_reads_the_machine_code(tmp_path: Path) -> None:
    executable = tvm_executables.build("cuda", HERE)
    (source,) = kernels.sources(executable)
    path = library.export(executable, tmp_path, HERE, {source.text: b"made-up machine code"})
    import tvm_ffi
    from tvm_ffi.registry import remove_global_func

    seen: list[bytes] = []

    def load(data: bytes) -> Any:
        seen.append(bytes(data))
        return kernels.modules(executable)[1]

    name = "ffi.Module.load_from_bytes.cuda"
    before = tvm_ffi.get_global_func(name, allow_missing=True)
    tvm_ffi.register_global_func(name, load, override=True)
    try:
        tvm_ffi.load_module(str(path))
    finally:
        remove_global_func(name)
        if before is not None:
            tvm_ffi.register_global_func(name, before)
    (data,) = seen
    assert data.startswith(struct.pack("<Q", 5) + b"cubin")
    assert data.endswith(struct.pack("<Q", 20) + b"made-up machine code")
    assert all(kernel.encode() in data for kernel in source.names)


def test_machine_code_of_other_kernels_is_refused(tmp_path: Path) -> None:
    executable = tvm_executables.build("cuda", "aarch64-linux-gnu")
    with pytest.raises(BackendFault, match="other CUDA kernels"):
        library.export(executable, tmp_path, "aarch64-linux-gnu", {"another source": b"machine code"})
    assert not list(tmp_path.iterdir())


def test_missing_zig_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    executable = tvm_executables.build("llvm", "aarch64-linux-gnu")
    monkeypatch.setattr(library, "_LINKER", "no-ziglang")
    with pytest.raises(MissingTool, match="needs no-ziglang"):
        library.export(executable, tmp_path, "aarch64-linux-gnu")


@pytest.mark.usefixtures("zig")
def test_what_zig_cannot_link_is_a_backend_fault(tmp_path: Path) -> None:
    executable = tvm_executables.build("llvm", "x86_64-linux-gnu")
    with pytest.raises(BackendFault, match=r"cannot be linked for aarch64-linux-gnu") as raised:
        library.export(executable, tmp_path, "aarch64-linux-gnu")
    assert "error:" in raised.value.why


@pytest.mark.parametrize(
    ("header", "expected"),
    [
        (elf(62), Format("ELF", 64, "x86_64")),
        (elf(183), Format("ELF", 64, "aarch64")),
        (elf(22, ">"), Format("ELF", 64, "machine 22")),
        (macho(0x0100000C), Format("Mach-O", 64, "aarch64")),
        (macho(0x01000007), Format("Mach-O", 64, "x86_64")),
        (macho(0x0200000C), Format("Mach-O", 64, "CPU type 0x200000c")),
        (b"\0asm\1\0\0\0", Format("wasm", 32, "wasm32")),
    ],
)
def test_header_says_what_a_file_is_for(header: bytes, expected: Format, tmp_path: Path) -> None:
    assert library.inspect(written(tmp_path / "model", header)) == expected


@pytest.mark.parametrize("data", [b"", b"\x7fELF\x02\x01", b"#!/bin/sh\n"], ids=["empty", "cut", "text"])
def test_other_files_are_no_library(data: bytes, tmp_path: Path) -> None:
    with pytest.raises(BackendFault, match="is no library"):
        library.inspect(written(tmp_path / "model.so", data))


def test_archive_of_mixed_objects_is_refused(tmp_path: Path) -> None:
    with tarfile.open(tmp_path / "model.tar", "w") as archive:
        for name, machine in (("a.o", 62), ("b.o", 183)):
            archive.add(written(tmp_path / name, elf(machine)), name)
    with pytest.raises(BackendFault, match="not objects for one machine"):
        library.inspect(tmp_path / "model.tar")


@pytest.mark.parametrize("triple", ["x86_64-linux-gnu", "aarch64-apple-darwin", "wasm32-unknown-unknown-wasm"])
def test_library_for_another_machine_is_refused(triple: str, tmp_path: Path) -> None:
    path = written(tmp_path / "model.so", elf(183))
    assert library.require(path, "aarch64-linux-gnu") == path
    with pytest.raises(BackendFault, match=f"model.so is not for {triple}") as raised:
        library.require(path, triple)
    assert raised.value.why == "It is 64-bit ELF for aarch64."


def test_a_file_that_is_no_library_is_not_another_machines(tmp_path: Path) -> None:
    path = tmp_path / "model.so"
    path.write_text("junk")
    with pytest.raises(BackendFault, match="is no library"):
        library.is_for_this_machine(path)
