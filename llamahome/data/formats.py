"""Readers of data files: JSON, JSON Lines, CSV, TSV, text and Parquet, plain or gzipped; hub datasets and plugins.

Values stay as they are written: "NA" and "1" in a CSV file are text. Text files give one sample per paragraph
(blocks between blank lines) as format `text`, one per line as `lines`, and one per file as `document`.
"""

from __future__ import annotations

import csv
import gzip
import math
import zlib
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from itertools import accumulate
from pathlib import Path
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, BinaryIO, cast

from llamahome.data.jsonrows import holds_lines, read_json, read_jsonl
from llamahome.data.own import Dataset, dataset_source, is_dataset, names_dataset
from llamahome.data.rows import (
    Row,
    Rows,
    Stretch,
    Text,
    bad_row,
    first_line,
    kind_of,
    max_row_bytes,
    read_lines,
    too_long,
)
from llamahome.data.sources import Plugin, Source, find_sources, open_hub_dataset, unreadable
from llamahome.data.watchdog import TimeLimit, Watchdog
from llamahome.errors import DataError

if TYPE_CHECKING:
    from llamahome.config.schema import DataSettings

PLUGIN_SECONDS = 60.0
# A plugin that gives more text than this for a file of N bytes never ends.
PLUGIN_TEXT_FACTOR, PLUGIN_TEXT_BYTES = 1000, 1 << 28

EXTENSIONS = MappingProxyType(
    {
        ".jsonl": "jsonl",
        ".ndjson": "jsonl",
        ".json": "json",
        ".csv": "csv",
        ".tsv": "tsv",
        ".txt": "text",
        ".text": "text",
        ".parquet": "parquet",
    }
)
_DELIMITERS = ",;\t|"
_END = object()


@dataclass(frozen=True)
class Piece:
    """A part of a source: from `begin` to before `end`, bytes of its (unzipped) text or rows; None is to the end.

    It begins with the row of line (or record) `line` and has `lines` of them, 0 if not known. `size` is its share of
    the work, in bytes.
    """

    begin: int = 0
    end: int | None = None
    line: int = 1
    lines: int = 0
    size: int = 0


WHOLE = Piece()


def find_files(paths: str | Path | Sequence[str | Path] | Dataset, settings: DataSettings) -> list[Source]:
    """The sources behind files, folders, globs, hub ids and data sets of the user's own, in a fixed order.

    Raises: DataError, ConfigError.
    """
    if is_dataset(paths) or (isinstance(paths, str) and names_dataset(paths)):
        return [dataset_source(paths)]
    formats = dict(EXTENSIONS) | {f".{name}": name for name in ("lines", "document")}
    return find_sources(cast("Sequence[str | Path]", paths), formats, chosen=settings.format, plugins=settings.plugins)


def read_rows(sources: Iterable[Source], settings: DataSettings, on_bad: Callable[[DataError], None]) -> Iterator[Row]:
    """The rows of all sources; `on_bad` is called with the error of each bad row and may raise it.

    Raises: DataError for a file that cannot be read, is empty, or changes while it is read.
    """
    for source in sources:
        for row in read_source(source, settings):
            if isinstance(row, DataError):
                on_bad(row)
            else:
                yield row


def read_source(source: Source, settings: DataSettings, piece: Piece = WHOLE) -> Rows:
    """The rows of a source (or a piece), and the errors of its bad rows as values. Raises: DataError as `read_rows`."""
    source.refuse_change()
    count = 0
    try:
        for row in _open(source, settings, piece):
            if isinstance(row, DataError):
                source.refuse_change()  # which explains most things
            count += 1
            yield row
    except (DataError, OSError, EOFError, zlib.error) as error:
        source.refuse_change()
        raise _read_error(source.name, error, count) from None
    source.refuse_change()
    if not count and piece.end is None:
        raise DataError("the file is empty", where=source.name, fix="name a file with rows")


def _read_error(file: str, error: Exception, rows: int) -> DataError:
    if isinstance(error, DataError):
        return error
    # gzip's own complaints are OSErrors without a number.
    if isinstance(error, OSError) and error.errno:
        return unreadable(file, error)
    return _damaged(file, error, rows)


def _damaged(file: str, error: Exception, rows: int) -> DataError:
    return DataError(f"damaged after {rows:,} rows: {error}", where=file, fix="make or download the file again")


def _open(source: Source, settings: DataSettings, piece: Piece) -> Rows:
    if source.plugin:
        yield from _read_plugin(source, source.plugin)
    elif source.path is None:
        dataset = open_hub_dataset(source.name)
        numbers = range(piece.begin, len(dataset) if piece.end is None else piece.end)
        rows = dataset if len(numbers) == len(dataset) else dataset.select(numbers)
        yield from (Row(dict(fields), source.name, number + 1) for number, fields in zip(numbers, rows, strict=True))
    else:
        with open_text(source, settings) as (stream, kind):
            if kind == "parquet":
                yield from read_parquet(stream, source.name, piece)
            elif piece.end is None:
                yield from READERS[kind](stream, source.name, settings)
            else:
                part = Stretch(stream, piece.begin, piece.end, piece.line)
                yield from LINE_READERS[kind](part, source.name, settings)


