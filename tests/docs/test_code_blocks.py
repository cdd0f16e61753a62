"""The pages say nothing that does not run: Python is executed, commands and settings are held to the real ones."""

from __future__ import annotations

import json
import re
import shlex
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import click
import pytest

from llamahome.cli import cli
from llamahome.config import Config

ROOT = Path(__file__).parents[2]
PAGES = [
    *(ROOT / "docs" / f"{name}.md" for name in ("index", "quickstart", "quantization")),
    *sorted((ROOT / "docs" / "how-to").glob("*.md")),
]


def blocks(page: Path, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", page.read_text(), re.MULTILINE | re.DOTALL)


def commands(page: Path) -> Iterator[list[str]]:
    """The words of each command of a page's shell blocks, without comments."""
    for block in blocks(page, "bash"):
        for line in block.replace("\\\n", " ").splitlines():
            words = shlex.split(line, comments=True)
            while words and re.fullmatch(r"[A-Z_]+=.*", words[0]):
                words.pop(0)
            if words:
                yield words


def parse(words: list[str]) -> None:
    """Let click parse `words`, down to the command's own arguments, and check what `--set` sets."""
    command: click.Command = cli
    context, rest = click.Context(cli, info_name="llamahome", **cli.context_settings), words
    while isinstance(command, click.Group):
        while rest and rest[0].startswith("-"):
            rest = rest[1:]
        _, found, rest = command.resolve_command(context, list(rest))
        assert found is not None
        command = found
    parsed = command.make_context(command.name, list(rest), parent=context)
    if overrides := parsed.params.get("overrides"):
        Config.load(None, list(overrides))


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_commands_exist(page: Path) -> None:
    targets = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    for words in commands(page):
        name = Path(words[0]).name
        if name == "llamahome":
            parse(words[1:])
        elif name == "make":
            assert words[1] in targets, words
        elif name == "torchrun":
            from torch.distributed.run import get_args_parser

            launched = get_args_parser().parse_args(words[1:])
            assert (launched.module, launched.training_script) == (True, "llamahome"), words
            parse(launched.training_script_args)
        elif files := [word for word in words[1:] if word.startswith("examples/")]:
            assert all((ROOT / file).exists() for file in files), words


def test_the_site_leads_to_every_page() -> None:
    def targets(nav: object) -> Iterator[str]:
        if isinstance(nav, str):
            yield nav
        for part in nav.values() if isinstance(nav, dict) else nav if isinstance(nav, list) else ():
            yield from targets(part)

    pages = {str(page.relative_to(ROOT / "docs")) for page in (ROOT / "docs").rglob("*.md")}
    listed = list(targets(tomllib.loads((ROOT / "zensical.toml").read_text())["project"]["nav"]))
    assert sorted(listed) == sorted(pages)
    linked = re.findall(r"\]\(([^)#]+\.md)\)", (ROOT / "docs" / "index.md").read_text())
    assert pages - {"index.md"} == set(linked)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_compiles_and_settings_are_valid(page: Path, tmp_path: Path) -> None:
    for block in blocks(page, "python"):
        compile(block, page.name, "exec")
    for block in blocks(page, "yaml"):
        file = tmp_path / "run.yaml"
        file.write_text(block)
        Config.load(file)


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_python_runs(page: Path, tmp_path: Path, tiny_model_dir: Path) -> None:
    """Each block by itself, as a file, where `data.jsonl` and `model` are."""
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    (tmp_path / "data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "model").symlink_to(tiny_model_dir)
    for number, block in enumerate(blocks(page, "python")):
        (tmp_path / f"block{number}.py").write_text(block)
        done = subprocess.run([sys.executable, f"block{number}.py"], cwd=tmp_path, capture_output=True, text=True,
                              check=False)  # fmt: skip
        assert done.returncode == 0, done.stderr


def test_links_lead_somewhere() -> None:
    for page in PAGES:
        for target in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
            assert "://" in target or (page.parent / target).exists(), f"{page.name}: {target}"
