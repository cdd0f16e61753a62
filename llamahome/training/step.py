"""One optimizer step: the samples of the step, cut into micro-batches, give one summed gradient."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from llamahome.data.batch import BatchProcessor, MicroBatch
from llamahome.data.dataset import StepOrder
from llamahome.data.store import TokenStore
from llamahome.distributed.deal import deal, even_out
from llamahome.distributed.shard import whole

Ids = NDArray[np.int64]


@dataclass(frozen=True)
class StepBatches:
    """The samples of every step, and how a step's samples become micro-batches.

    Of several `ranks` each gets its share of the same samples, dealt by length; `in_lockstep` all of them get the same
    number of micro-batches, some of them empty where there are too few samples.
    """

    store: TokenStore
    order: StepOrder
    processor: BatchProcessor
    max_samples: int | None = None
    place: Callable[[int], str] = "sample {}".format
    read_ahead: int = 2
    rank: int = 0
    ranks: int = 1
    in_lockstep: bool = False

    def cut(self, samples: Ids, token_budget: int | None) -> list[Ids]:
        """This rank's micro-batches: at most `max_samples` samples and, as far as whole samples go, `token_budget`."""
        if self.ranks == 1:
            return self._cut(samples, token_budget)
        shares = [samples[share] for share in deal(self.store.lengths(samples), self.ranks)]
        own = self._cut(shares[self.rank], token_budget)
        if not self.in_lockstep:
            return own
        return even_out(own, max(len(self._cut(share, token_budget)) for share in shares))

    def build(self, ids: Ids) -> MicroBatch:
        """The tensors of a micro-batch. An empty one is some sample of which nothing is trained and all is padding."""
        if len(ids):
            return self.processor.build(ids)
        filling = self.processor.build(np.array([int(self.store.lengths().argmin())]))
        return replace(filling, labels=torch.full_like(filling.labels, -100), num_tokens=0, num_trained=0)

    def _cut(self, samples: Ids, token_budget: int | None) -> list[Ids]:
        if not len(samples):
            return []
        return self.processor.cut(samples, token_budget=token_budget, max_samples=self.max_samples)

    def prefetch(self, step: int, first: bool) -> None:
        """Begin to read the samples `read_ahead` steps ahead of `step`; at the `first` step all up to there."""
        for ahead in range(1 if first else self.read_ahead, self.read_ahead + 1):
            self.store.prefetch(self.order.samples(step + ahead))

    def trained_tokens(self, samples: Ids) -> int:
        """Tokens of these samples that count in the loss."""
        return int(self.store.trained_counts(samples).sum())


@dataclass
class Gradient:
    """What forward and backward over one step gave; the gradients themselves are in the parameters."""

    loss: Tensor
    tokens: int = 0
    padding_tokens: int = 0
    micro_batches: int = 0
    micro_batch_tokens: int = 0
    wait_seconds: float = 0.0
    micro_losses: list[Tensor] = field(default_factory=list)


def accumulate(
    objective: Callable[[MicroBatch], Tensor], cut: Sequence[Ids], build: Callable[[Ids], MicroBatch],
    num_trained: int, scale: Callable[[Tensor], Tensor] = lambda loss: loss,
) -> Gradient:  # fmt: skip
    """Forward and backward over all micro-batches of a step.

    Each summed loss is divided by the trained tokens of the whole step, so that the gradient does not depend on
    the cut. `scale` is the loss scaler's, for fp16.
    """
    total = Gradient(torch.zeros(()))
    for ids in cut:
        started = time.perf_counter()
        batch = build(ids)
        total.wait_seconds += time.perf_counter() - started
        loss = objective(batch) / num_trained
        scale(loss).backward()  # type: ignore[no-untyped-call]
        loss = loss.detach()
        total.loss = total.loss.to(loss.device) + loss
        total.micro_losses.append(loss)
        total.tokens += batch.num_tokens
        total.padding_tokens += batch.input_ids.numel() - batch.num_tokens
        total.micro_batches += 1
        total.micro_batch_tokens = max(total.micro_batch_tokens, batch.num_tokens)
    return total


def clip_gradients(parameters: Iterable[nn.Parameter], max_norm: float | None) -> Tensor:
    """The norm of all gradients together, over all ranks; they are scaled down to `max_norm` where it is larger."""
    parameters = [p for p in parameters if p.grad is not None]
    norm = whole(nn.utils.get_total_norm([p.grad for p in parameters if p.grad is not None]))
    if max_norm and bool(torch.isfinite(norm)):
        nn.utils.clip_grads_with_norm_(parameters, max_norm, norm)
    return norm


def seed_step(seed: int, step: int, rank: int = 0) -> None:
    """Set torch's random state from the run's seed, the step and the rank: a replay draws the same numbers."""
    name = f"{seed}/{step}/{rank}" if rank else f"{seed}/{step}"
    digest = hashlib.blake2b(name.encode(), digest_size=8).digest()
    torch.manual_seed(int.from_bytes(digest, "little") >> 1)
