"""How fast physics, images, learning and the whole of Squint SAC are on the machine at hand, in one run.

    python benchmarks/throughput.py                                  print the table
    python benchmarks/throughput.py --out docs/results/throughput/squint_sac__cpu2.csv

Parts, each with a baseline that its ratios refer to, measured in the same run:
    physics       control steps per second over all environments (10 substeps of 10 ms each), random actions, no images,
                  rewards or resets: MuJoCo's C library on one and on all cores, MuJoCo Warp on --device
    images        images per second of the wrist camera, poses from the middle of random episodes, refitting of the
                  renderer's trees and averaging included: 16 pixels with 1, 4 and 16 rays each, the same by the
                  renderer's own samples_per_pixel, and 128 pixels with area mean (the published way, and the baseline)
    learning      critic updates per second, with the actor's every fourth, sampling included: at the published sizes
                  (batch 512, critic 512 wide) and at this device's defaults; plain float32 and each way to be faster
    environment   env.step alone, with images, rewards and resets, random actions
    training      environment steps per second of the training loop of algos/squint_sac.py after the random phase;
                  set-up and evaluation are not in it

A row is the median of --blocks blocks of about equal length after a warm-up, with the slowest and the fastest block
beside it. A row that cannot run here stands in the table with the reason. Close other programs first: the rows are as
sensitive to them as any timing.
"""

import contextlib
import csv
import io
import os
import platform
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import mujoco_warp as mjw
import torch
import tyro
import warp as wp
from torch._inductor.exc import InductorError

from envs import so101

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import squint_sac  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)

Part = Literal["physics", "images", "learning", "environment", "training"]
COLUMNS = ("part", "what", "at", "unit", "per_second", "range", "ratio", "remark")
SMALL, LARGE = 16, 128  # pixels a side: what is trained on, what the paper renders


@dataclass
class Args:
    env_id: str = "SO101ReachCube-v1"
    """an SO-101 task"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where Warp, images, learning and training run; MuJoCo's C library runs on the CPU in any case"""
    num_envs: int | None = None
    """environments; None: the default of algos/squint_sac.py on this device"""
    seconds: float = 10.0
    """time measured for a row, without its warm-up; training takes the learning starts on top"""
    blocks: int = 5
    """parts that a row's time is divided into"""
    parts: tuple[Part, ...] = ("physics", "images", "learning", "environment", "training")
    """what to measure"""
    out: Path | None = None
    """CSV file to write; docs/results/throughput/squint_sac__<hardware>.csv is what the docs show"""
    seed: int = 1
    """seed of environments, actions and weights"""

    def check(self) -> None:
        """Raises ValueError at the first choice that cannot work. (In __post_init__ tyro would reword it.)"""
        for wrong, message in (
            (
                self.env_id not in so101.TASKS,
                f"--env-id {self.env_id}: known are {', '.join(so101.TASKS)}",
            ),
            (
                self.seconds <= 0 or self.blocks < 1,
                "--seconds must be above 0, --blocks at least 1",
            ),
            (self.num_envs is not None and self.num_envs < 1, "--num-envs must be at least 1"),
            (
                self.device.startswith("cuda") and not torch.cuda.is_available(),
                "no CUDA device here: use --device cpu",
            ),
        ):
            if wrong:
                raise ValueError(message)


# --- Timing and the table ---------------------------------------------------------------------------------------------
def speeds(
    work: Callable[[], None],
    amount: int,
    args: Args,
    prepare: Callable[[], None] | None = None,
    most: int | None = None,
) -> list[float]:
    """Amount per second of calls of `work`, one number a block.

    amount: what one call does. prepare: called before each block, outside its time. most: calls that one `prepare`
    is good for; a block that needs more is made of several stretches.
    """
    prepare = prepare or (lambda: None)

    def stretch(calls: int) -> float:
        prepare()
        wait(args.device)
        begin = time.perf_counter()
        for _ in range(calls):
            work()
        wait(args.device)
        return time.perf_counter() - begin

    for _ in range(3):  # kernels are loaded, graphs captured, caches filled
        stretch(1)
    calls, seconds = 1, stretch(1)
    while seconds < 0.1 * args.seconds / args.blocks and calls < (most or 1 << 20):
        calls = min(2 * calls, most or 1 << 20)
        seconds = stretch(calls)
    stretches = max(1, round(args.seconds / args.blocks / seconds))
    return [
        stretches * calls * amount / sum(stretch(calls) for _ in range(stretches))
        for _ in range(args.blocks)
    ]


