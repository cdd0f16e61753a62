"""Prepared folders: found among data paths, checked against what a run asks for, opened alone or several as one."""

from __future__ import annotations

import glob
import hashlib
import json
import logging
import os
from bisect import bisect_right
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import accumulate
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, Self, cast

from llamahome import _C
from llamahome.data.cache import Cache, Entry
from llamahome.data.own import is_dataset
from llamahome.data.recipe import Data, refuse_difference
from llamahome.data.report import DataReport
from llamahome.data.store import TokenStore
from llamahome.data.store_index import INDEX_NAME, read_index
from llamahome.errors import DataError
from llamahome.files import write_atomic

if TYPE_CHECKING:
    from llamahome.config import Config

logger = logging.getLogger(__name__)

REPORT, JOURNAL = "report.json", "journal"
TRAIN, VALIDATION = SPLITS = "train", "validation"
_FORMAT, _VERSION = "llamahome-prepared", 1
_MAX_BYTES = 1 << 30
_AGAIN = "prepare the data again"


@dataclass
class Prepared:
    """Token stores ready to read, and what was found. Close it to let the cache evict them."""

    train: TokenStore
    validation: TokenStore | None
    report: DataReport
    _entry: Entry
    evaluation: Prepared | None = None  # where `validation` was prepared apart

    def close(self) -> None:
        for store in (self.train, self.validation):
            if store is not None:
                store.close()
        if self.evaluation:
            self.evaluation.close()
        self._entry.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()


class JoinedStore(TokenStore):
    """The stores of several folders as one. `files[i][j]` is the number here of file j in the sources of folder i."""

    def __init__(self, folders: Sequence[Path], files: Sequence[Sequence[int]], mapped: bool = True) -> None:
        """Raises: DataError as `TokenStore.open`."""
        found = [read_index(folder) for folder in folders]
        shards = [
            shard | {"name": str(folder.absolute() / shard["name"])}
            for folder, (index, _) in zip(folders, found, strict=True)
            for shard in index["shards"]
        ]
        joined = {"vocab_size": max(index["vocab_size"] for index, _ in found), "meta": {}, "shards": shards}
        fingerprint = hashlib.sha256("".join(name for _, name in found).encode()).hexdigest()
        super().__init__(folders[0], joined, fingerprint, mapped)
        self._folders, self._files = tuple(folders), tuple(files)
        self._ends = list(accumulate(index["documents"] for index, _ in found))

    def source(self, document: int) -> int:
        locator = super().source(document)
        files = self._files[bisect_right(self._ends, document)]
        return files[locator >> 40] << 40 | locator & ((1 << 40) - 1)

    def __reduce__(self) -> tuple[Any, Any]:
        return JoinedStore, (self._folders, self._files, self._mapped)


def write_manifest(folder: Path, report: DataReport, facts: Mapping[str, Any]) -> None:
    """Write report.json, which makes a folder complete."""
    content = {"format": _FORMAT, "version": _VERSION, **facts, "report": report.to_dict()}
    write_atomic(folder / REPORT, _dump(content | {"crc32c": f"{_C.crc32c(_dump(content)):08x}"}))


def _dump(content: Mapping[str, Any]) -> bytes:
    return (json.dumps(content, indent=1) + "\n").encode()


def read_manifest(folder: Path) -> tuple[dict[str, Any], DataReport]:
    """The checked content of report.json. Raises: DataError."""
    path = folder / REPORT
    try:
        with path.open("rb") as file:
            # Python makes a buffer of what is asked for before it reads.
            text = file.read(min(_MAX_BYTES, os.fstat(file.fileno()).st_size))
    except (FileNotFoundError, NotADirectoryError):
        what, fix = "the folder holds no prepared data", "name a folder made by llamahome data prepare"
        if (folder / JOURNAL).exists():
            what, fix = "the preparation was not finished", "run the same command again, it goes on"
        raise DataError(what, where=str(folder), fix=fix) from None
    except OSError as error:
        raise DataError(f"cannot read: {error.strerror}", where=str(path), fix="check the disk") from None
    try:
        content = json.loads(text)
        unsigned = {name: value for name, value in content.items() if name != "crc32c"}
        sound = _dump(content) == text and f"{_C.crc32c(_dump(unsigned)):08x}" == content["crc32c"]
        if sound and (content["format"], content["version"]) == (_FORMAT, _VERSION):
            return content, DataReport.from_dict(content["report"])
    except (ValueError, RecursionError, KeyError, TypeError, AttributeError):
        pass
    where = f"{path}: bytes 0 to {len(text)}"
    raise DataError("the file was changed or damaged, or is of another version", where=where, fix=_AGAIN)


def find_prepared(data: Data) -> list[Path]:
    """The prepared folders behind paths and globs; none where these are data files. Raises: DataError for both."""
    if is_dataset(data):
        return []
    paths = [data] if isinstance(data, str | Path) else list(cast("Sequence[str | Path]", data))
    found = [(str(path), _prepared_below(str(path))) for path in paths]
    folders = [folder for _, below in found for folder in below]
    others = [path for path, below in found if not below]
    if folders and others:
        what = "prepared folders and data files at once"
        raise DataError(what, where=", ".join(others), fix="prepare the files, too")
    return folders


