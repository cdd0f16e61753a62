"""The commands and the code that the documents show exist and parse."""

from __future__ import annotations

import ast
import re
import shlex
import subprocess
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path

import click
import pytest

import llamahome
from llamahome.cli import cli
from llamahome.config import Config

ROOT = Path(__file__).parents[1]
DOCUMENTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
MAKEFILE = (ROOT / "Makefile").read_text("utf-8")
TARGETS = set(re.findall(r"^([a-z-]+):", MAKEFILE, re.MULTILINE))


def blocks(language: str) -> Iterator[tuple[str, str]]:
    """(place, text) of each fenced block of that language."""
    for path in DOCUMENTS:
        text = path.read_text("utf-8")
        for found in re.finditer(rf"^```{language}\n(.*?)^```", text, re.DOTALL | re.MULTILINE):
            line = text.count("\n", 0, found.start()) + 2
            yield f"{path.name}:{line}", found.group(1)


def commands(program: str) -> Iterator[tuple[str, list[str]]]:
    """(place, arguments) of each line of a bash block, or piece of inline code, that calls `program`."""
    for place, text in blocks("bash"):
        for line in text.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            if words[:1] == [program]:
                yield place, words[1:]
    for path in DOCUMENTS:
        prose = re.sub(r"^```.*?^```", "", path.read_text("utf-8"), flags=re.DOTALL | re.MULTILINE)
        for code in re.findall(rf"`{program} ([^`]+)`", prose):
            yield path.name, shlex.split(code)


def as_parameters(calls: Iterator[tuple[str, list[str]]]) -> list[object]:
    return [pytest.param(arguments, id=f"{place} {' '.join(arguments)}") for place, arguments in calls]


@pytest.mark.parametrize("arguments", as_parameters(commands("make")))
def test_make_targets_exist(arguments: list[str]) -> None:
    targets = [word for word in arguments if "=" not in word]
    assert targets
    assert set(targets) <= TARGETS
    for variable in (word.split("=")[0] for word in arguments if "=" in word):
        assert f"$({variable})" in MAKEFILE


@pytest.mark.parametrize("arguments", as_parameters(commands("llamahome")))
def test_commands_parse(arguments: list[str]) -> None:
    settings = [value for option, value in pairwise(arguments) if option == "--set"]
    Config.load(overrides=settings)
    command: click.Command = cli
    above = click.Context(cli, **cli.context_settings)
    while isinstance(command, click.Group) and arguments and not arguments[0].startswith("-"):
        name, *arguments = arguments
        assert name in command.commands
        command = command.commands[name]
    _, left_over, _ = command.make_parser(click.Context(command, parent=above)).parse_args(list(arguments))
    assert left_over == []


@pytest.mark.parametrize(("place", "code"), list(blocks("python")))
def test_python_compiles_and_uses_public_names(place: str, code: str) -> None:
    tree = ast.parse(code, place)
    used = {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "lh"
    }
    assert used <= set(llamahome.__all__)


@pytest.mark.parametrize(("place", "text"), list(blocks("yaml")))
def test_settings_load(place: str, text: str, tmp_path: Path) -> None:
    path = tmp_path / place.replace(":", "-")
    path.write_text(text)
    Config.load(path)


def test_readme_shows_both_first_commands() -> None:
    shown = [arguments for _, arguments in commands("make")]
    assert ["train"] in shown
    assert ["test"] in shown


def test_links_lead_somewhere() -> None:
    for path in DOCUMENTS:
        for target in re.findall(r"\]\((?!https?:)([^)#]+)", path.read_text("utf-8")):
            assert (path.parent / target).exists(), f"{path.name}: {target}"


def test_make_help_lists_every_target() -> None:
    command = ["make", "--no-print-directory", "help"]  # the tests may be run by make themselves
    shown = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout
    assert {line.split()[0] for line in shown.splitlines()} == TARGETS
