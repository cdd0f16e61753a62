"""The kinds of values that several settings share. Each carries its JSON Schema; `format` names it in messages."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field, WithJsonSchema

from llamahome.config.sizes import parse_size
from llamahome.errors import ConfigError
from llamahome.plugins import installed, is_import_path

FORMATS = {
    "size": "a size such as 8GB",
    "size-or-percent": "a size such as 8GB or a percentage such as 90%",
    "megabytes": "a number of megabytes or a size such as 8GB",
    "extension": "module:object",
    "name-or-import-path": "a name or module:object",
    "device": "auto, cpu, cuda or cuda:N",
    "path": "a path",
}


def _size(value: str | int) -> str | int:
    _parse(value, None)
    return value


def _size_or_percent(value: str | int) -> str | int:
    _parse(value, 1)
    return value


def _parse(value: str | int, total: int | None) -> None:
    try:
        parse_size(value, total)
    except ConfigError as error:
        raise ValueError(str(error)) from None  # pydantic collects only ValueErrors


def _user_path(value: object) -> object:
    if not isinstance(value, str) or not value:
        return value
    try:
        return Path(value).expanduser()
    except RuntimeError as error:  # no such user, or no home
        raise ValueError(f"{value!r}: {error}") from None


def _schema(name: str, *types: str) -> WithJsonSchema:
    return WithJsonSchema({"type": types[0] if len(types) == 1 else list(types), "format": name})


def _matching(pattern: str, name: str) -> AfterValidator:
    def check(value: str) -> str:
        if not re.fullmatch(pattern, value):
            raise ValueError(f"expected {FORMATS[name]}, got {value!r}")
        return value

    return AfterValidator(check)


def _extension(key: str) -> AfterValidator:
    """The name of an installed entry point for the setting `key`, or `module:object`."""

    def check(value: str) -> str:
        if not is_import_path(value) and value not in installed(key):
            raise ValueError(f"expected {FORMATS['extension']}, got {value!r}")
        return value

    return AfterValidator(check)


_DOTTED = r"[A-Za-z_][\w.]*"

Size = Annotated[int | str, AfterValidator(_size), _schema("size", "integer", "string")]
SizeOrPercent = Annotated[int | str, AfterValidator(_size_or_percent), _schema("size-or-percent", "integer", "string")]
Megabytes = Annotated[int | str, AfterValidator(_size), _schema("megabytes", "integer", "string")]
Optimizer = Annotated[str, _extension("optimization.optimizer"), _schema("extension", "string")]
Scheduler = Annotated[str, _extension("optimization.scheduler_type"), _schema("extension", "string")]
Named = Annotated[
    str, _matching(rf"[\w-]+|{_DOTTED}:{_DOTTED}", "name-or-import-path"), _schema("name-or-import-path", "string")
]
Device = Annotated[str, _matching(r"auto|cpu|cuda(:\d+)?", "device"), _schema("device", "string")]
UserPath = Annotated[Path, BeforeValidator(_user_path), _schema("path", "string")]

# Lists become tuples, because the tree is frozen; their items stay strict.
Texts = Annotated[tuple[Annotated[str, Field(min_length=1)], ...], Field(strict=False)]
NamedList = Annotated[tuple[Named, ...], Field(strict=False)]
_Beta = Annotated[float, Field(ge=0, lt=1)]
Betas = Annotated[tuple[_Beta, _Beta], Field(strict=False)]
