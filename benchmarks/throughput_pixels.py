"""How fast DeepMind Control is simulated, drawn and trained on, on the machine at hand, in one run.

    python benchmarks/throughput_pixels.py                           print the table
    python benchmarks/throughput_pixels.py --out docs/results/throughput/pixels__cpu2.csv

Parts, each with a baseline that its ratios refer to, measured in the same run; a frame is one control step of the
task, of which the agent's step has --action-repeat:
    physics       frames per second without images, in one process and in --processes of them
    pictures      images per second of one state, --image-size pixels a side: OpenGL by EGL with its defaults (the
                  baseline, and what was published), OSMesa, with fast_render, and MuJoCo Warp with 4 and 1 rays a
                  pixel, one environment and --batch at once (environments in the middle of random episodes)
    environment   frames per second of env.step, images and episodes' ends included, random actions: one environment
                  here, then several in processes, by each renderer
    learning      updates per second, sampling and augmentation included, of algos/drqv2.py and algos/sac_pixels.py: at
                  the published sizes (84 pixels, batch 256 for both) and at the defaults of a CPU; plain float32
                  and each way to be faster
    training      frames per second of the training loop of algos/drqv2.py at its defaults on this device, by the number
                  of environments, after the random phase; set-up and evaluation are not in it
    original      frames per second of CPU time of a whole training loop, with the authors' code (--original FOLDER, a
                  checkout of facebookresearch/drqv2; the baseline) and with algos/drqv2.py, at 84 pixels as published
                  and at 48 with a narrower head; both draw with OpenGL's defaults, in their own process, and take turns

In `learning`, drqv2's rows say what share of the processor's peak its arithmetic reaches: floating-point operations
of an update over those of a product of two large float32 matrices, timed just before.

A row is the median of --blocks blocks of about equal length after a warm-up, with the slowest and the fastest block
beside it. A row that cannot run here stands in the table with the reason. Close other programs first: the rows are as
sensitive to them as any timing.
"""

import contextlib
import csv
import gc
import importlib
import io
import os
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, fields, replace
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest import mock

import numpy as np
import throughput
import torch
import tyro
from throughput import cores, speeds, wait
from torch._inductor.exc import InductorError
from torch.utils.flop_counter import FlopCounterMode

from envs import check, dmc

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import drqv2  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import them)
import sac_pixels  # noqa: E402

Part = Literal["physics", "pictures", "environment", "learning", "training", "original"]


@dataclass
class Args:
    env_id: str = "walker_walk"
    """a DeepMind Control task"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """where Warp, learning and training run; physics and OpenGL choose for themselves"""
    image_size: int = 84
    """pixels a side, of images and of environments"""
    action_repeat: int = 2
    """frames for which an action is held"""
    processes: int | None = None
    """processes of environments; None: one for each core, but no more than 16"""
    batch: int = 64
    """environments that Warp draws at once"""
    seconds: float = 10.0
    """time measured for a row, without its warm-up; training takes the learning starts on top"""
    blocks: int = 5
    """parts that a row's time is divided into"""
    parts: tuple[Part, ...] = ("physics", "pictures", "environment", "learning", "training")
    """what to measure"""
    algos: tuple[Literal["drqv2", "sac_pixels"], ...] = ("drqv2", "sac_pixels")
    """in learning: whose updates"""
    sizes: tuple[Literal["published", "cpu"], ...] = ("published", "cpu")
    """in learning: at which sizes; the published ones take seconds an update on a CPU"""
    routes: tuple[str, ...] = ("plain", "bfloat16", "compiled", "CUDA graph")
    """in learning: routes whose names begin so"""
    original: Path | None = None
    """in original: a checkout of https://github.com/facebookresearch/drqv2"""
    out: Path | None = None
    """CSV file to write; docs/results/throughput/pixels__<hardware>.csv is what the docs show"""
    seed: int = 1
    """seed of episodes, actions and weights"""

    def check(self) -> None:
        """Raises ValueError at the first choice that cannot work. (In __post_init__ tyro would reword it.)"""
        for wrong, message in (
            (
                self.seconds <= 0 or self.blocks < 1,
                "--seconds must be above 0, --blocks at least 1",
            ),
            (
                min(self.batch, self.processes or 1) < 1,
                "--batch and --processes must be at least 1",
            ),
            (
                self.device.startswith("cuda") and not torch.cuda.is_available(),
                "no CUDA device here: use --device cpu",
            ),
        ):
            if wrong:
                raise ValueError(message)


