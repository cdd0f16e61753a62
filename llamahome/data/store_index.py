"""The index of a token store, `store.json`: which files it has, and that they are the right ones."""

from __future__ import annotations

import errno
import hashlib
import json
import os
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from llamahome import _C
from llamahome.errors import DataError, StorageError

INDEX_NAME = "store.json"
_FORMAT = "llamahome-token-store"
_VERSION = 1
_INDEX_LIMIT = 64 << 20  # bytes; room for 300,000 shards
_SHARD_NAME = re.compile(r"shard-\d{5,9}\.tokens")
_AGAIN = "prepare the data again"


def shard_name(number: int) -> str:
    return f"shard-{number:05d}.tokens"


def dump_index(index: Mapping[str, Any]) -> bytes:
    """The bytes of store.json: totals, shards and a CRC-32C over the same text without its `crc32c` line."""
    totals = {key: sum(shard[key] for shard in index["shards"]) for key in ("documents", "tokens", "trained")}
    content = {"format": _FORMAT, "version": _VERSION, "vocab_size": index["vocab_size"], **totals}
    content |= {"meta": index["meta"], "shards": index["shards"]}
    return _dump(content | {"crc32c": f"{_C.crc32c(_dump(content)):08x}"})


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1, allow_nan=False) + "\n").encode()


def read_index(folder: Path) -> tuple[dict[str, Any], str]:
    """The checked content of store.json and its SHA-256."""
    path = folder / INDEX_NAME
    with _read_errors(path), path.open("rb") as file:
        text = file.read(_INDEX_LIMIT + 1)
    if len(text) > _INDEX_LIMIT:
        raise DataError(f"the index has more than {_INDEX_LIMIT} bytes", where=str(path), fix=_AGAIN)
    try:
        content = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise DataError(f"the index is not JSON: {error}", where=str(path), fix=_AGAIN) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise DataError("this is not the index of a token store", where=str(path), fix="name a folder made by prepare")
    if content.get("version") != _VERSION:
        raise DataError(f"version {content.get('version')} of the format is not known", where=str(path), fix=_AGAIN)
    _check_index(path, content, text)
    return content, hashlib.sha256(text).hexdigest()


def _check_index(path: Path, content: dict[str, Any], text: bytes) -> None:
    shards = content.get("shards")
    for shard in shards if isinstance(shards, list) else []:
        name = shard.get("name") if isinstance(shard, dict) else shard
        if not isinstance(name, str) or not _SHARD_NAME.fullmatch(name):
            raise DataError(
                f"the index names the file {name!r}, which is not a shard's name", where=str(path), fix=_AGAIN
            )
    try:
        sound = dump_index(content) == text and isinstance(content["meta"], dict)
    except (KeyError, TypeError, ValueError):
        sound = False
    if not sound:
        raise DataError("the index was changed or damaged: its checksum is wrong", where=str(path), fix=_AGAIN)


def open_shards(folder: Path, index: Mapping[str, Any], mapped: bool) -> _C.BatchReader:
    shards: Sequence[Mapping[str, Any]] = index["shards"]
    with _read_errors(folder):
        reader = _C.BatchReader([folder / shard["name"] for shard in shards], mapped)
    for shard, found in zip(shards, reader.shards(), strict=True):
        where = str(folder / shard["name"])
        documents, tokens, trained, _, largest, size, checksum = found
        if (documents, tokens, trained, size, f"{checksum:08x}") != tuple(
            shard[key] for key in ("documents", "tokens", "trained", "bytes", "crc32c")
        ):
            raise DataError("this is not the shard that the index names", where=where, fix=_AGAIN)
        if largest >= index["vocab_size"]:
            raise DataError(
                f"token id {largest} is outside the vocabulary of {index['vocab_size']}",
                where=where,
                fix="use the tokenizer that belongs to the model",
            )
    return reader


@contextmanager
def _read_errors(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        where = os.fsdecode(error.filename) if error.filename else str(path)
        match error.errno:
            case errno.EMFILE | errno.ENFILE:
                raise StorageError("too many open files", where=where, fix="raise `ulimit -n`") from error
            case errno.ENOENT | errno.ENOTDIR:
                raise DataError("there is no such file: no complete token store", where=where, fix=_AGAIN) from error
            case errno.ELOOP:
                raise DataError(
                    "a shard must not be a symbolic link", where=where, fix="copy the file itself"
                ) from error
        raise DataError(f"cannot read: {error.strerror or error}", where=where, fix="check the disk") from error
