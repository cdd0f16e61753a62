"""What is missing is found, said in a line with what to type, and never ends the examination."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch

from llamahome import doctor
from llamahome.config import Config
from llamahome.doctor import Finding, examine, kernel_errors, report_lines


def found(config: Config, name: str) -> Finding:
    return next(finding for finding in examine(config) if finding.name == name)


def test_this_machine_can_train(tmp_path: Path) -> None:
    findings = examine(Config.load(None, [f"training.output={tmp_path / 'run'}"]))
    assert [finding for finding in findings if finding.state == "bad"] == []
    assert {"device", "precision", "memory", "disk", "compiler", "reader", "kernels"} <= {f.name for f in findings}


def test_a_disk_that_is_too_full_names_the_setting(tmp_path: Path) -> None:
    config = Config.load(None, [f"training.output={tmp_path / 'run'}", "resource.min_free_disk=900TB"])
    disk = found(config, "disk")
    assert disk.state == "bad"
    assert "resource.min_free_disk" in disk.found
    assert "training.output" in disk.fix


def test_a_gpu_that_is_not_there_is_bad_and_the_rest_is_still_looked_at() -> None:
    findings = examine(Config.load(None, ["processing.device=cuda:7"]))
    device = next(finding for finding in findings if finding.name == "device")
    assert device.state == "bad"
    assert "processing.device" in device.fix
    assert next(finding for finding in findings if finding.name == "reader").state == "good"


@pytest.mark.parametrize(
    "name", ["varlen_attention", "linear_cross_entropy", "rms_norm", "add_rms_norm", "rotate", "gated"]
)
def test_a_kernel_that_computes_something_else_is_named(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    from llamahome import kernels

    right = getattr(kernels, name)

    def wrong(*given: Any) -> Any:
        result = right(*given)
        return result * 1.01 if isinstance(result, torch.Tensor) else [part * 1.01 for part in result]

    assert kernel_errors(torch.device("cpu"))[name] < 1e-5
    monkeypatch.setattr(kernels, name, wrong)
    finding = doctor._kernels(Config())
    assert finding.state == "bad"
    assert f"{name} by 1.0e-02" in finding.found
    assert finding.fix


def test_json_holds_every_finding(capsys: pytest.CaptureFixture[str]) -> None:
    from llamahome.cli import cli

    cli.main(["doctor", "--json"], standalone_mode=False)
    content = json.loads(capsys.readouterr().out)
    assert {"python", "device", "precision", "compiler", "memory", "disk", "kernels"} <= content.keys()
    assert all(set(finding) == {"name", "state", "found", "fix"} for finding in content.values())
    assert all(finding["fix"] for finding in content.values() if finding["state"] != "good")


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_config: Config) -> Finding:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(doctor, "_CHECKS", (("odd", broken),))
    assert found(Config(), "odd") == Finding(
        "odd", "bad", "RuntimeError: no such thing", doctor._REINSTALL + "; if it stays, report it"
    )


def test_an_extra_that_is_not_installed_says_what_to_type(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(doctor, "_EXTRAS", (("no_such_module", "gpu", "nothing"),))
    extra = found(Config(), "no_such_module")
    assert (extra.state, extra.fix) == ("optional", "pip install 'llamahome[gpu]'")


def test_every_extra_is_one_of_the_package() -> None:
    import tomllib

    root = Path(__file__).parents[1]
    extras = tomllib.loads((root / "pyproject.toml").read_text())["project"]["optional-dependencies"]
    assert {extra for _, extra, _ in doctor._EXTRAS} <= extras.keys()


def test_each_finding_is_a_line() -> None:
    lines = report_lines([Finding("a", "good", "x"), Finding("long", "bad", "y", "do z")])
    assert lines == ["ok  a     x", "BAD long  y; do z"]


def test_a_terminal_gets_whole_words_below_each_other() -> None:
    findings = [Finding("libraries", "good", ", ".join(f"numpy {number}.0" for number in range(9)))]
    first, second, *_ = lines = report_lines(findings, 50)
    assert max(map(len, lines)) <= 50
    assert first.index("numpy") == second.index("numpy") == len("ok  libraries  ")
    assert "".join(part.strip() + " " for part in lines).strip() == " ".join(report_lines(findings)[0].split("\n"))
