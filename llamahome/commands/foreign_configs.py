"""What the settings of other fine-tuners mean here: one table for each, from their keys to ours.

A rule is a setting of ours that takes the value as it is, or a function from the value to settings of ours, or to the
reason why it cannot be carried over. The defaults are those of the other program where ours differ, so that a file that
leaves them out means the same here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

Settings = dict[str, object]
Rule = str | Callable[[Any], Settings | str]

OWN = "the engine does it by itself"
_OPTIMIZERS = MappingProxyType({"adamw": "adamw", "adam": "adamw", "sgd": "sgd", "adafactor": "adafactor"})
# By their names in the Trainer, in Axolotl and as classes.
_LOW_BIT = MappingProxyType(
    {
        **dict.fromkeys(("adamw_8bit", "adamw_bnb_8bit", "adamw8bit"), "adamw_8bit"),
        **dict.fromkeys(("paged_adamw", "paged_adamw_32bit", "pagedadamw", "pagedadamw32bit"), "paged_adamw"),
        **dict.fromkeys(("paged_adamw_8bit", "pagedadamw8bit"), "paged_adamw_8bit"),
        **dict.fromkeys(("adamw_torch_8bit", "ao_adamw_8bit"), "torchao_adamw_8bit"),
        **dict.fromkeys(("adamw_torch_4bit", "ao_adamw_4bit"), "torchao_adamw_4bit"),
        "ao_adamw_fp8": "torchao_adamw_fp8",
    }
)
_SCHEDULES = ("cosine", "linear", "constant", "warmup_stable_decay")
_ATTENTION = {"q_proj": "q_proj", "k_proj": "k_proj", "v_proj": "v_proj", "output_proj": "o_proj"}


@dataclass(frozen=True)
class Foreign:
    """A program: the keys by which its files are known, its rules by dotted key, and its defaults in our settings."""

    name: str
    marks: tuple[str, ...]
    rules: Mapping[str, Rule]
    defaults: Mapping[str, object]


def only(setting: str, kind: Callable[[Any], object]) -> Rule:
    """The value as a `kind`: `3.0` epochs are 3, half an epoch has no setting here."""

    def convert(value: Any) -> Settings | str:
        number = kind(value)
        return {setting: number} if number == float(value) else "only whole numbers here"

    return convert


def one_of(setting: str, names: Mapping[str, object], reason: str = "no such value here") -> Rule:
    """The value through a table; what is not in it cannot be carried over."""
    return lambda value: {setting: names[str(value)]} if str(value) in names else reason


def drop(reason: str) -> Rule:
    """Nothing to set, because of `reason`; said as "not needed"."""
    return lambda _: {"": reason}


def _target(value: Any) -> Settings | str:
    if value in ("all", "all-linear"):
        return {"lora.target_modules": "all-linear"}
    names = value if isinstance(value, list) else [name.strip() for name in str(value).split(",")]
    return {"lora.target_modules": names}


def _optimizer(value: Any) -> Settings | str:
    name = str(value).lower()
    if low_bit := _LOW_BIT.get(name.rpartition(".")[2]):
        return {"optimization.optimizer": low_bit}
    words = re.split(r"[_.]", name)
    known = next((_OPTIMIZERS[word] for word in words if word in _OPTIMIZERS), None)
    if known is None:
        return "choose optimization.optimizer, also your own as module:object"
    if any("8bit" in word or word == "4bit" for word in words):
        return "choose optimization.optimizer: adamw_8bit and others have states in few bits"
    return {"optimization.optimizer": known}


def _schedule(value: Any) -> Settings | str:
    found = next((name for name in _SCHEDULES if name in str(value)), None)
    if "restarts" in str(value) or found is None:
        return "choose optimization.scheduler_type, also your own as module:object"
    return {"optimization.scheduler_type": found}


def _split(value: Any) -> Settings | str:
    if float(value) >= 1:
        return "a number of samples; give a share as data.validation_split, or a file as data.eval_path"
    return {"data.validation_split": float(value)}


def _bf16(value: Any) -> Settings | str:
    return {"processing.precision": {"True": "bf16", "auto": "auto"}[str(value)]} if value else {"": "it is off"}


def _fp16(value: Any) -> Settings | str:
    return {"processing.precision": "fp16"} if value else {"": "it is off"}


def _compile(value: Any) -> Settings | str:
    return {"processing.compile_mode": "default" if value else "none"}


def _sinks(value: Any) -> Settings | str:
    names = value if isinstance(value, list) else [value]
    known = {"wandb", "mlflow", "trackio", "tensorboard"}
    if names == ["none"]:
        return {"monitor.sinks": []}
    return {"monitor.sinks": names} if set(names) <= known else "no such sink; write your own as module:object"


def _datasets(value: Any) -> Settings | str:
    """Axolotl's list: the path of the first."""
    if not isinstance(value, list) or not value or not isinstance(value[0], dict) or len(value) > 1:
        return "name one file, folder, glob or hub id as data.path"
    found = value[0].get("data_files") or value[0].get("path")
    found = found[0] if isinstance(found, list) and len(found) == 1 else found
    return {"data.path": found} if isinstance(found, str) else "name one file, folder, glob or hub id as data.path"


