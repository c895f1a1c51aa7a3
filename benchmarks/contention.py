"""How training keeps up beside other work: Squint SAC's updates a second on quiet cores and beside busy processes.

    python benchmarks/contention.py --out docs/results/throughput/contention__cpu2.csv

OpenMP's threads spin before they wait for each other. Beside other processes a long spin burns the time that the other
threads need, so algos/*.py set GOMP_SPINCOUNT to 100,000 unless you have set it. Here each setting runs beside 0, 2 and
20 busy processes, in turns, all in one run. A row is the median over --rounds, each of --seconds after a warm-up.
`share` is the fraction of the two cores that a fair scheduler leaves to a process with two threads among the busy ones,
`kept` the fraction of the quiet speed that is left. Close other programs first.
"""

import csv
import os
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {"spin 100,000 (ours)": "100000", "spin 300,000 (OpenMP's default)": "300000"}
COLUMNS = ("setting", "busy", "updates_per_second", "range", "kept", "share")


@dataclass
class Args:
    busy: tuple[int, ...] = (0, 2, 20)
    """busy processes beside the training; the first one counts as quiet"""
    seconds: float = 8.0
    """time of a measurement, after a warm-up of a quarter of it"""
    rounds: int = 3
    """measurements of every setting, alternated with the others"""
    out: Path | None = None
    """CSV file to write"""
    worker: bool = False
    """internal: run updates for --seconds and print how many a second"""


def work(seconds: float) -> float:
    """Critic updates a second of Squint's CPU defaults, the actor's every fourth and sampling included."""
    sys.path.insert(0, str(ROOT / "algos"))
    import squint_sac
    import torch

    args = squint_sac.parse_args(["--env-id", "SO101ReachCube-v1", "--device", "cpu"])
    shapes = dict(channels=3, state=12, privileged=0, action=6)
    agent = squint_sac.Agent(args, shapes)
    update = squint_sac.make_update(agent, args)
    share = args.batch_size // args.learners
    obs = dict(
        rgb=torch.randint(0, 256, (64, 16, 16, 3), dtype=torch.uint8),
        state=torch.randn(64, 12),
        critic_state=torch.randn(64, 12),
    )
    row = squint_sac.transition(obs, obs, torch.rand(64, 6), torch.rand(64))
    replay = squint_sac.Replay(row, rows=100)
    for _ in range(100):
        replay.add(row)

    def loop(duration: float) -> float:
        done, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < duration:
            update(replay.sample(args.policy_frequency, args.learners, share))
            done += args.policy_frequency
        return done / (time.perf_counter() - begin)

    loop(seconds / 4)
    return loop(seconds)


def measure(spin: str, busy: int, seconds: float) -> float:
    """Updates a second of a fresh process, beside `busy` processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, __file__, "--worker", "--seconds", str(seconds)]
        env = os.environ | {"GOMP_SPINCOUNT": spin}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    finally:
        for process in others:
            process.kill()
            process.wait()


def main(args: Args):
    if args.worker:
        print(work(args.seconds))
        return
    cores = len(os.sched_getaffinity(0))
    found = {(name, busy): [] for name in SETTINGS for busy in args.busy}
    for _ in range(args.rounds):
        for name, busy in found:
            speed = measure(SETTINGS[name], busy, args.seconds)
            found[name, busy].append(speed)
            print(f"{name}, {busy} busy: {speed:.1f} updates/s", flush=True)
    rows = []
    for (name, busy), speeds in found.items():
        middle = statistics.median(speeds)
        kept = middle / statistics.median(found[name, args.busy[0]])
        share = min(1.0, 2 / (busy + 2)) if cores == 2 else float("nan")
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        rows.append((name, busy, f"{middle:.1f}", spread, f"{kept:.2f}", f"{share:.2f}"))
    for row in [COLUMNS, *rows]:
        print("  ".join(str(cell).ljust(32 if i == 0 else 18) for i, cell in enumerate(row)))
    if args.out:
        args.out.parent.mkdir(parents=True, exist_ok=True)
        with open(args.out, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows([COLUMNS, *rows])


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
