"""How fast the differentiable simulations are on the machine at hand: forward, and forward with backward, against N.

    python benchmarks/throughput_rewarped.py                         all tasks at size small, 1 to 16 environments
    python benchmarks/throughput_rewarped.py --task HandFlip --size full --num-envs 1 32 64 --device cuda
    python benchmarks/throughput_rewarped.py --out docs/results/throughput/rewarped__cpu2.csv
    python benchmarks/throughput_rewarped.py --against OLD-CHECKOUT ORIGINAL/bin/python --task AntRun

A row is the median over --repeats windows of --window steps with random actions, after one window that compiles and
fills caches. "forward" is without gradient; "forward and backward" is the sum of the window's rewards, differentiated
with respect to its actions. Units: environment steps per second, and particles (tetrahedra, bodies) times substeps per
second. `memory_mb` is what the simulation's own arrays of a window hold, computed from their sizes. Unless --no-plain,
particles are also run without checkpointing.

--against takes folders of other checkouts, and Pythons of environments with the original (pip install rewarped==1.3.3
gym==0.23.1 hydra-core omegaconf tensorboard trimesh pycollada torch). Each is a process of its own with one thread;
windows alternate between them and this checkout, and a row is a ratio of CPU-seconds, the median over --repeats pairs.
Beside "forward" and "forward and backward" there is "training", a whole window of SAPO with its defaults, and the
original only has the first two, at full size.
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
    against: tuple[str, ...] = ()
    """folders of checkouts and Pythons with the original, to compare with"""
    work: tuple[str, ...] = ("forward", "forward and backward", "training")
    """what to compare"""


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
        arrays += [a for svd in space.svd for a in svd]
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


# A process that measures: a line in, the CPU-seconds of a window out.
OURS = """
import sys, time
import torch
from envs import rewarped
what, task, size, n, window = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
torch.set_num_threads(1)
torch.manual_seed(0)
if what == "training":
    from algos import sapo_rewarped as sapo
    args = sapo.parse_args(["--env-id", task, "--size", size, "--device", "cpu"])
    options = dict(checkpoint=args.recompute, window=args.horizon, stagger=args.stagger)
    env = rewarped.make(task, args.num_envs, seed=1, size=size, **options)
    agent = sapo.Agent(args, env.obs_dims | dict(action=env.action_dim))
    optimizers, obs = sapo.make_optimizers(agent, args), env.reset(seed=1)
else:
    env = rewarped.make(task, n, seed=1, size=size, window=window)
    env.reset(seed=1)

def measured():
    global obs
    if what == "training":
        found, obs = sapo.rollout(agent, env, obs, args)
        sapo.learn(agent, optimizers, found, args)
        return
    env.detach()
    back = what != "forward"
    actions = torch.rand(window, n, env.action_dim).mul(2).sub(1).requires_grad_(back)
    with torch.set_grad_enabled(back):
        total = sum(env.step(action)[1].sum() for action in actions)
        if back:
            total.backward()
"""
ORIGINAL = """
import importlib, sys, time
import torch
what, task, size, n, window = sys.argv[1:4] + [int(word) for word in sys.argv[4:]]
torch.set_num_threads(1)
torch.manual_seed(0)
places = dict(AntRun="dflex.ant.Ant", RollingFlat="plasticinelab.rolling_pin.RollingPin")
module, name = places[task].rsplit(".", 1)
back = what != "forward"
options = dict(device="cpu", no_grad=not back, use_graph_capture=False, no_env_offset=True, render=False)
env = getattr(importlib.import_module("rewarped.envs." + module), name)(num_envs=n, **options)
env.reset(clear_grad=True) if back else env.reset()

def measured():
    if back:
        env.initialize_trajectory()
    actions = torch.rand(window, n, env.num_actions).mul(2).sub(1).requires_grad_(back)
    with torch.set_grad_enabled(back):
        total = sum(env.step(action)[1].sum() for action in actions)
        if back:
            total.backward()
"""
LOOP = """
for line in sys.stdin:
    begin = time.process_time()
    measured()
    print("seconds", time.process_time() - begin, flush=True)
"""


def process(where: str, *words) -> subprocess.Popen:
    """One that measures windows of a checkout, or of the original."""
    ours = Path(where).is_dir()
    program = (OURS if ours else ORIGINAL) + LOOP
    env = os.environ | dict(OMP_NUM_THREADS="1")
    if ours:
        env["PYTHONPATH"] = str(Path(where).resolve())
    command = [sys.executable if ours else where, "-c", program, *map(str, words)]
    pipes = dict(stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL)
    return subprocess.Popen(command, text=True, env=env, cwd=where if ours else None, **pipes)


def seconds(one: subprocess.Popen) -> float:
    """CPU-seconds of its next window. Raises RuntimeError if it has ended."""
    one.stdin.write("\n")
    one.stdin.flush()
    for line in one.stdout:
        if line.startswith("seconds"):
            return float(line.split()[1])
    raise RuntimeError(f"{' '.join(one.args[-5:])}: {one.args[0]} cannot measure it")


def compare(args: Args, task: str, n: int, what: str, other: str) -> dict:
    """One row: how much faster this checkout is."""
    words = (what, task, args.size, n, args.window)
    both = [process(where, *words) for where in (other, str(Path(__file__).parents[1]))]
    pairs = [[seconds(one) for one in both] for _ in range(args.repeats + 1)][1:]
    for one in both:
        one.stdin.close()
        one.wait()
    ratios = [theirs / ours for theirs, ours in pairs]
    theirs, ours = (statistics.median(column) for column in zip(*pairs, strict=True))
    return {
        "task": f"{task}, {args.size}",
        "what": what,
        "environments": "as trained" if what == "training" else n,
        "against": "another checkout" if Path(other).is_dir() else "rewarped 1.3.3",
        "times_as_fast": f"{statistics.median(ratios):.3g}",
        "range": f"{min(ratios):.3g} to {max(ratios):.3g}",
        "cpu_ms_a_window": f"{1e3 * ours:.4g}",
        "cpu_ms_of_the_other": f"{1e3 * theirs:.4g}",
    }


def comparison(args: Args) -> list[dict]:
    """All rows of --against."""
    rows = []
    for task, n, what, other in itertools.product(
        args.task, args.num_envs, args.work, args.against
    ):
        if Path(other).is_dir() or what != "training":
            rows.append(compare(args, task, n, what, other))
            print("  ".join(str(value) for value in rows[-1].values()), flush=True)
    return rows


def write(path: Path, rows: list[dict], columns) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns)
        writer.writeheader()
        writer.writerows(rows)


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
    if args.against:
        facts = [{"task": row["task"], "what": row["what"], "range": row["remark"]} for row in rows]
        rows = comparison(args)
        if args.out:
            write(args.out, facts + rows, rows[-1])
        return 0
    for task, n in itertools.product(args.task, args.num_envs):
        for backward, checkpoint in ((False, True), (True, True), (True, False)):
            if checkpoint or (args.plain and not without_grid(task)):
                rows.append(measure(args, task, n, backward, checkpoint))
                print("  ".join(str(rows[-1].get(column, "")) for column in COLUMNS), flush=True)
        if args.out:  # after each block, so that a run that is cut off leaves its rows
            write(args.out, rows, COLUMNS)
    if args.out:
        print(args.out)
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
