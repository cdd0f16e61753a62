"""Make the pictures of this folder again: `python docs/images/make.py DATA` with a file of question and answer rows.

Needs tmux, Chromium and Pillow, and some minutes: it trains twice. Terminals are real ones of 100 columns; what tmux
shows is drawn by Chromium. Look at every picture before it is committed.
"""

from __future__ import annotations

import argparse
import html
import os
import re
import shlex
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from PIL import Image

HERE = Path(__file__).parent
PROGRAM = Path(sys.executable).with_name("llamahome")
CHROMIUM = "chromium"
COLUMNS, LINE_HEIGHT, MARGIN = 100, 18, 14
COLOURS = dict(
    zip(range(30, 38), ("#6e7681", "#ff7b72", "#7ee787", "#e3b341", "#79c0ff", "#d2a8ff", "#76e3ea", "#e6edf3"),
        strict=True)
)  # fmt: skip
STYLES = {1: "font-weight:bold", 2: "opacity:.65"}
RUN = ["--set", "optimization.max_steps=16", "--set", "optimization.global_batch_size=2",
       "--set", "optimization.learning_rate=2e-4"]  # fmt: skip


class Terminal:
    """A session of a tmux server of its own in the folder `cwd`, with a shell that finds `llamahome`."""

    def __init__(self, cwd: Path) -> None:
        self.name = f"pictures-{os.getpid()}"
        path = f"{PROGRAM.parent}:{os.environ['PATH']}"
        self._tmux("new-session", "-d", "-x", str(COLUMNS), "-y", "60", "-c", str(cwd), "env", f"PATH={path}", "PS1=$ ",
                   "HISTFILE=", "bash", "--norc", "--noprofile")  # fmt: skip

    def _tmux(self, command: str, *words: str) -> str:
        at = ["-s" if command == "new-session" else "-t", self.name]
        done = subprocess.run(
            ["tmux", "-L", self.name, command, *at, *words], check=True, capture_output=True, text=True
        )
        return done.stdout

    def type(self, command: str, until: str, limit: float = 560.0) -> str:
        """Run `command` on a clear screen; what the screen shows, with its colours, once `until` matches it."""
        self._tmux("send-keys", "clear; tmux clear-history", "Enter")
        time.sleep(1)
        self._tmux("send-keys", command, "Enter")
        return self.wait(until, limit)

    def wait(self, until: str, limit: float = 560.0) -> str:
        ends = time.monotonic() + limit
        while time.monotonic() < ends:
            shown = self._tmux("capture-pane", "-e", "-p")
            if re.search(until, re.sub(r"\x1b\[[\d;]*m", "", shown), re.MULTILINE):
                return shown
            time.sleep(0.3)
        raise TimeoutError(f"{until} did not come; the screen shows\n{shown}")

    def close(self) -> None:
        self._tmux("kill-session")


def as_html(screen: str) -> str:
    """The lines of a screen with their colours, as a page; without the prompt that waits at the end."""
    lines = [line.rstrip() for line in screen.rstrip().splitlines()]
    while re.sub(r"\x1b\[[\d;]*m", "", lines[-1]).strip() in ("$", ""):
        lines.pop()
    body, style = [], dict[str, str]()
    for piece in re.split(r"(\x1b\[[\d;]*m)", "\n".join(lines)):
        if code := re.fullmatch(r"\x1b\[([\d;]*)m", piece):
            for number in (int(number or 0) for number in code[1].split(";")):
                if number == 0:
                    style.clear()
                elif number == 39:
                    style.pop("color", None)
                elif number in STYLES:
                    style["strength"] = STYLES[number]
                elif number in COLOURS:
                    style["color"] = f"color:{COLOURS[number]}"
        elif piece:
            text = html.escape(piece)
            body.append(f'<span style="{";".join(style.values())}">{text}</span>' if style else text)
    return (
        f"<!doctype html><meta charset=utf-8><style>body{{margin:{MARGIN}px;background:#0d1117;color:#e6edf3}}"
        f"pre{{margin:0;font:14px/{LINE_HEIGHT}px 'DejaVu Sans Mono',monospace}}</style><pre>{''.join(body)}</pre>"
    )


def draw(page: Path, picture: Path, width: int, height: int, *flags: str) -> None:
    """The page as a PNG of 64 colours."""
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags,
               f"--window-size={width},{height}", f"--screenshot={picture}", page.as_uri()]  # fmt: skip
    subprocess.run(command, check=True, capture_output=True, timeout=120)
    with Image.open(picture) as image:
        image.convert("RGB").quantize(64, dither=Image.Dither.NONE).save(picture, optimize=True)
    sys.stdout.write(f"{picture.name}: {picture.stat().st_size / 1e3:.0f} kB\n")


def draw_screen(screen: str, name: str, folder: Path) -> None:
    page = folder / f"{name}.html"
    page.write_text(as_html(screen), encoding="utf-8")
    lines = page.read_text("utf-8").count("\n") + 1
    draw(page, HERE / f"{name}.png", COLUMNS * 17 // 2 + 2 * MARGIN, lines * LINE_HEIGHT + 2 * MARGIN)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("data", type=Path)
    parser.add_argument("--only", nargs="*", help="Pictures to make.")
    parser.add_argument("--threads", default="auto", help="Of the runs; 1 where other programs keep the cores busy.")
    arguments = parser.parse_args()
    asked = set(arguments.only or ("doctor", "plan", "train", "watch", "report"))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / arguments.data.name).symlink_to(arguments.data.resolve())
        terminal = Terminal(folder)
        try:
            pictures(terminal, arguments.data.name, asked, folder, arguments.threads)
        finally:
            terminal.close()


def pictures(terminal: Terminal, data: str, asked: set[str], folder: Path, threads: str) -> None:
    """Each picture whose name is in `asked`; a prompt at the end of the screen says that a command is over."""
    over = r"^\$ \S[\s\S]*^\$ ?$"
    if "doctor" in asked:
        draw_screen(terminal.type("llamahome doctor", over), "doctor", folder)
    if "plan" in asked:
        plan = shlex.join(["llamahome", "plan", data, "--gpu-memory", "24GB"])
        terminal.type(plan, over)  # the second time nothing is tokenised
        draw_screen(terminal.type(plan, over), "plan", folder)
    if not asked & {"train", "watch", "report"}:
        return
    settings = RUN if threads == "auto" else [*RUN, "--set", f"processing.threads={threads}"]
    train = shlex.join(["llamahome", "train", data, "--output", "output/first", *settings])
    screen = terminal.type(f"{train} --set training.memory_limit=2GB", r"step 12/16")
    if "train" in asked:
        draw_screen(screen, "train", folder)
    terminal.wait(r"talk to it")
    if "watch" in asked:
        draw_screen(terminal.type("llamahome watch output/first", r"^done at step"), "watch", folder)
    if "report" in asked:
        second = shlex.join(["llamahome", "train", data, "--output", "output/second", *settings])
        terminal.type(f"{second} --set lora.rank=4", r"talk to it")
        one = folder / "output" / "first"
        terminal.type("llamahome report output/first output/second --output both.html", over)
        draw(one / "report.html", HERE / "report.png", 1200, 1240, "--blink-settings=preferredColorScheme=1")
        draw(one / "report.html", HERE / "report-dark.png", 1200, 1240, "--blink-settings=preferredColorScheme=0")
        draw(folder / "both.html", HERE / "compared.png", 1200, 1240, "--blink-settings=preferredColorScheme=1")


if __name__ == "__main__":
    main()
