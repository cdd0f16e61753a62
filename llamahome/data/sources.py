"""Where rows come from: files, folders, globs, dataset ids of the Hugging Face hub, and format plugins."""

from __future__ import annotations

import glob
import hashlib
import importlib.util
import inspect
import json
import logging
import os
import re
import stat
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from dataclasses import dataclass
from functools import cached_property
from importlib.metadata import entry_points
from pathlib import Path
from typing import Any

from llamahome.errors import ConfigError, DataError
from llamahome.plugins import is_import_path, load_object

logger = logging.getLogger(__name__)

ENTRY_POINTS = "llamahome.formats"
COMPRESSED = ".gz"
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+(:[\w.-]+)?")
_HELD_OUT = re.compile(r"(^|[-_.])(test|eval|valid|validation|dev)([-_.]|$)")
_CONNECT_SECONDS = 2.0


@dataclass(frozen=True)
class Plugin:
    """A reader that somebody else wrote: `read(path)` gives dicts. `identity` changes when the plugin does."""

    name: str
    extensions: frozenset[str]
    read: Callable[[Path], Iterable[Mapping[str, object]]]
    identity: str

    def digest_rows(self) -> str:
        """SHA-256 of all rows of a plugin that reads no file, or its identity if it has one. Raises: DataError."""
        if self.identity:
            return self.identity
        digest, number = hashlib.sha256(), 0
        try:
            for row in self.read(Path()):
                digest.update(json.dumps(row, sort_keys=True, default=str).encode())
                number += 1
        except Exception as error:  # the user's code may raise anything
            where = f"{self.name}:{number + 1}"
            raise DataError(f"plugin {self.name!r} failed: {_told(error)}", where=where, fix="mend it") from error
        return digest.hexdigest()


@dataclass(frozen=True)
class Source:
    """A data file (`path`), or a hub dataset or a plugin's own rows (`path` None), and the name of its format.

    `stamp` tells a changed file.
    """

    name: str
    path: Path | None
    format: str
    stamp: tuple[int, int, int] = (0, 0, 0)
    plugin: Plugin | None = None

    @cached_property
    def digest(self) -> str:
        """SHA-256 of what the rows are made from. Raises: DataError."""
        if self.path is None and self.plugin:
            return self.plugin.digest_rows()
        if self.path is None:
            return str(open_hub_dataset(self.name)._fingerprint)
        try:
            with self.path.open("rb") as file:
                return hashlib.file_digest(file, "sha256").hexdigest()
        except OSError as error:
            raise unreadable(self.name, error) from None

    def refuse_change(self) -> None:
        """Raises: DataError if the file is not the one that was found."""
        if self.path is None:
            return
        try:
            stamp = file_stamp(self.path.stat())
        except OSError as error:
            raise unreadable(self.name, error) from None
        if stamp != self.stamp:
            raise DataError(
                "the file changed while it was being read", where=self.name, fix="run again when it is complete"
            )


def file_stamp(status: os.stat_result) -> tuple[int, int, int]:
    return status.st_size, status.st_mtime_ns, status.st_ino


def unreadable(name: str, error: OSError) -> DataError:
    return DataError(f"cannot read: {error.strerror or error}", where=name, fix="check that the file can be read")


