"""Download from a Hugging Face hub: one commit, every byte checked against what the hub declares."""

from __future__ import annotations

import errno
import hashlib
import os
import re
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

from edgeq.checkpoint import PICKLES
from edgeq.errors import (
    CorruptInput,
    DigestMismatch,
    DiskFault,
    EdgeqError,
    MissingTool,
    PermissionRefused,
    UnsafeInput,
    UnsupportedModel,
    UsageFault,
)
from edgeq.tensorfile import JSON_CAP, read_capped, strict_object

WANTED = ["*.safetensors", "*.json", "*.jinja", "merges.txt"]
UNWANTED = ["*/*"]
_CONFIG = "config.json"
_REPO = re.compile(r"[\w][\w.-]*/[\w][\w.-]*", re.ASCII)
_REVISION = re.compile(r"\w[\w./-]*", re.ASCII)
_DIGEST = re.compile(r"[0-9a-f]{40}|[0-9a-f]{64}")


@dataclass(frozen=True)
class Download:
    """A checkpoint in the hub's cache; `revision` is the full commit hash."""

    folder: Path
    repo: str
    revision: str


@dataclass(frozen=True)
class _Declared:
    """A file as the hub declares it: size in bytes, and its SHA-256 (large files) or git blob SHA-1 in hex."""

    name: str
    bytes: int
    digest: str


def download(repo: str, revision: str | None, offline: bool) -> Download:
    """Checkpoint `owner/name` at a branch, tag or commit (default: main) from the hub, or from its cache alone.

    HF_ENDPOINT, HF_TOKEN, HF_HOME and HF_HUB_OFFLINE are honoured. Files that are complete in the cache are not
    fetched again, and a broken transfer goes on where it stopped. Sizes and digests are checked at every call; a file
    that fails is removed from the cache.

    Raises UsageFault when there is no such repository or revision, PermissionRefused when the hub asks for a licence
    or a token, MissingTool when the hub cannot be used or, offline, the cache lacks the checkpoint, UnsafeInput or
    UnsupportedModel when it has no safetensors weights, DiskFault when the disk is too small, CorruptInput when a
    transfer stays incomplete, and DigestMismatch when bytes are not those that the hub declares.
    """
    folder = _snapshot(repo, revision, offline, WANTED)
    return Download(folder, repo, folder.name)


def cached(repo: str, revision: str | None) -> Path:
    """Folder of a checkpoint in the cache alone, its digests not checked; raises what `download` raises offline."""
    _prepare(repo, revision)
    with _explained(repo, revision, offline=True):
        return _in_cache(repo, revision, WANTED)


def config(repo: str, revision: str | None, offline: bool) -> dict[str, Any]:
    """The `config.json` of checkpoint `owner/name` at a branch, tag or commit (default: main); fetches no other file.

    Raises what `download` raises, and CorruptInput when the file is missing, larger than 2 MiB or no strict JSON.
    """
    path = _snapshot(repo, revision, offline, [_CONFIG]) / _CONFIG
    return strict_object(read_capped(path, JSON_CAP), str(path))


def _snapshot(repo: str, revision: str | None, offline: bool, wanted: list[str]) -> Path:
    """Folder in the cache, named by its commit, that holds the files of those patterns, each checked."""
    _prepare(repo, revision)
    from huggingface_hub import constants

    offline = offline or constants.HF_HUB_OFFLINE
    with _explained(repo, revision, offline):
        return _cached(repo, revision, wanted) if offline else _fetched(repo, revision, wanted)


def _prepare(repo: str, revision: str | None) -> None:
    """Check the words, and set what the hub's library reads when it is imported."""
    if not _REPO.fullmatch(repo) or ".." in repo:
        raise UsageFault(f"{repo!r} is not the name of a model on a hub", why="It has the form owner/name.")
    if revision is not None and (not _REVISION.fullmatch(revision) or ".." in revision):
        raise UsageFault(f"{revision!r} is not a revision", why="It is a branch, a tag or a commit hash.")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    os.environ.setdefault("HF_HUB_DISABLE_XET", "1")


