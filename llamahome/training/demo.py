"""The run without data: settings for three minutes, and an answer before and after."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from llamahome.config import Config
from llamahome.config.tree import same_setting
from llamahome.data.cache import cache_folder
from llamahome.demo import DEMO_QUESTION, DEMO_SETTINGS, write_demo_data


def demo_config(config: Config, overrides: Sequence[str], *, own_settings: bool) -> Config:
    """`config` with the demo's data and settings; what `overrides` (`section.key=value`) name stays.

    With `own_settings` (a file of the user's) only the data are the demo's.
    """
    keys = (override.partition("=")[0].partition(".") for override in overrides)
    given = {".".join(name) for section, _, key in keys for name in same_setting((section, key))}
    path = cache_folder(config) / "demo" / "python-docstrings.jsonl"
    write_demo_data(path)
    wanted = {} if own_settings else DEMO_SETTINGS
    settings: dict[str, object] = {key: value for key, value in wanted.items() if key not in given}
    if config.training.output == Config().training.output:
        settings["training.output"] = str(free_folder(Path("output/demo")))
    return config.with_values({**settings, "data.path": str(path)})


def free_folder(path: Path) -> Path:
    """`path`, or the first of `path-2`, `path-3`, ... that is not there: the demo may be run again."""
    candidates = (path.with_name(f"{path.name}-{number}") for number in count(2))
    return path if not path.exists() else next(candidate for candidate in candidates if not candidate.exists())


def talk(moment: str, say: Callable[[str], None]) -> Callable[[Any, Any], None]:
    """A hook that lets the model answer the demo's question aloud."""

    def ask(model: Any, tokenizer: Any) -> None:
        from llamahome.model.generate import answer

        say(f"{moment} training, {DEMO_QUESTION!r} is answered: {answer(model, tokenizer, DEMO_QUESTION)!r}")

    return ask
