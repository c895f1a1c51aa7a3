"""Half of the documented CPU run (minutes): `python -m pytest -m slow tests/test_drqv2_learns.py`."""

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_dot_reach_is_solved_from_pixels_on_a_cpu(tmp_path):
    """The documented command, 30,000 of its 60,000 steps: two thirds of the way from random to oracle, or more."""
    from envs import dot_reach

    command = [
        sys.executable,
        str(ROOT / "algos/drqv2.py"),
        "--env-id",
        "dot_reach",
        "--device",
        "cpu",
    ]
    command += [
        "--seed",
        "11",
        "--name",
        "dots",
        "--total-timesteps",
        "30000",
        "--no-capture-video",
    ]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with open(tmp_path / "runs/dots/eval.csv", newline="") as file:
        returns = [float(row["eval/return"]) for row in csv.DictReader(file)]
    way = (returns[-1] - dot_reach.RANDOM_RETURN) / (
        dot_reach.ORACLE_RETURN - dot_reach.RANDOM_RETURN
    )
    assert way >= 2 / 3, f"the returns were {returns}"
