"""ResFiT's actor and learner apart against one after the other: transitions and updates a second.

    python -m envs.demos --env-id SO101ReachCube-v1 --episodes 100 --noise 0.3 --out reach.hdf5
    python algos/bc_chunk.py --env-id SO101ReachCube-v1 --device cpu --demos reach.hdf5 --eval-freq 1500 --name base
    python benchmarks/async_resfit.py --demos reach.hdf5 --base runs/base/base.pt2 \\
        --out docs/results/throughput/resfit_async__cpu2.csv

Short trainings by algos/resfit.py and scripts/resfit_async.py, one thread each, alternated, with the defaults of a CPU
but for the updates a transition. A rate is by the training's own clock (metrics.csv, without evaluations), from its
first row to its last; a row here is the median over --rounds. Close other programs first.
"""

import csv
import os
import statistics
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path

import tyro
from contention import report

ROOT = Path(__file__).resolve().parent.parent
SCRIPTS = {"one after the other": "algos/resfit.py", "apart": "scripts/resfit_async.py"}
COLUMNS = ("how", "utd", "transitions_per_second", "range", "updates_per_second", "ratio")


@dataclass
class Args:
    demos: Path
    """demonstrations of SO101ReachCube-v1"""
    base: Path
    """its base policy, a .pt2 file"""
    utd: tuple[float, ...] = (0.0625, 0.25, 1.0)
    """updates of the critics a transition"""
    seconds: float = 20.0
    """about as long is a measurement"""
    rounds: int = 3
    """measurements of each row"""
    out: Path | None = None
    """CSV file to write"""


def measure(script: str, utd: float, steps: int, args: Args) -> float:
    """Transitions a second of one training."""
    options = ["--demos", args.demos.resolve(), "--base", args.base.resolve()]
    options += ["--device", "cpu", "--no-capture-video", "--name", "run", "--utd", utd]
    options += ["--total-timesteps", steps, "--learning-starts", 800, "--critic-warmup", 10]
    options += ["--log-freq", 160, "--eval-freq", 10**9]
    with tempfile.TemporaryDirectory() as folder:
        subprocess.run(
            [sys.executable, ROOT / script, *map(str, options)],
            env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)},
            cwd=folder,
            check=True,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
        with open(Path(folder, "runs/run/metrics.csv")) as file:
            rows = list(csv.DictReader(file))
    first, last = rows[0], rows[-1]
    moved = {name: float(last[name]) - float(first[name]) for name in ("global_step", "train_time")}
    return moved["global_step"] / moved["train_time"]


def main(args: Args):
    found = {(name, utd): [] for utd in args.utd for name in SCRIPTS}
    for _ in range(args.rounds):
        for name, utd in found:
            steps = 1600 + round(args.seconds / (0.0015 + 0.006 * utd))
            found[name, utd].append(measure(SCRIPTS[name], utd, steps, args))
            print(f"{name}, utd {utd}: {found[name, utd][-1]:.1f} transitions/s", flush=True)
    rows = []
    for (name, utd), speeds in found.items():
        middle = statistics.median(speeds)
        ratio = middle / statistics.median(found[next(iter(SCRIPTS)), utd])
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        rows.append((name, utd, f"{middle:.1f}", spread, f"{utd * middle:.1f}", f"{ratio:.2f}"))
    report([COLUMNS, *rows], args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