def _fetched(repo: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import HfApi, snapshot_download

    info = HfApi().model_info(repo, revision=revision, files_metadata=True)
    files = _declared(info, wanted)
    _check_weights(repo, [file.rfilename for file in info.siblings or ()])
    _check_config(repo, files)
    _check_space(repo, str(info.sha), files)
    folder = Path(snapshot_download(repo, revision=revision, allow_patterns=wanted, ignore_patterns=UNWANTED))
    if folder.name != info.sha:
        files = _declared(HfApi().model_info(repo, revision=folder.name, files_metadata=True), wanted)
    for file in files:
        _verify(folder / file.name, file)
    return folder


def _cached(repo: str, revision: str | None, wanted: list[str]) -> Path:
    """Snapshot in the cache; its links end in the digests that the hub declared when the files came."""
    folder = _in_cache(repo, revision, wanted)
    for path in sorted(folder.iterdir()):
        digest = path.readlink().name if path.is_symlink() else ""
        if _matches(path.name, wanted) and _DIGEST.fullmatch(digest):
            _verify(path, _Declared(path.name, path.stat().st_size, digest))
    return folder


def _in_cache(repo: str, revision: str | None, wanted: list[str]) -> Path:
    from huggingface_hub import snapshot_download

    return Path(
        snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns=wanted, ignore_patterns=UNWANTED
        )
    )


def _declared(info: Any, wanted: list[str]) -> list[_Declared]:
    files = [file for file in info.siblings or () if _matches(file.rfilename, wanted)]
    if odd := [file.rfilename for file in files if file.size is None or file.blob_id is None]:
        raise MissingTool(
            f"{info.id}: the hub declares no size and digest for {odd[0]}",
            why="Without them a download cannot be checked.",
            run="unset HF_ENDPOINT, or set it to another mirror",
        )
    return [
        _Declared(file.rfilename, file.lfs.size, file.lfs.sha256)
        if file.lfs
        else _Declared(file.rfilename, file.size, file.blob_id)
        for file in files
    ]


def _matches(name: str, wanted: list[str]) -> bool:
    return "/" not in name and any(fnmatch(name, pattern) for pattern in wanted)


def _check_weights(repo: str, names: list[str]) -> None:
    if any(_matches(name, ["*.safetensors"]) for name in names):
        return
    if pickles := [name for name in names if name.lower().endswith(PICKLES)]:
        raise UnsafeInput(
            f"{repo}: {pickles[0]}: pickle weights are refused",
            why="Reading a pickle file can run code, and the repository holds no safetensors.",
            run="choose another repository of the same model",
        )
    raise UnsupportedModel(f"{repo}: holds no safetensors weights", run="edgeq models list")


def _check_config(repo: str, files: list[_Declared]) -> None:
    if any(file.name == _CONFIG and file.bytes > JSON_CAP for file in files):
        raise CorruptInput(
            f"{repo}: {_CONFIG} is larger than {JSON_CAP >> 20} MiB", why="A file of this kind is much smaller."
        )


def _check_space(repo: str, commit: str, files: list[_Declared]) -> None:
    from huggingface_hub import constants, try_to_load_from_cache

    missing = [file for file in files if not isinstance(try_to_load_from_cache(repo, file.name, revision=commit), str)]
    need = sum(file.bytes for file in missing)
    cache = Path(constants.HF_HUB_CACHE)
    place = next(folder for folder in (cache, *cache.parents) if folder.exists())
    have = shutil.disk_usage(place).free
    if need > have:
        raise DiskFault(
            f"{repo}: needs {need / 1e9:.2f} GB in {cache}, {have / 1e9:.2f} GB are free",
            run="free some space, or set HF_HOME to a folder on a larger disk",
        )