def _prepared_below(path: str) -> list[Path]:
    """The folder itself, those that match a glob, or those right below a folder."""
    place = Path(path).expanduser()
    try:
        if _looks_prepared(place):
            return [place]
        if place.is_dir():
            return [folder for folder in sorted(place.iterdir()) if _looks_prepared(folder)]
        matches = sorted(glob.iglob(str(place), recursive=True)) if glob.has_magic(path) else []  # noqa: PTH207
        return [Path(match) for match in matches if _looks_prepared(Path(match))]
    except OSError:
        return []  # the search for data files says what is wrong


def _looks_prepared(folder: Path) -> bool:
    if any((folder / name / INDEX_NAME).is_file() for name in SPLITS) or (folder / JOURNAL / "plan.json").is_file():
        return True
    try:
        with (folder / REPORT).open("rb") as file:
            return _FORMAT.encode() in file.read(64)
    except OSError:
        return False


def open_folder(folder: Path, entry: Entry | None = None) -> Prepared:
    """Open one prepared folder. Raises: DataError."""
    _, report = read_manifest(folder)
    stores = [
        # Mapped pages would count as memory of the run, which memory_limit bounds.
        TokenStore.open(folder / split, mapped=False) if part.samples else None
        for split, part in ((TRAIN, report.train), (VALIDATION, report.validation))
    ]
    if stores[0] is None:
        raise DataError("nothing to train on: the folder has no training sample", where=str(folder), fix=_AGAIN)
    return Prepared(stores[0], stores[1], report, entry or Entry(folder, lambda: None))


def open_prepared(folders: Sequence[Path], asked: Mapping[str, Any]) -> Prepared:
    """Open prepared folders as one, if they were made as a run with the identity `asked` would make them.

    Raises: DataError that names what differs, or which folder is there twice.
    """
    manifests = [read_manifest(folder) for folder in folders]
    for folder, (manifest, _) in zip(folders, manifests, strict=True):
        refuse_difference(manifest["identity"], asked, str(folder), split=manifest["contents"][-1] == ["0"])
    _check_parts(folders, [manifest for manifest, _ in manifests])
    if len(folders) == 1:
        return open_folder(folders[0])
    numbers: dict[str, int] = {}
    files = [[numbers.setdefault(name, len(numbers)) for name in report.files] for _, report in manifests]
    joined = DataReport(list(numbers), max_length=manifests[0][1].max_length)
    for (_, report), own in zip(manifests, files, strict=True):
        joined.merge(report, own)
    stores = []
    for split in SPLITS:
        there = [i for i, folder in enumerate(folders) if (folder / split).exists()]
        stores.append(JoinedStore([folders[i] / split for i in there], [files[i] for i in there]) if there else None)
    if stores[0] is None:
        raise DataError("nothing to train on: no folder has a training sample", where=str(folders[0]), fix=_AGAIN)
    return Prepared(stores[0], stores[1], joined, Entry(folders[0], lambda: None))


def _check_parts(folders: Sequence[Path], manifests: Sequence[Mapping[str, Any]]) -> None:
    """Refuse a part that is there twice, and say which are missing."""
    seen: dict[str, dict[int, Path]] = {}
    for folder, manifest in zip(folders, manifests, strict=True):
        (number, parts), data = manifest["part"], json.dumps([manifest["contents"], manifest["part"][1]])
        same = seen.setdefault(data, {})
        if number in same:
            what = f"part {number} of {parts} of the same data is there twice"
            raise DataError(what, where=f"{same[number]}, {folder}", fix="name it once")
        same[number] = folder
    for data, same in seen.items():
        parts = json.loads(data)[1]
        missing = [str(number) for number in range(1, parts + 1) if number not in same]
        if missing:
            logger.warning("of the %d parts of the data these are missing: %s", parts, ", ".join(missing))


def verify_all(
    folders: Iterable[Path], config: Config | None = None
) -> Iterator[tuple[Path, tuple[int, int] | DataError]]:
    """Verify folders, and with a configuration all entries of its cache: documents and bytes, or the fault of each."""
    for folder in folders:
        yield folder, _verified(folder)
    if config is not None:
        cache = Cache.from_config(config)
        for info in cache.entries():
            entry = cache.hold(info.key)
            if entry:  # else it was evicted a moment ago
                yield entry.path, _verified(entry.path)
                entry.close()


def _verified(folder: Path) -> tuple[int, int] | DataError:
    try:
        return verify_folder(folder)
    except DataError as error:
        return error


def verify_folder(folder: Path) -> tuple[int, int]:
    """Read and check every byte of a prepared folder or a token store; its documents and bytes.

    Raises: DataError with the file and the byte.
    """
    try:
        return _verify(folder)
    except OSError as error:
        where = str(error.filename or folder)
        raise DataError(f"cannot read: {error.strerror or error}", where=where, fix="check the disk") from None


def _verify(folder: Path) -> tuple[int, int]:
    if (folder / INDEX_NAME).is_file():
        return _verify_store(folder)
    _, report = read_manifest(folder)
    documents, size = 0, (folder / REPORT).stat().st_size
    for split, part in ((TRAIN, report.train), (VALIDATION, report.validation)):
        if part.samples:
            found, read = _verify_store(folder / split)
            if found != part.samples:
                what = f"{found:,} documents where the report counts {part.samples:,}"
                raise DataError(what, where=str(folder / split / INDEX_NAME), fix=_AGAIN)
            documents, size = documents + found, size + read
    return documents, size


def _verify_store(folder: Path) -> tuple[int, int]:
    with TokenStore.open(folder, mapped=False) as store:
        store.verify()
        return len(store), sum(path.stat().st_size for path in _files(folder))


def _files(folder: Path) -> Iterator[Path]:
    return (path for path in folder.iterdir() if path.is_file())
