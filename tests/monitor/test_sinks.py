"""metrics.jsonl and TensorBoard: complete lines, exact truncation, and a full disk that stops nothing."""

from __future__ import annotations

import json
import logging
import math
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamahome.errors import ConfigError, MissingError, StorageError
from llamahome.monitor.sinks import GuardedSink, JsonlSink, TensorBoardSink, build_sinks


def lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text("utf-8").splitlines()]


class TestJsonl:
    def test_one_object_per_line_at_once(self, tmp_path: Path) -> None:
        sink = JsonlSink(tmp_path / "run" / "metrics.jsonl")
        sink.write({"step": 1, "loss": 2.5})
        sink.event({"event": "checkpoint", "path": Path("checkpoint-1")})
        assert lines(sink.path) == [{"step": 1, "loss": 2.5}, {"event": "checkpoint", "path": "checkpoint-1"}]
        sink.close()
        sink.close()

    def test_what_json_cannot_hold_is_null_or_text(self, tmp_path: Path) -> None:
        numpy = pytest.importorskip("numpy")
        sink = JsonlSink(tmp_path / "m.jsonl")
        values = {"nan": math.nan, "inf": -math.inf, "np": numpy.float32(0.5), "npnan": numpy.float64("nan")}
        sink.write(values | {"list": [1, math.nan], "flag": True, "text": "\ud800\x1b[31m\n\u2028é"})
        (found,) = lines(sink.path)
        assert found["nan"] is found["inf"] is found["npnan"] is None
        assert (found["np"], found["list"], found["flag"]) == (0.5, [1, None], True)
        assert found["text"] == "?\x1b[31m\n\u2028é"

    def test_a_torn_last_line_does_not_spoil_the_next(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        path.write_text('{"step": 1}\n{"ste')
        sink = JsonlSink(path)
        sink.write({"step": 2})
        assert path.read_text() == '{"step": 1}\n{"ste\n{"step": 2}\n'

    def test_truncate_drops_later_steps_and_torn_lines(self, tmp_path: Path) -> None:
        path = tmp_path / "m.jsonl"
        rows = [
            '{"event": "started"}', '{"step": 1}', '{"step": 2}', '{"event": "checkpoint", "step": 2}',
            '{"step": 3}', '{"event": "late, without a step"}', "garbage",
            '{"event": "signal", "step": 3}', '{"step": 2, "eval_loss": 1}',
        ]  # fmt: skip
        path.write_text("\n".join(rows) + '\n{"step": 2, "lo')
        JsonlSink.truncate_after(path, 2)
        assert path.read_text().splitlines() == [*rows[:4], rows[8]]
        assert list(tmp_path.glob(".m*")) == [], "no temporary file is left"

    def test_truncate_leaves_a_good_or_missing_file_alone(self, tmp_path: Path) -> None:
        JsonlSink.truncate_after(tmp_path / "none.jsonl", 1)
        path = tmp_path / "m.jsonl"
        path.write_text('{"step": 1}\n')
        before = path.stat().st_ino
        JsonlSink.truncate_after(path, 1)
        assert path.stat().st_ino == before

    def test_a_folder_that_is_none_is_a_storage_error(self, tmp_path: Path) -> None:
        (tmp_path / "file").write_text("")
        with pytest.raises(StorageError, match="file"):
            JsonlSink(tmp_path / "file" / "metrics.jsonl")


FULL_DISK = """
import logging, resource, signal, sys
from pathlib import Path
from llamahome.monitor.sinks import build_sinks
logging.basicConfig(format="%(message)s")
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
sinks = build_sinks(["tensorboard"], Path(sys.argv[1]))
resource.setrlimit(resource.RLIMIT_FSIZE, (2000, -1))  # stands for a full disk, without root
for step in range(200):
    for sink in sinks:
        sink.write({"step": step, "loss": 1.0 / (step + 1), "grad_norm": 0.5})
resource.setrlimit(resource.RLIMIT_FSIZE, (-1, -1))
for sink in sinks:
    sink.write({"step": 200, "loss": 0.0})
    sink.close()
print("trained to the end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs rlimits")
def test_a_full_disk_costs_records_but_not_the_run(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL_DISK, str(tmp_path)], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "trained to the end", done.stderr
    warnings = done.stderr.strip().splitlines()
    assert len(warnings) == 2
    assert any("metrics.jsonl" in line for line in warnings)
    assert any("TensorBoard is not written any more" in line for line in warnings)
    steps = [row["step"] for row in lines(tmp_path / "metrics.jsonl")]  # raises at a line that is not whole
    assert steps == sorted(set(steps))
    assert 20 < len(steps) < 60
    assert steps[-1] == 200, "written again once there is space"


class TestTensorBoard:
    def test_scalars_are_read_back_by_tensorboard(self, tmp_path: Path) -> None:
        accumulator = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
        sink = TensorBoardSink(tmp_path / "tensorboard")
        for step in (1, 2):
            sink.write({"step": step, "loss": 1.0 / step, "mfu": None, "tokens": 10 * step, "note": "x"})
        sink.event({"event": "evaluation", "step": 2, "eval_loss": 0.75})
        sink.event({"event": "oom", "step": 2, "tokens": 5})
        sink.close()
        events = accumulator.EventAccumulator(str(tmp_path / "tensorboard"))
        events.Reload()
        assert set(events.Tags()["scalars"]) == {"train/loss", "train/tokens", "eval/loss"}
        assert [(e.step, e.value) for e in events.Scalars("train/loss")] == [(1, 1.0), (2, 0.5)]
        assert [(e.step, e.value) for e in events.Scalars("eval/loss")] == [(2, 0.75)]

    def test_without_the_package_there_is_one_warning(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
    ) -> None:
        monkeypatch.setitem(sys.modules, "tensorboard.compat.proto", None)
        with pytest.raises(MissingError, match=r"pip install .llamahome\[tensorboard\]"):
            TensorBoardSink(tmp_path)
        with caplog.at_level(logging.WARNING):
            assert len(build_sinks(["tensorboard"], tmp_path)) == 1
        assert len(caplog.records) == 1


class TestOwnSinks:
    def test_a_sink_by_import_path(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "own_sink.py").write_text(
            "class Text:\n"
            "    def __init__(self, folder): self.file = open(folder / 'own.txt', 'w')\n"
            "    def write(self, record): print(record['step'], file=self.file)\n"
            "    def event(self, event): print(event['event'], file=self.file)\n"
            "    def close(self): self.file.close()\n"
        )
        monkeypatch.chdir(tmp_path)
        sinks = build_sinks(["none", "own_sink:Text"], tmp_path)
        for sink in sinks:
            sink.write({"step": 4})
            sink.event({"event": "oom"})
            sink.close()
        assert (tmp_path / "own.txt").read_text() == "4\noom\n"
        assert len(sinks) == 2

    def test_a_sink_that_fails_is_named_and_left_out(self, caplog: pytest.LogCaptureFixture) -> None:
        class Broken:
            def write(self, record: Any) -> None:
                raise ZeroDivisionError("no")

            event = close = write

        sink = GuardedSink(Broken(), "mine:Broken")  # type: ignore[arg-type]
        with caplog.at_level(logging.WARNING):
            for _ in range(3):
                sink.write({"step": 1})
            sink.close()
        assert [record.getMessage() for record in caplog.records] == [
            "sink mine:Broken is not used any more: ZeroDivisionError: no"
        ]

    @pytest.mark.parametrize("name", ["wandbb", "math:pi", "no_such_module:Sink"])
    def test_what_is_no_sink_is_refused(self, name: str, tmp_path: Path) -> None:
        with pytest.raises(ConfigError, match="sinks"):
            build_sinks([name], tmp_path)
