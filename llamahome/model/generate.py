"""A model's answer to one question."""

from __future__ import annotations

from typing import Any

import torch

from llamahome.model.attention import standard_attention


@torch.no_grad()
def answer(model: Any, tokenizer: Any, question: str, *, max_new_tokens: int = 64) -> str:
    """The most likely answer (greedy) to a single user message, through the tokenizer's chat template."""
    messages = [{"role": "user", "content": question}]
    ids = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = ids.to(model.device)
    was_training = model.training
    model.eval()
    try:
        with standard_attention(model):
            out = model.generate(
                **ids, max_new_tokens=max_new_tokens, do_sample=False, temperature=None, top_p=None, top_k=None,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id, eos_token_id=tokenizer.eos_token_id,
            )  # fmt: skip
    finally:
        model.train(was_training)
    text: str = tokenizer.decode(out[0, ids["input_ids"].shape[1] :], skip_special_tokens=True)
    return text.strip()
