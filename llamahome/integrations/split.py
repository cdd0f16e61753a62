"""A batch of any loop, run in parts that fit the governor's budget, and in smaller ones after running out of memory."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.memory.governor import MemoryGovernor
from llamahome.memory.oom import OOMHandler, is_oom

Batch = Mapping[str, Any]


class GovernedBatch:
    """Forward and backward over batches of a loop that is not the engine's.

        governed = GovernedBatch(governor, model.parameters(), on_event=print)
        loss = governed.run(batch, lambda part: backward(model(**part)), step=step)
        optimizer.step()
        governed.observe()

    `run` cuts the batch's rows so that padded tokens stay within `governor.token_budget`. After an out-of-memory the
    gradients of this batch are dropped, those of earlier ones are kept, and the same rows run again in smaller parts,
    with the same random numbers. `on_event` receives each change as a plain dict.
    """

    def __init__(
        self, governor: MemoryGovernor, parameters: Iterable[nn.Parameter], *,
        on_event: Callable[[dict[str, Any]], None] = lambda event: None,
    ) -> None:  # fmt: skip
        self.governor, self.on_event = governor, on_event
        self._parameters = [p for p in parameters if p.requires_grad]
        self._handler = OOMHandler(governor)
        self._largest = 0

    def run(self, batch: Batch, backward: Callable[[dict[str, Any]], Tensor], *, step: int = 0) -> Tensor:
        """The sum of what `backward` gives for each part; it must make the part's gradient and return its summed loss.

        The sum is the whole batch's only if each part's loss is divided by the whole batch's tokens, not its own.
        Raises: MemoryLimitError when one row alone does not fit.
        """
        earlier = [p.grad for p in self._parameters]
        random = torch.random.get_rng_state()
        while True:
            self._drop_gradients()
            try:
                loss = self._run_parts(batch, backward)
                break
            except Exception as error:
                if not is_oom(error):
                    raise
                failure = error.with_traceback(None)  # the frames hold the activations
            self._drop_gradients()
            torch.random.set_rng_state(random)
            for event in self._handler.handle(failure, micro_batch_tokens=self._largest, step=step):
                self.on_event(event)
        self._add(earlier)
        return loss

    def observe(self) -> None:
        """Let the governor learn from the step's peak; call it once per optimizer step."""
        if self._largest:
            event = self.governor.observe(micro_batch_tokens=self._largest)
            if event is not None:
                self.on_event(event)
        self._largest = 0

    def _run_parts(self, batch: Batch, backward: Callable[[dict[str, Any]], Tensor]) -> Tensor:
        losses = []
        self._largest = 0
        for part in split_rows(batch, self.governor.token_budget):
            self._largest = max(self._largest, part["input_ids"].numel())
            losses.append(backward(part).detach())
        return torch.stack(losses).sum()

    def _drop_gradients(self) -> None:
        for parameter in self._parameters:
            parameter.grad = None

    def _add(self, earlier: Iterable[Tensor | None]) -> None:
        for parameter, grad in zip(self._parameters, earlier, strict=True):
            if grad is not None:
                parameter.grad = grad if parameter.grad is None else grad.add_(parameter.grad)


def split_rows(batch: Batch, token_budget: int) -> Iterator[dict[str, Any]]:
    """Parts of a padded batch with at most `token_budget` tokens, one row at least.

    `input_ids` is [B, T]; every other tensor whose first size is B is cut with it, the rest goes along.
    """
    rows, width = batch["input_ids"].shape
    size = max(1, token_budget // width)
    for begin in range(0, rows, size):
        yield {
            name: value[begin : begin + size] if isinstance(value, Tensor) and value.shape[:1] == (rows,) else value
            for name, value in batch.items()
        }
