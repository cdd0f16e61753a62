"""JSON Lines and JSON documents, read strictly: no NaN, no doubled keys, no bottomless nesting."""

from __future__ import annotations

import json
from collections.abc import Generator
from typing import TYPE_CHECKING, BinaryIO, NoReturn

from llamahome.data.rows import Line, Row, Rows, Text, bad_row, kind_of, max_row_bytes, read_all, read_lines
from llamahome.errors import DataError

if TYPE_CHECKING:
    from llamahome.config.schema import DataSettings

MAX_DEPTH = 100
MAX_DOCUMENT_BYTES = 1 << 30  # a JSON document, unlike JSON Lines, is held in memory
_ROW_LISTS = ("messages", "conversations")  # columns of a row, not lists of rows
_MEND = "mend the file"


def read_jsonl(stream: Text, file: str, settings: DataSettings) -> Rows:
    """One JSON object per line; blank lines are passed over."""
    for line in read_lines(stream, file, max_row_bytes(settings)):
        if isinstance(line, DataError):
            yield line
        elif line.text.strip():
            yield _parse_row(line, file)


def _parse_row(line: Line, file: str) -> Row | DataError:
    try:
        value, end = _parse(line.text, 0)
        if line.text[end:].strip():
            raise ValueError(f"invalid JSON at column {_skip_space(line.text, end) + 1}: there is more after the row")
    except ValueError as error:
        cut = "" if line.text.endswith("\n") else "the last line may be cut off: "
        return bad_row(f"{cut}{_message(error)}", file, line.number)
    return _as_row(value, file, line.number)


def _as_row(value: object, file: str, line: int) -> Row | DataError:
    if isinstance(value, dict):
        return Row(value, file, line)
    return bad_row(f"the row is {kind_of(value)}, not an object", file, line)


def read_json(stream: BinaryIO, file: str, settings: DataSettings) -> Rows:
    """An array of objects, an object that holds one such array, or one object."""
    text = read_all(stream, file, MAX_DOCUMENT_BYTES)
    start = _skip_space(text, 0)
    if text.startswith("[", start):
        end = yield from _array_rows(text, start, file)
    elif text.startswith("{", start):
        end = yield from _object_rows(text, start, file)
    elif text.strip():
        value, end = _parse_at(text, start, file)
        yield _as_row(value, file, 1)
    else:
        return
    if text[end:].strip():
        raise _fault(text, _skip_space(text, end), "there is more after the end", file)


def holds_lines(stream: BinaryIO, settings: DataSettings) -> bool:
    """Whether a stream is JSON Lines under the wrong name: its first line is an object, and there is more."""
    first = stream.readline(max_row_bytes(settings) + 1)
    more = bool(stream.readline(1))
    stream.seek(0)
    if not more:
        return False
    try:
        text = first.decode("utf-8-sig").strip()
        value, end = _parse(text, 0)
    except ValueError:  # UnicodeDecodeError is one
        return False
    return isinstance(value, dict) and end == len(text)


def _array_rows(text: str, start: int, file: str) -> Generator[Row | DataError, None, int]:
    """Yield the rows of the array at `start`; return the position after it."""
    line, counted = 1, 0
    position = _skip_space(text, start + 1)
    while not text.startswith("]", position):
        line, counted = line + text.count("\n", counted, position), position
        value, position = _parse_at(text, position, file)
        yield _as_row(value, file, line)
        position = _next_item(text, position, "]", file)
    return position + 1


def _object_rows(text: str, start: int, file: str) -> Generator[Row | DataError, None, int]:
    """The rows of the one list in a JSON object; an object without lists is a row itself."""
    row: dict[str, object] = {}
    lists: dict[str, int] = {}
    position = _skip_space(text, start + 1)
    while not text.startswith("}", position):
        if not text.startswith('"', position):
            raise _fault(text, position, "expected a key in double quotes", file)
        name, position = _parse_at(text, position, file)
        position = _skip_space(text, position)
        if not text.startswith(":", position):
            raise _fault(text, position, "expected ':'", file)
        position = _skip_space(text, position + 1)
        if name in row:
            raise _fault(text, position, f"the key {name!r} is there twice", file)
        begin = position
        value, position = _parse_at(text, begin, file)
        if isinstance(value, list) and name not in _ROW_LISTS:
            value, lists[str(name)] = None, begin
        row[str(name)] = value
        position = _next_item(text, position, "}", file)
    if len(lists) > 1:
        names = " and ".join(map(repr, list(lists)[:2]))
        raise DataError(
            f"the object holds several lists: {names}", where=file, fix="save the rows as JSON Lines (.jsonl)"
        )
    if lists:
        [begin] = lists.values()
        yield from _array_rows(text, begin, file)
    else:
        yield Row(row, file, text.count("\n", 0, start) + 1)
    return position + 1


def _skip_space(text: str, position: int) -> int:
    while position < len(text) and text[position] in " \t\r\n":
        position += 1
    return position


def _next_item(text: str, position: int, close: str, file: str) -> int:
    """The position of the item after the comma, or of `close`."""
    position = _skip_space(text, position)
    if text.startswith(close, position):
        return position
    if not text.startswith(",", position):
        what = f"expected ',' or {close!r}" if position < len(text) else f"the file ends before {close!r}"
        raise _fault(text, position, what, file)
    position = _skip_space(text, position + 1)
    if text.startswith(close, position):
        raise _fault(text, position, "a value must follow the comma", file)
    return position


def _parse_at(text: str, position: int, file: str) -> tuple[object, int]:
    try:
        return _parse(text, position)
    except json.JSONDecodeError as error:
        raise bad_row(f"invalid JSON at column {error.colno}: {error.msg}", file, error.lineno, fix=_MEND) from None
    except ValueError as error:
        raise bad_row(str(error), file, text.count("\n", 0, position) + 1, fix=_MEND) from None


def _fault(text: str, position: int, what: str, file: str) -> DataError:
    column = position - text.rfind("\n", 0, position)
    return bad_row(f"invalid JSON at column {column}: {what}", file, text.count("\n", 0, position) + 1, fix=_MEND)


def _message(error: ValueError) -> str:
    if isinstance(error, json.JSONDecodeError):
        return f"invalid JSON at column {error.colno}: {error.msg}"
    return str(error)


def _parse(text: str, position: int) -> tuple[object, int]:
    """The value at `position` and the position after it. Raises: ValueError."""
    try:
        value, end = _DECODER.raw_decode(text, _skip_space(text, position))
    except RecursionError:
        raise ValueError(f"nested deeper than {MAX_DEPTH} levels") from None
    # Counting brackets is nearly free and settles almost every row.
    if text.count("[", position, end) + text.count("{", position, end) > MAX_DEPTH:
        _refuse_depth(value)
    return value, end


def _refuse_depth(value: object) -> None:
    level, depth = [value], 0
    while level := [child for parent in level for child in _children(parent)]:
        depth += 1
        if depth > MAX_DEPTH:
            raise ValueError(f"nested deeper than {MAX_DEPTH} levels")


def _children(value: object) -> list[object]:
    if isinstance(value, dict):
        return list(value.values())
    return value if isinstance(value, list) else []


def _unique_keys(pairs: list[tuple[str, object]]) -> dict[str, object]:
    fields = dict(pairs)
    if len(fields) != len(pairs):
        names = [name for name, _ in pairs]
        raise ValueError(f"the key {next(name for name in names if names.count(name) > 1)!r} is there twice")
    return fields


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