def _names(value: Any) -> Settings | str:
    """LLaMA-Factory's names of its dataset_info.json."""
    return "a name of dataset_info.json; give its file, folder, glob or hub id as data.path"


def _on_prompt(value: Any) -> Settings | str:
    return {"data.train_on": "all" if value else "assistant"}


def _method(value: Any) -> Settings | str:
    return {"training.method": value} if value in ("lora", "full") else "choose training.method"


def _four_bits(value: Any) -> Settings | str:
    if value in (4, True):
        return {"training.method": "qlora"}
    return "only 4 bits, as training.method: qlora" if value else {"": "it is off"}


def _eight_bits(value: Any) -> Settings | str:
    return "only 4 bits, as training.method: qlora" if value else {"": "it is off"}


def _stage(value: Any) -> Settings | str:
    return {"": "it is all there is"} if value == "sft" else "only supervised fine-tuning is done here"


def _component(value: Any) -> Settings | str:
    """torchtune's model builder; the weights come from the checkpointer."""
    builder = str(value).rsplit(".", 1)[-1]
    method = next((name for name in ("qlora", "lora") if builder.startswith(f"{name}_")), "full")
    return {"training.method": method}


def _attention_modules(value: Any) -> Settings | str:
    return {"lora.target_modules": list(dict.fromkeys(_ATTENTION.get(name, name) for name in value))}


def _mlp_modules(value: Any) -> Settings | str:
    return {"lora.target_modules+": ["gate_proj", "up_proj", "down_proj"]} if value else {"": "it is off"}


def _output_module(value: Any) -> Settings | str:
    return "the output projection has no adapter here" if value else {"": "it is off"}


def _torchtune_loss(value: Any) -> Settings | str:
    kind = str(value).rsplit(".", 1)[-1]
    known = kind.startswith(("CE", "CrossEntropy", "LinearCrossEntropy"))
    return {"": "it is the default"} if known else "write your own as training.loss"


def _logger(value: Any) -> Settings | str:
    kind = str(value).rsplit(".", 1)[-1]
    names = {"WandBLogger": ["wandb"], "TensorBoardLogger": ["tensorboard"], "DiskLogger": [], "StdoutLogger": []}
    return {"monitor.sinks": names[kind]} if kind in names else "no such sink; write your own as module:object"


def _data_files(value: Any) -> Settings | str:
    return {"data.path": value} if isinstance(value, str) else "name one file, folder, glob or hub id as data.path"


def _source(value: Any) -> Settings | str:
    formats = ("json", "csv", "text", "parquet")
    return {"": "the file's name says it"} if value in formats else {"data.path": value}


