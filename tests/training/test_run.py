"""A whole run on the tiny model: what it leaves, when it ends, and how it goes on."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from llamahome.config import Config
from llamahome.errors import CheckpointError, ConfigError, Interrupted, NonFiniteError, StorageError, UsageError
from llamahome.monitor.metrics import FIELDS
from llamahome.training.run import resume, train
from llamahome.training.rundir import RunFolder
from llamahome.training.signals import StopSignal


def run(settings, **changes):
    return train(Config.load(None, {**settings, **changes}))


def records(folder):
    lines = [json.loads(line) for line in (Path(folder) / "metrics.jsonl").read_text().splitlines()]
    return [line for line in lines if "event" not in line], [line for line in lines if "event" in line]


def losses(folder):
    return [record["loss"] for record in records(folder)[0]]


def adapter(folder):
    return (Path(folder) / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def finished(settings):
    return run(settings).output


def test_it_learns_and_says_so(settings):
    result = run(settings, **{"optimization.max_steps": 30, "optimization.warmup_steps": 0})
    assert result.after.loss < result.before.loss - 0.1
    assert result.summary()[0].startswith("held-out loss ")


def test_it_leaves_what_the_documentation_says(finished):
    names = {path.name for path in finished.iterdir()}
    assert {"status.json", "run.json", "metrics.jsonl", "final", "best", "checkpoint-12", "checkpoint-9"} <= names
    status = json.loads((finished / "status.json").read_text())
    assert (status["state"], status["code"], status["last_step"], status["resumable"]) == ("done", 0, 12, False)
    facts = json.loads((finished / "run.json").read_text())
    assert facts["config"]["optimization"]["max_steps"] == 12
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["threads"] == 1
    steps, events = records(finished)
    assert [record["step"] for record in steps] == list(range(1, 13))
    assert all(set(FIELDS) <= set(record) for record in steps)
    assert steps[-1]["eval_loss"] > 0
    assert math.isclose(steps[-1]["eval_perplexity"], math.exp(steps[-1]["eval_loss"]))
    assert [event["step"] for event in events if event["event"] == "checkpoint"] == [3, 6, 9, 12]


def test_only_the_newest_checkpoints_are_kept(settings):
    output = run(settings, **{"training.keep_last": 2}).output
    assert sorted(path.name for path in output.glob("checkpoint-*")) == ["checkpoint-12", "checkpoint-9"]


def test_plain_peft_loads_the_result_and_agrees(finished, tiny_model_dir):
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoTokenizer

    ids = AutoTokenizer.from_pretrained(finished / "final")("the old mill", return_tensors="pt").input_ids
    base = AutoModelForCausalLM.from_pretrained(tiny_model_dir)
    before = base(ids).logits
    model = PeftModel.from_pretrained(base, finished / "final")
    assert not torch.allclose(model(ids).logits, before)


def test_full_fine_tuning_leaves_a_model_that_transformers_loads(settings):
    from transformers import AutoModelForCausalLM

    output = run(settings, **{"training.method": "full", "optimization.max_steps": 4}).output
    model = AutoModelForCausalLM.from_pretrained(output / "final")
    assert model.config.num_hidden_layers == 2
    assert not list((output / "final").glob("*.bin"))


@pytest.mark.parametrize("method", ["lora", "full"])
def test_bf16_learns_as_fp32_does(settings, method, tmp_path):
    """Autocast over frozen bf16 weights (LoRA) or fp32 masters (full); also with activation checkpointing."""
    changes = {"training.method": method, "optimization.warmup_steps": 0}
    exact = losses(run(settings, **changes).output)
    for checkpointing in (False, True):
        low = {
            "processing.precision": "bf16",
            "processing.gradient_checkpointing": checkpointing,
            "training.output": str(tmp_path / f"bf16-{checkpointing}"),
        }
        found = losses(run(settings, **changes, **low).output)
        assert found == pytest.approx(exact, rel=0.02)
        assert found != exact


def test_how_many_layers_are_computed_again_changes_no_bit_and_is_kept_for_a_resume(settings, tmp_path):
    whole = run(settings).output
    some = run(settings, **{"processing.gradient_checkpointing": 1, "training.output": str(tmp_path / "some")}).output
    assert losses(some) == losses(whole)
    assert (some / "final/adapter_model.safetensors").read_bytes() == (
        whole / "final/adapter_model.safetensors"
    ).read_bytes()
    plan = json.loads((some / "run.json").read_bytes())["memory_plan"]
    assert plan["gradient_checkpointing"] == 1
    assert plan["gradient_checkpointing"] is not True
    state = json.loads((some / "checkpoint-12/training_state.json").read_bytes())
    assert state["choices"]["processing.gradient_checkpointing"] == 1


@pytest.mark.parametrize(
    ("method", "optimizer"),
    [
        ("lora", "adamw"), ("full", "adamw"),
        *(pytest.param("full", name, marks=pytest.mark.slow) for name in ("adamw_8bit", "torchao_adamw_4bit")),
        *(pytest.param(name, "adamw", marks=pytest.mark.slow) for name in ("qlora", "qat", "qat with LoRA")),
    ],
)  # fmt: skip
def test_a_resumed_run_ends_with_the_same_bits(settings, method, optimizer, tmp_path, monkeypatch):
    settings = settings | {"training.method": method.split()[0], "lora.dropout": 0.1 if method == "lora" else 0.0}
    settings |= {"optimization.optimizer": optimizer}
    if method.startswith("qat"):  # rounding begins after the stop
        settings |= {"qat.start_step": 9, "qat.lora": "LoRA" in method}
    whole = run(settings).output
    stopped(settings, tmp_path / "other", tmp_path, monkeypatch)
    resumed = resume(tmp_path / "other", ["training.callbacks=[]"]).output
    assert losses(resumed) == losses(whole)
    for name in ("adapter_model.safetensors", "model.safetensors"):
        if (whole / "final" / name).exists():
            assert (resumed / "final" / name).read_bytes() == (whole / "final" / name).read_bytes()
    for name in ("optimizer.safetensors", "rng.safetensors"):
        assert (resumed / "checkpoint-12" / name).read_bytes() == (whole / "checkpoint-12" / name).read_bytes()


def stopped(settings, folder, tmp_path, monkeypatch):
    """A run into `folder` that gets a real SIGTERM while its 7th step runs."""
    (tmp_path / "stopper.py").write_text(
        "import os, signal\n"
        "def stop(event, loop, record):\n"
        "    if event == 'step' and loop.state.step == 7:\n"
        "        os.kill(os.getpid(), signal.SIGTERM)\n"
    )
    monkeypatch.chdir(tmp_path)
    values = {**settings, "training.output": str(folder), "training.callbacks": ["stopper:stop"]}
    with StopSignal() as signals, pytest.raises(Interrupted) as raised:
        train(Config.load(None, values), signals=signals)
    assert raised.value.exit_code == 143
    assert json.loads((folder / "status.json").read_text())["last_step"] == 7


def test_a_resume_with_another_cut_is_equal_to_rounding(settings, tmp_path, monkeypatch):
    whole = run(settings).output
    stopped(settings, tmp_path / "other", tmp_path, monkeypatch)
    again = resume(tmp_path / "other", ["training.batch_size=1", "training.callbacks=[]"]).output
    assert losses(again) == pytest.approx(losses(whole), rel=1e-5)
    assert records(again)[0][-1]["micro_batches"] == 4


def test_every_batch_size_gives_the_same_run(settings, tmp_path):
    expected = losses(run(settings, **{"training.output": str(tmp_path / "auto")}).output)
    for size in (1, 2, 3, 4):
        changes = {"training.output": str(tmp_path / f"run-{size}"), "training.batch_size": size}
        assert losses(run(settings, **changes).output) == pytest.approx(expected, rel=1e-5)


def test_the_newest_good_checkpoint_is_taken_and_the_damaged_one_named(settings, finished, caplog):
    (finished / "checkpoint-12" / "optimizer.safetensors").write_bytes(b"damaged")
    expected = losses(finished)
    caplog.set_level("WARNING", "llamahome")
    resumed = resume(finished).output
    assert "checkpoint-12 is not usable (optimizer.safetensors has 7 bytes" in caplog.text
    assert losses(resumed) == expected


def test_a_checkpoint_of_other_data_is_refused(settings, finished, data_file):
    data_file.write_text(data_file.read_text() + '{"instruction": "one more", "output": "row"}\n')
    with pytest.raises(CheckpointError, match="the data is not the run's"):
        resume(finished)


def test_another_number_of_samples_per_step_is_refused(finished):
    with pytest.raises(ConfigError, match="8 samples per step, the run has 4"):
        resume(finished, ["optimization.global_batch_size=8"])


def test_a_folder_in_use_and_a_used_folder_are_refused(settings, finished):
    with pytest.raises(UsageError, match="already holds files"):
        run(settings)
    with RunFolder(finished, fresh=False), pytest.raises(StorageError, match="in use by process"):
        resume(finished)


def test_early_stopping_ends_the_run_and_keeps_the_best(settings):
    changes = {"optimization.learning_rate": 10.0, "optimization.warmup_steps": 0, "training.eval_steps": 1}
    result = run(settings, **changes, **{"optimization.early_stopping_patience": 2})
    assert result.steps < 12
    steps, events = records(result.output)
    assert any(event["event"] == "early_stop" for event in events)
    evaluated = {record["step"]: record["eval_loss"] for record in steps}
    assert result.best_step == min(evaluated, key=evaluated.get)
    assert adapter(result.output / "best") != adapter(result.output / "final")


BROKEN_STEP = """
from llamahome.kernels import linear_cross_entropy

