"""What is prepared and how: everything that decides about the tokens, and a name for it."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

from llamahome.config import Config
from llamahome.data.formats import find_files
from llamahome.data.own import Dataset
from llamahome.data.report import DataReport
from llamahome.data.sources import Source
from llamahome.data.templates import Renderer
from llamahome.errors import DataError

logger = logging.getLogger(__name__)

Data = str | Path | Sequence[str | Path] | Dataset

FORMAT = 2  # raise it when the same input gives other tokens, or another folder
# Settings that change the tokens, or whether there are any.
_KEYED = ("max_length", "overflow", "on_bad_row", "max_bad_rows", "on_empty", "validation_split", "delimiter", "fields",
          "max_row_bytes", "train_on")  # fmt: skip
# Those of them that training must agree with; the others say how the files were read.
_COMPARED = ("max_length", "overflow", "train_on", "validation_split")


@dataclass(frozen=True)
class Recipe:
    """Sources, of which the last `held_out` are evaluation data; without a renderer they can only be checked."""

    sources: list[Source]
    held_out: int
    renderer: Renderer | None
    config: Config

    @classmethod
    def create(cls, data: Data, eval_data: Data | None, renderer: Renderer | None, config: Config) -> Self:
        """Raises: DataError for missing files, ConfigError."""
        eval_sources = find_files(eval_data, config.data) if eval_data else []
        return cls(find_files(data, config.data) + eval_sources, len(eval_sources), renderer, config)

    @property
    def share(self) -> float:
        """Share of the samples that the validation split takes."""
        return 0.0 if self.held_out else self.config.data.validation_split

    def identity(self) -> dict[str, Any]:
        """What decides about the tokens, the data apart."""
        assert self.renderer is not None
        return identity(self.renderer, self.config)

    def contents(self) -> list[list[str]]:
        """Digest, format and plugin of each source. Reads the files."""
        digests = [[item.digest, item.format, item.plugin.identity if item.plugin else ""] for item in self.sources]
        return [*digests, [str(self.held_out)]]

    def key(self) -> str:
        """A name that changes with anything that changes the tokens."""
        content = self.identity() | {"contents": self.contents()}
        return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:32]

    def new_report(self) -> DataReport:
        return DataReport([source.name for source in self.sources], max_length=self.config.data.max_length)


def identity(renderer: Renderer, config: Config) -> dict[str, Any]:
    """Tokenizer, template, settings and versions, as plain JSON."""
    template = renderer.template.identity if renderer.template else ""
    return {
        "format": FORMAT,
        "tokenizer": renderer.fingerprint,
        "template": hashlib.sha256(template.encode()).hexdigest(),
        "settings": {name: getattr(config.data, name) for name in _KEYED},
        "versions": {name: version(name) for name in ("tokenizers", "transformers")},
    }


def difference(made: Mapping[str, Any], asked: Mapping[str, Any], names: Sequence[str] = _KEYED) -> tuple[str, str]:
    """What differs between two identities, and what to do about it; empty texts if nothing does."""
    if made["template"] != asked["template"]:
        return "another chat template", "use the same model and data.template"
    if made["tokenizer"] != asked["tokenizer"]:
        return "another tokenizer", "use the same model"
    for name in names:
        had, has = made["settings"][name], asked["settings"][name]
        if had != has:
            return f"data.{name} {had}, not {has}", f"set data.{name} to {had}"
    return "", ""


def refuse_difference(made: Mapping[str, Any], asked: Mapping[str, Any], where: str, *, split: bool) -> None:
    """Raises: DataError if tokens made so cannot be trained as asked; `split` if a validation split was taken."""
    names = _COMPARED if split else _COMPARED[:-1]
    what, fix = difference(made, asked, names)
    if what:
        raise DataError(f"the data was prepared with {what}", where=where, fix=f"{fix}, or prepare the data again")
    if (made["format"], made["versions"]) != (asked["format"], asked["versions"]):
        logger.warning("%s: prepared with other versions of the libraries, which may give other tokens", where)


def check_trainable(report: DataReport, renderer: Renderer, vocab_size: int | None) -> None:
    """Raises: DataError if a model with this vocabulary cannot be trained on what the report counts."""
    if not report.train.trained_tokens:
        found = f"{report.rows:,} rows gave {report.train.samples:,} samples and no trained token"
        raise DataError(f"nothing to train on: {found}", where=report.title(), fix="see llamahome data check")
    largest, place = report.largest_id
    if vocab_size is not None and largest >= vocab_size:
        sizes = f"the tokenizer has {renderer.vocab_size:,} tokens, the model {vocab_size:,}"
        what = f"token id {largest} is outside the model's vocabulary: {sizes}"
        raise DataError(what, where=report.place(place), fix="use the tokenizer that belongs to the model")
