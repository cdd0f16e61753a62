"""The page beside an exported model: what it is made of, how it was trained, and how well it was proved."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

_SETTINGS = ("training", "optimization", "lora", "qat", "data")


def model_card(name: str, base: str | None, trained: Path, report: str) -> str:
    """Markdown with the metadata that the Hub reads; `trained` is the model's folder, in its run's where there is one.

    base: the base model as it was named. report: how the export was proved, in a line.
    """
    run = next((folder for folder in (trained, trained.parent) if (folder / "run.json").is_file()), None)
    facts = json.loads((run / "run.json").read_bytes()) if run else {}
    head = ["---", "library_name: transformers", "tags: [llamahome]"]
    head += [f"base_model: {json.dumps(base)}"] if base and not Path(base).is_absolute() else []
    return "\n".join([*head, "---", "", f"# {name}", "", report, "", *_training(facts), *_figures(run), ""])


def _training(facts: Mapping[str, Any]) -> Iterator[str]:
    if not facts:
        return
    yield from ("## Training", "", "| | |", "|---|---|")
    for key in ("data_fingerprint", "model_fingerprint", "precision", "device", "total_steps", "samples_per_step"):
        if key in facts:
            yield f"| {key} | `{facts[key]}` |"
    config = facts.get("config", {})
    for section in _SETTINGS:
        for key, value in config.get(section, {}).items():
            if not _is_path(value):  # of the machine that trained, and nobody else's
                yield f"| {section}.{key} | `{json.dumps(value)}` |"
    yield ""


def _figures(run: Path | None) -> Iterator[str]:
    """The last step and the last evaluation."""
    if run is None or not (run / "metrics.jsonl").is_file():
        return
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines() if line.endswith("}")]
    last: dict[str, Any] = {}
    for line in lines:
        last |= {key: line[key] for key in ("step", "loss", "tokens", "eval_loss", "eval_perplexity") if key in line}
    yield from ("## Figures", "", "| | |", "|---|--:|")
    yield from (f"| {key} | {value} |" for key, value in last.items())


def _is_path(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("/", "~"))
