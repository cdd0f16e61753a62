"""Talk to a model: `llamahome chat`."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from llamahome.errors import UsageError

if TYPE_CHECKING:
    from llamahome.config import Config

_LEAST_NEW_TOKENS = 16


@dataclass
class Conversation:
    """A model, and what was said so far.

    temperature: 0 gives the most likely answer, always the same; more gives more varied ones.
    """

    model: Any
    tokenizer: Any
    max_new_tokens: int = 512
    temperature: float = 0.0
    messages: list[dict[str, str]] = field(default_factory=list)

    def reply(self, question: str, show: Callable[[str], None]) -> str:
        """The model's answer to `question`, given to `show` piece by piece; both are remembered.

        Raises: UsageError when the conversation no longer fits into the model's context.
        """
        messages = [*self.messages, {"role": "user", "content": question}]
        ids = self.tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        ).to(self.model.device)
        length = ids["input_ids"].shape[1]
        out = self.model.generate(
            **ids, streamer=_streamer(self.tokenizer, show), max_new_tokens=self._room(length), **self._sampling(),
            pad_token_id=self.tokenizer.pad_token_id or self.tokenizer.eos_token_id,
            eos_token_id=self.tokenizer.eos_token_id,
        )  # fmt: skip
        text: str = self.tokenizer.decode(out[0, length:], skip_special_tokens=True).strip()
        self.messages = [*messages, {"role": "assistant", "content": text}]
        return text

    def _room(self, length: int) -> int:
        context = getattr(self.model.config, "max_position_embeddings", None)
        left = self.max_new_tokens if context is None else min(self.max_new_tokens, context - length)
        if left < min(_LEAST_NEW_TOKENS, self.max_new_tokens):
            raise UsageError(f"{length} tokens were said, the model's context has {context}", fix="begin a new chat")
        return left

    def _sampling(self) -> dict[str, Any]:
        # The named None values undo what a model's generation_config.json asks for.
        if self.temperature == 0:
            return {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
        return {"do_sample": True, "temperature": self.temperature}


def open_conversation(
    path: str, config: Config, *, system: str | None = None, max_new_tokens: int = 512, temperature: float = 0.0
) -> Conversation:
    """The model or adapter at `path` (folder, run, checkpoint, GGUF file or hub id), ready to talk.

    Raises: ModelError, CheckpointError; UsageError for a tokenizer without a chat template.
    """
    from llamahome.model.load import load_trained
    from llamahome.training.checkpoint import model_folder
    from llamahome.training.host import set_threads
    from llamahome.training.precision import resolve_precision
    from llamahome.training.setup import resolve_device

    device = resolve_device(config)
    set_threads(config)
    folder = Path(path).expanduser()
    model, tokenizer = load_trained(
        model_folder(folder) if folder.is_dir() else path, config.model, device=device, attention="sdpa",
        dtype=resolve_precision(config, device).frozen, cache_dir=config.cache.dir,
    )  # fmt: skip
    if not tokenizer.chat_template:
        raise UsageError("the model has no chat template", where=path, fix="talk to a model that was made for chat")
    messages = [{"role": "system", "content": system}] if system else []
    return Conversation(model.eval(), tokenizer, max_new_tokens, temperature, messages)


def talk(conversation: Conversation, questions: Iterable[str], show: Callable[[str], None]) -> None:
    """Answer each question as it comes. Ctrl-C ends an answer that is too long, and forgets it."""
    for question in questions:
        if not question.strip():
            continue
        try:
            conversation.reply(question.strip(), show)
        except KeyboardInterrupt:
            show(" [stopped]")
        show("\n")


def _streamer(tokenizer: Any, show: Callable[[str], None]) -> Any:
    """transformers' streamer, which finds where a word is complete, with our way out."""
    from transformers import TextStreamer

    from llamahome.monitor.words import clean

    class Streamer(TextStreamer):  # type: ignore[misc]
        def on_finalized_text(self, text: str, stream_end: bool = False) -> None:
            show(clean(text, keep="\n\t"))

    return Streamer(tokenizer, skip_prompt=True, skip_special_tokens=True)
