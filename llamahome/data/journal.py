"""A prepared folder is filled unit by unit, so that a killed preparation goes on and ends with the same bytes.

    FOLDER/train/, FOLDER/validation/   token stores
    FOLDER/report.json                  what was found and what it was made from; written last: then all is complete
    FOLDER/journal/                     until then: plan.json, and the facts and content hashes of each finished unit

The documents of a unit become shards of their own, numbered by the unit, which get their final names before the unit
enters the journal. A unit that is not in the journal is done again and writes the same files.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import astuple
from pathlib import Path
from typing import Any

import numpy as np

from llamahome.data.formats import Piece
from llamahome.data.hashes import HashWriter, count_repeated, count_shared
from llamahome.data.pipeline import Document, Pipeline
from llamahome.data.prepared import JOURNAL, REPORT, SPLITS, TRAIN, VALIDATION, read_manifest, write_manifest
from llamahome.data.progress import Progress, Show
from llamahome.data.recipe import Recipe, check_trainable, difference
from llamahome.data.report import DataReport, Faults, pack_place
from llamahome.data.store import TokenStoreWriter
from llamahome.data.store_index import INDEX_NAME, dump_index, read_index, shard_name
from llamahome.data.units import Unit, cut
from llamahome.errors import DataError, StorageError
from llamahome.files import remove_leftovers, storage_errors, sync_folder, write_atomic, write_json

logger = logging.getLogger(__name__)

Part = tuple[int, int]  # number from 1, and how many there are

_PLAN = "plan.json"
_SHARDS_PER_UNIT = 1000
_WRITE_DOCUMENTS = 512
_OTHER = "choose another folder, or delete this one"


def fill(folder: Path, recipe: Recipe, part: Part, show: Show) -> None:
    """Bring a folder to its end: begin it, go on with it, or find it complete.

    Raises: DataError (rows, or another preparation is there), StorageError (other files, another process).
    """
    with storage_errors(folder), _alone(folder):
        if (folder / REPORT).exists():
            manifest, _ = read_manifest(folder)
            _refuse_other(folder, manifest, recipe, part)
            if manifest["contents"] != recipe.contents():
                raise _other(folder, "other data")
            logger.info("%s: prepared already", folder)
        else:
            _Filling(folder, recipe, part).run(show)
        shutil.rmtree(folder / JOURNAL, ignore_errors=True)


class _Filling:
    def __init__(self, folder: Path, recipe: Recipe, part: Part) -> None:
        self.folder, self.recipe, self.part = folder, recipe, part
        self.journal = folder / JOURNAL
        number, parts = part
        self.units = {i: unit for i, unit in enumerate(self._plan()) if i % parts == number - 1}

    def run(self, show: Show) -> None:
        for place in (self.folder, self.journal, *(self.folder / split for split in SPLITS)):
            remove_leftovers(place, locked=True)
        found = {number: self._read(number) for number in self.units}
        facts = {number: known for number, known in found.items() if known is not None}
        done = sum(self.units[number].size for number in facts)
        progress = Progress(sum(unit.size for unit in self.units.values()), done, done)
        if facts:
            logger.info("%s: going on where it was stopped, %.0f%% done", self.folder, 100 * progress.share)
        for number in sorted(self.units.keys() - facts.keys()):
            bad_rows = sum(known["report"]["bad_rows"]["count"] for known in facts.values())
            facts[number] = self._prepare(number, bad_rows, progress, show)
        self._compose([facts[number] for number in self.units])

    def _plan(self) -> list[Unit]:
        """The units, from the journal if there is one: then the data must be the same."""
        path = self.journal / _PLAN
        stamps = [list(source.stamp) for source in self.recipe.sources]
        if path.exists():
            plan = _read_json(path)
            _refuse_other(self.folder, plan, self.recipe, self.part)
            same_files = plan["stamps"] == stamps and all(source.path for source in self.recipe.sources)
            if not same_files and plan["contents"] != self.recipe.contents():
                raise _other(self.folder, "other data")
            return [Unit(tuple((i, Piece(*rest)) for i, *rest in pieces), out) for pieces, out in plan["units"]]
        if any(path.name != JOURNAL for path in self.folder.iterdir()):
            raise StorageError("there is something already", where=str(self.folder), fix="choose another folder")
        units = cut(self.recipe.sources, self.recipe.config.data, self.part[1], self.recipe.held_out)
        self.journal.mkdir(exist_ok=True)
        sync_folder(self.folder)
        plan = {
            "identity": self.recipe.identity(),
            "part": self.part,
            "contents": self.recipe.contents(),
            "stamps": stamps,
            "units": [([(i, *astuple(piece)) for i, piece in unit.pieces], unit.held_out) for unit in units],
        }
        write_atomic(path, json.dumps(plan))
        return units

    def _entry(self, number: int) -> Path:
        return self.journal / f"unit-{number:06d}.json"

    def _hashes(self, number: int) -> Path:
        return self._entry(number).with_suffix(".hashes")

    def _read(self, number: int) -> dict[str, Any] | None:
        """What the journal says about a unit; None if it has to be done (again)."""
        if not self._entry(number).exists() or not self._hashes(number).exists():
            return None
        facts: dict[str, Any] = _read_json(self._entry(number))
        for split in SPLITS:
            for shard in facts[split]:
                path = self.folder / split / shard["name"]
                if not path.is_file() or path.stat().st_size != shard["bytes"]:
                    return None
        return facts

    def _prepare(self, number: int, bad_rows: int, progress: Progress, show: Show) -> dict[str, Any]:
        """Tokenise a unit, publish its shards and enter it in the journal."""
        recipe, unit = self.recipe, self.units[number]
        assert recipe.renderer is not None
        report, settings = recipe.new_report(), recipe.config.data
        faults = Faults(report, settings.max_bad_rows, skip=settings.on_bad_row == "skip", earlier=bad_rows)
        before = progress.done_bytes, progress.rows, progress.tokens
        limit = recipe.share * 2**64
        with ExitStack() as stack:
            writers = {}
            for split in SPLITS:
                shutil.rmtree(self.journal / split, ignore_errors=True)
                writer = TokenStoreWriter(self.journal / split, recipe.renderer.vocab_size)
                writers[split] = _Blocks(split, stack.enter_context(writer), report)
            file = stack.enter_context(self._hashes(number).open("wb"))
            hashes = HashWriter(file)
            documents = Pipeline(recipe.sources, recipe.config, report, faults).documents(recipe.renderer, unit.pieces)
            for count, document in enumerate(documents, start=1):
                held_out = hashes.add(document.sample) < limit or unit.held_out
                writers[VALIDATION if held_out else TRAIN].add(document)
                if count % _WRITE_DOCUMENTS == 0:
                    _advance(progress, before, report, _done(unit, document.place))
                    show(progress)
            hashes.flush()
            os.fsync(file.fileno())
            shards = {split: self._publish(number, split, writer) for split, writer in writers.items()}
        _advance(progress, before, report, unit.size)
        show(progress)
        facts = {"report": report.to_dict(), **shards}
        write_json(self._entry(number), facts)
        return facts

    def _publish(self, number: int, split: str, blocks: _Blocks) -> list[dict[str, Any]]:
        """Give the shards of a unit their final names; returns their entries in the index."""
        if not blocks.commit():
            return []
        made, home = self.journal / split, self.folder / split
        index, _ = read_index(made)
        home.mkdir(exist_ok=True)
        for place, shard in enumerate(index["shards"]):
            name = shard_name(number * _SHARDS_PER_UNIT + place)
            (made / shard["name"]).rename(home / name)
            shard["name"] = name
        sync_folder(home)
        return list(index["shards"])

    def _compose(self, facts: Sequence[dict[str, Any]]) -> None:
        """Make one store of the units' shards, and write the report."""
        recipe = self.recipe
        assert recipe.renderer is not None
        report = recipe.new_report()
        for found in facts:
            report.merge(DataReport.from_dict(found["report"]), range(len(report.files)))
        trained = [self._hashes(number) for number, unit in self.units.items() if not unit.held_out]
        held_out = [self._hashes(number) for number, unit in self.units.items() if unit.held_out]
        report.duplicates, report.leaked = count_repeated(trained), count_shared(held_out, trained)
        if self.part[1] == 1:
            check_trainable(report, recipe.renderer, None)
        identity = recipe.identity()
        made_with = {name: identity[name] for name in ("tokenizer", "settings")}
        for split in SPLITS:
            shards = [shard for found in facts for shard in found[split]]
            if shards:
                index = {"vocab_size": recipe.renderer.vocab_size, "meta": made_with, "shards": shards}
                write_atomic(self.folder / split / INDEX_NAME, dump_index(index))
        contents = _read_json(self.journal / _PLAN)["contents"]
        write_manifest(self.folder, report, {"part": self.part, "identity": identity, "contents": contents})


