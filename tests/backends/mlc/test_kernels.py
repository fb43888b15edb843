from __future__ import annotations

import os
import shutil
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import tvm_executables
from edgeq.backends.mlc import kernels
from edgeq.errors import BackendFault, MissingTool

HOST = "x86_64-linux-gnu"
NVCC = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then printf '%s\\n' sm_80 sm_87; exit; fi
for last; do :; done
while [ "$1" != -o ]; do shift; done
{ echo machine code of; cat "$last"; } > "$2"
"""
REFUSING = """#!/bin/sh
if [ "$1" = --list-gpu-code ]; then echo sm_87; exit; fi
echo 'kernels:1:1: warning: a remark' >&2
for line in 1 2 3 4 5 6; do echo "kernels:$line:1: error: no such thing" >&2; done
exit 1
"""


@pytest.fixture
def programs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The only folder on PATH, with what the programs of these tests call."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("cat", "grep"):
        (folder / name).symlink_to(shutil.which(name) or "/")
    monkeypatch.setenv("PATH", str(folder))
    monkeypatch.setattr(kernels, "_NVCC", tmp_path / "none")
    return folder


def program(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8")
    path.chmod(0o755)


@pytest.fixture(scope="module")
def cuda() -> Any:
    return tvm_executables.build("cuda", HOST)


@pytest.fixture(scope="module")
def opencl() -> Any:
    return tvm_executables.build("opencl", HOST)


@pytest.mark.parametrize("kind", tvm_executables.GPUS)
def test_sources_and_names_are_found_for_each_api(kind: str) -> None:
    (source,) = kernels.sources(tvm_executables.build(kind, HOST))
    assert source.kind == kind
    assert source.names
    assert all(f"{name}(" in source.text for name in source.names)
    assert all(name.endswith(("_kernel", "_kernel_1")) for name in source.names)


def test_executable_for_the_cpu_has_no_kernels() -> None:
    executable = tvm_executables.build("llvm", HOST)
    assert kernels.sources(executable) == []
    assert kernels.check(executable, "llvm") == kernels.Kernels((), "compiled")
    with pytest.raises(BackendFault, match="no cuda kernels"):
        kernels.check(executable, "cuda", "sm_87")


@pytest.mark.usefixtures("programs")
@pytest.mark.parametrize("kind", tvm_executables.GPUS)
def test_kernels_are_unchecked_without_a_compiler(kind: str) -> None:
    executable = tvm_executables.build(kind, HOST)
    found = kernels.check(executable, kind, "sm_87")
    assert (found.state, found.binaries) == ("unchecked", {})
    assert found.names == kernels.sources(executable)[0].names


def test_nvcc_compiles_cuda_kernels(cuda: Any, programs: Path) -> None:
    program(programs / "nvcc", NVCC)
    found = kernels.check(cuda, "cuda", "sm_87")
    (source,) = kernels.sources(cuda)
    assert found.state == "compiled"
    assert found.binaries == {source.text: b"machine code of\n" + source.text.encode()}


def test_nvcc_off_path_is_found(cuda: Any, programs: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_NVCC", programs / "elsewhere")
    program(programs / "elsewhere", NVCC)
    assert kernels.check(cuda, "cuda", "sm_87").state == "compiled"


def test_nvcc_that_does_not_know_the_architecture_is_none(cuda: Any, programs: Path) -> None:
    program(programs / "nvcc", NVCC)
    assert kernels.check(cuda, "cuda", "sm_110").state == "unchecked"
    with pytest.raises(MissingTool, match="no nvcc that knows sm_110"):
        kernels.cubin("", "sm_110")


def test_refused_kernels_are_a_fault_with_the_first_errors(cuda: Any, opencl: Any, programs: Path) -> None:
    for name, kind, executable in (("nvcc", "cuda", cuda), ("clang", "opencl", opencl)):
        program(programs / name, REFUSING)
        with pytest.raises(BackendFault, match=f"{name} refuses the kernels") as raised:
            kernels.check(executable, kind, "sm_87")
        assert raised.value.why.splitlines() == [f"kernels:{line}:1: error: no such thing" for line in range(1, 6)]


def test_silent_failure_is_a_fault_too(cuda: Any, programs: Path) -> None:
    program(programs / "nvcc", '#!/bin/sh\n[ "$1" = --list-gpu-code ] && echo sm_87 || exit 3\n')
    with pytest.raises(BackendFault) as raised:
        kernels.check(cuda, "cuda", "sm_87")
    assert raised.value.why == "It ended with code 3."


def test_clang_reads_opencl_kernels(opencl: Any, programs: Path) -> None:
    program(programs / "clang", '#!/bin/sh\nfor last; do :; done\nexec grep -q "__kernel void" "$last"\n')
    assert kernels.check(opencl, "opencl").state == "compiled"


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_real_nvcc_makes_machine_code(cuda: Any) -> None:
    (binary,) = kernels.check(cuda, "cuda", "sm_87").binaries.values()
    assert binary.startswith(b"\x7fELF")
    assert struct.unpack_from("<H", binary, 18) == (190,)  # EM_CUDA


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="nvcc is not on PATH")
def test_real_nvcc_refuses_what_is_no_cuda() -> None:
    with pytest.raises(BackendFault, match="nvcc refuses the kernels") as raised:
        kernels.cubin('extern "C" __global__ void kernel(nothing* x) {}', "sm_87")
    assert 'kernels.cu(1): error: identifier "nothing" is undefined' in raised.value.why.splitlines()


@pytest.mark.skipif(
    shutil.which("clang") is None,
    reason="clang is not installed (scripts/verify_kernels installs it and runs this test)",
)
def test_real_clang_accepts_opencl_kernels(opencl: Any) -> None:
    assert kernels.check(opencl, "opencl").state == "compiled"


@pytest.fixture
def compiler() -> Callable[[], Callable[[str], bytes]]:
    """What TVM's CUDA runtime asks to compile source, at the moment of the call."""
    pytest.importorskip("tvm", reason="apache-tvm is not installed")
    import tvm_ffi

    return lambda: tvm_ffi.get_global_func("tvm_callback_cuda_compile")


