"""The run without data: settings for three minutes, and an answer before and after."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from llamahome.config import Config
from llamahome.demo import DEMO_QUESTION, DEMO_SETTINGS, write_demo_data


def demo_config(config: Config, overrides: Sequence[str], *, own_settings: bool) -> Config:
    """`config` with the demo's data and settings; what `overrides` (`section.key=value`) name stays.

    With `own_settings` (a file of the user's) only the data are the demo's.
    """
    given = {override.partition("=")[0] for override in overrides}
    cache = Path(config.cache.dir or os.environ.get("LLAMAHOME_CACHE") or "~/.cache/llamahome").expanduser()
    path = cache / "demo" / "python-docstrings.jsonl"
    write_demo_data(path)
    settings = {} if own_settings else {key: value for key, value in DEMO_SETTINGS.items() if key not in given}
    return config.with_values({**settings, "data.path": str(path)})


def talk(moment: str, say: Callable[[str], None]) -> Callable[[Any, Any], None]:
    """A hook that lets the model answer the demo's question aloud."""

    def ask(model: Any, tokenizer: Any) -> None:
        from llamahome.model.generate import answer

        say(f"{moment} training, {DEMO_QUESTION!r} is answered: {answer(model, tokenizer, DEMO_QUESTION)!r}")

    return ask