def _verify(path: Path, declared: _Declared) -> None:
    found = f"{path.stat().st_size} bytes"
    if path.stat().st_size == declared.bytes:
        found = _digest(path, declared)
        if found == declared.digest:
            return
    path.resolve().unlink()
    path.unlink(missing_ok=True)
    raise DigestMismatch(
        f"{path}: not the bytes that the hub declares",
        why=f"Expected {declared.digest} ({declared.bytes} bytes), found {found}. The file was removed from the cache.",
        run="the same command again, online",
    )


def _digest(path: Path, declared: _Declared) -> str:
    """Digest of a file in the form of the declared one: its SHA-256, or the SHA-1 that git gives a blob."""
    if len(declared.digest) == 64:
        with path.open("rb") as stream:
            return hashlib.file_digest(stream, "sha256").hexdigest()
    return hashlib.sha1(b"blob %d\0" % declared.bytes + path.read_bytes(), usedforsecurity=False).hexdigest()


@contextmanager
def _explained(repo: str, revision: str | None, offline: bool) -> Iterator[None]:
    """Turn every failure of the hub's library into an edgeq error."""
    try:
        yield
    except (OSError, _http_error(), ValueError) as error:
        raise _explain(error, repo, revision, offline) from error


def _http_error() -> type[BaseException]:
    """Base of what the HTTP client of the hub's library raises; which client that is, is the library's own affair."""
    from huggingface_hub.errors import HfHubHTTPError

    return next(base for base in HfHubHTTPError.__mro__ if base.__name__ == "HTTPError")


def _explain(error: BaseException, repo: str, revision: str | None, offline: bool) -> EdgeqError:
    from huggingface_hub import constants, errors

    hub = constants.ENDPOINT
    if isinstance(error, errors.RevisionNotFoundError):
        return UsageFault(f"{repo} has no revision {revision!r} on {hub}", run=f"look at {hub}/{repo}/tree/main")
    if isinstance(error, errors.HfHubHTTPError):
        return _explain_status(error.response.status_code, repo, hub)
    if isinstance(error, errors.LocalEntryNotFoundError) and offline:
        return MissingTool(
            f"{repo}: not in the cache ({constants.HF_HUB_CACHE}), or only in part",
            why="Offline, edgeq takes nothing from the hub.",
            run="the same command online, once",
        )
    if isinstance(error, errors.LocalEntryNotFoundError) and error.__cause__ is not None:
        return _explain(error.__cause__, repo, revision, offline)
    unreachable = (
        _http_error(),
        errors.FileMetadataError,
        errors.LocalEntryNotFoundError,
        errors.OfflineModeIsEnabled,
    )
    if isinstance(error, unreachable):
        return MissingTool(
            f"{repo}: the hub at {hub} cannot be reached",
            why=str(error)[:200],
            run="check the network or HF_ENDPOINT, or give a folder that holds the checkpoint",
        )
    if isinstance(error, OSError) and error.errno is not None:
        return _explain_system(error, repo, constants.HF_HUB_CACHE)
    return CorruptInput(f"{repo}: the download is not whole", why=str(error)[:200], run="the same command again")


def _explain_status(status: int, repo: str, hub: str) -> EdgeqError:
    if status in (401, 403):
        return PermissionRefused(
            f"{repo}: {hub} refuses access ({status})",
            why="The repository is gated or private, the token is not valid, or there is no such repository.",
            run=f"accept the licence at {hub}/{repo} and set HF_TOKEN to a token of that account",
        )
    if status == 404:
        return UsageFault(f"{repo}: not on {hub}", why="The hub knows no such repository.", run="edgeq models list")
    return MissingTool(f"{repo}: {hub} answered {status}", run="try again later, or set HF_ENDPOINT to a mirror")


def _explain_system(error: OSError, repo: str, cache: str) -> EdgeqError:
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionRefused(
            f"{repo}: the cache {cache} may not be written", why=str(error), run="set HF_HOME to a folder of yours"
        )
    return DiskFault(
        f"{repo}: the cache {cache} cannot be written", why=str(error), run="free some space, or set HF_HOME elsewhere"
    )
