"""Schemas are found by themselves; every fault names row and field."""

from __future__ import annotations

import pytest

from llamahome.config import Config, DataSettings
from llamahome.data.rows import Row
from llamahome.data.schemas import SchemaReader
from llamahome.errors import ConfigError, DataError


def settings(**values) -> DataSettings:
    return Config.load(None, {f"data.{name}": value for name, value in values.items()}).data


CHAT = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "a"}]
SCHEMAS = {
    "messages": ({"messages": CHAT}, CHAT),
    "parts": (
        {
            "messages": [
                {"role": "user", "content": [{"type": "text", "text": "q"}, {"type": "text", "text": "!"}]},
                CHAT[1],
            ]
        },
        [{"role": "user", "content": "q!"}, CHAT[1]],
    ),
    "conversations": ({"conversations": [{"from": "human", "value": "q"}, {"from": "gpt", "value": "a"}]}, CHAT),
    "instruction": ({"instruction": "q", "output": "a"}, CHAT),
    "input": ({"instruction": "q", "input": "x", "output": "a"}, [{"role": "user", "content": "q\n\nx"}, CHAT[1]]),
    "prompt": ({"prompt": "q", "completion": "a", "system": "s"}, [{"role": "system", "content": "s"}, *CHAT]),
    "question": ({"question": "q", "answer": "a", "text": "ignored"}, CHAT),
    "text": ({"text": "q"}, []),
}


def sample(content: dict, **values):
    return SchemaReader(settings(**values)).read(Row(content, "f.jsonl", 7))


@pytest.mark.parametrize("name", SCHEMAS)
def test_schemas_are_found_and_read(name):
    fields, messages = SCHEMAS[name]
    found = sample(fields)
    assert found.messages == messages
    assert found.text == ("q" if name == "text" else "")


def turns(*roles: str) -> dict:
    return {"messages": [{"role": role, "content": "x"} for role in roles]}


BAD_ROWS = {
    "type": ({"instruction": 5, "output": "a"}, "'instruction' is a number, expected text", ":instruction"),
    "bool": ({"prompt": True, "completion": "a"}, "'prompt' is true or false", ":prompt"),
    "null": ({"question": "q", "answer": None}, "'answer' is null", ":answer"),
    "empty": ({"text": "  "}, "'text' is empty", ":text"),
    "nul": ({"text": "a\0b"}, "a NUL character at position 2", ":text"),
    "surrogate": ({"text": "ab\ud800"}, "a lone surrogate U+D800 at position 3", ":text"),
    "surrogate in a message": (
        {"messages": [CHAT[0], {"role": "assistant", "content": "\udfff"}]},
        "a lone surrogate U+DFFF",
        ":messages[1].content",
    ),
    "unknown": ({"q": "x", "a": "y"}, "the fields match no schema: 'q', 'a'", ""),
    "not a list": ({"messages": "hi"}, "'messages' is text, expected a list", ":messages"),
    "no messages": ({"messages": []}, "'messages' is empty", ":messages"),
    "not an object": ({"messages": ["hi"]}, "a message is text", ":messages[0]"),
    "role": (turns("user", "bot"), "unknown role 'bot'", ":messages[1].role"),
    "no role": ({"messages": [{"content": "x"}]}, "unknown role None", ":messages[0].role"),
    "from": ({"conversations": [{"from": "alien", "value": "x"}]}, "unknown 'from': 'alien'", ":conversations[0].from"),
    "order": (turns("user", "user", "assistant"), "the role 'user' after 'user'", ":messages[1].role"),
    "begin": (turns("assistant", "user"), "the role 'assistant' begins", ":messages[0].role"),
    "late system": (turns("user", "assistant", "system"), "the role 'system' after 'assistant'", ":messages[2].role"),
    "unanswered": (turns("user", "assistant", "user"), "the last message is from 'user'", ":messages[2]"),
    "content": ({"messages": [{"role": "user", "content": 3}]}, "'content' is a number", ":messages[0].content"),
    "empty answer": (
        {"messages": [CHAT[0], {"role": "assistant", "content": ""}]},
        "the assistant's message is empty",
        ":messages[1].content",
    ),
    "image": (
        {"messages": [{"role": "user", "content": [{"type": "image"}]}]},
        "a part of kind 'image': only text can be trained",
        ":messages[0].content[0]",
    ),
    "tools": ({"messages": CHAT, "tools": "x"}, "'tools' is text, expected a list", ":tools"),
}


@pytest.mark.parametrize("name", BAD_ROWS)
def test_bad_rows_name_row_and_field(name):
    fields, what, where = BAD_ROWS[name]
    with pytest.raises(DataError) as caught:
        sample(fields)
    assert what in caught.value.what
    assert caught.value.where == f"f.jsonl:7{where}"


def test_a_file_has_one_schema_and_files_may_differ():
    reader = SchemaReader(settings())
    reader.read(Row({"messages": CHAT}, "a.jsonl", 1))
    reader.read(Row({"text": "x"}, "b.jsonl", 1))
    with pytest.raises(
        DataError, match=r"the row has the schema instruction, but the file began with messages in line 1; a\.jsonl:2"
    ):
        reader.read(Row({"instruction": "q", "output": "a"}, "a.jsonl", 2))
    with pytest.raises(DataError, match="the field 'text' is missing"):
        reader.read(Row({"body": "x"}, "b.jsonl", 2))


def test_a_bad_first_row_does_not_set_the_schema():
    reader = SchemaReader(settings())
    with pytest.raises(DataError):
        reader.read(Row({"text": ""}, "a.jsonl", 1))
    assert reader.read(Row({"prompt": "q", "completion": "a"}, "a.jsonl", 2)).schema == "prompt"


def test_columns_can_be_named():
    fields = {"Frage": "q", "Antwort": "a"}
    assert sample(fields, fields={"question": "Frage", "answer": "Antwort"}).messages == CHAT
    with pytest.raises(DataError, match=r"no column 'Answer' for data\.fields\.answer; there are 'Frage', 'Antwort'"):
        sample(fields, fields={"question": "Frage", "answer": "Answer"})
    with pytest.raises(ConfigError, match="unknown field 'qestion'"):
        sample(fields, fields={"qestion": "Frage"})


def test_a_csv_without_header_is_explained():
    with pytest.raises(DataError, match="the first line must name the columns"):
        SchemaReader(settings()).read(Row({"What is 2+2?": "x", "4": "y"}, "a.csv", 2))


def test_tool_calls_may_stand_without_content():
    call = {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "f"}}], "name": None}
    chat = [CHAT[0], call, {"role": "tool", "content": ""}, CHAT[1]]
    found = sample({"messages": chat, "tools": [{"name": "f"}]})
    assert found.messages[1] == {"role": "assistant", "content": "", "tool_calls": [{"function": {"name": "f"}}]}
    assert found.tools == [{"name": "f"}]


def test_canonical_bytes_tell_contents_apart_and_ignore_the_schema():
    same = [SCHEMAS[name][0] for name in ("messages", "conversations", "instruction", "question")]
    assert len({sample(fields).canonical() for fields in same}) == 1
    others = [
        {"text": "q"},
        {"messages": CHAT, "tools": [1]},
        {"prompt": "qa", "completion": "a"},
        SCHEMAS["prompt"][0],
    ]
    assert len({sample(fields).canonical() for fields in [same[0], *others]}) == 5
