"""Writes what documents the settings, from their schema: `python -m llamahome.config.reference [PROJECT_FOLDER]`.

These are docs/configuration.md, docs/config.schema.json and the comments of .config/training_config.yaml."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from llamahome.config.describe import accepted, json_schema, key_schema
from llamahome.config.tree import ALIASES, Config, same_setting
from llamahome.config.yaml import read_document

_INTRODUCTION = """\
# Configuration

<!-- Written by `python -m llamahome.config.reference`; change the descriptions in llamahome/config/schema.py. -->

A run takes its settings from three places, and the later one counts:

1. the defaults below,
2. a YAML file: `llamahome train DATA --config run.yaml`,
3. the command line: `llamahome train DATA --set training.epochs=2 --set lora.rank=8`.

[`.config/training_config.yaml`](../.config/training_config.yaml) names every setting;
[`config.schema.json`](config.schema.json) lets editors complete and check a file: begin it with
`# yaml-language-server: $schema=docs/config.schema.json`.

All faults are reported at once, each with its place:

```text
run.yaml:3: optimization.max_stepz: unknown key; did you mean optimization.max_steps?
run.yaml:7: training.batch_size: expected a whole number >= 1 or auto, got "big"; the default is "auto"
```

## How values are written

- **Sizes** are `8GB` (powers of 1000), `512MiB` (powers of 1024) or a number of bytes; some also take `90%`.
- **Numbers** may be `1e-4`; `012` is 12. **Booleans** are `true` and `false`, never `yes` or `on`.
- **Import paths** are `module:object`; the module is installed or in the folder in which the command runs.
- **Installed extensions** are names that packages offer by entry points, and may stand wherever an import path may.
- **Paths** are relative to the folder in which the command runs.
- A key may stand once. Anchors, aliases (`&`, `*`) and tags of other languages are refused; a file has at most 1 MiB.
- `model.trust_remote_code` and `model.allow_pickle` let strangers' code run, so only `--set` may turn them on.

## Settings with several names

These are one setting each. Two different values in one file are an error; an override wins over the file.

"""


_NOT_TEXT = ("true", "false", "null", "yes", "no", "on", "off")  # to one YAML reader or another

_HEAD = """\
# yaml-language-server: $schema=../docs/config.schema.json
#
# Every setting, with the values it takes and its default; those that are not set are comments.
# Use: llamahome train DATA --config .config/training_config.yaml
# The comments are written by `python -m llamahome.config.reference`; see docs/configuration.md.
"""


def markdown() -> str:
    """Return the reference page."""
    lines = [" = ".join(f"`{section}.{key}`" for section, key in names) for names in ALIASES]
    page = _INTRODUCTION + "".join(f"- {line}\n" for line in lines)
    page += (
        "\n`processing.precision: fp32` is the same as `processing.mixed_precision: false`, and "
        "`training.memory_efficient_attention: false`\nthe same as `processing.attention: eager`.\n"
    )
    return page + "".join(_section(name) for name in Config.model_fields)


def _section(name: str) -> str:
    settings = getattr(Config(), name)
    rows = [f"\n## {name}\n\n{settings.__doc__}\n\n| Key | Values | Default | |\n|---|---|---|---|\n"]
    for key, field in type(settings).model_fields.items():
        schema = key_schema(name, key)
        rows.append(f"| `{key}` | {accepted(schema)} | `{json.dumps(schema['default'])}` | {field.description} |\n")
    return "".join(rows)


def schema_text() -> str:
    """Return the JSON Schema file."""
    return json.dumps(json_schema(), indent=2) + "\n"


def annotated(values: Mapping[str, Any]) -> str:
    """Return a configuration file with `values` by section, every other setting at its default, all explained.

    Further names of a setting, and settings that are not set (null), are comments.
    """
    lines = [_HEAD]
    for section in Config.model_fields:
        lines.append(f"\n{section}:\n")
        for key, field in type(getattr(Config(), section)).model_fields.items():
            schema = key_schema(section, key)
            main = same_setting((section, key))[0]
            value = _yaml(values.get(main[0], {}).get(main[1], schema["default"]))
            if main != (section, key):
                lines.append(f"  # {key}: {value}  # same setting as {'.'.join(main)}\n")
                continue
            lines.append(f"  # {field.description} [{accepted(schema)}; default {_yaml(schema['default'])}]\n")
            lines.append(f"  {'# ' if value == 'null' else ''}{key}: {value}\n")
    return "".join(lines)


def _yaml(value: object) -> str:
    """Return a value as every YAML reader understands it."""
    if isinstance(value, str):
        plain = re.fullmatch(r"[A-Za-z][\w./-]*", value) and value.lower() not in _NOT_TEXT
        return value if plain else json.dumps(value)
    text = json.dumps(value)
    return text.replace("e", ".0e") if re.fullmatch(r"\d+e-\d+", text) else text


def main(project: Path) -> None:
    """Write the three files."""
    example = project / ".config" / "training_config.yaml"
    values = read_document(example).values
    for path, text in (
        (project / "docs" / "configuration.md", markdown()),
        (project / "docs" / "config.schema.json", schema_text()),
        (example, annotated(values)),
    ):
        path.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "."))
