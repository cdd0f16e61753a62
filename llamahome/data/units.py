"""Units of work: sources cut into pieces of bounded size, where a preparation can stop and go on.

Where the cuts are depends on the content of the sources alone. JSON Lines, text and CSV files (gzipped, too) are cut
between rows, Parquet files between row groups, hub datasets anywhere. A JSON document, a text file that is one sample
and the file of a plugin stay whole.
"""

from __future__ import annotations

import gzip
import zlib
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, BinaryIO

from llamahome.data.formats import LINE_READERS, WHOLE, CsvCells, Piece, first_rows, open_text
from llamahome.data.sources import COMPRESSED, Source, open_hub_dataset, unreadable

if TYPE_CHECKING:
    from llamahome.config.schema import DataSettings

MIN_UNIT_BYTES, MIN_PART_UNIT_BYTES = 1 << 25, 1 << 20
_UNITS = 256  # about; each is a file or two, which a reader keeps open
_UNITS_PER_PART = 4
_CHUNK = 1 << 20
_INFLATION = 8  # what a gzipped file is taken to hold, as a multiple of its size


@dataclass(frozen=True)
class Unit:
    """Pieces with the indexes of their sources, to be tokenised in one go. `held_out`: of the evaluation data."""

    pieces: tuple[tuple[int, Piece], ...]
    held_out: bool

    @property
    def size(self) -> int:
        """Bytes of input."""
        return sum(piece.size for _, piece in self.pieces)


def cut(sources: Sequence[Source], settings: DataSettings, parts: int, held_out: int) -> list[Unit]:
    """Units for `parts` machines; the last `held_out` sources are evaluation data. Large files are read through.

    Raises: DataError.
    """
    sizes = list(map(_size, sources))
    least = MIN_UNIT_BYTES if parts == 1 else MIN_PART_UNIT_BYTES
    goal = max(least, sum(sizes) // max(_UNITS, _UNITS_PER_PART * parts))
    first = len(sources) - held_out
    return [
        Unit(pieces, begin == first)
        for begin, end in ((0, first), (first, len(sources)))
        for pieces in _grouped(_pieces(range(begin, end), sources, sizes, settings, goal), goal)
    ]


Pieces = tuple[tuple[int, Piece], ...]


def _pieces(
    indexes: Iterable[int], sources: Sequence[Source], sizes: Sequence[int], settings: DataSettings, goal: int
) -> Iterator[tuple[int, Piece]]:
    for index in indexes:
        yield from ((index, piece) for piece in _cut_source(sources[index], sizes[index], settings, goal))


def _grouped(pieces: Iterable[tuple[int, Piece]], goal: int) -> Iterator[Pieces]:
    """Neighbours that have `goal` bytes together."""
    group: list[tuple[int, Piece]] = []
    for item in pieces:
        group.append(item)
        if sum(piece.size for _, piece in group) >= goal:
            yield tuple(group)
            group = []
    if group:
        yield tuple(group)


def _size(source: Source) -> int:
    if source.path is None and source.plugin:
        return 0
    if source.path is None:
        return int(open_hub_dataset(source.name).data.nbytes)
    return source.stamp[0] * (_INFLATION if source.path.name.endswith(COMPRESSED) else 1)


def _cut_source(source: Source, size: int, settings: DataSettings, goal: int) -> list[Piece]:
    if size <= goal or source.plugin:
        return [replace(WHOLE, size=size)]
    if source.path is None:
        rows = len(open_hub_dataset(source.name))
        step = max(1, rows * goal // size)
        return _row_pieces([*range(0, rows, step), rows], size)
    source.refuse_change()
    try:
        with open_text(source, settings) as (stream, kind):
            pieces = _cut_file(stream, kind, source.name, size, settings, goal)
    except (EOFError, zlib.error, gzip.BadGzipFile):
        pieces = []
    except OSError as error:
        raise unreadable(source.name, error) from None
    source.refuse_change()
    return pieces or [replace(WHOLE, size=size)]  # of a damaged file, its reader says what is wrong and where


def _cut_file(stream: BinaryIO, kind: str, file: str, size: int, settings: DataSettings, goal: int) -> list[Piece]:
    if kind == "parquet":
        return _cut_parquet(stream, goal, size)
    if kind not in LINE_READERS:
        return []
    if kind in ("csv", "tsv"):
        bounds = _csv_bounds(stream, kind, file, settings, goal)
    else:
        bounds = _line_bounds(stream, goal, blank=kind == "text")
    return [Piece(begin, end, line, after - line, end - begin) for (begin, line), (end, after) in pairwise(bounds)]


def _row_pieces(bounds: Sequence[int], size: int) -> list[Piece]:
    return [
        Piece(begin, end, begin + 1, end - begin, size * (end - begin) // bounds[-1]) for begin, end in pairwise(bounds)
    ]


def _cut_parquet(stream: BinaryIO, goal: int, size: int) -> list[Piece]:
    import pyarrow as pa
    import pyarrow.parquet as pq

    try:
        with pq.ParquetFile(stream) as parquet:
            rows = first_rows(parquet)
    except (pa.ArrowException, OSError):
        return []
    bounds = [0]
    for row in rows[1:] if rows[-1] else []:
        if (row - bounds[-1]) * size >= goal * rows[-1] or row == rows[-1]:
            bounds.append(row)
    return _row_pieces(bounds, size)


def _line_bounds(stream: BinaryIO, goal: int, *, blank: bool) -> Iterator[tuple[int, int]]:
    """Offsets and numbers of lines where pieces begin and the last one ends; with `blank` only after blank lines."""
    line = 1
    yield 0, line
    while True:
        left = goal
        while left > 0 and (chunk := stream.read(min(left, _CHUNK))):
            line += chunk.count(b"\n")
            left -= len(chunk)
        if left == goal:
            return
        line += _skip_to_bound(stream, blank=blank)
        yield stream.tell(), line


def _skip_to_bound(stream: BinaryIO, *, blank: bool) -> int:
    """Go on to the end of the line, or of the next blank line; the number of line ends passed."""
    lines, whole = 0, False
    while raw := stream.readline(_CHUNK):
        begun, whole = whole, raw.endswith(b"\n")
        lines += whole
        if whole and (not blank or (begun and not raw.decode(errors="replace").strip())):
            break
    return lines


def _csv_bounds(stream: BinaryIO, kind: str, file: str, settings: DataSettings, goal: int) -> Iterator[tuple[int, int]]:
    cells = CsvCells(stream, file, settings, "\t" if kind == "tsv" else ",")
    cells.header()
    yield (begin := stream.tell()), cells.next_line
    while cells.next() is not None:
        if stream.tell() - begin >= goal:
            yield (begin := stream.tell()), cells.next_line
    if stream.tell() > begin:
        yield stream.tell(), cells.next_line
