"""Which samples, in which order: the steps of a run, and a torch dataset for anybody's loop."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from llamahome import _C
from llamahome.data.store import TokenStore
from llamahome.errors import CheckpointError

Ids = NDArray[np.int64]
Item = dict[str, torch.Tensor]

# Units (samples or rows) that are looked up, packed and read ahead together. Packed rows are made within a window, so
# the order of a run depends on this number.
_WINDOW = 1024
_GATHER = 64  # units that one read puts into one buffer


class StepOrder:
    """The samples of every optimizer step of a run: a function of (seed, step) and of nothing else.

    Each epoch has every sample once, in an order of its own. Takes no memory; any step is found in O(1).

    block > 0 (a divisor of 1024) is for cold disks and mounted object stores: blocks of so many neighbouring samples
    are shuffled over the epoch, then single samples within windows of 1024. A block stays within a window, so it is
    read once and together; two samples in a row are of the same block with a probability of about block / 1024.
    """

    def __init__(
        self, num_samples: int, samples_per_step: int, seed: int, shuffle: bool = True, block: int = 0
    ) -> None:
        if num_samples < 1 or samples_per_step < 1:
            raise ValueError(f"{num_samples} samples in steps of {samples_per_step}: both must be at least 1")
        if block < 0 or (block and _WINDOW % block):
            raise ValueError(f"block {block} is not a divisor of {_WINDOW}")
        self.num_samples = num_samples
        self.samples_per_step = samples_per_step
        self.seed = seed
        self.shuffle = shuffle
        self.block = block

    @property
    def steps_per_epoch(self) -> int:
        return -(-self.num_samples // self.samples_per_step)

    def samples(self, step: int) -> Ids:
        """Sample ids of a step, counted from 0 over the whole run; an epoch's last step may be smaller."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return self.range(epoch, index * self.samples_per_step, self.samples_per_step)

    def range(self, epoch: int, start: int, count: int) -> Ids:
        """Sample ids at positions start, start + 1, ... of an epoch; fewer than `count` at its end."""
        out = np.empty(max(0, min(count, self.num_samples - start)), np.int64)
        # Seeds may be any integer; the order takes their low 64 bits.
        order = _C.SampleOrder(self.num_samples, self.seed % (1 << 64), epoch, self.shuffle, self.block)
        order.fill(min(start, self.num_samples), out)
        return out

    def epoch(self, step: int) -> float:
        """Epochs that are done when `step` begins."""
        epoch, index = divmod(step, self.steps_per_epoch)
        return epoch + index * self.samples_per_step / self.num_samples


