"""The documented CPU run in short (minutes): `python -m pytest -m slow tests/test_sapo_rewarped_learns.py`."""

import csv
import os
import subprocess
import sys

import pytest
from conftest import ROOT


@pytest.mark.slow
def test_plasticine_is_flattened_on_a_cpu(tmp_path):
    """RollingFlat at the small size, by the documented command: well above a still pin."""
    pytest.importorskip("warp", reason='needs Warp: pip install -e ".[so101]"')
    import torch

    from envs import rewarped

    command = [
        sys.executable,
        str(ROOT / "algos/sapo_rewarped.py"),
        "--env-id",
        "RollingFlat",
        "--device",
        "cpu",
    ]
    command += ["--seed", "11", "--name", "rolling"]
    subprocess.run(command, cwd=tmp_path, check=True, env=os.environ | {"OMP_NUM_THREADS": "1"})
    with open(tmp_path / "runs/rolling/eval.csv", newline="") as file:
        returns = [float(row["eval/return"]) for row in csv.DictReader(file)]

    env, still = rewarped.make("RollingFlat", 8, seed=0, size="small"), []
    env.reset(seed=10_000)
    with torch.no_grad():
        for _ in range(env.max_episode_steps):
            env.detach()
            info = env.step(torch.zeros(8, env.action_dim))[-1]
        still = float(info["episode"]["return"].mean())
    env.close()
    assert returns[-1] > 1.1 * still, f"the returns were {returns}, a still pin's {still}"
