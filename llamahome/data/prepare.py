"""Data files to token stores: in a folder of one's own, or once per content in the cache."""

from __future__ import annotations

import logging
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from llamahome.data.cache import Cache, Entry, folder_bytes, temporary_entry
from llamahome.data.encoding import Encoded
from llamahome.data.formats import WHOLE
from llamahome.data.hashes import HashWriter, count_repeated, count_shared, hash_sample
from llamahome.data.interrupt import stop_at_once
from llamahome.data.journal import Part, fill
from llamahome.data.pipeline import Pipeline
from llamahome.data.prepared import (
    SPLITS,
    TRAIN,
    VALIDATION,
    Prepared,
    find_prepared,
    open_folder,
    open_prepared,
    read_manifest,
)
from llamahome.data.progress import Show, log_progress
from llamahome.data.recipe import Data, Recipe, check_trainable, identity
from llamahome.data.report import DataReport, Faults, TooManyFaultsError
from llamahome.data.schemas import Sample
from llamahome.data.templates import Renderer
from llamahome.errors import DataError

if TYPE_CHECKING:
    from llamahome.config import Config

__all__ = ["Data", "Prepared", "check", "is_held_out", "prepare", "prepare_folder", "show_trained"]

logger = logging.getLogger(__name__)

MAX_FAULTS = 1000
_PREVIEWS = 3


def prepare(
    data: Data,
    tokenizer: Any,
    *,
    config: Config | None = None,
    eval_data: Data | None = None,
    vocab_size: int | None = None,
    output: str | Path | None = None,
) -> Prepared:
    """Tokenise `data`, or take it from the cache or from folders that were prepared before, and open the stores.

    `data.validation_split` of the samples, chosen by their content, go to `validation`; with `eval_data` those are
    it instead. `vocab_size` is the model's. `output` is a folder to fill instead of the cache.
    Raises: DataError, ModelError (tokenizer, template), ConfigError, StorageError; Interrupted by a signal whose
    handler would wait for the end of a step.
    """
    config = config or _defaults()
    renderer = Renderer(tokenizer, config.data)
    with stop_at_once():
        if output is not None:
            fill(Path(output), Recipe.create(data, eval_data, renderer, config), (1, 1), log_progress())
            prepared = open_folder(Path(output))
        elif folders := find_prepared(data):
            prepared = open_prepared(folders, identity(renderer, config))
            if eval_data:
                _replace_validation(prepared, eval_data, tokenizer, config)
        else:
            prepared = _from_cache(Recipe.create(data, eval_data, renderer, config))
    try:
        check_trainable(prepared.report, renderer, vocab_size)
    except DataError:
        prepared.close()
        raise
    _tell(prepared.report)
    _warn(prepared.report, config, bool(eval_data))
    return prepared


def prepare_folder(
    data: Data,
    tokenizer: Any,
    output: str | Path,
    *,
    config: Config | None = None,
    eval_data: Data | None = None,
    part: Part = (1, 1),
    show: Show | None = None,
) -> DataReport:
    """Tokenise `data` into the folder `output`, which `prepare` and training take as their data afterwards.

    Called again after a kill it goes on, and the folder ends with the same bytes. `part` (i, n) prepares the i-th of
    n parts, which have no sample in common and are everything together. `show` is called with the progress now and
    then. Peak memory does not depend on the size of the data: docs/data.md. Raises: as `prepare`.
    """
    config = config or _defaults()
    recipe = Recipe.create(data, eval_data, Renderer(tokenizer, config.data), config)
    fill(Path(output), recipe, part, show or log_progress())
    _, report = read_manifest(Path(output))
    return report


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
    config = config or _defaults()
    if folders := find_prepared(data):
        raise DataError("the data is prepared already", where=str(folders[0]), fix="use llamahome data verify")
    renderer = Renderer(tokenizer, config.data) if tokenizer is not None else None
    recipe = Recipe.create(data, eval_data, renderer, config)
    report = recipe.new_report()
    try:
        _check_documents(recipe, report, tokenizer)
        if renderer is not None:
            check_trainable(report, renderer, vocab_size)
    except TooManyFaultsError:
        report.faults.append(f"stopped after {MAX_FAULTS:,} faults")
    except DataError as error:
        report.faults.append(str(error))
    return report


