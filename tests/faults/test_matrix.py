"""docs/reliability.md names tests that exist, and says where it names none."""

from __future__ import annotations

import ast
from pathlib import Path

ROOT = Path(__file__).parents[2]


def has_test(reference: str) -> bool:
    """Whether the file holds that test, and, for a case in brackets, its name as a text."""
    file, *names = reference.partition("[")[0].split("::")
    tree = ast.parse((ROOT / file).read_text())
    found: ast.AST = tree
    for name in names:
        found = next((node for node in ast.iter_child_nodes(found) if getattr(node, "name", None) == name), tree)
        if found is tree:
            return False
    case = reference.partition("[")[2].rstrip("]")
    return not case or any(isinstance(node, ast.Constant) and node.value == case for node in ast.walk(tree))


def test_what_it_names_exists(matrix: dict[int, set[str]]) -> None:
    assert [name for names in matrix.values() for name in sorted(names) if not has_test(name)] == []


def test_no_row_is_left_out_and_what_is_not_shown_is_said(matrix: dict[int, set[str]]) -> None:
    assert list(matrix) == list(range(1, len(matrix) + 1))
    assert len(matrix) >= 92
    last = (ROOT / "docs" / "reliability.md").read_text().strip().splitlines()[-1]
    assert last.startswith("Not shown by a test: ")
    assert [row for row, names in matrix.items() if not names and str(row) not in last] == []


def test_it_can_fail() -> None:
    assert not has_test("tests/faults/test_matrix.py::test_nothing")
    assert not has_test("tests/test_wrong_inputs.py::test_one_line_names_the_place[no such case]")
