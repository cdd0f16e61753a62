"""One held-out sample answered by the model as it stands: what the figures look like in words."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch

from llamahome.data.report import unpack_place
from llamahome.model.attention import standard_attention
from llamahome.training.setup import Assembled

_NEW_TOKENS = 64
_SECONDS = 5.0  # after which an answer is left as it is


def sample(parts: Assembled) -> dict[str, Any]:
    """The event `sample`: the prompt of the first held-out sample (or of the first trained one), the greedy answer,
    and the answer in the data.

    Nothing is drawn at random and no weight is touched: the steps have the same bits as without.
    """
    store = parts.prepared.validation if parts.prepared.validation is not None else parts.prepared.train
    ids, trained = store.document(0)
    first = int(np.argmax(trained)) or 1
    last = first + int(np.argmin(np.append(trained[first:], False)))
    place = parts.prepared.report.place(unpack_place(store.source(0)))
    text = {
        "prompt": _text(parts.tokenizer, ids[:first]),
        "answer": _text(parts.tokenizer, _continued(parts, ids[:first])),
        "wanted": _text(parts.tokenizer, ids[first:last]),
    }
    return {"event": "sample", "step": parts.loop.state.step, "place": place, **text}


@torch.no_grad()
def _continued(parts: Assembled, prompt: Any) -> Any:
    """The ids that the model goes on with."""
    model, tokenizer = parts.model, parts.tokenizer
    ids = torch.as_tensor(prompt.astype(np.int64), device=model.device).unsqueeze(0)
    was_training = model.training
    model.eval()
    try:
        with standard_attention(model), parts.loop.precision.autocast():
            out = model.generate(
                input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=_NEW_TOKENS, max_time=_SECONDS,
                do_sample=False, temperature=None, top_p=None, top_k=None, eos_token_id=tokenizer.eos_token_id,
                pad_token_id=tokenizer.pad_token_id or tokenizer.eos_token_id,
            )  # fmt: skip
    finally:
        model.train(was_training)
    return out[0, ids.shape[1] :].tolist()


def _text(tokenizer: Any, ids: Any) -> str:
    text: str = tokenizer.decode(list(ids), skip_special_tokens=True)
    return text.strip()
