"""Rows of text files: bounded lines and strict UTF-8, and the place of every fault.

Readers yield a `Row`, or a `DataError` as a value for a row that is wrong, so that the caller can skip it and go on.
What spoils the whole file is raised.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from llamahome.config import parse_size
from llamahome.errors import DataError

if TYPE_CHECKING:
    from llamahome.config.schema import DataSettings

MEND_OR_SKIP = "mend the row or set data.on_bad_row: skip"
_BOM = b"\xef\xbb\xbf"
_CHUNK = 1 << 20


class Row(NamedTuple):
    """One record: its fields, the file as the user named it, and the line (or record) it begins on, from 1."""

    fields: dict[str, object]
    file: str
    line: int


class Line(NamedTuple):
    """A decoded line with its ending; `number` counts from 1."""

    number: int
    text: str


Rows = Iterator[Row | DataError]


class Stretch:
    """The bytes `begin` to `end` of a stream, for readers of lines. `begin` is the start of the line number `line`."""

    def __init__(self, stream: BinaryIO, begin: int, end: int, line: int) -> None:
        self.stream, self.begin, self.line = stream, begin, line
        self._left = end - begin
        stream.seek(begin)

    def readline(self, limit: int) -> bytes:
        raw = self.stream.readline(min(limit, self._left))
        self._left -= len(raw)
        return raw


Text = BinaryIO | Stretch


def first_line(stream: Text) -> int:
    return stream.line if isinstance(stream, Stretch) else 1


def bad_row(what: str, file: str, line: int, *, field: str = "", fix: str = MEND_OR_SKIP) -> DataError:
    """The error of one row, at `file:line` or `file:line:field`."""
    return DataError(what, where=f"{file}:{line}:{field}" if field else f"{file}:{line}", fix=fix)


def max_row_bytes(settings: DataSettings) -> int:
    return parse_size(settings.max_row_bytes)


def read_lines(stream: Text, file: str, max_bytes: int) -> Iterator[Line | DataError]:
    """Decode a stream line by line; only b"\\n" ends a line. A longer line than `max_bytes` is passed over unread.

    Raises: DataError for UTF-16.
    """
    number, offset = first_line(stream) - 1, stream.begin if isinstance(stream, Stretch) else 0
    while raw := stream.readline(max_bytes + 1):
        number += 1
        start, offset = offset, offset + len(raw)
        if number == 1:
            refuse_utf16(raw, file)
            raw = raw.removeprefix(_BOM)
        if len(raw) > max_bytes:
            offset += _skip_line(stream, raw)
            yield too_long(offset - start, file, number, max_bytes)
            continue
        try:
            yield Line(number, raw.decode())
        except UnicodeDecodeError as error:
            yield _bad_utf8(error, file, number, start)


def read_all(stream: BinaryIO, file: str, max_bytes: int) -> str:
    """The whole stream as text. Raises: DataError if it is longer than `max_bytes` or not UTF-8."""
    raw = stream.read(max_bytes + 1)
    if len(raw) > max_bytes:
        raise DataError(f"larger than {max_bytes:,} bytes", where=file, fix="convert it to JSON Lines (.jsonl)")
    refuse_utf16(raw, file)
    raw = raw.removeprefix(_BOM)
    try:
        return raw.decode()
    except UnicodeDecodeError as error:
        line_start = raw.rfind(b"\n", 0, error.start) + 1
        raise _bad_utf8(error, file, raw.count(b"\n", 0, error.start) + 1, 0, line_start) from None


def too_long(size: int, file: str, line: int, max_bytes: int) -> DataError:
    return bad_row(
        f"the row has {size:,} bytes, more than data.max_row_bytes: {max_bytes:,}",
        file,
        line,
        fix="split the row, raise data.max_row_bytes or set data.on_bad_row: skip",
    )


def refuse_utf16(head: bytes, file: str) -> None:
    if head[:2] in (b"\xff\xfe", b"\xfe\xff") or (len(head) > 3 and 0 in head[:2] and any(head[:2])):
        raise DataError("the file looks like UTF-16", where=file, fix="convert it: iconv -f UTF-16 -t UTF-8")


def _skip_line(stream: Text, raw: bytes) -> int:
    skipped = 0
    while not raw.endswith(b"\n") and (raw := stream.readline(_CHUNK)):
        skipped += len(raw)
    return skipped


def _bad_utf8(error: UnicodeDecodeError, file: str, line: int, offset: int, line_start: int = 0) -> DataError:
    byte = error.object[error.start]
    column = error.start - line_start + 1
    place = f"byte {column} of the line, byte {offset + error.start} of the file"
    return bad_row(f"invalid UTF-8: 0x{byte:02x} at {place}", file, line, fix=f"save it as UTF-8; {MEND_OR_SKIP}")


def kind_of(value: object) -> str:
    """The JSON name of a value's type, for messages."""
    names = {dict: "an object", list: "a list", str: "text", bool: "true or false", int: "a number", float: "a number"}
    return "null" if value is None else names.get(type(value), f"a {type(value).__name__}")
