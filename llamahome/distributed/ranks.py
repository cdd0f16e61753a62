"""The processes of a run: which one this is, and the few things that they tell each other."""

from __future__ import annotations

import json
import logging
import os
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from datetime import timedelta
from itertools import count
from typing import TYPE_CHECKING, Any, TypeVar

from llamahome.distributed.meeting import meet
from llamahome.errors import DistributedError, LlamaHomeError

if TYPE_CHECKING:
    import torch
    from torch.distributed.distributed_c10d import Store

logger = logging.getLogger(__name__)
T = TypeVar("T")
_POLL_SECONDS = 0.05
_SAY_SECONDS = 60.0
_GOODBYE_SECONDS = 30.0
# gloo raises plain RuntimeErrors.
_PEER_MARKS = (
    "gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe", "Timed out waiting",
)  # fmt: skip


@dataclass(frozen=True)
class Ranks:
    """This process among those that torchrun (or whatever sets its variables) started; alone by default.

    restarts: how often the group was started anew. `sum`, `largest`, `gather`, `decide` and `copy_from_main` are for
    all ranks together: each must call them in the same order.
    """

    rank: int = 0
    size: int = 1
    local_rank: int = 0
    local_size: int = 1
    restarts: int = 0
    device: str = "cpu"
    store: Store | None = None
    _number: Iterator[int] = field(default_factory=count, repr=False, compare=False)

    @property
    def is_main(self) -> bool:
        """Whether this rank writes the run's folder."""
        return self.rank == 0

    @property
    def several(self) -> bool:
        return self.size > 1

    def sum(self, values: Sequence[float]) -> list[float]:
        """Each of the values summed over the ranks, in fp64."""
        return self._reduce(values, "SUM")

    def largest(self, values: Sequence[float]) -> list[float]:
        """The largest of each value over the ranks."""
        return self._reduce(values, "MAX")

    def any(self, flag: bool) -> bool:
        """Whether a rank says so."""
        return bool(self.largest([float(flag)])[0]) if self.several else flag

    def gather(self, value: T) -> list[T]:
        """Every rank's value, in the order of the ranks."""
        if not self.several:
            return [value]
        import torch.distributed as dist

        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def decide(self, work: Callable[[], T], what: str) -> T:
        """What `work` gives on rank 0, as JSON, on every rank; the others wait, however long it takes.

        Raises: on rank 0 what `work` raises; on the others DistributedError with its text.
        """
        if not self.several or self.store is None:
            return work()
        key = f"decision/{next(self._number)}"
        if not self.is_main:
            told: T = self._told(key, what)
            return told
        try:
            value = work()
        except BaseException as error:
            self.store.set(key, json.dumps({"error": str(error) or type(error).__name__}))
            raise
        self.store.set(key, json.dumps({"value": value}))
        return value

    def main_first(self, work: Callable[[], T], what: str) -> T:
        """`work` on rank 0, and after it on all others, which find in the cache what it made."""
        done: list[T] = []
        self.decide(lambda: done.append(work()), what)
        return done[0] if done else work()

    def copy_from_main(self, tensors: Iterable[torch.Tensor]) -> None:
        """Give every rank rank 0's values of these tensors, in place; shapes and types are the same everywhere."""
        if self.several:
            import torch.distributed as dist

            for tensor in tensors:
                dist.broadcast(tensor, src=0)

    def _told(self, key: str, what: str) -> Any:
        assert self.store is not None
        started = said = time.monotonic()
        while not self.store.check([key]):
            time.sleep(_POLL_SECONDS)
            if time.monotonic() - said > _SAY_SECONDS:
                said = time.monotonic()
                logger.warning("rank %d waits for rank 0 to %s, %.0f s so far", self.rank, what, said - started)
        answer = json.loads(self.store.get(key))
        if "error" in answer:
            raise DistributedError(f"rank 0 could not {what}: {answer['error']}", fix="see the message of rank 0")
        return answer["value"]

    def _reduce(self, values: Sequence[float], operation: str) -> list[float]:
        if not self.several:
            return list(values)
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        dist.all_reduce(tensor, op=getattr(dist.ReduceOp, operation))
        return list(tensor.tolist())


ALONE = Ranks()


def launched() -> bool:
    """Whether torchrun, or another starter that sets its variables, runs this process as one of several."""
    return int(os.environ.get("WORLD_SIZE", "1")) > 1 and "RANK" in os.environ


def from_environment() -> Ranks:
    """This process by torchrun's variables. Raises: DistributedError when they make no sense."""
    if "RANK" not in os.environ:
        return ALONE
    try:
        return Ranks(
            rank=int(os.environ["RANK"]),
            size=int(os.environ["WORLD_SIZE"]),
            local_rank=int(os.environ.get("LOCAL_RANK", "0")),
            local_size=int(os.environ.get("LOCAL_WORLD_SIZE", "1")),
            restarts=int(os.environ.get("TORCHELASTIC_RESTART_COUNT", "0")),
        )
    except (KeyError, ValueError) as error:
        raise DistributedError(
            f"the variables of torchrun are not complete: {error}", fix="start it with torchrun"
        ) from error