def machine(args: Args) -> dict[str, str]:
    """What the numbers depend on: processor, device, OpenGL's driver, versions, command."""
    facts = throughput.machine(args)
    if (opengl := check.ask("egl")).works:
        facts["OpenGL"] = opengl.detail.partition(" drawn by ")[2]
    facts["versions"] += f", dm-control {version('dm-control')}"
    facts["load"] = f"{os.getloadavg()[0]:.1f} programs wanted a core in the minute before"
    options = [
        f"--{f.name.replace('_', '-')} {' '.join(value) if isinstance(value, tuple) else value}"
        for f in fields(args)
        if f.name != "out" and (value := getattr(args, f.name)) != f.default
    ]
    facts["command"] = " ".join(["python benchmarks/throughput_pixels.py", *options])
    return facts


# --- Simulation and images --------------------------------------------------------------------------------------------
def renderers() -> dict[str, tuple[dict, str]]:
    """Name -> options of `dmc.make`, and why it cannot be measured here, or nothing."""
    found = {}
    for name in ("egl", "osmesa"):
        result = check.ask(name)
        why_not = "" if result.works else result.detail
        found[f"OpenGL by {name}"] = (dict(renderer=name), why_not)
        if name == "egl":
            found["OpenGL by egl, fast_render"] = (dict(renderer=name, fast_render=True), why_not)
    return found | {f"MuJoCo Warp, {rays} ray{'s' * (rays > 1)} a pixel":
                    (dict(renderer="warp", samples_per_pixel=rays), "") for rays in (4, 1)}  # fmt: skip


def make(args: Args, num_envs: int, **options) -> dmc.DMCEnv:
    """The task's environment; OpenGL of any backend works beside any other because each gets a process."""
    options = {"workers": 1, "image_size": args.image_size} | options
    return dmc.make(
        args.env_id,
        num_envs,
        args.device,
        seed=args.seed,
        action_repeat=args.action_repeat,
        **options,
    )


def random_actions(args: Args, env: dmc.DMCEnv):
    """A function that returns uniformly random actions (N, A), new at every call."""
    generator = torch.Generator().manual_seed(args.seed)
    return lambda: torch.rand((env.num_envs, env.action_dim), generator=generator) * 2 - 1


def physics(args: Args, table: throughput.Table) -> None:
    """Frames per second of the simulation: the parts of env.step that are left when nothing is drawn."""
    for processes in dict.fromkeys((1, args.processes)):
        env = make(args, processes, renderer="warp", workers=processes, image_size=4)
        env._tensor = lambda views: torch.zeros(len(views), 4, 4, 3, dtype=torch.uint8)  # no images
        act = random_actions(args, env)
        values = speeds(
            lambda env=env, act=act: env.step(act()), processes * args.action_repeat, args
        )
        plural = "es" if processes > 1 else ""
        table.measured(
            "physics", "MuJoCo C, no pictures", f"{processes} process{plural}", "frames", values
        )
        env.close()


def pictures(args: Args, table: throughput.Table) -> None:
    """Images per second of each renderer."""
    for name, (options, why_not) in renderers().items():
        for n in (1, args.batch) if "Warp" in name else (1,):
            at = f"{n} environment{'s' * (n > 1)}, {args.image_size} px"
            if why_not:
                table.missing("pictures", name, at, why_not)
                continue
            env = make(args, n, **options)
            act = random_actions(args, env)
            for _ in range(20):
                env.step(act())
            if options["renderer"] == "warp":
                scene, things = env._scene(n, args.image_size, env.camera), env._all("views")
                things = np.stack(things)
                values = speeds(lambda scene=scene, things=things: scene.draw(things), n, args)
            else:

                def draw(
                    env=env, times=8
                ):  # several in one request, so that the pipe does not count
                    env._all("views", lambda share: (times,))

                values = speeds(draw, 8, args)
            table.measured("pictures", name, at, "pictures", values)
            env.close()


def environment(args: Args, table: throughput.Table) -> None:
    """Frames per second of env.step, by renderer and number of environments."""
    for name, (options, why_not) in renderers().items():
        for n in dict.fromkeys((1, args.processes, 4 * args.processes)):
            workers = min(n, args.processes)
            at = f"{n} environment{'s' * (n > 1)} in {workers} process{'es' * (workers > 1)}"
            if why_not:
                table.missing("environment", name, at, why_not)
                continue
            env = make(args, n, workers=workers, **options)
            act = random_actions(args, env)
            values = speeds(lambda env=env, act=act: env.step(act()), n * args.action_repeat, args)
            table.measured("environment", name, at, "frames", values)
            env.close()


