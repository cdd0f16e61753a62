"""A conversation remembers, streams what it says, stays within the context, and cannot steer the terminal."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome.chat import Conversation, open_conversation, talk
from llamahome.config import Config
from llamahome.errors import ModelError, UsageError
from llamahome.monitor.words import clean

QUESTION = "Write a short story about the sea."


@pytest.fixture
def conversation(tiny_model_dir: Path) -> Conversation:
    config = Config.load(None, ["processing.precision=fp32", "processing.device=cpu", "processing.threads=1"])
    conversation = open_conversation(str(tiny_model_dir), config, max_new_tokens=12)
    # With tied random weights the model repeats the last token; a head of its own lets it talk.
    weight = torch.randn(512, 64, generator=torch.Generator().manual_seed(1))
    conversation.model.lm_head.weight = torch.nn.Parameter(weight)
    return conversation


def test_the_same_question_gets_the_same_answer_and_the_pieces_make_it_up(conversation: Conversation) -> None:
    pieces: list[str] = []
    first = conversation.reply(QUESTION, pieces.append)
    again = Conversation(conversation.model, conversation.tokenizer, 12).reply(QUESTION, lambda text: None)
    assert first == again != ""
    assert len(pieces) > 2
    assert "".join(pieces).strip() == clean(first, keep="\n\t")


def test_the_next_answer_sees_what_was_said(conversation: Conversation) -> None:
    answer = conversation.reply("Hello", lambda text: None)
    conversation.reply("And again", lambda text: None)
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert conversation.messages[1]["content"] == answer


def test_a_conversation_longer_than_the_context_is_refused_and_forgotten(conversation: Conversation) -> None:
    before = list(conversation.messages)
    with pytest.raises(UsageError, match="the model's context has 2048"):
        conversation.reply("word " * 3000, lambda text: None)
    assert conversation.messages == before


def test_ctrl_c_ends_the_answer_not_the_talk() -> None:
    class Stops(Conversation):
        def reply(self, question: str, show: Any) -> str:
            if question == "long":
                raise KeyboardInterrupt
            show(question.upper())
            return ""

    said: list[str] = []
    talk(Stops(None, None), ["long", "  ", "short"], said.append)
    assert "".join(said) == " [stopped]\nSHORT\n"


def test_escape_sequences_of_the_model_are_shown_as_text(conversation: Conversation) -> None:
    from llamahome.chat import _streamer

    said: list[str] = []
    streamer = _streamer(conversation.tokenizer, said.append)
    for token in conversation.tokenizer("prompt \x1b[2J red\nnext line")["input_ids"]:
        streamer.put(torch.tensor([token]))
    streamer.end()
    text = "".join(said)
    assert "\x1b" not in text
    assert "\\x1b[2J" in text
    assert "\n" in text


def test_a_model_that_is_not_there_is_an_error_of_the_model(tmp_path: Path) -> None:
    with pytest.raises(ModelError):
        open_conversation(str(tmp_path / "none"), Config())