@contextmanager
def joined(timeout_seconds: float, device: str) -> Iterator[Ranks]:
    """All ranks of the run, connected while the block runs; `device` is "cpu" (gloo) or "cuda" (NCCL, and gloo).

    Raises: DistributedError when they do not find each other within `timeout_seconds`.
    """
    ranks = from_environment()
    if not ranks.several:
        yield ranks
        return
    import torch
    import torch.distributed as dist

    if device == "cuda":
        torch.cuda.set_device(ranks.local_rank)
    backend = "cpu:gloo,cuda:nccl" if device == "cuda" else "gloo"
    try:
        found = replace(ranks, device=device, store=_join(ranks, backend, timedelta(seconds=timeout_seconds)))
        # torchrun counts on each host by itself, and not where it started again because another host did.
        found = replace(found, restarts=int(found.largest([found.restarts])[0]))
    except (RuntimeError, ValueError) as error:
        raise DistributedError(
            f"rank {ranks.rank} of {ranks.size} cannot reach the others: {str(error).splitlines()[0]}",
            where=f"{os.environ.get('MASTER_ADDR')}:{os.environ.get('MASTER_PORT')}",
            fix="check that all hosts run and reach this address",
        ) from error  # fmt: skip
    failed = False
    try:
        yield found
    except BaseException:
        failed = True
        raise
    finally:
        # After a failure the others may wait for ever in what this would do; the process ends anyway.
        if not failed:
            _leave_together(found)
            dist.destroy_process_group()


def _leave_together(ranks: Ranks) -> None:
    """Rank 0 goes last: unless torchrun does, its process holds the store that the others may still read."""
    store = ranks.store
    assert store is not None
    if not ranks.is_main:
        store.set(f"left/{ranks.rank}", "")
        return
    try:
        store.wait([f"left/{rank}" for rank in range(1, ranks.size)], timedelta(seconds=_GOODBYE_SECONDS))
    except RuntimeError as error:
        logger.warning("not all ranks have said goodbye: %s", str(error).splitlines()[0])


def _join(ranks: Ranks, backend: str, timeout: timedelta) -> Store:
    """Make the process group; returns a connection of its own to the group's store."""
    import torch.distributed as dist

    store, rank, size = next(dist.rendezvous("env://", ranks.rank, ranks.size, timeout=timeout))  # type: ignore[attr-defined]
    name = meet(store, rank, size, timeout)
    group = dist.PrefixStore(f"llamahome/{name}/group", store)  # type: ignore[attr-defined]
    dist.init_process_group(backend, store=group, rank=rank, world_size=size, timeout=timeout)
    address, port = os.environ["MASTER_ADDR"], int(os.environ["MASTER_PORT"])
    own = dist.TCPStore(address, port, is_master=False, timeout=timeout)  # type: ignore[attr-defined]
    return dist.PrefixStore(f"llamahome/{name}/own", own)  # type: ignore[attr-defined]


def require_same(ranks: Ranks, facts: dict[str, str]) -> None:
    """Raises: DistributedError naming the first fact that is not the same on all ranks, and the rank that differs.

    Of a fact that is an object in JSON, the first entry that differs is named.
    """
    everybody = ranks.gather(facts)
    for name, value in everybody[0].items():
        for rank, other in enumerate(everybody):
            if other.get(name) != value:
                what, ours, theirs = _difference(name, value, other.get(name))
                raise DistributedError(
                    f"rank {rank} has another {what} than rank 0: {theirs}, not {ours}",
                    fix="give every host the same files, settings and versions",
                )


def _difference(name: str, ours: Any, theirs: Any) -> tuple[str, Any, Any]:
    """The name of what differs, and both values of it."""
    first, second = (json.loads(text) if str(text).startswith("{") else text for text in (ours, theirs))
    path = [name]
    while isinstance(first, dict) and isinstance(second, dict):
        key = next((key for key in first if first[key] != second.get(key)), None)
        if key is None:  # only the other has more
            break
        path.append(key)
        first, second = first[key], second.get(key)
    return ": ".join([name, ".".join(path[1:])]) if path[1:] else name, first, second


def is_peer_failure(error: BaseException) -> bool:
    """Whether a collective failed, so that the cause is in another process."""
    import torch.distributed as dist

    if isinstance(error, LlamaHomeError):
        return False
    if isinstance(error, dist.DistError):
        return True
    return isinstance(error, RuntimeError) and any(mark in str(error) for mark in _PEER_MARKS)


def collectives_done() -> int:
    """How many collectives this rank has begun: of ranks that wait for each other, the last has the fewest."""
    import torch.distributed as dist

    group = dist.group.WORLD
    return int(group._get_sequence_number_for_group()) if group is not None else 0  # type: ignore[attr-defined]


def sum_gradients(parameters: Sequence[torch.nn.Parameter], bucket_bytes: int = 32 << 20) -> None:
    """Sum the gradients of replicated parameters over the ranks, in place, in buckets of at most `bucket_bytes`.

    A rank that had no sample for a parameter counts as zero. Every rank must hold the same parameters in the same
    order; one reduction a bucket instead of one a tensor, which are small with LoRA.
    """
    import torch
    import torch.distributed as dist

    for parameter in parameters:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    for bucket in _buckets([p.grad for p in parameters if p.grad is not None], bucket_bytes):
        flat = torch.cat([gradient.flatten() for gradient in bucket])
        dist.all_reduce(flat)
        for gradient, part in zip(bucket, torch.split(flat, [g.numel() for g in bucket]), strict=True):
            gradient.copy_(part.view_as(gradient))


def _buckets(gradients: Sequence[torch.Tensor], limit: int) -> Iterator[list[torch.Tensor]]:
    bucket: list[torch.Tensor] = []
    for gradient in gradients:
        full = sum(g.nbytes for g in bucket) + gradient.nbytes > limit
        if bucket and (full or bucket[0].dtype != gradient.dtype):
            yield bucket
            bucket = []
        bucket.append(gradient)
    if bucket:
        yield bucket
