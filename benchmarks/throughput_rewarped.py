"""How fast the differentiable simulations are on the machine at hand: forward, and forward with backward, against N.

    python benchmarks/throughput_rewarped.py                         all tasks at size small, 1 to 16 environments
    python benchmarks/throughput_rewarped.py --task HandFlip --size full --num-envs 1 32 64 --device cuda
    python benchmarks/throughput_rewarped.py --out docs/results/throughput/rewarped__cpu2.csv

A row is the median over --repeats windows of --window steps with random actions, after one window that compiles and
fills caches. "forward" is without gradient; "forward and backward" is the sum of the window's rewards, differentiated
with respect to its actions. Units: environment steps per second, and particles (tetrahedra, bodies) times substeps per
second. `memory_mb` is what the simulation's own arrays of a window hold, computed from their sizes. Unless --no-plain,
particles are also run without checkpointing.
"""

import csv
import itertools
import os
import platform
import statistics
import subprocess
import sys
import time
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path

import torch
import tyro

from envs import rewarped
from envs.rewarped.mpm_tasks import MPMEnv

COLUMNS = (
    "task",
    "what",
    "environments",
    "env_steps_per_second",
    "particle_substeps_per_second",
    "range",
    "memory_mb",
    "remark",
)


@dataclass
class Args:
    task: tuple[str, ...] = tuple(rewarped.tasks())
    """tasks of envs/rewarped"""
    size: str = "small"
    """full or small"""
    num_envs: tuple[int, ...] = (1, 4, 16)
    """numbers of environments"""
    window: int = 4
    """steps of a window; the published algorithm has 32"""
    repeats: int = 3
    """windows measured for a row"""
    graph: bool | None = None
    """replay captured graphs; None: the task's default on this device"""
    plain: bool = True
    """also measure without checkpointing"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where the simulation runs"""
    out: Path | None = None
    """CSV file to write"""


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def without_grid(task: str) -> bool:
    return not issubclass(rewarped.tasks()[task], MPMEnv)


def elements(env) -> int:
    """Particles, tetrahedra or bodies."""
    return len(
        env.particles0
        if hasattr(env, "particles0")
        else env.tets
        if hasattr(env, "tets")
        else env.sim.bodies
    )


def memory(env) -> float:
    """Megabytes of the arrays of all workspaces."""
    if without_grid(env.env_id):
        found = [env.sim.steps, getattr(env.sim, "weighing", env.sim.steps)]
        spaces = {id(space): space for steps in found for space in steps.spaces}.values()
        tensors = [tensor for space in spaces for tensor in space.held()]
        return sum(t.numel() * t.element_size() for t in tensors) / 1e6
    total = 0
    for space in env.sim.spaces:
        tensors = (*space.particles, *space.adj_particles, *space.poses, *space.adj_poses)
        total += sum(t.numel() * t.element_size() for t in tensors)
        arrays = [a for grid in space.grids for a in grid] + [*space.adj_grid, *space.A, space.seen]
        total += sum(a.capacity for a in arrays) + sum(
            a.capacity for pair in space.touched for a in pair
        )
    return total / 1e6


def measure(args: Args, task: str, n: int, backward: bool, checkpoint: bool) -> dict:
    """One row."""
    env = rewarped.make(
        task,
        n,
        args.device,
        size=args.size,
        window=args.window,
        graph=args.graph,
        checkpoint=checkpoint,
    )
    generator, speeds = torch.Generator().manual_seed(0), []
    for _ in range(args.repeats + 1):
        env.detach()
        actions = [
            (torch.rand(n, env.action_dim, generator=generator) * 2 - 1)
            .to(args.device)
            .requires_grad_(backward)
            for _ in range(args.window)
        ]
        wait(args.device)
        begin = time.perf_counter()
        with torch.set_grad_enabled(backward):
            total = sum(env.step(action)[1].sum() for action in actions)
            if backward:
                total.backward()
        wait(args.device)
        speeds.append(n * args.window / (time.perf_counter() - begin))
    speeds = speeds[1:]
    work = elements(env) * env.sim.substeps
    return {
        "task": f"{task}, {args.size}",
        "environments": n,
        "what": ("forward and backward" if backward else "forward")
        + ("" if checkpoint else ", no checkpoints"),
        "env_steps_per_second": f"{statistics.median(speeds):.4g}",
        "particle_substeps_per_second": f"{statistics.median(speeds) * work:.4g}",
        "range": f"{min(speeds):.4g} to {max(speeds):.4g}",
        "memory_mb": f"{memory(env):.0f}",
        "remark": "graphs" if env.graph else "",
    }


def processor() -> str:
    """Its name."""
    names = Path("/proc/cpuinfo")
    lines = names.read_text().splitlines() if names.exists() else []
    found = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return found[0] if found else platform.processor() or platform.machine()


def machine() -> list[dict]:
    """Rows that say what was measured where."""

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), capture_output=True, text=True).stdout.strip()

    commit = git("rev-parse", "--short", "HEAD")
    if git("status", "--porcelain", "-uno"):
        commit += " with changes"
    facts = {
        "processor": f"{processor()}, {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads",
        "load": f"{os.getloadavg()[0]:.1f} programs wanted a core in the minute before",
        "versions": f"torch {torch.__version__}, warp-lang {version('warp-lang')}",
        "commit": commit or "unknown",
        "command": "python " + " ".join(sys.argv),
    }
    return [{"task": "machine", "what": key, "remark": value} for key, value in facts.items()]


def main(args: Args) -> int:
    for wrong, message in (
        (
            set(args.task) - set(rewarped.tasks()),
            f"--task {' '.join(args.task)}: known are {', '.join(rewarped.tasks())}",
        ),
        (args.size not in ("full", "small"), "--size: full or small"),
        (
            min(*args.num_envs, args.window, args.repeats) < 1,
            "--num-envs, --window, --repeats: at least 1",
        ),
        (
            args.device.startswith("cuda") and not torch.cuda.is_available(),
            "no CUDA device here: use --device cpu",
        ),
    ):
        if wrong:
            print(message, file=sys.stderr)
            return 2
    rows = machine()
    print("\n".join(f"{row['what']}: {row['remark']}" for row in rows))
    for task, n in itertools.product(args.task, args.num_envs):
        for backward, checkpoint in ((False, True), (True, True), (True, False)):
            if checkpoint or (args.plain and not without_grid(task)):
                rows.append(measure(args, task, n, backward, checkpoint))
                print("  ".join(str(rows[-1].get(column, "")) for column in COLUMNS), flush=True)
        if args.out:  # after each block, so that a run that is cut off leaves its rows
            args.out.parent.mkdir(parents=True, exist_ok=True)
            with args.out.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS)
                writer.writeheader()
                writer.writerows(rows)
    if args.out:
        print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
