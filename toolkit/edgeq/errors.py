"""Every error that edgeq raises on purpose, with its exit code.

Each says what happened, why, and what to run next; `cli` prints the three and exits with the code.
"""

import errno


class EdgeqError(Exception):
    """Base of all errors; `what` happened, `why`, and what to `run` next."""

    exit_code = 1

    def __init__(self, what: str, *, why: str = "", run: str = "") -> None:
        super().__init__(what)
        self.what, self.why, self.run = what, why, run

    def __str__(self) -> str:
        return "\n".join(part for part in (self.what, self.why, self.run and f"Next: {self.run}") if part)


class UsageFault(EdgeqError):
    """The words of the command are wrong."""

    exit_code = 2


class NothingFits(EdgeqError):
    """No candidate meets the constraints."""

    exit_code = 3


class GateFailed(EdgeqError):
    """The bundle differs too much from the float32 reference."""

    exit_code = 4


class MissingTool(EdgeqError):
    """A tool, backend or device is not there."""

    exit_code = 5


class InvalidMeasurement(EdgeqError):
    """What was measured must not be used."""

    exit_code = 7


class CorruptInput(EdgeqError):
    """A checkpoint or bundle is damaged."""

    exit_code = 10


class UnsafeInput(EdgeqError):
    """A checkpoint or bundle could run code or reach outside its folder."""

    exit_code = 11


class DigestMismatch(EdgeqError):
    """Bytes are not those that were recorded."""

    exit_code = 12


class UnsupportedModel(EdgeqError):
    """The checkpoint is of an architecture that edgeq does not build."""

    exit_code = 13


class DiskFault(EdgeqError):
    """The disk is full or failing."""

    exit_code = 20


class OutOfMemory(EdgeqError):
    """Memory is too small for the work."""

    exit_code = 21


class PermissionRefused(EdgeqError):
    """A path may not be read or written."""

    exit_code = 22


class Busy(EdgeqError):
    """Another edgeq process holds what is needed."""

    exit_code = 23


class BackendFault(EdgeqError):
    """A backend failed."""

    exit_code = 30


class BackendKilled(EdgeqError):
    """A backend's process was killed."""

    exit_code = 31


class Interrupted(BaseException):
    """The user or the system asked to stop; no Exception, so that nothing on the way out takes it for a failure."""

    exit_code = 130


def from_system(error: OSError) -> EdgeqError | None:
    """Edgeq's error for a full or failing disk (20), a refused path (22) or an impossible one (2); else None."""
    place = error.filename or "a file"
    if error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO):
        return DiskFault(f"{place}: cannot be written", why=str(error), run="free some space and try again")
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS):
        return PermissionRefused(f"{place}: may not be used", why=str(error), run="choose another place with -o")
    if error.errno in (errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP):
        return UsageFault(f"{place}: not a usable path", why=str(error), run="choose another place or name")
    return None
