"""Fills a cache, writes records and a run's state, and ends or fails at one system call after the other.

    LD_PRELOAD=shim.so python failing_stores.py FOLDER ERRNO

The other things beside checkpoints that a kill or a full disk may hit: an entry of the cache with its token store, an
eviction, `final`, `status.json`, and records of steps. Arguments and output as those of failing_saves.py.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path

from failing import Say, at_every_call
from kill_cache import build, check

from llamahome.data.cache import Cache
from llamahome.files import is_leftover, publish_folder
from llamahome.monitor.sinks import METRICS_FILE, JsonlSink
from llamahome.training.rundir import STATUS_FILE, RunFolder

STEPS = 3


def cache_of(folder: Path) -> Cache:
    return Cache(folder / "cache", 1 << 40, 1e9, 0)


def fill(folder: Path, key: str) -> None:
    entry = cache_of(folder).get(key, lambda entry: build(key, entry))
    check(key, entry.path)
    entry.close()


def work(folder: Path, say: Say) -> None:
    with RunFolder(folder / "run", fresh=True) as run:
        run.write_status("running", None, "starting", 0, resumable=False)
        fill(folder, "b")
        run.write_run({}, {})
        sink = JsonlSink(run.path / METRICS_FILE)
        for step in range(1, STEPS + 1):
            sink.write({"step": step, "loss": 1.0})
        sink.sync()
        sink.close()
        with publish_folder(run.path / "final") as final:
            (final / "model").write_text("whole")
        run.write_status("done", 0, "finished", STEPS, resumable=False)
    say(b"d")
    cache_of(folder).clear()


def judge(folder: Path, said: bytes, status: int) -> Iterator[str]:
    run, cache = folder / "run", cache_of(folder)
    for path in cache.folder.glob("[!.]*"):
        if path.is_dir():
            check(path.name, path)
    if not said and not (cache.folder / "a").is_dir():
        yield "an entry is gone that nobody cleared"
    fill(folder, "b")
    cache.clear()
    if left := [path.name for path in cache.folder.glob("*") if path.name != ".cleaned" and path.suffix != ".lock"]:
        yield f"left in the cache: {left}"
    if (run / STATUS_FILE).exists():
        state = json.loads((run / STATUS_FILE).read_text())["state"]
        if said and state != "done":
            yield f"it was done, and its state is {state}"
    JsonlSink.truncate_after(run / METRICS_FILE, STEPS)
    if (run / METRICS_FILE).exists():
        steps = [json.loads(line)["step"] for line in (run / METRICS_FILE).read_text().splitlines()]
        if steps != sorted(set(steps)):
            yield f"records of steps {steps}"
    if (run / "final").exists() and (run / "final" / "model").read_text() != "whole":
        yield "final is torn"
    if run.exists():
        with RunFolder(run, fresh=False):
            pass
        if names := [path.name for path in run.iterdir() if is_leftover(path)]:
            yield f"the next run does not clean up {names}"


def main(folder: Path, error: int) -> None:
    os.environ["TMPDIR"] = str(folder)  # where an entry goes that the cache has no room for
    template = folder / "template"
    template.mkdir()
    fill(template, "a")
    print(json.dumps(at_every_call(folder, error, template, work, judge)))


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
