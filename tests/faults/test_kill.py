"""A run that is killed anywhere goes on to the same bits; a signal stops it saved, or at once the second time."""

from __future__ import annotations

import json
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from llamahome.training.checkpoint import checkpoints, fault_of

STEP_7 = "26"  # the second of the four micro-batches of step 7


def names(run: Path) -> list[str]:
    return [path.name for path in checkpoints(run)]


def outcome(run: Path) -> tuple[list[Any], dict[str, bytes]]:
    """What a run gave: the figures of all steps that do not depend on the clock, and the bytes of its states."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    keys = ("step", "epoch", "loss", "learning_rate", "grad_norm", "tokens", "eval_loss")
    figures = [[line.get(key) for key in keys] for line in lines if "event" not in line]
    files = ["final/adapter_model.safetensors", "best/adapter_model.safetensors"]
    files += [f"checkpoint-12/{name}.safetensors" for name in ("adapter_model", "optimizer", "rng")]
    return figures, {name: (run / name).read_bytes() for name in files}


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_killed_in_a_step(place: Any, undisturbed: Any, precision: str) -> None:
    killed = place.start(place.words("train", processing__precision=precision), KILL_CALL=STEP_7)
    whole = undisturbed(place, precision)
    assert killed.wait() == -signal.SIGKILL
    assert names(place.run) == ["checkpoint-3", "checkpoint-6"]
    assert place.status()["state"] == "running"
    resumed = place.resume()
    assert outcome(resumed) == outcome(whole)
    assert [figures[0] for figures in outcome(resumed)[0]] == list(range(1, 13))
    assert (place.status()["state"], place.status()["last_step"]) == ("done", 12)


def test_killed_while_a_checkpoint_is_written(place: Any, undisturbed: Any) -> None:
    with (place.folder / "own.py").open("a") as file:
        file.write(
            "\nfrom llamahome.training import checkpoint\n"
            "write = checkpoint.write_manifest\n"
            "def killed(folder, step):\n"
            "    if step == 6 and os.environ.get('KILL_SAVE'):\n"
            "        (folder / 'manifest.json').write_text('{')\n"
            "        os.kill(os.getpid(), signal.SIGKILL)\n"
            "    write(folder, step)\n"
            "checkpoint.write_manifest = killed\n"
        )
    killed = place.start(place.words("train"), KILL_SAVE="1")
    whole = undisturbed(place)
    assert killed.wait() == -signal.SIGKILL
    assert names(place.run) == ["checkpoint-3"]
    assert list(place.run.glob(".checkpoint-6.tmp-*"))
    resumed = place.resume()
    assert outcome(resumed) == outcome(whole)
    assert {path.name for path in resumed.iterdir() if path.name.startswith(".")} == {".lock"}


def test_killed_after_the_last_step(place: Any, undisturbed: Any) -> None:
    whole = undisturbed(place)
    shutil.copytree(whole, place.run)
    (place.run / "final").rename(place.run / ".final.tmp-1")
    assert outcome(place.resume()) == outcome(whole)
    assert not (place.run / ".final.tmp-1").exists()


def test_usr1_saves_and_goes_on_and_term_saves_and_ends(place: Any, undisturbed: Any) -> None:
    process = place.start(place.words("train", training__save_steps=100), PAUSE_STEPS="4 7")
    place.reached("step-4", process)
    process.send_signal(signal.SIGUSR1)
    place.go("step-4")
    place.reached("step-7", process)
    assert names(place.run) == ["checkpoint-4"]
    process.send_signal(signal.SIGTERM)
    place.go("step-7")
    _, stderr = process.communicate(timeout=60)
    assert process.returncode == 143
    assert stderr.splitlines()[-1] == (
        f"error: stopped by a signal, state saved; {place.run}; continue with train-resume"
    )
    status = place.status()
    assert (status["state"], status["code"], status["last_step"], status["resumable"]) == ("stopped", 143, 7, True)
    assert names(place.run) == ["checkpoint-4", "checkpoint-7"]
    assert outcome(place.resume()) == outcome(undisturbed(place))


def test_the_second_signal_leaves_at_once(place: Any, undisturbed: Any) -> None:
    process = place.start(place.words("train"), PAUSE_STEPS="4")
    place.reached("step-4", process)
    process.send_signal(signal.SIGINT)
    with pytest.raises(Exception, match="timed out"):
        process.wait(timeout=0.3)
    process.send_signal(signal.SIGINT)
    assert process.wait(timeout=5) == -signal.SIGINT
    assert names(place.run) == ["checkpoint-3"]
    assert fault_of(place.run / "checkpoint-3") is None
    assert outcome(place.resume()) == outcome(undisturbed(place))


def test_a_signal_while_the_model_is_loaded(place: Any, undisturbed: Any) -> None:
    process = place.start(place.words("train"), PAUSE_LOADING="1")
    place.reached("loading", process)
    process.send_signal(signal.SIGINT)
    place.go("loading")
    process.communicate(timeout=60)
    assert process.returncode == 130
    status = place.status()
    assert (status["state"], status["code"], status["last_step"], status["resumable"]) == ("stopped", 130, 0, True)
    assert names(place.run) == ["checkpoint-0"]
    assert outcome(place.resume()) == outcome(undisturbed(place))


@pytest.mark.slow
@pytest.mark.parametrize("call", [1, 4, 5, 12, 13, 24, 25, 47, 48])
def test_killed_in_any_micro_batch(place: Any, undisturbed: Any, call: int) -> None:
    killed = place.start(place.words("train", training__save_steps=1), KILL_CALL=str(call))
    assert killed.wait() == -signal.SIGKILL
    done = (call - 1) // 4
    assert names(place.run) == [f"checkpoint-{step}" for step in range(max(1, done - 2), done + 1)]
    whole = undisturbed(place)
    if done:
        assert outcome(place.resume()) == outcome(whole)
    else:
        again = place.start(place.words("train", training__save_steps=1))
        assert again.wait() == 0
        assert outcome(place.run) == outcome(whole)