@contextmanager
def open_text(source: Source, settings: DataSettings) -> Iterator[tuple[BinaryIO, str]]:
    """The unzipped bytes of a file and its format; what the first bytes prove wins over the extension."""
    assert source.path is not None
    with source.path.open("rb") as file, _unzipped(file) as stream:
        head, kind = _head(stream), source.format
        if head.startswith(b"PAR1"):
            kind = "parquet"
        elif kind == "jsonl" and head.removeprefix(b"\xef\xbb\xbf").lstrip().startswith(b"["):
            kind = "json"
        elif kind == "json" and holds_lines(stream, settings):
            kind = "jsonl"
        yield stream, kind


def _unzipped(file: BinaryIO) -> AbstractContextManager[BinaryIO]:
    if _head(file)[:2] == b"\x1f\x8b":
        return cast("AbstractContextManager[BinaryIO]", gzip.GzipFile(fileobj=file, mode="rb"))
    return nullcontext(file)


def _head(stream: BinaryIO) -> bytes:
    head = stream.read(4096)
    stream.seek(0)
    return head


class _Feed:
    """Lines for csv.reader, which must not see more than one row's worth at a time."""

    def __init__(self, stream: Text, file: str, max_bytes: int) -> None:
        self.lines, self.file, self.max_bytes = read_lines(stream, file, max_bytes), file, max_bytes
        self.number, self.first, self.size = first_line(stream) - 1, 0, 0

    def begin_row(self) -> None:
        self.first, self.size = self.number + 1, 0

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = next(self.lines)
        if isinstance(line, DataError):
            self.number += 1
            raise line
        self.number = line.number
        self.size += len(line.text)
        if self.size > self.max_bytes:
            raise too_long(self.size, self.file, self.first, self.max_bytes)
        return line.text


class CsvCells:
    """The rows of a CSV stream as lists of texts. `line` is where the last one began, `next_line` where one would."""

    def __init__(self, stream: Text, file: str, settings: DataSettings, delimiter: str) -> None:
        limit = max_row_bytes(settings)
        csv.field_size_limit(max(limit, csv.field_size_limit()))
        self.delimiter = settings.delimiter or delimiter
        self._feed = _Feed(stream, file, limit)
        self._rows = csv.reader(self._feed, delimiter=self.delimiter, strict=True)

    @property
    def line(self) -> int:
        return self._feed.first

    @property
    def next_line(self) -> int:
        return self._feed.number + 1

    def next(self) -> list[str] | DataError | None:
        """The next row that is not blank, its error, or None at the end."""
        try:
            while True:
                self._feed.begin_row()
                if cells := next(self._rows, None):
                    return cells
                if cells is None:
                    return None
        except DataError as error:
            return error
        except csv.Error as error:
            known = {"unexpected end of data": "a quote is opened and never closed"}
            what = known.get(str(error), f"invalid CSV: {error}")
            fix = 'close the quote, and double a quote inside a field ("")'
            return bad_row(what, self._feed.file, self._feed.first, fix=fix)

    def header(self) -> list[str]:
        """The first row, which names the columns; empty if there is none. Raises: DataError."""
        cells = self.next()
        if isinstance(cells, DataError):
            raise cells
        return _checked_header(cells, self._feed.file, self.line, self.delimiter) if cells else []


def read_csv(stream: Text, file: str, settings: DataSettings, *, delimiter: str = ",") -> Rows:
    """A header line, then rows of text with as many columns. A stretch of a file has the file's header."""
    whole = stream.stream if isinstance(stream, Stretch) else stream
    whole.seek(0)
    rows = CsvCells(whole, file, settings, delimiter)
    header = rows.header()
    if isinstance(stream, Stretch):
        whole.seek(stream.begin)
        rows = CsvCells(stream, file, settings, delimiter)
    while (cells := rows.next()) is not None:
        if isinstance(cells, DataError):
            yield cells
        elif len(cells) == len(header):
            yield Row(dict(zip(header, cells, strict=True)), file, rows.line)
        else:
            counts = f"{len(cells)} columns where the header has {len(header)}"
            yield bad_row(f"the row has {counts}", file, rows.line, fix="quote fields that hold the delimiter")