# --- Learning ---------------------------------------------------------------------------------------------------------
def learner(algo, hyper):
    """What updates from a full buffer of random transitions -> a function, critic updates of one call of it."""
    device, action_dim = hyper.device, 6
    torch.manual_seed(hyper.seed)
    shapes = dict(channels=3, state=0, action=action_dim)
    size = getattr(hyper, "render_size", hyper.image_size)
    slots = 50_000 if device.startswith("cuda") else 4_000
    rgb = torch.zeros((1, size, size, 3), dtype=torch.uint8, device=device)
    obs = {"rgb": rgb, "state": torch.zeros((1, 0), device=device)}
    still = torch.zeros((1, action_dim), device=device)
    n_step = getattr(hyper, "n_step", 1)
    replay = algo.Replay(obs, still, replace(hyper, buffer_size=slots), n_step)
    replay.data["rgb"].random_(0, 256)
    replay.data["actions"].uniform_(-1, 1)
    replay.data["rewards"].uniform_(0, 1)
    replay.data["discounts"].fill_(1)
    age = torch.arange(slots) % 501  # episodes of 500 steps
    replay.data["age"].copy_(age)
    replay.data["final"].copy_(age == 500)
    replay.head += slots - 1
    if algo is drqv2:
        agent = drqv2.Agent(hyper, shapes).to(device)
        one_update = drqv2.make_update(agent, drqv2.make_optimizers(agent, hyper), hyper)
        std = torch.full((), 0.5, device=device)
        return lambda: one_update(replay.sample(hyper.batch_size), std), 1
    agent = sac_pixels.Agent(hyper, shapes).to(device, memory_format=torch.channels_last)
    learn = sac_pixels.make_update(agent, sac_pixels.make_optimizers(agent, hyper), hyper)
    count = hyper.policy_frequency
    return lambda: learn([replay.sample(hyper.batch_size) for _ in range(count)]), count


def peak(args: Args) -> float:
    """Floating-point operations per second of a large product of float32 matrices."""
    size = 8192 if args.device.startswith("cuda") else 2048
    a, b = torch.randn((2, size, size), device=args.device).unbind()
    return max(speeds(lambda: torch.mm(a, b), 2 * size**3, replace(args, seconds=args.seconds / 5)))


def operations(work) -> int:
    """Floating-point operations of the products and convolutions, forward and back, in one call of `work`."""
    with FlopCounterMode(display=False) as counter:
        work()
    return counter.get_total_flops()


def learning(args: Args, table: throughput.Table) -> None:
    """Updates per second of both algorithms, plain and by each of the faster routes."""
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
    for algo in (algo for algo in (drqv2, sac_pixels) if algo.__name__ in args.algos):
        name = algo.__name__
        for label, of in (
            ("published", "cuda"),
            ("CPU's", "cpu"),
        ):  # whose defaults; they run on args.device
            if {"cuda": "published", "cpu": "cpu"}[of] not in args.sizes:
                continue
            hyper = algo.parse_args(["--env-id", "cartpole_swingup", "--device", of])
            batch = (
                256 if of == "cuda" else hyper.batch_size
            )  # sac_pixels' own is 512: the same for both here
            hyper = replace(hyper, device=args.device, num_envs=1, update_every=1, batch_size=batch)
            at = f"{name}, {label}: {hyper.image_size} px, batch {batch}"
            for what, route, why_not in routes:
                if not what.startswith(args.routes):
                    continue
                if why_not:
                    table.missing("learning", what, at, why_not)
                    continue
                torch.compiler.reset()
                plain = dict(amp=False, compile=False, cudagraphs=False)
                try:
                    work, updates = learner(algo, replace(hyper, **plain | route))
                    share = ""
                    if algo is drqv2 and not route:
                        most, flops = peak(args), operations(work)
                    values = speeds(work, updates, args)
                    if algo is drqv2 and "amp" not in route:
                        rate = flops * statistics.median(values)
                        share = f"{rate / most:.0%} of the peak, {most / 1e9:,.0f} GFLOP/s"
                except (InductorError, torch.OutOfMemoryError) as error:
                    table.missing("learning", what, at, str(error).splitlines()[0])
                else:
                    table.measured("learning", what, at, "critic updates", values, share)
                work = None
                gc.collect()
                torch.cuda.empty_cache()


