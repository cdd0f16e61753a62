"""A model, data and settings so small that a run takes a second: for scripts that kill runs by the hundred."""

from __future__ import annotations

import json
from pathlib import Path

WORDS = ["sea", "mill", "river", "stone", "fox", "train", "rain", "home", "station", "dog"]
TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
)


def settings(folder: Path, **more: object) -> dict[str, object]:
    """Settings of a run in `folder`/run on the model and the rows that are made in `folder`; `__` stands for a dot."""
    _write_rows(folder / "rows.jsonl")
    _write_model(folder / "model")
    given: dict[str, object] = {
        "model.name": str(folder / "model"),
        "data.path": str(folder / "rows.jsonl"),
        "cache.dir": str(folder / "cache"),
        "training.output": str(folder / "run"),
        "training.batch_size": 1,  # then the cut, and so the bits, do not depend on the memory that is free
        "processing.precision": "fp32",
        "processing.compile_mode": "none",
        "processing.threads": 1,
        "optimization.global_batch_size": 4,
        "optimization.learning_rate": 1e-3,
        "lora.rank": 4,
        "lora.dropout": 0.1,
        "resource.min_free_disk": 0,
        "monitor.sinks": [],
    }
    return given | {key.replace("__", "."): value for key, value in more.items()}


def _write_rows(path: Path) -> None:
    rows = [
        {"instruction": f"Write about the {WORDS[i % 10]} number {i}.", "output": " ".join(WORDS[: 2 + i % 7])}
        for i in range(60)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


def _write_model(folder: Path) -> None:
    """Two layers of Llama with random weights, and a tokenizer of bytes."""
    import torch
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    bpe = Tokenizer(models.BPE(vocab={token: i for i, token in enumerate([*special, *alphabet])}, merges=[]))
    bpe.add_special_tokens(special)
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=bpe, bos_token=special[0], pad_token=special[0], eos_token=special[2], model_max_length=512
    )
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=512, tie_word_embeddings=True,
        bos_token_id=0, pad_token_id=0, eos_token_id=2,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
