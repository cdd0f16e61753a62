"""Puts defaults, a file and overrides together and reports every fault at once, each with its place."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from pydantic import ValidationError

from llamahome.config.describe import accepted, choices, key_schema
from llamahome.config.rules import broken_rules, doubtful
from llamahome.config.suggest import KNOWN, nearest_choice, suggest_key, suggest_section
from llamahome.config.tree import Config, Key, disagree, same_setting
from llamahome.config.yaml import parse_value, read_document
from llamahome.errors import ConfigError

logger = logging.getLogger(__name__)

VALUES, FILE, OVERRIDE = range(3)
COMMAND_LINE_ONLY: tuple[Key, ...] = (("model", "trust_remote_code"), ("model", "allow_pickle"))


@dataclass(frozen=True)
class Place:
    """Where a value was given. Of two values the one of the higher layer counts; line 0 is none."""

    layer: int
    line: int
    source: str

    def __str__(self) -> str:
        return f"{self.source}:{self.line}" if self.line else self.source


@dataclass(frozen=True)
class Entry:
    """A value as given, and where."""

    value: object
    place: Place


@dataclass(frozen=True)
class Fault:
    """A broken rule about one key; its text is one line."""

    place: Place
    key: str
    rule: str
    fix: str = ""

    def __str__(self) -> str:
        line = f"{self.place}: {self.key}: {self.rule}" + (f"; {self.fix}" if self.fix else "")
        return " ".join(line.split())


@dataclass
class Settings:
    """What was given so far, by section and key, and the faults in it."""

    given: dict[Key, Entry] = field(default_factory=dict)
    faults: list[Fault] = field(default_factory=list)

    def add_section(self, section: str, content: object, place: Callable[..., Place]) -> None:
        """Take the keys of one section; `place(*keys)` says where a key stands."""
        known = section in KNOWN
        if not known and isinstance(content, Mapping):
            self.faults.append(Fault(place(section), section, "unknown section", suggest_section(section)))
        elif not known:
            self.faults.append(Fault(place(section), section, "unknown key", suggest_key("", section)))
        elif isinstance(content, Mapping):
            for key, value in content.items():
                self.add(section, str(key), Entry(value, place(section, key)))
        elif content is not None:  # a section with nothing in it is a section of defaults
            rule = f"expected the section's keys, got {_show(content)}"
            self.faults.append(Fault(place(section), section, rule, "write one key per line, indented"))

    def add(self, section: str, key: str, entry: Entry) -> None:
        """Take one value; a later one replaces an earlier one."""
        if key in KNOWN[section]:
            self.given[section, key] = entry
        else:
            self.faults.append(Fault(entry.place, f"{section}.{key}", "unknown key", suggest_key(section, key)))

    def values(self) -> dict[str, dict[str, object]]:
        """Return the values as a tree."""
        tree: dict[str, dict[str, object]] = {}
        for (section, key), entry in self.given.items():
            tree.setdefault(section, {})[key] = entry.value
        return tree


def load(
    values: Mapping[str, object],
    path: str | Path | None,
    overrides: Mapping[str, object] | Sequence[str],
    source: str = "",
) -> Config:
    """Build the Config of plain values < a file < overrides; see Config.load and Config.from_dict."""
    settings = _plain(values, source)
    if path is not None:
        document = read_document(Path(path))
        for section, content in document.values.items():
            settings.add_section(section, content, lambda *keys: Place(FILE, document.lines[keys], str(path)))
    _apply(settings, overrides)
    _check_command_line_only(settings)
    config, faulty = _validate(settings)
    settings.faults += [fault for keys, fault in _located(settings, broken_rules(config)) if not faulty & set(keys)]
    if settings.faults:
        raise _error(settings.faults)
    for _, fault in _located(settings, doubtful(config)):
        logger.warning("%s", fault)
    return config


def change(config: Config, overrides: Mapping[str, object]) -> Config:
    """Build a Config with some values changed; see Config.with_values."""
    settings = _plain(config.to_dict(), "configuration")
    _apply(settings, overrides)
    changed, _ = _validate(settings)
    if settings.faults:
        raise _error(settings.faults)
    return changed


def _plain(values: Mapping[str, object], source: str) -> Settings:
    if not isinstance(values, Mapping):
        raise ConfigError(f"expected a mapping of sections, got {_show(values)}", where=source)
    settings = Settings()
    for section, content in values.items():
        settings.add_section(str(section), content, lambda *_: Place(VALUES, 0, source))
    return settings


def _check_command_line_only(settings: Settings) -> None:
    for section, key in COMMAND_LINE_ONLY:
        entry = settings.given.get((section, key))
        if entry is not None and entry.value is True and entry.place.layer != OVERRIDE:
            name, rule = f"{section}.{key}", "may be true only on the command line, got true"
            settings.faults.append(Fault(entry.place, name, rule, f"remove it, and use --set {name}=true"))


def _apply(settings: Settings, overrides: Mapping[str, object] | Sequence[str]) -> None:
    for name, value, place in _assignments(overrides, settings.faults):
        section, *keys = name.split(".", 2)
        if not keys:
            settings.add_section(section, value, lambda *_, place=place: place)
        elif section not in KNOWN:
            settings.faults.append(Fault(place, name, "unknown section", suggest_key("", keys[0])))
        else:
            old = settings.given.get((section, keys[0]))
            if len(keys) == 2:  # a name inside a mapping such as monitor.thresholds.cpu: the others stay
                others = old.value if old is not None and isinstance(old.value, Mapping) else {}
                value = {**others, keys[1]: value}
            settings.add(section, keys[0], Entry(value, place))


def _assignments(
    overrides: Mapping[str, object] | Sequence[str], faults: list[Fault]
) -> Iterator[tuple[str, object, Place]]:
    if isinstance(overrides, Mapping):
        for name, value in overrides.items():
            yield str(name), value, Place(OVERRIDE, 0, f"--set {name}={_show(value)}")
        return
    for text in [overrides] if isinstance(overrides, str) else overrides:
        name, equals, written = text.partition("=")
        place = Place(OVERRIDE, 0, f"--set {text}")
        if not equals:
            faults.append(Fault(place, name, "no value given", "write section.key=value"))
            continue
        try:
            yield name.strip(), parse_value(written, f"--set {name}"), place
        except ConfigError as error:
            faults.append(Fault(place, name, error.what, error.fix))


def _settle_conflicts(settings: Settings) -> None:
    """Of two values that cannot hold together the one of the higher layer counts; in one layer they are a fault."""
    for first, second, rule in disagree({key: entry.value for key, entry in settings.given.items()}):
        a, b = settings.given.get(first), settings.given.get(second)
        if a is None or b is None:
            continue  # an earlier pair has settled it
        if a.place.layer == b.place.layer:
            other = f"{a.place} has {'.'.join(first)}: {_show(a.value)}"
            text = f"got {_show(b.value)}, but {other}, which {rule}"
            settings.faults.append(Fault(b.place, ".".join(second), text, "keep one of them"))
        del settings.given[first if b.place.layer > a.place.layer else second]


def _validate(settings: Settings) -> tuple[Config, set[Key]]:
    """Return the checked settings, with defaults for those at fault, and the keys of these."""
    _settle_conflicts(settings)
    faulty: dict[Key, str] = {}
    try:
        return Config.model_validate(settings.values()), set()
    except ValidationError as error:
        for problem in error.errors(include_url=False):
            section, key, *_ = (str(part) for part in problem["loc"])
            own = problem["type"] == "value_error"  # a rule in our words
            faulty[section, key] = str(problem["ctx"]["error"]) if own else faulty.get((section, key), "")
    for (section, key), rule in faulty.items():
        settings.faults.append(_value_fault(section, key, settings.given.pop((section, key)), rule))
    return Config.model_validate(settings.values()), set(faulty)


def _value_fault(section: str, key: str, entry: Entry, rule: str) -> Fault:
    schema = key_schema(section, key)
    if "anyOf" in schema or not rule:
        rule = f"expected {accepted(schema)}, got {_show(entry.value)}"
    near = nearest_choice(entry.value, choices(schema))
    fix = f"did you mean {near}?" if near else f"the default is {_show(schema['default'])}"
    return Fault(entry.place, f"{section}.{key}", rule, fix)


def _located(
    settings: Settings, broken: Iterable[tuple[tuple[Key, ...], str, str]]
) -> Iterator[tuple[tuple[Key, ...], Fault]]:
    """Blame each broken rule on the first of its keys that was given, and name where the others stand."""
    for keys, rule, fix in broken:
        names = [name for key in keys for name in same_setting(key)]
        entries = [(name, settings.given[name]) for name in names if name in settings.given]
        if not entries:
            continue  # only defaults
        (blamed, entry), *others = entries
        for key, other in others:
            rule += f" ({'.'.join(key)}: {_show(other.value)}, {other.place})"
        yield keys, Fault(entry.place, ".".join(blamed), rule, fix)


def _error(faults: list[Fault]) -> ConfigError:
    ordered = sorted(faults, key=lambda fault: (fault.place.layer, fault.place.line))
    first, lines = ordered[0], tuple(str(fault) for fault in ordered)
    if len(ordered) == 1:
        return ConfigError(f"{first.key}: {first.rule}", where=str(first.place), fix=first.fix, faults=lines)
    return ConfigError(
        f"{len(ordered)} faults in the configuration, the first is {first.key}: {first.rule}",
        where=str(first.place),
        fix=first.fix,
        faults=lines,
    )


def _show(value: object) -> str:
    """Return a value as YAML would write it, on one short line."""
    text = json.dumps(value, default=str, ensure_ascii=False, skipkeys=True)
    return text if len(text) <= 60 else f"{text[:57]}..."
