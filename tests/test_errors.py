from __future__ import annotations

import errno
import os

import pytest

from edgeq import errors
from edgeq.errors import DiskFault, EdgeqError, PermissionRefused, UsageFault

CODES = {
    "UsageFault": 2,
    "NothingFits": 3,
    "GateFailed": 4,
    "MissingTool": 5,
    "InvalidMeasurement": 7,
    "CorruptInput": 10,
    "UnsafeInput": 11,
    "DigestMismatch": 12,
    "UnsupportedModel": 13,
    "DiskFault": 20,
    "OutOfMemory": 21,
    "PermissionRefused": 22,
    "Busy": 23,
    "BackendFault": 30,
    "BackendKilled": 31,
}


def test_every_error_keeps_the_exit_code_that_programs_rely_on() -> None:
    own = [kind for kind in vars(errors).values() if isinstance(kind, type) and issubclass(kind, EdgeqError)]
    assert {kind.__name__: kind.exit_code for kind in own if kind is not EdgeqError} == CODES
    assert EdgeqError.exit_code == 1


def test_an_error_says_what_why_and_what_to_run_on_a_line_each() -> None:
    assert str(EdgeqError("it broke", why="It was old.", run="edgeq doctor")) == (
        "it broke\nIt was old.\nNext: edgeq doctor"
    )


def test_an_error_without_a_reason_is_one_line() -> None:
    assert str(EdgeqError("it broke")) == "it broke"


@pytest.mark.parametrize(
    ("codes", "kind"),
    [
        ((errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO), DiskFault),
        ((errno.EACCES, errno.EPERM, errno.EROFS), PermissionRefused),
        ((errno.ENOTDIR, errno.EEXIST, errno.ENAMETOOLONG, errno.ELOOP), UsageFault),
    ],
)
def test_a_system_error_becomes_edgeqs_and_names_the_file(codes: tuple[int, ...], kind: type[EdgeqError]) -> None:
    for code in codes:
        found = errors.from_system(OSError(code, os.strerror(code), "some/file"))
        assert type(found) is kind
        assert found.what.startswith("some/file: ")
        assert os.strerror(code) in found.why
        assert found.run


def test_a_system_error_without_a_file_name_is_understood_too() -> None:
    found = errors.from_system(OSError(errno.ENOSPC, "full"))
    assert isinstance(found, DiskFault)
    assert found.what.startswith("a file: ")


def test_other_system_errors_are_left_as_they_are() -> None:
    assert errors.from_system(OSError(errno.EBADF, "bad")) is None
    assert errors.from_system(OSError("no number")) is None
