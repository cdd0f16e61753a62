"""The same items in the same order, whoever reads them and from wherever they go on."""

from __future__ import annotations

import pickle
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.data.dataset import StreamingDataset
from llamahome.data.store import TokenStore, TokenStoreWriter
from llamahome.errors import CheckpointError

MODES = {"samples": 0, "packed": 64, "fixed": 16}
COUNT = 2500  # more than two windows


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> TokenStore:
    """Document i is i, i + 1, ...: its first token names it."""
    random = np.random.default_rng(0)
    with TokenStoreWriter(tmp_path_factory.mktemp("data") / "store", 5000, shard_bytes=20_000) as writer:
        for i in range(COUNT):
            length = int(random.integers(1, 40))
            writer.append(np.arange(i, i + length), random.random(length) < 0.7, i)
        return writer.commit()


def key(item: dict[str, torch.Tensor]) -> tuple[int, ...]:
    return tuple(item["input_ids"].flatten().tolist())


def keys(items) -> list[tuple[int, ...]]:
    return [key(item) for item in items]


@pytest.fixture(scope="module")
def reference(store: TokenStore) -> dict[str, list[list[tuple[int, ...]]]]:
    """Five epochs in each mode, read by one process in one go."""
    found = {}
    for rows, length in MODES.items():
        dataset = StreamingDataset(store, rows=rows, length=length, seed=3)
        found[rows] = [keys(dataset) for _ in range(5)]
    return found


def test_samples_are_the_documents(store: TokenStore, reference) -> None:
    for epoch in reference["samples"]:
        assert sorted(ids[0] for ids in epoch) == list(range(COUNT))
    assert reference["samples"][0] != reference["samples"][1]
    plain = list(StreamingDataset(store, shuffle=False))
    for i in (0, 1023, 1024, COUNT - 1):
        ids, trained = store.document(i)
        assert plain[i]["input_ids"].tolist() == ids.tolist()
        assert plain[i]["labels"].tolist() == np.where(trained, ids.astype(np.int64), -100).tolist()


def test_packed_rows_hold_every_document_once(store: TokenStore) -> None:
    found = []
    for row in StreamingDataset(store, rows="packed", length=64, seed=3):
        bounds = row["cu_seqlens"]
        assert row["input_ids"].shape == row["labels"].shape == row["position_ids"].shape == (1, bounds[-1])
        assert bounds.dtype == torch.int32
        assert bounds[-1] <= 64
        for begin, end in pairwise(bounds.tolist()):
            assert row["position_ids"][0, begin:end].tolist() == list(range(end - begin))
            assert row["labels"][0, begin] == -100
            found.append(int(row["input_ids"][0, begin]))
            assert (row["input_ids"][0, begin:end] == torch.arange(found[-1], found[-1] + end - begin)).all()
    assert sorted(found) == list(range(COUNT))


def test_fixed_rows_hold_every_token_once(store: TokenStore) -> None:
    stream = np.concatenate([store.document(i)[0] for i in range(COUNT)])
    rows = np.array(keys(StreamingDataset(store, rows="fixed", length=16, shuffle=False)))
    assert rows.shape == (store.num_rows(16), 16)
    assert (rows.ravel()[: len(stream)] == stream).all()
    shuffled = keys(StreamingDataset(store, rows="fixed", length=16))
    assert sorted(shuffled) == sorted(map(tuple, rows.tolist()))
    assert shuffled != list(map(tuple, rows.tolist()))


@pytest.mark.parametrize("rows", MODES)
@pytest.mark.parametrize("world_size", range(1, 9))
def test_ranks_are_disjoint_complete_and_in_step(store: TokenStore, reference, rows: str, world_size: int) -> None:
    parts = [
        keys(StreamingDataset(store, rows=rows, length=MODES[rows], seed=3, rank=rank, world_size=world_size))
        for rank in range(world_size)
    ]
    merged = [part[i] for i in range(len(parts[0])) for part in parts if i < len(part)]
    assert merged == reference[rows][0]
    if rows != "packed":
        dataset = StreamingDataset(store, rows=rows, length=MODES[rows], rank=world_size - 1, world_size=world_size)
        assert len(dataset) == len(parts[-1])


@pytest.mark.filterwarnings("ignore:This DataLoader will create")
@pytest.mark.parametrize("rows", MODES)
@pytest.mark.parametrize("workers", [0, 1, 2, 3, 4])
def test_workers_change_nothing(store: TokenStore, reference, rows: str, workers: int) -> None:
    dataset = StreamingDataset(store, rows=rows, length=MODES[rows], seed=3, rank=1, world_size=2)
    batch_size = 4
    loader = dataset.loader(batch_size, num_workers=workers, collate_fn=keys)
    assert [ids for batch in loader for ids in batch] == reference[rows][0][1::2]
    if workers < 2:
        assert [ids for batch in loader for ids in batch] == reference[rows][1][1::2]


