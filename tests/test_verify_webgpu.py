"""What scripts/verify_webgpu calls a fault; nothing is run here."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest

import script_files

SOUND = {"equal_tokens": 32, "max_abs_logit_error": 2e-5, "nodes_on_webgpu": 53, "other_nodes_on_cpu": 0}


@pytest.fixture(scope="module")
def script() -> Iterator[Any]:
    with script_files.imported("verify_webgpu") as module:
        yield module


def test_equal_tokens_on_webgpu_alone_are_no_fault(script: Any) -> None:
    assert script.faults("3", SOUND) == []


@pytest.mark.parametrize(
    ("change", "fault"),
    [
        ({"equal_tokens": 31}, "31 of 32 tokens"),
        ({"max_abs_logit_error": 0.01}, "logits differ by 0.01"),
        ({"max_abs_logit_error": float("nan")}, "logits differ by nan"),
        ({"other_nodes_on_cpu": 2}, "2 compute nodes ran on the CPU"),
        ({"nodes_on_webgpu": 0}, "compute nodes ran on the CPU"),
    ],
)
def test_each_fault_is_named(script: Any, change: dict[str, float], fault: str) -> None:
    (said,) = script.faults("3", SOUND | change)
    assert fault in said