def test_device_compiles_each_source_once(compiler: Callable[[], Callable[[str], bytes]], tmp_path: Path) -> None:
    calls: list[tuple[str, str]] = []

    def compile_source(source: str, arch: str) -> bytes:
        calls.append((source, arch))
        return f"\x7fELF {source} for {arch}".encode()

    before, folder = compiler(), tmp_path / "cache"
    for arch in ("sm_87", "sm_87", "sm_89"):
        with kernels.cache_compiled(folder, compile_source, arch):
            assert bytes(compiler()("kernel")) == f"\x7fELF kernel for {arch}".encode()
    assert calls == [("kernel", "sm_87"), ("kernel", "sm_89")]
    assert [each.suffix for each in folder.iterdir()] == [".cubin", ".cubin"]
    assert compiler().same_as(before)  # type: ignore[attr-defined]


def test_device_without_nvcc_says_so(
    compiler: Callable[[], Callable[[str], bytes]], programs: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "cache"
    with pytest.raises(MissingTool, match="no nvcc that knows sm_87"), kernels.cache_compiled(folder, arch="sm_87"):
        compiler()("kernel")
    assert not folder.exists()
    with pytest.raises(RuntimeError, match="of another kind"), kernels.cache_compiled(folder, arch="sm_87"):
        raise RuntimeError("of another kind")


@pytest.mark.parametrize("before", [None, "0"])
def test_environment_is_as_before_after_a_build(before: str | None, monkeypatch: pytest.MonkeyPatch) -> None:
    name = "TVM_COMPILE_FORCE_FALLBACK"
    monkeypatch.delenv(name, raising=False)
    if before is not None:
        monkeypatch.setenv(name, before)
    with kernels.kept_as_source():
        assert os.environ[name] == "1"
    assert os.environ.get(name) == before


def test_a_cache_that_cannot_be_written_only_costs_time(
    compiler: Callable[[], Callable[[str], bytes]], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    with kernels.cache_compiled(tmp_path / "file" / "cache", lambda source, arch: b"code", arch="sm_87"):
        assert [bytes(compiler()("kernel")) for _ in range(2)] == [b"code"] * 2
