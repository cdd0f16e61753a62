"""The built-in data: questions and answers made from the docstrings of the installed Python's own library.

Real text, on every machine, nothing to download. The sources are parsed, never imported.
"""

from __future__ import annotations

import ast
import hashlib
import json
import re
import sysconfig
from collections.abc import Iterator
from pathlib import Path
from types import MappingProxyType

from llamahome.errors import MissingError
from llamahome.files import storage_errors, write_atomic

# For about three minutes on two cores: 24 steps of 12 samples are some 24,000 tokens, two evaluations 10,000 more.
# In so few steps LoRA needs twenty times the usual rate, and the warm-up has to end well before the run does. Tried
# with transformers and PEFT alone, 32 such steps take the held-out loss from 3.70 to 3.01, the first half to 3.05.
DEMO_SETTINGS = MappingProxyType(
    {
        "data.max_length": 256,
        "optimization.learning_rate": 1e-3,
        "optimization.warmup_steps": 3,
        "optimization.max_steps": 24,
        "optimization.global_batch_size": 12,
        "training.eval_samples": 64,
        "training.save_steps": 12,
        "monitor.interval": 4,
    }
)
DEMO_QUESTION = "What does `str.upper()` do in Python?"  # built in C, so no docstring of the data answers it

_SKIPPED = ("encodings", "ensurepip", "idlelib", "lib2to3", "pydoc_data", "test", "tests", "tkinter", "turtledemo")
_ANSWER_CHARS = range(30, 501)
_QUESTION_CHARS = 110
_LAYOUT = re.compile(r"^(\s|[-*+#|=~:>.]|\d+[.)])|>>>|\t|:param|@param", re.MULTILINE)
_SECTION = re.compile(r"(arg|param|return|raise|example|usage|note|todo|xxx)\w*\b.{0,20}:", re.IGNORECASE)


def write_demo_data(path: str | Path) -> int:
    """Write the pairs to `path` as JSON lines of chat `messages`, complete or not at all; return their number.

    The same release of Python always gives the same bytes, about 3,000 rows and 0.9 MB.

    Raises: MissingError without the library's sources, StorageError where `path` cannot be written.
    """
    path = Path(path)
    pairs = sorted(demo_pairs(Path(sysconfig.get_path("stdlib"))), key=_mixed)
    if not pairs:
        raise MissingError("this Python has no library sources to make the demo data from", fix="name a data file")
    text = "".join(json.dumps({"messages": _messages(*pair)}) + "\n" for pair in pairs)
    with storage_errors(path):
        path.parent.mkdir(parents=True, exist_ok=True)
    if not path.exists() or path.read_text(encoding="utf-8") != text:  # another run may be reading it
        write_atomic(path, text)
    return len(pairs)


def demo_pairs(library: Path) -> Iterator[tuple[str, str]]:
    """Yield (question, answer) for each documented public name of the sources below `library`; no answer twice."""
    seen: set[str] = set()
    for source in sorted(library.rglob("*.py")):
        parts = source.relative_to(library).with_suffix("").parts
        if any(part in _SKIPPED or "-" in part or (part[0] == "_" and part != "__init__") for part in parts):
            continue
        module = ".".join(part for part in parts if part != "__init__")
        for question, docstring in _documented(ast.parse(source.read_bytes()), module):
            answer = clean_answer(docstring)
            if answer and answer not in seen and len(question) <= _QUESTION_CHARS:
                seen.add(answer)
                yield question, answer


def clean_answer(docstring: str) -> str:
    """Return the prose that a docstring begins with, a line for each paragraph; "" where that is no good answer."""
    answer = ""
    for paragraph in re.split(r"\n\s*\n", docstring.strip()):
        prose = " ".join(paragraph.split())
        if _LAYOUT.search(paragraph) or _SECTION.match(prose) or len(answer) + len(prose) > _ANSWER_CHARS[-1]:
            break
        answer += "\n" * bool(answer) + prose
    good = len(answer) in _ANSWER_CHARS and answer[0].isupper() and answer.endswith(".")
    return answer if good else ""


def _mixed(pair: tuple[str, str]) -> bytes:
    """Sort key of an order in which any first rows are a fair sample of all modules."""
    return hashlib.sha256(pair[0].encode()).digest()


def _messages(question: str, answer: str) -> list[dict[str, str]]:
    return [{"role": "user", "content": question}, {"role": "assistant", "content": answer}]


def _documented(tree: ast.Module, module: str) -> Iterator[tuple[str, str]]:
    """Yield (question, docstring) for a module and all that it defines."""
    yield f"What is the Python module `{module}` for?", ast.get_docstring(tree) or ""
    for node in tree.body:
        yield from _definition(node, module)


def _definition(node: ast.stmt, prefix: str) -> Iterator[tuple[str, str]]:
    if not isinstance(node, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef) or node.name.startswith("_"):
        return
    name, docstring = f"{prefix}.{node.name}", ast.get_docstring(node) or ""
    if isinstance(node, ast.ClassDef):
        yield f"What is the class `{name}` in Python?", docstring
        for member in node.body:
            yield from _definition(member, name)
    elif any("property" in ast.unparse(decorator) for decorator in node.decorator_list):
        yield f"What is the property `{name}` in Python?", docstring
    else:
        parameters = re.sub(r"^(self|cls)\b(, /)?(, )?", "", ast.unparse(node.args))
        yield f"What does `{name}({parameters})` do in Python?", docstring
