"""The documented CPU run, a few minutes: `python -m pytest -m slow tests/test_bc_chunk_learns.py`."""

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_clone_of_imperfect_demonstrations_solves_a_part_of_the_task(tmp_path):
    """Reach from the true state: the clone solves about half, and the exported program is there."""
    pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
    pytest.importorskip("mujoco_warp", reason='the SO-101 needs it: pip install -e ".[so101]"')
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    task = ["--env-id", "SO101ReachCube-v1"]
    record = ["-m", "envs.demos", *task, "--episodes", "100", "--noise", "0.3"]
    clone = [str(ROOT / "algos/bc_chunk.py"), *task, "--device", "cpu", "--seed", "11"]
    for command in (
        [*record, "--out", "reach.hdf5"],
        [*clone, "--demos", "reach.hdf5", "--name", "reach", "--no-capture-video"],
    ):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, env=environment)
    with open(tmp_path / "runs/reach/eval.csv", newline="") as file:
        success = [float(row["eval/success_rate"]) for row in csv.DictReader(file)]
    assert len(success) == 3 and 0.25 < max(success) < 0.85
    assert (tmp_path / "runs/reach/base.pt2").exists()
