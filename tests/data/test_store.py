"""The store keeps what it was given, whole or not at all, and says what is wrong with it."""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome import _C
from llamahome.data.store import TokenStore, TokenStoreWriter
from llamahome.errors import DataError, StorageError

Documents = list[tuple[np.ndarray, np.ndarray]]


def random_documents(count: int, vocab_size: int = 1000, longest: int = 300, seed: int = 0) -> Documents:
    random = np.random.default_rng(seed)
    lengths = random.integers(1, longest, count)
    return [(random.integers(0, vocab_size, n), random.random(n) < random.choice([0, 0.5, 1])) for n in lengths]


def write(folder: Path, documents: Documents, vocab_size: int = 1000, **options) -> TokenStore:
    with TokenStoreWriter(folder, vocab_size, **options) as writer:
        for i, (ids, trained) in enumerate(documents):
            writer.append(ids, trained, 2**64 - 1 - i)
        return writer.commit()


def labels_of(documents: Documents) -> list[np.ndarray]:
    """What HF's convention asks for: unshifted, the first token of a sample never trained."""
    return [np.where(trained & (np.arange(len(ids)) > 0), ids, -100) for ids, trained in documents]


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    count=st.integers(0, 40),
    vocab_size=st.sampled_from([2, 1000, 65536, 65537, 2**32]),
    shard_bytes=st.sampled_from([1, 500, 4000, 1 << 30]),
    mapped=st.booleans(),
)
def test_documents_come_back(tmp_path_factory, seed, count, vocab_size, shard_bytes, mapped) -> None:
    documents = random_documents(count, vocab_size, seed=seed)
    folder = tmp_path_factory.mktemp("data") / "store"
    write(folder, documents, vocab_size, shard_bytes=shard_bytes)
    with TokenStore.open(folder, mapped) as store:
        store.verify()
        assert len(store) == count
        assert store.lengths().tolist() == [len(ids) for ids, _ in documents]
        assert store.num_tokens == sum(len(ids) for ids, _ in documents)
        assert store.trained_counts().tolist() == [int((labels >= 0).sum()) for labels in labels_of(documents)]
        assert store.num_trained == store.trained_counts().sum()
        for i, (ids, trained) in enumerate(documents):
            found_ids, found_trained = store.document(i)
            assert (found_ids == ids).all()
            assert (found_trained[1:] == trained[1:]).all()
            assert not found_trained[0]
            assert store.source(i) == 2**64 - 1 - i


@settings(max_examples=15, deadline=None)
@given(seed=st.integers(0, 2**32), shard_bytes=st.sampled_from([500, 1 << 30]), mapped=st.booleans(), data=st.data())
def test_packed_documents_are_what_they_should_be(tmp_path_factory, seed, shard_bytes, mapped, data) -> None:
    documents = random_documents(20, seed=seed)
    folder = tmp_path_factory.mktemp("data") / "store"
    write(folder, documents, shard_bytes=shard_bytes)
    chosen = data.draw(st.lists(st.integers(0, 19), max_size=50))
    store = TokenStore.open(folder, mapped)
    lengths = store.lengths(chosen)
    out, bounds = np.empty((3, int(lengths.sum())), np.int64), np.empty(len(chosen) + 1, np.int32)
    trained = store.pack(chosen, *out, bounds)
    empty = [np.empty(0, np.int64)]
    assert (out[0] == np.concatenate([documents[i][0] for i in chosen] or empty)).all()
    assert (out[1] == np.concatenate([labels_of(documents)[i] for i in chosen] or empty)).all()
    assert (out[2] == np.concatenate([np.arange(n) for n in lengths] or empty)).all()
    assert (bounds == np.cumsum([0, *lengths])).all()
    assert trained == (out[1] >= 0).sum()