def wait(device: str) -> None:
    """Waits for what the host has asked of the device."""
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


class Table:
    """Rows as they come: printed at once, written to the file after each, so that an interrupted run keeps them."""

    def __init__(self, path: Path | None, facts: dict[str, str]):
        """path: the file; facts: what the numbers depend on, see `machine`."""
        self.path, self.rows, self.baseline = path, [], {}
        print(f"{'part':<12}{'what':<50}{'at':<34}{'per second':>12}{'ratio':>8}  remark")
        for what, text in facts.items():
            self._add(part="machine", what=what, at=text)

    def measured(
        self, part: str, what: str, at: str, unit: str, values: list[float], remark: str = ""
    ) -> None:
        """Adds a row; a part's first one is the baseline of its ratios (in learning, of each size)."""
        key, median = (part, at if part == "learning" else ""), statistics.median(values)
        first = key not in self.baseline
        ratio = median / self.baseline.setdefault(key, median)
        self._add(
            part=part, what=what, at=at, unit=unit, per_second=f"{median:.4g}", ratio=f"{ratio:.3g}",
            range=f"{min(values):,.4g} to {max(values):,.4g}",
            remark="; ".join(filter(None, ("baseline" if first else "", remark))),
        )  # fmt: skip

    def missing(self, part: str, what: str, at: str, reason: str) -> None:
        """Adds a row for what was not measured."""
        self._add(part=part, what=what, at=at, remark=f"not measured: {reason}")

    def _add(self, **cells: str) -> None:
        row = {name: cells.get(name, "") for name in COLUMNS}
        self.rows.append(row)
        print(
            f"{row['part']:<12}{row['what']:<50}{row['at']:<34}{row['per_second']:>12}{row['ratio']:>8}  "
            f"{row['remark']}",
            flush=True,
        )
        if self.path:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with self.path.open("w", newline="") as file:
                writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
                writer.writeheader()
                writer.writerows(self.rows)


def machine(args: Args) -> dict[str, str]:
    """What the numbers depend on: processor, device, versions, command."""
    names = (
        [
            line.partition(":")[2].strip()
            for line in Path("/proc/cpuinfo").read_text().splitlines()
            if line.startswith("model name")
        ]
        if Path("/proc/cpuinfo").exists()
        else []
    )
    processor = names[0] if names else platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    facts = {
        "processor": f"{processor}, {cores()} cores; torch uses {threads} thread{'s' * (threads > 1)}"
    }
    if args.device.startswith("cuda"):
        facts["device"] = torch.cuda.get_device_name(args.device)
    facts["versions"] = ", ".join(
        f"{name} {version(name)}" for name in ("torch", "mujoco", "mujoco-warp", "warp-lang")
    )

    def git(*words: str) -> str:
        return subprocess.run(("git", *words), cwd=ROOT, capture_output=True, text=True).stdout

    if shutil.which("git") and (commit := git("rev-parse", "--short", "HEAD").strip()):
        changed = (
            " with changes" if git("status", "--porcelain", "--untracked-files=no").strip() else ""
        )
        facts["commit"] = commit + changed
    options = [
        f"--{f.name.replace('_', '-')} {' '.join(value) if isinstance(value, tuple) else value}"
        for f in fields(args)
        if f.name != "out" and (value := getattr(args, f.name)) != f.default
    ]
    facts["command"] = " ".join(["python benchmarks/throughput.py", *options])
    return facts


