"""The documented CPU run, whole (minutes): `python -m pytest -m slow tests/test_squint_sac_learns.py`."""

import csv
import os
import subprocess
import sys

import pytest

pytest.importorskip("mujoco_warp", reason='needs MuJoCo Warp: pip install -e ".[so101]"')


@pytest.mark.slow
def test_reach_is_learnt_from_pixels_on_a_cpu(tmp_path):
    """The command of the README with the defaults for a CPU: 90 % of 64 fixed episodes at the last evaluation."""
    script = os.path.join(os.path.dirname(__file__), "..", "algos", "squint_sac.py")
    command = [sys.executable, os.path.abspath(script), "--env-id", "SO101ReachCube-v1", "--device", "cpu"]
    command += ["--seed", "11", "--name", "reach", "--no-capture-video"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    with open(tmp_path / "runs/reach/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["eval/success_rate"]) < 0.5
    assert float(rows[-1]["eval/success_rate"]) >= 0.9
