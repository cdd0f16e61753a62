"""A run folder from a stranger: resuming it imports nothing that the user has not named."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.errors import UsageError
from llamahome.plugins import GROUPS
from llamahome.training.run import resume, train
from llamahome.training.trust import named_code

EVIL = "open('canary', 'w').close()\n\ndef call(*arguments, **options):\n    raise SystemExit('it ran')\n"


@pytest.fixture(scope="module")
def strangers(tiny_model_dir: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of two steps, as it may be handed on."""
    folder = tmp_path_factory.mktemp("strangers")
    rows = [{"instruction": f"Name number {n}.", "output": "one two three"[: 3 + n % 9]} for n in range(24)]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    given = {
        "model.name": str(tiny_model_dir), "data.path": str(folder / "rows.jsonl"), "cache.dir": str(folder / "cache"),
        "training.output": str(folder / "run"), "training.save_steps": 1, "processing.compile_mode": "none",
        "processing.precision": "fp32", "optimization.max_steps": 2, "lora.rank": 4, "monitor.sinks": [],
    }  # fmt: skip
    return train(Config.load(None, given)).output


@pytest.fixture
def finished(strangers: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "evil.py").write_text(EVIL)
    yield Path(shutil.copytree(strangers, tmp_path / "run"))
    sys.modules.pop("evil", None)


def name_code(run: Path, key: str, value: object) -> None:
    """What a stranger may write into the record of a run."""
    content = json.loads((run / "run.json").read_text())
    section, name = key.split(".")
    content["config"][section][name] = value
    (run / "run.json").write_text(json.dumps(content))


LISTS = {"data.plugins", "monitor.sinks", "training.callbacks", "training.metrics"}
PLACES = [*((key, ["evil:call"] if key in LISTS else "evil:call") for key in (*GROUPS, "data.eval_path")),
          ("data.plugins", ["evil.py"])]  # fmt: skip


@pytest.mark.parametrize(("key", "value"), PLACES, ids=[f"{key} {value}" for key, value in PLACES])
def test_no_setting_of_the_record_runs_code(finished: Path, key: str, value: Any) -> None:
    name_code(finished, key, value)
    name = value[0] if isinstance(value, list) else value
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    with pytest.raises(UsageError) as raised:
        resume(finished / "checkpoint-1")
    assert str(raised.value).startswith(f"the run names code to be run ({key}: {name}); {finished}/run.json; ")
    assert "--trust-run" in raised.value.fix
    assert not Path("canary").exists()
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_what_the_user_names_or_trusts_runs(finished: Path) -> None:
    name_code(finished, "training.callbacks", ["evil:call"])
    for allowed in ({"overrides": ["training.callbacks=[evil:call]"]}, {"trust_run": True}):
        sys.modules.pop("evil", None)
        with pytest.raises(SystemExit, match="it ran"):
            resume(finished / "checkpoint-1", **allowed)
        Path("canary").unlink()


def test_other_code_of_the_users_does_not_let_the_records_in(finished: Path) -> None:
    name_code(finished, "training.callbacks", ["evil:call"])
    with pytest.raises(UsageError, match=r"training.callbacks: evil:call"):
        resume(finished / "checkpoint-1", ["training.metrics=[evil:call]"])
    assert not Path("canary").exists()


def test_the_users_own_choice_in_its_place_is_enough(finished: Path) -> None:
    name_code(finished, "training.callbacks", ["evil:call"])
    assert resume(finished / "checkpoint-1", ["training.callbacks=[]"]).steps == 2
    assert not Path("canary").exists()


def test_a_plain_configuration_names_none() -> None:
    assert list(named_code(Config().to_dict())) == []
