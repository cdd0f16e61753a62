"""A format of your own: name this file in `data.plugins` and train on `.qa` files.

A `.qa` file holds questions and answers in blocks:

    Q: What is the capital of France?
    A: Paris.

    llamahome train faq.qa --set data.plugins='["examples/custom_format.py"]'
"""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

EXTENSIONS = {".qa"}


def read(path: Path) -> Iterator[dict[str, object]]:
    """Yield one dict per row; its keys choose the schema, here `question` and `answer`."""
    question = ""
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.startswith("Q: "):
            question = line.removeprefix("Q: ")
        elif line.startswith("A: "):
            yield {"question": question, "answer": line.removeprefix("A: ")}
