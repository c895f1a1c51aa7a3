"""How training keeps up beside other work: Squint SAC on quiet cores and beside busy processes.

    python benchmarks/contention.py --out docs/results/throughput/contention__cpu2.csv

On a CPU Squint simulates in one thread and learns in another. The usual way, two threads inside torch's operations,
waits in each of them until both have run; beside other processes that takes a turn of the scheduler every time. Here
both run beside 0, 2 and 20 busy processes, in turns, all in one run, the second way with the spin before waiting that
algos/*.py set (GOMP_SPINCOUNT 100,000, unless you have set it) and with OpenMP's default. A row is the median over
--rounds, each of --seconds after a warm-up. `share` is what a fair scheduler leaves of two cores to two threads among
the busy processes, `kept` what is left of the quiet speed. Close other programs first.
"""

import csv
import os
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import tyro

ROOT = Path(__file__).resolve().parent.parent
SETTINGS = {  # -> threads of torch's operations, GOMP_SPINCOUNT
    "simulating beside one learning thread (ours)": (1, "100000"),
    "two threads an operation, spin 100,000": (2, "100000"),
    "two threads an operation, spin 300,000": (2, "300000"),
}
COLUMNS = ("setting", "busy", "steps_per_second", "range", "kept", "share")


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
    worker: int = 0
    """internal: train with this many threads for --seconds and print the transitions a second"""


def work(threads: int, seconds: float) -> float:
    """Transitions a second of Squint's loop with a CPU's defaults: step, jitter, store, updates."""
    sys.path[:0] = [str(ROOT), str(ROOT / "algos")]
    import squint_sac
    import torch

    args = squint_sac.parse_args(["--env-id", "SO101ReachCube-v1", "--device", "cpu"])
    env, _ = squint_sac.make_envs(args)
    agent = squint_sac.Agent(args, squint_sac.shapes_of(env))
    update, pool = squint_sac.make_update(agent, args), ThreadPoolExecutor(1)
    torch.set_num_threads(threads)  # make_update has set one
    actions = torch.zeros(args.num_envs, env.action_dim)
    obs = squint_sac.observe(env.step(actions)[0], args)
    replay = squint_sac.Replay(squint_sac.transition(obs, obs, actions, actions[:, 0]), rows=100)
    for _ in range(100):
        replay.add(squint_sac.transition(obs, obs, actions, actions[:, 0]))

    def loop(duration: float) -> float:
        nonlocal obs
        steps, begin = 0, time.perf_counter()
        while time.perf_counter() - begin < duration:
            actions = torch.rand(args.num_envs, env.action_dim) * 2 - 1
            stepping = pool.submit(env.step, actions)
            if threads > 1:  # as it was: one after the other
                stepping.result()
            for _ in range(args.num_updates // args.policy_frequency):
                update(replay.sample(args.policy_frequency, args.batch_size))
            next_obs, rewards, _, _, info = stepping.result()
            final_obs = squint_sac.observe(info["final_obs"], args)
            replay.add(squint_sac.transition(obs, final_obs, actions, rewards))
            obs = squint_sac.observe(next_obs, args)
            steps += args.num_envs
        return steps / (time.perf_counter() - begin)

    loop(seconds / 4)
    return loop(seconds)


def measure(threads: int, spin: str, busy: int, seconds: float) -> float:
    """Transitions a second of a fresh process, beside `busy` processes that do nothing but compute."""
    others = [subprocess.Popen([sys.executable, "-c", "while True: pass"]) for _ in range(busy)]
    try:
        command = [sys.executable, __file__, "--worker", str(threads)]
        command += ["--seconds", str(seconds)]
        env = os.environ | {"GOMP_SPINCOUNT": spin}
        done = subprocess.run(command, env=env, capture_output=True, text=True, check=True)
        return float(done.stdout.split()[-1])
    finally:
        for process in others:
            process.kill()
            process.wait()


def report(rows: list[tuple], out: Path | None):
    """Print rows, the columns' names first, and write them to a CSV file if there is to be one."""
    for row in rows:
        print("  ".join(str(cell).ljust(46 if i == 0 else 22) for i, cell in enumerate(row)))
    if out:
        out.parent.mkdir(parents=True, exist_ok=True)
        with open(out, "w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


def main(args: Args):
    if args.worker:
        print(work(args.worker, args.seconds))
        return
    cores = len(os.sched_getaffinity(0))
    found = {(name, busy): [] for name in SETTINGS for busy in args.busy}
    for _ in range(args.rounds):
        for name, busy in found:
            speed = measure(*SETTINGS[name], busy, args.seconds)
            found[name, busy].append(speed)
            print(f"{name}, {busy} busy: {speed:.1f} transitions/s", flush=True)
    rows = []
    for (name, busy), speeds in found.items():
        middle = statistics.median(speeds)
        kept = middle / statistics.median(found[name, args.busy[0]])
        share = min(1.0, 2 / (busy + 2)) if cores == 2 else float("nan")
        spread = f"{min(speeds):.1f} to {max(speeds):.1f}"
        rows.append((name, busy, f"{middle:.1f}", spread, f"{kept:.2f}", f"{share:.2f}"))
    report([COLUMNS, *rows], args.out)


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
