"""The built-in data is real, clean, the same every time, and made without running any of the sources."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from llamahome.demo import DEMO_QUESTION, DEMO_SETTINGS, clean_answer, demo_pairs, write_demo_data
from llamahome.errors import MissingError, StorageError

SOURCE = '''
"""Tools for measuring the flow of water."""
raise SystemExit("this module must never run")

class Meter:
    """A meter that counts litres until it is reset."""

    def read(self, unit="l", *, digits=2):
        """Return the count so far in the unit asked for.

        Reading does not
        change the count.

        Args:
            unit: l or gal
        """

    @property
    def total(self):
        """The litres counted since the meter was made."""

    def again(self):
        """Return the count so far in the unit asked for.

        Reading does not change the count.
        """

    def _hidden(self):
        """Nobody should be asked about a private name."""

def short():
    """Too short."""
'''


@pytest.fixture(scope="module")
def rows(tmp_path_factory: pytest.TempPathFactory) -> list[list[dict[str, str]]]:
    path = tmp_path_factory.mktemp("demo") / "new folder" / "demo.jsonl"
    count = write_demo_data(path)
    lines = path.read_text("utf-8").splitlines()
    assert count == len(lines)
    assert [entry.name for entry in path.parent.iterdir()] == ["demo.jsonl"]
    return [json.loads(line)["messages"] for line in lines]


def test_one_module_gives_its_public_documented_names_once(tmp_path: Path) -> None:
    (tmp_path / "flow.py").write_text(SOURCE)
    (tmp_path / "_private.py").write_text(SOURCE.replace("water", "milk"))
    (tmp_path / "site-packages").mkdir()
    (tmp_path / "site-packages" / "other.py").write_text(SOURCE.replace("water", "sand"))
    assert list(demo_pairs(tmp_path)) == [
        ("What is the Python module `flow` for?", "Tools for measuring the flow of water."),
        ("What is the class `flow.Meter` in Python?", "A meter that counts litres until it is reset."),
        (
            "What does `flow.Meter.read(unit='l', *, digits=2)` do in Python?",
            "Return the count so far in the unit asked for.\nReading does not change the count.",
        ),
        ("What is the property `flow.Meter.total` in Python?", "The litres counted since the meter was made."),
    ]


@pytest.mark.parametrize(
    "docstring",
    [
        "",
        "Too short.",
        "No full stop at the end of this one",
        "lower case at the beginning of this one.",
        "shorten(text, width) -> str. A signature comes first.",
        "    x    y\n   a table, not prose at all.",
        ">>> call(1)\nAn example comes first in this one.",
        "Arguments: none that matter to anybody at all.",
        "A" + "n answer without an end" * 30 + ".",
    ],
)
def test_what_is_not_prose_is_no_answer(docstring: str) -> None:
    assert clean_answer(docstring) == ""


def test_an_answer_ends_before_examples_and_sections() -> None:
    text = "Return the sum of all the values.\n\n>>> total([1])\n1\n\nMore prose that belongs to the example."
    assert clean_answer(text) == "Return the sum of all the values."
    assert (
        clean_answer("Return the sum of all the values.\n\nRaises:\n  ValueError.")
        == "Return the sum of all the values."
    )


def test_the_library_gives_thousands_of_good_pairs(rows: Sequence[Sequence[dict[str, str]]]) -> None:
    assert 2000 <= len(rows) <= 5000
    answers = [answer["content"] for _, answer in rows]
    questions = [question["content"] for question, _ in rows]
    assert len(set(answers)) == len(answers)
    assert all(30 <= len(answer) <= 500 and answer.replace("\n", "").isprintable() for answer in answers)
    assert all(question.endswith("?") and "`" in question and len(question) <= 110 for question in questions)
    assert {tuple(message["role"] for message in row) for row in rows} == {("user", "assistant")}


def test_the_first_rows_are_a_fair_sample(rows: Sequence[Sequence[dict[str, str]]]) -> None:
    modules = {question["content"].split("`")[1].split("(")[0].split(".")[0] for question, _ in rows[:100]}
    assert len(modules) > 40


def test_the_sample_question_is_not_in_the_data(rows: Sequence[Sequence[dict[str, str]]]) -> None:
    assert all(question["content"] != DEMO_QUESTION for question, _ in rows)


def test_the_same_bytes_every_time(tmp_path: Path, rows: Sequence[object]) -> None:
    write_demo_data(tmp_path / "again.jsonl")
    again = [json.loads(line)["messages"] for line in (tmp_path / "again.jsonl").read_text("utf-8").splitlines()]
    assert again == rows


def test_faults_are_told_in_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StorageError, match="cannot write"):
        write_demo_data(tmp_path / "file" / "demo.jsonl")
    monkeypatch.setattr("sysconfig.get_path", lambda name: str(tmp_path / "nothing"))
    with pytest.raises(MissingError, match="no library sources"):
        write_demo_data(tmp_path / "demo.jsonl")
    assert not (tmp_path / "demo.jsonl").exists()


def test_the_settings_are_known_ones() -> None:
    from llamahome.config import Config

    config = Config.load(overrides=DEMO_SETTINGS)
    assert config.optimization.max_steps == DEMO_SETTINGS["optimization.max_steps"]
