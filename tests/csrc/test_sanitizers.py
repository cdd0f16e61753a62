"""C++ without Python, under the sanitizers: damaged files by the thousand, many threads, matrices of any shape."""

from __future__ import annotations

import os
import shutil
import subprocess
from pathlib import Path

import pytest

CSRC = Path(__file__).parents[2] / "csrc"
COMPILER = shutil.which(os.environ.get("CXX", "c++"))

pytestmark = [pytest.mark.slow, pytest.mark.skipif(COMPILER is None, reason="needs a C++ compiler")]


def build(program: str, sanitizers: str, folder: Path) -> Path:
    sources = [path for path in sorted(CSRC.glob("*.cpp")) if path.name != "bindings.cpp"]
    binary = folder / program
    flags = ["-std=c++20", "-O1", "-g", f"-fsanitize={sanitizers}", "-fno-sanitize-recover=all", "-pthread"]
    flags += ["-DLLAMAHOME_SANITIZE"]
    subprocess.run([COMPILER, *flags, *sources, CSRC / "fuzz" / f"{program}.cpp", "-o", binary], check=True)
    return binary


@pytest.mark.parametrize("program", ["fuzz_reader", "fuzz_bytes"])
def test_damaged_files_never_lead_outside(program: str, tmp_path: Path) -> None:
    fuzz = build(program, "address,undefined", tmp_path)
    seconds = os.environ.get("LLAMAHOME_FUZZ_SECONDS", "15")
    subprocess.run([fuzz, seconds], check=True, env=os.environ | {"TMPDIR": str(tmp_path)})


def test_threads_do_not_race(tmp_path: Path) -> None:
    stress = build("stress_reader", "thread", tmp_path)
    subprocess.run([stress, "4", "10"], check=True, env=os.environ | {"TSAN_OPTIONS": "halt_on_error=1"})


@pytest.mark.parametrize("program", ["fuzz_attention", "fuzz_products"])
def test_kernels_stay_within_their_tensors(program: str, tmp_path: Path) -> None:
    fuzz = build(program, "address,undefined", tmp_path)
    subprocess.run([fuzz, "5"], check=True)
