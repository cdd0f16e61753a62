"""The run without data: its settings give way to the user's, and it can be run again."""

from __future__ import annotations

from llamahome.config import Config
from llamahome.demo import DEMO_SETTINGS
from llamahome.training.demo import demo_config, free_folder


def test_the_users_own_settings_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    config = Config.load(None, ["optimization.max_steps=3"])
    demo = demo_config(config, ["optimization.max_steps=3"], own_settings=False)
    assert demo.optimization.max_steps == 3
    assert demo.optimization.learning_rate == DEMO_SETTINGS["optimization.learning_rate"]
    assert str(demo.training.output) == "output/demo"
    assert demo_config(config, [], own_settings=True).optimization.learning_rate == config.optimization.learning_rate
    named = demo_config(Config.load(None, ["training.output=mine"]), ["training.output=mine"], own_settings=False)
    assert str(named.training.output) == "mine"


def test_each_run_gets_a_folder_of_its_own(tmp_path):
    assert free_folder(tmp_path / "demo") == tmp_path / "demo"
    (tmp_path / "demo").mkdir()
    (tmp_path / "demo-2").mkdir()
    assert free_folder(tmp_path / "demo") == tmp_path / "demo-3"
