"""`llamahome train`: what is told before anything is loaded."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamahome.cli import cli
from llamahome.errors import DataError


def test_a_path_that_leads_nowhere_is_told_before_a_model_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(DataError, match="no such file or folder"):
        cli.main(["train", "nowhere.csv", "--model", "no-model-either"], standalone_mode=False)
