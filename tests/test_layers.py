"""Imports go downward only, and nothing heavy is loaded before it is needed."""

from __future__ import annotations

import ast
import os
import statistics
import subprocess
import sys
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = (
    {"errors", "files", "plugins", "config", "demo", "_C", "kernels"},
    {"distributed", "memory", "monitor"},
    {"data"},
    {"model"},
    {"training"},
    {"aio", "chat", "commands", "doctor", "watch", "integrations", "cli", "__main__"},
)
LEVEL = {part: level for level, parts in enumerate(LAYERS) for part in parts}
HEAVY = {"torch", "transformers", "tokenizers", "peft", "numpy", "pyarrow", "datasets", "pydantic", "yaml", "rich"}


def sources() -> Iterator[tuple[str, Path]]:
    """Each file of the package with its part: the folder or module just below `llamahome`."""
    for path in sorted((ROOT / "llamahome").rglob("*.py")):
        yield path.relative_to(ROOT / "llamahome").with_suffix("").parts[0], path
    for path in sorted((ROOT / "kernels").rglob("*.py")):
        yield "kernels", path


def imported_parts(path: Path) -> set[str]:
    """The parts of llamahome that a file imports anywhere; "" stands for the package's own public names."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_bytes())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}:{node.lineno}: relative import"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    dotted = [name.split(".") for name in names - {"llamahome.__version__"} if name.split(".")[0] == "llamahome"]
    return {name[1] if len(name) > 1 and name[1] in LEVEL else "" for name in dotted}


def test_every_part_has_a_layer() -> None:
    assert {part for part, _ in sources()} - {"__init__"} <= set(LEVEL)


def test_imports_go_downward() -> None:
    faults = [
        f"{path.relative_to(ROOT)} imports {other or 'the public names'}"
        for part, path in sources()
        if part != "__init__"
        for other in imported_parts(path)
        if other not in LEVEL or LEVEL[other] > LEVEL[part]
    ]
    assert not faults


def test_no_two_parts_need_each_other() -> None:
    needs: dict[str, set[str]] = {}
    for part, path in sources():
        if part != "__init__":
            needs.setdefault(part, set()).update(imported_parts(path) - {part, ""})
    TopologicalSorter(needs).prepare()  # raises CycleError


@pytest.mark.parametrize("module", ["llamahome", "llamahome.errors", "llamahome.config", "llamahome.cli"])
def test_cheap_modules_load_nothing_heavy(module: str) -> None:
    allowed = set() if module in ("llamahome", "llamahome.errors") else {"pydantic", "yaml", "rich"}
    code = f"import sys, {module}; print(*({HEAVY - allowed!r} & set(sys.modules)))"
    assert run(code).strip() == ""


def test_import_takes_less_than_a_tenth_of_a_second() -> None:
    assert seconds("-c", "import llamahome") - seconds("-c", "") < 0.1


def test_help_takes_less_than_half_a_second() -> None:
    assert seconds("-m", "llamahome", "--help") < 0.5


def run(code: str) -> str:
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, capture_output=True, text=True).stdout


def seconds(*arguments: str) -> float:
    """Median of five runs after one that fills the caches; processor time, so that other load does not count."""
    spent = []
    for _ in range(6):
        before = os.times()
        subprocess.run([sys.executable, *arguments], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
        after = os.times()
        spent.append(after.children_user + after.children_system - before.children_user - before.children_system)
    return statistics.median(spent[1:])
