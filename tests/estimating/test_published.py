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


@pytest.mark.parametrize("row", ROWS, ids=lambda row: f"{row.host}-{row.runtime}-{row.model}-{row.quantization}")
def test_weights_have_bits_that_quantizations_have(row: Row) -> None:
    assert 4.2 < 8 * row.weights_bytes / row.weights < 16.1


def test_files_of_one_model_have_as_many_weights() -> None:
    counts: dict[str, set[int]] = {}
    for row in ROWS:
        counts.setdefault(row.model, set()).add(row.weights)
    assert all(len(found) == 1 for found in counts.values())


def test_arm_targets_without_a_dot_product_are_named() -> None:
    devices = [target.load(name) for name in target.names()]
    lacking = {each.name for each in devices if each.cpu.arch == "aarch64" and "dotprod" not in each.cpu.isa}
    named = set(published.read().traits.without_dot_product)
    assert named - set(published.read().bandwidth_bytes_per_s) == lacking


def test_makers_have_figures() -> None:
    assert set(published.read().traits.makers) <= {row.runtime for row in ROWS}


def test_long_answers_read_the_cache_of_their_middle() -> None:
    row = next(row for row in ROWS if row.generated)
    assert row.mean_kv_bytes == row.kv_bytes * (row.depth + row.generated / 2) / row.depth


@pytest.mark.parametrize(
    ("name", "expected"),
    [("Q4_K_M", True), ("UD-Q4_K_XL", True), ("UD-Q8_K_XL", False), ("Q8_0", False), ("4bit", False)],
)
def test_k_layouts(name: str, expected: bool) -> None:
    assert published.is_k_quant(name) is expected
