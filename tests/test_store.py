from __future__ import annotations

import errno
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
from collections import namedtuple
from pathlib import Path

import pytest

from edgeq import errors, store
from edgeq.bundle import MANIFEST
from edgeq.errors import Busy, DiskFault, MissingTool, OutOfMemory, UsageFault

Usage = namedtuple("Usage", "total used free")

KILLED = """
import os, shutil, signal, sys
from pathlib import Path
from edgeq import store

out, left = Path(sys.argv[1]), int(sys.argv[2])

def counted(call):
    def wrapped(*words, **options):
        global left
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        left -= 1
        return call(*words, **options)
    return wrapped

with store.staging(out, 1) as folder:
    for place, name in ((os, "fsync"), (Path, "rename"), (Path, "chmod"), (store, "_exchange"), (shutil, "rmtree")):
        setattr(place, name, counted(getattr(place, name)))
    for name in ("edgeq.json", "model", "more"):
        counted((folder / name).write_text)("new")
"""

HELD = """
import sys
from pathlib import Path
from edgeq import store

with store.scratch(Path(sys.argv[1])) as folder:
    print(folder, flush=True)
    sys.stdin.read()
"""

SLOW = """
import os, signal, sys
from pathlib import Path
from edgeq import store

store._exchange = lambda one, other: False
out, rename = Path(sys.argv[1]), Path.rename
Path.rename = lambda path, target: rename(path, target) if path == out else os.kill(os.getpid(), signal.SIGKILL)
with store.staging(out, 1) as folder:
    (folder / "edgeq.json").write_text("new")
"""


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundles" / "one"


def write_bundle(out: Path, text: str, *names: str) -> None:
    with store.staging(out, 1) as folder:
        for name in (MANIFEST, *names):
            (folder / name).write_text(text)


def contents(folder: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in folder.iterdir()}


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_folder_appears_when_the_block_ends(out: Path) -> None:
    with store.staging(out, 1) as folder:
        assert folder.parent == out.parent
        (folder / "sub").mkdir()
        (folder / "sub" / "file").write_text("x")
        assert not out.exists()
    assert (out / "sub" / "file").read_text() == "x"
    assert names(out.parent) == ["one"]
    assert out.stat().st_mode & 0o777 == 0o755


def write_half(out: Path, error: BaseException) -> None:
    with store.staging(out, 1) as folder:
        (folder / "half").write_text("x")
        raise error


@pytest.mark.parametrize("kind", [RuntimeError, KeyboardInterrupt, errors.Interrupted, OSError])
def test_nothing_is_left_after_an_exception(out: Path, kind: type[BaseException]) -> None:
    with pytest.raises(kind, match="half way"):
        write_half(out, kind("half way"))
    assert not out.parent.exists()


def test_an_older_bundle_stays_as_it_was_after_an_exception(out: Path) -> None:
    write_bundle(out, "old", "model")
    with pytest.raises(RuntimeError, match="half way"):
        write_half(out, RuntimeError("half way"))
    assert contents(out) == {MANIFEST: "old", "model": "old"}
    assert names(out.parent) == ["one"]


def test_an_older_bundle_is_replaced_whole(out: Path) -> None:
    write_bundle(out, "old", "only-old")
    write_bundle(out, "new", "only-new")
    assert contents(out) == {MANIFEST: "new", "only-new": "new"}
    assert names(out.parent) == ["one"]


