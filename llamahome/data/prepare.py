"""Data files to token stores, once per content: the cache is keyed by data, tokenizer, template and settings."""

from __future__ import annotations

import hashlib
import json
import logging
from array import array
from collections.abc import Iterator, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from hashlib import blake2b
from importlib.metadata import version
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

import numpy as np
import numpy.typing as npt

from llamahome.data.cache import Cache, Entry, folder_bytes, temporary_entry
from llamahome.data.formats import find_files
from llamahome.data.pipeline import Document, Pipeline
from llamahome.data.report import DataReport, Faults, TooManyFaultsError, pack_place
from llamahome.data.schemas import Sample
from llamahome.data.sources import Source
from llamahome.data.store import TokenStore, TokenStoreWriter
from llamahome.data.templates import Encoded, Renderer
from llamahome.errors import DataError
from llamahome.files import publish_folder, write_json

if TYPE_CHECKING:
    from llamahome.config import Config

logger = logging.getLogger(__name__)

Data = str | Path | Sequence[str | Path]

FORMAT = 1  # raise it when the same input gives other tokens
MAX_FAULTS = 1000
_TRAIN, _VALIDATION, _REPORT = "train", "validation", "report.json"
_PREVIEWS = 3
_WRITE_DOCUMENTS = 512
_MAX_HASHES = 1 << 25  # samples looked at for duplicates: 256 MB
# Settings that change the tokens, or whether there are any.
_KEYED = ("max_length", "overflow", "on_bad_row", "max_bad_rows", "on_empty", "validation_split", "delimiter", "fields",
          "max_row_bytes", "train_on")  # fmt: skip


@dataclass
class Prepared:
    """Token stores ready to read, and what was found. Close it to let the cache evict them."""

    train: TokenStore
    validation: TokenStore | None
    report: DataReport
    _entry: Entry

    def close(self) -> None:
        for store in (self.train, self.validation):
            if store:
                store.close()
        self._entry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


def prepare(
    data: Data,
    tokenizer: Any,
    *,
    config: Config | None = None,
    eval_data: Data | None = None,
    vocab_size: int | None = None,
    output: str | Path | None = None,
) -> Prepared:
    """Tokenise `data`, or take it from the cache, and open the stores.

    `data.validation_split` of the samples, chosen by their content, go to `validation`; with `eval_data` those are
    it instead. `vocab_size` is the model's. `output` is a folder to write to instead of the cache.
    Raises: DataError, ModelError (tokenizer, template), ConfigError, StorageError.
    """
    job = _Job.create(data, eval_data, tokenizer, config)
    prepared = _from_cache(job) if output is None else _in_folder(job, Path(output))
    try:
        job.check(prepared.report, vocab_size)
    except DataError:
        prepared.close()
        raise
    _tell(prepared.report)
    job.warn(prepared.report)
    return prepared


def check(
    data: Data,
    tokenizer: Any = None,
    *,
    config: Config | None = None,
    eval_data: Data | None = None,
    vocab_size: int | None = None,
) -> DataReport:
    """Read everything and write nothing: the report holds up to 1,000 faults, each with its place, and a preview.

    Without a tokenizer only formats and schemas are checked, and no tokens are counted.
    Raises: DataError for missing files, ModelError for an unusable tokenizer, ConfigError.
    """
    job = _Job.create(data, eval_data, tokenizer, config)
    report = job.new_report()
    faults = Faults(report, MAX_FAULTS - 1, collect=True)
    try:
        for split, document in job.documents(report, faults):
            report.count(split, document.encoded, document.place)
            if len(report.preview) < _PREVIEWS and tokenizer is not None:
                report.preview.append(show_trained(document.encoded, tokenizer))
        job.check(report, vocab_size)
    except TooManyFaultsError:
        report.faults.append(f"stopped after {MAX_FAULTS:,} faults")
    except DataError as error:
        report.faults.append(str(error))
    return report


def show_trained(encoded: Encoded, tokenizer: Any) -> str:
    """The text of a sample with what is trained in ⟦brackets⟧; control characters are shown, not sent."""
    edges = np.flatnonzero(np.diff(encoded.trained)) + 1
    pieces = []
    for ids, trained in zip(np.split(encoded.ids, edges), np.split(encoded.trained, edges), strict=True):
        text = tokenizer.decode(ids.tolist(), skip_special_tokens=False, clean_up_tokenization_spaces=False)
        pieces.append(f"⟦{text}⟧" if trained.any() else text)
    shown = "".join(pieces).replace("\n", "↵")
    return "".join(char if char.isprintable() else f"\\x{ord(char):02x}" for char in shown)


