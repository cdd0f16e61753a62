"""Full, read-only and occupied places: one line and code 6, and what was saved before stays good."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import StorageError
from llamahome.files import is_leftover
from llamahome.training.checkpoint import checkpoints, fault_of
from llamahome.training.run import resume
from llamahome.training.rundir import RunFolder

AS_ROOT = [
    pytest.mark.root,
    pytest.mark.skipif(os.geteuid() != 0 or shutil.which("unshare") is None, reason="needs root and unshare"),
]


def adapter(run: Path) -> bytes:
    return (run / "final" / "adapter_model.safetensors").read_bytes()


def test_no_file_may_grow_any_more(place: Any, undisturbed: Any) -> None:
    """A limit on the size of files stands in for a full disk, which not every machine can make."""
    with (place.folder / "own.py").open("a") as file:
        file.write(
            "\nimport resource\n"
            "def limiting(event, loop, record):\n"
            "    if event == 'step' and loop.state.step == 5:\n"
            "        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, 20_000))\n"
        )
    full = place.start(place.words("train", training__callbacks=["own:limiting"]))
    whole = undisturbed(place)
    _, stderr = full.communicate(timeout=60)
    assert full.returncode == 6
    assert stderr.splitlines()[-1].startswith("error: cannot write: ")
    assert f"{place.run}/checkpoint-6; free some space" in stderr
    assert "Traceback" not in stderr
    status = place.status()
    assert (status["state"], status["code"], status["last_step"], status["resumable"]) == ("failed", 6, 6, True)
    assert [(path.name, fault_of(path)) for path in checkpoints(place.run)] == [("checkpoint-3", None)]
    assert not [path for path in place.run.iterdir() if is_leftover(path)]
    place.resume("training.callbacks=[]")
    assert adapter(place.run) == adapter(whole)


def test_a_run_under_way_is_not_disturbed_by_a_resume(place: Any) -> None:
    process = place.start(place.words("train"), PAUSE_STEPS="5")
    place.reached("step-5", process)
    before = {path: path.read_bytes() for path in place.run.rglob("*") if path.is_file()}
    for attempt in (
        place.resume,
        lambda: resume(place.run / "checkpoint-3", trust_run=True),
        lambda: RunFolder(place.run, fresh=True),
    ):
        with pytest.raises(StorageError, match=f"the folder is in use by process {process.pid} on "):
            attempt()
    assert {path: path.read_bytes() for path in place.run.rglob("*") if path.is_file()} == before
    place.go("step-5")
    assert process.wait() == 0
    lines = (place.run / "metrics.jsonl").read_text().splitlines()
    steps = [json.loads(line)["step"] for line in lines if "event" not in json.loads(line)]
    assert steps == list(range(1, 13))


class TestAsRoot:
    pytestmark = AS_ROOT

    def in_a_mount(self, place: Any, options: str, script: str, words: list[str]) -> subprocess.CompletedProcess[str]:
        """The command with a small file system of its own on `small`; then the script, while it is still there."""
        (place.folder / "small").mkdir()
        mount = f'mount -t tmpfs -o {options} none small && {{ "$@"; code=$?; {script}; exit $code; }}'
        return subprocess.run(
            ["unshare", "-m", "sh", "-c", mount, "sh", sys.executable, "-m", "llamahome", *words],
            cwd=place.folder, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
        )  # fmt: skip

    def test_a_read_only_place(self, place: Any) -> None:
        answer = self.in_a_mount(place, "ro", "true", place.words("train", training__output="small/run"))
        message = "error: cannot write: Read-only file system; small/run; choose a folder that you may write to\n"
        assert (answer.returncode, answer.stderr) == (6, message)

    @pytest.mark.slow
    def test_a_disk_that_fills_up(self, place: Any) -> None:
        """Another program takes what the preflight found free."""
        script = (
            "mkdir small && mount -t tmpfs -o size=8m none small || exit 99; "
            '"$@" & until [ -e step-5.reached ] || ! kill -0 $!; do sleep 0.05; done; '
            "cat /dev/zero > small/filler; touch step-5.go; wait $!; code=$?; cp -a small/run run; exit $code"
        )
        words = place.words("train", training__output="small/run", resource__min_free_disk=0)
        command = ["unshare", "-m", "sh", "-c", script, "sh"]
        process = place.start(words, command, PAUSE_STEPS="5")
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 6, stderr
        last = stderr.splitlines()[-1]
        assert last.startswith("error: cannot write: ")
        assert "No space left on device" in last
        assert [(path.name, fault_of(path)) for path in checkpoints(place.run)] == [("checkpoint-3", None)]

    @pytest.mark.slow
    @pytest.mark.skipif(shutil.which("mkfs.ext4") is None, reason="needs ext4")
    def test_a_disk_that_becomes_read_only(self, place: Any, undisturbed: Any) -> None:
        """ext4 gives up as it does after an error of the disk: open files cannot be written either."""
        whole = adapter(undisturbed(place))
        script = (
            "truncate -s 64M disk && mkfs.ext4 -q -F disk && mkdir small && "
            "mount -o loop,errors=remount-ro disk small || exit 99; "
            '"$@" & until [ -e step-5.reached ] || ! kill -0 $!; do sleep 0.05; done; '
            "mount -o remount,abort small && ! touch small/new || exit 98; touch step-5.go; wait $!; code=$?; "
            "umount small && mount -o loop disk small && cp -a small/run run || exit 97; exit $code"
        )
        words = place.words("train", training__output="small/run", resource__min_free_disk=0)
        process = place.start(words, ["unshare", "-m", "sh", "-c", script, "sh"], PAUSE_STEPS="5")
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 6, stderr
        errors = [line for line in stderr.splitlines() if line.startswith("error: ")]
        assert errors == stderr.splitlines()[-1:]
        assert errors[0].startswith("error: cannot write: Read-only file system; ")
        assert "Traceback" not in stderr
        assert [(path.name, fault_of(path)) for path in checkpoints(place.run)] == [("checkpoint-3", None)]
        place.resume("training.callbacks=[]", f"training.output={place.run}")
        assert adapter(place.run) == whole

    @pytest.mark.slow
    def test_a_disk_too_small_to_begin_with(self, place: Any) -> None:
        words = place.words("train", training__output="small/run")
        answer = self.in_a_mount(place, "size=100m", "true", words)
        assert answer.returncode == 6
        assert answer.stderr.splitlines()[-1].startswith("error: 105 MB free, ")
        assert "resource.min_free_disk; " in answer.stderr or "resource.min_free_disk)" in answer.stderr

    @pytest.mark.slow
    def test_no_shared_memory_is_left(self, place: Any, undisturbed: Any) -> None:
        fill = 'mount -t tmpfs -o size=4k none /dev/shm && head -c 4096 /dev/zero > /dev/shm/full && exec "$@"'
        process = place.start(place.words("train"), ["unshare", "-m", "sh", "-c", fill, "sh"])
        _, stderr = process.communicate(timeout=120)
        assert process.returncode == 0, stderr
        assert adapter(place.run) == adapter(undisturbed(place))

    def test_another_user_s_folder(self, place: Any) -> None:
        code = (
            "import os; from pathlib import Path; from llamahome.training.rundir import RunFolder\n"
            "os.setuid(65534)\n"
            "try: RunFolder(Path('run'), fresh=True)\n"
            "except Exception as error: print(error, error.exit_code)"
        )
        place.folder.chmod(0o755)
        answer = subprocess.run(
            [sys.executable, "-c", code], cwd=place.folder, capture_output=True, text=True, timeout=60
        )
        assert answer.stdout == "cannot write: Permission denied; run; choose a folder that you may write to 6\n"

    def test_a_hub_id_without_any_network(self, place: Any) -> None:
        command = ["unshare", "-n", sys.executable, "-m", "llamahome", *place.words("train", model__name="no/body")]
        answer = subprocess.run(
            command, env=os.environ | {"HF_HUB_OFFLINE": "0"}, capture_output=True, text=True, timeout=20
        )
        assert answer.returncode == 4
        assert answer.stderr.startswith("error: 'no/body' is no local folder, and not in the hub's local cache either")
