"""The engine's attention as an implementation that transformers knows by the name "llamahome"."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from llamahome.errors import ModelError
from llamahome.kernels import varlen_attention

NAME = "llamahome"


def register() -> None:
    """Make the name known to transformers, through its own registry."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, attention_forward)


def attention_forward(
    module: nn.Module, query: Tensor, key: Tensor, value: Tensor, attention_mask: Tensor | None, scaling: float,
    dropout: float = 0.0, cu_seq_lens_q: Tensor | None = None, sliding_window: int | None = None,
    softcap: float | None = None, s_aux: Tensor | None = None, **kwargs: Any,
) -> tuple[Tensor, None]:  # fmt: skip
    """Attention over flat rows: query [B, Hq, T, D], key and value [B, Hk, T, D] -> [B, T, Hq, D].

    Without `cu_seq_lens_q` each of the B rows is one sample. Raises: ModelError for what it does not do
    (attention dropout, sinks, a key-value cache, masks). Other keyword arguments are transformers' own and mean nothing
    here.
    """
    batch, length = query.shape[0], query.shape[2]
    if dropout or s_aux is not None or attention_mask is not None or key.shape[2] != length:
        raise ModelError(
            f"attention of {type(module).__name__} with dropout, sinks, masks or a cache is not done by {NAME!r}",
            where="processing.attention", fix="set processing.attention: sdpa",
        )  # fmt: skip
    if cu_seq_lens_q is None:
        cu_seq_lens_q = torch.arange(0, (batch + 1) * length, length, dtype=torch.int32, device=query.device)
    elif len(cu_seq_lens_q) < 2:  # accelerate's dispatcher cuts every tensor of a batch to the rows of the first
        raise ModelError(
            "the bounds of the samples in a row were cut off", where="cu_seq_lens_q",
            fix='set accelerator_config={"dispatch_batches": False} in the TrainingArguments',
        )  # fmt: skip
    # As autocast does for SDPA: RoPE gives fp32 queries and keys beside values in the low precision.
    device = query.device.type
    dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else query.dtype
    flat = [x.to(dtype).transpose(1, 2).flatten(0, 1) for x in (query, key, value)]
    out: Tensor = varlen_attention(*flat, cu_seq_lens_q, scaling, sliding_window or 0, softcap or 0.0)
    return out.view(batch, length, *out.shape[1:]), None


@contextmanager
def standard_attention(model: Any) -> Iterator[None]:
    """transformers' own attention for a while: generation needs masks and a key-value cache."""
    before = model.config._attn_implementation
    model.set_attn_implementation("sdpa")
    try:
        yield
    finally:
        model.set_attn_implementation(before)
