"""The YAML that is read: 1.2's plain scalars, lines of keys, limits, and one place per fault."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from llamahome.config import yaml as reader
from llamahome.errors import ConfigError


def read(folder: Path, content: str | bytes) -> reader.Document:
    path = folder / "run.yaml"
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return reader.read_document(path)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("1e-4", 1e-4),
        ("5.0e-5", 5e-5),
        ("1E5", 1e5),
        (".5", 0.5),
        ("012", 12),
        ("+7", 7),
        ("0x1F", 31),
        ("0o17", 15),
        ("-.inf", -math.inf),
        (".Inf", math.inf),
        ("true", True),
        ("False", False),
        ("on", "on"),
        ("off", "off"),
        ("yes", "yes"),
        ("no", "no"),
        ("y", "y"),
        ("12:30:45", "12:30:45"),
        ("2001-01-01", "2001-01-01"),
        ("1_000", "1_000"),
        ("~", None),
        ("null", None),
        ("", None),
        ("=", "="),
        ("<<", "<<"),
        ("[1, a]", [1, "a"]),
        ("{a: 1e-4}", {"a": 1e-4}),
        ("'12'", "12"),
        ('"\\ud83d\\ude00"', "😀"),
    ],
)
def test_scalars(tmp_path: Path, text: str, value: object) -> None:
    for found in (read(tmp_path, f"key: {text}\n").values["key"], reader.parse_value(text, "--set key")):
        assert found == value
        assert type(found) is type(value)


@pytest.mark.parametrize("text", ["*.jsonl", ",", "|", "a: b", "@x", "%", "&a", "- x", "#", "!x", "a #b", "data/ä b"])
def test_an_override_may_hold_any_plain_text(text: str) -> None:
    assert reader.parse_value(text, "--set key") == text


def test_explicit_core_tags_are_followed(tmp_path: Path) -> None:
    assert read(tmp_path, "a: !!str 012\nb: !!float 1\nc: !!int '3'\n").values == {"a": "012", "b": 1.0, "c": 3}


def test_lines_of_keys(tmp_path: Path) -> None:
    document = read(tmp_path, "# head\na:\n  b: 1\n  c:\n    - x: 1\n\nd: {e: 1,\n  f: 2}\n")
    assert document.lines == {
        ("a",): 2, ("a", "b"): 3, ("a", "c"): 4, ("a", "c", "x"): 5, ("d",): 7, ("d", "e"): 7, ("d", "f"): 8,
    }  # fmt: skip


@pytest.mark.parametrize("content", [b"\xef\xbb\xbfa: 1\n", b"a: 1\r\n", b"---\na: 1\n...\n", b"%YAML 1.2\n---\na: 1"])
def test_bom_crlf_and_markers_are_read(tmp_path: Path, content: bytes) -> None:
    assert read(tmp_path, content).values == {"a": 1}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("", "the file is empty; {}:1:1; write at least one section, or leave it out"),
        ("# only this\n", "the file is empty; {}:1:1; write at least one section, or leave it out"),
        ("- a\n- b\n", "expected sections at the top, found a list; {}:1:1"),
        ("\nhello\n", "expected sections at the top, found the single value 'hello'; {}:2:1"),
        ("a: 1\nb: 2\na: 3\n", "the key 'a' stands twice, first in line 1; {}:3:1; delete one"),
        ("s:\n  a: 1\n  a: 1\n", "the key 'a' stands twice, first in line 2; {}:3:3; delete one"),
        ("s: {a: 1, a: 2}\n", "the key 'a' stands twice, first in line 1; {}:1:11; delete one"),
        ("s:\n\ta: 1\n", "invalid YAML: a tab in the indentation; {}:2:1; indent with spaces"),
        ("s:\n  a: 1\n \tb: 1\n", "invalid YAML: a tab in the indentation; {}:3:2; indent with spaces"),
        ("s:\n  a: 1\n b: 2\n", "invalid YAML: expected <block end>, but found '<block mapping start>'; {}:3:2"),
        ("a: [1\n", "invalid YAML: expected ',' or ']', but got '<stream end>'; {}:2:1"),
        ("a: @b\n", "invalid YAML: found character '@' that cannot start any token; {}:1:4; put the text in quotes"),
        ("a: b: c\n", "invalid YAML: mapping values are not allowed here; {}:1:5"),
        ('a: "b\n', "invalid YAML: found unexpected end of stream; {}:2:1"),
        ("a: 1\n---\nb: 1\n", "invalid YAML: a second document starts here; {}:2:1; keep one document in a file"),
        ("1: a\n", "expected a name as key, got 1; {}:1:1; quote it"),
        ("? [a]\n: 1\n", "expected a name as key, got ['a']; {}:1:3; quote it"),
        ("a: !!int x\n", "'x' is not a whole number; {}:1:4"),
        ("a: !!set {b}\n", "the tag 'tag:yaml.org,2002:set' is not supported; {}:1:4; write a plain value"),
        ("a: !x b\n", "the tag '!x' is not supported; {}:1:4; write a plain value"),
        ("a: \x07\n", "control character U+0007; {}:1:4; delete it"),
        ("a: b\nc: d\0\n", "control character U+0000; {}:2:5; delete it"),
        ('a: "\\ud800"\n', "'\\ud800' is not Unicode text; {}:1:4"),
        ("a: " + "9" * 5000 + "\n", "'" + "9" * 40 + "' is not a whole number; {}:1:4"),
        (b"a: 1\nb: \xff\n", "not UTF-8: byte 0xff; {}:2:4; save the file as UTF-8"),
        (b"\xef\xbb\xbfa: 1\nb: x\xe4\n", "not UTF-8: byte 0xe4; {}:2:5; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16"), "looks like UTF-16 or UTF-32; {}:1:1; save the file as UTF-8"),
        ("a: 1\n".encode("utf-16-be"), "looks like UTF-16 or UTF-32; {}:1:1; save the file as UTF-8"),
        ("a: 1\n".encode("utf-32"), "looks like UTF-16 or UTF-32; {}:1:1; save the file as UTF-8"),
        (b"#" * (2**20 + 1), "the configuration file is larger than 1 MiB; {}:1:1; check the path"),
        ("a: " + "[" * 20, "invalid YAML: nested deeper than 16 levels; {}:1:19"),
        (
            "a: &x 1\nb: *x\n",
            "invalid YAML: anchors (&) and aliases (*) are not supported, quote the text if it is one; {}:1:4",
        ),
    ],
)  # fmt: skip
def test_faults_name_line_and_column(tmp_path: Path, content: str | bytes, message: str) -> None:
    with pytest.raises(ConfigError) as caught:
        read(tmp_path, content)
    assert str(caught.value) == message.format(tmp_path / "run.yaml")


def test_half_a_megabyte_of_brackets_ends_at_once(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="nested deeper than 16 levels"):
        read(tmp_path, "[" * 500_000)


def test_python_tags_run_nothing(tmp_path: Path) -> None:
    canary = tmp_path / "canary"
    with pytest.raises(ConfigError, match=r"tag .*python/object/apply:os.system.* is not supported; .*:1:4"):
        read(tmp_path, f"a: !!python/object/apply:os.system ['touch {canary}']\n")
    assert not canary.exists()


def test_what_cannot_be_opened(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="cannot read the configuration file: Is a directory"):
        reader.read_document(tmp_path)
    with pytest.raises(ConfigError) as caught:
        reader.read_document(tmp_path / "none.yaml")
    assert str(caught.value) == f"no such configuration file; {tmp_path / 'none.yaml'}; check the path"
    with pytest.raises(ConfigError, match="cannot read the configuration file: embedded null byte"):
        reader.read_document(Path("a\0b"))


@settings(deadline=None)
@given(st.one_of(st.binary(max_size=60), st.text("ab:-[]{}#&*!|>'\"%@` \n\t,?0.1", max_size=60).map(str.encode)))
def test_any_bytes_give_a_document_or_one_clear_line(tmp_path_factory: pytest.TempPathFactory, content: bytes) -> None:
    folder, message = tmp_path_factory.getbasetemp(), ""
    try:
        document = read(folder, content)
        assert set(document.values) == {keys[0] for keys in document.lines}
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
    assert not message or str(folder / "run.yaml") in message


@settings(deadline=None)
@given(st.text(max_size=30))
def test_any_override_text_gives_a_value_or_one_clear_line(text: str) -> None:
    message = ""
    try:
        reader.parse_value(text, "--set key")
    except ConfigError as error:
        message = str(error)
    assert "\n" not in message