step = 0

def watch(event, loop, record):
    global step
    step = loop.state.step + 1

def loss(hidden, weight, labels, **rest):
    value = linear_cross_entropy(hidden, weight, labels, **rest)
    return value * float("inf") if step == 5 else value
"""


def broken_step(name, tmp_path, monkeypatch):
    """Settings for a loss that is infinite in the 5th step; `name` is the module's."""
    (tmp_path / f"{name}.py").write_text(BROKEN_STEP)
    monkeypatch.chdir(tmp_path)
    return {"training.loss": f"{name}:loss", "training.callbacks": [f"{name}:watch"]}


def test_a_loss_that_is_not_finite_stops_before_the_update(settings, tmp_path, monkeypatch):
    broken = broken_step("broken", tmp_path, monkeypatch)
    with pytest.raises(NonFiniteError, match="loss inf, gradient norm nan in step 5") as raised:
        run(settings, **broken)
    assert "rows.jsonl:" in raised.value.where
    status = json.loads((tmp_path / "run" / "status.json").read_text())
    assert (status["state"], status["code"], status["last_step"], status["resumable"]) == ("failed", 7, 4, True)


def test_a_step_that_is_not_finite_can_be_skipped(settings, tmp_path, monkeypatch):
    broken = broken_step("broken2", tmp_path, monkeypatch)
    output = run(settings, **broken, **{"optimization.on_nonfinite": "skip"}).output
    steps, events = records(output)
    assert [event["step"] for event in events if event["event"] == "nonfinite"] == [5]
    assert steps[4]["loss"] is None
    assert all(math.isfinite(record["loss"]) for record in steps if record["step"] != 5)


