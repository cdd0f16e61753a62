"""Configurations of other programs, by the keys of their own examples, become ours; what is left out is named."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner

from llamahome.cli import cli
from llamahome.commands.foreign_configs import KNOWN
from llamahome.commands.import_config import translate
from llamahome.config import Config

LLAMA_FACTORY = """
model_name_or_path: meta-llama/Meta-Llama-3-8B-Instruct
trust_remote_code: true
stage: sft
do_train: true
finetuning_type: lora
lora_rank: 8
lora_target: all
dataset: identity,alpaca_en_demo
template: llama3
cutoff_len: 2048
max_samples: 1000
output_dir: saves/llama3-8b/lora/sft
logging_steps: 10
per_device_train_batch_size: 1
gradient_accumulation_steps: 8
learning_rate: 1.0e-4
num_train_epochs: 3.0
lr_scheduler_type: cosine
warmup_ratio: 0.1
bf16: true
"""
AXOLOTL = """
base_model: NousResearch/Meta-Llama-3-8B
load_in_8bit: false
load_in_4bit: true
datasets:
  - path: tatsu-lab/alpaca
    type: alpaca
dataset_prepared_path:
val_set_size: 0.05
output_dir: ./outputs/qlora-out
adapter: qlora
sequence_len: 4096
sample_packing: true
lora_r: 32
lora_alpha: 16
lora_dropout: 0.05
lora_target_linear: true
gradient_accumulation_steps: 4
micro_batch_size: 2
num_epochs: 4
optimizer: paged_adamw_32bit
lr_scheduler: cosine
learning_rate: 0.0002
train_on_inputs: false
bf16: auto
fp16:
gradient_checkpointing: true
flash_attention: true
warmup_steps: 10
evals_per_epoch: 4
weight_decay: 0.0
special_tokens:
  pad_token: "<|end_of_text|>"
"""
TORCHTUNE = """
output_dir: out/lora
model:
  _component_: torchtune.models.llama3_1.lora_llama3_1_8b
  lora_attn_modules: ['q_proj', 'v_proj', 'output_proj']
  apply_lora_to_mlp: true
  apply_lora_to_output: false
  lora_rank: 8
  lora_alpha: 16
tokenizer:
  _component_: torchtune.models.llama3.llama3_tokenizer
  path: models/llama/tokenizer.model
  max_seq_len: null
checkpointer:
  _component_: torchtune.training.FullModelHFCheckpointer
  checkpoint_dir: models/llama
  output_dir: ${output_dir}
dataset:
  _component_: torchtune.datasets.instruct_dataset
  source: json
  data_files: data/rows.json
seed: 7
shuffle: true
batch_size: 2
optimizer:
  _component_: torch.optim.AdamW
  fused: true
  weight_decay: 0.01
  lr: 3e-4
lr_scheduler:
  _component_: torchtune.training.lr_schedulers.get_cosine_schedule_with_warmup
  num_warmup_steps: 100
loss:
  _component_: torchtune.modules.loss.CEWithChunkedOutputLoss
epochs: 5
max_steps_per_epoch: null
gradient_accumulation_steps: 16
compile: false
metric_logger:
  _component_: torchtune.training.metric_logging.DiskLogger
  log_dir: ${output_dir}/logs
