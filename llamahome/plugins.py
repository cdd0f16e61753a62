"""Objects of the user's own, named in the configuration as `module:object`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamahome.errors import ConfigError


def load_object(name: str, *, key: str, known: Mapping[str, Any] | None = None) -> Any:
    """The object called `name` in `known`, or at the import path `module:object`.

    A module is looked for among the installed ones and in the working folder.

    Raises: ConfigError that names `key` when there is no such object.
    """
    known = known or {}
    if name in known:
        return known[name]
    module_name, colon, attribute = name.partition(":")
    if not colon or not module_name or not attribute:
        choices = ", ".join([*sorted(known), "module:object"])
        raise ConfigError(f"unknown {name!r}", where=key, fix=f"choose one of {choices}")
    try:
        found: Any = _import(module_name)
        for part in attribute.split("."):
            found = getattr(found, part)
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"cannot load {name!r}: {error}", where=key, fix="check the module's name and run it alone"
        ) from error
    return found


def _import(module_name: str) -> Any:
    here = str(Path.cwd())
    if here in sys.path or "" in sys.path:
        return importlib.import_module(module_name)
    sys.path.append(here)
    try:
        return importlib.import_module(module_name)
    finally:
        sys.path.remove(here)
