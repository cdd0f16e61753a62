"""Says in words what values a setting takes, from its JSON Schema; for messages and for the reference."""

from __future__ import annotations

from functools import cache
from typing import Any

from llamahome.config.fields import FORMATS
from llamahome.config.tree import Config

Schema = dict[str, Any]
_BOUNDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@cache
def json_schema() -> Schema:
    """Return the JSON Schema of the configuration file; treat it as read-only."""
    schema = Config.model_json_schema()
    schema["$schema"] = "https://json-schema.org/draft/2020-12/schema"
    schema["title"] = "LlamaHome training configuration"
    return schema


def key_schema(section: str, key: str) -> Schema:
    """Return the JSON Schema of one setting."""
    reference = json_schema()["properties"][section]["$ref"]
    found: Schema = json_schema()["$defs"][reference.rpartition("/")[2]]["properties"][key]
    return found


def accepted(schema: Schema) -> str:
    """Say what a value must be, for example `a whole number >= 1 or auto`."""
    if "anyOf" in schema:
        return " or ".join(accepted(part) for part in schema["anyOf"])
    if "enum" in schema or "const" in schema:
        names = choices(schema)
        return names[0] if len(names) == 1 else f"one of {', '.join(names)}"
    if schema.get("format") in FORMATS:
        return FORMATS[schema["format"]]
    return _plain(schema)


def choices(schema: Schema) -> list[str]:
    """Return the names that a setting takes; empty if it takes none by name."""
    if "anyOf" in schema:
        return [name for part in schema["anyOf"] for name in choices(part)]
    return [str(name) for name in schema.get("enum", [schema["const"]] if "const" in schema else [])]


def _plain(schema: Schema) -> str:
    match schema["type"]:
        case "integer":
            return "a whole number" + _bounds(schema)
        case "number":
            return "a number" + _bounds(schema)
        case "boolean":
            return "true or false"
        case "null":
            return "null"
        case "array" if "prefixItems" in schema:
            return f"a list of {len(schema['prefixItems'])}, each {accepted(schema['prefixItems'][0])}"
        case "array":
            return f"a list, each {accepted(schema['items'])}"
        case "object":
            names = schema.get("propertyNames", {}).get("enum")
            keys = f"from {', '.join(names)}" if names else "from names"
            return f"a mapping {keys} to {accepted(schema['additionalProperties'])}"
        case _:
            return "one character" if schema.get("maxLength") == 1 else "text"


def _bounds(schema: Schema) -> str:
    bounds = [f"{sign} {_number(schema[name])}" for name, sign in _BOUNDS.items() if name in schema]
    return " " + " and ".join(bounds) if bounds else ""


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)
