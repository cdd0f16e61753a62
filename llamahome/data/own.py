"""Data sets of the user's own: rows from a Python object, an installed entry point or `module:object`."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any, Protocol, runtime_checkable

from llamahome.data.sources import Plugin, Source
from llamahome.errors import DataError
from llamahome.plugins import installed, is_import_path, load_object, name_of

KEY = "data.path"


@runtime_checkable
class Dataset(Protocol):
    """Rows, each a mapping from text keys to plain values, the same ones in every iteration.

    A list, a `datasets.Dataset` and any class with `__iter__` are such. The data are read more than once: first for the
    fingerprint that names their tokens in the cache, unless the object has a text `fingerprint` of its own.
    """

    def __iter__(self) -> Iterator[Mapping[str, object]]: ...


def is_dataset(data: object) -> bool:
    """Whether `data` holds rows (or makes them when called) instead of naming files."""
    if isinstance(data, list | tuple):
        return bool(data) and isinstance(data[0], Mapping)
    return (
        not isinstance(data, str) and not hasattr(data, "__fspath__") and (callable(data) or isinstance(data, Dataset))
    )


def names_dataset(path: str) -> bool:
    """Whether `path` is no file but `module:object`, or the name of an installed data set."""
    return not os.path.exists(path) and (is_import_path(path) or path in installed(KEY))  # noqa: PTH110 - any text


def dataset_source(data: Any) -> Source:
    """A source of rows for `data`: an object, a function that gives one, or the name of either.

    Raises: ConfigError for a name that leads nowhere, DataError for rows that can be read only once.
    """
    found = load_object(data, key=KEY)
    name = data if isinstance(data, str) else name_of(found)
    make: Callable[[], Iterable[Mapping[str, object]]] = found if callable(found) else lambda: found
    if not callable(found) and iter(found) is found:
        raise DataError("these rows can be read only once", where=name, fix="hand over the function that makes them")
    stored = next((v for k in ("fingerprint", "_fingerprint") if isinstance(v := getattr(found, k, None), str)), "")
    plugin = Plugin(name, frozenset(), lambda _path: make(), stored)
    return Source(name, None, "rows", plugin=plugin)
