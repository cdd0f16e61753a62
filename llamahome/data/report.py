"""What preparing data found: counts, places, lengths, faults; as lines of text and as plain JSON."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any, Self

import numpy as np
import numpy.typing as npt

from llamahome.errors import DataError, LlamaHomeError

logger = logging.getLogger(__name__)

_EXAMPLES = 5
_BAR = 40
_SCHEMAS = {"question": "question/answer", "prompt": "prompt/completion", "instruction": "instruction/input/output"}
_TALLIES = ("truncated", "split", "dropped", "empty", "bad_rows")

Place = tuple[int, int]  # index of the file, line from 1


def schema_names(found: Iterable[str]) -> str:
    """Schemas by the names of their fields, each once."""
    return ", ".join(_SCHEMAS.get(name, name) for name in dict.fromkeys(found))


def pack_place(place: Place) -> int:
    """A place as the 64-bit locator that the token store keeps with a document."""
    return place[0] << 40 | place[1]


def unpack_place(locator: int) -> Place:
    return locator >> 40, locator & ((1 << 40) - 1)


@dataclass
class Tally:
    """A count and the first places counted."""

    count: int = 0
    examples: list[Place] = field(default_factory=list)

    def add(self, place: Place) -> None:
        self.count += 1
        if len(self.examples) < _EXAMPLES:
            self.examples.append(place)

    def merge(self, other: Tally, files: Sequence[int]) -> None:
        room = _EXAMPLES - len(self.examples)
        self.count += other.count
        self.examples += [(files[file], line) for file, line in other.examples[:room]]

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        return cls(values["count"], [(file, line) for file, line in values["examples"]])


@dataclass
class Part:
    """Totals of one split."""

    samples: int = 0
    tokens: int = 0
    trained_tokens: int = 0

    def merge(self, other: Part) -> None:
        self.samples += other.samples
        self.tokens += other.tokens
        self.trained_tokens += other.trained_tokens


@dataclass
class DataReport:
    """The facts about a data set. `lengths` counts samples by tokens before any cut, under powers of two."""

    files: list[str]
    schemas: dict[int, str] = field(default_factory=dict)  # by index of the file
    rows: int = 0
    train: Part = field(default_factory=Part)
    validation: Part = field(default_factory=Part)
    truncated: Tally = field(default_factory=Tally)
    split: Tally = field(default_factory=Tally)
    dropped: Tally = field(default_factory=Tally)
    empty: Tally = field(default_factory=Tally)
    bad_rows: Tally = field(default_factory=Tally)
    duplicates: int = 0
    leaked: int = 0  # evaluation samples that are trained on, too
    lengths: dict[int, int] = field(default_factory=dict)
    longest: tuple[int, Place] = (0, (0, 0))
    largest_id: tuple[int, Place] = (0, (0, 0))
    max_length: int = 0
    faults: list[str] = field(default_factory=list)
    preview: list[str] = field(default_factory=list)

    def place(self, place: Place) -> str:
        """`file:line` of a place."""
        return f"{self.files[place[0]]}:{place[1]}"

    def title(self) -> str:
        """The files in a few words."""
        more = len(self.files) - 3
        return ", ".join(self.files[:3]) + (f" and {more:,} more" if more > 0 else "")

    def saw(self, tokens: int, place: Place) -> None:
        """Count the length of a sample."""
        bound = 1 << max(tokens - 1, 0).bit_length()
        self.lengths[bound] = self.lengths.get(bound, 0) + 1
        if tokens > self.longest[0]:
            self.longest = tokens, place

    def count(
        self, split: str, ids: npt.NDArray[np.uint32], trained: npt.NDArray[np.bool_],
        lengths: Sequence[int], places: Sequence[Place],
    ) -> None:  # fmt: skip
        """Count documents of `train` or `validation` that lie end to end in `ids` and `trained`."""
        part = self.train if split == "train" else self.validation
        part.samples += len(lengths)
        part.tokens += len(ids)
        part.trained_tokens += int(np.count_nonzero(trained))
        largest = int(ids.max(initial=0))
        if largest > self.largest_id[0]:
            document = int(np.searchsorted(np.cumsum(lengths), ids.argmax(), side="right"))
            self.largest_id = largest, places[document]

    def merge(self, other: DataReport, files: Sequence[int]) -> None:
        """Add the counts of another report; its file number i is `files[i]` here."""
        self.rows += other.rows
        self.duplicates += other.duplicates
        self.leaked += other.leaked
        self.schemas |= {files[index]: name for index, name in other.schemas.items()}
        for bound, count in other.lengths.items():
            self.lengths[bound] = self.lengths.get(bound, 0) + count
        self.train.merge(other.train)
        self.validation.merge(other.validation)
        for name in _TALLIES:
            getattr(self, name).merge(getattr(other, name), files)
        for name in ("longest", "largest_id"):
            number, (file, line) = getattr(other, name)
            if number > getattr(self, name)[0]:
                setattr(self, name, (number, (files[file], line)))

    def to_dict(self) -> dict[str, Any]:
        """Plain JSON; `from_dict` turns it back."""
        return asdict(self)

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> Self:
        """Raises: KeyError, TypeError, ValueError for what `to_dict` did not make."""
        report = cls(**values)
        report.schemas = {int(key): name for key, name in report.schemas.items()}
        report.lengths = {int(key): count for key, count in report.lengths.items()}
        report.train, report.validation = Part(**values["train"]), Part(**values["validation"])
        for name in _TALLIES:
            setattr(report, name, Tally.from_dict(values[name]))
        for name in ("longest", "largest_id"):
            number, (file, line) = values[name]
            setattr(report, name, (number, (file, line)))
        return report

    def to_text(self) -> str:
        """Everything, one fact per line: faults last, so that they are seen."""
        return "\n".join([*self.lines(), *(f"sample: {text}" for text in self.preview), *self.faults])

    def lines(self) -> Iterator[str]:
        """Counts and lengths, one fact per line."""
        yield from self.facts()
        yield from self.losses()
        yield from self._histogram()

    def facts(self) -> Iterator[str]:
        for index, name in enumerate(self.files):
            schema = self.schemas.get(index)
            yield f"{name}: schema {schema_names([schema])}" if schema else f"{name}: no good row"
        yield f"rows: {self.rows:,}"
        for name, part in (("train", self.train), ("validation", self.validation)):
            yield f"{name}: {part.samples:,} samples, {part.tokens:,} tokens, {part.trained_tokens:,} trained"
        if self.longest[0]:
            yield f"longest sample: {self.longest[0]:,} tokens, {self.place(self.longest[1])}"

    def losses(self) -> Iterator[str]:
        """What was changed, left out, or should not be there."""
        told = {
            "bad rows passed over": self.bad_rows,
            f"samples cut to {self.max_length:,} tokens": self.truncated,
            f"samples split into pieces of {self.max_length:,} tokens": self.split,
            f"samples dropped, longer than {self.max_length:,} tokens": self.dropped,
            "samples passed over, nothing to train on": self.empty,
        }
        yield from (self._tally_line(what, tally) for what, tally in told.items() if tally.count)
        if self.duplicates:
            yield f"samples that repeat another: {self.duplicates:,} (kept)"
        if self.leaked:
            yield f"evaluation samples that are trained on, too: {self.leaked:,}"

    def _tally_line(self, what: str, tally: Tally) -> str:
        places = ", ".join(map(self.place, tally.examples))
        return f"{what}: {tally.count:,} ({places}{', ...' if tally.count > len(tally.examples) else ''})"

    def _histogram(self) -> Iterator[str]:
        most = max(self.lengths.values(), default=1)
        for bound in sorted(self.lengths):
            count = self.lengths[bound]
            yield f"up to {bound:>9,} tokens: {count:>9,} {'#' * max(1, count * _BAR // most)}"


class TooManyFaultsError(DataError):
    """More bad rows than are tolerated."""


class Faults:
    """What happens to a bad row: raised, skipped and counted up to a limit, or collected in the report."""

    def __init__(
        self, report: DataReport, limit: int = 0, *, skip: bool = False, collect: bool = False, earlier: int = 0
    ) -> None:
        """`earlier` is the number of bad rows that were counted in other reports of the same data."""
        self.report, self.limit, self.earlier = report, limit, earlier
        self.skip, self.collect = skip or collect, collect

    def bad(self, error: LlamaHomeError, place: Place) -> None:
        """Raises: the error itself if rows may not be skipped, TooManyFaultsError at the limit."""
        if not self.skip:
            raise error
        self._count(error, place)

    def refuse(self, error: LlamaHomeError, place: Place) -> None:
        """A fault that the settings do not let pass even where bad rows are skipped."""
        if not self.collect:
            raise error
        self._count(error, place)

    def _count(self, error: LlamaHomeError, place: Place) -> None:
        self.report.bad_rows.add(place)
        count = self.earlier + self.report.bad_rows.count
        if self.collect:
            self.report.faults.append(str(error))
        elif count <= _EXAMPLES:
            logger.warning("row passed over: %s", error)
        if count > self.limit:
            raise TooManyFaultsError(
                f"more than {self.limit:,} bad rows, the last: {error.what}",
                where=error.where,
                fix="mend the rows or raise data.max_bad_rows",
            )
