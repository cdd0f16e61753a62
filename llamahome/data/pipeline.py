"""Rows to tokens, streaming: read, find the schema, render, tokenise on threads, cut to length."""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from llamahome.config import parse_size
from llamahome.data.encoding import Encoded, Rendered
from llamahome.data.formats import Piece, read_source
from llamahome.data.report import DataReport, Faults, Place, TooManyFaultsError
from llamahome.data.rows import Row
from llamahome.data.schemas import Sample, SchemaReader
from llamahome.data.sources import Source
from llamahome.data.templates import Renderer
from llamahome.errors import DataError, LlamaHomeError, ModelError

if TYPE_CHECKING:
    from llamahome.config import Config

_BATCH_SAMPLES, _BATCH_CHARS = 256, 1 << 19
_BYTES_PER_CHAR = 128  # of a batch while it is tokenised


@dataclass(frozen=True)
class Document:
    """A piece of a sample that fits data.max_length."""

    sample: Sample
    place: Place
    encoded: Encoded


class Pipeline:
    """One pass over pieces of sources; what it meets is counted in `report`, bad rows go to `faults`."""

    def __init__(self, sources: list[Source], config: Config, report: DataReport, faults: Faults) -> None:
        self.sources, self.settings, self.report, self.faults = sources, config.data, report, faults
        self.schemas = SchemaReader(config.data)
        self.workers = _worker_count(config.data.num_workers)
        room = parse_size(config.memory.worker_memory) // _BYTES_PER_CHAR
        self.batch_chars = min(_BATCH_CHARS, room)

    def samples(self, pieces: Iterable[tuple[int, Piece]]) -> Iterator[tuple[Sample, Place]]:
        """Samples with their places; a piece comes with the index of its source."""
        for index, piece in pieces:
            try:
                yield from self._samples_of(index, piece)
            except TooManyFaultsError:
                raise
            except DataError as error:
                if not self.faults.collect:
                    raise
                self.faults.bad(error, (index, 0))

    def _samples_of(self, index: int, piece: Piece) -> Iterator[tuple[Sample, Place]]:
        source = self.sources[index]
        if piece.begin:
            self._find_schema(source)
        for row in read_source(source, self.settings, piece):
            self.report.rows += 1
            try:
                if isinstance(row, DataError):
                    raise row
                sample = self.schemas.read(row)
            except DataError as error:
                self.faults.bad(error, (index, _line_of(error, source.name)))
                continue
            self.report.schemas[index] = sample.schema
            yield sample, (index, sample.line)

    def _find_schema(self, source: Source) -> None:
        """Read the first good row of a source, which decides about the others."""
        if source.name in self.schemas.schemas:
            return
        for row in read_source(source, self.settings):
            if isinstance(row, Row):
                with suppress(DataError):
                    self.schemas.read(row)
                    return

    def documents(self, renderer: Renderer | None, pieces: Iterable[tuple[int, Piece]]) -> Iterator[Document]:
        """Tokenised samples in the order of their rows; without a renderer they have no tokens."""
        if renderer is None:
            nothing = Encoded(np.empty(0, np.uint32), np.empty(0, np.bool_))
            yield from (Document(sample, place, nothing) for sample, place in self.samples(pieces))
            return
        for batch, encoded in self._encoded(renderer, self._batches(pieces)):
            for (sample, place), tokens in zip(batch, encoded, strict=True):
                yield from (Document(sample, place, piece) for piece in self._fit(tokens, sample, place))

    def _batches(self, pieces: Iterable[tuple[int, Piece]]) -> Iterator[list[tuple[Sample, Place]]]:
        batch: list[tuple[Sample, Place]] = []
        chars = 0
        for sample, place in self.samples(pieces):
            batch.append((sample, place))
            chars += len(sample.text) + sum(len(message["content"]) for message in sample.messages)
            if len(batch) == _BATCH_SAMPLES or chars >= self.batch_chars:
                yield batch
                batch, chars = [], 0
        if batch:
            yield batch

    def _encoded(
        self, renderer: Renderer, batches: Iterable[list[tuple[Sample, Place]]]
    ) -> Iterator[tuple[list[tuple[Sample, Place]], list[Encoded]]]:
        """Rendering runs here, tokenising on other threads, a few batches ahead."""
        queue: deque[tuple[list[tuple[Sample, Place]], Future[list[Encoded]]]] = deque()
        with _threads_of_our_own(), ThreadPoolExecutor(max(self.workers, 1)) as pool:
            for batch in batches:
                batch, rendered = self._render(renderer, batch)
                queue.append((batch, pool.submit(renderer.tokenize, rendered)))
                if len(queue) > self.workers:
                    done, tokens = queue.popleft()
                    yield done, tokens.result()
            while queue:
                done, tokens = queue.popleft()
                yield done, tokens.result()

    def _render(
        self, renderer: Renderer, batch: list[tuple[Sample, Place]]
    ) -> tuple[list[tuple[Sample, Place]], list[Rendered]]:
        try:
            return batch, renderer.render([sample for sample, _ in batch])
        except ModelError:
            if not self.faults.collect or renderer.template is None:
                raise
        good: list[tuple[Sample, Place]] = []
        rendered: list[Rendered] = []
        for sample, place in batch:
            try:
                rendered += renderer.render([sample])
                good.append((sample, place))
            except ModelError as error:
                self.faults.bad(error, place)
        return good, rendered

    def _fit(self, tokens: Encoded, sample: Sample, place: Place) -> list[Encoded]:
        """The sample within data.max_length: itself, cut, in pieces, or nothing."""
        size, limit = len(tokens.ids), self.settings.max_length
        self.report.saw(size, place)
        pieces = [tokens]
        if size > limit:
            pieces = self._shorten(tokens, sample, place)
        if pieces and not any(piece.trained.any() for piece in pieces):
            self._empty(sample, place, size)
            return []
        return pieces

    def _shorten(self, tokens: Encoded, sample: Sample, place: Place) -> list[Encoded]:
        size, limit = len(tokens.ids), self.settings.max_length
        match self.settings.overflow:
            case "error":
                what = f"the sample has {size:,} tokens, more than data.max_length: {limit:,}"
                fix = "shorten it, raise data.max_length or set data.overflow: truncate, split or drop"
                self.faults.refuse(DataError(what, where=f"{sample.file}:{sample.line}", fix=fix), place)
                return []
            case "drop":
                self.report.dropped.add(place)
                return []
            case "split" if not sample.messages:
                self.report.split.add(place)
                return split(tokens, limit)
            case _:  # a chat cannot be split, for its answers need what was asked
                self.report.truncated.add(place)
                return [Encoded(tokens.ids[:limit], tokens.trained[:limit])]

    def _empty(self, sample: Sample, place: Place, size: int) -> None:
        if self.settings.on_empty == "skip":
            self.report.empty.add(place)
            return
        what = "the sample has no token to train on"
        if size > self.settings.max_length:
            what = f"{what}: the first {self.settings.max_length:,} of its {size:,} tokens hold none of the answer"
        fix = "raise data.max_length, mend the row or set data.on_empty: skip"
        self.faults.refuse(DataError(what, where=f"{sample.file}:{sample.line}", fix=fix), place)


def split(tokens: Encoded, limit: int) -> list[Encoded]:
    """Pieces of at most `limit` tokens. Each begins with the last token of the one before, so that every token but
    the first of the sample is predicted exactly once."""
    pieces = []
    for start in range(0, max(len(tokens.ids) - 1, 1), limit - 1):
        trained = tokens.trained[start : start + limit].copy()
        trained[:1] = False
        pieces.append(Encoded(tokens.ids[start : start + limit], trained))
    return pieces


def _line_of(error: LlamaHomeError, file: str) -> int:
    """The line in an error's `file:line[:field]`, or 0."""
    line = error.where.removeprefix(f"{file}:").partition(":")[0]
    return int(line) if line.isdigit() else 0


@contextmanager
def _threads_of_our_own() -> Iterator[None]:
    """Keep the tokenizers library from starting a thread per core beside the threads we give it."""
    name = "TOKENIZERS_PARALLELISM"
    before = os.environ.get(name)
    os.environ[name] = "false"
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _worker_count(workers: int | str) -> int:
    return len(os.sched_getaffinity(0)) if isinstance(workers, str) else workers
