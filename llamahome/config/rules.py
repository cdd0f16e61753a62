"""Rules between settings that are each fine by themselves: some are faults, some deserve a warning."""

from __future__ import annotations

from collections.abc import Iterator

from llamahome.config.schema import QatSettings
from llamahome.config.tree import Config, Key

Broken = tuple[tuple[Key, ...], str, str]  # the keys that clash (the first is blamed), the rule, what to do

_FLASH = ("flash_attention_2", "flash_attention_3")


def broken_rules(config: Config) -> Iterator[Broken]:
    """Yield combinations that cannot work."""
    warmup, decay = config.optimization.warmup_steps, config.optimization.decay_ratio
    stable = config.optimization.scheduler_type == "warmup_stable_decay"
    if stable and isinstance(warmup, float) and warmup + decay > 1:
        keys = (("optimization", "decay_ratio"), ("optimization", "warmup_steps"))
        yield keys, f"the warmup and the decay together take {warmup + decay:g} of the run", "make one shorter"
    attention = config.processing.attention
    if attention in _FLASH and config.processing.precision == "fp32":
        precision = (("processing", "precision"), ("processing", "mixed_precision"))
        yield (
            (("processing", "attention"), *precision),
            f"{attention} cannot compute in fp32",
            "use bf16, fp16, or attention: sdpa",
        )
    patience, held_out = config.optimization.early_stopping_patience, config.data.validation_split > 0
    if patience is not None and not held_out and config.data.eval_path is None:
        keys = (("optimization", "early_stopping_patience"), ("data", "validation_split"))
        yield keys, "early stopping needs evaluations, and there is nothing to evaluate on", "set data.eval_path"
    method = config.training.method
    for name in ("use_dora", "use_rslora"):
        if config.trains_base and getattr(config.lora, name):
            keys = (("lora", name), ("training", "method"))
            yield keys, f"the method {method} has no adapter", "remove it, or set training.method: lora"
    joined = method == "qat" and config.qat.lora
    for name in ("use_dora", "dropout"):
        if joined and getattr(config.lora, name):
            keys = (("lora", name), ("qat", "lora"))
            yield keys, "adapter and weights are rounded as one, which it cannot be a part of", "remove it"


def doubtful(config: Config) -> Iterator[Broken]:
    """Yield combinations that work, but hardly as meant."""
    optimization, default, method = config.optimization, Config(), config.training.method
    warmup, steps = optimization.warmup_steps, optimization.max_steps
    if isinstance(warmup, int) and steps is not None and warmup >= steps:
        keys: tuple[Key, ...] = (("optimization", "warmup_steps"), ("optimization", "max_steps"))
        yield keys, f"the warmup of {warmup} steps does not end within {steps} steps", "lower warmup_steps"
    accumulation = config.training.gradient_accumulation
    if optimization.global_batch_size is not None and accumulation != default.training.gradient_accumulation:
        keys = (("training", "gradient_accumulation"), ("optimization", "global_batch_size"))
        yield keys, "has no effect, because global_batch_size is set", "remove one of them"
    for name in ("rank", "alpha", "dropout", "target_modules"):
        if config.trains_base and getattr(config.lora, name) != getattr(default.lora, name):
            keys = (("lora", name), ("training", "method"))
            yield keys, f"has no effect with the method {method}", "remove it"
    if not config.lora.absorb_rounding and method != "qlora":
        keys = (("lora", "absorb_rounding"), ("training", "method"))
        yield keys, f"has no effect with the method {method}", "remove it"
    for name in QatSettings.model_fields:
        if method != "qat" and getattr(config.qat, name) != getattr(default.qat, name):
            keys = (("qat", name), ("training", "method"))
            yield keys, f"has no effect with the method {method}", "remove it"
