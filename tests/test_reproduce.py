"""benchmarks/reproduce.py: runs that are killed and interrupted end as if nothing had happened."""

import contextlib
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time

import pytest
import reproduce
from conftest import ROOT

MATRIX = """
[[cell]]
algo = "toy"
task = "Walk"
args = "--steps 24"
seeds = [1, 2, 3]
minutes = 1
feeds = ["README.md"]

[[cell]]
algo = "toy"
task = "Fall"
args = "--steps 24 --fail 3"
seeds = [1]
"""


def git(root, *words):
    subprocess.run(
        ["git", "-c", "user.name=a", "-c", "user.email=a@b", *words],
        cwd=root,
        check=True,
        capture_output=True,
    )


@pytest.fixture
def root(tmp_path):
    """A repository with one algorithm, the toy of tests/toy_algo.py."""
    (tmp_path / "algos").mkdir()
    (tmp_path / "benchmarks").mkdir()
    shutil.copy(ROOT / "tests/toy_algo.py", tmp_path / "algos/toy.py")
    (tmp_path / "benchmarks/matrix.toml").write_text(MATRIX)
    (tmp_path / ".gitignore").write_text("runs/\n")
    git(tmp_path, "init", "-q")
    git(tmp_path, "add", "-A")
    git(tmp_path, "commit", "-qm", "first")
    return tmp_path


def start(root, *words, **environment):
    command = [sys.executable, str(ROOT / "benchmarks/reproduce.py"), "--root", str(root), *words]
    return subprocess.Popen(
        command,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=os.environ | environment,
    )


def finish(process, seconds=60):
    output, _ = process.communicate(timeout=seconds)
    return process.returncode, output


def expected(seed, steps=24):
    """The CSV of an uninterrupted run, computed here."""
    import numpy as np

    value, lines = 0.0, ["global_step,wall_time,train_time,eval/return"]
    for step in range(steps):
        value += np.random.default_rng([seed, step]).normal()
        lines.append(f"{step + 1},{step + 1}.0,0.0,{value!r}")
    return "\n".join(lines) + "\n"


def results(root, seed):
    return root / f"docs/results/toy/Walk__cpu2__s{seed}.csv"


def pids(root):
    found = []
    for path in (root / "runs").glob("*/reproduce.pid"):
        if text := path.read_text():
            found.append(int(text))
    return found


def wait_until(condition, seconds=30):
    end = time.time() + seconds
    while not condition():
        assert time.time() < end, "nothing happened"
        time.sleep(0.02)


def still_running_after_a_kill(root):
    """Whether the lock of a run is still held, after all that are known have been killed."""
    for pid in pids(root):
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    cell = reproduce.read_matrix(root / "benchmarks/matrix.toml")[0][0]
    return any(reproduce.alive(cell, seed, root) for seed in cell.seeds)


def test_killed_and_interrupted_runs_end_like_whole_ones(root):
    """Two side by side. A run is killed, then the runner is interrupted, then runner and runs are killed."""
    choice = random.Random(0)
    process = start(root, "--only", "toy/Walk", "--jobs", "2", TOY_PAUSE="0.1")
    wait_until(lambda: len(pids(root)) == 2 and len(list((root / "docs").rglob("*.csv"))) == 2)
    os.kill(choice.choice(pids(root)), signal.SIGKILL)
    time.sleep(choice.random())
    process.send_signal(signal.SIGINT)
    status, output = finish(process)
    assert status == 1 and "killed by SIGKILL" in output
    records = [json.loads(path.read_text())["ended"] for path in (root / "docs").rglob("*.json")]
    assert "failed" in records and "interrupted" in records

    process = start(root, "--only", "toy/Walk", "--jobs", "2", "--retry", TOY_PAUSE="0.1")
    wait_until(lambda: len(pids(root)) == 2)
    time.sleep(choice.random())
    process.kill()
    finish(process)
    wait_until(lambda: not still_running_after_a_kill(root))

    status, output = finish(start(root, "--only", "toy/Walk", "--jobs", "2", "--retry"))
    assert status == 0, output
    for seed in (1, 2, 3):
        assert results(root, seed).read_text() == expected(seed)
    section = (root / "docs/results/toy/commands.md").read_text()
    assert "algos/toy.py --steps 24 --seed 2 --name toy__Walk__cpu2__s2" in section
    commit = subprocess.run(
        ["git", "rev-parse", "HEAD"], cwd=root, capture_output=True, text=True
    ).stdout
    assert f"- commit: {commit[:9]}" in section

    before = results(root, 1).stat().st_mtime_ns
    assert finish(start(root, "--only", "toy/Walk"))[0] == 0, "what is done is not done again"
    assert results(root, 1).stat().st_mtime_ns == before


