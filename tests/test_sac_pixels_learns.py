"""The documented CPU runs, whole (minutes): `python -m pytest -m slow tests/test_sac_pixels_learns.py`."""

import csv
import os
import subprocess
import sys

import pytest

from envs.dot_reach import ORACLE_RETURN, RANDOM_RETURN


@pytest.mark.slow
@pytest.mark.parametrize("preset", ["drq", "sac_ae", "rad"])
def test_dot_reach_is_learned_from_pixels_on_a_cpu(tmp_path, preset):
    """The defaults for a CPU: most of the way from random actions to the best possible ones, in 64 fixed episodes."""
    script = os.path.join(os.path.dirname(__file__), "..", "algos", "sac_pixels.py")
    command = [sys.executable, os.path.abspath(script), "--env-id", "dot_reach"]
    command += ["--device", "cpu", "--preset", preset, "--seed", "111", "--name", "dot"]
    command += ["--no-capture-video"]
    subprocess.run(command, cwd=tmp_path, check=True)
    with open(tmp_path / "runs/dot/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    way = [
        (float(row["eval/return"]) - RANDOM_RETURN) / (ORACLE_RETURN - RANDOM_RETURN)
        for row in rows
    ]
    assert way[0] < 0.5 and way[-1] > 0.8
