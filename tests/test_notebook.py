"""The notebook's cells run in turn within a running event loop, as Jupyter runs them."""

from __future__ import annotations

import ast
import asyncio
import inspect
import json
from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "fine_tune.ipynb"


@pytest.mark.slow
def test_notebook_runs(tmp_path: Path, tiny_model_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    rows = [{"question": f"What is {i} plus {i}?", "answer": f"It is {2 * i}."} for i in range(40)]
    Path("data.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    cells = [cell for cell in json.loads(NOTEBOOK.read_text())["cells"] if cell["cell_type"] == "code"]
    names: dict[str, Any] = {}

    async def run() -> None:
        for number, cell in enumerate(cells):
            source = "".join(cell["source"])
            code = compile(source, f"cell {number}", "exec", flags=ast.PyCF_ALLOW_TOP_LEVEL_AWAIT)
            waiting = eval(code, names)
            if inspect.iscoroutine(waiting):
                await waiting
            if "MODEL" in names and number == 0:
                names["MODEL"] = str(tiny_model_dir)

    asyncio.run(run())
    assert len(names["losses"]) == 6
    assert names["tokenizer"].decode(names["answer"][0, : names["prompt"]["input_ids"].shape[1]]).count("2 plus 2") == 1
    assert Path("output/notebook/merged/model.safetensors").exists()
