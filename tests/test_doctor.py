"""What is missing is found, said in a line with what to type, and never ends the examination."""

from __future__ import annotations

from pathlib import Path

import pytest

from llamahome import doctor
from llamahome.config import Config
from llamahome.doctor import Finding, examine, report_lines


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


def test_a_kernel_that_computes_something_else_is_bad(monkeypatch: pytest.MonkeyPatch) -> None:
    from llamahome import kernels

    right = kernels.varlen_attention
    monkeypatch.setattr(kernels, "varlen_attention", lambda *given: right(*given) * 1.01)
    assert found(Config(), "kernels").state == "bad"


def test_a_check_that_breaks_is_a_finding(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_config: Config) -> Finding:
        raise RuntimeError("no such\nthing")

    monkeypatch.setattr(doctor, "_CHECKS", (("odd", broken),))
    assert found(Config(), "odd") == Finding("odd", "bad", "RuntimeError: no such thing")


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
