"""What the training loop does together with the other ranks of its run; alone it does nothing."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import nn

from llamahome.distributed.ranks import ALONE, Ranks, sum_gradients
from llamahome.memory.agree import agree_on_budget
from llamahome.training.step import Gradient

Strategy = Literal["alone", "replicate", "shard"]


def _nothing() -> None:
    return None


@dataclass(frozen=True)
class Team:
    """The ranks of a run and how they share the model.

    replicate: each holds all of it, and the trained gradients are summed once a step.
    shard: FSDP2; the ranks meet in every layer, so that all need the same number of micro-batches.
    """

    ranks: Ranks = ALONE
    strategy: Strategy = "alone"
    progress: Callable[[], None] = field(default=_nothing, compare=False)

    @property
    def in_lockstep(self) -> bool:
        """Whether a rank that falls out inside a step leaves the others waiting."""
        return self.strategy == "shard"

    def budget(self, tokens: int | None) -> int | None:
        """The token budget that all ranks cut this step by: the smallest of theirs."""
        return tokens if tokens is None or not self.ranks.several else agree_on_budget(tokens)

    def combine(self, gradient: Gradient, parameters: Sequence[nn.Parameter], seconds: float) -> dict[str, Any]:
        """Make one rank's `gradient` that of the step: loss, counts and, unless FSDP did, the parameters' gradients.

        `seconds` are what this rank's forward and backward took. Returns fields for the step's record:
        token_imbalance, the largest share of tokens over the mean, minus 1; rank_wait_seconds, how long the ranks
        waited on average for the slowest (None under FSDP, where they wait in every layer).
        """
        if not self.ranks.several:
            return {}
        if self.strategy == "replicate":
            sum_gradients(parameters)
        most, waited, slowest, largest = self.ranks.largest(
            [gradient.tokens, gradient.wait_seconds, seconds, gradient.micro_batch_tokens]
        )
        loss, tokens, padding, micro_batches, total_seconds = self.ranks.sum(
            [float(gradient.loss), gradient.tokens, gradient.padding_tokens, gradient.micro_batches, seconds]
        )
        gradient.loss = gradient.loss.new_tensor(loss)
        gradient.tokens, gradient.padding_tokens = int(tokens), int(padding)
        gradient.micro_batches, gradient.micro_batch_tokens = int(micro_batches), int(largest)
        gradient.wait_seconds = waited
        size = self.ranks.size
        return {
            "token_imbalance": most * size / max(1.0, tokens) - 1,
            "rank_wait_seconds": slowest - total_seconds / size if self.strategy == "replicate" else None,
        }


SINGLE = Team()
