"""Reads YAML by the rules that people expect (YAML 1.2's core schema) and remembers the line of every key.

PyYAML follows YAML 1.1, where `1e-4` is text, `012` is 10, `on` is true, `12:30:45` is 45045 and the last of two equal
keys wins. Here `1e-4` is a number, `012` is 12, only true and false are booleans, and equal keys are an error.
Anchors, aliases and tags of other languages are refused.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from pathlib import Path

import yaml

from llamahome.errors import ConfigError

MAX_BYTES = 1 << 20
MAX_DEPTH = 16
_KINDS = {"null": "null", "bool": "true or false", "int": "a whole number", "float": "a number", "str": "Unicode text"}
_TAG = "tag:yaml.org,2002:"


@dataclass(frozen=True)
class Document:
    """The values of a file and, for every path of keys, the line (from 1) where its key stands."""

    values: dict[str, object]
    lines: dict[tuple[str, ...], int]


class _Loader(yaml.SafeLoader):
    """Composes nodes with YAML 1.2's plain scalars; limits the depth and refuses aliases."""

    depth = 0

    def compose_node(self, parent: yaml.Node | None, index: int) -> yaml.Node | None:
        event = self.peek_event()  # type: ignore[no-untyped-call]
        if isinstance(event, yaml.AliasEvent) or event.anchor is not None:
            raise _syntax(
                "anchors (&) and aliases (*) are not supported, quote the text if it is one", event.start_mark
            )
        if self.depth == MAX_DEPTH:
            raise _syntax(f"nested deeper than {MAX_DEPTH} levels", event.start_mark)
        self.depth += 1
        node: yaml.Node | None = super().compose_node(parent, index)
        self.depth -= 1
        return node


_Loader.yaml_implicit_resolvers = {}  # not those of YAML 1.1
_NUMBER_STARTS = list("-+.0123456789")
for _kind, _pattern, _starts in (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?[0-9]+|0o[0-7]+|0x[0-9a-fA-F]+", _NUMBER_STARTS),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9]+(?:\.[0-9]*)?)(?:[eE][-+]?[0-9]+)?|[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)",
        _NUMBER_STARTS,
    ),
):
    _Loader.add_implicit_resolver(_TAG + _kind, re.compile(rf"(?:{_pattern})$"), _starts)


def read_document(path: Path) -> Document:
    """Read a YAML file whose top level is a mapping; raise ConfigError with file:line:column for whatever is wrong."""
    text = _read_text(path)
    root = _compose(text, str(path))
    if root is None:
        raise ConfigError("the file is empty", where=f"{path}:1:1", fix="write at least one section, or leave it out")
    builder = _Builder(str(path))
    values = builder.value(root, ())
    if not isinstance(values, dict):
        found = "a list" if isinstance(values, list) else f"the single value {values!r}"
        raise ConfigError(f"expected sections at the top, found {found}", where=builder.place(root))
    return Document(values, builder.lines)


def parse_value(text: str, source: str) -> object:
    """Read one value as it may stand in a file: a quoted text, a flow collection, or else a plain scalar.

    A plain scalar may hold any character (`*.jsonl`, `a: b`, `,`); an empty one is None.
    """
    _check_characters(text, source)
    text = text.strip()
    node: yaml.Node | None
    if text.startswith(("[", "{", '"', "'")):
        node = _compose(text, source)
    else:
        start = yaml.Mark(source, 0, 0, 0, None, 0)
        tag = _Loader("").resolve(yaml.ScalarNode, text, (True, False))  # type: ignore[no-untyped-call]
        node = yaml.ScalarNode(tag, text, start, start)
    return None if node is None else _Builder(source).value(node, ())


