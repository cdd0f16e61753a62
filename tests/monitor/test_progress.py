"""A live view on a terminal, plain lines elsewhere; nothing in the text steers the terminal, nothing stops the run."""

from __future__ import annotations

import io
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from llamahome.monitor.progress import LiveProgress, PlainProgress, build_progress
from llamahome.monitor.words import clean, duration

RECORD: dict[str, Any] = {
    "step": 10, "loss": 1.23456, "learning_rate": 5e-5, "tokens_per_second": 1234.5, "memory_peak_bytes": 3_100_000_000,
    "memory_limit_bytes": 8_000_000_000, "grad_norm": 1.0,
}  # fmt: skip
HOSTILE = "\x1b[2J\x07[bold red]x[/] \u202egnp\u2028 \r\n\x9b31m \ud800"


class Clock:
    def __init__(self) -> None:
        self.now = 0.0

    def __call__(self) -> float:
        return self.now


def drive(view: Any, clock: Clock, steps: int = 20) -> None:
    view.start(steps)
    for step in range(1, steps + 1):
        clock.now += 2.0
        view.step(RECORD | {"step": step})
    view.evaluation({"step": steps, "eval_loss": 1.5, "eval_perplexity": 4.4817})
    view.event({"event": "checkpoint", "path": "checkpoint-20"})
    view.finish("saved")


class TestPlain:
    def test_one_line_per_interval(self) -> None:
        clock, stream = Clock(), io.StringIO()
        drive(PlainProgress(8, stream, clock), clock)
        assert stream.getvalue().splitlines() == [
            "training 20 steps",
            "step 8/20, loss 1.2346, lr 5e-05, 1,234 tokens/s, memory 3.10/8.00 GB, 0:00:24 left",
            "step 16/20, loss 1.2346, lr 5e-05, 1,234 tokens/s, memory 3.10/8.00 GB, 0:00:08 left",
            "step 20/20, loss 1.2346, lr 5e-05, 1,234 tokens/s, memory 3.10/8.00 GB, 0:00:00 left",
            "step 20: held-out loss 1.5, perplexity 4.482",
            "saved checkpoint-20",
            "saved",
        ]

    def test_what_is_unknown_is_left_out(self) -> None:
        stream = io.StringIO()
        view = PlainProgress(1, stream, Clock())
        view.start(100, step=50)
        view.step({"step": 51, "loss": float("nan"), "tokens_per_second": None})
        assert stream.getvalue().splitlines()[1:] == ["step 51/100, loss nan, 0:00:00 left"]

    def test_text_from_data_is_shown_not_obeyed(self) -> None:
        stream = io.StringIO()
        view = PlainProgress(1, stream)
        view.event({"event": "nonfinite", "samples": HOSTILE})
        (line,) = stream.getvalue().splitlines()
        assert line.isprintable()
        assert "[bold red]x[/]" in line
        assert "\\x1b[2J\\x07" in line

    def test_an_ascii_stream_gets_ascii(self) -> None:
        raw = io.BytesIO()
        stream = io.TextIOWrapper(raw, encoding="ascii", errors="strict")
        PlainProgress(1, stream).event({"event": "resumed", "checkpoint": "größe-東"})
        assert raw.getvalue() == b"resumed from gr??e-?\n"

    @pytest.mark.parametrize("stream", [None, "closed", "broken"])
    def test_output_that_fails_is_given_up_quietly(self, stream: Any) -> None:
        class Broken(io.StringIO):
            def write(self, text: str) -> int:
                raise BrokenPipeError

        given: Any = {None: None, "closed": io.StringIO(), "broken": Broken()}[stream]
        if stream == "closed":
            given.close()
        clock = Clock()
        drive(PlainProgress(1, given, clock), clock)


