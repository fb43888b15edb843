"""A compiled executable as one library file for another machine, linked by zig, whatever machine this is."""

from __future__ import annotations

import importlib.metadata
import io
import platform
import struct
import subprocess
import sys
import tarfile
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from edgeq.backends.mlc import kernels
from edgeq.errors import BackendFault, MissingTool

_LINKER = "ziglang"
NAME = "model"
"""Stem of a library's file name."""


class Format(NamedTuple):
    """What a file's header says: `container` ELF, Mach-O or wasm, and `machine` as triples name it."""

    container: str
    bits: int
    machine: str


class _System(NamedTuple):
    """How zig links for a system: its name there with the oldest version that may load a library, and flags."""

    zig: str
    container: str
    suffix: str
    flags: tuple[str, ...]


_SYSTEMS = {
    "apple-darwin": _System(
        "macos.11.0", "Mach-O", ".dylib", ("-undefined", "dynamic_lookup", "-install_name", f"@rpath/{NAME}.dylib")
    ),
    "linux-gnu": _System("linux-gnu.2.28", "ELF", ".so", ("-lm", "-Wl,-s")),
}
"""glibc 2.28 is that of TVM's own wheels; macOS 11 is the first on ARM."""
_ELF_MACHINES = {40: "arm", 62: "x86_64", 183: "aarch64", 243: "riscv64"}
_MACHO_MACHINES = {0x01000007: "x86_64", 0x0100000C: "aarch64"}
_HEADER_BYTES = 20


def export(executable: Any, folder: Path, triple: str, binaries: Mapping[str, bytes] | None = None) -> Path:
    """Write an executable into `folder` as one file for a triple, and return the file's path.

    For Linux and macOS that is a shared library. For what cannot be linked here (wasm32, Android) it is model.tar, with
    the objects that the makers' linker there takes. `binaries` has machine code for sources of CUDA kernels, as
    `kernels.check` made it; kernels without any are compiled on the device when it loads the library. The bytes of the
    file depend on nothing else.

    Raises MissingTool when zig is not installed, BackendFault when the executable or its objects cannot be linked.
    """
    with tempfile.TemporaryDirectory() as scratch:
        objects = _objects(executable, Path(scratch), binaries or {})
        out, system = folder / file_name(triple), _SYSTEMS.get(_split(triple)[1])
        if system is None:
            return _archive(objects, out)
        _link(objects, out, triple, system.flags)
    return require(out, triple)


def linker() -> str:
    """Name and version of what links; raises MissingTool when it is not installed."""
    try:
        return f"{_LINKER} {importlib.metadata.version(_LINKER)}"
    except importlib.metadata.PackageNotFoundError as error:
        raise MissingTool(
            f"the mlc backend needs {_LINKER} to build",
            why="It links libraries for any machine, so that no cross compiler has to be installed.",
            run="pip install 'edgeq[build,tvm]'",
        ) from error


def link_command(triple: str, driver: str) -> list[str]:
    """Words that start zig as the C (`cc`) or C++ (`c++`) compiler of a Linux or a Mac; raises as `linker` does."""
    linker()
    machine, system = _split(triple)
    return [sys.executable, "-m", _LINKER, driver, "-target", f"{machine}-{_SYSTEMS[system].zig}"]


def file_name(triple: str) -> str:
    """Name of a library for a triple: model.so, model.dylib, or model.tar where it cannot be linked here."""
    system = _SYSTEMS.get(_split(triple)[1])
    return f"{NAME}{system.suffix if system else '.tar'}"


def find(folder: Path) -> Path:
    """The library in a folder that `export` wrote into; raises BackendFault when there is none."""
    found = next(iter(sorted(folder.glob(f"{NAME}.*"))), None)
    if found is None:
        raise BackendFault(f"{folder} has no library", run="edgeq build ... again")
    return found


def is_for_this_machine(path: Path) -> bool:
    """Whether this system can load a library; its kernels' device is another matter. Raises as `inspect` does."""
    found, (machine, _) = inspect(path), _split(f"{platform.machine()}-")
    container = {"linux": "ELF", "darwin": "Mach-O"}.get(sys.platform)
    return path.suffix != ".tar" and (found.container, found.machine) == (container, machine)


def inspect(path: Path) -> Format:
    """Format of a library, or of the objects in an archive, by its header (ELF, Mach-O and WebAssembly specifications).

    Raises BackendFault when the file is none of them, or the objects of an archive differ.
    """
    if path.suffix != ".tar":
        with path.open("rb") as file:
            return _format(file.read(_HEADER_BYTES), path)
    with tarfile.open(path) as archive:
        members = [archive.extractfile(member) for member in archive]
        found = {_format(member.read(_HEADER_BYTES), path) for member in members if member}
    if len(found) != 1:
        raise BackendFault(f"{path}: not objects for one machine", why=f"Found: {sorted(found)}.")
    return found.pop()


