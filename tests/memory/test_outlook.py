"""What a plan says about a run: ladder, advice, limits, ranks, and agreement with a traced step."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llamahome.cli import cli
from llamahome.config import Config
from llamahome.memory.ladder import SMALL_LOSS_CHUNK, Machine, Rung, Workload, climb, rungs
from llamahome.memory.layers import Adapter, kept_per_token
from llamahome.memory.outlook import datasheet, look_ahead
from llamahome.memory.plan import MemoryPlan, default_loss_rows, plan_memory
from llamahome.memory.shape import model_shape

LLAMA_8B = {
    "model_type": "llama", "hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
    "num_attention_heads": 32, "num_key_value_heads": 8, "vocab_size": 128256, "tie_word_embeddings": False,
}  # fmt: skip
GB = 10**9


def look(limit: float, *, device: str = "cuda", ranks: int = 1, longest: int = 2048, **settings: Any) -> Any:
    machine = Machine(device, int(limit), ranks, peak_flops=312e12)
    work = Workload(longest=longest, step_tokens=16 * longest, tokens=10**7)
    config = Config.load(None, {key.replace("__", "."): value for key, value in settings.items()})
    return look_ahead(LLAMA_8B, config, machine, work, precision="bf16", fused=True)


def test_fused_layers_keep_what_their_formula_says() -> None:
    shape = model_shape(LLAMA_8B)
    h, f, kv, hq, r = 4096, 14336, 1024, 32, 16
    kept = kept_per_token(shape, Adapter(rank=r), low=True, trains_base=False, fused=True)
    assert kept == 8 * h + 4 * f + 4 * kv + 4 * hq + 14 * r + 8 == 94_568


def test_the_ladder_goes_from_fast_to_small_and_keeps_what_was_asked_for() -> None:
    def ladder(**settings: Any) -> list[Rung]:
        settings = {"loss_chunk": 0, "checkpointing": "auto", "device": "cuda"} | settings
        return list(rungs(model_shape(LLAMA_8B), **settings))

    default, small = default_loss_rows(128_256, "cuda"), SMALL_LOSS_CHUNK
    slowest = [Rung(small, gradient_checkpointing=True), Rung(small, gradient_checkpointing=True, offload=True)]
    some = [Rung(small, gradient_checkpointing=layers) for layers in range(1, 32)]
    assert ladder() == [Rung(default), Rung(small), *some, *slowest]
    # Gate and up are 54 % of a layer's weights: as much arithmetic as 17.2 of 32 layers.
    some.insert(17, Rung(small, recompute_mlp=True))
    assert ladder(fused=True) == [Rung(default), Rung(small), *some, *slowest]
    assert [rung.gradient_checkpointing for rung in ladder(checkpointing=5)] == [5, 5, 5]
    assert not any(rung.recompute_mlp for rung in ladder(fused=True, checkpointing=False))
    assert not any(rung.offload for rung in ladder(device="cpu"))
    assert {rung.loss_chunk for rung in ladder(loss_chunk=512)} == {512}
    assert not any(rung.gradient_checkpointing for rung in ladder(checkpointing=False))
    assert all(rung.gradient_checkpointing for rung in ladder(checkpointing=True))


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_each_rung_needs_less_and_the_first_that_fits_is_taken(device: str) -> None:
    ladder = list(rungs(model_shape(LLAMA_8B), loss_chunk=0, checkpointing="auto", device=device, fused=True))

    def build(rung: Rung) -> MemoryPlan:
        return plan_memory(LLAMA_8B, max_length=4096, fused=True, device=device, **vars(rung))

    needs = [build(rung).total for rung in ladder]
    layers = [build(rung).total for rung in ladder if not rung.recompute_mlp]
    assert layers == sorted(layers, reverse=True)
    for need in needs:
        first = next(found for found in needs if found <= need)
        assert climb(ladder, build, limit_bytes=need, longest_sample=4096).total == first
    assert climb(ladder, build, limit_bytes=needs[-1] // 2, longest_sample=4096).total == needs[-1]


def test_a_run_fits_exactly_from_the_smallest_limit_on() -> None:
    least = look(80 * GB).minimum_bytes
    assert look(least).fits
    short = look(0.8 * least)
    assert not short.fits
    assert short.minimum_bytes == least
    assert "set training.method: qlora" in short.advice


def test_the_cut_uses_the_limit_and_never_more() -> None:
    for limit in (24 * GB, 32 * GB, 48 * GB):
        plan = look(limit).plan
        assert 0.85 * limit < plan.total <= limit


def test_ranks_share_what_is_trained_and_gather_whole_layers() -> None:
    one, four = look(80 * GB, training__method="full"), look(80 * GB, ranks=4, training__method="full")
    for part in ("weights", "gradients", "optimizer"):
        assert getattr(four.plan, part) == getattr(one.plan, part) // 4
    root, layer = 2 * 128_256 * 4096 + 65 * 4096, 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336)
    # In the compute type: embeddings, a layer and the next; and a layer's gradient, which is summed in fp32.
    assert (one.plan.gathered, four.plan.gathered) == (0, 2 * root + 2 * 2 * layer + (2 + 4) * layer)
    assert one.seconds == pytest.approx(4 * four.seconds * (1 + one.plan.gradient_checkpointing / 3), rel=0.01)


def test_a_data_sheet_is_only_taken_for_a_card_of_that_size() -> None:
    found = datasheet(24.0)
    assert found is not None
    assert found[0] == "RTX 4090"
    assert datasheet(60.0) is None


CASES: list[Any] = [("lora", "bf16", False)]
CASES += [
    pytest.param("lora", *rest, marks=pytest.mark.slow)
    for rest in (("bf16", True), ("bf16", 8), ("fp32", False), ("fp32", True))
]


@pytest.mark.parametrize(("method", "precision", "checkpointing"), CASES)
def test_a_traced_step_of_the_8b_model_agrees_with_the_formula(
    method: str, precision: Any, checkpointing: bool | int
) -> None:
    from llamahome.commands.plan import comparable
    from llamahome.training.confirm import traced_bytes
    from llamahome.training.precision import Precision

    config = Config.load(None, {"training.method": method})
    traced = traced_bytes(LLAMA_8B, config, Precision(precision, "cpu"), tokens=1024, checkpointing=checkpointing)
    plan = plan_memory(LLAMA_8B, precision=precision, micro_batch_tokens=1024, gradient_checkpointing=checkpointing,
                       fused=True)  # fmt: skip
    assert comparable(plan) == pytest.approx(traced, rel=0.03)


def test_layers_that_are_not_given_back_are_planned() -> None:
    kept, given = (look(1e12, ranks=8, distributed__reshard=reshard).plan.gathered for reshard in (False, True))
    layer = model_shape(LLAMA_8B).linear_parameters // 32
    assert kept - given == 2 * layer * 30  # all but the two that are there in any case


class TestCommand:
    def test_a_configuration_alone_is_enough(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
        words = ["plan", "--tokens", "1000000", "--model", str(tmp_path), "--gpu-memory", "24GB"]
        done = CliRunner().invoke(cli, [*words, "--json"])
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout.splitlines()[-1])
        parts = ("weights", "adapters", "gradients", "optimizer", "activations", "loss", "allocator", "overhead",
                 "gathered", "reader", "compile_scratch")  # fmt: skip
        assert sum(facts[part] for part in parts) == facts["total"] <= facts["limit_bytes"] == 21_600_000_000
        text = CliRunner().invoke(cli, words).stdout
        assert "weights           16.1 GB  the base model" in text
        assert "data sheet of one RTX 4090" in text

    def test_what_does_not_fit_is_code_5_and_says_what_would(self, tmp_path: Path) -> None:
        (tmp_path / "config.json").write_text(json.dumps(LLAMA_8B))
        done = CliRunner().invoke(cli, ["plan", "--tokens", "9999", "--model", str(tmp_path), "--gpu-memory", "16GB"])
        assert done.exit_code == 5
        assert "does not fit: training.memory_limit of 17" in done.stdout
        assert "training.method: qlora" in done.stdout

    def test_the_length_of_real_samples_is_planned(self, tiny_model_dir: Path, tmp_path: Path) -> None:
        data = tmp_path / "rows.jsonl"
        rows = [{"question": "Q" * (5 + i), "answer": "A" * 30} for i in range(20)]
        data.write_text("".join(json.dumps(row) + "\n" for row in rows))
        done = CliRunner().invoke(cli, ["plan", str(data), "--model", str(tiny_model_dir), "--json"])
        assert done.exit_code == 0, done.output
        facts = json.loads(done.stdout.splitlines()[-1])
        assert 30 < facts["longest"] <= facts["step_tokens"] < facts["tokens"] + facts["longest"]
        assert facts["seconds"] > 0
        assert "measured here" in facts["speed"]

    @pytest.mark.parametrize("words", [[], ["data.jsonl", "--tokens", "5"], ["--tokens", "5", "--gpus", "2"]])
    def test_unclear_words_are_code_2(self, words: list[str]) -> None:
        assert CliRunner().invoke(cli, ["plan", *words]).exit_code == 2
