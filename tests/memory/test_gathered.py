"""What a rank of FSDP2 holds at most in a step, counted in its real code with ranks that only this process pretends."""

from __future__ import annotations

from collections.abc import Iterator
from functools import partial
from typing import Any

import pytest
import torch
import torch.distributed as dist

from llamahome import kernels
from llamahome.config import Config
from llamahome.distributed.shard import build_mesh, shard_model
from llamahome.kernels import attention_native
from llamahome.memory.plan import FIRST_STEP_BYTES, plan_memory
from llamahome.memory.tracer import PeakTracker
from llamahome.model.adapters import apply_adapter, without_input_casts
from llamahome.model.attention import NAME, register
from llamahome.model.fuse import fuse
from llamahome.training.objective import Objective, flat_row
from llamahome.training.precision import Precision

RANKS, CHUNK = 4, 128
SHAPE = {
    "hidden_size": 512, "intermediate_size": 1536, "num_hidden_layers": 6, "num_attention_heads": 8,
    "num_key_value_heads": 4, "tie_word_embeddings": False,
}  # fmt: skip


@pytest.fixture(scope="module", autouse=True)
def group() -> Iterator[None]:
    """Collectives that return at once and move nothing: rank 0 of four."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


def measured(method: str, vocabulary: int, tokens: int, *, reshard: bool) -> int:
    """Peak bytes of rank 0's tensors in a second step of two micro-batches."""
    from transformers import LlamaConfig, LlamaForCausalLM

    register()
    full = method == "full"
    model = LlamaForCausalLM._from_config(
        LlamaConfig(**SHAPE, vocab_size=vocabulary), attn_implementation=NAME,
        dtype=torch.float32 if full else torch.bfloat16,
    )  # fmt: skip
    model = apply_adapter(model, Config.load(None, {"training.method": method}))
    fuse(model)
    causal = model if full else model.get_base_model()
    enter = shard_model(
        causal, list(causal.model.layers), build_mesh("cpu", RANKS, 1), compute=torch.bfloat16 if full else None,
        trained=torch.float32 if full else None, reshard=reshard,
    )  # fmt: skip
    objective = Objective(model.train(), partial(kernels.linear_cross_entropy, chunk_rows=CHUNK), enter)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad])
    precision, batch = Precision("bf16", "cpu"), flat_row([[1] * tokens])
    with PeakTracker(resizing=True) as counter:
        counter.count([*model.parameters(), *model.buffers()])
        for _ in range(2):
            counter.take_peak()
            for _ in range(2):
                with without_input_casts(model, precision.lowers), precision.autocast():
                    loss = objective(batch)
                loss.backward()
            optimizer.step()
            optimizer.zero_grad()
    return counter.peak_bytes


CASES: list[Any] = [("full", 4096, 512, True)]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (("full", 4096, 512, False), ("lora", 16384, 1024, True), ("lora", 16384, 1024, False))
]


@pytest.mark.parametrize(("method", "vocabulary", "tokens", "reshard"), CASES)
def test_a_ranks_plan_is_what_its_tensors_take(
    method: Any, vocabulary: int, tokens: int, reshard: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    # A plan holds for every processor; attention in C++, where it runs, takes less than ATen's.
    monkeypatch.setattr(attention_native, "_NATIVE", {})
    plan = plan_memory(
        {**SHAPE, "model_type": "llama", "vocab_size": vocabulary}, method=method, lora=Config().lora, fused=True,
        ranks=RANKS, reshard=reshard, micro_batch_tokens=tokens, loss_chunk=CHUNK, process_bytes=-FIRST_STEP_BYTES,
    )  # fmt: skip
    assert plan.live == pytest.approx(measured(method, vocabulary, tokens, reshard=reshard), rel=0.08)
