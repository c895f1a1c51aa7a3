"""Install the newest versions of everything and say what broke.

    make newest                                    in .venv-newest; takes as long as the tests do
    python scripts/newest.py --upgrade jax flax    these alone, the rest at its pins
    python scripts/newest.py --tests tests/test_go1_mjx.py -x      the rest of the line is pytest's
    python scripts/newest.py --list                which pins are behind, without installing anything

Nothing of the repository is changed. What is printed at the end: every pin that moved, from which
version to which, what the resolver could not join, what `pip check` finds, and each failed test with
its last line. Exit status 1 where anything broke, so that a weekly job can call it.

It needs no package beside pip: run it with any Python that the project supports.
"""

import argparse
import json
import re
import shutil
import subprocess
import sys
import xml.etree.ElementTree as ElementTree
from pathlib import Path

import lock

ROOT = Path(__file__).resolve().parent.parent
EXTRAS = ("so101", "dmc", "go1", "resfit", "hardware", "export", "test")


def plan(extras: list[str], upgrade: list[str]) -> list[str]:
    """What pip is asked for: names alone for what may move, pins for the rest.

    Raises ValueError for a name that is no pin.
    """
    pins = dict.fromkeys(pin for extra in ("core", *extras) for pin in lock.pins(extra))
    names = {lock.normal(pin.split("==")[0]) for pin in pins}
    for name in upgrade:
        if lock.normal(name) not in names:
            raise ValueError(
                f"--upgrade {name}: no pin of these extras; known: {', '.join(sorted(names))}"
            )
    move = {lock.normal(name) for name in upgrade} or names
    return [pin.split("==")[0] if lock.normal(pin.split("==")[0]) in move else pin for pin in pins]


def moved(requirements: list[str], versions: dict[str, str]) -> list[str]:
    """A line for each pin whose version is another one now. versions: {name: version} that pip chose"""
    pinned = {lock.normal(name): old for name, old in (pin.split("==") for pin in lock.pins())}
    names = [lock.normal(requirement.split("==")[0]) for requirement in requirements]
    return [
        f"{name}: {pinned[name]} -> {versions[name]}"
        for name in sorted(names)
        if name in versions and versions[name].partition("+")[0] != pinned[name]
    ]


def broken(report: Path) -> list[str]:
    """A line for each failed test of a JUnit file: where, and the last line of what it said."""
    if not report.exists():
        return ["the tests did not run to their end"]
    found = []
    for case in ElementTree.parse(report).iter("testcase"):
        for node in [*case.findall("failure"), *case.findall("error")]:
            lines = (node.text or "").splitlines()
            said = [line[2:].strip() for line in lines if line.startswith("E ")][-1:]
            said = said or (node.get("message") or "").strip().splitlines()
            where = case.get("classname") or case.get("name")
            found.append(f"{where}::{case.get('name')}: {said[0][:160] if said else 'failed'}")
    return found


def chosen(python: Path, requirements: list[str], report: Path) -> tuple[dict[str, str], str]:
    """-> ({name: version} that pip would install, why there is no solution)"""
    command = [str(python), "-m", "pip", "install", "--dry-run", "--ignore-installed", "--quiet"]
    command += ["--report", str(report), *requirements]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if not line.startswith("WARNING")]
        return {}, "\n".join(lines[-12:])
    entries = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    return {lock.normal(entry["name"]): entry["version"] for entry in entries}, ""


def environment(folder: Path) -> Path:
    """A fresh virtual environment's Python."""
    if (folder / "pyvenv.cfg").exists():
        shutil.rmtree(folder)
    if folder.exists():
        raise ValueError(f"--venv {folder}: exists and is no virtual environment")
    subprocess.run([sys.executable, "-m", "venv", str(folder)], check=True)
    return folder / "bin/python"


def run_tests(python: Path, tests: list[str], report: Path) -> list[str]:
    """Run pytest in the environment. -> what broke"""
    words = [str(python), "-m", "pytest", "-q", "--tb=short", f"--junitxml={report}", *tests]
    words.append("--continue-on-collection-errors")  # a file that cannot be imported is one of them
    status = subprocess.run(words, cwd=ROOT).returncode
    failures = broken(report)
    if status not in (0, 1) and not failures:  # 2 and above: pytest itself could not go on
        failures = [f"pytest ended with status {status}"]
    return failures


def main() -> int:
    layout = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=layout)
    parser.add_argument("--extras", default=",".join(EXTRAS), help="of pyproject.toml, by commas")
    parser.add_argument("--upgrade", nargs="+", default=[], help="only these; default: all")
    parser.add_argument("--venv", type=Path, default=ROOT / ".venv-newest", help="made anew")
    parser.add_argument(
        "--tests", nargs=argparse.REMAINDER, default=[], help="the rest: for pytest"
    )
    parser.add_argument("--list", action="store_true", help="resolve only, install nothing")
    args = parser.parse_args()
    requirements = plan(args.extras.split(","), args.upgrade)
    python = environment(args.venv)
    versions, why = chosen(python, requirements, args.venv / "report.json")
    if why:
        print(f"pip cannot join the newest versions:\n{why}")
        return 1
    changed = moved(requirements, versions)
    print("\n".join([f"{len(changed)} pins are behind:", *changed]), flush=True)
    if args.list or not changed:
        return 0
    exact = [f"{name}=={version}" for name, version in versions.items()]
    for words in (exact, ["--editable", "."]):
        subprocess.run(
            [str(python), "-m", "pip", "install", "--quiet", "--no-deps", *words],
            cwd=ROOT,
            check=True,
        )
    checked = subprocess.run([str(python), "-m", "pip", "check"], capture_output=True, text=True)
    # the project's own pins are what was left behind on purpose
    complaints = [
        line for line in checked.stdout.splitlines() if not line.startswith("cleanrobot ")
    ]
    complaints = [line for line in complaints if not re.match("No broken requirements", line)]
    failures = run_tests(python, args.tests, args.venv / "tests.xml")
    print("\n".join(["", f"{len(changed)} pins moved:", *changed]))
    print("\n".join(["", f"pip check: {len(complaints)} complaints", *complaints]))
    print("\n".join(["", f"{len(failures)} tests broke", *failures]))
    return int(bool(failures or complaints))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, subprocess.CalledProcessError) as error:
        sys.exit(f"error: {error}")
