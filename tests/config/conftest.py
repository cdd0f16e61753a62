"""Fixtures that write a file and load it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest

from llamahome.config import Config
from llamahome.errors import ConfigError


@pytest.fixture
def load(tmp_path: Path) -> Callable[..., Config]:
    """load(text, overrides) is the Config of a file with that text."""

    def load_text(text: str, overrides: Sequence[str] = ()) -> Config:
        path = tmp_path / "run.yaml"
        path.write_text(text, encoding="utf-8")
        return Config.load(path, overrides)

    return load_text


@pytest.fixture
def faults(load: Callable[..., Config], tmp_path: Path) -> Callable[..., list[str]]:
    """faults(text, overrides) is what is wrong with them, a line each."""

    def faults_of(text: str, overrides: Sequence[str] = ()) -> list[str]:
        with pytest.raises(ConfigError) as caught:
            load(text, overrides)
        assert caught.value.exit_code == 2
        assert "\n" not in str(caught.value)
        return [fault.replace(str(tmp_path / "run.yaml"), "run.yaml") for fault in caught.value.faults]

    return faults_of
