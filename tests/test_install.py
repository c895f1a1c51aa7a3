"""Installations: the lock, the newest versions, wheels for a machine without the network, the project's own wheel."""

import importlib.util
import shutil
import subprocess
import sys
import zipfile

import gather_wheels
import lock
import newest
import pytest
from conftest import ROOT

TEXT = lock.LOCK.read_text()


# --- The lock -----------------------------------------------------------------------------------
def test_the_lock_has_every_pin():
    assert lock.disagreements(TEXT) == [], "run make lock"
    assert len(lock.locked(TEXT)) > len(lock.pins()), "it lacks what the pins bring along"


def test_the_lock_leaves_torchs_build_and_the_index_to_the_user():
    for name in lock.locked(TEXT):
        assert (
            not name.startswith(("torch", "nvidia-", "cuda-", "triton")) or name == "nvidia-ml-py"
        )
    for word in ("://", "--index", "--find-links", "--hash", " @ "):
        assert word not in TEXT


def test_a_pin_that_moved_without_the_lock_is_named():
    moved = TEXT.replace("jax==0", "jax==99.0")
    assert (
        len(lock.disagreements(moved)) == 1
        and "jax: pyproject.toml has" in lock.disagreements(moved)[0]
    )
    lines = TEXT.splitlines()
    without = "\n".join(line for line in lines if not line.startswith("tyro=="))
    assert lock.disagreements(without)[0].endswith("the lock has nothing")


def test_make_installs_with_the_lock():
    words = ["make", "--dry-run", "setup", "VENV=/tmp/there-is-none"]
    for more, expected in (([], True), (["LOCK="], False)):
        told = subprocess.run([*words, *more], cwd=ROOT, capture_output=True, text=True).stdout
        assert ("--constraint requirements/lock.txt" in told) is expected


def test_python_3_13_with_dm_control_is_one_line(tmp_path):
    """labmaze, which dm-control needs, has no wheel for it."""
    python = tmp_path / "python"
    python.write_text('#!/bin/sh\ncase "$2" in *"3, 13"*) exit 1 ;; esac\n')
    python.chmod(0o755)
    words = ["make", "setup", f"PYTHON={python}", f"VENV={tmp_path / 'none'}"]
    done = subprocess.run(words, cwd=ROOT, capture_output=True, text=True)
    assert done.returncode and "dm-control has no wheels for Python 3.13" in done.stderr
    without = subprocess.run([*words, "EXTRAS=go1,test"], cwd=ROOT, capture_output=True, text=True)
    assert "dm-control" not in without.stderr


# --- The newest ---------------------------------------------------------------------------------
def test_the_plan_moves_what_is_named_and_pins_the_rest():
    everything = newest.plan(["go1", "test"], [])
    assert "jax" in everything and not [name for name in everything if "==" in name]
    some = newest.plan(["go1", "test"], ["jax", "Flax"])
    assert {"jax", "flax"} <= set(some) and f"mujoco=={lock_version('mujoco')}" in some
    with pytest.raises(ValueError, match="--upgrade jacks: no pin of these extras"):
        newest.plan(["go1"], ["jacks"])


def lock_version(name: str) -> str:
    (version,) = lock.locked("\n".join(lock.pins()))[name]
    return version


def test_what_moved_and_what_broke_is_told(tmp_path):
    now = {"jax": "99.1", "torch": lock_version("torch") + "+cpu", "numpy": lock_version("numpy")}
    assert newest.moved(["jax", "torch", "numpy"], now) == [f"jax: {lock_version('jax')} -> 99.1"]
    report = tmp_path / "tests.xml"
    assert newest.broken(report) == ["the tests did not run to their end"]
    case = '<testcase classname="tests.test_a" name="test_b">{}</testcase>'
    report.write_text(
        "<testsuites><testsuite>"
        + case.format('<failure message="ValueError: no&#10;more"/>')
        + case.format("")
        + case.format(
            '<error message="collection failure">a.py:3\nE   ImportError: it is old</error>'
        )
        + "</testsuite></testsuites>"
    )
    first = "tests.test_a::test_b: "
    assert newest.broken(report) == [f"{first}ValueError: no", f"{first}ImportError: it is old"]


# --- Wheels for a GPU machine -------------------------------------------------------------------
def test_the_locks_lines_are_those_of_the_other_machines_python():
    old, new = (
        gather_wheels.locked_lines(gather_wheels.Args(python=version))
        for version in ("3.11", "3.12")
    )
    assert old["contourpy"] != new["contourpy"] and old["absl-py"] == new["absl-py"]
    assert "nest-asyncio" not in old, "that one is for Windows"
    assert "jax[cuda13]==" + lock_version("jax") in gather_wheels.wanted()


def test_wheels_that_cannot_serve_are_refused():
    with pytest.raises(ValueError, match="is a build for a CPU"):
        gather_wheels.refuse_cpu_build(["numpy==2.0", "torch==2.13.0+cpu"])
    gather_wheels.refuse_cpu_build(["torch==2.13.0"])
    for options, message in (
        (dict(python="3.13"), "labmaze, of dm-control, has no wheel"),
        (dict(python="three"), "a version such as 3.11 or 3.12"),
        (dict(machine="i386"), "x86_64 or aarch64"),
        (dict(out=ROOT / "Makefile"), "is no folder"),
    ):
        with pytest.raises(ValueError, match=message):
            gather_wheels.Args(**options).check()
    tags = gather_wheels.platforms("aarch64")
    assert {"manylinux_2_28_aarch64", "manylinux2014_aarch64"} <= set(tags)
    assert gather_wheels.COMMANDS.count("\n") == 3 and "benchmarks/gpu.py" in gather_wheels.COMMANDS


# --- The project's own wheel --------------------------------------------------------------------
@pytest.mark.skipif(
    importlib.util.find_spec("setuptools") is None,
    reason="building needs setuptools: pip install setuptools",
)
def test_the_wheel_has_what_is_imported_and_what_is_copied(tmp_path):
    """Built in a copy, so that no build folder is left; unpacked as pip does, and used from there."""
    source, site = tmp_path / "source", tmp_path / "site"
    for name in ("envs", "hardware", "algos"):
        shutil.copytree(ROOT / name, source / name, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    words = [
        "wheel",
        "--quiet",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(tmp_path),
        ".",
    ]
    built = subprocess.run(
        [sys.executable, "-m", "pip", *words], cwd=source, capture_output=True, text=True
    )
    assert built.returncode == 0, built.stderr
    (wheel,) = tmp_path.glob("*.whl")
    names = set(zipfile.ZipFile(wheel).namelist())
    for folder in ("envs", "hardware"):
        files = {p.relative_to(ROOT).as_posix() for p in (ROOT / folder).rglob("*") if p.is_file()}
        files = {name for name in files if "__pycache__" not in name}
        assert files <= names, "a file of the packages is not in the wheel"
    copied = {name.rpartition("share/cleanrobot/")[2] for name in names if "/data/share/" in name}
    assert copied == {f"algos/{path.name}" for path in (ROOT / "algos").glob("*.py")}
    assert not [name for name in names if name.startswith(("tests/", "benchmarks/", "scripts/"))]
    zipfile.ZipFile(wheel).extractall(site)
    code = "import envs, hardware, envs.dot_reach as d; print(d.__file__)"
    done = subprocess.run(
        [sys.executable, "-c", code],
        cwd=tmp_path,
        env={"PYTHONPATH": str(site)},
        capture_output=True,
        text=True,
    )
    assert done.stdout.startswith(str(site)), done.stderr