class StreamingDataset(IterableDataset[Item]):
    """A token store as a torch dataset; one iteration is the rest of an epoch.

    rows="samples": {"input_ids", "labels"}, int64 [tokens of the sample].
    rows="packed":  whole samples best-fit into `length` tokens (a longer one has a row of its own): {"input_ids",
                    "labels", "position_ids"} int64 [1, T] and "cu_seqlens" int32 [n + 1]; use batch_size=None.
    rows="fixed":   the stream of all tokens in rows of `length`: {"input_ids", "labels"}, int64 [length]. Documents are
                    cut where rows end, no token is lost; the last row ends in ids 0, labels -100.

    The order depends on (seed, epoch) only. Of it, rank r of `world_size` takes every world_size-th item, so that ranks
    are disjoint, together complete, and hold the same items at the same step whatever their number. The defaults mean:
    no sharding, as Accelerate and HF Trainer shard by themselves. Within a rank items come in the same order for any
    number of DataLoader workers, if `batch_size` is the DataLoader's; `loader()` sees to that.

    The position is a few integers (`state_dict`); a resume takes no time, may be in the middle of an epoch, and with
    any other world_size, batch size or number of workers.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        rows: Literal["samples", "packed", "fixed"] = "samples",
        length: int = 0,
        seed: int = 42,
        shuffle: bool = True,
        block: int = 0,
        rank: int = 0,
        world_size: int = 1,
        batch_size: int = 1,
        read_ahead: int = 1000,
    ) -> None:
        """`block`: as in StepOrder, 0 for an even shuffle. `read_ahead`: items to ask from the disk before they are
        needed, in whole windows of 1024; 0: none.
        """
        super().__init__()
        if rows not in ("samples", "packed", "fixed"):
            raise ValueError(f"rows is {rows!r}, not 'samples', 'packed' or 'fixed'")
        if rows != "samples" and length < 1:
            raise ValueError(f"rows={rows!r} needs a length of at least 1 token, not {length}")
        if not 0 <= rank < world_size or batch_size < 1 or read_ahead < 0:
            raise ValueError(f"{rank=} of {world_size=}, {batch_size=}, {read_ahead=} make no sense")
        self.store, self.rows, self.length = store, rows, length
        self.rank, self.world_size, self.batch_size = rank, world_size, batch_size
        self.read_ahead = read_ahead
        self._count = store.num_rows(length) if rows == "fixed" else len(store)
        self._order = StepOrder(max(self._count, 1), 1, seed, shuffle, block)
        self._epoch = 0
        self._position = 0  # items that all ranks together have had of this epoch
        self._window = (0, 0)  # packed rows: first sample of the window that holds the position, and its first item

    def __iter__(self) -> Iterator[Item]:
        """Items of this rank and worker from the position to the end of the epoch; then the next epoch begins."""
        if self._is_done():
            self._next_epoch()
        start, ahead = self._position, deque[tuple[Ids, list[Ids]]]()
        worker = get_worker_info()
        share = (worker.id, worker.num_workers) if worker else (0, 1)
        depth = -(-self.read_ahead // _WINDOW)
        for window in self._windows(start, share):
            if depth:
                self._prefetch(window[1])
            ahead.append(window)
            if len(ahead) > depth:
                yield from self._read(start, *ahead.popleft())
        while ahead:
            yield from self._read(start, *ahead.popleft())
        self._next_epoch()

    def __len__(self) -> int:
        """Items of this rank in an epoch; packed rows cannot be counted without packing them all."""
        if self.rows == "packed":
            raise TypeError("the number of packed rows is not known beforehand")
        return (self._count - self.rank + self.world_size - 1) // self.world_size

    def state_dict(self) -> dict[str, int]:
        """The position after the items taken so far, the same on every rank. Ranks must have taken equally many."""
        while self.rows == "packed" and not self._is_done():
            sample, item = self._window
            ids = self._order.range(self._epoch, sample, _WINDOW)
            following = item + len(self._pack(ids))
            if self._position < following:
                break
            self._window = (sample + len(ids), following)
        sample, item = self._window
        return {
            "epoch": self._epoch,
            "position": self._position,
            "window_sample": sample,
            "window_item": item,
            "num_samples": self._count,
            "length": self.length,
            "seed": self._order.seed,
            "shuffle": int(self._order.shuffle),
            "block": self._order.block,
        }

    def load_state_dict(self, state: dict[str, int]) -> None:
        """Continue at a position. Raises: CheckpointError when it belongs to another data set, length or seed."""
        own = self.state_dict()
        for key in ("num_samples", "length", "seed", "shuffle", "block"):
            if state[key] != own[key]:
                raise CheckpointError(
                    f"the saved position has {key} {state[key]}, this dataset {own[key]}",
                    fix="resume with the data and settings that the run began with",
                )
        self._epoch, self._position = state["epoch"], state["position"]
        self._window = (state["window_sample"], state["window_item"])

    def set_epoch(self, epoch: int) -> None:
        """Go to the start of an epoch; does nothing in the middle of that same epoch."""
        if epoch != self._epoch:
            self._epoch, self._position, self._window = epoch, 0, (0, 0)

    def loader(self, batch_size: int | None = None, **options: Any) -> DataLoader[Any]:
        """A DataLoader whose batches come in the same order for any `num_workers`, and that keeps `state_dict` right.

        `options` go to torch's DataLoader. Workers seldom help: one thread reads faster than they can send.
        """
        self.batch_size = batch_size or 1
        return _CountingLoader(self, batch_size=batch_size, **options)

    def _windows(self, start: int, share: tuple[int, int]) -> Iterator[tuple[Ids, list[Ids]]]:
        """Per window: positions of this worker's items at or after `start`, and the ids that each is made of."""
        sample, item = self._window if self.rows == "packed" else (start, start)
        while sample < self._count:
            ids = self._order.range(self._epoch, sample, _WINDOW)
            groups = self._pack(ids) if self.rows == "packed" else list(ids.reshape(-1, 1))
            own = np.arange(max(item, start), item + len(groups)) - start
            own = own[own % self.world_size == self.rank]
            own = own[own // self.world_size // self.batch_size % share[1] == share[0]]
            yield own + start, [groups[i] for i in own + (start - item)]
            sample, item = sample + len(ids), item + len(groups)

    def _pack(self, ids: Ids) -> list[Ids]:
        order, bounds = _C.plan_packing(self.store.lengths(ids), self.length)
        return np.split(ids[order], bounds[1:-1])

    def _prefetch(self, groups: list[Ids]) -> None:
        if not groups:
            return
        if self.rows == "fixed":
            self.store.prefetch_rows(np.concatenate(groups), self.length)
        else:
            self.store.prefetch(np.concatenate(groups))

    def _read(self, start: int, positions: Ids, groups: list[Ids]) -> Iterator[Item]:
        for begin in range(0, len(groups), _GATHER):
            part = groups[begin : begin + _GATHER]
            items = self._fixed(part) if self.rows == "fixed" else self._whole(part)
            for position, item in zip(positions[begin : begin + _GATHER].tolist(), items, strict=True):
                # All ranks take item by item: when this one has had its item, so have the others.
                self._position = position - (position - start) % self.world_size + self.world_size
                yield item

    def _fixed(self, groups: list[Ids]) -> Iterator[Item]:
        buffer = torch.empty((2, len(groups), self.length), dtype=torch.int64)
        self.store.rows(np.concatenate(groups), buffer[0].numpy(), buffer[1].numpy())
        for ids, labels in zip(*buffer, strict=True):
            yield {"input_ids": ids, "labels": labels}

    def _whole(self, groups: list[Ids]) -> Iterator[Item]:
        ids = np.concatenate(groups)
        lengths = self.store.lengths(ids)
        bounds = torch.empty(len(ids) + 1, dtype=torch.int32)
        buffer = torch.empty((3, int(lengths.sum())), dtype=torch.int64)
        flat = buffer.numpy()
        self.store.pack(ids, flat[0], flat[1], flat[2], bounds.numpy())
        if self.rows == "samples":
            sizes = lengths.tolist()
            for sample, labels in zip(torch.split(buffer[0], sizes), torch.split(buffer[1], sizes), strict=True):
                yield {"input_ids": sample, "labels": labels}
            return
        first = 0
        for group in groups:
            own = bounds[first : first + len(group) + 1]
            row = buffer[:, None, own[0] : own[-1]]
            yield {"input_ids": row[0], "labels": row[1], "position_ids": row[2], "cu_seqlens": own - own[0]}
            first += len(group)

    def _is_done(self) -> bool:
        if self.rows != "packed":
            return self._position >= self._count
        sample, item = self._window
        return sample >= self._count and self._position >= item

    def _next_epoch(self) -> None:
        self._epoch, self._position, self._window = self._epoch + 1, 0, (0, 0)


class _CountingLoader(DataLoader[Any]):
    """Counts what workers have delivered: they read in other processes, and further than the consumer has seen."""

    dataset: StreamingDataset

    def __iter__(self) -> Any:
        for batch in super().__iter__():
            if self.num_workers:
                self.dataset._position += self.dataset.world_size * self.dataset.batch_size
            yield batch
        if self.num_workers:
            self.dataset._next_epoch()
