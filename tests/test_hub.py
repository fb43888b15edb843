"""Downloads against a local server that speaks the hub's protocol.

The hub's library reads its environment once, when it is imported, so one child process does the downloads of all
tests; each test has a repository of its own, and with it its own part of the cache.
"""

from __future__ import annotations

import ast
import hashlib
import json
import os
import re
import subprocess
import sys
import threading
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest

import checkpoints
from edgeq import hub
from edgeq.errors import UsageFault

COMMIT = "c0ffee" * 6 + "abcd"
FIRST, SECOND = "model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"
WORKER = """
import json, os, sys
from edgeq import errors, hub
for line in sys.stdin:
    words, environment = json.loads(line)
    os.environ.update(environment)
    try:
        what, *words = words
        if what == "config":
            answer = {"config": hub.config(*words)}
        elif what == "cached":
            answer = {"folder": str(hub.cached(*words[:2]))}
        else:
            found = hub.download(*words)
            answer = {"folder": str(found.folder), "repo": found.repo, "revision": found.revision}
    except errors.EdgeqError as error:
        answer = {"exit_code": error.exit_code, "message": str(error)}
    for name in environment:
        del os.environ[name]
    print(json.dumps(answer), flush=True)
"""


@dataclass
class Repo:
    """A repository on the server: what it holds and does, and what it saw."""

    name: str
    files: dict[str, bytes]
    status: int = 200
    error_code: str | None = None
    corrupt: str | None = None
    bare: bool = False
    cut: str | None = None
    sizes: dict[str, int] = field(default_factory=dict)
    requests: list[tuple[str, str, dict[str, str]]] = field(default_factory=list)

    def sibling(self, name: str) -> dict[str, Any]:
        """A file as the API lists it: weights in LFS, the others in git."""
        data = self.files[name]
        size = self.sizes.get(name, len(data))
        found: dict[str, Any] = {"rfilename": name, "size": size, "blobId": git_sha1(data)}
        if name.endswith((".safetensors", ".bin")):
            found["lfs"] = {"sha256": hashlib.sha256(data).hexdigest(), "size": size, "pointerSize": 130}
        return found

    def fetched(self) -> list[str]:
        """Names of files whose content was asked for."""
        asked = [path for method, path, _ in self.requests if method == "GET" and not path.startswith("/api/")]
        return [path.rsplit("/", 1)[-1] for path in asked]

    def authorization(self, start: str) -> set[str | None]:
        """Values of the header in requests whose path begins with `start`."""
        return {headers.get("authorization") for _, path, headers in self.requests if path.startswith(start)}


def git_sha1(data: bytes) -> str:
    """Name of a git blob."""
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()


class Server(ThreadingHTTPServer):
    """A hub of many repositories that does not mind when a client hangs up."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos: dict[str, Repo] = {}
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Keep quiet."""