def _shared() -> dict[str, Rule]:
    """Keys of Hugging Face's TrainingArguments, which Axolotl and LLaMA-Factory hand on."""
    return {
        "output_dir": "training.output",
        "learning_rate": only("optimization.learning_rate", float),
        "weight_decay": only("optimization.weight_decay", float),
        "gradient_accumulation_steps": "training.gradient_accumulation",
        "max_steps": lambda value: {"optimization.max_steps": value} if value > 0 else {"": "the epochs say it"},
        "max_grad_norm": only("optimization.max_grad_norm", float),
        "warmup_steps": "optimization.warmup_steps",
        "warmup_ratio": lambda value: {"optimization.warmup_steps": float(value) or 0},
        "logging_steps": only("monitor.interval", int),
        "save_steps": only("training.save_steps", int),
        "eval_steps": only("training.eval_steps", int),
        "save_total_limit": "training.keep_last",
        "seed": "training.seed",
        "adam_beta1": "optimization.betas[0]",
        "adam_beta2": "optimization.betas[1]",
        "adam_epsilon": only("optimization.eps", float),
        "bf16": _bf16,
        "fp16": _fp16,
        "gradient_checkpointing": "processing.gradient_checkpointing",
        "torch_compile": _compile,
        "report_to": _sinks,
        "trust_remote_code": drop("give --trust-remote-code on the command line, each time"),
        "group_by_length": drop(OWN + ": rows have no padding"),
        "deepspeed": lambda _: "distributed.strategy: auto shares the model out over ranks where that is needed",
        "fsdp": lambda _: "distributed.strategy: auto shares the model out over ranks where that is needed",
        "dataloader_num_workers": drop(OWN),
        "dataloader_pin_memory": drop(OWN),
        "lora_alpha": only("lora.alpha", int),
        "lora_dropout": only("lora.dropout", float),
    }


_HF_DEFAULTS = {
    "optimization.weight_decay": 0.0, "optimization.warmup_steps": 0, "data.validation_split": 0.0,
    "training.gradient_accumulation": 1,
}  # fmt: skip

LLAMA_FACTORY = Foreign(
    "LLaMA-Factory",
    ("model_name_or_path",),
    _shared()
    | {
        "model_name_or_path": "model.name",
        "model_revision": "model.revision",
        "stage": _stage,
        "do_train": drop("it is the command"),
        "do_eval": drop("it is the command"),
        "finetuning_type": _method,
        "quantization_bit": _four_bits,
        "quantization_method": drop("there is one"),
        "lora_rank": "lora.rank",
        "lora_target": _target,
        "use_rslora": "lora.use_rslora",
        "use_dora": "lora.use_dora",
        "dataset": _names,
        "dataset_dir": drop("data.path says it"),
        "template": drop("the tokenizer's chat template is taken; see data.template"),
        "cutoff_len": "data.max_length",
        "train_on_prompt": _on_prompt,
        "val_size": _split,
        "packing": drop(OWN),
        "neat_packing": drop(OWN),
        "flash_attn": drop(OWN),
        "overwrite_cache": drop("the cache knows the data by content"),
        "preprocessing_num_workers": drop(OWN),
        "overwrite_output_dir": drop("a run never overwrites another"),
        "plot_loss": drop("report.html has the curves"),
        "save_only_model": drop("checkpoints are complete"),
        "per_device_train_batch_size": "training.batch_size",
        "per_device_eval_batch_size": drop(OWN),
        "num_train_epochs": only("training.epochs", int),
        "lr_scheduler_type": _schedule,
        "optim": _optimizer,
        "ddp_timeout": drop("distributed.timeout says after how long a rank counts as hung"),
        "eval_strategy": drop("training.eval_steps says it"),
        "resume_from_checkpoint": drop("llamahome train-resume goes on from a checkpoint"),
    },
    _HF_DEFAULTS
    | {
        "training.method": "lora", "training.epochs": 3, "training.batch_size": 8, "data.max_length": 2048,
        "lora.rank": 8, "lora.alpha": "2r", "optimization.scheduler_type": "linear",
    },
)  # fmt: skip

