"""The page about a run: complete, self-contained, and safe whatever the run's text is."""

from __future__ import annotations

import json
import re
import shlex
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from llamahome.config import Config
from llamahome.errors import UsageError
from llamahome.monitor.record import reproduce
from llamahome.monitor.report import page, read_record, write_report

HOSTILE = "<script>alert(1)</script>\x1b[2J\u202e&\"'"


def write_run(folder: Path, loss: float = 2.0, **run: Any) -> Path:
    folder.mkdir(parents=True)
    steps = [
        {"step": n, "loss": loss / n, "memory_peak_bytes": 2e9, "memory_limit_bytes": 3e9, "tokens_per_second": 100.0,
         "micro_batch_tokens": 512 // n, "data_wait_seconds": 0.0, "learning_rate": 1e-4, "grad_norm": None, "mfu": 0.5,
         "step_seconds": 30.0}
        for n in range(1, 5)
    ]  # fmt: skip
    steps[-1]["eval_loss"] = 0.75
    events = [
        {"event": "evaluation", "step": 0, "eval_loss": 1.5},
        {"event": "sample", "step": 0, "place": "rows.csv:7", "prompt": "Why?", "answer": HOSTILE, "wanted": "So."},
        {"event": "cut_changed", "step": 2, "from": 512, "to": 256, "reason": HOSTILE},
        {"event": "sample", "step": 4, "place": "rows.csv:7", "prompt": "Why?", "answer": "So!", "wanted": "So."},
    ]
    lines = [json.dumps(line) for line in (*events, *steps)]
    (folder / "metrics.jsonl").write_text("\n".join(lines) + '\n{"step": 5, "lo')  # a line that is being written
    content = {"command": ["llamahome", "train", "my data.jsonl"], "total_steps": 4, "memory_limit_bytes": 3e9}
    (folder / "run.json").write_text(json.dumps({**content, "config": {"model": {"name": HOSTILE}}, **run}))
    (folder / "status.json").write_text(json.dumps({"state": "done", "code": 0, "message": ""}))
    return folder


VOID = ("meta", "path", "circle", "polyline", "rect")


class Tags(HTMLParser):
    """Tags, attributes and balance of a page."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.seen: list[tuple[str, dict[str, str | None]]] = []
        self.open: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.seen.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag


def test_it_shows_the_course_and_how_to_do_it_again(tmp_path: Path) -> None:
    text = write_report([write_run(tmp_path / "run")]).read_text()
    assert (tmp_path / "run" / "report.html").is_file()
    for words in (
        "step 4 of 4 in 0:02:00", "held-out loss 1.5000 before, 0.7500 after", "peak memory 2.00 GB of 3.00 GB",
        "llamahome train &#x27;my data.jsonl&#x27;", "Memory: peak of each step, and the limit",
            "at most 256 tokens in a micro-batch, 512",
    ):  # fmt: skip
        assert words in text
    assert "Gradient norm" not in text  # it was null in every step


def test_it_needs_nothing_else_and_runs_nothing(tmp_path: Path) -> None:
    tags = Tags(page([read_record(write_run(tmp_path / "run"))]))
    assert tags.open == []
    names = {name for name, _ in tags.seen}
    assert not names & {"script", "link", "img", "iframe", "object", "form"}
    attributes = [pair for _, found in tags.seen for pair in found.items()]
    assert not any(key.startswith("on") or key == "src" for key, _ in attributes)
    inside = {value for key, value in attributes if key == "id"}
    targets = [str(value) for key, value in attributes if key == "href"]
    assert targets
    assert {target.removeprefix("#") for target in targets} <= inside


def test_text_from_a_run_is_only_text(tmp_path: Path) -> None:
    folder = write_run(tmp_path / "run", command=[HOSTILE], versions={HOSTILE: HOSTILE})
    text = page([read_record(folder)])
    assert "<script" not in text
    assert "\x1b" not in text
    assert "\u202e" not in text


def test_two_runs_stand_in_one_picture(tmp_path: Path) -> None:
    folders = [write_run(tmp_path / "first"), write_run(tmp_path / "second", loss=3.0)]
    text = write_report(folders, tmp_path / "both.html").read_text()
    assert "first: loss" in text
    assert "second: loss" in text
    assert text.count("<figure>") == 7
    for name in ("first", "second"):
        assert f'<th scope="col">{name}</th>' in text
    assert "Settings that differ" not in text


def test_settings_that_differ_stand_beside_each_other(tmp_path: Path) -> None:
    configs = [{"lora": {"rank": rank}, "training": {"seed": 1}} for rank in (8, 32)]
    folders = [write_run(tmp_path / f"r{number}", config=config) for number, config in enumerate(configs)]
    text = write_report(folders).read_text()
    table = text.partition("Settings that differ")[2].partition("</table>")[0]
    assert '<th scope="row">lora.rank</th><td>8</td><td>32</td>' in table
    assert "training.seed" not in table


def test_a_sample_is_shown_before_and_after(tmp_path: Path) -> None:
    text = page([read_record(write_run(tmp_path / "run"))])
    shown = re.findall(r'<td class="said">([^<]*)</td>', text)
    assert [shown[0], *shown[2:]] == ["Why?", "So!", "So."]
    assert "alert(1)" in shown[1]


def test_every_picture_of_lines_has_its_figures_as_a_table(tmp_path: Path) -> None:
    data = {"lengths": {"128": 3, "64": 10}}  # as they were met
    text = page([read_record(write_run(tmp_path / "run", data=data))])
    assert text.count("<summary>Figures: ") == text.count("<polyline") - 2 == 7  # two with a second line
    assert '<th scope="row">4</th><td>0.5</td><td>0.75</td>' in text
    assert "Samples by length in tokens. up to 64: 10 samples; up to 128: 3 samples" in text


def test_the_settings_alone_give_the_command(tmp_path: Path) -> None:
    config = Config.load(None, {"data.path": "my rows.csv", "lora.rank": 4, "training.memory_limit": "2GB"}).to_dict()
    command = reproduce(read_record(write_run(tmp_path / "run", config=config)))
    words = shlex.split(command)
    assert words[:4] == ["llamahome", "train", "--output", "output/again"]
    again = Config.load(None, [value for option, value in pairwise(words) if option == "--set"])
    assert again.to_dict() == config


def test_a_folder_without_a_run_is_named(tmp_path: Path) -> None:
    with pytest.raises(UsageError, match=r"metrics\.jsonl"):
        write_report([tmp_path])


def test_a_run_that_never_began_a_step_has_a_page(tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    (folder / "metrics.jsonl").write_text("")
    assert "run: unknown" in write_report([folder]).read_text()
