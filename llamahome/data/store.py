"""The token store: a folder of checksummed token files and the index that names them (docs/token-store.md)."""

from __future__ import annotations

import fcntl
import os
import re
import shutil
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, Self

import numpy as np
from numpy.typing import ArrayLike, NDArray

from llamahome import _C
from llamahome.data.store_index import INDEX_NAME, dump_index, open_shards, read_index, shard_name
from llamahome.errors import DataError, StorageError
from llamahome.files import storage_errors, sync_folder

_INDEX_MEMORY = 64 << 20  # bytes of a shard's index that a writer holds before it begins the next shard
_CHUNK = 1 << 20  # ids at a time where all documents are asked for


class TokenStore:
    """Documents of token ids with trained marks, in a folder written by `TokenStoreWriter`.

    `len(store)` documents, numbered from 0. Every block of the files is checked against its checksum when it is first
    read: damage is a DataError that names file and byte, never wrong tokens. Thread-safe; pickles as its path.
    """

    def __init__(self, folder: Path, index: Mapping[str, Any], fingerprint: str, mapped: bool) -> None:
        """Use `TokenStore.open`."""
        self.folder = folder
        self.vocab_size: int = index["vocab_size"]
        self.meta: dict[str, Any] = index["meta"]
        self.fingerprint = fingerprint
        self._mapped = mapped
        self._reader: _C.BatchReader | None = open_shards(folder, index, mapped)

    @classmethod
    def open(cls, folder: str | os.PathLike[str], mapped: bool = True) -> TokenStore:
        """Open a store; costs the same for any number of documents.

        `mapped` reads through a memory map, the fastest. Without it every read is a pread: resident memory stays flat,
        and a failing disk or a file truncated by somebody else is an error even in the middle of a copy.
        Raises: DataError when the folder is no store, is incomplete or damaged.
        """
        path = Path(folder)
        index, fingerprint = read_index(path)
        return cls(path, index, fingerprint, mapped)

    @property
    def reader(self) -> _C.BatchReader:
        if self._reader is None:
            raise ValueError(f"the token store {self.folder} is closed")
        return self._reader

    def __len__(self) -> int:
        return self.reader.num_documents

    @property
    def num_tokens(self) -> int:
        return self.reader.num_tokens

    @property
    def num_trained(self) -> int:
        """Tokens that enter the loss; the first of a document never does."""
        return self.reader.num_trained

    def lengths(self, ids: ArrayLike | None = None) -> NDArray[np.uint32]:
        """Tokens of the documents `ids`, or of all."""
        out = np.empty(self._count(ids), np.uint32)
        for chunk, part in self._chunks(ids, out):
            self.reader.lengths(chunk, part)
        return out

    def trained_counts(self, ids: ArrayLike | None = None) -> NDArray[np.uint32]:
        """Trained tokens of the documents `ids`, or of all."""
        out = np.empty(self._count(ids), np.uint32)
        for chunk, part in self._chunks(ids, out):
            self.reader.trained_counts(chunk, part)
        return out

    def source(self, document: int) -> int:
        """The locator that was stored with the document: where its row came from."""
        out = np.empty(1, np.uint64)
        self.reader.sources(np.array([document], np.int64), out)
        return int(out[0])

    def document(self, document: int) -> tuple[NDArray[np.uint32], NDArray[np.bool_]]:
        """Token ids and trained marks of one document."""
        ids, labels, positions = np.empty((3, int(self.lengths([document])[0])), np.int64)
        self.pack([document], ids, labels, positions, np.empty(2, np.int32))
        return ids.astype(np.uint32), labels >= 0

    def pack(self, ids: ArrayLike, input_ids: Any, labels: Any, position_ids: Any, cu_seqlens: Any) -> int:
        """Lay the documents `ids` end to end in the caller's buffers; returns the number of trained tokens.

        input_ids, labels, position_ids: int64 [tokens of the documents]; cu_seqlens: int32 [documents + 1]; contiguous
        numpy arrays or CPU tensors. Labels are not shifted; -100 marks what is not trained and every first token.
        Raises: DataError (damage), IndexError (no such document), TypeError and ValueError (wrong buffers).
        """
        return self.reader.pack(_indices(ids), *map(_array, (input_ids, labels, position_ids, cu_seqlens)))

    def num_rows(self, width: int) -> int:
        """Rows of `width` tokens that hold the stream of all tokens; the last may be filled up."""
        return -(-self.num_tokens // width)

    def rows(self, rows: ArrayLike, input_ids: Any, labels: Any) -> int:
        """Fixed-width rows of the stream of all documents; returns the number of trained tokens.

        input_ids, labels: int64 [rows, width]. Row r begins at token r * width, so documents are cut where rows end.
        The first label of a row and of a document is -100; past the end of the stream ids are 0 and labels -100.
        Raises: as `pack`.
        """
        return self.reader.rows(_indices(rows), _array(input_ids), _array(labels))

    def prefetch(self, ids: ArrayLike) -> None:
        """Begin to read documents from the disk in the background. A hint; does nothing if they are in memory."""
        self.reader.prefetch(_indices(ids))

    def prefetch_rows(self, rows: ArrayLike, width: int) -> None:
        """The same for rows of `width` tokens."""
        self.reader.prefetch_rows(_indices(rows), width)

    def verify(self) -> None:
        """Check every byte of every file. Raises: DataError with the file and the byte."""
        for shard in range(len(self.reader.shards())):  # one by one: Ctrl-C is heard between them
            self.reader.verify(shard)

    def close(self) -> None:
        self._reader = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def __reduce__(self) -> tuple[Any, tuple[str, bool]]:
        return TokenStore.open, (str(self.folder), self._mapped)

    def _count(self, ids: ArrayLike | None) -> int:
        return len(self) if ids is None else len(np.atleast_1d(np.asarray(ids)))

    def _chunks(
        self, ids: ArrayLike | None, out: NDArray[np.uint32]
    ) -> Iterator[tuple[NDArray[np.int64], NDArray[np.uint32]]]:
        if ids is not None:
            yield _indices(ids), out
            return
        for begin in range(0, len(out), _CHUNK):
            part = out[begin : begin + _CHUNK]
            yield np.arange(begin, begin + len(part), dtype=np.int64), part


class TokenStoreWriter:
    """Writes a token store, streaming, in bounded memory; `commit` publishes it whole, otherwise nothing is seen.

    Files are written to the hidden folder `.NAME.tmp-PID` beside `folder`. A new writer for the same name removes what
    dead ones left. Use as a context manager: leaving it without a commit deletes everything.
    """

    def __init__(
        self,
        folder: str | os.PathLike[str],
        vocab_size: int,
        meta: Mapping[str, Any] | None = None,
        *,
        shard_bytes: int = 1 << 30,
    ) -> None:
        """`meta` is any JSON and is kept with the store. Raises: StorageError when nothing can be written there."""
        if not 1 <= vocab_size <= 1 << 32:
            raise ValueError(f"vocab_size {vocab_size} is not in 1 to 2^32")
        self.folder = Path(folder)
        self._index: dict[str, Any] = {"vocab_size": vocab_size, "meta": dict(meta or {}), "shards": []}
        self._vocab_size = vocab_size
        self._width = 2 if vocab_size <= 1 << 16 else 4
        self._shard: _C.TokenFileWriter | None = None
        self._limits = np.array([shard_bytes, _INDEX_MEMORY])
        self._used = np.zeros(2, np.int64)  # bytes of the open shard: all, and those of its index
        self._documents = 0
        with storage_errors(self.folder):
            self.folder.parent.mkdir(parents=True, exist_ok=True)
            if self.folder.exists() and (not self.folder.is_dir() or any(self.folder.iterdir())):
                raise StorageError("there is something already", where=str(self.folder), fix="choose another folder")
            self._temporary, lock = _make_temporary(self.folder)
        self._lock: int | None = lock

    def append(self, ids: ArrayLike, trained: ArrayLike, source: int = 0) -> None:
        """Add one document: ids, trained marks of equal length (the first is taken as False), and a uint64 locator."""
        self.append_many(ids, trained, [np.size(ids)], [source])

    def append_many(self, ids: ArrayLike, trained: ArrayLike, lengths: ArrayLike, sources: ArrayLike) -> None:
        """Add documents that lie end to end: document i has the next lengths[i] of `ids` and of the bools `trained`.

        Raises: DataError (a token id outside the vocabulary, an empty document), StorageError, ValueError (sizes).
        """
        if self._lock is None:
            raise ValueError("the writer is closed")
        tokens, sizes = self._checked(ids, lengths)
        marks, origins = np.ascontiguousarray(trained, np.bool_), np.ascontiguousarray(sources, np.uint64)
        if len(marks) != len(tokens) or len(origins) != len(sizes) or int(sizes.sum()) != len(tokens):
            raise ValueError("ids, trained, lengths and sources do not fit each other")
        ends = np.cumsum(sizes)
        costs = np.cumsum(_costs(marks, sizes, ends, self._width), axis=0)
        first = token = 0
        while first < len(sizes):
            before = costs[first - 1] if first else np.zeros(2, np.int64)
            limits = before + self._limits - self._used
            last = min(int(np.searchsorted(costs[:, i], limits[i], side="right")) for i in range(2))
            if last == first and self._shard is not None:
                self._finish_shard()
                continue
            last = max(last, first + 1)
            end = int(ends[last - 1])
            with storage_errors(self.folder):
                self._open_shard().append(tokens[token:end], marks[token:end], sizes[first:last], origins[first:last])
            self._used += costs[last - 1] - before
            self._documents += last - first
            first, token = last, end

    def commit(self) -> TokenStore:
        """Make everything durable, give the folder its name, and open it. Raises: StorageError."""
        if self._lock is None:
            raise ValueError("the writer is closed")
        self._finish_shard()
        with storage_errors(self.folder):
            with (self._temporary / INDEX_NAME).open("xb") as file:
                file.write(dump_index(self._index))
                file.flush()
                os.fsync(file.fileno())
            sync_folder(self._temporary)
            self._temporary.rename(self.folder)
            sync_folder(self.folder.parent)
        os.close(self._lock)
        self._lock = None
        return TokenStore.open(self.folder)

    def abort(self) -> None:
        """Delete what was written. Does nothing after a commit."""
        self._shard = None
        if self._lock is not None:
            shutil.rmtree(self._temporary, ignore_errors=True)
            os.close(self._lock)
            self._lock = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.abort()

    def _checked(self, ids: ArrayLike, lengths: ArrayLike) -> tuple[NDArray[np.uint32], NDArray[np.int64]]:
        tokens, sizes = np.atleast_1d(np.asarray(ids)), _indices(lengths)
        if len(sizes) and sizes.min() < 1:
            raise DataError("a document has no tokens", where=f"document {self._documents + int(sizes.argmin())}")
        if tokens.dtype.kind not in "iu" and tokens.size:
            raise TypeError(f"token ids are {tokens.dtype}, not integers")
        if tokens.size and not (tokens.min() >= 0 and tokens.max() < self._vocab_size):
            bad = int(np.flatnonzero((tokens < 0) | (tokens >= self._vocab_size))[0])
            document = self._documents + int(np.searchsorted(np.cumsum(sizes), bad, side="right"))
            raise DataError(
                f"token id {tokens[bad]} is outside the vocabulary of {self._vocab_size}",
                where=f"document {document}",
                fix="use the tokenizer that belongs to the model",
            )
        return np.ascontiguousarray(tokens, np.uint32), sizes

    def _open_shard(self) -> _C.TokenFileWriter:
        if self._shard is None:
            name = shard_name(len(self._index["shards"]))
            self._shard = _C.TokenFileWriter(self._temporary / name, self._width)
        return self._shard

    def _finish_shard(self) -> None:
        shard, self._shard = self._shard, None
        self._used[:] = 0
        if shard is None:
            return
        with storage_errors(self.folder):
            checksum = shard.finish()
        self._index["shards"].append(
            {
                "name": shard_name(len(self._index["shards"])),
                "bytes": shard.file_size,
                "documents": shard.num_documents,
                "tokens": shard.num_tokens,
                "trained": shard.num_trained,
                "crc32c": f"{checksum:08x}",
            }
        )


def _costs(
    marks: NDArray[np.bool_], sizes: NDArray[np.int64], ends: NDArray[np.int64], width: int
) -> NDArray[np.int64]:
    """Bytes of each document in a file: all, and those of its record and runs. Alone they decide where a shard ends."""
    if not len(sizes):
        return np.zeros((0, 2), np.int64)
    begins = ends - sizes
    rises = marks.copy()
    rises[begins] = False
    rises[1:] &= ~rises[:-1]  # True where a run begins
    index = 32 + 8 * np.add.reduceat(rises, begins, dtype=np.int64)
    return np.stack([index + sizes * width, index], axis=1)


def _make_temporary(folder: Path) -> tuple[Path, int]:
    """A new hidden folder beside `folder`, and its lock: a lock ends with its process, whatever killed that."""
    for left in folder.parent.glob(f".{_escape(folder.name)}.tmp-*"):
        with suppress(OSError):
            lock = _lock_folder(left)
            try:
                shutil.rmtree(left, ignore_errors=True)
            finally:
                os.close(lock)
    while True:
        temporary = folder.parent / f".{folder.name}.tmp-{os.getpid()}"
        try:
            temporary.mkdir()
            lock = _lock_folder(temporary)
        except FileExistsError:
            raise StorageError("this process is writing there already", where=str(folder)) from None
        except (BlockingIOError, FileNotFoundError):  # another writer takes it for abandoned
            continue
        if temporary.exists() and os.fstat(lock).st_ino == temporary.stat().st_ino:
            return temporary, lock
        os.close(lock)


def _lock_folder(folder: Path) -> int:
    descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        os.close(descriptor)
        raise
    return descriptor


def _escape(name: str) -> str:
    return re.sub(r"([*?[])", r"[\1]", name)


def _array(buffer: Any) -> Any:
    """A CPU tensor as an array: a fifth of a batch's time less than by DLPack."""
    return buffer.numpy() if hasattr(buffer, "numpy") else buffer


def _indices(ids: ArrayLike) -> NDArray[np.int64]:
    """Ids as the reader takes them; what is not an integer is refused, never rounded."""
    if isinstance(ids, np.ndarray) and ids.dtype == np.int64 and ids.ndim == 1:
        return np.ascontiguousarray(ids)
    array = np.atleast_1d(np.asarray(ids))
    if array.dtype.kind not in "iu" and array.size:
        raise TypeError(f"ids are {array.dtype}, not integers")
    return np.ascontiguousarray(array, np.int64)
