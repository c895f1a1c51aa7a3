"""How fast the Go1 is simulated and learnt from on the machine at hand, in one run.

    python benchmarks/throughput_go1.py                              print the table
    python benchmarks/throughput_go1.py --out docs/results/throughput/go1__cpu2.csv

Parts, each with a baseline that its ratios refer to, measured in the same run:
    memory        bytes that one environment carries from step to step, with and without randomised constants, and, to
                  compare, those of MJX's own data structure, which a plain loop carries. (No rate: bytes under "at")
    environment   control steps per second of Go1JoystickFlat (5 physics steps, rewards, observations, resets), random
                  actions, for each back end and number of environments. 20 steps are one program
    learning      gradient steps per second: an iteration's updates of algos/ppo_mjx_go1.py on one rollout, at the
                  published sizes and at those for a CPU
    training      control steps per second of the whole: acting, simulation and learning, at the defaults of a back
                  end. On mujoco-c the ways to do it, old and new, block by block in turn, with their CPU-seconds

A row is the median of --blocks blocks of about equal length after a warm-up (compilation is not timed), with the
slowest and the fastest block beside it. A row that cannot run here stands in the table with the reason. Close other
programs first: the rows are as sensitive to them as any timing. It needs the extras so101 and go1.
"""

import os
import sys
import time
from dataclasses import dataclass, fields, replace
from functools import partial
from importlib.metadata import version
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import mujoco
import numpy as np
import throughput
import tyro
from mujoco import mjx
from throughput import cores, speeds

from envs import go1

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import ppo_mjx_go1 as ppo  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)

Part = Literal["memory", "environment", "learning", "training"]
Backend = Literal["mujoco-c", "mjx-jax", "mjx-warp"]
TASK, STEPS = "Go1JoystickFlat", 20  # STEPS of one program


@dataclass
class Args:
    backends: tuple[Backend, ...] = ("mujoco-c", "mjx-jax", "mjx-warp")
    """back ends for environment and training"""
    num_envs: tuple[int, ...] = (64, 512, 4096)
    """numbers of environments"""
    seconds: float = 10.0
    """time measured for a row, without its warm-up"""
    blocks: int = 5
    """parts that a row's time is divided into"""
    parts: tuple[Part, ...] = ("memory", "environment", "learning", "training")
    """what to measure"""
    out: Path | None = None
    """CSV file to write; docs/results/throughput/go1__<hardware>.csv is what the docs show"""
    seed: int = 1
    """seed of environments, actions and weights"""

    def check(self) -> None:
        """Raises ValueError at the first choice that cannot work. (In __post_init__ tyro would reword it.)"""
        if self.seconds <= 0 or self.blocks < 1 or min(self.num_envs) < 1:
            raise ValueError("--seconds must be above 0, --blocks and --num-envs at least 1")

    device = "cpu"  # benchmarks/throughput.py waits for torch's device; here everything waits for its own results


def machine(args: Args) -> dict[str, str]:
    """What the numbers depend on: processor, devices, versions, commit, command."""
    facts = throughput.machine(throughput.Args(device="cpu"))
    facts["processor"] = facts["processor"].partition(";")[0]
    facts["devices"] = f"{jax.device_count()} x {jax.devices()[0].device_kind}"
    facts["load"] = f"{os.getloadavg()[0]:.1f} programs wanted a core in the minute before"
    names = ("jax", "flax", "optax", "mujoco", "mujoco-mjx", "warp-lang")
    facts["versions"] = ", ".join(f"{name} {version(name)}" for name in names)
    options = [
        f"--{f.name.replace('_', '-')} {' '.join(map(str, v)) if isinstance(v, tuple) else v}"
        for f in fields(args)
        if f.name != "out" and (v := getattr(args, f.name)) != f.default
    ]
    return facts | {"command": " ".join(["python benchmarks/throughput_go1.py", *options])}


def why_not(backend: str) -> str:
    """Why a back end is not measured here, or nothing."""
    if backend == "mjx-warp" and jax.default_backend() != "gpu":
        return "made for NVIDIA GPUs; on a CPU it is for tests"
    return ""


