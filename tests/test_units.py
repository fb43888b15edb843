from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edgeq import units
from edgeq.errors import UsageFault


@pytest.mark.parametrize(
    ("text", "count"),
    [
        *(("450MB", 450_000_000), ("1.5GB", 1_500_000_000), ("2GiB", 2 << 30), ("512 MiB", 512 << 20)),
        *((" 7kb ", 7000), ("12b", 12), ("0MB", 0), ("2.01kb", 2010), ("4.35GB", 4_350_000_000)),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, count: int) -> None:
    assert units.parse_bytes(text) == count


@pytest.mark.parametrize(("text", "count"), [("4096", 4096), ("4k", 4096), ("1.5K", 1536), ("1m", 1 << 20)])
def test_tokens_are_read_as_people_write_them(text: str, count: int) -> None:
    assert units.parse_tokens(text) == count


@pytest.mark.parametrize(
    "text",
    ["", "MB", "5", "-1GB", "1e9GB", "1.GB", ".5GB", "1,5GB", "5 TB", "1.5b", "nan", "inf", "٣GB", "9" * 400 + "GB"],
)
def test_what_is_no_size_is_a_usage_fault_with_an_example(text: str) -> None:
    with pytest.raises(UsageFault, match=r"is not a size") as caught:
        units.parse_bytes(text)
    assert "450MB" in caught.value.run
    assert len(str(caught.value)) < 250


@pytest.mark.parametrize("text", ["", "k", "0", "0k", "-1", "1.5", "4kb", "4 thousand", "٤", "9" * 400, "9" * 5000])
def test_what_is_no_number_of_tokens_is_a_usage_fault_with_an_example(text: str) -> None:
    with pytest.raises(UsageFault, match=r"is not a number of tokens") as caught:
        units.parse_tokens(text)
    assert "4096 or 4k" in caught.value.run
    assert len(str(caught.value)) < 250


@given(st.integers(0, 10**6), st.integers(0, 999))
def test_decimal_sizes_are_exact(whole: int, thousandths: int) -> None:
    assert units.parse_bytes(f"{whole}.{thousandths:03}MB") == whole * 10**6 + thousandths * 1000


@given(st.text(max_size=30))
def test_any_text_is_a_size_or_a_usage_fault(text: str) -> None:
    try:
        found = units.parse_bytes(text)
    except UsageFault:
        return
    assert found >= 0
    assert text.strip()[0].isdecimal()


@pytest.mark.parametrize(
    ("count", "text"),
    [(None, "-"), (0, "0 KiB"), (2048, "2 KiB"), (3 << 20, "3.0 MiB"), ((3 << 30) + (1 << 29), "3.50 GiB")],
)
def test_sizes_are_shown_in_binary_units(count: int | None, text: str) -> None:
    assert units.show_bytes(count) == text


def test_shares_are_read_as_people_write_them() -> None:
    assert units.parse_share("0.05") == units.parse_share(" 5% ") == 0.05
    for text in ("", "%", "five", "5%%"):
        with pytest.raises(UsageFault, match=r"0\.05 or 5%"):
            units.parse_share(text)
