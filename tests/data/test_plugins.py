"""Formats of other people: found, used, and named when they fail."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamahome.config import Config, DataSettings
from llamahome.data import formats, sources
from llamahome.data.formats import find_files, read_rows
from llamahome.data.rows import Row
from llamahome.errors import ConfigError, DataError


def settings(**values) -> DataSettings:
    return Config.load(None, {f"data.{name}": value for name, value in values.items()}).data


def raises(error: DataError):
    raise error


def rows(path: Path, **values) -> list[Row]:
    chosen = settings(**values)
    return list(read_rows(find_files(path, chosen), chosen, raises))


def write(path: Path, content: str) -> Path:
    path.write_text(content)
    return path


def texts(found: list[Row]) -> list[object]:
    return [row.fields["text"] for row in found]


EXAMPLE = Path(__file__).parents[2] / "examples" / "custom_format.py"


def test_the_example_plugin_reads_its_format(tmp_path):
    path = write(tmp_path / "faq.qa", "Q: What is 1+1?\nA: 2\n\nQ: And 2+2?\nA: 4\n")
    found = rows(path, plugins=[str(EXAMPLE)])
    assert [row.fields for row in found] == [
        {"question": "What is 1+1?", "answer": "2"},
        {"question": "And 2+2?", "answer": "4"},
    ]
    with pytest.raises(DataError, match=r"unknown format '\.qa'"):
        rows(path)


PLUGINS = {
    "raises": ("def read(path):\n    yield {'text': 'a'}\n    raise KeyError('x')", "failed: KeyError: 'x'", ":2"),
    "at_once": ("def read(path):\n    return 1 / 0", "failed: ZeroDivisionError", ":1"),
    "nonsense": ("def read(path):\n    yield {'text': 'a'}\n    yield ['a']", "gave a list instead of a dict", ":2"),
    "none": ("def read(path):\n    yield None", "gave null instead of a dict", ":1"),
    "keys": ("def read(path):\n    yield {1: 'a'}", "gave an object instead of a dict with text keys", ":1"),
    "number": ("def read(path):\n    return 5", "failed: TypeError", ":1"),
    "silent": ("def read(path):\n    while True:\n        pass\n    yield", "gave no row for", ":1"),
    "stubborn": (
        "def read(path):\n    while True:\n        try:\n            while True: pass\n"
        "        except Exception: pass\n    yield",
        "gave no row for",
        ":1",
    ),
    "endless": ("def read(path):\n    while True:\n        yield {'text': 'x' * 1000}", "seems never to end", None),
}


@pytest.mark.parametrize("name", PLUGINS)
def test_faults_of_a_plugin_name_the_plugin(tmp_path, monkeypatch, name):
    monkeypatch.setattr(formats, "PLUGIN_SECONDS", 0.3)
    monkeypatch.setattr(formats, "PLUGIN_TEXT_BYTES", 1 << 20)
    code, what, where = PLUGINS[name]
    plugin = write(tmp_path / f"{name}.py", f'EXTENSIONS = {{".foo"}}\n{code}\n')
    path = write(tmp_path / "a.foo", "x")
    with pytest.raises(DataError) as caught:
        rows(path, plugins=[str(plugin)])
    assert caught.value.what.startswith(f"plugin {name!r}")
    assert what in caught.value.what
    if where:
        assert caught.value.where == f"{path}{where}"


def test_plugins_that_cannot_be_used_are_errors(tmp_path):
    path = write(tmp_path / "a.jsonl", '{"text": "a"}\n')
    broken = write(tmp_path / "broken.py", "import no_such_module_anywhere\n")
    half = write(tmp_path / "half.py", "EXTENSIONS = {'foo'}\ndef read(path): ...\n")
    other = write(tmp_path / "metric.py", "def metric(): ...\n")
    with pytest.raises(DataError, match="plugin 'broken' cannot be loaded: ModuleNotFoundError"):
        rows(path, plugins=[str(broken)])
    with pytest.raises(DataError, match="plugin 'half' has not EXTENSIONS"):
        rows(path, plugins=[str(half)])
    with pytest.raises(ConfigError, match="no such Python file"):
        rows(path, plugins=[str(tmp_path / "gone.py")])
    assert texts(rows(path, plugins=[str(other)])) == ["a"], "a plugin of another kind is none of ours"


def test_installed_plugins_are_found(tmp_path, monkeypatch):
    class Point:
        name, value, dist = "foo", "foo_package", None

        def load(self):
            class Module:
                EXTENSIONS = (".foo",)
                read = staticmethod(lambda path: [{"text": path.read_text()}])

            return Module

    monkeypatch.setattr(sources, "entry_points", lambda group: [Point()] if group == "llamahome.formats" else [])
    assert texts(rows(write(tmp_path / "a.foo", "hi"))) == ["hi"]


def test_a_format_can_be_chosen_and_must_exist(tmp_path):
    path = write(tmp_path / "data.log", '{"text": "a"}\n')
    assert texts(rows(path, format="jsonl")) == ["a"]
    with pytest.raises(ConfigError, match="unknown format 'xml'"):
        rows(path, format="xml")