def test_an_older_bundle_is_replaced_whole_where_names_cannot_be_exchanged(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    write_bundle(out, "old", "only-old")
    write_bundle(out, "new", "only-new")
    assert contents(out) == {MANIFEST: "new", "only-new": "new"}
    assert names(out.parent) == ["one"]


def test_an_older_bundle_comes_back_when_the_slow_exchange_fails(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(out, "old")
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if target == out and (path / MANIFEST).read_text() == "new":
            raise OSError(errno.EIO, "broken", str(target))
        return rename(path, target)

    monkeypatch.setattr(store, "_exchange", lambda one, other: False)
    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(OSError, match="broken"):
        write_bundle(out, "new")
    assert contents(out) == {MANIFEST: "old"}
    assert names(out.parent) == ["one"]


@pytest.mark.skipif(sys.platform != "linux", reason="only Linux exchanges two names in one system call")
def test_two_names_are_exchanged_in_one_step(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "file").write_text(name)
    assert store._exchange(tmp_path / "a", tmp_path / "b")
    assert (tmp_path / "a" / "file").read_text() == "b"
    assert (tmp_path / "b" / "file").read_text() == "a"
    with pytest.raises(FileNotFoundError):
        store._exchange(tmp_path / "a", tmp_path / "nowhere")


def test_an_empty_folder_is_taken(out: Path) -> None:
    out.mkdir(parents=True)
    write_bundle(out, "new")
    assert contents(out) == {MANIFEST: "new"}


def test_what_is_not_a_bundle_is_refused_and_kept(out: Path) -> None:
    out.mkdir(parents=True)
    (out / "thesis.txt").write_text("years of work")
    with pytest.raises(UsageFault, match="exists and is not a bundle"):
        write_bundle(out, "new")
    assert contents(out) == {"thesis.txt": "years of work"}


def test_a_file_is_refused_and_kept(out: Path) -> None:
    out.parent.mkdir()
    out.write_text("mine")
    with pytest.raises(UsageFault, match="exists and is not a bundle"):
        write_bundle(out, "new")
    assert out.read_text() == "mine"


def test_what_somebody_put_there_during_the_build_is_kept(out: Path) -> None:
    def build() -> None:
        with store.staging(out, 1) as folder:
            (folder / MANIFEST).write_text("new")
            out.mkdir()
            (out / "thesis.txt").write_text("years of work")

    with pytest.raises(UsageFault, match="exists and is not a bundle"):
        build()
    assert contents(out) == {"thesis.txt": "years of work"}
    assert names(out.parent) == ["one"]


def test_a_link_to_a_bundle_stays_a_link_and_its_bundle_is_replaced(out: Path, tmp_path: Path) -> None:
    write_bundle(out, "old")
    (tmp_path / "link").symlink_to(out)
    write_bundle(tmp_path / "link", "new")
    assert (tmp_path / "link").is_symlink()
    assert contents(out) == {MANIFEST: "new"}


def test_the_current_folder_can_be_the_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    write_bundle(Path(), "new")
    assert contents(tmp_path / "here") == {MANIFEST: "new"}
    assert names(tmp_path) == ["here"]


@pytest.mark.parametrize("name", ["n" * 255, "with space", "häßlich", "caf\udce9", "line\nbreak", "-o"])
def test_odd_names_work(tmp_path: Path, name: str) -> None:
    for text in ("old", "new"):
        write_bundle(tmp_path / name, text)
    assert contents(tmp_path / name) == {MANIFEST: "new"}
    assert names(tmp_path) == [name]


def test_a_place_below_a_file_is_a_usage_fault(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("x")
    for place in (tmp_path / "file" / "one", tmp_path / "file" / "deeper" / "one"):
        with pytest.raises(OSError) as caught:  # noqa: PT011
            write_bundle(place, "new")
        assert isinstance(errors.from_system(caught.value), UsageFault)


def test_a_disk_that_is_too_small_is_said_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: Usage(10**12, 0, 1_500_000_000))
    with pytest.raises(DiskFault) as caught, store.staging(out, 2_000_000_000):
        pytest.fail("the work began")
    assert caught.value.exit_code == 20
    assert "1.50 GB free" in caught.value.what
    assert "needs about 2.07 GB" in caught.value.what
    assert not out.parent.exists()


@pytest.mark.parametrize("code", [errno.EROFS, errno.EACCES])
def test_a_read_only_parent_is_said_before_any_work(out: Path, monkeypatch: pytest.MonkeyPatch, code: int) -> None:
    def refuse(path: Path, *_: object, **__: object) -> None:
        raise OSError(code, os.strerror(code), str(path))

    monkeypatch.setattr(Path, "mkdir", refuse)
    monkeypatch.setattr(os, "mkdir", refuse)
    with pytest.raises(OSError) as caught, store.staging(out, 1):  # noqa: PT011
        pytest.fail("the work began")
    found = errors.from_system(caught.value)
    assert found is not None
    assert found.exit_code == 22
    assert str(out.parent) in found.what


def test_a_disk_that_fills_at_the_end_leaves_the_older_bundle(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_bundle(out, "old")

    def full(handle: int) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError) as caught:  # noqa: PT011
        write_bundle(out, "new")
    assert isinstance(errors.from_system(caught.value), DiskFault)
    assert contents(out) == {MANIFEST: "old"}
    assert names(out.parent) == ["one"]


@pytest.mark.parametrize("older", [False, True])
def test_files_are_durable_before_their_folder_before_the_rename_before_the_parent(
    out: Path, monkeypatch: pytest.MonkeyPatch, older: bool
) -> None:
    if older:
        write_bundle(out, "old")
    log: list[str] = []
    fsync, rename, exchange = os.fsync, Path.rename, store._exchange

    def logged_fsync(handle: int) -> None:
        place = Path(f"/proc/self/fd/{handle}").readlink()
        log.append("staging" if place.name.startswith(".edgeq.") else place.name)
        fsync(handle)

    def logged_rename(path: Path, target: Path) -> Path:
        log.append("RENAME")
        return rename(path, target)

    def logged_exchange(one: Path, other: Path) -> bool:
        log.append("RENAME")
        return exchange(one, other)

    monkeypatch.setattr(os, "fsync", logged_fsync)
    monkeypatch.setattr(Path, "rename", logged_rename)
    monkeypatch.setattr(store, "_exchange", logged_exchange)
    with store.staging(out, 1) as folder:
        (folder / "sub").mkdir()
        for name in (MANIFEST, "model", "sub/inner"):
            (folder / name).write_text("x")
    at = {name: log.index(name) for name in log}
    assert len(log) == len(at)
    assert at["inner"] < at["sub"] < at["staging"] < at["RENAME"] < at["bundles"]
    assert max(at[MANIFEST], at["model"]) < at["staging"]


def test_a_kill_at_any_step_leaves_the_old_or_the_new_bundle_whole(out: Path) -> None:
    write_bundle(out, "old", "model", "more")
    outcomes = []
    for step in range(100):
        child = subprocess.run([sys.executable, "-c", KILLED, str(out), str(step)], check=False)
        found = contents(out)
        assert set(found) == {MANIFEST, "model", "more"}
        assert len(set(found.values())) == 1
        outcomes.append(found["model"])
        if child.returncode == 0:
            break
        assert child.returncode == -signal.SIGKILL
    assert outcomes[0] == "old"
    assert outcomes[-1] == "new"
    assert len(outcomes) > 9
    assert outcomes == sorted(outcomes, reverse=True)


def test_a_build_after_a_kill_succeeds(out: Path) -> None:
    child = subprocess.run([sys.executable, "-c", KILLED, str(out), "4"], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    (out.parent / ".edgeq.walk.key").mkdir()
    assert len(names(out.parent)) == 2
    write_bundle(out, "new")
    assert contents(out) == {MANIFEST: "new"}
    assert names(out.parent) == [".edgeq.walk.key", "one"]


def test_what_a_killed_build_left_gives_its_room_back_before_room_is_looked_for(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    subprocess.run([sys.executable, "-c", KILLED, str(out), "4"], check=False)

    def usage(path: Path) -> Usage:
        return Usage(10**12, 0, 10**8 if names(out.parent) == [] else 0)

    monkeypatch.setattr(shutil, "disk_usage", usage)
    write_bundle(out, "new")
    assert contents(out) == {MANIFEST: "new"}


def test_a_folder_is_kept_by_the_number_of_its_process_and_by_its_lock(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    held = subprocess.Popen([sys.executable, "-c", HELD, str(tmp_path)], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert held.stdout
    folder = Path(os.fsdecode(held.stdout.readline().rstrip()))
    for call in ("fcntl.flock", "psutil.pid_exists"):
        with monkeypatch.context() as blind:
            blind.setattr(call, lambda *_: None)
            with store.scratch(tmp_path):
                assert folder.is_dir()
    held.kill()
    held.communicate()
    with store.scratch(tmp_path):
        assert not folder.exists()


@pytest.mark.parametrize("number", ["none", "99999999999999999999"])
def test_a_folder_whose_name_only_looks_like_that_of_a_process_is_kept(tmp_path: Path, number: str) -> None:
    other = tmp_path / f"{store._own_prefix()}{number}.x"
    other.mkdir()
    with store.scratch(tmp_path):
        assert other.is_dir()


def test_a_folder_of_another_machine_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("psutil.pid_exists", lambda number: False)
    left = Path(tempfile.mkdtemp(prefix=f"{store._own_prefix()}123.", dir=tmp_path))
    with monkeypatch.context() as moved:
        moved.setattr("platform.node", lambda: "elsewhere")
        with store.scratch(tmp_path):
            assert left.is_dir()
    with store.scratch(tmp_path):
        assert not left.exists()


def test_an_older_bundle_that_a_kill_left_beside_its_place_is_kept(out: Path) -> None:
    write_bundle(out, "old")
    child = subprocess.run([sys.executable, "-c", SLOW, str(out)], check=False)
    assert child.returncode == -signal.SIGKILL
    assert not out.exists()
    write_bundle(out.parent / "other", "new")
    (left,) = (path for path in out.parent.iterdir() if path.name.startswith(".edgeq."))
    assert contents(left) == {MANIFEST: "old"}


def test_of_builds_that_end_at_once_one_is_kept_whole_and_none_fails(out: Path) -> None:
    barrier, failed = threading.Barrier(8), list[BaseException]()

    def build(number: int) -> None:
        try:
            for attempt in range(5):
                with store.staging(out, 1) as folder:
                    for name in (MANIFEST, "model"):
                        (folder / name).write_text(f"{number}.{attempt}")
                    barrier.wait()
        except BaseException as error:
            failed.append(error)
            barrier.abort()

    threads = [threading.Thread(target=build, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    found = contents(out)
    assert set(found) == {MANIFEST, "model"}
    assert found[MANIFEST] == found["model"]
    assert names(out.parent) == ["one"]


def test_a_place_that_is_always_taken_is_busy(out: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def taken(path: Path, target: Path) -> Path:
        raise OSError(errno.ENOTEMPTY, "taken", str(target))

    monkeypatch.setattr(Path, "rename", taken)
    with pytest.raises(Busy, match="other builds keep replacing it"):
        write_bundle(out, "new")
    assert not out.parent.exists()


@pytest.mark.parametrize("error", [OSError(errno.ENOSPC, "full"), OutOfMemory("too large"), MissingTool("gone")])
def test_a_walk_survives_what_another_run_may_mend(tmp_path: Path, error: Exception) -> None:
    def stopped() -> None:
        with store.resumable(tmp_path, "key") as folder:
            (folder / "done").touch()
            raise error

    with pytest.raises(type(error)):
        stopped()
    with store.resumable(tmp_path, "key") as again:
        assert (again / "done").is_file()
    assert not again.exists()


def test_a_walk_that_goes_on_has_no_file_that_was_being_written(tmp_path: Path) -> None:
    folder = tmp_path / ".edgeq.walk.key"
    (folder / "tuned").mkdir(parents=True)
    for name in ("done.zip", "some.123.partial", "tuned/other.123.partial"):
        (folder / name).touch()
    with store.resumable(tmp_path, "key") as again:
        assert [path.name for path in again.rglob("*") if path.is_file()] == ["done.zip"]


@pytest.mark.parametrize(
    ("found", "said"), [(True, "stopped; the same command goes on from what is done"), (False, "stopped")]
)
def test_who_stops_a_walk_is_told_that_it_goes_on(tmp_path: Path, found: bool, said: str) -> None:
    def stopped() -> None:
        with store.resumable(tmp_path, "key") as folder:
            if found:
                (folder / "done").touch()
            raise errors.Interrupted("stopped")

    with pytest.raises(errors.Interrupted) as caught:
        stopped()
    assert str(caught.value) == said