device: cuda
dtype: bf16
enable_activation_checkpointing: true
enable_activation_offloading: true
"""
MEANT: dict[str, tuple[str, dict[str, Any], set[str]]] = {
    "LLaMA-Factory": (
        LLAMA_FACTORY,
        {
            "model.name": "meta-llama/Meta-Llama-3-8B-Instruct", "training.method": "lora", "lora.rank": 8,
            "lora.alpha": 16, "lora.target_modules": "all-linear", "data.max_length": 2048, "training.epochs": 3,
            "optimization.global_batch_size": 8, "optimization.learning_rate": 1e-4, "processing.precision": "bf16",
            "optimization.warmup_steps": 0.1, "optimization.weight_decay": 0.0, "data.validation_split": 0.0,
            "training.output": Path("saves/llama3-8b/lora/sft"), "monitor.interval": 10,
        },
        {"dataset", "max_samples"},
    ),
    "Axolotl": (
        AXOLOTL,
        {
            "model.name": "NousResearch/Meta-Llama-3-8B", "training.method": "qlora", "data.path": "tatsu-lab/alpaca",
            "data.validation_split": 0.05, "data.max_length": 4096, "lora.rank": 32, "lora.alpha": 16,
            "lora.dropout": 0.05, "optimization.global_batch_size": 8, "training.epochs": 4,
            "optimization.warmup_steps": 10, "processing.gradient_checkpointing": True, "data.train_on": "assistant",
        },
        {"evals_per_epoch", "special_tokens.pad_token"},
    ),
    "torchtune": (
        TORCHTUNE,
        {
            "model.name": "models/llama", "training.method": "lora", "data.path": "data/rows.json", "lora.alpha": 16,
            "lora.target_modules": ("q_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"),
            "optimization.global_batch_size": 32, "optimization.learning_rate": 3e-4, "training.epochs": 5,
            "training.seed": 7, "optimization.max_grad_norm": None, "processing.device": "cuda", "monitor.sinks": (),
            "optimization.scheduler_type": "cosine", "training.output": Path("out/lora"),
        },
        {"enable_activation_offloading"},
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MEANT)
def test_an_example_means_the_same_here(name: str, tmp_path: Path) -> None:
    text, expected, left_out = MEANT[name]
    source, output = tmp_path / "theirs.yaml", tmp_path / "ours.yaml"
    source.write_text(text)
    done = CliRunner().invoke(cli, ["import-config", str(source), "--output", str(output)])
    assert done.exit_code == 0, done.output
    config = Config.load(output)
    for key, value in expected.items():
        section, field = key.split(".")
        assert getattr(getattr(config, section), field) == value, key
    listed = {line.split(": ")[1] for line in done.output.splitlines() if line.startswith("not carried over")}
    assert listed == left_out
    assert all(f"# Not carried over: {key}: " in output.read_text() for key in left_out)


def test_every_rules_setting_exists() -> None:
    known = Config.load(None).to_dict()
    for program in KNOWN:
        targets = {rule for rule in program.rules.values() if isinstance(rule, str)} | set(program.defaults)
        for target in targets:
            section, field = target.removesuffix("[0]").removesuffix("[1]").split(".")
            assert field in known[section], target


def test_no_key_is_lost() -> None:
    """Each key with a value is a setting, not needed, or listed with a reason."""
    for program in KNOWN:
        found = translate(program, {"unheard_of": 1, "empty": None})
        assert found.not_carried == {"unheard_of": "no setting for it"}


@pytest.mark.parametrize("name", ["Axolotl", "LLaMA-Factory"])
def test_what_shares_a_model_out_leads_to_the_setting_that_does(name: str) -> None:
    (program,) = (program for program in KNOWN if program.name == name)
    found = translate(program, {"deepspeed": "deepspeed_configs/zero2.json", "fsdp": ["full_shard"]})
    assert all("distributed.strategy" in found.not_carried[key] for key in ("deepspeed", "fsdp"))


def test_values_that_mean_something_else_are_not_carried_over() -> None:
    by_name = {program.name: program for program in KNOWN}
    axolotl = translate(by_name["Axolotl"], {"optimizer": "lion_8bit", "num_epochs": 1.5, "load_in_8bit": True,
                                             "val_set_size": 200, "lr_scheduler": "cosine_with_restarts"})  # fmt: skip
    assert set(axolotl.not_carried) == {"optimizer", "num_epochs", "load_in_8bit", "val_set_size", "lr_scheduler"}
    factory = translate(by_name["LLaMA-Factory"], {"stage": "dpo", "finetuning_type": "freeze"})
    assert set(factory.not_carried) == {"stage", "finetuning_type"}


def test_other_files_and_existing_ones_are_refused(tmp_path: Path) -> None:
    source, output = tmp_path / "a.yaml", tmp_path / "b.yaml"
    source.write_text("learning_rate: 1\n")
    done = CliRunner().invoke(cli, ["import-config", str(source), "--output", str(output)])
    assert "not a configuration of torchtune" in str(done.exception)
    assert not output.exists()
    output.write_text("mine")
    done = CliRunner().invoke(cli, ["import-config", str(source), "--output", str(output)])
    assert "there is a file already" in str(done.exception)
    assert output.read_text() == "mine"


@pytest.mark.parametrize(
    ("theirs", "ours"),
    [("adamw_bnb_8bit", "adamw_8bit"), ("bitsandbytes.optim.PagedAdamW8bit", "paged_adamw_8bit"),
     ("paged_adamw_32bit", "paged_adamw"), ("ao_adamw_4bit", "torchao_adamw_4bit"), ("adamw_torch_fused", "adamw")],
)  # fmt: skip
def test_optimizers_with_small_states_keep_their_kind(theirs: str, ours: str) -> None:
    (axolotl,) = (program for program in KNOWN if program.name == "Axolotl")
    found = translate(axolotl, {"optimizer": theirs})
    assert found.settings["optimization.optimizer"] == ours
    assert "few bits" in translate(axolotl, {"optimizer": "adam_apex_8bit"}).not_carried["optimizer"]