# --- The whole --------------------------------------------------------------------------------------------------------
def training(args: Args, table: throughput.Table) -> None:
    """drqv2.train itself; its own log gives the times of the blocks."""
    for n in dict.fromkeys((1, args.processes)):
        words = [
            "--env-id",
            args.env_id,
            "--device",
            args.device,
            "--seed",
            str(args.seed),
            "--num-envs",
            str(n),
        ]
        hyper = drqv2.parse_args([*words, "--action-repeat", str(args.action_repeat)])
        at = f"{n} environment{'s' * (n > 1)}, {hyper.image_size} px, batch {hyper.batch_size}"
        steps = max(n, 8)  # how long a block has to be is found out first
        rate = loop(hyper, 2, steps)[-1]
        steps = max(steps, round(rate * args.seconds / args.blocks / args.action_repeat / n) * n)
        table.measured("training", "drqv2, defaults", at, "frames", loop(hyper, args.blocks, steps))


def loop(hyper: drqv2.Args, blocks: int, block: int) -> list[float]:
    """Frames per second of `blocks` blocks of training of so many transitions, after the learning starts."""
    block = -(-block // hyper.num_envs) * hyper.num_envs
    first = (
        -(-hyper.learning_starts // block) * block + block
    )  # compiling and capturing fall into the block before
    with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder), \
            contextlib.redirect_stdout(io.StringIO()), \
            contextlib.redirect_stderr(io.StringIO()):  # fmt: skip
        drqv2.train(replace(
            hyper, name="run", total_timesteps=first + blocks * block, log_freq=block, eval_freq=1 << 60,
            eval_episodes=1, eval_envs=1, capture_video=False, track=False, save_buffer=False,
            buffer_size=min(hyper.buffer_size, max(20_000, 4 * (first + blocks * block))),
        ))  # fmt: skip
        with Path("runs/run/metrics.csv").open() as file:
            times = {
                int(float(row["global_step"])): float(row["train_time"])
                for row in csv.DictReader(file)
            }
    marks = [first + k * block for k in range(blocks + 1)]
    return [
        block * hyper.action_repeat / (times[b] - times[a])
        for a, b in zip(marks, marks[1:], strict=False)
    ]


# --- The authors' loop ------------------------------------------------------------------------------------------------
SIZES = {
    84: dict(batch_size=256, hidden=1024),
    48: dict(batch_size=64, hidden=256),
}  # by pixels a side
TASK = dict(env_id="cartpole_balance", frame_stack=3, action_repeat=2)


def turns(step):
    """`step`, which at its first call and then after every so many waits for a number on standard input, the steps of
    the next block, and prints the CPU seconds that the block before took."""
    left, since = 0, 0.0

    def counted(*given):
        nonlocal left, since
        if left == 0:
            print("seconds", time.process_time() - since, flush=True)
            left, since = int(input()), time.process_time()
        left -= 1
        return step(*given)

    return counted


def our_loop(size: int) -> None:
    hyper = drqv2.Args(
        device="cpu", amp=False, compile=False, cudagraphs=False, image_size=size, buffer_size=20_000,
        learning_starts=16, random_steps=0, capture_video=False, eval_freq=1 << 60, eval_envs=1, eval_episodes=1,
        total_timesteps=1 << 60, **SIZES[size], **TASK,
    )  # fmt: skip
    env = dmc.make(hyper.env_id, 1, "cpu", seed=1, image_size=size, workers=0)
    env.step_begin = turns(env.step_begin)
    drqv2.make_envs = lambda args: (env, env)
    drqv2.train(hyper)


def their_loop(size: int, folder: Path) -> None:
    """Their Workspace.train from `folder`, configured as their files say. Stubs for what only configures and logs."""
    for name in ("hydra", "omegaconf", "termcolor", "torchvision", "torch.utils.tensorboard"):
        sys.modules.setdefault(name, mock.MagicMock())
    sys.modules["hydra"].main = lambda **given: lambda main: main
    del sys.modules["drqv2"]
    sys.path.insert(0, str(folder))
    train, agents, tasks, storage = (
        importlib.import_module(name) for name in ("train", "drqv2", "dmc", "replay_buffer")
    )
    wrapper, of = tasks.pixels.Wrapper, SIZES[size]

    def of_size(env, render_kwargs, **given):
        return wrapper(env, render_kwargs=render_kwargs | dict(height=size, width=size), **given)

    tasks.pixels.Wrapper = of_size
    convolutions = agents.Encoder.__init__

    def encoder(self, shape):  # they know 84 pixels alone
        convolutions(self, shape)
        self.repr_dim = 32 * ((size - 3) // 2 - 5) ** 2

    agents.Encoder.__init__ = encoder
    spec = tasks.ExtendedTimeStepWrapper.action_spec  # float64 by today's dm_control
    tasks.ExtendedTimeStepWrapper.action_spec = lambda self: spec(self).replace(dtype=np.float32)
    settings = dict(
        device="cpu", lr=1e-4, feature_dim=50, hidden_dim=of["hidden"], critic_target_tau=0.01, num_expl_steps=0,
        update_every_steps=2, stddev_schedule="linear(1.0,0.1,100000)", stddev_clip=0.3, use_tb=False,
    )  # fmt: skip
    train.make_agent = lambda seen, acted, cfg: agents.DrQV2Agent(
        seen.shape, acted.shape, **settings
    )
    train.Logger = mock.MagicMock()
    train.Workspace.eval = lambda self: None
    cfg = dict(
        task_name=TASK["env_id"], seed=1, device="cpu", frame_stack=3, action_repeat=2, discount=0.99, nstep=3,
        batch_size=of["batch_size"], replay_buffer_size=20_000, replay_buffer_num_workers=0, save_snapshot=False,
        save_video=False, save_train_video=False, use_tb=False, agent=None, num_train_frames=1 << 60,
        num_seed_frames=0, eval_every_frames=1 << 60,
    )  # fmt: skip
    work = train.Workspace(SimpleNamespace(**cfg))
    first = work.train_env.reset()
    for t in range(501):  # an episode to begin with, in place of their 4,000 frames
        kind = tasks.StepType.LAST if t == 500 else tasks.StepType.MID
        work.replay_storage.add(first._replace(step_type=kind))
    work.train_env.step = turns(work.train_env.step)
    work.train()


def original(args: Args, table: throughput.Table) -> None:
    """Both loops, each in a process of its own, in turns of one block after another."""
    for size, of in SIZES.items():
        at = f"{size} px, batch {of['batch_size']}, 1 thread"
        if args.original is None or not (args.original / "replay_buffer.py").is_file():
            table.missing(
                "original", "the authors' drqv2", at, "--original FOLDER names no checkout of it"
            )
            continue
        steps = 8 if size == 84 else 60  # of which every second one updates
        loops, rates = {}, {"the authors' drqv2": [], "algos/drqv2.py": []}
        with tempfile.TemporaryDirectory() as folder:
            for name, who in zip(rates, ("theirs", "ours"), strict=True):
                words = [
                    sys.executable,
                    __file__,
                    "loop",
                    who,
                    str(size),
                    str(args.original.resolve()),
                ]
                one = dict(MUJOCO_GL="egl", OMP_NUM_THREADS="1", LP_NUM_THREADS="1")
                loops[name] = subprocess.Popen(
                    words, cwd=folder, env=os.environ | one, text=True, stdin=subprocess.PIPE,
                    stdout=subprocess.PIPE, stderr=subprocess.DEVNULL,
                )  # fmt: skip
            for block in range(args.blocks + 1):
                for name, process in loops.items():
                    seconds = seconds_of(process, steps)
                    if block:  # the first answer is the start, the first block warms up
                        rates[name].append(steps * TASK["action_repeat"] / seconds)
            for process in loops.values():
                process.kill()
                process.wait()
        for name, values in rates.items():
            table.measured(f"original {size}", name, at, "frames of CPU time", values)


def seconds_of(process: subprocess.Popen, steps: int) -> float:
    """CPU seconds of `steps` steps of a loop behind `turns`. Raises RuntimeError if it has ended."""
    answers = []
    while len(answers) < 2:
        line = process.stdout.readline()
        if not line:
            raise RuntimeError(
                "a training loop ended early; start it alone to see why: see `original`"
            )
        if line.startswith("seconds"):
            answers.append(float(line.split()[1]))
            if len(answers) < 2:
                process.stdin.write(f"{steps}\n")
                process.stdin.flush()
    process.stdin.write("1\n")
    process.stdin.flush()
    return answers[1]


def main(args: Args) -> None:
    """Measures what `args` names and prints it. Raises ValueError for arguments that do not fit."""
    args.check()
    torch.set_float32_matmul_precision("high")  # as training does, and so the next line
    drqv2.keep_memory()
    table = throughput.Table(args.out, machine(args))
    args.processes = args.processes or min(cores(), 16)
    for part in args.parts:
        {"physics": physics, "pictures": pictures, "environment": environment, "learning": learning,
         "training": training, "original": original}[part](args, table)  # fmt: skip
        wait(args.device)
    if args.out:
        print(f"wrote {len(table.rows)} rows to {args.out}")


if __name__ == "__main__":
    if sys.argv[1:2] == ["loop"]:  # one of two loops, for `original`
        who, size, folder = sys.argv[2:]
        sys.exit(our_loop(int(size)) if who == "ours" else their_loop(int(size), Path(folder)))
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
