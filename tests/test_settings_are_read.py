"""Every key of the configuration changes something: each is read somewhere outside the configuration itself."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from llamahome.config.suggest import KNOWN
from llamahome.config.tree import Config, same_setting

ROOT = Path(__file__).parents[1] / "llamahome"
# Read through a property of Config, which says where they come together.
MERGED = {
    "cache.memory_size": "cache_memory_bytes",
    "cache.disk_size": "cache_disk_bytes",
    "memory.cache_size": "cache_disk_bytes",
    "cache.max_age_days": "cache_max_age_seconds",
    "memory.cache_ttl": "cache_max_age_seconds",
    "optimization.global_batch_size": "global_batch_size",
    "training.gradient_accumulation": "global_batch_size",
}


def attributes() -> set[str]:
    """Names of all attributes that the engine reads, and of all strings that may name one."""
    found: set[str] = set()
    for path in ROOT.rglob("*.py"):
        if path.is_relative_to(ROOT / "config"):
            continue
        for node in ast.walk(ast.parse(path.read_bytes())):
            if isinstance(node, ast.Attribute):
                found.add(node.attr)
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


READ = attributes()


@pytest.mark.parametrize("key", [f"{section}.{key}" for section, keys in KNOWN.items() for key in keys])
def test_a_key_is_read(key: str) -> None:
    section, name = key.split(".")
    names = {f"{s}.{k}" for s, k in same_setting((section, name))}
    readers = {MERGED.get(other, other.split(".")[1]) for other in names}
    assert readers & READ, f"nothing reads {key}"


def test_the_merged_properties_exist() -> None:
    assert all(hasattr(Config, name) for name in MERGED.values())