@settings(max_examples=15, deadline=None)
@given(
    seed=st.integers(0, 2**32),
    width=st.integers(1, 5000),
    vocab_size=st.sampled_from([1000, 70000]),
    shard_bytes=st.sampled_from([500, 9000, 1 << 30]),
    mapped=st.booleans(),
)
def test_fixed_rows_hold_the_whole_stream(tmp_path_factory, seed, width, vocab_size, shard_bytes, mapped) -> None:
    documents = random_documents(40, vocab_size, seed=seed)
    folder = tmp_path_factory.mktemp("data") / "store"
    write(folder, documents, vocab_size, shard_bytes=shard_bytes)
    store = TokenStore.open(folder, mapped)
    count = store.num_rows(width)
    fill = count * width - store.num_tokens
    stream = np.concatenate([*(ids for ids, _ in documents), np.zeros(fill, np.int64)])
    labels = np.concatenate([*labels_of(documents), np.full(fill, -100)]).reshape(count, width)
    labels[:, 0] = -100
    shuffled = np.random.default_rng(seed).permutation(count)
    out = np.empty((2, count, width), np.int64)
    trained = store.rows(shuffled, *out)
    assert (out[0] == stream.reshape(count, width)[shuffled]).all()
    assert (out[1] == labels[shuffled]).all()
    assert trained == (labels >= 0).sum()


def test_many_documents_at_once_are_the_same_as_one_by_one(tmp_path: Path) -> None:
    documents = random_documents(50)
    one = write(tmp_path / "one", documents, shard_bytes=3000)
    with TokenStoreWriter(tmp_path / "many", 1000, shard_bytes=3000) as writer:
        for begin in range(0, 50, 17):
            part = documents[begin : begin + 17]
            writer.append_many(
                np.concatenate([ids for ids, _ in part]),
                np.concatenate([trained for _, trained in part]),
                [len(ids) for ids, _ in part],
                [2**64 - 1 - begin - i for i in range(len(part))],
            )
        many = writer.commit()
    assert one.fingerprint == many.fingerprint
    for path in (tmp_path / "one").iterdir():
        assert path.read_bytes() == (tmp_path / "many" / path.name).read_bytes()


def test_shards_keep_their_size(tmp_path: Path) -> None:
    write(tmp_path / "store", random_documents(200, longest=100), shard_bytes=5000)
    sizes = [path.stat().st_size for path in (tmp_path / "store").glob("*.tokens")]
    assert len(sizes) > 5
    assert max(sizes) < 5000 + 4096 + 1000  # header, padding and checksums come on top


def test_meta_and_identity(tmp_path: Path) -> None:
    meta = {"data": ["a.jsonl"], "settings": {"ratio": 0.1, "name": "é\n"}, "none": None}
    store = write(tmp_path / "a", random_documents(3), meta=meta)
    assert store.meta == meta
    assert store.vocab_size == 1000
    assert store.fingerprint != write(tmp_path / "b", random_documents(3, seed=1), meta=meta).fingerprint
    again = pickle.loads(pickle.dumps(store))
    assert again.fingerprint == store.fingerprint
    store.close()
    with pytest.raises(ValueError, match="closed"):
        len(store)


def test_nothing_is_seen_before_the_commit(tmp_path: Path) -> None:
    writer = TokenStoreWriter(tmp_path / "store", 10)
    writer.append([1, 2], [False, True])
    assert not (tmp_path / "store").exists()
    writer.commit()
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == ["store"]
    with pytest.raises(ValueError, match="closed"):
        writer.append([1], [True])
    with pytest.raises(ValueError, match="closed"):
        writer.commit()


def test_without_a_commit_nothing_is_left(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "store", 10) as writer:
        writer.append([1, 2], [False, True])
    assert [path.name for path in tmp_path.iterdir() if path.name != "home"] == []


KILLED = """
import os, signal, sys
from llamahome.data.store import TokenStoreWriter
writer = TokenStoreWriter(sys.argv[1], 10, shard_bytes=1)
writer.append([1, 2], [False, True])
writer.append([1, 2], [False, True])
print("ready", flush=True)
signal.pause()
"""