def _read_text(path: Path) -> str:
    try:
        with path.open("rb") as file:
            data = file.read(MAX_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError("no such configuration file", where=str(path.absolute()), fix="check the path") from None
    except (OSError, ValueError) as error:
        reason = getattr(error, "strerror", None) or str(error)
        raise ConfigError(f"cannot read the configuration file: {reason}", where=str(path)) from None
    if len(data) > MAX_BYTES:
        raise ConfigError("the configuration file is larger than 1 MiB", where=f"{path}:1:1", fix="check the path")
    if data.startswith((b"\xff\xfe", b"\xfe\xff")) or b"\0" in data[:4]:
        raise ConfigError("looks like UTF-16 or UTF-32", where=f"{path}:1:1", fix="save the file as UTF-8")
    try:
        text = data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        # The codec has stripped a BOM before it counts, so count from the data that it names.
        before = error.object[: error.start].decode("utf-8")
        raise ConfigError(
            f"not UTF-8: byte 0x{error.object[error.start]:02x}",
            where=f"{path}:{_line_column(before)}",
            fix="save the file as UTF-8",
        ) from None
    _check_characters(text, str(path))
    return text


def _check_characters(text: str, source: str) -> None:
    bad = yaml.reader.Reader.NON_PRINTABLE.search(text)
    if bad:
        place = f"{source}:{_line_column(text[: bad.start()])}"
        raise ConfigError(f"control character U+{ord(bad[0]):04X}", where=place, fix="delete it")


def _line_column(before: str) -> str:
    return f"{before.count(chr(10)) + 1}:{len(before) - before.rfind(chr(10))}"


def _compose(text: str, source: str) -> yaml.Node | None:
    try:
        node: yaml.Node | None = yaml.compose(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        place = f"{source}:{mark.line + 1}:{mark.column + 1}" if mark else source
        what, fix = _explain(error, text)
        raise ConfigError(what, where=place, fix=fix) from None
    except (yaml.YAMLError, ValueError) as error:
        raise ConfigError(f"invalid YAML: {error}", where=source) from None
    return node


def _explain(error: yaml.MarkedYAMLError, text: str) -> tuple[str, str]:
    problem, mark, lines = str(error.problem), error.problem_mark, text.splitlines()
    line = lines[mark.line] if mark and mark.line < len(lines) else ""
    if "\\t" in problem or "\t" in line[: len(line) - len(line.lstrip())]:
        return "invalid YAML: a tab in the indentation", "indent with spaces"
    if "a single document" in str(error.context):
        return "invalid YAML: a second document starts here", "keep one document in a file"
    fix = "put the text in quotes" if "cannot start any token" in problem else ""
    return f"invalid YAML: {problem}", fix


def _syntax(problem: str, mark: yaml.Mark) -> yaml.MarkedYAMLError:
    return yaml.MarkedYAMLError(problem=problem, problem_mark=mark)


@dataclass
class _Builder:
    """Turns nodes into plain Python values and notes the line of every key."""

    source: str
    lines: dict[tuple[str, ...], int] = field(default_factory=dict)

    def place(self, node: yaml.Node) -> str:
        return f"{self.source}:{node.start_mark.line + 1}:{node.start_mark.column + 1}"

    def value(self, node: yaml.Node, path: tuple[str, ...]) -> object:
        kind = node.tag.removeprefix(_TAG)
        if isinstance(node, yaml.MappingNode) and kind == "map":
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and kind == "seq":
            return [self.value(item, path) for item in node.value]
        if isinstance(node, yaml.ScalarNode) and kind in _KINDS:
            return self._scalar(node, kind)
        raise ConfigError(f"the tag {node.tag!r} is not supported", where=self.place(node), fix="write a plain value")

    def _mapping(self, node: yaml.MappingNode, path: tuple[str, ...]) -> dict[str, object]:
        result: dict[str, object] = {}
        for key_node, value_node in node.value:
            key = self.value(key_node, path)
            if not isinstance(key, str):
                raise ConfigError(f"expected a name as key, got {key!r}", where=self.place(key_node), fix="quote it")
            if key in result:
                first = self.lines[(*path, key)]
                raise ConfigError(
                    f"the key {key!r} stands twice, first in line {first}", where=self.place(key_node), fix="delete one"
                )
            self.lines[(*path, key)] = key_node.start_mark.line + 1
            result[key] = self.value(value_node, (*path, key))
        return result

    def _scalar(self, node: yaml.ScalarNode, kind: str) -> object:
        text = node.value
        try:
            match kind:
                case "null":
                    return None
                case "bool":
                    return {"true": True, "false": False}[text.lower()]
                case "int":
                    return int(text, {"0o": 8, "0x": 16}.get(text[:2], 10))
                case "float":
                    return float(text.lower().replace(".inf", "inf").replace(".nan", "nan"))
                case _:
                    # JSON writes a character beyond U+FFFF as two escapes; half of a pair is no text.
                    return text.encode("utf-16", "surrogatepass").decode("utf-16")
        except (ValueError, KeyError):
            raise ConfigError(f"{text[:40]!r} is not {_KINDS[kind]}", where=self.place(node)) from None
