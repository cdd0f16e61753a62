"""What docs/security.md claims about the sources, and that the tests it names exist."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).parents[2]
LOCK = ROOT / "requirements.lock"
MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "socketserver", "http.server", "xmlrpc"}
CALLS = {"eval", "exec", "pickle.loads", "pickle.load", "torch.load", "yaml.load", "os.system", "socket.create_server"}


def offences(source: str) -> Iterator[str]:
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in MODULES)
        elif isinstance(node, ast.ImportFrom) and node.module in MODULES:
            yield str(node.module)
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            if name in CALLS and not is_safe(name, node):
                yield name
            if name.endswith(".listen") or any(
                k.arg == "shell" and ast.unparse(k.value) != "False" for k in node.keywords
            ):
                yield f"{name}, line {node.lineno}"


def is_safe(name: str, call: ast.Call) -> bool:
    """`yaml.load` with a loader of our own, which is a SafeLoader; `torch.load` of tensors alone."""
    if name == "yaml.load":
        return any(k.arg == "Loader" for k in call.keywords) or len(call.args) > 1
    return name == "torch.load" and any(
        k.arg == "weights_only" and ast.unparse(k.value) == "True" for k in call.keywords
    )


def test_no_module_unpickles_evaluates_or_listens() -> None:
    files = [*ROOT.glob("llamahome/**/*.py"), *ROOT.glob("kernels/*.py")]
    assert len(files) > 100
    found = {str(path.relative_to(ROOT)): list(offences(path.read_text())) for path in files}
    assert {name: what for name, what in found.items() if what} == {}


def test_the_search_finds() -> None:
    for source in ("import pickle", "from pickle import loads", "torch.load(x)", "eval('1')", "s.listen()",
                   "run('x', shell=True)"):  # fmt: skip
        assert list(offences(source)), source


def test_the_tests_that_the_page_names_exist() -> None:
    named = re.findall(r"`(tests/[\w/.]+)::([\w:]+)`", (ROOT / "docs" / "security.md").read_text())
    assert len(named) > 15
    missing = [name for file, name in named if f"def {name.split('::')[-1]}(" not in (ROOT / file).read_text()]
    assert missing == []


def test_the_lock_holds_the_versions_that_are_tested_each_with_hashes() -> None:
    entries = re.findall(r"^([\w.-]+==\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}.*\n)+)", LOCK.read_text(), re.MULTILINE)
    pinned = {line for line in (ROOT / "constraints.txt").read_text().splitlines() if line and line[0] != "#"}
    assert {same_name(name) for name, _ in entries} == {same_name(line) for line in pinned}


def same_name(pinned: str) -> str:
    """A name and version as the package index spells them."""
    return re.sub(r"[-_.]+(?=.*==)", "-", pinned.partition(" ")[0]).lower()