def find_sources(
    paths: str | Path | Sequence[str | Path],
    formats: Mapping[str, str],
    *,
    chosen: str = "auto",
    plugins: Sequence[str] = (),
) -> list[Source]:
    """Files, folders (searched through), globs and hub ids as a list of sources, each once, in a fixed order.

    `formats` gives the format of an extension, `chosen` (if not "auto") the format of every file.
    Raises: DataError for what is not there or has no known format, ConfigError for a wrong plugin or format.
    """
    extensions = dict(formats)
    readers = _load_plugins(plugins)
    if chosen not in ("auto", *formats.values(), *(e.lstrip(".") for e in readers)):
        known = ", ".join(sorted({*formats.values(), *(e.lstrip(".") for e in readers)}))
        raise ConfigError(f"unknown format {chosen!r}", where="data.format", fix=f"choose one of auto, {known}")
    found: dict[Path, Source] = {}
    for path in [paths] if isinstance(paths, str | Path) else paths:
        for file, explicit in _find(str(path), {COMPRESSED, *extensions, *readers}):
            source = _source(file, explicit, extensions, chosen, readers)
            if source:
                found.setdefault((source.path or Path(source.name)).absolute(), source)
    if not found:
        where = ", ".join(map(str, [paths] if isinstance(paths, str | Path) else paths))
        known = ", ".join(sorted({*extensions, *readers}))
        raise DataError("no data files", where=where or str(Path.cwd()), fix=f"name files that end in {known}")
    return list(found.values())


def _find(path: str, extensions: Set[str]) -> list[tuple[Path | str, bool]]:
    """The files behind a path and whether the user named them one by one; a hub id stays text."""
    try:
        return _expand(path, extensions)
    except (OSError, RuntimeError) as error:  # no permission, too long a name, no such home
        reason = getattr(error, "strerror", None) or error
        raise DataError(f"cannot look for data: {reason}", where=path, fix="check the path") from None


def _expand(path: str, extensions: Set[str]) -> list[tuple[Path | str, bool]]:
    if not path:
        raise DataError("the path is empty", fix="name a file, folder, glob or hub id")
    place = Path(path).expanduser()
    if place.is_dir():
        return [(file, False) for file in _walk(place)]
    if place.exists():
        return [(place, True)]
    if glob.has_magic(path):
        matches = [Path(match) for match in sorted(glob.iglob(str(place), recursive=True))]  # noqa: PTH207 - an absolute pattern
        files = [file for match in matches for file in (_walk(match) if match.is_dir() else [match])]
        if files:
            return [(file, False) for file in files]
    elif _HUB_ID.fullmatch(path) and place.suffix.lower() not in extensions:
        return [(path, True)]
    raise DataError(
        f"no such file or folder: {place.absolute()}", where=f"working folder {Path.cwd()}", fix="check the path"
    )


def _walk(folder: Path) -> list[Path]:
    files = []
    for parent, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        files += [Path(parent, name) for name in sorted(names) if not name.startswith(".")]
    return files


def _source(
    file: Path | str, explicit: bool, extensions: Mapping[str, str], chosen: str, plugins: Mapping[str, Plugin]
) -> Source | None:
    if isinstance(file, str):
        return Source(file, None, "hub")
    try:
        status = file.stat()
    except OSError as error:
        raise unreadable(str(file), error) from None
    if not stat.S_ISREG(status.st_mode):
        raise DataError("not a regular file", where=str(file), fix="copy the data into a file")
    name = file.name.lower().removesuffix(COMPRESSED)
    suffix = Path(name).suffix if chosen == "auto" else f".{chosen}"
    stamp = file_stamp(status)
    if suffix in plugins:
        return Source(str(file), file, suffix.lstrip("."), stamp, plugins[suffix])
    kind = extensions.get(suffix) if chosen == "auto" else chosen
    if kind is None and explicit:
        known = ", ".join(sorted({*extensions, *plugins}))
        raise DataError(
            f"unknown format {suffix or 'without extension'!r}",
            where=str(file),
            fix=f"known are {known}; or set data.format",
        )
    if kind is None:
        logger.info("%s: passed over, its extension names no data format", file)
        return None
    if not explicit and _HELD_OUT.search(file.name.lower()):
        logger.warning(
            "%s looks like held-out data and is among the files to train on; name the files to leave it out", file
        )
    return Source(str(file), file, kind, stamp)


def _load_plugins(files: Sequence[str]) -> dict[str, Plugin]:
    """Plugins by extension. Those named in the settings come before installed ones."""
    loaded = [_from_entry_point(point) for point in entry_points(group=ENTRY_POINTS)]
    for file in files:
        found = _from_object(file) if is_import_path(file) else _from_file(Path(file).expanduser())
        loaded += [found] if found else []
    return {extension: plugin for plugin in loaded for extension in plugin.extensions}