class Handler(BaseHTTPRequestHandler):
    """The part of the hub's protocol that a download uses: model info, tree, resolve, and the content behind it."""

    protocol_version = "HTTP/1.1"
    server: Server
    repo: Repo

    def log_message(self, format: str, *args: Any) -> None:
        """Keep quiet."""

    def do_HEAD(self) -> None:
        """Metadata of a file."""
        self._answer(body=False)

    def do_GET(self) -> None:
        """Everything else."""
        self._answer(body=True)

    def _answer(self, body: bool) -> None:
        path = self.path.split("?")[0]
        parts = re.fullmatch(r"(/api/models/|/cdn/|/)([\w-]+/[\w-]+)(/.*)?", path)
        if not parts or parts[2] not in self.server.repos:
            self._send(404, b"{}", {"X-Error-Code": "RepoNotFound"}, body)
            return
        room, self.repo, rest = parts[1], self.server.repos[parts[2]], parts[3] or ""
        self.repo.requests.append((self.command, path, {key.lower(): value for key, value in self.headers.items()}))
        if self.repo.status != 200:
            self._send(self.repo.status, b"{}", {"X-Error-Code": self.repo.error_code or "Other"}, body)
        elif room == "/cdn/":
            self._content(rest[1:], {}, body)
        elif room == "/api/models/" and rest in ("", "/revision/main", f"/revision/{COMMIT}"):
            self._info(body)
        elif room == "/api/models/" and rest == f"/tree/{COMMIT}":
            self._tree(body)
        elif room == "/" and rest.startswith(f"/resolve/{COMMIT}/"):
            self._resolve(rest.rsplit("/", 1)[-1], body)
        else:
            self._send(404, b"{}", {"X-Error-Code": "RevisionNotFound"}, body)

    def _info(self, body: bool) -> None:
        siblings = [self.repo.sibling(name) for name in self.repo.files]
        if self.repo.bare:
            siblings = [{"rfilename": name} for name in self.repo.files]
        self._send(200, json.dumps({"id": self.repo.name, "sha": COMMIT, "siblings": siblings}).encode(), {}, body)

    def _tree(self, body: bool) -> None:
        rows = []
        for name in self.repo.files:
            found = self.repo.sibling(name)
            row: dict[str, Any] = {"type": "file", "path": name, "size": found["size"], "oid": found["blobId"]}
            if "lfs" in found:
                row["lfs"] = {"oid": found["lfs"]["sha256"], "size": found["size"], "pointerSize": 130}
            rows.append(row)
        self._send(200, json.dumps(rows).encode(), {}, body)

    def _resolve(self, name: str, body: bool) -> None:
        """Git files are answered here; LFS files lie on another host, so that the token must not follow."""
        found = self.repo.sibling(name)
        if "lfs" not in found:
            self._content(name, {"X-Repo-Commit": COMMIT, "ETag": f'"{found["blobId"]}"'}, body)
            return
        headers = {
            "X-Repo-Commit": COMMIT,
            "X-Linked-Etag": f'"{found["lfs"]["sha256"]}"',
            "X-Linked-Size": str(found["size"]),
            "Location": f"{self.server.url.replace('127.0.0.1', 'localhost')}/cdn/{self.repo.name}/{name}",
        }
        self._send(302, b"", headers, body)

    def _content(self, name: str, more: dict[str, str], body: bool) -> None:
        data = self.repo.files[name]
        if self.repo.corrupt == name:
            data = data[:-1] + bytes([data[-1] ^ 1])
        start = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").removesuffix("-"))
        headers = more | ({"Content-Range": f"bytes {start}-{len(data) - 1}/{len(data)}"} if start else {})
        if self.repo.cut != name or not body:
            self._send(206 if start else 200, data[start:], headers, body)
            return
        self.repo.cut = None
        self.send_response(200)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data[: len(data) // 2])
        self.close_connection = True

    def _send(self, status: int, data: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in {"Content-Length": str(len(data)), **headers}.items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(data)


def environment(url: str, home: Path) -> dict[str, str]:
    """Environment of a process whose hub is the local server, and whose cache is its own."""
    source = str(Path(hub.__file__).parents[1])
    return {"PATH": os.environ["PATH"], "PYTHONPATH": source, "HF_ENDPOINT": url, "HF_HOME": str(home)}


def fetch_alone(env: dict[str, str], repo: str) -> dict[str, Any]:
    """Result of one download in a process of its own."""
    words, line = [sys.executable, "-c", WORKER], json.dumps([["download", repo, None, False], {}])
    done = subprocess.run(words, env=env, input=line, capture_output=True, text=True, timeout=60, check=True)
    found: dict[str, Any] = json.loads(done.stdout)
    return found


class Downloader:
    """The child process, its server and its cache."""

    def __init__(self, server: Server, home: Path) -> None:
        self.server, self.home = server, home
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            env=environment(server.url, home),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
        )

    def fetch(self, repo: str, *, revision: str | None = None, offline: bool = False, **more: str) -> dict[str, Any]:
        """Result of `hub.download`: the download, or exit code and message of its error."""
        return self.call("download", repo, revision, offline, more)

    def config(self, repo: str, *, revision: str | None = None, offline: bool = False, **more: str) -> dict[str, Any]:
        """Result of `hub.config` under the key `config`, or exit code and message of its error."""
        return self.call("config", repo, revision, offline, more)

    def call(self, what: str, repo: str, revision: str | None, offline: bool, more: dict[str, str]) -> dict[str, Any]:
        """Answer of the child process."""
        assert self.process.stdin
        assert self.process.stdout
        self.process.stdin.write(json.dumps([[what, repo, revision, offline], more]) + "\n")
        self.process.stdin.flush()
        found: dict[str, Any] = json.loads(self.process.stdout.readline())
        return found

    def cached(self, repo: Repo, name: str) -> list[Path]:
        """Files of that name in the repository's cache that can be opened."""
        place = self.home / "hub" / f"models--{repo.name.replace('/', '--')}"
        return [path for path in place.rglob(name) if path.exists()]


@pytest.fixture(scope="module")
def child(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Downloader]:
    """A server without repositories, and the process that downloads from it."""
    server = Server()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    found = Downloader(server, tmp_path_factory.mktemp("home"))
    yield found
    found.process.communicate()
    server.shutdown()
    server.server_close()
    thread.join()


@pytest.fixture
def repo(child: Downloader, tmp_path: Path) -> Repo:
    """A repository with one sharded checkpoint, and beside it files that nobody needs."""
    folder = checkpoints.write(tmp_path / "source", "3", shards=2)
    files = {path.name: path.read_bytes() for path in sorted(folder.iterdir())}
    files |= {"README.md": b"# Tiny\n", "pytorch_model.bin": b"pickle", "modeling_tiny.py": b"raise SystemExit\n"}
    found = Repo(f"Qwen/Tiny-{len(child.server.repos)}", files)
    child.server.repos[found.name] = found
    return found


def test_a_download_is_pinned_to_the_commit_and_holds_only_what_is_needed(child: Downloader, repo: Repo) -> None:
    found = child.fetch(repo.name)
    folder = Path(found["folder"])
    assert (found["repo"], found["revision"], folder.name) == (repo.name, COMMIT, COMMIT)
    wanted = set(repo.files) - {"README.md", "pytorch_model.bin", "modeling_tiny.py"}
    assert {path.name for path in folder.iterdir()} == wanted
    assert all((folder / name).read_bytes() == repo.files[name] for name in wanted)


def test_a_second_download_fetches_nothing_and_offline_needs_no_server(child: Downloader, repo: Repo) -> None:
    first = child.fetch(repo.name)
    repo.requests.clear()
    assert child.fetch(repo.name, revision="main") == first
    assert repo.fetched() == []
    repo.requests.clear()
    assert child.fetch(repo.name, offline=True) == first
    assert child.fetch(repo.name, revision=COMMIT, offline=True) == first
    assert repo.requests == []


def test_the_token_is_sent_to_the_hub_and_not_to_where_the_weights_lie(child: Downloader, repo: Repo) -> None:
    child.fetch(repo.name, HF_TOKEN="hf_example")
    assert repo.authorization("/api/models/") == {"Bearer hf_example"}
    assert repo.authorization("/cdn/") == {None}


def test_an_interrupted_transfer_goes_on_where_it_stopped(child: Downloader, repo: Repo) -> None:
    whole = bytes(22 << 20)
    repo.cut, repo.files[FIRST] = FIRST, whole
    found = child.fetch(repo.name)
    assert (Path(found["folder"]) / FIRST).read_bytes() == whole
    ranges = [headers.get("range") for _, path, headers in repo.requests if path.startswith("/cdn/")]
    assert f"bytes={10 << 20}-" in ranges


@pytest.mark.parametrize("name", [SECOND, "config.json"])
def test_wrong_bytes_of_the_right_size_are_refused_and_removed(child: Downloader, repo: Repo, name: str) -> None:
    repo.corrupt = name
    found = child.fetch(repo.name)
    assert found["exit_code"] == 12
    assert name in found["message"]
    assert not child.cached(repo, name)
    assert child.fetch(repo.name, offline=True)["exit_code"] == 5
    repo.corrupt = None
    assert child.fetch(repo.name)["revision"] == COMMIT


def test_a_file_that_changed_in_the_cache_is_refused_offline(child: Downloader, repo: Repo) -> None:
    child.fetch(repo.name)
    path = child.cached(repo, FIRST)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    found = child.fetch(repo.name, offline=True)
    assert found["exit_code"] == 12
    assert path.name in found["message"]


def test_a_checkpoint_that_is_whole_in_the_cache_is_found_without_the_server_and_not_read(
    child: Downloader, repo: Repo
) -> None:
    assert child.call("cached", repo.name, None, True, {})["exit_code"] == 5
    child.config(repo.name)
    assert child.call("cached", repo.name, None, True, {})["exit_code"] == 5
    folder = child.fetch(repo.name)["folder"]
    child.cached(repo, FIRST)[0].write_bytes(b"other")
    repo.requests.clear()
    assert child.call("cached", repo.name, None, True, {}) == {"folder": folder}
    assert repo.requests == []


def test_offline_without_a_cache_says_so(child: Downloader, repo: Repo) -> None:
    found = child.fetch(repo.name, offline=True)
    assert found["exit_code"] == 5
    assert f"{repo.name}: not in the cache" in found["message"]
    assert repo.requests == []


@pytest.mark.parametrize(
    ("status", "error_code", "exit_code", "words"),
    [
        (401, None, 22, "HF_TOKEN"),
        (403, "GatedRepo", 22, "accept the licence"),
        (503, None, 5, "answered 503"),
    ],
)
def test_a_refusal_of_the_hub_is_explained(
    child: Downloader, repo: Repo, status: int, error_code: str | None, exit_code: int, words: str
) -> None:
    repo.status, repo.error_code = status, error_code
    found = child.fetch(repo.name)
    assert found["exit_code"] == exit_code
    assert repo.name in found["message"]
    assert words in found["message"]


def test_an_unknown_revision_is_explained(child: Downloader, repo: Repo) -> None:
    found = child.fetch(repo.name, revision="v9")
    assert found["exit_code"] == 2
    assert "no revision 'v9'" in found["message"]


def test_an_unknown_repository_is_explained(child: Downloader) -> None:
    found = child.fetch("Qwen/Absent")
    assert found["exit_code"] == 2
    assert "Qwen/Absent: not on http://127.0.0.1" in found["message"]


@pytest.mark.parametrize(("more", "words"), [({}, "cannot be reached"), ({"HF_HUB_OFFLINE": "1"}, "not in the cache")])
def test_no_network_is_explained(tmp_path: Path, more: dict[str, str], words: str) -> None:
    found = fetch_alone(environment("http://127.0.0.1:9", tmp_path) | more, "Qwen/Tiny")
    assert found["exit_code"] == 5
    assert words in found["message"]


def test_pickle_weights_are_refused_before_anything_is_fetched(child: Downloader, repo: Repo) -> None:
    repo.files = {name: data for name, data in repo.files.items() if "safetensors" not in name}
    found = child.fetch(repo.name)
    assert found["exit_code"] == 11
    assert "pytorch_model.bin" in found["message"]
    assert repo.fetched() == []


def test_too_small_a_disk_is_said_before_anything_is_fetched(child: Downloader, repo: Repo) -> None:
    repo.sizes[FIRST] = 1 << 60
    found = child.fetch(repo.name)
    assert found["exit_code"] == 20
    assert "GB are free" in found["message"]
    assert repo.fetched() == []


def test_a_hub_that_declares_no_sizes_is_refused(child: Downloader, repo: Repo) -> None:
    repo.bare = True
    found = child.fetch(repo.name)
    assert found["exit_code"] == 5
    assert "declares no size and digest for chat_template.jinja" in found["message"]
    assert repo.fetched() == []


def test_a_cache_that_cannot_be_written_is_explained(child: Downloader, repo: Repo, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    found = fetch_alone(environment(child.server.url, tmp_path / "file" / "home"), repo.name)
    assert found["exit_code"] == 20
    assert "set HF_HOME elsewhere" in found["message"]


def test_a_configuration_comes_alone_and_stays_in_the_cache(child: Downloader, repo: Repo) -> None:
    assert child.config(repo.name) == {"config": json.loads(repo.files["config.json"])}
    assert repo.fetched() == ["config.json"]
    repo.requests.clear()
    assert child.config(repo.name, offline=True) == child.config(repo.name, revision=COMMIT, offline=True)
    assert repo.requests == []
    assert child.config(repo.name, revision="main") == {"config": json.loads(repo.files["config.json"])}
    assert repo.fetched() == []


def test_a_configuration_in_the_cache_is_no_checkpoint(child: Downloader, repo: Repo) -> None:
    child.config(repo.name)
    found = child.fetch(repo.name, offline=True)
    assert found["exit_code"] == 5
    assert "not in the cache" in found["message"]
    assert child.fetch(repo.name)["revision"] == COMMIT


def test_the_configuration_of_a_cached_checkpoint_is_read_without_its_weights(child: Downloader, repo: Repo) -> None:
    child.fetch(repo.name)
    path = child.cached(repo, FIRST)[0]
    path.write_bytes(path.read_bytes()[:-1] + b"\x7f")
    assert child.config(repo.name, offline=True) == {"config": json.loads(repo.files["config.json"])}


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b'{"model_type": "qwen3", "model_type": "qwen2"}', "duplicate key 'model_type'"),
        (b"[]", "not a JSON object"),
        (b" " * (3 << 20), "larger than 2 MiB"),
    ],
)
def test_a_configuration_that_is_damaged_or_huge_is_refused(
    child: Downloader, repo: Repo, data: bytes, words: str
) -> None:
    repo.files["config.json"] = data
    found = child.config(repo.name)
    assert found["exit_code"] == 10
    assert "config.json" in found["message"]
    assert words in found["message"]
    assert (len(data) > 2 << 20) == (repo.fetched() == [])