class TestLive:
    def console(self, **settings: Any) -> Any:
        from rich.console import Console

        values = {"force_terminal": True, "width": 100, "color_system": None, "legacy_windows": False} | settings
        return Console(file=io.StringIO(), **values)

    def test_shows_loss_rate_memory_and_time_left(self) -> None:
        clock, console = Clock(), self.console()
        drive(build_progress(console=console, clock=clock), clock)
        shown = console.file.getvalue()
        for text in ("step 20/20", "loss 1.2346", "lr 5e-05", "1,234 tokens/s", "memory 3.10/8.00 GB", "[#########....",
                     "0:00:02 left", "perplexity 4.482", "checkpoint-20", "saved"):  # fmt: skip
            assert text in shown

    def test_redraws_five_times_a_second_at_most(self) -> None:
        clock, console = Clock(), self.console()
        view = LiveProgress(console, clock)
        view.start(1000)
        for step in range(1, 101):
            clock.now += 0.01
            view.step(RECORD | {"step": step})
        assert 4 <= console.file.getvalue().count("step ") <= 8

    def test_text_from_data_is_shown_not_obeyed(self) -> None:
        console = self.console(color_system="truecolor")
        view = LiveProgress(console, Clock())
        view.start(1)
        before = len(console.file.getvalue())
        view.event({"event": "oom", "error": HOSTILE})
        shown = console.file.getvalue()[before:]
        assert "[bold red]x[/]" in shown
        assert "\x1b[2J\x07" not in shown
        assert not {"\x07", "\u202e", "\x9b", "\u2028"} & set(shown)
        view.finish()

    def test_a_terminal_that_goes_away_stops_nothing(self) -> None:
        class Gone(io.StringIO):
            def flush(self) -> None:
                raise BrokenPipeError

        from rich.console import Console

        clock = Clock()
        drive(LiveProgress(Console(file=Gone(), force_terminal=True), clock), clock)

    def test_an_ascii_terminal_shows_what_it_can(self) -> None:
        from rich.console import Console

        raw = io.BytesIO()
        console = Console(file=io.TextIOWrapper(raw, encoding="ascii"), force_terminal=True, width=80)
        view = LiveProgress(console, Clock())
        view.start(5)
        view.event({"event": "resumed", "checkpoint": "größe"})
        view.step(RECORD)
        view.finish()
        console.file.flush()
        assert b"gr??e" in raw.getvalue()
        assert b"loss 1.2346" in raw.getvalue()


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


@pytest.mark.parametrize(("term", "live"), [("xterm", True), ("dumb", False), ("", False)])
def test_the_terminal_decides(term: str, live: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("TERM", term)
    assert isinstance(build_progress(stream=Terminal()), LiveProgress) is live
    assert isinstance(build_progress(stream=io.StringIO()), PlainProgress)


SCRIPT = """
import sys
from llamahome.monitor.progress import build_progress
view = build_progress(interval=1)
view.start(5000)
for step in range(1, 5001):
    view.step({"step": step, "loss": 1.0})
view.event({"event": "resumed", "checkpoint": "gr\\u00f6\\u00dfe"})
view.finish("done")
open(sys.argv[1], "w").write("trained to the end")
"""


@pytest.mark.skipif(sys.platform == "win32", reason="needs a POSIX shell")
@pytest.mark.parametrize("redirection", ["| head -n 2", ">&-", "> /dev/full", "| cat > /dev/null"])
def test_training_goes_on_whatever_happens_to_stdout(redirection: str, tmp_path: Path) -> None:
    (tmp_path / "script.py").write_text(SCRIPT)
    done = tmp_path / "done"
    command = f"'{sys.executable}' '{tmp_path / 'script.py'}' '{done}' {redirection}"
    environment = os.environ | {"LC_ALL": "C", "TERM": "dumb", "PYTHONCOERCECLOCALE": "0", "PYTHONUTF8": "0"}
    ended = subprocess.run(["bash", "-o", "pipefail", "-c", command], capture_output=True, text=True, timeout=60,
                           env=environment, cwd=Path(__file__).parents[2])  # fmt: skip
    assert done.read_text() == "trained to the end"
    assert (ended.returncode, ended.stderr) == (0, "")
    if "head" in redirection:
        first, second = ended.stdout.splitlines()
        assert first == "training 5000 steps"
        assert second.startswith("step 1/5000, loss 1.0000")


def test_small_texts() -> None:
    assert duration(3725.4) == "1:02:05"
    assert duration(-1) == "0:00:00"
    assert clean("a\tb\x00") == "a\\x09b\\x00"
