"""Files and functions stay short, and no text names a machine."""

from __future__ import annotations

import ast
import re
import subprocess
from pathlib import Path

ROOT = Path(__file__).parents[1]
MAX_FILE_LINES = 400
MAX_FUNCTION_LINES = 80
MACHINE_PATH = re.compile(r"(?<![\w.~<{/-])/(work|farm|root|home|Users)/\w")


def files(*suffixes: str) -> list[Path]:
    """The project's own files: what git tracks or would, in a clone of it."""
    command = ["git", "ls-files", "--cached", "--others", "--exclude-standard", "-z"]
    names = subprocess.run(command, cwd=ROOT, check=True, capture_output=True, text=True).stdout.split("\0")
    paths = [ROOT / name for name in names if name and name.endswith(suffixes)]
    return [path for path in paths if path.is_file()]


def test_no_file_is_too_long() -> None:
    lengths = {path.relative_to(ROOT): len(path.read_bytes().splitlines()) for path in files(".py", ".cpp", ".h")}
    assert lengths
    assert {path: length for path, length in lengths.items() if length > MAX_FILE_LINES} == {}


def test_no_function_is_too_long() -> None:
    faults = []
    for path in files(".py"):
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef) and node.end_lineno is not None:
                length = node.end_lineno - node.lineno + 1
                if length > MAX_FUNCTION_LINES:
                    faults.append(f"{path.relative_to(ROOT)}:{node.lineno} {node.name} has {length} lines")
    assert not faults


def test_no_text_names_a_machine() -> None:
    faults = []
    for path in files():
        text = path.read_bytes().decode("utf-8", errors="replace")
        faults += [f"{path.relative_to(ROOT)}: {found.group()}" for found in MACHINE_PATH.finditer(text)]
    assert not faults


def test_nothing_is_left_unfinished() -> None:
    mark = re.compile(r"\b(TO" + r"DO|FIX" + r"ME|X" + r"XX)\b")
    texts = {path.name: path.read_text("utf-8") for path in files(".py", ".cpp", ".h", ".md", ".yaml")}
    assert [name for name, text in texts.items() if mark.search(text)] == []
