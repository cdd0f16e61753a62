"""512 GPUs planned on a laptop: by formula from config.json alone, and one rank's real code with fake tensors."""

from __future__ import annotations

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist
from click.testing import CliRunner

from llamahome.cli import cli
from llamahome.commands.plan import comparable
from llamahome.config import Config
from llamahome.errors import ConfigError
from llamahome.memory.plan import plan_memory
from llamahome.training.confirm import traced_bytes
from llamahome.training.precision import Precision

RANKS = 512
LLAMA_70B = {
    "model_type": "llama", "hidden_size": 8192, "intermediate_size": 28672, "num_hidden_layers": 80,
    "num_attention_heads": 64, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
PARAMETERS = 70_553_706_496  # Meta's Llama 3 70B


def planned(folder: Path, gpus: int, *more: str) -> dict[str, Any]:
    (folder / "config.json").write_text(json.dumps(LLAMA_70B))
    words = ["plan", "--tokens", "1000000000", "--model", str(folder), "--gpus", str(gpus), "--gpu-memory", "80GB"]
    done = CliRunner().invoke(cli, [*words, "--json", "--set", "training.method=full", *more])
    if isinstance(done.exception, ConfigError):
        raise done.exception
    assert done.exit_code == 0, done.output
    facts: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return facts


def test_a_configuration_is_enough_for_70b_on_512_gpus(tmp_path: Path) -> None:
    many, fewer = planned(tmp_path, RANKS), planned(tmp_path, RANKS // 8)
    assert (many["ranks"], many["fits"]) == (RANKS, True)
    for part, size in (("weights", 4), ("gradients", 4), ("optimizer", 8)):
        assert many[part] == pytest.approx(size * PARAMETERS / RANKS, rel=1e-3), part
        assert fewer[part] == pytest.approx(8 * many[part], rel=1e-6), part
    assert many["gathered"] == fewer["gathered"]
    assert many["total"] <= many["limit_bytes"] < 80e9
    assert many["seconds"] < fewer["seconds"]


def test_the_groups_of_hsdp_hold_a_whole_model_each(tmp_path: Path) -> None:
    groups, alone = planned(tmp_path, RANKS, "--set", "distributed.replicas=8"), planned(tmp_path, RANKS // 8)
    assert groups["ranks"] == RANKS
    assert [groups[part] for part in ("weights", "gradients", "total")] == [
        alone[part] for part in ("weights", "gradients", "total")
    ]
    assert groups["seconds"] == pytest.approx(alone["seconds"] / 8)
    with pytest.raises(ConfigError, match="512 GPUs cannot be divided by 7"):
        planned(tmp_path, RANKS, "--set", "distributed.replicas=7")


CASES: list[Any] = [("full", 8, False, 2048, {})]
CASES += [
    pytest.param(*case, marks=pytest.mark.slow)
    for case in (
        ("full", 512, True, 8192, {}), ("full", 8, True, 4096, {"distributed.reshard": False}),
        ("full", 64, 67, 8192, {"distributed.replicas": 8}), ("lora", 8, False, 2048, {}),
        ("lora", 512, True, 8192, {}), ("lora", 8, True, 4096, {"distributed.reshard": False}),
        ("lora", 64, False, 8192, {"recompute_mlp": True}),
    )
]  # fmt: skip


@pytest.mark.parametrize(("method", "ranks", "checkpointing", "tokens", "settings"), CASES)
def test_a_ranks_own_code_takes_what_is_planned(
    method: Any, ranks: int, checkpointing: Any, tokens: int, settings: dict[str, Any]
) -> None:
    """The 70B model's layers under FSDP2, with a process group that is pretended and tensors that hold nothing."""
    recompute_mlp = {"recompute_mlp": settings.get("recompute_mlp", False)}
    given = {key: value for key, value in settings.items() if "." in key}
    config = Config.load(None, {"training.method": method, **given})
    traced = traced_bytes(
        LLAMA_70B, config, Precision("bf16", "cpu"), tokens=tokens, checkpointing=checkpointing, ranks=ranks,
        replicas=config.distributed.replicas, **recompute_mlp,
    )  # fmt: skip
    plan = plan_memory(
        LLAMA_70B, method=method, micro_batch_tokens=tokens, gradient_checkpointing=checkpointing, fused=True,
        ranks=ranks, reshard=config.distributed.reshard, device="cuda", **recompute_mlp,
    )  # fmt: skip
    assert not dist.is_initialized()
    assert comparable(plan) == pytest.approx(traced, rel=0.1)


@pytest.mark.slow
def test_the_command_confirms_a_plan_of_many(tmp_path: Path) -> None:
    facts = planned(tmp_path, RANKS, "--confirm", "--set", "data.max_length=8192")
    assert facts["comparable_bytes"] == pytest.approx(facts["traced_bytes"], rel=0.1)


@pytest.fixture
def group() -> Iterator[None]:
    """Collectives that return at once and move nothing: rank 0 of 512."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=RANKS, store=FakeStore())
    yield
    dist.destroy_process_group()


@pytest.mark.slow
def test_a_rank_of_512_holds_its_part_of_each_weight(group: None) -> None:
    """FSDP2 on fake tensors: two layers of the 70B model. 128,256 rows do not divide evenly: rank 0 has some more."""
    import torch
    from torch._subclasses.fake_tensor import FakeTensorMode
    from transformers import LlamaConfig, LlamaForCausalLM

    from llamahome.distributed.shard import build_mesh, local_bytes, shard_model

    mesh = build_mesh("cpu", RANKS, 1)
    with FakeTensorMode():
        model = LlamaForCausalLM(LlamaConfig(**LLAMA_70B | {"num_hidden_layers": 2}))
        enter = shard_model(model, list(model.model.layers), mesh, compute=torch.bfloat16)
        whole = sum(parameter.numel() for parameter in model.parameters())
        assert local_bytes(model.parameters()) == pytest.approx(4 * whole / RANKS, rel=2e-3)
        hidden = enter(lambda: model.model(torch.zeros(1, 64, dtype=torch.int64)).last_hidden_state)
        assert hidden.shape == (1, 64, 8192)
        hidden.sum().backward()
        gradients = [parameter.grad for parameter in model.model.parameters() if parameter.grad is not None]
        layers = whole - 128256 * 8192  # all but the output projection, which has no part in this
        assert local_bytes(gradients) == pytest.approx(4 * layers / RANKS, rel=2e-3)
