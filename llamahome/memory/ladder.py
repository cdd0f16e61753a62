"""What is tried, in this order, when the longest sample does not fit: nothing here changes the mathematics."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass

from llamahome.memory.plan import MemoryPlan, default_loss_rows

logger = logging.getLogger(__name__)
SMALL_LOSS_CHUNK = 128


@dataclass(frozen=True)
class Rung:
    """Settings that save memory and cost time."""

    loss_chunk: int
    gradient_checkpointing: bool = False
    offload: bool = False

    def __str__(self) -> str:
        """Only what is spent: for a line that says what was turned on."""
        words = [f"processing.loss_chunk {self.loss_chunk}"]
        words += ["processing.gradient_checkpointing on"] * self.gradient_checkpointing
        return ", ".join([*words, *["kept activations in host memory"] * self.offload])


def rungs(vocabulary: int, *, loss_chunk: int, checkpointing: bool | str, device: str) -> Iterator[Rung]:
    """The ladder from the fastest settings to the smallest; what the user decided stays as it is.

    `loss_chunk` 0 and `checkpointing` "auto" are open. Activations are moved out of a GPU's memory only: beside a
    CPU there is no other memory, and disks are too slow to hold what each layer keeps.
    """
    chunks = [loss_chunk] if loss_chunk else [default_loss_rows(vocabulary, device), SMALL_LOSS_CHUNK]
    for chunk in dict.fromkeys(chunks):
        yield Rung(chunk, checkpointing is True)
    if checkpointing == "auto":
        yield Rung(chunks[-1], gradient_checkpointing=True)
    if device.partition(":")[0] == "cuda":
        yield Rung(chunks[-1], gradient_checkpointing=checkpointing is not False, offload=True)


def climb(
    ladder: Sequence[Rung], build: Callable[[Rung], MemoryPlan], *, limit_bytes: int, longest_sample: int
) -> MemoryPlan:
    """The plan of the first rung with which the longest sample fits into `limit_bytes`, or else of the last rung."""
    plan = build(ladder[0])
    for number, rung in enumerate(ladder):
        plan = build(rung)
        if plan.at(longest_sample).total <= limit_bytes:
            if number:
                logger.info("memory is short: %s", rung)
            return plan
    return plan


def savings(plan: MemoryPlan, *, longest: int, missing: int) -> list[str]:
    """Settings that would make a plan fit, each for itself; `longest` tokens would, `missing` bytes are too many.

    These change what is trained or how long it takes, so they are advice and never taken by themselves.
    """
    advice = [f"set data.max_length to {longest // 16 * 16}"] if longest >= 64 else []
    if not plan.gradient_checkpointing:
        advice.append("set processing.gradient_checkpointing: true")
    if plan.adapters and plan.weights - plan.quantized_weights > missing:
        advice.append("set training.method: qlora")
    return advice