def cores() -> int:
    """Processor cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


# --- Physics and images -----------------------------------------------------------------------------------------------
def make_env(args: Args, device: str, **options) -> so101.SO101Env:
    """The task's environment with equal starts whatever the options; it draws only when asked to."""
    return so101.make(
        args.env_id, args.num_envs, device, seed=args.seed, stagger=False, images=False, **options
    )


def random_targets(env: so101.SO101Env, seed: int) -> torch.Tensor:
    """Controller targets of an episode of uniformly random actions, from the present ones: (HORIZON + 1, N, 6) rad."""
    generator = torch.Generator(env.device).manual_seed(seed)
    targets = [env.target.clone()]
    for _ in range(so101.HORIZON):
        actions = torch.rand(targets[0].shape, generator=generator, device=env.device) * 2 - 1
        targets.append(
            (targets[-1] + actions * env.action_scale).clamp(env.joint_low, env.joint_high)
        )
    return torch.stack(targets)


def physics(args: Args, table: Table) -> None:
    """Control steps per second of each engine, an episode of random actions after another."""
    engines = [
        ("MuJoCo C, 1 thread", "cpu", dict(engine="mujoco", threads=1)),
        (f"MuJoCo C, {cores()} threads", "cpu", dict(engine="mujoco", threads=cores())),
        (f"MuJoCo Warp, {torch.device(args.device).type}", args.device, dict(engine="warp")),
    ]
    for what, device, options in engines:
        env = make_env(args, device, **options)
        targets, step = random_targets(env, args.seed), [0]
        first_qpos, first_qvel = env.qpos.clone(), env.qvel.clone()
        everything = torch.arange(args.num_envs, device=env.device)

        def begin(env=env, everything=everything, qpos=first_qpos, qvel=first_qvel, step=step):
            env.physics.set_state(everything, qpos, qvel)
            step[0] = 0

        def work(env=env, targets=targets, step=step):
            env.physics.step(targets[step[0]], targets[step[0] + 1], env.delay)
            step[0] += 1

        values = speeds(work, args.num_envs, args, begin, most=so101.HORIZON)
        table.measured("physics", what, f"{args.num_envs} environments", "control steps", values)
        env.close()
    if torch.device(args.device).type == "cpu":
        table.missing(
            "physics", "MuJoCo Warp, cuda", f"{args.num_envs} environments", "no CUDA device here"
        )


