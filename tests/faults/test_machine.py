"""What the machine does to a run: clocks, signals at any moment, few open files, files that vanish, a disk gone."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import subprocess
from typing import Any

import pytest

from llamahome.training.checkpoint import checkpoints, fault_of, newest_good

ADAPTER = "final/adapter_model.safetensors"
SIGNALLING = """

def term_in(module, name):
    whole = getattr(module, name)
    def signalled(*arguments, **options):
        if name != "write_state" or arguments[1].step == 6:
            os.kill(os.getpid(), signal.SIGTERM)
        return whole(*arguments, **options)
    setattr(module, name, signalled)

if os.environ.get("TERM_IN") == "save":
    from llamahome.training import checkpoint
    term_in(checkpoint, "write_state")
if os.environ.get("TERM_IN") == "evaluation":
    from llamahome.training import run
    term_in(run, "evaluate_store")
"""


def test_the_age_of_files_decides_nothing(place: Any, undisturbed: Any) -> None:
    """A clock that went back, or a copy, gives later checkpoints earlier times."""
    shutil.copytree(undisturbed(place), place.run)
    for age, path in enumerate(checkpoints(place.run)):
        os.utime(path, (1e9 - age, 1e9 - age))
    assert newest_good(place.run).name == "checkpoint-12"


@pytest.mark.slow
@pytest.mark.parametrize("moment", ["save", "evaluation"])
def test_a_signal_in_the_middle_of_other_work(place: Any, undisturbed: Any, moment: str) -> None:
    with (place.folder / "own.py").open("a") as file:
        file.write(SIGNALLING)
    process = place.start(place.words("train"), TERM_IN=moment)
    process.communicate(timeout=120)
    assert process.returncode in (143, -signal.SIGTERM)
    saved = checkpoints(place.run)
    assert [fault_of(path) for path in saved] == [None] * len(saved)
    assert saved
    assert (place.resume() / ADAPTER).read_bytes() == (undisturbed(place) / ADAPTER).read_bytes()


@pytest.mark.slow
def test_few_files_may_be_open(place: Any, undisturbed: Any) -> None:
    before = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (64, before[1]))
    try:
        process = place.start(place.words("train"))
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, before)
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (place.run / ADAPTER).read_bytes() == (undisturbed(place) / ADAPTER).read_bytes()


REFUSING = """
#include <errno.h>
#include <spawn.h>
#include <unistd.h>
pid_t fork(void) { errno = EAGAIN; return -1; }
pid_t vfork(void) { errno = EAGAIN; return -1; }
int posix_spawn(pid_t *pid, const char *path, const posix_spawn_file_actions_t *actions,
                const posix_spawnattr_t *attributes, char *const words[], char *const variables[]) {
    (void)pid, (void)path, (void)actions, (void)attributes, (void)words, (void)variables;
    return EAGAIN;
}
"""


@pytest.mark.slow
@pytest.mark.skipif(shutil.which("cc") is None, reason="needs a C compiler")
def test_no_process_may_be_started(place: Any, undisturbed: Any) -> None:
    (place.folder / "refusing.c").write_text(REFUSING)
    library = place.folder / "refusing.so"
    subprocess.run(["cc", "-shared", "-fPIC", "-o", library, place.folder / "refusing.c"], check=True)
    process = place.start(place.words("train"), LD_PRELOAD=str(library))
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (place.run / ADAPTER).read_bytes() == (undisturbed(place) / ADAPTER).read_bytes()


@pytest.mark.slow
def test_the_data_disappears(place: Any, undisturbed: Any, isolated_home: Any) -> None:
    """Rows and cache are deleted under a run: it holds its tokens open."""
    process = place.start(place.words("train"), PAUSE_STEPS="5")
    whole = undisturbed(place)
    place.reached("step-5", process)
    (place.folder / "rows.jsonl").unlink()
    shutil.rmtree(isolated_home / "cache")
    place.go("step-5")
    _, stderr = process.communicate(timeout=120)
    assert process.returncode == 0, stderr
    assert (place.run / ADAPTER).read_bytes() == (whole / ADAPTER).read_bytes()
