"""The documented CPU run, whole: `python -m pytest -m slow tests/test_squint_sac_learns.py` (minutes)."""

import csv
import os
import subprocess
import sys

import pytest
import squint_sac

pytest.importorskip("mujoco_warp", reason='needs MuJoCo Warp: pip install -e ".[so101]"')


@pytest.mark.slow
def test_reach_is_learned_from_pixels_on_a_cpu(tmp_path):
    """The README's command with the defaults for a CPU: 90 % of 64 fixed episodes at the last evaluation."""
    command = [sys.executable, squint_sac.__file__, "--env-id", "SO101ReachCube-v1"]
    command += ["--device", "cpu", "--seed", "11", "--name", "reach", "--no-capture-video"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "2"})
    with open(tmp_path / "runs/reach/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    assert float(rows[0]["eval/success_rate"]) < 0.5
    assert float(rows[-1]["eval/success_rate"]) >= 0.9
