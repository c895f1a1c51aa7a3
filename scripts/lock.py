"""Write requirements/lock.txt: the version of everything that the pins of pyproject.toml bring along.

    make lock                             renew it (uv resolves; it needs the package index)
    python scripts/lock.py --check        fail where a pin of pyproject.toml and the lock disagree
    python scripts/lock.py --extra docs   print an extra's pins, one a line, without this project

One file holds for Python 3.11 and newer, on every platform, and for every extra: what differs carries
a marker. `make` gives it to pip as constraints, so an extra that is not asked for installs nothing.

torch itself and what belongs to its build (triton, nvidia-*, cuda-*) are left out: pyproject.toml pins
torch's version, your index or your wheels choose the build, and the build brings its own.
"""

import argparse
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LOCK = ROOT / "requirements/lock.txt"
# nvidia-ml-py is plain Python, of no build
TORCH = re.compile(r"(torch|triton|nvidia-(?!ml-py)[\w-]+|cuda-[\w-]+)==")
HEADER = """\
# Versions that go with the pins of pyproject.toml, for pip's --constraint. Written by `make lock`; do not edit.
# torch and what its build brings (triton, nvidia-*, cuda-*) are left out: the build is yours to choose.
"""


def pins(extra: str | None = None) -> list[str]:
    """`name==version` of the core and of all extras, or of one extra alone; `core` names the core."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    extras["core"] = project["dependencies"]
    if extra is not None and extra not in extras:
        raise ValueError(f"--extra {extra}: pyproject.toml has no such extra")
    if extra is not None:
        return extras[extra]
    groups = [extras[name] for name in extras if name != "all"]
    return sorted({pin for group in groups for pin in group})


def locked(text: str) -> dict[str, set[str]]:
    """{name: its versions}, more than one where Pythons or platforms differ."""
    versions: dict[str, set[str]] = {}
    for name, version in re.findall(r"^([\w.-]+)==([^\s;]+)", text, re.MULTILINE):
        versions.setdefault(normal(name), set()).add(version)
    return versions


def normal(name: str) -> str:
    """A package's name as indexes compare it."""
    return re.sub(r"[-_.]+", "-", name).lower()


def disagreements(text: str) -> list[str]:
    """One line for each pin that the lock lacks or has at another version."""
    have, found = locked(text), []
    for pin in pins():
        name, version = pin.split("==")
        versions = have.get(normal(name), set())
        if versions != {version} and not TORCH.match(pin):
            told = " and ".join(sorted(versions)) or "nothing"
            found.append(f"{name}: pyproject.toml has {version}, the lock has {told}")
    return found


def resolve() -> str:
    """The lock's text, resolved now. Wheels only: a lock must not make anyone compile."""
    uv = shutil.which("uv", path=str(Path(sys.executable).parent)) or shutil.which("uv")
    if uv is None:
        raise ValueError("uv is missing: run make lock, or pip install uv")
    command = [uv, "pip", "compile", "pyproject.toml", "--universal", "--python-version", "3.11"]
    command += ["--all-extras", "--only-binary", ":all:", "--no-header", "--no-annotate", "--quiet"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"uv could not resolve the pins:\n{done.stderr.strip()}")
    lines = [line for line in done.stdout.splitlines() if not TORCH.match(line)]
    return HEADER + "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--check", action="store_true", help="compare only, write nothing")
    parser.add_argument("--extra", help="print this extra's pins and end")
    args = parser.parse_args()
    if args.extra:
        print("\n".join(pins(args.extra)))
        return 0
    if not args.check:
        LOCK.parent.mkdir(exist_ok=True)
        LOCK.write_text(resolve())
        print(f"wrote {LOCK.relative_to(ROOT)}: {len(locked(LOCK.read_text()))} packages")
    wrong = disagreements(LOCK.read_text())
    print("\n".join([*wrong, "run make lock"]) if wrong else "the lock has every pin")
    return int(bool(wrong))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except ValueError as error:
        sys.exit(f"error: {error}")
