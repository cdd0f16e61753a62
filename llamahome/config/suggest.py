"""The nearest known setting for an unknown one: other tools' names, other sections, then spelling."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import get_close_matches

from llamahome.config.tree import Config

KNOWN: dict[str, tuple[str, ...]] = {
    name: tuple(field.annotation.model_fields)  # type: ignore[union-attr]
    for name, field in Config.model_fields.items()
}

# What Hugging Face Trainer, TRL, Axolotl, LLaMA-Factory, torchtune, LitGPT and Unsloth call it.
OTHER_NAMES: dict[str, str] = {
    name: setting
    for setting, names in {
        "data.max_length": "max_seq_length max_seq_len max_len cutoff_len sequence_len sequence_length seq_len "
        "block_size context_length model_max_length",
        "data.template": "chat_template",
        "data.train_on": "train_on_inputs train_on_input train_on_responses_only assistant_only_loss mask_prompt",
        "data.validation_split": "val_set_size val_size val_split test_size val_split_fraction",
        "lora.alpha": "lora_alpha",
        "lora.dropout": "lora_dropout",
        "lora.rank": "r lora_r lora_rank",
        "lora.target_modules": "lora_target lora_target_modules lora_target_linear",
        "model.name": "base_model model_name model_id model_name_or_path pretrained_model_name_or_path",
        "model.tokenizer": "tokenizer_name tokenizer_name_or_path tokenizer_path",
        "monitor.interval": "logging_steps log_interval log_every_n_steps",
        "monitor.sinks": "report_to logger log_with use_wandb",
        "optimization.betas": "adam_beta1 adam_beta2 beta1 beta2",
        "optimization.early_stopping_patience": "early_stopping patience",
        "optimization.eps": "adam_epsilon adam_eps epsilon",
        "optimization.learning_rate": "lr",
        "optimization.max_grad_norm": "gradient_clip gradient_clipping gradient_clip_val grad_clip clip_grad_norm "
        "max_norm grad_norm_clip",
        "optimization.min_lr_ratio": "min_lr min_lr_rate cosine_min_lr_ratio",
        "optimization.optimizer": "optim optimizer_name",
        "optimization.scheduler_type": "lr_scheduler lr_scheduler_type scheduler lr_schedule",
        "optimization.warmup_steps": "warmup warmup_ratio num_warmup_steps lr_warmup_steps",
        "processing.attention": "attn_implementation flash_attention flash_attn use_flash_attention",
        "processing.compile_mode": "compile torch_compile torch_compile_mode",
        "processing.precision": "bf16 fp16 fp32 dtype torch_dtype compute_dtype",
        "training.batch_size": "per_device_train_batch_size train_batch_size micro_batch_size per_device_batch_size",
        "training.best_metric": "metric_for_best_model",
        "training.epochs": "num_train_epochs num_epochs max_epochs n_epochs",
        "training.eval_steps": "evaluation_steps eval_interval evals_per_epoch",
        "training.gradient_accumulation": "gradient_accumulation_steps grad_accum_steps grad_accum "
        "accumulate_grad_batches gradient_accumulation_iters",
        "training.gradient_checkpointing": "use_gradient_checkpointing activation_checkpointing "
        "enable_activation_checkpointing",
        "training.keep_last": "save_total_limit",
        "training.memory_limit": "max_memory max_memory_usage",
        "training.method": "adapter finetuning_type peft_type load_in_4bit use_lora quantization_bit",
        "training.num_workers": "dataloader_num_workers workers",
        "training.pin_memory": "dataloader_pin_memory",
        "training.prefetch_factor": "dataloader_prefetch_factor",
        "training.save_steps": "save_interval checkpoint_interval checkpointing_steps",
        "training.seed": "random_seed random_state",
    }.items()
    for name in names.split()
}
_OTHER_SECTIONS = {
    "dataset": "data", "datasets": "data", "hardware": "processing", "logging": "monitor", "logger": "monitor",
    "monitoring": "monitor", "optimizer": "optimization", "peft": "lora", "resources": "resource", "train": "training",
    "trainer": "training",
}  # fmt: skip


def suggest_section(name: str) -> str:
    """Say which section an unknown section with keys may stand for."""
    near = _OTHER_SECTIONS.get(name) or _nearest(name, KNOWN)
    return f"did you mean {near}?" if near else f"the sections are {', '.join(KNOWN)}"


def suggest_key(section: str, key: str) -> str:
    """Say which setting an unknown key may stand for; `section` is empty for a key at the top level."""
    prefix, _, name = key.partition(".")
    if name in KNOWN.get(prefix, ()):
        return f"write {name} on a line of its own under {prefix}"
    holders = [name for name, keys in KNOWN.items() if key in keys]
    main = next((name for name in ("training", *KNOWN) if name in holders), "")
    here = KNOWN.get(section, ())
    found = OTHER_NAMES.get(key) or (main and f"{main}.{key}")
    if not found and (near := _nearest(key, here)):
        found = f"{section}.{near}"
    if not found and (near := _nearest(key, [*OTHER_NAMES, *(name for keys in KNOWN.values() for name in keys)])):
        return suggest_key("", near)
    if found:
        return f"did you mean {found}?"
    return f"the keys of {section} are {', '.join(here)}" if here else f"the sections are {', '.join(KNOWN)}"


def nearest_choice(value: object, choices: Iterable[object]) -> str:
    """Return the choice whose spelling is nearest to `value`, or an empty text."""
    return _nearest(value, [choice for choice in choices if isinstance(choice, str)]) if isinstance(value, str) else ""


def _nearest(name: str, names: Iterable[str]) -> str:
    return next(iter(get_close_matches(name.lower(), list(names), n=1, cutoff=0.7)), "")
