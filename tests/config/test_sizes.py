"""Sizes are exact, and whatever is no size is refused."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given
from hypothesis import strategies as st

from llamahome.config import parse_size
from llamahome.errors import ConfigError


@pytest.mark.parametrize(
    ("value", "size"),
    [
        ("8GB", 8_000_000_000),
        ("8 GB", 8_000_000_000),
        (" 8gb ", 8_000_000_000),
        ("512MiB", 512 * 2**20),
        ("1.5KiB", 1536),
        ("0.3kB", 300),
        ("2TiB", 2**41),
        ("100", 100),
        ("100 B", 100),
        (100, 100),
        (0, 0),
    ],
)
def test_units(value: str | int, size: int) -> None:
    assert parse_size(value) == size


def test_percentages_are_taken_of_the_total() -> None:
    assert parse_size("90%", total=1000) == 900
    assert parse_size("12.5 %", total=1001) == 125
    assert parse_size("100%", total=2**60 + 1) == 2**60 + 1


@pytest.mark.parametrize(
    ("value", "message"),
    [
        ("", "expected a size such as 8GB, 512MiB or a number of bytes, got ''"),
        ("GB", "expected a size such as 8GB, 512MiB or a number of bytes, got 'GB'"),
        ("-1GB", "expected a size such as 8GB, 512MiB or a number of bytes, got '-1GB'"),
        (-1, "expected a size such as 8GB, 512MiB or a number of bytes, got -1"),
        (1.5, "expected a size such as 8GB, 512MiB or a number of bytes, got 1.5"),
        (True, "expected a size such as 8GB, 512MiB or a number of bytes, got True"),
        (None, "expected a size such as 8GB, 512MiB or a number of bytes, got None"),
        ("1e9", "expected a size such as 8GB, 512MiB or a number of bytes, got '1e9'"),
        ("8G", "unknown unit in the size '8G'; write B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"),
        ("9 potatoes", "unknown unit in the size '9 potatoes'; write B, kB, MB, GB, TB, KiB, MiB, GiB or TiB"),
        ("99999999TB", "the size '99999999TB' is larger than any machine"),
        (2**63, "the size 9223372036854775808 is larger than any machine"),
        ("90%", "expected a size such as 8GB, 512MiB or a number of bytes, got the percentage '90%'"),
    ],
)
def test_refused(value: object, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        parse_size(value)  # type: ignore[arg-type]
    assert str(caught.value) == message


@pytest.mark.parametrize("value", ["0%", "101%"])
def test_percentages_lie_between_0_and_100(value: str) -> None:
    with pytest.raises(ConfigError, match=f"above 0 and up to 100, got '{value}'"):
        parse_size(value, total=1000)


UNITS = {"B": 1, "kB": 10**3, "MB": 10**6, "GB": 10**9, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30}


@given(st.integers(0, 10**6), st.integers(0, 999), st.sampled_from(sorted(UNITS)))
def test_fractions_are_exact(whole: int, thousandths: int, unit: str) -> None:
    size = parse_size(f"{whole}.{thousandths:03}{unit}")
    assert size == int((whole + Fraction(thousandths, 1000)) * UNITS[unit])


@given(st.integers(0, 2**49))
def test_a_number_of_bytes_is_itself(size: int) -> None:
    assert parse_size(size) == parse_size(str(size)) == parse_size(f"{size}B") == size


@given(st.one_of(st.text(), st.from_regex(r"[0-9.%]{1,9}[a-zA-Z]{0,4}")))
def test_any_text_is_a_size_or_a_clear_error(text: str) -> None:
    message = ""
    try:
        assert parse_size(text, total=10**9) >= 0
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