def is_held_out(sample: Sample, share: float) -> bool:
    """Whether a sample belongs to the validation split: a function of its content, so it never moves."""
    return _hash(sample) < share * 2**64


def _hash(sample: Sample) -> int:
    return int.from_bytes(blake2b(sample.canonical(), digest_size=8).digest(), "little")


def _from_cache(job: _Job) -> Prepared:
    cache, key = Cache.from_config(job.config), job.key()
    entry = cache.get(key, job.build)
    try:
        return job.open(entry)
    except (DataError, ValueError, KeyError, TypeError, OSError) as error:
        entry.close()
        logger.warning("the cached tokens are damaged and are made again: %s", error)
    # Another run may still read the damaged entry.
    return job.open(cache.get(key, job.build) if cache.discard(key) else temporary_entry(job.build))


def _in_folder(job: _Job, output: Path) -> Prepared:
    with publish_folder(output) as folder:
        job.build(folder)
    return job.open(Entry(output, lambda: None))


def _tell(report: DataReport) -> None:
    for line in report.facts():
        logger.info("%s", line)
    for line in report.losses():
        logger.warning("%s", line)


@dataclass(frozen=True)
class _Job:
    """What is to be prepared, and how."""

    sources: list[Source]
    eval_sources: list[Source]
    renderer: Renderer | None
    config: Config

    @classmethod
    def create(cls, data: Data, eval_data: Data | None, tokenizer: Any, config: Config | None) -> Self:
        if config is None:
            from llamahome.config import Config

            config = Config()
        sources = find_files(data, config.data)
        eval_sources = find_files(eval_data, config.data) if eval_data else []
        renderer = Renderer(tokenizer, config.data) if tokenizer is not None else None
        return cls(sources, eval_sources, renderer, config)

    def key(self) -> str:
        """A name that changes with anything that changes the tokens."""
        assert self.renderer is not None
        settings = {name: getattr(self.config.data, name) for name in _KEYED}
        content = {
            "format": FORMAT,
            "train": [_identity(source) for source in self.sources],
            "eval": [_identity(source) for source in self.eval_sources],
            "tokenizer": self.renderer.fingerprint,
            "settings": settings,
            "versions": [version("tokenizers"), version("transformers")],
        }
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def new_report(self) -> DataReport:
        names = [source.name for source in self.sources + self.eval_sources]
        return DataReport(names, max_length=self.config.data.max_length)

    def documents(self, report: DataReport, faults: Faults) -> Iterator[tuple[str, Document]]:
        """Documents with the split each goes to; what is met on the way is counted in `report`."""
        share = 0.0 if self.eval_sources else self.config.data.validation_split
        hashes = _Hashes()
        for document in Pipeline(self.sources, self.config, report, faults).documents(self.renderer):
            held_out = hashes.add(document.sample) < share * 2**64
            yield (_VALIDATION if held_out else _TRAIN), document
        known = hashes
        if self.eval_sources:
            hashes = _Hashes()
            pipeline = Pipeline(self.eval_sources, self.config, report, faults)
            for document in pipeline.documents(self.renderer, len(self.sources)):
                hashes.add(document.sample)
                yield _VALIDATION, document
            report.leaked = hashes.shared_with(known)
        report.duplicates = known.repeated()

    def build(self, folder: Path) -> None:
        """Fill an empty folder with the stores and the report. Raises: as `prepare`."""
        assert self.renderer is not None
        report = self.new_report()
        settings = self.config.data
        faults = Faults(report, settings.max_bad_rows, skip=settings.on_bad_row == "skip")
        logger.info("tokenising %s", report.title())
        with ExitStack() as stack:
            writers = {
                name: stack.enter_context(_Writer(folder / name, self.renderer.vocab_size))
                for name in (_TRAIN, _VALIDATION)
            }
            for split, document in self.documents(report, faults):
                report.count(split, document.encoded, document.place)
                writers[split].add(document)
            self.check(report, None)
            for writer in writers.values():
                writer.commit()
        write_json(folder / _REPORT, report.to_dict())

    def open(self, entry: Entry) -> Prepared:
        """The stores of a built folder; those that fit in cache.memory_size are read into memory and verified."""
        values = json.loads((entry.path / _REPORT).read_text(encoding="utf-8"))
        report = DataReport.from_dict(values)
        report.files = self.new_report().files  # the same content may have moved
        stores = {
            name: TokenStore.open(entry.path / name) if part.samples else None
            for name, part in ((_TRAIN, report.train), (_VALIDATION, report.validation))
        }
        if folder_bytes(entry.path) <= self.config.cache_memory_bytes:
            for store in filter(None, stores.values()):
                store.verify()
        train = stores[_TRAIN]
        assert train is not None
        return Prepared(train, stores[_VALIDATION], report, entry)

    def check(self, report: DataReport, vocab_size: int | None) -> None:
        """Raises: DataError if a model with this vocabulary cannot be trained on what the report counts."""
        if self.renderer is None:
            return
        if not report.train.trained_tokens:
            found = f"{report.rows:,} rows gave {report.train.samples:,} samples and no trained token"
            what = f"nothing to train on: {found}"
            raise DataError(what, where=report.title(), fix="see llamahome data check")
        largest, place = report.largest_id
        if vocab_size is not None and largest >= vocab_size:
            sizes = f"the tokenizer has {self.renderer.vocab_size:,} tokens, the model {vocab_size:,}"
            what = f"token id {largest} is outside the model's vocabulary: {sizes}"
            raise DataError(what, where=report.place(place), fix="use the tokenizer that belongs to the model")

    def warn(self, report: DataReport) -> None:
        """Say what is odd about the number of samples."""
        step = self.config.global_batch_size()
        if report.train.samples < step:
            what = "%d samples are fewer than a step takes (%d): each epoch is one smaller step"
            logger.warning(what, report.train.samples, step)
        if self.config.data.validation_split and not self.eval_sources and not report.validation.samples:
            logger.warning("no sample fell into the validation split, so nothing is evaluated: name evaluation data")