def _check_documents(recipe: Recipe, report: DataReport, tokenizer: Any) -> None:
    pipeline = Pipeline(recipe.sources, recipe.config, report, Faults(report, MAX_FAULTS - 1, collect=True))
    first_held_out = len(recipe.sources) - recipe.held_out
    limit = recipe.share * 2**64
    with tempfile.TemporaryDirectory(prefix="llamahome-") as name:
        files = [Path(name, split) for split in SPLITS]
        with files[0].open("wb") as train, files[1].open("wb") as validation:
            hashes = HashWriter(train), HashWriter(validation)
            for document in pipeline.documents(recipe.renderer, ((i, WHOLE) for i in range(len(recipe.sources)))):
                held_out = document.place[0] >= first_held_out
                in_split = hashes[held_out].add(document.sample) < limit
                encoded = document.encoded
                split = VALIDATION if held_out or in_split else TRAIN
                report.count(split, encoded.ids, encoded.trained, [len(encoded.ids)], [document.place])
                if len(report.preview) < _PREVIEWS and tokenizer is not None:
                    report.preview.append(show_trained(encoded, tokenizer))
            for writer in hashes:
                writer.flush()
        report.duplicates, report.leaked = count_repeated(files[:1]), count_shared(files[1:], files[:1])


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
    return hash_sample(sample) < share * 2**64


def _defaults() -> Config:
    from llamahome.config import Config

    return Config()


def _from_cache(recipe: Recipe) -> Prepared:
    cache, key = Cache.from_config(recipe.config), recipe.key()

    def build(folder: Path) -> None:
        logger.info("tokenising %s", recipe.new_report().title())
        fill(folder, recipe, (1, 1), log_progress())

    entry = cache.get(key, build)
    try:
        return _open_entry(entry, recipe)
    except (DataError, OSError) as error:
        entry.close()
        logger.warning("the cached tokens are damaged and are made again: %s", error)
    # Another run may still read the damaged entry.
    return _open_entry(cache.get(key, build) if cache.discard(key) else temporary_entry(build), recipe)


def _open_entry(entry: Entry, recipe: Recipe) -> Prepared:
    """What the cache holds; stores that fit in cache.memory_size are read into memory and verified."""
    prepared = open_folder(entry.path, entry)
    prepared.report.files = recipe.new_report().files  # the same content may have moved
    if folder_bytes(entry.path) <= recipe.config.cache_memory_bytes:
        prepared.train.verify()
        if prepared.validation is not None:
            prepared.validation.verify()
    return prepared


def _replace_validation(prepared: Prepared, eval_data: Data, tokenizer: Any, config: Config) -> None:
    """Evaluate on other data than what was held out when the folder was prepared."""
    whole = config.with_values({"data.validation_split": 0.0})
    if prepared.validation is not None:
        prepared.validation.close()
    prepared.evaluation = prepare(eval_data, tokenizer, config=whole)
    prepared.validation, prepared.report.validation = prepared.evaluation.train, prepared.evaluation.report.train


def _tell(report: DataReport) -> None:
    for line in report.facts():
        logger.info("%s", line)
    for line in report.losses():
        logger.warning("%s", line)


def _warn(report: DataReport, config: Config, named: bool) -> None:
    """Say what is odd about the number of samples; `named` if there is evaluation data."""
    step = config.global_batch_size()
    if report.train.samples < step:
        what = "%d samples are fewer than a step takes (%d): each epoch is one smaller step"
        logger.warning(what, report.train.samples, step)
    if config.data.validation_split and not named and not report.validation.samples:
        logger.warning("no sample fell into the validation split, so nothing is evaluated: name evaluation data")