def _from_file(path: Path) -> Plugin | None:
    spec = importlib.util.spec_from_file_location(f"llamahome_plugin_{path.stem}", path)
    if not path.is_file() or spec is None or spec.loader is None:
        raise ConfigError(f"no such Python file: {path.absolute()}", where="data.plugins", fix="check the path")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as error:  # the plugin may raise anything
        raise DataError(
            f"plugin {path.stem!r} cannot be loaded: {_told(error)}", where=str(path), fix="mend the plugin"
        ) from error
    if not hasattr(module, "EXTENSIONS") and not hasattr(module, "read"):
        return None  # adds something else than a format
    return _checked(path.stem, module, hashlib.sha256(path.read_bytes()).hexdigest(), str(path))


def _from_object(name: str) -> Plugin:
    found = load_object(name, key="data.plugins")
    source = inspect.getsourcefile(found if inspect.ismodule(found) or inspect.isclass(found) else type(found))
    identity = hashlib.sha256(Path(source).read_bytes()).hexdigest() if source else name
    return _checked(name, found, identity, name)


def _from_entry_point(point: Any) -> Plugin:
    try:
        module = point.load()
    except Exception as error:
        raise DataError(
            f"plugin {point.name!r} cannot be loaded: {_told(error)}", where=point.value, fix="mend or uninstall it"
        ) from error
    version = point.dist.version if point.dist else ""
    return _checked(point.name, module, f"{point.value} {version}", point.value)


def _checked(name: str, module: object, identity: str, where: str) -> Plugin:
    extensions, read = getattr(module, "EXTENSIONS", None), getattr(module, "read", None)
    good = isinstance(extensions, set | frozenset | list | tuple) and all(
        isinstance(item, str) and re.fullmatch(r"\.\w+", item) for item in extensions
    )
    if not good or not extensions or not callable(read):
        wanted = 'EXTENSIONS = {".foo"} and read(path)'
        raise DataError(f"plugin {name!r} has not {wanted}", where=where, fix="see examples/custom_format.py")
    return Plugin(name, frozenset(item.lower() for item in extensions), read, identity)


def _told(error: Exception) -> str:
    return f"{type(error).__name__}: {error}"


def open_hub_dataset(name: str) -> Any:
    """A `datasets.Dataset` for `org/name` or `org/name:split` (the split is `train` unless named).

    Raises: DataError, within seconds without a network.
    """
    from datasets import config, load_dataset

    path, _, split = name.partition(":")
    if not _hub_answers() and not Path(config.HF_DATASETS_CACHE, path.replace("/", "___")).is_dir():
        raise _no_dataset(name, "the hub cannot be reached and its cache does not hold it")
    try:
        return load_dataset(path, split=split or "train")
    except Exception as error:  # datasets and the hub's client raise many kinds
        raise _no_dataset(name, " ".join(str(error).split())[:200]) from error


def _no_dataset(name: str, reason: str) -> DataError:
    place = Path(name.partition(":")[0]).absolute()
    what = f"no such file or folder: {place}, and no dataset {name!r}: {reason}"
    return DataError(what, where=f"working folder {Path.cwd()}", fix="check the path, or connect to the network")


def _hub_answers() -> bool:
    """Ask before the hub's client does: without a network it tries for half a minute."""
    import socket

    from huggingface_hub import constants

    if constants.HF_HUB_OFFLINE:
        return False
    if os.environ.get("HTTPS_PROXY") or os.environ.get("https_proxy"):
        return True
    host, _, port = constants.ENDPOINT.partition("://")[2].partition("/")[0].partition(":")
    try:
        socket.create_connection((host, int(port or 443)), timeout=_CONNECT_SECONDS).close()
    except OSError:
        return False
    return True
