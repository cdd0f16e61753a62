"""The page in a real browser: both colour schemes are drawn, and a narrow window needs no sideways scrolling."""

from __future__ import annotations

import json
import shutil
import struct
import subprocess
import zlib
from pathlib import Path

import pytest

from llamahome.monitor.report import write_report

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), "")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not CHROMIUM, reason="no Chromium here: apt install chromium"),
]


def chromium(page: Path, *flags: str) -> bytes:
    command = [CHROMIUM, "--headless=new", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", *flags, page.as_uri()]
    return subprocess.run(command, check=True, capture_output=True, timeout=120).stdout


@pytest.fixture
def report(tmp_path: Path) -> Path:
    for name in ("one", "two"):
        folder = tmp_path / name
        folder.mkdir()
        steps = [{"step": n, "loss": 2 / n, "memory_peak_bytes": 2e9, "memory_limit_bytes": 3e9} for n in range(1, 9)]
        (folder / "metrics.jsonl").write_text("".join(json.dumps(step) + "\n" for step in steps))
        (folder / "run.json").write_text(json.dumps({"command": ["llamahome", "train", "x" * 300]}))
    return write_report([tmp_path / "one", tmp_path / "two"])


def first_pixel(png: bytes) -> int:
    """Red of the upper left pixel; the first byte of a row's filter does not change a row's first pixel."""
    at, compressed = 8, b""
    while at < len(png):
        (length,) = struct.unpack(">I", png[at : at + 4])
        if png[at + 4 : at + 8] == b"IDAT":
            compressed += png[at + 8 : at + 8 + length]
        at += 12 + length
    return zlib.decompress(compressed)[1]


@pytest.mark.parametrize(("scheme", "red"), [(1, 255), (0, 0x0D)])
def test_both_colour_schemes_are_drawn(scheme: int, red: int, report: Path, tmp_path: Path) -> None:
    picture = tmp_path / "page.png"
    flags = [f"--screenshot={picture}", "--window-size=900,1200", f"--blink-settings=preferredColorScheme={scheme}"]
    chromium(report, *flags)
    assert picture.stat().st_size > 20_000  # curves and text, not an empty page
    assert first_pixel(picture.read_bytes()) == red


def test_the_browser_builds_the_page_as_written(report: Path) -> None:
    dom = chromium(report, "--dump-dom").decode()
    assert dom.count("<figure>") == dom.count("</figure>") == 2
    assert dom.count("<svg") == dom.count('role="img"') == 2
    for name in ("course", "compared", "run-1", "run-2"):
        assert f'<section id="{name}" aria-labelledby="{name}-title">' in dom
        assert f'<h2 id="{name}-title">' in dom
