"""Sizes of memory and disk as people write them: `8GB`, `512MiB`, `90%`, or a number of bytes."""

from __future__ import annotations

import re
from fractions import Fraction

from llamahome.errors import ConfigError

UNITS = {"b": 1} | {
    f"{letter}{suffix}": base**power
    for power, letter in enumerate("kmgt", start=1)
    for suffix, base in (("b", 1000), ("ib", 1024))
}
_SIZE = re.compile(r"(\d{1,19}(?:\.\d{1,9})?)\s*(%|[a-zA-Z]*)")
_LARGEST = 2**63 - 1  # what the C++ side can hold
_FORMS = "a size such as 8GB, 512MiB or a number of bytes"


def parse_size(value: str | int, total: int | None = None) -> int:
    """Return `value` in whole bytes, rounded down.

    `kB MB GB TB` are powers of 1000 and `KiB MiB GiB TiB` of 1024, in any case and with or without a space; no unit
    means bytes. A percentage is taken of `total` bytes. Raises ConfigError for anything else, negative sizes included.
    """
    match = _SIZE.fullmatch(str(value).strip())
    if match is None or isinstance(value, bool) or not isinstance(value, str | int):
        raise ConfigError(f"expected {_FORMS}, got {value!r}")
    number, unit = Fraction(match[1]), match[2].lower()
    if unit == "%":
        size = _share(value, number, total)
    elif unit == "" or unit in UNITS:
        size = int(number * UNITS[unit or "b"])
    else:
        raise ConfigError(f"unknown unit in the size {value!r}", fix="write B, kB, MB, GB, TB, KiB, MiB, GiB or TiB")
    if size > _LARGEST:
        raise ConfigError(f"the size {value!r} is larger than any machine")
    return size


def _share(value: str | int, percent: Fraction, total: int | None) -> int:
    if total is None:
        raise ConfigError(f"expected {_FORMS}, got the percentage {value!r}")
    if not 0 < percent <= 100:
        raise ConfigError(f"expected a percentage above 0 and up to 100, got {value!r}")
    return int(percent * total / 100)
