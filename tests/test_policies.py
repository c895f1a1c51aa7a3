"""Every policy to take away does what is said of it, on fewer episodes than were measured."""

import json
import os
import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FOLDER = ROOT / "policies"
POLICIES = tomllib.loads((FOLDER / "policies.toml").read_text())["policy"]


@pytest.mark.parametrize("policy", POLICIES, ids=[entry["file"] for entry in POLICIES])
def test_a_policy_reaches_its_stated_figure(policy, tmp_path):
    """Within three standard errors of the mean; as many episodes at once as cost a few seconds."""
    if policy["script"] == "ppo_mjx_go1":
        pytest.importorskip("jax", reason='needs JAX: pip install -e ".[go1]"')
    words = [
        "--evaluate",
        "--checkpoint",
        str(FOLDER / policy["file"]),
        "--no-capture-video",
        *policy["few"].split(),
    ]
    command = [sys.executable, str(ROOT / f"algos/{policy['script']}.py"), *words]
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    done = subprocess.run(command, cwd=tmp_path, env=environment, text=True, capture_output=True)
    assert done.returncode == 0, done.stderr[-500:]
    results = json.loads(done.stdout.strip().splitlines()[-1])
    error = 3 * policy["deviation"] / policy["episodes_of_the_test"] ** 0.5
    assert results[policy["metric"]] == pytest.approx(policy["value"], abs=error)


def test_the_page_and_the_list_name_the_same_files():
    files = {path.name for path in FOLDER.iterdir()} - {"README.md", "policies.toml"}
    assert files == {policy["file"] for policy in POLICIES}
    page = (FOLDER / "README.md").read_text()
    assert set(re.findall(r"^\| `([^`]+)`", page, re.MULTILINE)) == files
    for policy in POLICIES:
        shown = (
            f"{policy['value']:.1%}" if "success" in policy["metric"] else f"{policy['value']:,.1f}"
        )
        assert shown in page, policy["file"]
    assert sum(path.stat().st_size for path in FOLDER.iterdir()) < 8e6, "a few megabytes in all"