def _checked_header(names: list[str], file: str, line: int, delimiter: str) -> list[str]:
    other = next((char for char in _DELIMITERS if char != delimiter and char in names[0]), None)
    if len(names) == 1 and other:
        shown = {"\t": "'\\t'"}.get(other, repr(other))
        raise DataError(f"one column {names[0]!r}", where=f"{file}:{line}", fix=f"set data.delimiter: {shown}")
    if not any(name.strip() for name in names):
        raise DataError("the header is empty", where=f"{file}:{line}", fix="name the columns in the first line")
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise DataError(f"the column {twice!r} is there twice", where=f"{file}:{line}", fix="rename one of them")
    return names


def read_text(stream: Text, file: str, settings: DataSettings, *, unit: str = "text") -> Rows:
    """Paragraphs (`unit` "text"), lines ("lines") or the whole file ("document"), each as the field `text`."""
    limit = max_row_bytes(settings)
    block: list[str] = []
    first, size = 1, 0
    for line in read_lines(stream, file, limit):
        if isinstance(line, DataError):
            yield line
            continue
        blank = not line.text.strip()
        if size and (unit == "lines" or (unit == "text" and blank)):
            yield _text_row(block, size, file, first, limit)
            block, size = [], 0
        if size or not blank:
            first = first if size else line.number
            size += len(line.text)
            if size <= limit:
                block.append(line.text)
    if size:
        yield _text_row(block, size, file, first, limit)


def _text_row(block: list[str], size: int, file: str, line: int, limit: int) -> Row | DataError:
    if size > limit:
        return too_long(size, file, line, limit)
    return Row({"text": "".join(block).rstrip("\r\n")}, file, line)


def read_parquet(stream: BinaryIO, file: str, piece: Piece = WHOLE) -> Rows:
    """The rows of a Parquet file, or of those row groups that begin in a piece; `line` is the number of the row."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    number = piece.begin
    try:
        with pq.ParquetFile(stream) as parquet:
            groups = [group for group, first in enumerate(first_rows(parquet)[:-1]) if _holds(piece, first)]
            for batch in parquet.iter_batches(batch_size=256, row_groups=groups):
                for fields in batch.to_pylist():
                    number += 1
                    yield Row(fields, file, number)
    except (pa.ArrowException, OSError) as error:
        raise _damaged(file, error, number) from None


def first_rows(parquet: Any) -> list[int]:
    """The index of the first row of each row group of a Parquet file, and the number of all rows."""
    counts = (parquet.metadata.row_group(group).num_rows for group in range(parquet.metadata.num_row_groups))
    return list(accumulate(counts, initial=0))


def _holds(piece: Piece, row: int) -> bool:
    return piece.begin <= row and (piece.end is None or row < piece.end)


def _read_plugin(source: Source, plugin: Plugin) -> Rows:
    """Rows of a plugin, which may raise anything, give anything and never end."""
    room = PLUGIN_TEXT_FACTOR * source.stamp[0] + PLUGIN_TEXT_BYTES if source.path else math.inf
    number = 0
    with Watchdog(PLUGIN_SECONDS) as watchdog:
        try:
            rows = iter(watchdog.run(partial(plugin.read, source.path or Path())))
            while (fields := watchdog.run(partial(next, rows, _END))) is not _END:
                number += 1
                row = _plugin_row(fields, plugin, source.name, number)
                room -= sum(len(value) for value in row.fields.values() if isinstance(value, str))
                if room < 0:
                    raise _plugin_error(plugin, "seems never to end", source.name, number)
                yield row
        except (DataError, MemoryError):
            raise
        except TimeLimit:
            late = f"gave no row for {PLUGIN_SECONDS:.0f} s"
            raise _plugin_error(plugin, late, source.name, number + 1) from None
        except Exception as error:
            raise _plugin_error(plugin, f"failed: {type(error).__name__}: {error}", source.name, number + 1) from error


def _plugin_row(fields: object, plugin: Plugin, file: str, number: int) -> Row:
    if isinstance(fields, dict) and all(isinstance(name, str) for name in fields):
        return Row(fields, file, number)
    raise _plugin_error(plugin, f"gave {kind_of(fields)} instead of a dict with text keys", file, number)


def _plugin_error(plugin: Plugin, what: str, file: str, number: int) -> DataError:
    return DataError(f"plugin {plugin.name!r} {what}", where=f"{file}:{number}", fix="mend the plugin")


LINE_READERS: MappingProxyType[str, Callable[[Text, str, DataSettings], Rows]] = MappingProxyType(
    {
        "jsonl": read_jsonl,
        "csv": read_csv,
        "tsv": partial(read_csv, delimiter="\t"),
        "text": read_text,
        "lines": partial(read_text, unit="lines"),
    }
)
READERS: MappingProxyType[str, Callable[[BinaryIO, str, DataSettings], Rows]] = MappingProxyType(
    {**LINE_READERS, "json": read_json, "document": partial(read_text, unit="document")}
)