def _identity(source: Source) -> list[str]:
    return [source.digest, source.format, source.plugin.identity if source.plugin else ""]


class _Hashes:
    """Content hashes of samples, to count duplicates."""

    def __init__(self) -> None:
        self._hashes = array("Q")
        self._last: tuple[Sample | None, int] = (None, 0)

    def add(self, sample: Sample) -> int:
        """The hash of a sample; the pieces of one sample count once."""
        if sample is not self._last[0]:
            self._last = sample, _hash(sample)
            if len(self._hashes) < _MAX_HASHES:
                self._hashes.append(self._last[1])
        return self._last[1]

    def repeated(self) -> int:
        """Samples that are equal to an earlier one."""
        hashes = self._sorted()
        return int((hashes[1:] == hashes[:-1]).sum())

    def shared_with(self, other: _Hashes) -> int:
        """Samples that `other` has, too."""
        known, own = other._sorted(), self._sorted()
        places = np.searchsorted(known, own)
        return int((known[np.minimum(places, len(known) - 1)] == own).sum()) if len(known) else 0

    def _sorted(self) -> npt.NDArray[np.uint64]:
        hashes = np.asarray(self._hashes)  # shares the memory
        hashes.sort()
        return hashes


class _Writer:
    """A token store writer that takes documents one by one and hands them on in blocks."""

    def __init__(self, folder: Path, vocab_size: int) -> None:
        self._writer = TokenStoreWriter(folder, vocab_size)
        self._waiting: list[Document] = []
        self._count = 0

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._writer.abort()

    def add(self, document: Document) -> None:
        self._count += 1
        self._waiting.append(document)
        if len(self._waiting) >= _WRITE_DOCUMENTS:
            self._flush()

    def commit(self) -> None:
        """Publish the store; one without documents leaves nothing."""
        self._flush()
        if self._count:
            self._writer.commit().close()

    def _flush(self) -> None:
        waiting, self._waiting = self._waiting, []
        if waiting:
            ids = [document.encoded.ids for document in waiting]
            trained = np.concatenate([document.encoded.trained for document in waiting])
            places = [pack_place(document.place) for document in waiting]
            self._writer.append_many(np.concatenate(ids), trained, [len(part) for part in ids], places)