@settings(max_examples=25, deadline=None)
@given(
    rows=st.sampled_from(list(MODES)),
    stops=st.lists(st.tuples(st.integers(1, 8), st.integers(0, 700)), min_size=1, max_size=4),
    read_ahead=st.sampled_from([0, 1000, 5000]),
)
def test_any_number_of_stops_and_any_world_size_give_the_same_run(store, reference, rows, stops, read_ahead) -> None:
    """After each stop another number of ranks goes on from the saved position; together they read the reference."""
    expected = [ids for epoch in reference[rows] for ids in epoch]
    state, found = None, []
    for world_size, items in stops:
        datasets = [
            StreamingDataset(
                store, rows=rows, length=MODES[rows], seed=3, rank=rank, world_size=world_size, read_ahead=read_ahead
            )
            for rank in range(world_size)
        ]
        if state is not None:
            for dataset in datasets:
                dataset.load_state_dict(pickle.loads(pickle.dumps(state)))
        readers = [iter(dataset) for dataset in datasets]
        for _ in range(items):
            step = [next(reader, None) for reader in readers]
            found += [key(item) for item in step if item is not None]
            if None in step:
                break
        states = [dataset.state_dict() for dataset in datasets]
        if items and None not in step:
            assert all(other == states[0] for other in states)
        state = states[-1]
    assert found == expected[: len(found)]


@pytest.mark.parametrize("rows", MODES)
def test_workers_resume_at_what_was_delivered(store: TokenStore, reference, rows: str) -> None:
    dataset = StreamingDataset(store, rows=rows, length=MODES[rows], seed=3, world_size=2)
    batches = iter(dataset.loader(5, num_workers=2, collate_fn=keys))
    found = [ids for _ in range(40) for ids in next(batches)]
    state = dataset.state_dict()
    del batches
    assert found == reference[rows][0][:400:2]
    resumed = StreamingDataset(store, rows=rows, length=MODES[rows], seed=3)
    resumed.load_state_dict(state)
    assert keys(resumed) == reference[rows][0][400:]
    assert keys(resumed) == reference[rows][1]


def test_a_position_at_the_end_goes_on_with_the_next_epoch(store: TokenStore, reference) -> None:
    for rows in MODES:
        dataset = StreamingDataset(store, rows=rows, length=MODES[rows], seed=3)
        reader = iter(dataset)
        for _ in reference[rows][0]:
            next(reader)
        resumed = StreamingDataset(store, rows=rows, length=MODES[rows], seed=3)
        resumed.load_state_dict(dataset.state_dict())
        assert keys(resumed) == reference[rows][1]


def test_a_state_is_a_few_integers_and_knows_its_data(store: TokenStore) -> None:
    state = StreamingDataset(store, seed=1).state_dict()
    assert all(type(value) is int for value in state.values())
    for other in (
        StreamingDataset(store, seed=2),
        StreamingDataset(store, seed=1, shuffle=False),
        StreamingDataset(store, seed=1, block=16),
        StreamingDataset(store, seed=1, rows="packed", length=9),
        StreamingDataset(store, seed=1, rows="fixed", length=9),
    ):
        with pytest.raises(CheckpointError, match="the saved position has"):
            other.load_state_dict(state)


@pytest.mark.parametrize("rows", MODES)
def test_a_shuffle_in_blocks_has_the_same_items(store: TokenStore, reference, rows: str) -> None:
    found = keys(StreamingDataset(store, rows=rows, length=MODES[rows], seed=3, block=64))
    assert found != reference[rows][0]
    if rows != "packed":
        assert sorted(found) == sorted(reference[rows][0])
    assert sum(map(len, found)) == sum(map(len, reference[rows][0]))


def test_epochs_can_be_chosen(store: TokenStore, reference) -> None:
    dataset = StreamingDataset(store, seed=3)
    dataset.set_epoch(1)
    reader = iter(dataset)
    first = [key(next(reader)) for _ in range(10)]
    dataset.set_epoch(1)  # as loops do after a resume
    assert first + keys(dataset) == reference["samples"][1]


def test_an_empty_store_has_no_items(tmp_path: Path) -> None:
    with TokenStoreWriter(tmp_path / "store", 10) as writer:
        empty = writer.commit()
    for rows, length in MODES.items():
        assert list(StreamingDataset(empty, rows=rows, length=length)) == []


@pytest.mark.parametrize(
    "options",
    [
        {"rows": "other"},
        {"rows": "packed"},
        {"rows": "fixed", "length": 0},
        {"rank": 1},
        {"batch_size": 0},
        {"rank": -1},
    ],
)
def test_impossible_settings_are_refused(store: TokenStore, options: dict) -> None:
    with pytest.raises(ValueError):
        StreamingDataset(store, **options)