AXOLOTL = Foreign(
    "Axolotl",
    ("base_model",),
    _shared()
    | {
        "base_model": "model.name",
        "model_type": drop("the model's own configuration says it"),
        "tokenizer_type": drop("the tokenizer's own configuration says it"),
        "tokenizer_config": "model.tokenizer",
        "load_in_8bit": _eight_bits,
        "load_in_4bit": _four_bits,
        "strict": drop("the engine is strict"),
        "datasets": _datasets,
        "dataset_prepared_path": drop("the cache keeps tokens by content"),
        "val_set_size": _split,
        "adapter": lambda value: {"training.method": value} if value in ("lora", "qlora") else "choose training.method",
        "sequence_len": "data.max_length",
        "sample_packing": drop(OWN),
        "eval_sample_packing": drop(OWN),
        "pad_to_sequence_len": drop(OWN + ": rows have no padding"),
        "flash_attention": drop(OWN),
        "sdp_attention": drop(OWN),
        "xformers_attention": drop(OWN),
        "attn_implementation": drop(OWN),
        "lora_r": "lora.rank",
        "lora_target_modules": _target,
        "lora_target_linear": lambda value: {"lora.target_modules": "all-linear"} if value else {"": "it is off"},
        "peft_use_rslora": "lora.use_rslora",
        "peft_use_dora": "lora.use_dora",
        "micro_batch_size": "training.batch_size",
        "num_epochs": only("training.epochs", int),
        "optimizer": _optimizer,
        "lr_scheduler": _schedule,
        "cosine_min_lr_ratio": only("optimization.min_lr_ratio", float),
        "train_on_inputs": _on_prompt,
        "tf32": drop(OWN),
        "early_stopping_patience": "optimization.early_stopping_patience",
        "chat_template": drop("the tokenizer's chat template is taken; see data.template"),
        "wandb_project": lambda _: {"monitor.sinks": ["wandb"]},
        "debug": drop("llamahome --debug"),
    },
    _HF_DEFAULTS
    | {
        "training.method": "full", "training.epochs": 1, "training.batch_size": 1, "data.max_length": 512,
        "optimization.warmup_steps": 0.03, "optimization.scheduler_type": "cosine",
    },
)  # fmt: skip

TORCHTUNE = Foreign(
    "torchtune",
    ("model._component_",),
    {
        "model._component_": _component,
        "model.lora_attn_modules": _attention_modules,
        "model.apply_lora_to_mlp": _mlp_modules,
        "model.apply_lora_to_output": _output_module,
        "model.lora_rank": "lora.rank",
        "model.lora_alpha": only("lora.alpha", int),
        "model.lora_dropout": only("lora.dropout", float),
        "model.use_dora": "lora.use_dora",
        "model.quantize_base": _four_bits,
        "tokenizer._component_": drop("the model's folder has it"),
        "tokenizer.path": drop("the model's folder has it"),
        "tokenizer.max_seq_len": "data.max_length",
        "checkpointer._component_": drop("the model's folder says it"),
        "checkpointer.checkpoint_dir": "model.name",
        "checkpointer.checkpoint_files": drop("the model's folder says it"),
        "checkpointer.output_dir": drop("training.output says it"),
        "checkpointer.model_type": drop("the model's own configuration says it"),
        "resume_from_checkpoint": drop("llamahome train-resume goes on from a checkpoint"),
        "save_adapter_weights_only": drop("checkpoints are complete, final/ is the adapter alone"),
        "dataset._component_": drop("the rows' schema is found"),
        "dataset.source": _source,
        "dataset.data_files": _data_files,
        "dataset.train_on_input": _on_prompt,
        "dataset.packed": drop(OWN),
        "dataset.split": lambda value: {"": "it is all there is"} if value == "train" else "take the part as a file",
        "seed": "training.seed",
        "shuffle": "data.shuffle",
        "batch_size": "training.batch_size",
        "gradient_accumulation_steps": "training.gradient_accumulation",
        "epochs": "training.epochs",
        "optimizer._component_": _optimizer,
        "optimizer.fused": drop(OWN),
        "optimizer.lr": only("optimization.learning_rate", float),
        "optimizer.weight_decay": only("optimization.weight_decay", float),
        "optimizer.betas": "optimization.betas",
        "optimizer.eps": only("optimization.eps", float),
        "lr_scheduler._component_": _schedule,
        "lr_scheduler.num_warmup_steps": "optimization.warmup_steps",
        "loss._component_": _torchtune_loss,
        "clip_grad_norm": "optimization.max_grad_norm",
        "compile": _compile,
        "output_dir": "training.output",
        "metric_logger._component_": _logger,
        "metric_logger.log_dir": drop("the run's folder has it"),
        "log_every_n_steps": "monitor.interval",
        "log_peak_memory_stats": drop(OWN),
        "device": "processing.device",
        "dtype": one_of("processing.precision", {"bf16": "bf16", "fp32": "fp32", "fp16": "fp16"}),
        "enable_activation_checkpointing": "processing.gradient_checkpointing",
    },
    {
        "training.batch_size": 1, "training.gradient_accumulation": 1, "data.validation_split": 0.0,
        "optimization.max_grad_norm": None, "optimization.warmup_steps": 0, "optimization.scheduler_type": "constant",
    },
)  # fmt: skip

KNOWN = (TORCHTUNE, LLAMA_FACTORY, AXOLOTL)
