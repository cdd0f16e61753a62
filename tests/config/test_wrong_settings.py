"""Every kind of wrong name, value and combination, with the exact message."""

from __future__ import annotations

from collections.abc import Callable

import pytest

WRONG = [
    # names
    ("optimization: {max_stepz: 3}", "optimization.max_stepz: unknown key; did you mean optimization.max_steps?"),
    ("learning_rate: 1", "learning_rate: unknown key; did you mean optimization.learning_rate?"),
    ("lr: 1e-4", "lr: unknown key; did you mean optimization.learning_rate?"),
    ("training: {learning_rate: 1}", "training.learning_rate: unknown key; did you mean optimization.learning_rate?"),
    ("training: {num_train_epochs: 1}", "training.num_train_epochs: unknown key; did you mean training.epochs?"),
    ("per_device_train_batch_size: 1", "per_device_train_batch_size: unknown key; did you mean training.batch_size?"),
    ("lora: {lora_r: 8}", "lora.lora_r: unknown key; did you mean lora.rank?"),
    ("max_seq_length: 8", "max_seq_length: unknown key; did you mean data.max_length?"),
    ("training: {bf16: true}", "training.bf16: unknown key; did you mean processing.precision?"),
    ("num_train_epoch: 2", "num_train_epoch: unknown key; did you mean training.epochs?"),
    ("training.epochs: 2", "training.epochs: unknown key; write epochs on a line of its own under training"),
    ("trainig: {epochs: 2}", "trainig: unknown section; did you mean training?"),
    ("peft: {r: 2}", "peft: unknown section; did you mean lora?"),
    ("lora: {zzz: 1}", "lora.zzz: unknown key; the keys of lora are rank, alpha, dropout, target_modules, use_rslora, "
     "use_dora, absorb_rounding"),
    ("zzz: 1", "zzz: unknown key; the sections are cache, data, monitor, optimization, processing, resource, training, "
     "memory, lora, qat, model, distributed"),
    # shapes
    ("training: 3", "training: expected the section's keys, got 3; write one key per line, indented"),
    ("training: [a]", 'training: expected the section\'s keys, got ["a"]; write one key per line, indented'),
    # values
    ("optimization: {learning_rate: fast}",
     'optimization.learning_rate: expected a number > 0, got "fast"; the default is 5e-05'),
    ("optimization: {learning_rate: 0}",
     "optimization.learning_rate: expected a number > 0, got 0; the default is 5e-05"),
    ("optimization: {learning_rate: .nan}",
     "optimization.learning_rate: expected a number > 0, got NaN; the default is 5e-05"),
    ("optimization: {learning_rate: 1e999}",
     "optimization.learning_rate: expected a number > 0, got Infinity; the default is 5e-05"),
    ("optimization: {learning_rate: }",
     "optimization.learning_rate: expected a number > 0, got null; the default is 5e-05"),
    ("optimization: {betas: [0.9]}",
     "optimization.betas: expected a list of 2, each a number >= 0 and < 1, got [0.9]; the default is [0.9, 0.999]"),
    ("optimization: {betas: [0.9, 1.0]}",
     "optimization.betas: expected a list of 2, each a number >= 0 and < 1, got [0.9, 1.0]; "
     "the default is [0.9, 0.999]"),
    ("optimization: {warmup_steps: 1.5}",
     "optimization.warmup_steps: expected a whole number >= 0 or a number > 0 and < 1 or null, got 1.5; "
     "the default is null"),
    ("optimization: {scheduler_type: cosin}",
     "optimization.scheduler_type: expected one of cosine, linear, constant, warmup_stable_decay or module:object, "
     'got "cosin"; did you mean cosine?'),
    ("training: {epochs: '3'}", 'training.epochs: expected a whole number >= 1, got "3"; the default is 1'),
    ("training: {epochs: true}", "training.epochs: expected a whole number >= 1, got true; the default is 1"),
    ("training: {epochs: 1.5}", "training.epochs: expected a whole number >= 1, got 1.5; the default is 1"),
    ("training: {batch_size: big}",
     'training.batch_size: expected a whole number >= 1 or auto, got "big"; the default is "auto"'),
    ("training: {method: loar}",
     'training.method: expected one of lora, qlora, full, qat, got "loar"; did you mean lora?'),
    ("training: {pin_memory: yes}", 'training.pin_memory: expected true or false, got "yes"; the default is true'),
    ("training: {pin_memory: on}", 'training.pin_memory: expected true or false, got "on"; the default is true'),
    ("training: {pin_memory: 1}", "training.pin_memory: expected true or false, got 1; the default is true"),
    ("training: {seed: -1}",
     "training.seed: expected a whole number >= 0 and <= 4294967295, got -1; the default is 42"),
    ("training: {memory_limit: lots}",
     'training.memory_limit: expected a size such as 8GB, 512MiB or a number of bytes, got \'lots\'; '
     'the default is "90%"'),
    ("training: {memory_limit: 0%}",
     'training.memory_limit: expected a percentage above 0 and up to 100, got \'0%\'; the default is "90%"'),
    ("memory: {worker_memory: 5%}",
     "memory.worker_memory: expected a size such as 8GB, 512MiB or a number of bytes, got the percentage '5%'; "
     'the default is "2GB"'),
    ("memory: {gpu_cache_size: 8G}",
     'memory.gpu_cache_size: expected a size such as 8GB or null, got "8G"; the default is null'),
    ("training: {callbacks: [a b]}",
     "training.callbacks: expected a name or module:object, got 'a b'; the default is []"),
    ("training: {callbacks: mine}",
     'training.callbacks: expected a list, each a name or module:object, got "mine"; the default is []'),
    ("data: {delimiter: ';;'}", 'data.delimiter: expected one character or null, got ";;"; the default is null'),
    ("data: {fields: {a: 1}}", 'data.fields: expected a mapping from names to text, got {"a": 1}; the default is {}'),
    ("monitor: {thresholds: {gpu: 0.5}}",
     'monitor.thresholds: expected a mapping from memory, cpu, disk, gpu_memory to a number > 0 and <= 1 or null, '
     'got {"gpu": 0.5}; the default is {"memory": 0.95, "cpu": null, "disk": null, "gpu_memory":...'),
    ("lora: {target_modules: []}",
     'lora.target_modules: expected all-linear or a list, each text, got []; the default is "all-linear"'),
    ("processing: {device: gpu}",
     "processing.device: expected auto, cpu, cuda or cuda:N, got 'gpu'; the default is \"auto\""),
    ("cache: {dir: 3}", "cache.dir: expected a path or null, got 3; the default is null"),
    ("cache: {dir: ~nobody-here/x}", 'cache.dir: expected a path or null, got "~nobody-here/x"; the default is null'),
    # combinations
    ("model: {trust_remote_code: true}",
     "model.trust_remote_code: may be true only on the command line, got true; "
     "remove it, and use --set model.trust_remote_code=true"),
    ("model: {allow_pickle: true}",
     "model.allow_pickle: may be true only on the command line, got true; "
     "remove it, and use --set model.allow_pickle=true"),
    ("training: {method: full}\nlora: {use_dora: true}",
     'lora.use_dora: the method full has no adapter (training.method: "full", run.yaml:1); '
     "remove it, or set training.method: lora"),
    ("training: {method: qat}\nlora: {use_rslora: true}",
     'lora.use_rslora: the method qat has no adapter (training.method: "qat", run.yaml:1); '
     "remove it, or set training.method: lora"),
    ("processing: {attention: flash_attention_2}\ntraining: {mixed_precision: false}",
     "processing.attention: flash_attention_2 cannot compute in fp32 (training.mixed_precision: false, run.yaml:2); "
     "use bf16, fp16, or attention: sdpa"),
    ("optimization: {early_stopping_patience: 2}\ndata: {validation_split: 0}",
     "optimization.early_stopping_patience: early stopping needs evaluations, and there is nothing to evaluate on "
     "(data.validation_split: 0, run.yaml:2); set data.eval_path"),
    ("optimization: {scheduler_type: warmup_stable_decay, warmup_steps: 0.5, decay_ratio: 0.6}",
     "optimization.decay_ratio: the warmup and the decay together take 1.1 of the run "
     "(optimization.warmup_steps: 0.5, run.yaml:1); make one shorter"),
]  # fmt: skip


@pytest.mark.parametrize(("text", "message"), WRONG, ids=[text for text, _ in WRONG])
def test_wrong_file(faults: Callable[..., list[str]], text: str, message: str) -> None:
    found = faults(text + "\n")
    line = 2 if "\nlora:" in text else 1
    assert found == [f"run.yaml:{line}: {message}"]
