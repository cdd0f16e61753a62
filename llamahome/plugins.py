"""Objects of the user's own: handed over in Python, installed as entry points, or named as `module:object`."""

from __future__ import annotations

import importlib
import re
import sys
from collections.abc import Mapping
from importlib.metadata import EntryPoint, entry_points
from pathlib import Path
from types import MappingProxyType
from typing import Any

from llamahome.errors import ConfigError

# Setting -> entry-point group in which packages may offer values for it by name.
GROUPS = MappingProxyType(
    {
        "data.path": "llamahome.datasets",
        "data.plugins": "llamahome.formats",
        "data.template": "llamahome.templates",
        "monitor.sinks": "llamahome.sinks",
        "optimization.optimizer": "llamahome.optimizers",
        "optimization.scheduler_type": "llamahome.schedulers",
        "training.callbacks": "llamahome.callbacks",
        "training.loss": "llamahome.losses",
        "training.metrics": "llamahome.metrics",
    }
)
_IMPORT_PATH = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_][\w.]*")


def load_object(name: Any, *, key: str, known: Mapping[str, Any] | None = None) -> Any:
    """The object called `name`: one of `known`, an installed entry point of the setting's group, or `module:object`.

    What is no text is the object already. A module is looked for among the installed ones and in the working folder.

    Raises: ConfigError that names `key` when there is no such object.
    """
    if not isinstance(name, str):
        return name
    known = known or {}
    if name in known:
        return known[name]
    try:
        if is_import_path(name):
            return _resolve(name)
        if (point := installed(key).get(name)) is not None:
            return point.load()
    except MemoryError:
        raise
    except Exception as error:  # the user's module may raise anything
        raise ConfigError(
            f"cannot load {name!r}: {error}", where=key, fix="check the module's name and run it alone"
        ) from error
    choices = ", ".join([*sorted({*known, *installed(key)}), "module:object"])
    raise ConfigError(f"unknown {name!r}", where=key, fix=f"choose one of {choices}")


def installed(key: str) -> dict[str, EntryPoint]:
    """The entry points that installed packages offer for the setting `key`, by name."""
    group = GROUPS.get(key)
    return {point.name: point for point in entry_points(group=group)} if group else {}


def is_import_path(name: str) -> bool:
    """Whether `name` has the form `module:object`."""
    return _IMPORT_PATH.fullmatch(name) is not None


def name_of(extension: object) -> str:
    """`module:object` of a function, a class or the class of an instance, for messages and records."""
    named = extension if hasattr(extension, "__qualname__") else type(extension)
    return f"{named.__module__}:{named.__qualname__}"


def _resolve(path: str) -> Any:
    module_name, _, attribute = path.partition(":")
    found: Any = _import(module_name)
    for part in attribute.split("."):
        found = getattr(found, part)
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
