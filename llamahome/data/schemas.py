"""Schemas: how the fields of a row become a sample, found from the names of the fields."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import TYPE_CHECKING, Any

from llamahome.data.rows import MEND_OR_SKIP, Row, bad_row, kind_of
from llamahome.errors import ConfigError, DataError

if TYPE_CHECKING:
    from llamahome.config.schema import DataSettings

logger = logging.getLogger(__name__)

Message = dict[str, Any]
ROLES = ("system", "user", "assistant", "tool")
_SHAREGPT_ROLES = MappingProxyType(
    {role: role for role in ROLES}
    | {"human": "user", "observation": "tool"}
    | dict.fromkeys(("gpt", "chatgpt", "bing", "bard", "model", "bot"), "assistant")
)


@dataclass(slots=True)
class Sample:
    """What one row says: chat `messages`, or plain `text`. `schema` is the name of the schema it was read with."""

    file: str
    line: int
    schema: str
    messages: list[Message] = field(default_factory=list)
    tools: list[Any] | None = None
    text: str = ""

    def canonical(self) -> bytes:
        """Bytes that are equal exactly for equal content, whatever the file and schema."""
        parts = [self.text]
        for message in self.messages:
            parts += (message["role"], message["content"])
            if len(message) > 2:
                parts.append(json.dumps(message, sort_keys=True, default=str))
        if self.tools:
            parts.append(json.dumps(self.tools, sort_keys=True, default=str))
        return "\0".join(parts).encode()


@dataclass(frozen=True)
class Schema:
    """Fields a row must have and may have, and the function that reads them."""

    required: tuple[str, ...]
    optional: tuple[str, ...]
    read: Callable[[Row, Sample], None]


def detect_schema(row: Row) -> str:
    """The first schema of `SCHEMAS` whose required fields the row has. Raises: DataError."""
    for name, schema in SCHEMAS.items():
        if all(required in row.fields for required in schema.required):
            return name
    columns = ", ".join(repr(name) for name in row.fields) or "none"
    known = ", ".join("+".join(schema.required) for schema in SCHEMAS.values())
    fix = f"name the fields as one of {known}, or set data.fields"
    if row.file.lower().removesuffix(".gz").endswith((".csv", ".tsv")):
        fix = f"the first line must name the columns; {fix}"
    raise bad_row(f"the fields match no schema: {columns}", row.file, row.line, fix=fix)


class SchemaReader:
    """Turns the rows of files into samples; each file has one schema, taken from its first good row."""

    def __init__(self, settings: DataSettings) -> None:
        known = {name for schema in SCHEMAS.values() for name in schema.required + schema.optional}
        for role in settings.fields:
            if role not in known:
                fix = f"choose among {', '.join(sorted(known))}"
                raise ConfigError(f"unknown field {role!r}", where="data.fields", fix=fix)
        self.columns = dict(settings.fields)
        self.schemas: dict[str, tuple[str, int]] = {}  # by file, with the line that it was taken from

    def read(self, row: Row) -> Sample:
        """Raises: DataError that names the row, and the field where one is at fault."""
        row = self._renamed(row) if self.columns else row
        name, first = self.schemas.get(row.file, ("", 0))
        if not name:
            name, first = detect_schema(row), row.line
        elif any(required not in row.fields for required in SCHEMAS[name].required):
            raise self._misfit(row, name, first)
        sample = to_sample(row, name)
        if row.file not in self.schemas:
            self.schemas[row.file] = name, first
            logger.debug("%s: schema %s, found in line %d", row.file, name, first)
        return sample

    def _renamed(self, row: Row) -> Row:
        fields = dict(row.fields)
        for role, column in self.columns.items():
            if column not in row.fields:
                columns = ", ".join(map(repr, row.fields))
                raise bad_row(f"no column {column!r} for data.fields.{role}; there are {columns}", row.file, row.line,
                              fix=f"set data.fields: {{{role}: COLUMN}} with one of them")  # fmt: skip
            fields[role] = row.fields[column]
        return row._replace(fields=fields)

    def _misfit(self, row: Row, name: str, first: int) -> DataError:
        missing = next(required for required in SCHEMAS[name].required if required not in row.fields)
        try:
            other = detect_schema(row)
        except DataError:
            return bad_row(f"the field {missing!r} is missing", row.file, row.line, field=missing)
        what = f"the row has the schema {other}, but the file began with {name} in line {first}"
        return bad_row(what, row.file, row.line, fix="keep one schema per file")


def to_sample(row: Row, schema: str) -> Sample:
    """Read a row by a schema. Raises: DataError that names the row and the field."""
    sample = Sample(row.file, row.line, schema)
    SCHEMAS[schema].read(row, sample)
    return sample


def _text(row: Row, name: str, *, optional: bool = False) -> str:
    value = row.fields.get(name)
    if value is None and optional:
        return ""
    if not isinstance(value, str):
        raise bad_row(f"{name!r} is {kind_of(value)}, expected text", row.file, row.line, field=name)
    _check_text(value, row, name)
    if not optional and not value.strip():
        raise bad_row(f"{name!r} is empty", row.file, row.line, field=name)
    return value


def _check_text(value: str, row: Row, name: str) -> None:
    if "\0" in value:
        at = value.index("\0") + 1
        raise bad_row(f"a NUL character at position {at}", row.file, row.line, field=name)
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            what = f"a lone surrogate U+{ord(value[error.start]):04X} at position {error.start + 1}"
            raise bad_row(what, row.file, row.line, field=name) from None


def _read_text(row: Row, sample: Sample) -> None:
    sample.text = _text(row, "text")


def _read_pair(question: str, answer: str) -> Callable[[Row, Sample], None]:
    def read(row: Row, sample: Sample) -> None:
        system, context = _text(row, "system", optional=True), ""
        if question == "instruction":
            context = _text(row, "input", optional=True)
        asked = f"{_text(row, question)}\n\n{context}" if context else _text(row, question)
        sample.messages = [{"role": "system", "content": system}] if system else []
        sample.messages.append({"role": "user", "content": asked})
        sample.messages.append({"role": "assistant", "content": _text(row, answer)})

    return read


def _read_messages(row: Row, sample: Sample) -> None:
    turns = _turns(row, "messages")
    sample.messages = [_message(turn, row, f"messages[{i}]") for i, turn in enumerate(turns)]
    _finish_chat(row, sample, "messages")


def _read_conversations(row: Row, sample: Sample) -> None:
    for i, turn in enumerate(_turns(row, "conversations")):
        place = f"conversations[{i}]"
        who = turn.get("from", turn.get("role"))
        if not isinstance(who, str) or who not in _SHAREGPT_ROLES:
            known = ", ".join(_SHAREGPT_ROLES)
            raise bad_row(f"unknown 'from': {who!r}, known are {known}", row.file, row.line, field=f"{place}.from")
        content = turn.get("value", turn.get("content"))
        turn = {"role": _SHAREGPT_ROLES[who], "content": content}
        sample.messages.append(_message(turn, row, place))
    system = _text(row, "system", optional=True)
    if system and sample.messages[0]["role"] != "system":
        sample.messages.insert(0, {"role": "system", "content": system})
    _finish_chat(row, sample, "conversations")


def _turns(row: Row, name: str) -> list[Mapping[str, Any]]:
    turns = row.fields.get(name)
    if not isinstance(turns, list):
        raise bad_row(f"{name!r} is {kind_of(turns)}, expected a list", row.file, row.line, field=name)
    if not turns:
        raise bad_row(f"{name!r} is empty", row.file, row.line, field=name)
    for i, turn in enumerate(turns):
        if not isinstance(turn, dict):
            what = f"a message is {kind_of(turn)}, expected an object"
            raise bad_row(what, row.file, row.line, field=f"{name}[{i}]")
    return turns


def _message(turn: Mapping[str, Any], row: Row, place: str) -> Message:
    role = turn.get("role")
    if role not in ROLES:
        what = f"unknown role {role!r}, known are {', '.join(ROLES)}"
        raise bad_row(what, row.file, row.line, field=f"{place}.role")
    content = _content(turn.get("content"), row, f"{place}.content")
    if not content.strip() and not (role == "assistant" and turn.get("tool_calls")) and role != "tool":
        raise bad_row(f"the {role}'s message is empty", row.file, row.line, field=f"{place}.content")
    # Templates read a missing key as absent, and None as the text "None".
    more = {key: value for key, value in turn.items() if key not in ("role", "content") and value is not None}
    for text in _texts(more):
        _check_text(text, row, place)
    return {"role": role, "content": content, **more}


def _content(content: object, row: Row, place: str) -> str:
    """Text, or a list of text parts joined."""
    if content is None:
        return ""
    if isinstance(content, list):
        content = "".join(_part(part, row, f"{place}[{i}]") for i, part in enumerate(content))
    if not isinstance(content, str):
        raise bad_row(f"'content' is {kind_of(content)}, expected text", row.file, row.line, field=place)
    _check_text(content, row, place)
    return content


def _part(part: object, row: Row, place: str) -> str:
    if isinstance(part, dict) and part.get("type") == "text" and isinstance(part.get("text"), str):
        return str(part["text"])
    kind = part.get("type") if isinstance(part, dict) else kind_of(part)
    raise bad_row(f"a part of kind {kind!r}: only text can be trained", row.file, row.line, field=place)


def _texts(value: object) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        yield from (text for pair in value.items() for item in pair for text in _texts(item))
    elif isinstance(value, list):
        yield from (text for item in value for text in _texts(item))


# Roles that may come after a role; None begins the sample.
_NEXT: Mapping[str | None, tuple[str, ...]] = MappingProxyType(
    {
        None: ("system", "user"),
        "system": ("user",),
        "user": ("assistant",),
        "assistant": ("user", "tool"),
        "tool": ("tool", "assistant"),
    }
)


def _finish_chat(row: Row, sample: Sample, name: str) -> None:
    """Check the order of the roles and take the tools."""
    before: str | None = None
    for i, message in enumerate(sample.messages):
        role = message["role"]
        if role not in _NEXT[before]:
            what = f"the role {role!r} " + (f"after {before!r}" if before else "begins the sample")
            fix = f"expected {' or '.join(_NEXT[before])}; {MEND_OR_SKIP}"
            raise bad_row(what, row.file, row.line, field=f"{name}[{i}].role", fix=fix)
        before = role
    if before != "assistant":
        last = f"{name}[{len(sample.messages) - 1}]"
        what = f"the last message is from {before!r}: nothing answers it"
        raise bad_row(what, row.file, row.line, field=last, fix=f"end with an assistant's message; {MEND_OR_SKIP}")
    tools = row.fields.get("tools")
    if tools and not isinstance(tools, list):
        raise bad_row(f"'tools' is {kind_of(tools)}, expected a list", row.file, row.line, field="tools")
    for text in _texts(tools):
        _check_text(text, row, "tools")
    sample.tools = tools if isinstance(tools, list) and tools else None


SCHEMAS: Mapping[str, Schema] = MappingProxyType(
    {
        "messages": Schema(("messages",), ("tools",), _read_messages),
        "conversations": Schema(("conversations",), ("system", "tools"), _read_conversations),
        "instruction": Schema(("instruction", "output"), ("input", "system"), _read_pair("instruction", "output")),
        "prompt": Schema(("prompt", "completion"), ("system",), _read_pair("prompt", "completion")),
        "question": Schema(("question", "answer"), ("system",), _read_pair("question", "answer")),
        "text": Schema(("text",), (), _read_text),
    }
)
PAIRS = ("instruction", "prompt", "question")