def images(args: Args, table: Table) -> None:
    """Images per second of each way to a 16-pixel image."""
    walker = make_env(args, args.device)
    for target in random_targets(walker, args.seed)[1 : so101.HORIZON // 2]:
        walker.step((target - walker.target) / walker.action_scale)
    qpos = walker.qpos.clone()
    walker.close()

    def scene(size: int, rays: int):
        env = make_env(args, args.device, render_size=size, samples_per_pixel=rays)
        env.scene.qpos.copy_(qpos)
        env.scene.kinematics()
        return env.scene

    at, unit = f"{args.num_envs} environments", "images"
    large = scene(LARGE, 1)
    values = speeds(lambda: squint_sac.squint(large.draw(), SMALL), args.num_envs, args)
    table.measured("images", f"{LARGE} px, 1 ray a pixel, area mean to {SMALL}", at, unit, values)
    for rays in (1, 4, 16):
        fine = scene(SMALL, rays)
        values = speeds(fine.draw, args.num_envs, args)
        table.measured(
            "images", f"{SMALL} px, {rays} ray{'s' * (rays > 1)} a pixel", at, unit, values
        )
    for per_axis in (2, 4):
        fine = scene(SMALL, 1)
        draw = own_samples(fine, per_axis)
        values = speeds(draw, args.num_envs, args)
        what = f"{SMALL} px, {per_axis**2} rays, renderer's own samples_per_pixel"
        table.measured("images", what, at, unit, values, "one field of view for all environments")


def own_samples(scene, per_axis: int) -> Callable[[], torch.Tensor]:
    """A function that draws `scene` with the renderer's own averaging, uint8 (N, 16, 16, 3), to compare ours with."""
    with wp.ScopedDevice(scene.device):
        context = mjw.create_render_context(
            scene.mjm, nworld=scene.n, cam_res=(SMALL, SMALL), cam_active=list(scene.cameras), render_rgb=True,
            render_depth=False, use_textures=False, use_shadows=False, enabled_geom_groups=[2], enable_specular=False,
            enable_emission=False, background_color=(0.0, 0.0, 0.0, 1.0), samples_per_pixel=per_axis,
        )  # fmt: skip
    pixels = wp.to_torch(context.rgb_data).view(torch.uint8).view(scene.n, SMALL, SMALL, 4)
    graph = [None]

    def launches():
        mjw.refit_bvh(scene.m, scene.d, context)
        mjw.render(scene.m, scene.d, context)

    def draw() -> torch.Tensor:
        graph[0] = scene.run(launches, graph[0])
        return pixels[..., [2, 1, 0]].contiguous()

    return draw


# --- Learning ---------------------------------------------------------------------------------------------------------
def training_args(args: Args, *options: str) -> squint_sac.Args:
    """The algorithm's own arguments for this task and device, as its command line would give them."""
    words = ["--env-id", args.env_id, "--device", args.device, "--seed", str(args.seed), *options]
    return squint_sac.parse_args(words)


def learner(hyper: squint_sac.Args) -> Callable[[], dict]:
    """A function that does one block of updates, sampling included, on a full buffer of random transitions."""
    torch.manual_seed(hyper.seed)
    n, device = hyper.num_envs, hyper.device
    shapes = dict(
        channels=3, state=so101.SO101Env.state_dim, privileged=0, action=so101.SO101Env.action_dim
    )
    obs = {"rgb": torch.zeros((n, SMALL, SMALL, 3), dtype=torch.uint8, device=device),
           "state": torch.zeros((n, shapes["state"]), device=device)}  # fmt: skip
    obs["critic_state"] = obs["state"]
    actions, rewards = (
        torch.zeros((n, shapes["action"]), device=device),
        torch.zeros(n, device=device),
    )
    replay = squint_sac.Replay(
        squint_sac.transition(obs, obs, actions, rewards), hyper.buffer_size // n
    )
    for value in replay.data.values():
        value.random_(0, 256) if value.dtype == torch.uint8 else value.uniform_(-1, 1)
    replay.added = replay.rows
    update = squint_sac.make_update(squint_sac.Agent(hyper, shapes), hyper)
    return lambda: update(replay.sample(hyper.policy_frequency, hyper.batch_size))


def learning(args: Args, table: Table) -> None:
    """Critic updates per second, plain and by each of the faster routes."""
    cuda = args.device.startswith("cuda")
    no_compiler = (
        ""
        if cuda or shutil.which("g++") or shutil.which("clang++")
        else "torch.compile needs a C++ compiler on a CPU: install g++"
    )
    no_cuda = "" if cuda else "CUDA graphs need a CUDA device"
    routes = [
        ("plain, float32", dict(), ""),
        ("bfloat16", dict(amp=True), ""),
        ("compiled", dict(compile=True), no_compiler),
        ("compiled, bfloat16", dict(compile=True, amp=True), no_compiler),
        ("CUDA graph", dict(cudagraphs=True), no_cuda),
        (
            "CUDA graph, compiled, bfloat16",
            dict(cudagraphs=True, compile=True, amp=True),
            no_cuda or no_compiler,
        ),
    ]
    defaults = training_args(args)
    published = replace(
        defaults, batch_size=squint_sac.Args.batch_size, critic_hidden=squint_sac.Args.critic_hidden
    )
    sizes = {
        f"batch {hyper.batch_size}, critic {hyper.critic_hidden}": hyper
        for hyper in (published, defaults)
    }
    for at, hyper in sizes.items():
        for what, route, why_not in routes:
            if why_not:
                table.missing("learning", what, at, why_not)
                continue
            plain = dict(amp=False, compile=False, cudagraphs=False)
            hyper = replace(hyper, **(plain | route))
            torch.compiler.reset()
            block = learner(hyper)
            try:
                values = speeds(block, hyper.policy_frequency, args)
            except (InductorError, torch.OutOfMemoryError) as error:
                table.missing("learning", what, at, str(error).splitlines()[0])
            else:
                table.measured("learning", what, at, "critic updates", values)
            del block
            torch.cuda.empty_cache()


# --- The whole --------------------------------------------------------------------------------------------------------
def environment(args: Args, table: Table) -> None:
    """env.step as training uses it, at the size that this device renders by default and at the published one."""
    hyper = training_args(args)
    for size, rays in dict.fromkeys(
        ((hyper.render_size, hyper.samples_per_pixel), (LARGE, 1), (SMALL, 4))
    ):
        env = so101.make(args.env_id, args.num_envs, args.device, seed=args.seed, render_size=size,
                         samples_per_pixel=rays, stagger=True)  # fmt: skip
        generator = torch.Generator(env.device).manual_seed(args.seed)

        def work(env=env, generator=generator):
            env.step(
                torch.rand((env.num_envs, env.action_dim), generator=generator, device=env.device)
                * 2
                - 1
            )

        default = (
            "what training uses"
            if (size, rays) == (hyper.render_size, hyper.samples_per_pixel)
            else ""
        )
        what = f"env.step, engine {env.engine}, {size} px, {rays} ray{'s' * (rays > 1)} a pixel"
        table.measured(
            "environment",
            what,
            f"{args.num_envs} environments",
            "environment steps",
            speeds(work, args.num_envs, args),
            default,
        )
        env.close()


def training(args: Args, table: Table) -> None:
    """squint_sac.train itself; its own log gives the times of the blocks."""
    ways = {"defaults": (), "plain, float32": ("--no-amp", "--no-compile", "--no-cudagraphs")}
    seen = []
    for what, options in ways.items():
        hyper = training_args(args, "--num-envs", str(args.num_envs), *options)
        if hyper in seen:  # on a CPU the defaults are the plain way
            continue
        seen.append(hyper)
        at = f"{hyper.num_envs} environments, {hyper.num_updates} x {hyper.batch_size}"
        per_second = [loop(hyper, 2)[-1]]  # how long a block has to be
        steps = max(1, round(per_second[0] * args.seconds / args.blocks / hyper.num_envs))
        table.measured("training", what, at, "environment steps", loop(hyper, args.blocks, steps))


def loop(hyper: squint_sac.Args, blocks: int, vector_steps: int = 4) -> list[float]:
    """Environment steps per second of `blocks` blocks of training, after the learning starts and one more block."""
    block = vector_steps * hyper.num_envs
    first = (
        -(-hyper.learning_starts // block) * block + block
    )  # compiling and capturing fall into the block before
    with (
        tempfile.TemporaryDirectory() as folder,
        contextlib.chdir(folder),  # a run goes to runs/ below
        contextlib.redirect_stdout(io.StringIO()),
        contextlib.redirect_stderr(io.StringIO()),
    ):
        squint_sac.train(replace(
            hyper, name="run", total_timesteps=first + blocks * block, log_freq=block, eval_freq=1 << 60,
            eval_episodes=1, eval_envs=1, capture_video=False, track=False, save_buffer=False,
        ))  # fmt: skip
        with Path("runs/run/metrics.csv").open() as file:
            times = {
                int(float(row["global_step"])): float(row["train_time"])
                for row in csv.DictReader(file)
            }
    marks = [first + k * block for k in range(blocks + 1)]
    return [block / (times[b] - times[a]) for a, b in zip(marks, marks[1:], strict=False)]


def main(args: Args) -> None:
    """Measures what `args` names and prints it. Raises ValueError for arguments that do not fit."""
    args.check()
    torch.set_float32_matmul_precision("high")  # as training does
    table = Table(args.out, machine(args))
    args.num_envs = args.num_envs or training_args(args).num_envs
    for part in args.parts:
        {"physics": physics, "images": images, "learning": learning, "environment": environment,
         "training": training}[part](args, table)  # fmt: skip
    if args.out:
        print(f"wrote {len(table.rows)} rows to {args.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