def test_a_failing_cell_keeps_its_reason_and_stops_nobody(root):
    status, output = finish(start(root, "--jobs", "2"))
    assert status == 1
    assert "toy/Fall s1: failed error: qf is not finite at step 3" in output
    assert results(root, 3).read_text() == expected(3)
    listed = finish(start(root, "--list"))[1]
    assert "failed 1 (error: qf is not finite at step 3)" in listed and "3 done, 1 failed" in listed
    # a second call leaves it alone, --retry goes on from its checkpoint
    assert finish(start(root))[0] == 0
    status, output = finish(start(root, "--retry"))
    assert status == 1 and "--resume" in (root / "runs/toy__Fall__cpu2__s1/args.json").read_text()


def test_a_result_is_stale_once_its_code_has_changed(root):
    assert finish(start(root, "--only", "toy/Walk", "--seeds", "1"))[0] == 0
    cell = reproduce.read_matrix(root / "benchmarks/matrix.toml")[0][0]
    assert reproduce.state(cell, 1, root)[0] == "done"
    assert reproduce.state(cell, 2, root)[0] == "missing"
    path = root / "algos/toy.py"
    path.write_text(
        path.read_text().replace("import json\n", "import json  # data\n").replace("An ", "The ")
    )
    assert reproduce.state(cell, 1, root)[0] == "done", "comments and docstrings change no result"
    path.write_text(path.read_text().replace("random.normal()", "random.uniform()"))
    assert reproduce.state(cell, 1, root)[0] == "stale"
    assert "stale 1 (algos/toy.py, since" in finish(start(root, "--list"))[1]
    # a new run that was interrupted leaves the old result as it is, and goes on from where it was
    words = ("--only", "toy/Walk", "--seeds", "1", "--stale")
    process = start(root, *words, TOY_PAUSE="0.2")
    wait_until(
        lambda: reproduce.last_step(root / "runs/toy__Walk__cpu2__s1/eval.csv") in range(2, 24)
    )
    process.send_signal(signal.SIGINT)
    assert finish(process)[0] == 1 and results(root, 1).read_text() == expected(1)
    status, _ = finish(start(root, *words))
    assert "--resume" in (root / "runs/toy__Walk__cpu2__s1/args.json").read_text()
    assert status == 0 and results(root, 1).read_text() != expected(1)
    old = list((root / "runs").glob("toy__Walk__cpu2__s1.old-*"))
    assert len(old) == 1, "the earlier run is set aside, not deleted"


def test_changed_settings_begin_anew(root):
    """A run that was begun with other arguments is not continued."""
    process = start(root, "--only", "toy/Walk", "--seeds", "1", TOY_PAUSE="0.2")
    wait_until(lambda: results(root, 1).exists())
    process.send_signal(signal.SIGINT)
    finish(process)
    path = root / "benchmarks/matrix.toml"
    path.write_text(path.read_text().replace("--steps 24", "--steps 6"))
    assert finish(start(root, "--only", "toy/Walk", "--seeds", "1"))[0] == 0
    assert results(root, 1).read_text() == expected(1, steps=6)


@pytest.mark.parametrize("launcher", ["debug", "local"])
def test_submitit_runs_the_same_cells(root, launcher):
    """`debug` runs the job in the process, through all of submitit's path; `local` in processes, as Slurm would."""
    pytest.importorskip("submitit", reason='needs submitit: pip install -e ".[reproduce]"')
    status, output = finish(
        start(root, "--only", "toy/Walk", "--seeds", "1", "--launcher", launcher), 120
    )
    assert status == 0, output
    assert results(root, 1).read_text() == expected(1)


def test_slurm_gets_time_and_cores(root):
    """The job script for sbatch: a job whose time is over is signalled first, and is queued again."""
    pytest.importorskip("submitit", reason='needs submitit: pip install -e ".[reproduce]"')
    from submitit.slurm.slurm import _make_sbatch_string

    text = _make_sbatch_string(
        "run", folder=root / "log", time=40, cpus_per_task=1, job_name="cleanrobot"
    )
    assert "--time=40" in text and "--cpus-per-task=1" in text and "--signal=USR2" in text
    cell = reproduce.read_matrix(root / "benchmarks/matrix.toml")[0][0]
    again = reproduce.Job().checkpoint(cell, 1, root)
    assert again.function is not None and again.args == (cell, 1, root)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--only", "toy/Run"], "no cell is called toy/Run"),
        (["--only", "toy/Walk"], "has no [[input]] that makes x"),
    ],
)
def test_wrong_words_get_one_line(root, words, message):
    path = root / "benchmarks/matrix.toml"
    path.write_text(path.read_text().replace('feeds = ["README.md"]', 'inputs = ["x"]'))
    status, output = finish(start(root, *words))
    assert status == 1 and message in output and "Traceback" not in output


def test_two_cells_must_not_write_the_same_file(root):
    path = root / "benchmarks/matrix.toml"
    path.write_text(path.read_text() + MATRIX)
    with pytest.raises(ValueError, match="two cells write Fall__cpu2__s1.csv"):
        reproduce.read_matrix(path)
