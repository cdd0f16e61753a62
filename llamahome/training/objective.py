"""From a micro-batch to its summed loss: decoder, trained tokens only, output projection fused with the loss."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from llamahome import kernels
from llamahome.data.batch import MicroBatch
from llamahome.errors import ConfigError, ModelError
from llamahome.model.attention import NAME
from llamahome.plugins import load_object
from llamahome.training.callbacks import own_code


class LossFunction(Protocol):
    """A loss over trained tokens, summed: the engine divides by the whole step's trained tokens.

    `hidden` [N, h] are the decoder's outputs at the N tokens whose successors are `labels` int64 [N];
    `weight` [V, h] and `bias` [V] or None are the output projection.
    """

    def __call__(
        self, hidden: Tensor, weight: Tensor, labels: Tensor, *, bias: Tensor | None, logit_scale: float,
        softcap: float, reduction: str,
    ) -> Tensor: ...  # fmt: skip


def _call(function: Callable[..., Any], *arguments: Any) -> Any:
    return function(*arguments)


@dataclass(frozen=True)
class Objective:
    """A causal language model seen as decoder, output projection and loss."""

    model: Any
    loss: LossFunction = kernels.linear_cross_entropy
    # Runs a function while the parameters it uses are whole; a model that is shared out over ranks brings its own.
    enter: Callable[..., Any] = _call

    @cached_property
    def causal(self) -> Any:
        """The transformers model itself, without PEFT's wrapper."""
        return self.model.get_base_model() if hasattr(self.model, "peft_config") else self.model

    @cached_property
    def head(self) -> nn.Linear:
        head = self.causal.get_output_embeddings()
        if type(head) is not nn.Linear:
            raise ConfigError(
                f"the output projection is a {type(head).__name__}, a plain linear layer is needed",
                where="lora.target_modules", fix="leave the output projection out of lora.target_modules",
            )  # fmt: skip
        return head

    @cached_property
    def projection(self) -> dict[str, Any]:
        """How this architecture makes logits from the output projection."""
        config = self.causal.config.get_text_config()
        scale = getattr(config, "logit_scale", None) or 1.0
        divisor = getattr(config, "logits_scaling", None) or 1.0
        softcap = getattr(config, "final_logit_softcapping", None) or 0.0
        return {"bias": self.head.bias, "logit_scale": scale / divisor, "softcap": softcap}

    @cached_property
    def packs(self) -> bool:
        """Whether samples that share a row leave each other alone in this model, tried once on a few tokens."""
        return respects_boundaries(self)

    @property
    def rounds_rows(self) -> bool:
        """Whether rows may be filled up at their end: only the engine's attention leaves such tokens out."""
        return self.packs and self.causal.config._attn_implementation == NAME

    def trained_hidden(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Hidden states [N, h] at the tokens whose successors are trained, and these successors [N]."""
        # Found where the batch was built, so that a GPU is not waited for.
        rows = (batch.labels[0, 1:] != kernels.IGNORE_INDEX).nonzero().squeeze(1)
        labels = batch.labels[0, 1:][rows]
        device = self.head.weight.device
        hidden = decode(self.causal, batch.to(device))
        return hidden[0].index_select(0, rows.to(device)), labels.to(device)

    def __call__(self, batch: MicroBatch) -> Tensor:
        """The summed loss, a scalar in fp32."""
        loss: Tensor = self.enter(self._summed, batch)
        return loss

    def statistics(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        """Summed loss and number of tokens predicted right, without gradients."""
        found: tuple[Tensor, Tensor] = self.enter(self._statistics, batch)
        return found

    def _summed(self, batch: MicroBatch) -> Tensor:
        hidden, labels = self.trained_hidden(batch)
        return self.loss(hidden, self.head.weight, labels, reduction="sum", **self.projection)

    def _statistics(self, batch: MicroBatch) -> tuple[Tensor, Tensor]:
        hidden, labels = self.trained_hidden(batch)
        loss, correct = kernels.token_statistics(hidden, self.head.weight, labels, **self.projection)
        return loss, correct


def build_objective(
    model: Any, loss: str | LossFunction = "cross_entropy", *, chunk_rows: int = 0,
    enter: Callable[..., Any] | None = None,
) -> Objective:  # fmt: skip
    """The objective for `model`, proved against the model's own logits on a few tokens.

    `loss` is a function, a name or `module:object`; `chunk_rows` the rows of logits that exist at a time, 0 chooses;
    `enter` is `shard_model`'s, for a model that is shared out.
    Raises: ModelError when the architecture changes its logits in a way that is not known here.
    """
    known: dict[str, LossFunction] = {"cross_entropy": partial(kernels.linear_cross_entropy, chunk_rows=chunk_rows)}
    found = load_object(loss, key="training.loss", known=known)
    objective = Objective(model, found if found in known.values() else _guarded(found), enter or _call)
    _check_projection(objective)
    return objective


def _guarded(loss: LossFunction) -> LossFunction:
    """A loss of the user's own, whose faults are named."""

    def call(*arguments: Any, **options: Any) -> Tensor:
        with own_code(loss, "training.loss"):
            value = loss(*arguments, **options)
            if not isinstance(value, Tensor) or value.dim():
                raise TypeError(f"it gave {type(value).__name__} {getattr(value, 'shape', value)}, not one number")
        return value

    return call


def decode(causal: Any, batch: MicroBatch) -> Tensor:
    """The decoder's last hidden states [1, T, h] of one flat row."""
    implementation = causal.config._attn_implementation or ""
    lengths: dict[str, Any] = {"cu_seq_lens_q": batch.cu_seqlens, "cu_seq_lens_k": batch.cu_seqlens}
    if implementation.startswith("flash"):
        longest = max(batch.lengths)
        lengths |= {"max_length_q": longest, "max_length_k": longest}
    elif implementation != NAME:
        lengths = {}
    output = causal.base_model(input_ids=batch.input_ids, position_ids=batch.position_ids, use_cache=False, **lengths)
    hidden: Tensor = output.last_hidden_state
    return hidden


def flat_row(samples: list[list[int]]) -> MicroBatch:
    """A micro-batch from token ids, all of them trained."""
    lengths = tuple(len(ids) for ids in samples)
    labels = [label for ids in samples for label in (-100, *ids[1:])]
    edges = [0]
    for length in lengths:
        edges.append(edges[-1] + length)
    return MicroBatch(
        input_ids=torch.tensor([[i for ids in samples for i in ids]]),
        labels=torch.tensor([labels]),
        position_ids=torch.tensor([[p for n in lengths for p in range(n)]]),
        cu_seqlens=torch.tensor(edges, dtype=torch.int32),
        lengths=lengths,
        sample_ids=tuple(range(len(samples))),
        num_tokens=sum(lengths),
        num_trained=sum(n - 1 for n in lengths),
    )


def respects_boundaries(objective: Objective, batch_of: Callable[[list[list[int]]], MicroBatch] = flat_row) -> bool:
    """Whether two samples packed in one row leave each other alone, tried on a few tokens."""
    first, second = [[5, 6, 7, 8, 9], [9, 8, 7, 6]]
    with evaluating(objective.model), torch.no_grad():
        device = objective.head.weight.device
        packed = objective.enter(decode, objective.causal, batch_of([first, second]).to(device))
        alone = objective.enter(decode, objective.causal, batch_of([second]).to(device))
    return bool(torch.allclose(packed[:, len(first) :].float(), alone.float(), rtol=1e-2, atol=1e-2))


def _check_projection(objective: Objective) -> None:
    causal, head = objective.causal, objective.head
    ids = torch.arange(5, 9, device=head.weight.device)[None]
    labels = torch.zeros(4, dtype=torch.int64, device=ids.device)

    def both() -> tuple[Tensor, Tensor]:
        hidden = causal.base_model(input_ids=ids, use_cache=False).last_hidden_state[0]
        logits = causal.forward(input_ids=ids, use_cache=False).logits[0].float()
        return kernels.token_statistics(hidden, head.weight, labels, **objective.projection)[0], logits

    with evaluating(objective.model), torch.no_grad():
        ours, theirs = objective.enter(both)
    expected = nn.functional.cross_entropy(theirs, labels, reduction="sum")
    if not torch.allclose(ours.float(), expected, rtol=1e-2, atol=1e-2):
        raise ModelError(
            f"{type(causal).__name__} changes its logits after the output projection in a way that is not supported",
            fix="use another model",
        )


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """The model in evaluation mode for a while."""
    was_training = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(was_training)