class _Blocks:
    """Hands documents on to a token store writer and to the report in blocks."""

    def __init__(self, split: str, writer: TokenStoreWriter, report: DataReport) -> None:
        self._split, self._writer, self._report = split, writer, report
        self._waiting: list[Document] = []
        self._count = 0

    def add(self, document: Document) -> None:
        self._waiting.append(document)
        if len(self._waiting) == _WRITE_DOCUMENTS:
            self._flush()

    def commit(self) -> bool:
        """Finish the store; whether it has any documents."""
        if self._waiting:
            self._flush()
        if self._count:
            self._writer.commit().close()
        return bool(self._count)

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        self._count += len(waiting)
        ids = np.concatenate([document.encoded.ids for document in waiting])
        trained = np.concatenate([document.encoded.trained for document in waiting])
        lengths = [len(document.encoded.ids) for document in waiting]
        places = [document.place for document in waiting]
        self._report.count(self._split, ids, trained, lengths, places)
        self._writer.append_many(ids, trained, lengths, list(map(pack_place, places)))


def _done(unit: Unit, place: tuple[int, int]) -> float:
    """Bytes of a unit up to a place, as far as its pieces tell."""
    done = 0.0
    for index, piece in unit.pieces:
        if index == place[0] and (piece.end is None or place[1] < piece.line + piece.lines):
            return done + (piece.size * (place[1] - piece.line) / piece.lines if piece.lines else 0.0)
        done += piece.size
    return done