def test_a_repository_without_a_configuration_is_corrupt(child: Downloader, repo: Repo) -> None:
    del repo.files["config.json"]
    found = child.config(repo.name)
    assert found["exit_code"] == 10
    assert "config.json: missing" in found["message"]


def test_a_configuration_with_wrong_bytes_is_refused_and_removed(child: Downloader, repo: Repo) -> None:
    repo.corrupt = "config.json"
    assert child.config(repo.name)["exit_code"] == 12
    assert not child.cached(repo, "config.json")


@pytest.mark.parametrize(("status", "exit_code"), [(401, 22), (503, 5)])
def test_a_refused_configuration_is_explained(child: Downloader, repo: Repo, status: int, exit_code: int) -> None:
    repo.status = status
    assert child.config(repo.name)["exit_code"] == exit_code


def test_a_configuration_that_is_not_there_is_explained(child: Downloader, repo: Repo) -> None:
    assert child.config("Qwen/Absent")["exit_code"] == 2
    assert child.config(repo.name, revision="v9")["exit_code"] == 2
    assert child.config(repo.name, offline=True)["exit_code"] == 5
    with pytest.raises(UsageFault):
        hub.config("../x/y", None, offline=True)


def test_the_configuration_of_a_model_of_pickles_is_not_fetched(child: Downloader, repo: Repo) -> None:
    repo.files = {name: data for name, data in repo.files.items() if "safetensors" not in name}
    assert child.config(repo.name)["exit_code"] == 11
    assert repo.fetched() == []


