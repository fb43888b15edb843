from __future__ import annotations

import pytest

from edgeq import target
from edgeq.estimating import published
from edgeq.estimating.published import Row

ROWS = published.read().rows


def test_a_hundred_and_one_figures_each_with_its_source() -> None:
    assert len(ROWS) == 101
    assert all(row.source.strip() for row in ROWS)


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.host}-{row.runtime}-{row.model}-{row.quantization}")
def test_only_marked_rows_are_faster_than_the_memory_allows(row: Row) -> None:
    bandwidth = published.read().bandwidth(row.host)
    moved = row.weights_bytes + row.state_bytes + row.mean_kv_bytes
    assert (moved * row.decode_tokens_per_s > bandwidth) == row.outside


def test_every_host_is_a_target_or_has_a_bandwidth_of_its_own() -> None:
    own = published.read().bandwidth_bytes_per_s
    assert not set(own) & set(target.names())
    assert {row.host for row in ROWS} - set(own) <= set(target.names())


def test_families_name_targets_and_hosts() -> None:
    known = {*target.names(), *published.read().bandwidth_bytes_per_s}
    for processor, families in published.read().families.items():
        members = [host for hosts in families.values() for host in hosts]
        assert len(set(members)) == len(members), processor
        assert set(members) <= known


def test_long_answers_read_the_cache_of_their_middle() -> None:
    row = next(row for row in ROWS if row.generated)
    assert row.mean_kv_bytes == row.kv_bytes * (row.depth + row.generated / 2) / row.depth


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Q4_K_M", True), ("UD-Q4_K_XL", True), ("UD-Q8_K_XL", False), ("Q8_0", False), ("4bit", False)],
)
def test_k_layouts(name: str, expected: bool) -> None:
    assert published.is_k_quant(name) is expected
