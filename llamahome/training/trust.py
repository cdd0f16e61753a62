"""Code that a run's record names: a resume imports it only where the user names it, too, or trusts the run."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from llamahome.config import Config
from llamahome.errors import UsageError
from llamahome.plugins import GROUPS, is_import_path

_KEYS = (*GROUPS, "data.eval_path")
_FILES_OF_CODE = "data.plugins"


def named_code(values: Mapping[str, Mapping[str, Any]]) -> Iterator[tuple[str, str]]:
    """(setting, value) of everything in a configuration that is imported or run: `module:object`, files of Python."""
    for key in _KEYS:
        section, name = key.split(".")
        value = values.get(section, {}).get(name)
        for item in value if isinstance(value, Sequence) and not isinstance(value, str) else [value]:
            if isinstance(item, str) and (key == _FILES_OF_CODE or is_import_path(item)):
                yield key, item


def resumed_config(
    stored: Mapping[str, Any], overrides: Sequence[str], config_file: Path | None, *, where: Path, trust_run: bool
) -> Config:
    """The configuration that a run recorded, changed by the user's own.

    A record may come from a stranger, with a run that was handed on. Code that it names is therefore no one's wish yet:
    unless `trust_run`, the overrides or the file must name it as well.

    Raises: ConfigError; UsageError that lists the code which nobody asked for.
    """
    config = Config.from_dict(stored, overrides, config_file)
    if trust_run:
        return config
    kept = {section: dict(keys) for section, keys in stored.items()}
    for key, _ in named_code(kept):
        section, name = key.split(".")
        kept[section].pop(name, None)
    asked = set(named_code(Config.from_dict(kept, overrides, config_file).to_dict()))
    unasked = [f"{key}: {name}" for key, name in named_code(config.to_dict()) if (key, name) not in asked]
    if unasked:
        raise UsageError(
            f"the run names code to be run ({'; '.join(unasked)})", where=str(where / "run.json"),
            fix="where you know the run and that code, add --trust-run; else name your own with --set",
        )  # fmt: skip
    return config