def require(path: Path, triple: str) -> Path:
    """The path of a library, once its header is found to be for a triple; raises BackendFault when it is not."""
    machine, rest = _split(triple)
    found = inspect(path)
    system = _SYSTEMS.get(rest)
    if found.machine != machine or (system and found.container != system.container):
        raise BackendFault(
            f"{path.name} is not for {triple}", why=f"It is {found.bits}-bit {found.container} for {found.machine}."
        )
    return path


def _split(triple: str) -> tuple[str, str]:
    """Machine and the rest; Apple's arm64 is aarch64."""
    machine, _, rest = triple.partition("-")
    return {"arm64": "aarch64"}.get(machine, machine), rest


def _objects(executable: Any, scratch: Path, binaries: Mapping[str, bytes]) -> list[Path]:
    """Object files of an executable: its machine code, and everything else as one symbol with bytes."""
    import tvm_ffi

    found = kernels.modules(executable)
    compiled = [module for module in found if module.is_compilation_exportable()]
    target = next((str(each.get_function("_get_target_string")()) for each in compiled if each.kind == "llvm"), None)
    if target is None:
        raise BackendFault("the executable has no code for a CPU", why="Its host target is not LLVM.")
    packed = tvm_ffi.get_global_func("runtime.ModulePackImportsToTensor")(found[0]).numpy().tobytes()
    blob = _with_binaries(packed, binaries)
    objects = []
    for name, module in [
        *((f"lib{index}", each) for index, each in enumerate(compiled)),
        ("devc", tvm_ffi.get_global_func("codegen.codegen_blob")(blob, False, target, "")),
    ]:
        objects.append(scratch / f"{name}.o")
        module.write_to_file(str(objects[-1]))
    return objects


class _Reader:
    """Reads what TVM's serializer wrote: little-endian 64-bit counts, each before its bytes or words."""

    def __init__(self, data: bytes) -> None:
        self.data, self.at = data, 0

    def take(self, unit: int) -> bytes:
        (count,) = struct.unpack_from("<Q", self.data, self.at)
        start, self.at = self.at + 8, self.at + 8 + count * unit
        if self.at > len(self.data):
            raise BackendFault("TVM packs modules in another way than edgeq knows", why="A count leads past the end.")
        return self.data[start : self.at]


def _counted(data: bytes) -> bytes:
    return struct.pack("<Q", len(data)) + data


def _with_binaries(packed: bytes, binaries: Mapping[str, bytes]) -> bytes:
    """Packed modules, with CUDA source replaced by machine code where there is some.

    Packed are the size of the rest, two lists of 64-bit words that give the tree of imports, then a kind and its bytes
    for each module; those of kind `_lib` are linked and have none. A CUDA module's bytes are the format of its code, a
    table of kernels, and the code.
    """
    reader = _Reader(packed)
    reader.at = 8
    reader.take(8), reader.take(8)
    parts = [packed[8 : reader.at]]
    while reader.at < len(packed):
        kind = reader.take(1)
        parts.append(_counted(kind))
        if kind != b"_lib":
            module = reader.take(1)
            parts.append(_counted(_compiled(module, binaries) if kind == b"cuda" else module))
    return _counted(b"".join(parts))


def _compiled(module: bytes, binaries: Mapping[str, bytes]) -> bytes:
    """The bytes of a CUDA module with its machine code; unchanged where nothing was compiled."""
    for source, binary in binaries.items():
        before, after = _counted(b"cuda"), _counted(source.encode())
        if module.startswith(before) and module.endswith(after):
            return _counted(b"cubin") + module[len(before) : -len(after)] + _counted(binary)
    if binaries:
        raise BackendFault(
            "the executable has other CUDA kernels than were compiled",
            why="It is another executable, or was built outside kernels.kept_as_source.",
        )
    return module


def _link(objects: Sequence[Path], out: Path, triple: str, flags: Sequence[str]) -> None:
    linked = [*link_command(triple, "cc"), "-shared", "-o", str(out), *map(str, objects), *flags]
    done = subprocess.run(linked, capture_output=True, text=True, errors="replace")
    if done.returncode:
        raise BackendFault(f"the library cannot be linked for {triple}", why=done.stderr.strip()[-2000:])


def _archive(objects: Sequence[Path], out: Path) -> Path:
    with tarfile.open(out, "w") as archive:
        for path in objects:
            data = path.read_bytes()
            member = tarfile.TarInfo(path.name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    return out


def _format(header: bytes, path: Path) -> Format:
    if header.startswith(b"\x7fELF") and len(header) == _HEADER_BYTES:
        order = "<" if header[5] == 1 else ">"
        (machine,) = struct.unpack_from(f"{order}H", header, 18)
        return Format("ELF", 32 * header[4], _ELF_MACHINES.get(machine, f"machine {machine}"))
    if header.startswith(b"\xcf\xfa\xed\xfe") and len(header) == _HEADER_BYTES:
        (machine,) = struct.unpack_from("<I", header, 4)
        return Format("Mach-O", 64, _MACHO_MACHINES.get(machine, f"CPU type {machine:#x}"))
    if header.startswith(b"\0asm"):
        return Format("wasm", 32, "wasm32")
    raise BackendFault(f"{path} is no library", why="It begins like no ELF, Mach-O or WebAssembly file.")