def memory(args: Args, table: throughput.Table) -> None:
    def size(tree) -> int:
        return sum(np.asarray(leaf).nbytes for leaf in jax.tree.leaves(tree))

    carried = (
        "qpos",
        "qvel",
        "warmstart",
        "command",
        "command_timer",
        "last_action",
        "air_time",
        "swing_peak",
        "contact",
        "push",
        "delay",
        "clock",
        "length",
        "returns",
        "key",
        "dr",
        "obs",
    )
    for what, varied in (
        ("carried by one environment", False),
        ("the same with randomised constants", True),
    ):
        env = go1.make(TASK, "mujoco-c", 1, domain_randomization=varied)
        state = env.reset(jax.random.key(args.seed))
        rest = size([getattr(state, name) for name in state._fields if name not in carried])
        remark = f"and {rest} bytes that a step reports: reward, ends, final observation, metrics"
        table._add(
            part="memory",
            what=what,
            at=f"{size([getattr(state, k) for k in carried])} bytes",
            remark=remark,
        )
    data = size(mjx.make_data(env.model, impl="jax"))
    table._add(
        part="memory",
        what="MJX's data structure alone",
        at=f"{data} bytes",
        remark="not carried here",
    )


def environment(args: Args, table: throughput.Table) -> None:
    for backend in args.backends:
        for n in args.num_envs:
            if reason := why_not(backend):
                table.missing("environment", backend, f"{n} environments", reason)
                continue
            env = go1.make(TASK, backend, domain_randomization=True, warp_worlds=n)
            key = jax.random.PRNGKey(args.seed)
            state = env.reset_batch(jax.random.split(key, n), stagger=True)
            actions = jax.random.uniform(key, (n, 12), minval=-0.3, maxval=0.3)

            def several(state, env=env, actions=actions):
                def step(state, _):
                    return env.step_batch(state, actions), None

                return jax.lax.scan(step, state, None, STEPS)[0]

            run, amount = jax.jit(several), n * STEPS
            kept = [state]

            def work(run=run, kept=kept):
                kept[0] = jax.block_until_ready(run(kept[0]))

            name = f"{backend}, {cores()} threads" if backend == "mujoco-c" else backend
            table.measured(
                "environment",
                name,
                f"{n} environments",
                "control steps",
                speeds(work, amount, args),
            )


def rollout(env, args: ppo.Args) -> tuple:
    """Networks, a learner, and random numbers in the shapes of a rollout (T, N, ...)."""
    shapes = dict(state=env.obs_dim, privileged_state=env.privileged_dim, action=env.action_dim)
    model, learner = ppo.new_learner(shapes, args)
    learner = learner._replace(stats=jax.tree.map(jnp.ones_like, learner.stats))
    rng, lead = np.random.default_rng(args.seed), (args.unroll_length, args.num_envs)

    def numbers(*shape):
        return jnp.asarray(rng.standard_normal((*lead, *shape), dtype=np.float32))

    batch = {name: numbers() for name in ("rewards", "values", "next_values", "log_probs")}
    batch |= {name: numbers(12) for name in ("raw", "loc")} | {"std": jnp.ones((*lead, 12))}
    batch |= {name: jnp.zeros(lead) for name in ("terminations", "truncations")}
    batch["obs"] = {name: numbers(shapes[name]) for name in ("state", "privileged_state")}
    return model, learner, batch


def learning(args: Args, table: throughput.Table) -> None:
    env = go1.make(TASK, "mujoco-c", 1)
    for label, backend in (("published", "mjx-jax"), ("CPU's", "mujoco-c")):
        hyper = ppo.parse_args(["--env-id", TASK, "--backend", backend, "--seed", str(args.seed)])
        share = hyper.num_envs // hyper.num_minibatches * hyper.unroll_length
        updates = hyper.num_minibatches * hyper.update_epochs
        model, learner, batch = rollout(env, hyper)
        learn = jax.jit(partial(ppo.learn, model=model, args=hyper))
        key, kept = jax.random.key(args.seed), [learner]

        def work(learn=learn, kept=kept, batch=batch, key=key):
            kept[0] = jax.block_until_ready(learn(kept[0], batch, key))[0]

        values = speeds(work, updates, args)
        remark = f"{updates / np.median(values):.3g} s for the {updates} of an iteration"
        at = f"{label} sizes: batch {share}"
        table.measured("learning", "plain", at, "updates", values, remark)


