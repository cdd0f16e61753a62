"""`kernels/` at the top must never be taken for Hugging Face's package of that name, and ships inside ours."""

from __future__ import annotations

import ast
import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
KERNEL_FILES = sorted((ROOT / "kernels").glob("*.py"))


@pytest.mark.parametrize("folder", ["kernels", "tests", "tests/kernels"])
def test_the_folder_is_no_package(folder: str) -> None:
    assert (ROOT / folder).is_dir()
    assert not (ROOT / folder / "__init__.py").exists()


def test_transformers_does_not_take_it_for_its_own() -> None:
    code = (
        "import importlib.metadata, transformers.utils.import_utils as utils\n"
        "installed = 'kernels' in importlib.metadata.packages_distributions()\n"
        "assert utils.is_kernels_available() == installed\n"
        "from transformers import LlamaForCausalLM\n"
    )
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_no_file_bears_the_name_of_its_function(path: Path) -> None:
    names = {node.name for node in ast.parse(path.read_bytes()).body if isinstance(node, ast.FunctionDef)}
    assert names
    assert path.stem not in names


@pytest.mark.parametrize("path", KERNEL_FILES, ids=lambda path: path.name)
def test_the_file_ships_in_the_package(path: Path) -> None:
    spec = importlib.util.find_spec(f"llamahome.kernels.{path.stem}")
    assert spec is not None
    assert spec.origin is not None
    assert Path(spec.origin).read_bytes() == path.read_bytes()