def test_callbacks_and_metrics_of_the_users_own(settings, tmp_path, monkeypatch):
    (tmp_path / "own.py").write_text(
        "seen = []\n"
        "def watch(event, loop, record):\n"
        "    seen.append((event, loop.state.step))\n"
        "    return 'stop' if event == 'step' and loop.state.step == 5 else None\n"
        "def tokens_per_sample(record):\n"
        "    return record['tokens'] / 4\n"
    )
    monkeypatch.chdir(tmp_path)
    result = run(settings, **{"training.callbacks": ["own:watch"], "training.metrics": ["own:tokens_per_sample"]})
    import sys

    seen = sys.modules["own"].seen
    assert seen[0] == ("train_begin", 0)
    assert seen[-1] == ("train_end", 5)
    assert ("checkpoint", 5) in seen
    assert result.steps == 5
    assert all(record["tokens_per_sample"] == record["tokens"] / 4 for record in records(result.output)[0])


def test_out_of_memory_in_a_step_is_replayed_with_a_smaller_cut(settings, tmp_path, monkeypatch):
    expected = losses(run(settings).output)
    (tmp_path / "hungry.py").write_text(
        "from llamahome.kernels import linear_cross_entropy\n"
        "failed = []\n"
        "def loss(hidden, weight, labels, **rest):\n"
        "    if len(labels) > 20 and len(failed) < 3:\n"
        "        failed.append(1)\n"
        '        raise RuntimeError("DefaultCPUAllocator: can\'t allocate memory: you tried to allocate 1 bytes")\n'
        "    return linear_cross_entropy(hidden, weight, labels, **rest)\n"
    )
    monkeypatch.chdir(tmp_path)
    output = run(settings, **{"training.loss": "hungry:loss", "training.output": str(tmp_path / "hungry")}).output
    assert any(event["event"] == "oom" for event in records(output)[1])
    assert losses(output) == pytest.approx(expected, rel=1e-5)


def test_a_compiler_that_fails_is_survived(settings, tmp_path, monkeypatch, caplog):
    from torch import nn

    def broken(graph, inputs):
        raise RuntimeError("no such instruction")

    expected = losses(run(settings).output)
    compile_plainly = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", lambda self, **_: compile_plainly(self, backend=broken, dynamic=True))
    caplog.set_level("WARNING", "llamahome")
    changes = {"processing.compile_mode": "default", "training.output": str(tmp_path / "compiled")}
    assert losses(run(settings, **changes).output) == expected
    assert "compiling failed, the run goes on without" in caplog.text
