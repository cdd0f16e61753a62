"""The settings: one frozen, typed tree with a section per concern. Every field says what it does, its bounds, its unit.

Values are checked strictly: `"4"` is not a number and `1` is not true. Fields that name one setting twice are listed
in `ALIASES`; a `Config` always holds the same value in both.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from llamahome.config.fields import (
    Betas,
    Device,
    Megabytes,
    Named,
    NamedList,
    Optimizer,
    Scheduler,
    Size,
    SizeOrPercent,
    Texts,
    UserPath,
)

Auto = Literal["auto"]
Count = Annotated[int, Field(ge=1)]
Recompute = bool | Count | Literal["auto", "mlp"]
Workers = Annotated[int, Field(ge=0)] | Auto
Attention = Literal["auto", "llamahome", "sdpa", "eager", "flash_attention_2", "flash_attention_3", "xformers"]
Share = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Resource = Literal["memory", "cpu", "disk", "gpu_memory"]
Thresholds = dict[Resource, Share | None]

DEFAULT_THRESHOLDS: Thresholds = {"memory": 0.95, "cpu": None, "disk": None, "gpu_memory": None}


def _with_default_thresholds(value: object) -> object:
    return DEFAULT_THRESHOLDS | value if isinstance(value, dict) else value


class Section(BaseModel):
    """A section of the configuration: unknown keys are errors, values are not converted, nothing changes later."""

    model_config = ConfigDict(
        extra="forbid", frozen=True, strict=True, allow_inf_nan=False, validate_default=True, defer_build=True
    )


class CacheSettings(Section):
    """The cache of tokenised data on disk and in memory."""

    memory_size: Megabytes = Field(default=1000, description="Memory for cached token blocks; a plain number is in MB.")
    disk_size: Megabytes = Field(default=10000, description="Disk space for tokenised data; a plain number is in MB.")
    cleanup_interval: int = Field(default=3600, ge=0, description="Seconds between two clean-ups of the cache folder.")
    max_age_days: float = Field(default=7.0, gt=0, description="Days after which unused tokenised data is removed.")
    dir: UserPath | None = Field(
        default=None, description="Cache folder; null is $LLAMAHOME_CACHE or ~/.cache/llamahome."
    )


class DataSettings(Section):
    """What is read, how rows become samples, and how samples become tokens."""

    path: str | None = Field(
        default=None,
        min_length=1,
        description="File, folder, glob, hub id or module:object to train on; null is the built-in examples.",
    )
    eval_path: str | None = Field(
        default=None, min_length=1, description="Data to evaluate on; null holds out validation_split of the samples."
    )
    batch_size: Count | Auto = Field(default="auto", description="Same setting as training.batch_size.")
    max_length: int = Field(default=512, ge=2, description="Longest sample in tokens; see data.overflow.")
    num_workers: Workers = Field(default="auto", description="Same setting as training.num_workers.")
    validation_split: float = Field(
        default=0.1, ge=0, lt=1, description="Share of the samples held out for evaluation."
    )
    overflow: Literal["truncate", "split", "drop", "error"] = Field(
        default="truncate", description="What happens to a sample longer than max_length; always counted and said."
    )
    on_bad_row: Literal["error", "skip"] = Field(
        default="error", description="Stop at a faulty row, or skip and count it."
    )
    max_bad_rows: int = Field(
        default=100, ge=0, description="With on_bad_row: skip, stop when more rows than this are faulty."
    )
    on_empty: Literal["error", "skip"] = Field(
        default="error", description="Stop at a sample with no token to train on, or skip and count it."
    )
    format: str = Field(
        default="auto", min_length=1, description="Format of the files by name, or auto for their extension."
    )
    template: str = Field(
        default="auto",
        min_length=1,
        description="Chat template: auto (the tokenizer's), a name, module:object, or a path to a Jinja file.",
    )
    train_on: Literal["assistant", "all"] = Field(default="assistant", description="Tokens that count in the loss.")
    delimiter: str | None = Field(
        default=None,
        min_length=1,
        max_length=1,
        description="Character between the columns of CSV files; null detects it.",
    )
    fields: dict[str, str] = Field(default={}, description="Columns by role, for example {prompt: question}.")
    max_row_bytes: Size = Field(default="64MiB", description="Longest row that is read.")
    plugins: Texts = Field(default=(), description="Python files, or module:object, that add data formats.")
    shuffle: bool = Field(
        default=True, description="Train the samples of an epoch in a random order fixed by the seed."
    )
    buffer_size: Count = Field(default=1000, description="Samples that a StreamingDataset reads ahead.")


class MonitorSettings(Section):
    """What is written while a run goes on."""

    interval: Count = Field(default=10, description="Steps between two progress lines.")
    sinks: NamedList = Field(default=("tensorboard",), description="Where metrics go beside metrics.jsonl.")
    thresholds: Annotated[Thresholds, BeforeValidator(_with_default_thresholds)] = Field(
        default=DEFAULT_THRESHOLDS,
        description="Share of a resource in use above which a warning is given; null is never.",
    )


class OptimizationSettings(Section):
    """The optimizer, its schedule and when to stop."""

    learning_rate: float = Field(default=5e-5, gt=0, description="Highest learning rate, reached after the warmup.")
    weight_decay: float = Field(default=0.01, ge=0, description="Decay of weight matrices; biases and norms have none.")
    warmup_steps: Annotated[int, Field(ge=0)] | Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="Steps of linear warmup, or their share of the run if below 1; null is 100, or a tenth of the run.",
    )
    scheduler_type: Literal["cosine", "linear", "constant", "warmup_stable_decay"] | Scheduler = Field(
        default="cosine", description="Shape of the learning rate after the warmup."
    )
    max_steps: Count | None = Field(
        default=None, description="Optimizer steps of the run; null trains training.epochs."
    )
    global_batch_size: Count | None = Field(
        default=None, description="Samples per optimizer step; null is batch_size x gradient_accumulation x processes."
    )
    max_grad_norm: Annotated[float, Field(gt=0)] | None = Field(
        default=1.0, description="Gradients are scaled down to this norm; null turns clipping off."
    )
    optimizer: (
        Literal[
            "adamw", "sgd", "adafactor", "adamw_8bit", "paged_adamw", "paged_adamw_8bit", "torchao_adamw_8bit",
            "torchao_adamw_4bit", "torchao_adamw_fp8",
        ]
        | Optimizer
    ) = Field(default="adamw", description="The optimizer.")  # fmt: skip
    betas: Betas = Field(default=(0.9, 0.999), description="AdamW's decay rates of the two moments.")
    eps: float = Field(default=1e-8, gt=0, description="AdamW's term in the denominator.")
    on_nonfinite: Literal["stop", "skip", "rewind"] = Field(
        default="stop",
        description="A loss or gradient that is not finite: stop, skip the step, or go back to a checkpoint.",
    )
    spike_factor: Annotated[float, Field(gt=1)] | None = Field(
        default=None,
        description="A loss of so many times the median of the last 64 goes back to a checkpoint; null never does.",
    )
    min_lr_ratio: float = Field(
        default=0.0, ge=0, le=1, description="Lowest learning rate as a share of learning_rate."
    )
    decay_ratio: float = Field(
        default=0.2, gt=0, le=1, description="Share of the run that warmup_stable_decay decays in."
    )
    early_stopping_patience: Count | None = Field(
        default=None,
        description="Evaluations without a better training.best_metric before the run stops; null never stops.",
    )
    early_stopping_min_delta: float = Field(default=0.0, ge=0, description="Smallest change that counts as better.")


class ProcessingSettings(Section):
    """Numbers, kernels and devices."""

    mixed_precision: bool = Field(default=True, description="Compute in bf16 or fp16 where the hardware is fast at it.")
    gradient_checkpointing: Recompute = Field(
        default="auto",
        description="Recompute layers, so many of the first, or only their MLPs' products, in backward; auto does what "
        "memory asks for.",
    )
    compile_mode: Literal["none", "auto", "default", "reduce-overhead", "max-autotune"] = Field(
        default="auto", description="torch.compile mode; auto compiles where a measured trial says that it pays."
    )
    fuse: bool = Field(default=True, description="Run decoder layers by fused operations that keep less for backward.")
    precision: Literal["auto", "fp32", "bf16", "fp16"] = Field(
        default="auto", description="Type of the computation; auto chooses what mixed_precision allows."
    )
    threads: Annotated[int, Field(ge=1, le=1024)] | Auto = Field(
        default="auto", description="CPU threads of the computation."
    )
    attention: Attention = Field(default="auto", description="Implementation of attention.")
    device: Device = Field(default="auto", description="Where to train.")
    loss_chunk: Count | Auto = Field(
        default="auto", description="Trained tokens whose logits exist at a time; auto chooses by the vocabulary."
    )


class ResourceSettings(Section):
    """Loading of data, and the disk."""

    num_workers: Workers = Field(default="auto", description="Same setting as training.num_workers.")
    prefetch_factor: Count = Field(default=2, description="Same setting as training.prefetch_factor.")
    pin_memory: bool = Field(default=True, description="Same setting as training.pin_memory.")
    min_free_disk: Size = Field(
        default="1GB", description="Free disk space that must be left beside two checkpoints when a run starts."
    )


class TrainingSettings(Section):
    """The run: method, length, batches, evaluation and checkpoints."""

    output: UserPath = Field(default=Path("output/training"), description="Folder of the run.")
    method: Literal["lora", "qlora", "full", "qat"] = Field(default="lora", description="What is trained, and how.")
    seed: int = Field(default=42, ge=0, le=2**32 - 1, description="Seed of every random choice.")
    epochs: Count = Field(default=1, description="Passes over the data, unless optimization.max_steps is set.")
    memory_limit: SizeOrPercent = Field(default="90%", description="Memory of the device that the run may use.")
    batch_size: Count | Auto = Field(
        default="auto", description="Largest number of samples in a micro-batch; auto fills memory_limit."
    )
    gradient_accumulation: Count = Field(
        default=4, description="Micro-batches per step; with batch_size it gives the samples per step."
    )
    accumulation_steps: Count = Field(default=4, description="Same setting as training.gradient_accumulation.")
    mixed_precision: bool = Field(default=True, description="Same setting as processing.mixed_precision.")
    gradient_checkpointing: Recompute = Field(
        default="auto", description="Same setting as processing.gradient_checkpointing."
    )
    memory_efficient_attention: bool = Field(
        default=True, description="Never hold the matrix of attention scores; false is processing.attention: eager."
    )
    num_workers: Workers = Field(default="auto", description="Threads that prepare and load data.")
    prefetch_factor: Count = Field(default=2, description="Steps of data that each worker holds ready.")
    pin_memory: bool = Field(default=True, description="Hold batches in page-locked memory for faster copies to a GPU.")
    max_length: int = Field(default=512, ge=2, description="Same setting as data.max_length.")
    save_steps: Count = Field(default=500, description="Steps between two checkpoints.")
    eval_steps: Count | None = Field(default=None, description="Steps between two evaluations; null is once per epoch.")
    eval_samples: Count | None = Field(default=256, description="Samples per evaluation, the first ones; null is all.")
    keep_last: Count = Field(default=3, description="Checkpoints that are kept, beside the best.")
    retries: int = Field(default=0, ge=0, description="Restarts from the newest checkpoint after a crash.")
    callbacks: NamedList = Field(default=(), description="Callbacks of the loop.")
    metrics: NamedList = Field(default=(), description="Metrics computed from each step's record, beside the loss.")
    loss: Named = Field(default="cross_entropy", description="The loss.")
    best_metric: str = Field(default="eval_loss", min_length=1, description="Metric that chooses the best checkpoint.")


class MemorySettings(Section):
    """Shares of memory, and limits of the caches in it."""

    gpu_memory_fraction: Share = Field(default=0.9, description="Share of a GPU's memory that the process may take.")
    gpu_cache_size: Size | None = Field(default=None, description="Unused GPU memory kept for reuse; null is no limit.")
    cpu_memory_limit: SizeOrPercent | None = Field(
        default=None, description="Host memory of the run; null is no limit."
    )
    worker_memory: Size = Field(default="2GB", description="Memory of each data worker.")
    cache_size: Size | None = Field(
        default=None, description="Disk cache; the smaller of it and cache.disk_size counts."
    )
    cache_ttl: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="Seconds that cached data lives; the shorter of it and cache.max_age_days counts."
    )


class LoraSettings(Section):
    """The adapter that the methods lora and qlora train, and qat with qat.lora."""

    rank: Count = Field(default=16, description="Rank of the update.")
    alpha: Count = Field(default=32, description="Scale of the update, divided by the rank.")
    dropout: float = Field(default=0.0, ge=0, lt=1, description="Dropout before the adapter.")
    target_modules: Literal["all-linear"] | Annotated[Texts, Field(min_length=1)] = Field(
        default="all-linear", description="Layers that get an adapter: all-linear, or a list of names."
    )
    use_rslora: bool = Field(default=False, description="Divide alpha by the square root of the rank.")
    use_dora: bool = Field(default=False, description="Train magnitude and direction apart (DoRA).")
    absorb_rounding: bool = Field(
        default=True, description="Begin qlora's adapter as the best correction of the base's rounding errors."
    )


class QatSettings(Section):
    """Quantization-aware training: what the method qat trains for."""

    scheme: Literal["int8-dynamic-activation/int4-weight", "int4-weight", "int8-weight"] = Field(
        default="int8-dynamic-activation/int4-weight", description="What the finished model will be quantized to."
    )
    group_size: int = Field(default=32, ge=2, description="Weights of a row under one scale, where they get 4 bits.")
    start_step: int = Field(default=0, ge=0, description="Finished steps before rounding begins.")
    lora: bool = Field(default=False, description="Train an adapter by the section lora instead of all weights.")


class ModelSettings(Section):
    """The base model."""

    name: str | None = Field(
        default=None,
        min_length=1,
        description="Folder, GGUF file or hub id of the base model; null is the embedded SmolLM2.",
    )
    tokenizer: str | None = Field(default=None, min_length=1, description="Folder or hub id of another tokenizer.")
    revision: str | None = Field(default=None, min_length=1, description="Branch, tag or commit on the hub.")
    trust_remote_code: bool = Field(
        default=False, description="Run Python code that comes with the model. Only the command line may turn it on."
    )
    allow_pickle: bool = Field(
        default=False, description="Load weights that are not safetensors. Only the command line may turn it on."
    )


class DistributedSettings(Section):
    """Training on several devices."""

    strategy: Literal["auto", "replicate", "shard"] = Field(
        default="auto",
        description="The whole model on every rank, or its parts shared out (FSDP2); auto chooses by the plan.",
    )
    timeout: Annotated[float, Field(ge=1)] = Field(
        default=600.0, description="Seconds without progress after which a rank counts as hung and all are restarted."
    )
    reshard: bool = Field(
        default=True, description="Under shard, free a layer after its forward pass and gather it again for backward."
    )

    replicas: Count = Field(default=1, description="Groups of devices that each hold a whole copy of the model.")
