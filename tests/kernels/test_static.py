"""The static gate catches each fault it is there for; `make kernels` holds the real kernels to it."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("triton")

ROOT = Path(__file__).parents[2]
GATE = ROOT / "benchmarks" / "kernels_static.py"
GOLDEN = Path(__file__).with_name("static_golden.json")
CASES = Path(__file__).with_name("static_bad_kernels.py")


def gate(*arguments: str | Path) -> tuple[list[str], int]:
    """Faults and exit code of the gate on the bad kernels. TRITON_INTERPRET is set: it must not matter."""
    command = [sys.executable, GATE, CASES, "--json", *arguments]
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert json.loads(done.stdout.splitlines()[-1])["rows"] == 11, done.stderr
    return done.stderr.splitlines(), done.returncode


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], int, dict[str, int]]:
    """Faults and exit code beside golden figures that differ in two rows, and the true figures of `good_dot`.

    The first run compiles and writes the figures; `build/` keeps them for the second.
    """
    golden = tmp_path_factory.mktemp("static") / "golden.json"
    assert gate("--golden", golden, "--update")[1] == 1
    stored = json.loads(golden.read_text("utf-8"))
    rows = stored["rows"]
    true = rows["good_dot sm_90"]
    rows["good_dot sm_90"] = {figure: int(value / 1.10) - 1 for figure, value in true.items()}
    rows["gone sm_90"] = rows.pop("good sm_90")
    golden.write_text(json.dumps(stored), "utf-8")
    return *gate("--golden", golden), true


@pytest.mark.parametrize(
    ("case", "message"),
    [
        ("double", "152 double-precision instructions"),
        ("fp64_scalar", "computes in double precision with an fp64 scalar; tl.cast it"),
        ("narrow_load", "no 128-bit load from global memory"),
        ("narrow_store", "no 128-bit store to global memory"),
        ("uneven_size", "no 128-bit load from global memory"),
        ("spill", "spill instructions in the hot loop"),
        ("spill", "bytes spilled, budget 0"),
        ("old_tensor_cores", "its dots do not use the architecture's tensor cores"),
        ("too_much_shared", "cannot launch: 294912 bytes of shared memory"),
        ("inner_too_small", "does not compile: Input shapes should have M >= 1, N >= 1 and K >= 16"),
    ],
)
def test_each_fault_is_one_line_that_names_the_row(run, case, message):
    assert [message in fault for fault in run[0] if fault.startswith(f"{case} sm_90: ")].count(True) == 1


def test_nothing_else_is_a_fault(run):
    faulty = {fault.split()[0] for fault in run[0]}
    kept = {"double", "fp64_scalar", "narrow_load", "narrow_store", "uneven_size", "spill", "old_tensor_cores"}
    changed = {"good", "gone", "good_dot"}
    assert faulty == kept | {"too_much_shared", "inner_too_small"} | changed
    assert run[1] == 1


@pytest.mark.parametrize("figure", ["registers", "shared_bytes", "instructions"])
def test_a_figure_a_tenth_above_the_golden_one_is_one_line(run, figure):
    now = run[2][figure]
    line = f"good_dot sm_90: {figure} {int(now / 1.10) - 1} -> {now}"
    assert run[0].count(line) == 1


def test_a_row_that_only_one_side_has_is_a_fault(run):
    assert any(fault.startswith("good sm_90: has no golden figures") for fault in run[0])
    assert any(fault.startswith("gone sm_90: is gone") for fault in run[0])


def test_code_behind_exit_is_no_loop(monkeypatch):
    monkeypatch.syspath_prepend(GATE.parent)
    spec = importlib.util.spec_from_file_location("static_report", GATE.with_name("static_report.py"))
    report = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(report)
    inner = [".L_x_1:", "/*0010*/ HMMA R0, R1 ;", "/*0020*/ STL [R1], R2 ;", "/*0030*/ @P0 BRA `(.L_x_1) ;"]
    lines = [".L_x_0:", *inner, "/*0040*/ @P1 BRA `(.L_x_0) ;", "/*0050*/ EXIT ;", "/*0060*/ BRA `(.L_x_0) ;"]
    assert list(report.hot_loops(lines)) == [inner[:-1]]


@pytest.mark.parametrize("arch", ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "gfx942"])
def test_the_golden_file_has_rows_of_every_architecture(arch):
    rows = json.loads(GOLDEN.read_text("utf-8"))["rows"]
    assert any(name.endswith(f" {arch}") for name in rows)


@pytest.mark.parametrize(
    "row",
    [
        "attention_forward_d128_tma_128x128_2 sm_90",
        "attention_dq_d128_tma_128x64_2 sm_90",
        "attention_dkv_d128_tma_64x128_2 sm_90",
        "cross_entropy sm_90",
        "rope 128 lora 16 sm_90",
        "add_rms_norm lora 16 sm_90",
        "lora small 16 sm_90",
        "lora small nf4 nested 16 sm_90",
    ],
)
def test_the_documented_figures_are_the_golden_ones(row):
    figures = json.loads(GOLDEN.read_text("utf-8"))["rows"][row]
    text = (ROOT / "docs" / "kernels.md").read_text("utf-8")
    assert f"| {figures['registers']} | {figures['shared_bytes']:,} |" in text


def test_no_golden_row_spills():
    """As the documentation says; a row that has to is a deliberate change of both."""
    rows = json.loads(GOLDEN.read_text("utf-8"))["rows"]
    assert [name for name, figures in rows.items() if figures["spill_bytes"]] == []
