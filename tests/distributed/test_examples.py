"""The scripts for clusters are whole: their syntax, and the options that they give to torchrun and llamahome."""

from __future__ import annotations

import subprocess
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import get_args_parser

CLUSTER = Path(__file__).parents[2] / "examples" / "cluster"
SCRIPTS = [*CLUSTER.glob("*.sh"), *CLUSTER.glob("*.sbatch")]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_bash_reads_it(script: Path) -> None:
    subprocess.run(["bash", "-n", str(script)], check=True)


def test_torchrun_knows_the_options_of_the_manifest() -> None:
    manifest = yaml.safe_load((CLUSTER / "kubeflow.yaml").read_text())
    trainer = manifest["spec"]["trainer"]
    assert (manifest["kind"], trainer["command"]) == ("TrainJob", ["torchrun"])
    parsed = get_args_parser().parse_args(trainer["args"])
    assert (parsed.module, parsed.training_script) == (True, "llamahome")
    assert parsed.training_script_args[0] == "train"