@pytest.mark.parametrize("name", ["pytorch_model.pickle", "MODEL.BIN"])
def test_pickles_are_known_by_every_suffix_that_a_checkpoint_refuses(child: Downloader, repo: Repo, name: str) -> None:
    repo.files = {"config.json": repo.files["config.json"], name: b"pickle"}
    found = child.fetch(repo.name)
    assert found["exit_code"] == 11
    assert name in found["message"]


def test_only_declared_packages_are_imported() -> None:
    source = Path(hub.__file__)
    project = tomllib.loads((Path(__file__).parents[1] / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[>=<]", word)[0].replace("-", "_") for word in project["dependencies"]}
    imported = {
        name.split(".")[0]
        for node in ast.walk(ast.parse(source.read_text()))
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else [each.name for each in node.names])
    }
    assert imported - set(sys.stdlib_module_names) <= {"edgeq", *declared}


@pytest.mark.parametrize("repo", ["tiny", "../x/y", "a/b/c", "a/..", "-o/x", ""])
def test_a_name_that_is_no_repository_is_refused(repo: str) -> None:
    with pytest.raises(UsageFault):
        hub.download(repo, None, offline=True)


@pytest.mark.parametrize("revision", ["../../x", "-x", "", "/etc/passwd"])
def test_a_revision_that_leaves_the_cache_is_refused(revision: str) -> None:
    with pytest.raises(UsageFault):
        hub.download("Qwen/Tiny", revision, offline=True)


@pytest.mark.slow
def test_a_build_from_the_hub_records_repository_and_commit(child: Downloader, repo: Repo, tmp_path: Path) -> None:
    out = tmp_path / "out"
    words = ["build", repo.name, "-t", "x86-avx2", "-o", str(out)]
    env = environment(child.server.url, child.home)
    command = [sys.executable, "-m", "edgeq.cli", *words]
    done = subprocess.run(command, env=env, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    source = json.loads((out / "edgeq.json").read_text())["source"]
    assert (source["kind"], source["name"], source["revision"]) == ("hub", repo.name, COMMIT)
    assert {file["path"] for file in source["files"]} >= {FIRST, SECOND, "config.json"}