def _advance(progress: Progress, before: tuple[float, int, int], report: DataReport, done: float) -> None:
    bytes_before, rows, tokens = before
    progress.done_bytes = bytes_before + done
    progress.rows = rows + report.rows
    progress.tokens = tokens + report.train.tokens + report.validation.tokens


@contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Hold a folder against other processes; the lock ends with this one, however it ends."""
    folder.mkdir(parents=True, exist_ok=True)
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StorageError("another process prepares data there", where=str(folder), fix="wait for it") from None
        yield
    finally:
        os.close(descriptor)


def _refuse_other(folder: Path, found: dict[str, Any], recipe: Recipe, part: Part) -> None:
    what, _ = difference(found["identity"], recipe.identity())
    if tuple(found["part"]) != part:
        what = "part {} of {}".format(*found["part"])
    elif not what and found["identity"] != recipe.identity():
        what = "other versions of the libraries"
    if what:
        raise _other(folder, what)


def _other(folder: Path, what: str) -> DataError:
    return DataError(f"the folder holds another preparation, with {what}", where=str(folder), fix=_OTHER)


def _read_json(path: Path) -> Any:
    try:
        return json.loads(path.read_bytes())
    except ValueError as error:
        raise DataError(f"the journal is damaged: {error}", where=str(path), fix=_OTHER) from None
