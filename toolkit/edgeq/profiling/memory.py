"""Peak memory of this process, from counters that the kernel keeps (proc(5)): nothing samples, nothing is missed."""

from __future__ import annotations

from pathlib import Path

from edgeq.profiles import Phase

_PROC = Path("/proc/self")
_PEAK_RESET = "5"
NOTHING = Phase(rss_bytes=None, anonymous_bytes=None, file_bytes=None)


def reset(root: Path = _PROC) -> str | None:
    """Start a new peak at the present size; the reason when the system does not allow it."""
    try:
        (root / "clear_refs").write_text(_PEAK_RESET)
    except OSError as error:
        return f"the peak cannot be reset between phases: {error.strerror or error}"
    return None


def read(root: Path = _PROC) -> Phase:
    """Peak since the last reset (VmHWM) and present anonymous and file-backed bytes; null where the system has none."""
    try:
        lines = (root / "status").read_text().splitlines()
    except (OSError, UnicodeDecodeError):
        return NOTHING
    sizes = dict(line.split(":", 1) for line in lines if ":" in line)
    return Phase(
        rss_bytes=_bytes(sizes.get("VmHWM")),
        anonymous_bytes=_bytes(sizes.get("RssAnon")),
        file_bytes=_bytes(sizes.get("RssFile")),
    )


def _bytes(text: str | None) -> int | None:
    words = (text or "").split()
    return int(words[0]) * 1024 if len(words) == 2 and words[0].isdecimal() and words[1] == "kB" else None


def highest(one: Phase, other: Phase) -> Phase:
    """Larger of two phases, figure by figure."""
    return Phase(
        rss_bytes=_larger(one.rss_bytes, other.rss_bytes),
        anonymous_bytes=_larger(one.anonymous_bytes, other.anonymous_bytes),
        file_bytes=_larger(one.file_bytes, other.file_bytes),
    )


def _larger(one: int | None, other: int | None) -> int | None:
    return max((value for value in (one, other) if value is not None), default=None)