def training(args: Args, table: throughput.Table) -> None:
    for backend in args.backends:
        hyper = ppo.parse_args(["--env-id", TASK, "--backend", backend, "--seed", str(args.seed)])
        reason = why_not(backend)
        if backend != "mujoco-c" and jax.default_backend() == "cpu":
            reason = reason or "takes minutes for an iteration on a CPU: published sizes"
        if reason:
            table.missing("training", backend, sizes(hyper), reason)
        elif backend == "mujoco-c":
            training_in_c(hyper, args, table)
        else:
            work = one_program(hyper, ppo.make_envs(hyper)[0])
            values = speeds(work, hyper.num_envs * hyper.unroll_length, args)
            table.measured("training", backend, sizes(hyper), "control steps", values)


def sizes(hyper: ppo.Args) -> str:
    updates = hyper.num_minibatches * hyper.update_epochs
    return f"{hyper.num_envs} environments, {updates} updates for {hyper.unroll_length}"


def one_program(hyper: ppo.Args, env):
    """-> an iteration of acting, simulation and learning as one compiled program."""
    model, learner, _ = rollout(env, hyper)
    keys = jax.random.split(jax.random.PRNGKey(hyper.seed), hyper.num_envs)
    program = partial(ppo.iterate, env=env, model=model, args=hyper, iterations=1)
    program, kept = jax.jit(program), [learner, env.reset_batch(keys, stagger=True)]

    def work():
        kept[:] = jax.block_until_ready(program(*kept, np.int32(1)))[:2]

    return work


def in_threads(hyper: ppo.Args, env):
    """-> the same as training does it on mujoco-c."""
    model, learner, _ = rollout(env, hyper)
    keys = jax.random.split(jax.random.PRNGKey(hyper.seed), hyper.num_envs)
    shares = np.array_split(keys, ppo.SHARES)
    program = ppo.in_threads(env, model, hyper, 1)
    kept = [learner, tuple(env.reset_batch(share, stagger=True) for share in shares)]

    def work():
        kept[:] = jax.block_until_ready(program(*kept, np.int32(1)))[:2]

    return work


def training_in_c(hyper: ppo.Args, args: Args, table: throughput.Table) -> None:
    """Ways to train on mujoco-c, their blocks in turn: other programs slow all of them down alike."""
    before = ppo.make_envs(hyper)[
        0
    ]  # with the shapes that are drawn, and MuJoCo's search for islands
    before.physics.model = before.model
    before.model.opt.disableflags |= int(mujoco.mjtDisableBit.mjDSBL_AUTORESET)
    coarse = replace(hyper, sim_dt=0.005)
    plain, coarse_env = ppo.make_envs(hyper)[0], ppo.make_envs(coarse)[0]
    fewer, both = replace(hyper, update_epochs=3), replace(coarse, update_epochs=3)
    works = {
        "one program that calls back (until November 2026)": (hyper, one_program(hyper, before)),
        "halves in threads": (hyper, in_threads(hyper, plain)),
        "the same, 3 passes": (fewer, in_threads(fewer, plain)),
        "the same, physics steps of 5 ms": (coarse, in_threads(coarse, coarse_env)),
        "the same, both": (both, in_threads(both, coarse_env)),
    }
    amount = hyper.num_envs * hyper.unroll_length
    for _ in range(2):
        for _, work in works.values():
            work()
    begin = time.perf_counter()
    work()
    calls = max(1, round(args.seconds / args.blocks / (time.perf_counter() - begin)))
    rates, busy = {name: [] for name in works}, {name: [] for name in works}
    for _ in range(args.blocks):
        for name, (_, work) in works.items():
            begin, cpu = time.perf_counter(), time.process_time()
            for _ in range(calls):
                work()
            rates[name].append(calls * amount / (time.perf_counter() - begin))
            busy[name].append((time.process_time() - cpu) / calls)
    first = np.median(next(iter(busy.values())))
    for name, (setting, _) in works.items():
        used = np.median(busy[name])
        remark = f"{used:.3g} CPU-seconds an iteration, {first / used:.3g} times fewer"
        what = f"mujoco-c: {name}"
        table.measured("training", what, sizes(setting), "control steps", rates[name], remark)


def main(args: Args) -> None:
    """Measures what `args` names and prints it. Raises ValueError for arguments that do not fit."""
    args.check()
    table = throughput.Table(args.out, machine(args))
    for part in args.parts:
        {"memory": memory, "environment": environment, "learning": learning, "training": training}[
            part
        ](args, table)
    if args.out:
        print(f"wrote {len(table.rows)} rows to {args.out}")


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, ImportError, RuntimeError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
