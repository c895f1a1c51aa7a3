"""The documented CPU run (about ten minutes of one core): `python -m pytest -m slow tests/test_resfit_learns.py`."""

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_a_cloned_policy_is_made_reliable_and_never_ruined(tmp_path):
    """Reach from the true state: the clone solves about half; the residual most, and it does not collapse before."""
    pytest.importorskip("h5py", reason='demonstrations need h5py: pip install -e ".[resfit]"')
    pytest.importorskip(
        "mujoco_warp", reason='the SO-101 needs MuJoCo Warp: pip install -e ".[so101]"'
    )
    environment = os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}
    task = ["--env-id", "SO101ReachCube-v1"]
    record = [
        "-m",
        "envs.demos",
        *task,
        "--episodes",
        "100",
        "--noise",
        "0.3",
        "--out",
        "reach.hdf5",
    ]
    common = [*task, "--device", "cpu", "--demos", "reach.hdf5", "--no-capture-video"]
    # One evaluation, at the end: base.pt2 is the last weights and not the best.
    clone = [str(ROOT / "algos/bc_chunk.py"), *common, "--eval-freq", "1500", "--name", "base"]
    learn = [
        str(ROOT / "algos/resfit.py"),
        *common,
        "--base",
        "runs/base/base.pt2",
        "--seed",
        "11",
        "--name",
        "reach",
    ]
    for command in (record, clone, learn):
        subprocess.run([sys.executable, *command], cwd=tmp_path, check=True, env=environment)
    with open(tmp_path / "runs/reach/eval.csv", newline="") as file:
        rows = list(csv.DictReader(file))
    base, last = float(rows[0]["eval/success_rate"]), rows[-1]  # at first the base alone
    assert 0.2 < base < 0.8
    assert float(last["eval/success_rate"]) >= base + 0.2
    assert float(last["train/lowest"]) >= base - 0.2
