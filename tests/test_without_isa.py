from __future__ import annotations

import functools
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

import script_files
from script_files import SCRIPTS

CPUINFO = Path("/proc/cpuinfo")
FLAGS = CPUINFO.read_text().split() if CPUINFO.exists() else []
LEAVES = """
#include <cpuid.h>
#include <stdio.h>
int main(void) {
    unsigned leaves[][2] = {{0, 0}, {7, 0}, {7, 1}, {0x1e, 1}, {0x80000002, 0}}, found[4];
    for (int i = 0; i < 5; i++) {
        __cpuid_count(leaves[i][0], leaves[i][1], found[0], found[1], found[2], found[3]);
        for (int j = 0; j < 4; j++) printf("%u %u %d %u\\n", leaves[i][0], leaves[i][1], j, found[j]);
    }
}
"""
NUMPY = """
import threading
def show():
    from numpy._core._multiarray_umath import __cpu_features__
    print(*(name for name, there in __cpu_features__.items() if there))
thread = threading.Thread(target=show)
thread.start()
thread.join()
"""

ask = functools.partial(subprocess.run, capture_output=True, text=True, check=False)


def without(names: str, *command: str) -> subprocess.CompletedProcess[str]:
    if "cpuid_fault" not in FLAGS:
        pytest.skip("/proc/cpuinfo has no cpuid_fault")
    if shutil.which("cc") is None:
        pytest.skip("needs cc, a C compiler")
    if "without_isa" in os.environ.get("LD_PRELOAD", ""):
        pytest.skip("these tests run inside without_isa")
    return ask([sys.executable, str(SCRIPTS / "without_isa"), names, "--", *command])


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("without_isa") as module:
        yield module


@pytest.mark.parametrize("names", ["amx", "avx512", "avx_vnni", "amx,avx512,avx_vnni"])
def test_the_bits_of_each_set_are_hidden_and_no_others(script: Any, tmp_path: Path, names: str) -> None:
    without(names, "true")
    (tmp_path / "leaves.c").write_text(LEAVES)
    program = str(tmp_path / "leaves")
    ask(["cc", str(tmp_path / "leaves.c"), "-o", program], check=True)
    expected = ""
    for line in ask([program]).stdout.splitlines():
        *place, found = map(int, line.split())
        rows = (row for name in names.split(",") for row in script.SETS[name])
        hidden = {bit for *where, bits in rows if where == place for bit in bits}
        expected += " ".join(map(str, (*place, found & ~sum(1 << bit for bit in hidden)))) + "\n"
    done = without(names, program)
    assert (done.stdout, done.stderr) == (expected, "")


@pytest.mark.skipif("avx512f" not in FLAGS, reason="this processor has no AVX-512")
def test_numpy_in_a_thread_of_a_child_sees_an_older_processor() -> None:
    numpy = [sys.executable, "-X", "faulthandler", "-c", NUMPY]
    child = f"import subprocess; subprocess.run({numpy!r}, check=True)"
    older = set(without("avx512", sys.executable, "-c", child).stdout.split())
    plain = set(ask(numpy).stdout.split())
    assert {"AVX2", "AVX512F"} <= plain
    assert older == {name for name in plain if not name.startswith(("AVX512", "X86_V4"))}


def test_the_words_of_the_command_are_its_own() -> None:
    assert without("avx512", "printf", "%s ", "-x", "--", "amx").stdout == "-x -- amx "


@pytest.mark.parametrize("arguments", [["avx512"], ["avx512", "--"], ["avx512", "true"]])
def test_a_command_is_wanted(script: Any, arguments: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(arguments)
    assert "usage: without_isa SET[,SET...] -- COMMAND" in capsys.readouterr().err


@pytest.mark.parametrize(("command", "status"), [("exit 7", 7), ("kill -SEGV $$", 139), ("kill -TERM $$", 143)])
def test_the_status_is_the_commands_and_nothing_is_said(command: str, status: int) -> None:
    done = without("avx512", "sh", "-c", command)
    assert (done.returncode, done.stdout, done.stderr) == (status, "", "")


def test_a_bad_address_still_ends_the_command() -> None:
    assert without("avx512", sys.executable, "-c", "import ctypes; ctypes.string_at(1)").returncode == 139


def test_a_command_that_is_not_there_is_named() -> None:
    done = without("avx512", "no-such-command")
    assert done.returncode == 127
    assert "no-such-command: No such file" in done.stderr


def test_an_unknown_set_is_named_with_those_there_are(script: Any, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit, match="2"):
        script.main(["avx512,avx1024", "--", "true"])
    assert "'avx1024'; next: name some of amx,avx512,avx_vnni" in capsys.readouterr().err


def test_another_one_inside_is_refused(script: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LD_PRELOAD", "/tmp/without_isa-x/without_isa.so")
    with pytest.raises(SystemExit, match="2"):
        script.main(["avx512", "--", "true"])


@pytest.mark.parametrize(("machine", "said"), [("aarch64", "x86-64 Linux alone"), ("x86_64", "no C compiler")])
def test_what_it_needs_is_named(
    script: Any,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
    machine: str,
    said: str,
) -> None:
    monkeypatch.setattr(script.sys, "platform", "linux")
    monkeypatch.setattr(script.platform, "machine", lambda: machine)
    monkeypatch.setattr(script.shutil, "which", lambda name: None)
    with pytest.raises(SystemExit, match="5"):
        script.environment(["avx512"], tmp_path)
    assert said in capsys.readouterr().err
