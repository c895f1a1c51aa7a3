"""Gather every package that a GPU machine without the network needs, on a machine that has one.

    python scripts/gather_wheels.py                          Linux, x86-64, this Python's version
    python scripts/gather_wheels.py --python 3.12 --list     what would be fetched
    python scripts/gather_wheels.py --out /media/stick/wheels

Then on the GPU machine, from a copy of the repository and with the folder:

    python3.12 -m venv .venv
    .venv/bin/pip install --no-index --find-links wheels -r wheels/requirements.txt
    .venv/bin/pip install --no-index --find-links wheels --no-deps --no-build-isolation --editable .
    .venv/bin/python benchmarks/gpu.py --minutes 10

Versions are those of pyproject.toml and requirements/lock.txt. torch's CUDA build and JAX's CUDA
plugin come with their libraries, which are most of the 4 GB or so. Packages come from the index that
pip is set up for, wheels only: nothing is compiled on either machine. A second call fetches only what
is missing. For a machine that has some CUDA build of torch already: --without-torch.
"""

import json
import re
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import lock
import tyro

ROOT = Path(__file__).resolve().parent.parent
COMMANDS = re.search(r"^    python3.*?$(?=\n\n)", __doc__, re.DOTALL | re.MULTILINE)[0]
# What benchmarks/gpu.py runs: its simulators, and pytest for the checks.
EXTRAS = ("so101", "dmc", "go1", "rewarped", "resfit", "hardware", "export", "test")
# Versions of the C library that a wheel may name, the newest first: pip takes only those that it is told, exactly.
GLIBC = range(39, 4, -1)


@dataclass
class Args:
    out: Path = Path("wheels")
    """folder to fill"""
    python: str = f"{sys.version_info.major}.{sys.version_info.minor}"
    """version of the GPU machine's Python: 3.11 or 3.12"""
    machine: str = "x86_64"
    """its processor, as `uname -m` prints it: x86_64 or aarch64"""
    without_torch: bool = False
    """leave out torch and JAX's CUDA libraries; both must be there already"""
    list: bool = False
    """print what would be fetched and end"""

    def check(self) -> None:
        """Raises ValueError at the first choice that cannot work. (In __post_init__ tyro would reword it.)"""
        if not re.fullmatch(r"3\.\d+", self.python) or int(self.python[2:]) < 11:
            raise ValueError(f"--python {self.python}: a version such as 3.11 or 3.12")
        if int(self.python[2:]) > 12:
            raise ValueError(f"--python {self.python}: labmaze, of dm-control, has no wheel for it")
        if self.machine not in ("x86_64", "aarch64"):
            raise ValueError(f"--machine {self.machine}: x86_64 or aarch64")
        if self.out.exists() and not self.out.is_dir():
            raise ValueError(f"--out {self.out}: is no folder")


def platforms(machine: str) -> list[str]:
    """Tags of the wheels that a Linux of the last years can use."""
    tags = [f"manylinux_2_{minor}_{machine}" for minor in GLIBC]
    return [*tags, f"manylinux2014_{machine}", f"manylinux2010_{machine}", f"manylinux1_{machine}"]


def applies(marker: str, args: Args) -> bool:
    """Whether an environment marker holds on the GPU machine."""
    from packaging.markers import Marker

    target = {
        "python_version": args.python,
        "python_full_version": f"{args.python}.0",
        "sys_platform": "linux",
        "platform_system": "Linux",
        "platform_machine": args.machine,
        "os_name": "posix",
        "implementation_name": "cpython",
        "platform_python_implementation": "CPython",
    }
    return Marker(marker).evaluate(target)


def locked_lines(args: Args) -> dict[str, str]:
    """{name: `name==version`} of the lock's lines that hold on the GPU machine."""
    found = {}
    for line in lock.LOCK.read_text().splitlines():
        pin, _, marker = line.partition(" ; ")
        if "==" in pin and not line.startswith("#") and (not marker or applies(marker, args)):
            found[lock.normal(pin.split("==")[0])] = pin
    return found


def wanted() -> list[str]:
    """The pins of the core and of EXTRAS, with JAX's CUDA plugin."""
    pins = {pin for group in ("core", *EXTRAS) for pin in lock.pins(group)}
    return sorted(pin.replace("jax==", "jax[cuda13]==") for pin in pins)


def pip(args: Args, words: list[str], requirements: list[str], **options):
    """pip for the GPU machine's Python and platform, wheels only."""
    command = [sys.executable, "-m", "pip", *words, "--only-binary", ":all:"]
    command += ["--implementation", "cp", "--python-version", args.python]
    command += [word for tag in platforms(args.machine) for word in ("--platform", tag)]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as file:
        file.write("\n".join(requirements) + "\n")
        file.flush()
        return subprocess.run([*command, "-r", file.name], text=True, **options)


def resolved(args: Args) -> list[str]:
    """`name==version` of everything. Raises ValueError where there is no solution, or one without CUDA."""
    with tempfile.TemporaryDirectory() as scratch:
        constraints, report = Path(scratch) / "lock.txt", Path(scratch) / "report.json"
        constraints.write_text("\n".join(locked_lines(args).values()) + "\n")
        words = ["install", "--dry-run", "--quiet", "--ignore-installed", "--target", scratch]
        words += ["--constraint", str(constraints), "--report", str(report)]
        words.append("--ignore-requires-python")  # older pips compare it with this Python
        done = pip(args, words, wanted(), capture_output=True)
        if done.returncode:
            raise ValueError(f"pip finds no solution:\n{done.stderr.strip()}")
        found = [entry["metadata"] for entry in json.loads(report.read_text())["install"]]
    pins = sorted(f"{lock.normal(entry['name'])}=={entry['version']}" for entry in found)
    if args.without_torch:
        return [pin for pin in pins if not lock.TORCH.match(pin) and not pin.startswith("jax-cuda")]
    refuse_cpu_build(pins)
    return pins


def refuse_cpu_build(pins: list[str]):
    """Raises ValueError where torch is a build without CUDA."""
    cpu = [pin for pin in pins if re.match(r"torch==.*\+cpu", pin)]
    if cpu:
        raise ValueError(
            f"{cpu[0]} is a build for a CPU, which this pip is set up to take (pip config list, "
            "PIP_FIND_LINKS): point it at CUDA builds, or gather --without-torch"
        )


def main(argv: list[str] | None = None) -> int:
    """-> exit status. Raises ValueError for arguments that do not fit and for wheels of the wrong kind."""
    plain = (tyro.conf.FlagCreatePairsOff,)
    args = tyro.cli(Args, args=argv, description=__doc__.split("\n\n")[0], config=plain)
    args.check()
    pins = resolved(args)
    if args.list:
        print("\n".join(pins))
        return 0
    args.out.mkdir(parents=True, exist_ok=True)
    if pip(args, ["download", "--no-deps", "--dest", str(args.out)], pins).returncode:
        raise ValueError("pip could not fetch everything, see above; call again to go on")
    (args.out / "requirements.txt").write_text("\n".join(pins) + "\n")
    sizes = [path.stat().st_size for path in args.out.glob("*.whl")]
    print(f"{args.out}: {len(sizes)} wheels, {sum(sizes) / 2**30:.1f} GiB. Carry it over, then:")
    print(COMMANDS.replace("3.12", args.python).replace("wheels", str(args.out)))
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
