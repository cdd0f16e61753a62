"""Every error and warning that a user can meet, as a list: its wording is a decision.

After a change on purpose: `python tests/test_messages.py` writes the list anew.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from llamahome import errors

ROOT = Path(__file__).parents[1]
LIST = Path(__file__).with_name("messages.txt")
ERRORS = {name for name, kind in vars(errors).items() if isinstance(kind, type) and issubclass(kind, Exception)}
CLICK = {"UsageError", "BadParameter"}


def messages() -> list[str]:
    """Each message once, sorted: kind, what happened, and behind an arrow what to do. `{}` stands for values."""
    files = [*(ROOT / "llamahome").rglob("*.py"), *(ROOT / "kernels").glob("*.py")]
    found = {line for path in files for node in ast.walk(ast.parse(path.read_bytes())) for line in spoken(node)}
    return sorted(found)


def spoken(node: ast.AST) -> Iterator[str]:
    """The message of a call that makes an error of ours, or logs a warning or an error."""
    if not isinstance(node, ast.Call) or not node.args:
        return
    name = ast.unparse(node.func)
    kind = name.split(".")[-1]
    if kind in ERRORS | CLICK:
        fix = next((words(keyword.value) for keyword in node.keywords if keyword.arg == "fix"), "")
        yield f"{kind}: {words(node.args[0])}" + (f" -> {fix}" if fix else "")
    elif name in ("logger.warning", "logger.error"):
        yield f"{kind}: {re.sub(r'%[-+#0]*[.0-9]*[sdrfge]', '{}', words(node.args[0])).replace('%%', '%')}"


def words(node: ast.expr) -> str:
    """The text that the source holds, `{}` for each value."""
    if isinstance(node, ast.Constant):
        return str(node.value)
    if isinstance(node, ast.JoinedStr):
        return "".join("{}" if isinstance(part, ast.FormattedValue) else words(part) for part in node.values)
    if isinstance(node, ast.BinOp) and isinstance(node.op, ast.Add):
        return words(node.left) + words(node.right)
    if isinstance(node, ast.IfExp):
        return f"{words(node.body)} / {words(node.orelse)}"
    return "{}"


@pytest.fixture(scope="module")
def said() -> list[str]:
    return messages()


def test_the_list_holds_every_message_and_no_other(said: list[str]) -> None:
    listed = LIST.read_text("utf-8").splitlines()
    assert set(said) - set(listed) == set(), "new wording; see the top of this file"
    assert set(listed) - set(said) == set(), "no longer said; see the top of this file"
    assert listed == sorted(listed)


def test_every_message_has_one_voice(said: list[str]) -> None:
    """A clause that begins small and ends without a stop, so that `what; where; fix` is one sentence; no pleading."""
    for line in said:
        for part in line.partition(": ")[2].split(" -> "):
            assert not part.endswith((".", "!", ";")), line
            assert not re.search(r"(?i)\b(please|sorry|oops|failed to|unable to|illegal)\b", part), line
            assert not re.match(r"(The|A|An|Cannot|Could|No|Not|This|It|If|You|Use|Set|Install) ", part), line


def test_an_error_says_what_to_do(said: list[str]) -> None:
    """At most a tenth has no fix of its own: those of which the fault is the fix, and those passed on."""
    own = [line for line in said if line.partition(":")[0] in ERRORS - {"Interrupted"} and not line.endswith(": {}")]
    without = [line for line in own if " -> " not in line]
    assert len(without) <= len(own) / 10, "\n".join(without)


if __name__ == "__main__":
    LIST.write_text("".join(f"{line}\n" for line in messages()), encoding="utf-8")