def test_what_a_killed_writer_left_is_removed_and_a_living_one_s_is_not(tmp_path: Path) -> None:
    folder = tmp_path / "st[o]re"
    process = subprocess.Popen([sys.executable, "-c", KILLED, str(folder)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "ready\n"
        left = [path for path in tmp_path.iterdir() if path.name.startswith(".st[o]re.tmp-")]
        assert len(left) == 1
        write(tmp_path / "other", random_documents(2))
        TokenStoreWriter(folder, 10).abort()
        assert left[0].exists()
    finally:
        process.send_signal(signal.SIGKILL)
        process.wait()
    write(folder, random_documents(2))
    assert not left[0].exists()
    assert not folder.with_name(".tmp").exists()


def test_a_store_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    write(tmp_path / "empty", random_documents(2))
    for taken in (tmp_path / "empty", tmp_path / "file"):
        (tmp_path / "file").touch()
        with pytest.raises(StorageError, match="something already"):
            TokenStoreWriter(taken, 10)
    with TokenStoreWriter(tmp_path / "late", 10) as writer:
        write(tmp_path / "other", random_documents(2)).close()
        shutil.copytree(tmp_path / "other", tmp_path / "late")
        with pytest.raises(StorageError):
            writer.commit()
    assert len(TokenStore.open(tmp_path / "late")) == 2


@pytest.mark.parametrize("ids", [[5, 10], [-1], [2**40], [3, 2**32]])
def test_ids_outside_the_vocabulary_are_refused(tmp_path: Path, ids: list[int]) -> None:
    with TokenStoreWriter(tmp_path / "store", 10) as writer:
        writer.append([1, 9], [True, True])
        with pytest.raises(DataError, match=r"outside the vocabulary of 10.*document 1"):
            writer.append(ids, [True] * len(ids))
        with pytest.raises(DataError, match="document 2"):
            writer.append_many([1, 2, *ids], [True] * (2 + len(ids)), [2, len(ids)], [0, 0])
        with pytest.raises(DataError, match=r"no tokens.*document 2"):
            writer.append_many([1], [True], [1, 0], [0, 0])
        with pytest.raises(TypeError, match="not integers"):
            writer.append([0.5], [True])


@contextmanager
def file_size_limit(size: int) -> Iterator[None]:
    """A stand-in for a full disk that needs no root: writing on fails with EFBIG."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_is_a_storage_error(tmp_path: Path) -> None:
    ids, trained = np.ones(3_000_000, np.uint32), np.ones(3_000_000, bool)
    with file_size_limit(100_000):
        with pytest.raises(StorageError, match=r"too large.*store"), TokenStoreWriter(tmp_path / "store", 10) as writer:
            writer.append(ids, trained)
        writer = _C.TokenFileWriter(tmp_path / "shard", 2)
        with pytest.raises(OSError, match="too large") as caught:
            writer.append(ids, trained, np.array([len(ids)]), np.zeros(1, np.uint64))
        assert caught.value.filename == str(tmp_path / "shard")
        small = _C.TokenFileWriter(tmp_path / "small", 2)
        small.append(ids[:60_000], trained[:60_000], np.array([60_000]), np.zeros(1, np.uint64))
        with pytest.raises(OSError, match="too large"):
            small.finish()
    assert not (tmp_path / "store").exists()
    assert [path.name for path in tmp_path.iterdir() if path.is_dir()] == ["home"]


def test_every_bit_flip_and_truncation_of_the_index_is_found(tmp_path: Path) -> None:
    write(tmp_path / "store", random_documents(3), meta={"a": 1})
    path = tmp_path / "store" / "store.json"
    content = path.read_bytes()
    with path.open("r+b", buffering=0) as file:
        for at in range(len(content)):
            for bit in range(8):
                os.pwrite(file.fileno(), bytes([content[at] ^ 1 << bit]), at)
                with pytest.raises(DataError):
                    TokenStore.open(tmp_path / "store")
            os.pwrite(file.fileno(), content[at : at + 1], at)
    TokenStore.open(tmp_path / "store").close()
    for size in range(len(content) - 1, -1, -1):
        os.truncate(path, size)
        with pytest.raises(DataError):
            TokenStore.open(tmp_path / "store")


def rewrite(store: Path, change) -> None:
    """An index with other content and a checksum that is right."""
    from llamahome.data.store_index import dump_index

    index = json.loads((store / "store.json").read_text())
    change(index)
    (store / "store.json").write_bytes(dump_index(index))


@pytest.mark.parametrize("name", ["../shard-00000.tokens", "/etc/passwd", "sub/shard-00000.tokens", "", "..", "shard"])
def test_names_outside_of_the_folder_are_refused(tmp_path: Path, name: str) -> None:
    write(tmp_path / "store", random_documents(3))
    rewrite(tmp_path / "store", lambda index: index["shards"][0].update(name=name))
    with pytest.raises(DataError, match=r"not a shard's name.*store\.json"):
        TokenStore.open(tmp_path / "store")


def test_a_link_out_of_the_folder_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "store", random_documents(3))
    shard = tmp_path / "store" / "shard-00000.tokens"
    shard.rename(tmp_path / "elsewhere")
    shard.symlink_to(tmp_path / "elsewhere")
    with pytest.raises(DataError, match="symbolic link"):
        TokenStore.open(tmp_path / "store")


def test_shards_that_do_not_belong_are_refused(tmp_path: Path) -> None:
    write(tmp_path / "a", random_documents(3), vocab_size=1000)
    write(tmp_path / "b", random_documents(3, seed=1), vocab_size=1000)
    shutil.copy(tmp_path / "b" / "shard-00000.tokens", tmp_path / "a" / "shard-00000.tokens")
    with pytest.raises(DataError, match="not the shard that the index names"):
        TokenStore.open(tmp_path / "a")
    (tmp_path / "a" / "shard-00000.tokens").unlink()
    with pytest.raises(DataError, match=r"no such file.*shard-00000"):
        TokenStore.open(tmp_path / "a")
    rewrite(tmp_path / "b", lambda index: index.update(vocab_size=500))
    with pytest.raises(DataError, match="outside the vocabulary of 500"):
        TokenStore.open(tmp_path / "b")


@pytest.mark.parametrize("text", ["", "[]", "{}", '{"format": "other"}', "[" * 100_000, "\xff", '{"a": 1e999}'])
def test_what_is_no_index_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "store").mkdir()
    (tmp_path / "store" / "store.json").write_text(text, "latin-1")
    with pytest.raises(DataError, match=r"store\.json"):
        TokenStore.open(tmp_path / "store")


def test_no_store_at_all(tmp_path: Path) -> None:
    for folder in (tmp_path / "none", tmp_path):
        with pytest.raises(DataError, match=r"no such file.*store\.json"):
            TokenStore.open(folder)


def test_wrong_ids_are_refused(tmp_path: Path) -> None:
    store = write(tmp_path / "store", random_documents(3))
    for ids in ([3], [-1], [0, 99]):
        with pytest.raises(IndexError):
            store.lengths(ids)
    with pytest.raises(TypeError, match="not integers"):
        store.lengths([0.0])
    with pytest.raises(IndexError):
        store.document(3)


@pytest.mark.parametrize("mapped", [True, False])
def test_reading_ahead_works_cold_and_after_a_fork(tmp_path: Path, mapped: bool) -> None:
    documents = random_documents(200, longest=5000)
    store = write(tmp_path / "store", documents)
    store = TokenStore.open(tmp_path / "store", mapped)
    descriptor = os.open(tmp_path / "store" / "shard-00000.tokens", os.O_RDONLY)
    os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(descriptor)
    store.prefetch(np.arange(200))
    store.prefetch_rows(np.arange(store.num_rows(100)), 100)
    child = os.fork()
    if child == 0:
        try:
            signal.alarm(20)
            store.prefetch(np.arange(200))
            right = all((store.document(i)[0] == documents[i][0]).all() for i in range(200))
            del store
            os._exit(0 if right else 1)
        finally:
            os._exit(2)
    assert os.waitpid(child, 0)[1] == 0
    assert all((store.document(i)[0] == documents[i][0]).all() for i in range(200))


def test_opening_costs_the_same_for_any_number_of_documents(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "store", 100) as writer:
        count = 200_000
        writer.append_many(np.ones(count, np.uint32), np.ones(count, bool), np.ones(count, int), np.zeros(count, int))
        writer.commit().close()
    times = []
    for _ in range(5):
        begin = time.perf_counter()
        TokenStore.open(tmp_path / "store").lengths([count - 1])
        times.append(time.perf_counter() - begin)
    assert min(times) < 0.005
