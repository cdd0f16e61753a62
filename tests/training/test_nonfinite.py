"""A sample that poisons its step: the run goes back to a checkpoint, leaves it out, and goes on the same way always."""

from __future__ import annotations

import json
import sys

import pytest

from llamahome.config import Config
from llamahome.errors import ConfigError, NonFiniteError
from llamahome.training.checkpoint import checkpoints, load_state, write_manifest
from llamahome.training.run import resume, train

MODULE = """
from llamahome.kernels import linear_cross_entropy

POISON, FACTOR = {poison}, float("{factor}")

def loss(hidden, weight, labels, **rest):
    value = linear_cross_entropy(hidden, weight, labels, **rest)
    return value * FACTOR if (labels == POISON).any() else value

def breaking(event, loop, record):
    if event == "step" and loop.state.step == {breaks}:
        raise ValueError("broken")
"""


@pytest.fixture
def poisoned(settings, data_file, tiny_tokenizer, tmp_path, monkeypatch):
    """Settings of runs whose loss is off in steps with the row that has a tilde."""
    with data_file.open("a") as file:
        file.write(json.dumps({"instruction": "Write.", "output": "sea ~ sea"}) + "\n")
    monkeypatch.chdir(tmp_path)
    (poison,) = tiny_tokenizer.encode("~", add_special_tokens=False)
    more = {"training.loss": "poison:loss", "data.validation_split": 0.0, "optimization.on_nonfinite": "rewind"}
    more["training.seed"] = 4  # puts the poison into steps 8 and 18
    names = iter(range(9))

    def make(factor="nan", breaks=0, **changes):
        sys.modules.pop("poison", None)
        (tmp_path / "poison.py").write_text(MODULE.format(poison=poison, factor=factor, breaks=breaks))
        given = settings | more | {key.replace("__", "."): value for key, value in changes.items()}
        return given | {"training.output": str(tmp_path / f"run-{next(names)}"), "optimization.max_steps": 18}

    yield make
    sys.modules.pop("poison", None)


def run(given):
    return train(Config.load(None, given)).output


def adapter(folder):
    return (folder / "final" / "adapter_model.safetensors").read_bytes()


def lines(folder, event=None):
    found = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line for line in found if line.get("event") == event]


def test_the_run_goes_back_and_leaves_the_sample_out(poisoned):
    output = run(poisoned())
    (rewind,) = lines(output, "rewind")
    assert rewind["samples"].endswith("rows.jsonl:61")
    assert (rewind["step"], rewind["from_step"]) == (6, 8)
    records = lines(output)
    assert [record["step"] for record in records] == list(range(1, 19))
    assert all(record["loss"] is not None for record in records)
    state, _ = load_state(checkpoints(output)[-1])
    assert len(state.skipped_samples) == 1
    # The same by hand: stopped at the fault, the sample struck from the checkpoint's steps, and resumed.
    by_hand = poisoned(optimization__on_nonfinite="stop")
    with pytest.raises(NonFiniteError, match=r"rows.jsonl:61;"):
        run(by_hand)
    folder = checkpoints(output.parent / "run-1")[-1]
    content = json.loads((folder / "training_state.json").read_text())
    (folder / "training_state.json").write_text(json.dumps(content | {"skipped_samples": state.skipped_samples}))
    (folder / "manifest.json").unlink()
    write_manifest(folder, content["step"])
    assert adapter(resume(folder, trust_run=True).output) == adapter(output)


@pytest.mark.parametrize("after", [1, 4])
def test_an_end_after_the_return_changes_nothing(poisoned, after):
    whole = run(poisoned())
    (rewind,) = lines(whole, "rewind")
    broken = poisoned(breaks=rewind["step"] + after, training__callbacks=["poison:breaking"])
    with pytest.raises(ConfigError, match="broken"):
        run(broken)
    sys.modules.pop("poison")
    poisoned()
    assert adapter(resume(whole.parent / "run-1", ["training.callbacks=[]"], trust_run=True).output) == adapter(whole)


def test_before_the_first_checkpoint_it_begins_anew(poisoned):
    output = run(poisoned(training__save_steps=100))
    assert [event["step"] for event in lines(output, "rewind")] == [0]
    assert [record["step"] for record in lines(output)] == list(range(1, 19))


def test_a_loss_that_leaps(poisoned):
    changes = {"optimization__spike_factor": 3.0, "optimization__on_nonfinite": "stop"}
    steps = {"training__save_steps": 5}
    output = run(poisoned("50", **changes, **steps) | {"optimization.max_steps": 32})
    (rewind,) = lines(output, "rewind")
    assert rewind["from_step"] > 16, "the sixteen losses before it are what it is measured against"
    assert rewind["samples"].endswith("rows.jsonl:61")
    assert "times the usual" in rewind["fault"]


def test_where_the_samples_are_not_to_blame_it_stops(poisoned, tmp_path):
    given = poisoned()
    module = tmp_path / "poison.py"
    module.write_text(module.read_text().replace("(labels == POISON).any()", "True"))
    with pytest.raises(NonFiniteError, match="loss nan"):
        run(given)
    assert len(lines(tmp_path / "run-0", "rewind")) == 9
