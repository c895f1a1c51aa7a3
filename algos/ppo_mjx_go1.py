"""PPO on the MJX Go1: thousands of quadrupeds learn to walk, simulation and learning in one compiled program.

Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347, with generalised advantages (arXiv
1506.02438), run massively parallel as in brax (arXiv 2106.13281). The task is MuJoCo Playground's (arXiv 2502.08844).

    advantage  A_t = d_t + g l (1 - done) A_{t+1},  d_t = r + g (1 - fall) V(s') - V(s), s' before any reset
    policy     -E[min(r A, clip(r, 1 - e, 1 + e) A)], r = pi(a|s) / pi_old(a|s)                         (PPO, eq. 7)
    whole      policy loss + vf_coef (V - A - V_old)^2 / 2 - ent_coef entropy                           (PPO, eq. 9)

Differences from brax's PPO, whose hyper-parameters these are; `--gae brax` undoes (1):
 1. A time-out bootstraps V(s_T) from the observation before the reset, and teaches like every other step; advantages
    are computed once per iteration. brax leaves such steps out and computes them anew for each minibatch.
 2. Observation statistics stand still within an iteration, so the first ratio is exactly 1; the very first rollout only
    fills them. brax changes them between acting and learning.
 3. Advantages are normalised over the whole minibatch, on several devices too; there each device has its own mean.
 4. Minibatches are drawn in strata: of every M neighbouring worlds each minibatch gets one. With noise that depends on
    the world's number alone, any number of devices computes the same thing.
 5. No hard reset of all worlds between evaluations; their clocks are staggered instead.
 6. An observation entry counts with a standard deviation of at least 0.01 (brax: 0.000001).
 7. By flags: KL-adaptive step size, clipped value loss, left-right symmetry, state-independent deviation (rsl_rl's,
    arXiv 2109.11978), several seeds at once, distillation. On a CPU the sizes are smaller: TUNED, below.

Commands, from the repository's root:
    train          python algos/ppo_mjx_go1.py --env-id Go1JoystickFlat
    on a CPU       python algos/ppo_mjx_go1.py --env-id Go1JoystickFlat --backend mujoco-c
    smallest run   python algos/ppo_mjx_go1.py --env-id Go1Stand --backend mjx-jax
    evaluate       python algos/ppo_mjx_go1.py --evaluate --checkpoint runs/NAME/best.npz
    resume         python algos/ppo_mjx_go1.py --resume runs/NAME    (exactly)
    distill        python algos/ppo_mjx_go1.py --no-linvel --distill runs/NAME/best.npz
    ONNX           python algos/ppo_mjx_go1.py --checkpoint runs/NAME/best.npz --export-onnx policy.onnx

Expected result: on two shared CPU cores with mujoco-c first steps in 6 minutes, a return of 20 of 40 in 12, 28 and
a velocity error of 0.1 m/s in 27. Not yet measured on a GPU. Curves and commands: docs/algos/ppo_mjx_go1.md.

Shapes: S seeds, N worlds (of each seed; inside the program, of one device), T steps of a rollout, M minibatches,
b = N / M worlds of a minibatch, A actions, F observation entries, K iterations in one call.
"""
# ruff: noqa: E402  (the lines down to the banner must run before the imports below it)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("envs") is None:
    # `make` installs the project in .venv; going on in there lets `python algos/ppo_mjx_go1.py` work as typed.
    if Path(sys.prefix).resolve() == VENV or not (VENV / "bin/python").exists():
        sys.exit(f"cleanrobot is not installed for {sys.executable}: run `make setup` (or `pip install -e .`) first")
    os.execv(VENV / "bin/python", [VENV / "bin/python", *sys.argv])
missing = [name for name in ("jax", "flax", "optax", "orbax", "mujoco") if importlib.util.find_spec(name) is None]
if __name__ == "__main__" and missing:
    sys.exit(f'error: ppo_mjx_go1 needs {", ".join(missing)}: run `pip install -e ".[go1]"`')

# --- Imports ----------------------------------------------------------------------------------------------------------
import csv
import json
import math
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from typing import Literal, NamedTuple

import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import tyro
from flax import nnx
from jax.sharding import PartitionSpec as P
from tqdm import tqdm

# jax warns whenever a process is started; the only one here is ffmpeg, which does not go on in this program's memory
warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
START = time.time()  # `wall_time` counts from here
EVAL_SEED, VIDEO_SECONDS = 10_000, 10.0
OBS = ("state", "privileged_state")  # what the policy sees; what the critic sees
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv
MIN_STD, MIN_OBS_STD = 1e-3, 1e-2  # of the policy's Gaussian, and of an observation's entry: differs (6)
RATES = (1e-5, 1e-2)  # bounds of the adaptive learning rate
MEASURED = (57, 58, 50)  # entries of privileged_state: forward and sideways velocity, turning rate, free of noise
RESET, ACT, LEARN = range(3)  # uses of chance, each with numbers of its own
AXIS = "devices"

# --- Args -------------------------------------------------------------------------------------------------------------
CPU = dict(num_minibatches=4, update_epochs=5, learning_rate=1e-3, target_kl=0.01, clip_coef=0.2, ent_coef=0.005,
           std="constant", init_std=0.5, head_scale=0.01, eval_episodes=64)
# (pattern of env ids, back end) -> defaults other than the published ones below; later rows win
TUNED = {
    ("*", "mujoco-c"): CPU | dict(num_envs=512, hidden=(256, 128, 64), total_timesteps=10_000_000,
                                  eval_freq=1_000_000, log_freq=100_000),
    ("Go1Stand", "*"): CPU | dict(num_envs=128, hidden=(128, 64), gamma=0.95, total_timesteps=150_000,
                                  eval_freq=30_000, log_freq=10_000),
}


@dataclass
class Args:
    # run
    env_id: str = "Go1JoystickFlat"  # task of envs/go1_mjx.py: Go1JoystickFlat, Go1JoystickRough, Go1Stand
    seed: int = 1  # of weights, exploration, minibatches and episodes
    num_seeds: int = 1  # runs at once, with seeds from --seed on; each has its own files
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 200_000_000  # environment transitions of each seed
    eval_freq: int = 20_000_000  # transitions between evaluations; each also saves a checkpoint, and best.npz if it is
    eval_episodes: int = 128  # episodes of an evaluation, with the same seeds every time, in MuJoCo's C library
    log_freq: int = 2_000_000  # transitions between rows of metrics.csv: those that one call of the program makes
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    export_onnx: str | None = None  # only write the policy of --checkpoint to this file
    checkpoint: str | None = None  # file to take weights from (.npz); counters, optimiser and worlds start afresh
    resume: str | None = None  # run folder to continue, with its arguments, except those given again
    capture_video: bool = True  # at every evaluation an mp4 of one robot, and plots of its velocities and its gait
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, entity, offline mode

    # environment
    backend: Literal["auto", "mjx-jax", "mjx-warp", "mujoco-c"] = "mjx-jax"  # auto: on a CPU mujoco-c, else MJX
    num_envs: int = 8192  # parallel worlds of each seed, over all devices
    domain_randomization: bool = True  # vary friction, masses, joint zeros ... between worlds, as published
    kp_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's stiffness, per world
    kd_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's damping, per world
    action_latency: tuple[float, float] = (0.0, 0.0)  # seconds until a new target acts, at most 0.02; per episode
    noise_level: float = 1.0  # factor on the noise of the policy's observation
    no_linvel: bool = False  # the policy does not see the body's velocity, which no sensor of the robot measures
    pushes: bool = False  # push the trunk now and then
    push_wait: tuple[float, float] = (1.0, 3.0)  # seconds between pushes
    push_speed: tuple[float, float] = (0.0, 3.0)  # m/s; the impulse is mass x speed / pi
    iterations: int | None = None  # of the training physics' constraint solver; none: 1 on mjx-*, 100 on mujoco-c
    ls_iterations: int | None = None  # of its line search; none: 5 on mjx-*, 50 on mujoco-c
    asset_dir: str | None = None  # MuJoCo Menagerie's folder unitree_go1, to show the robot's own meshes in videos

    # algorithm
    unroll_length: int = 20  # steps of every world in an iteration
    num_minibatches: int = 32  # of an epoch; each holds whole pieces of trajectories, of num_envs / 32 worlds
    update_epochs: int = 4  # passes over the data of an iteration
    learning_rate: float = 3e-4  # Adam step size, at first if --target-kl
    target_kl: float | None = None  # adapt the step size: / 1.5 where KL(old || new) > 2 x this, x 1.5 below half of it
    gamma: float = 0.97  # discount per step of 0.02 s
    gae_lambda: float = 0.95  # weight of longer sums in the advantage
    gae: Literal["once", "brax"] = "once"  # brax: anew for each minibatch, without the steps that time out
    norm_adv: bool = True  # advantages with mean 0 and deviation 1 in each minibatch
    clip_coef: float = 0.3  # epsilon of the clipped surrogate
    clip_vloss: bool = False  # clip the change of the value too, by clip_coef
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy
    max_grad_norm: float = 1.0  # of both networks together
    symmetry: bool = False  # learn from the mirror image of every transition too: twice the work per update
    std: Literal["state", "constant"] = "state"  # deviation of the actions: a function of the state, or 12 numbers
    head_scale: float = 1.0  # factor on the first weights of both last layers; a small one begins at the default pose
    init_std: float = 0.694  # that deviation at first, before the tanh (brax: softplus(0) + 0.001)
    hidden: tuple[int, ...] = (512, 256, 128)  # widths of the layers of actor and critic
    privileged_actor: bool = False  # the policy sees what the critic sees: a teacher for --distill, not for a robot
    distill: str | None = None  # file of a teacher (.npz) to learn from, by KL(teacher || policy) on one's own states

    # compute
    devices: int = 0  # accelerators to use; 0: all
    distributed: bool = False  # join the processes of other hosts (jax.distributed finds them, or JAX_* variables)
    threads: int | None = None  # of MuJoCo's C library; none: all cores
    overlap_eval: bool = True  # with mjx-*: evaluate on the CPU while the device trains on
    compile_cache: str = "~/.cache/cleanrobot/jax"  # compiled programs, kept from run to run; empty: none

    def check(self):
        """Raises ValueError at the first choice that cannot work. (In __post_init__ the parser would reword it.)"""
        devices = self.device_count
        few = [name.replace("_", "-") for name, value in asdict(self).items() if name not in ("seed", "devices")
               and (type(value) is int and value < 1 or name == "hidden" and min(value, default=0) < 1)]
        for message, wrong in {
            "--resume continues a run, --checkpoint starts one: give only one": self.resume and self.checkpoint,
            "--evaluate needs --checkpoint FILE": self.evaluate and not self.checkpoint,
            "--export-onnx needs --checkpoint FILE": self.export_onnx and not self.checkpoint,
            f"--{', --'.join(few)} must be at least 1": few,
            "--track needs Weights & Biases: pip install -e '.[track]'":
                self.track and importlib.util.find_spec("wandb") is None,
            f"there are only {jax.device_count()} devices: lower --devices": devices > jax.device_count(),
            "--backend mujoco-c learns on one device: use --devices 1": self.backend == "mujoco-c" and devices > 1,
            f"--num-envs must be a multiple of --num-minibatches x devices, {self.num_minibatches} x {devices}":
                self.num_envs % max(self.num_minibatches * devices, 1),
            "--gae brax and --distill cannot be combined": self.gae == "brax" and self.distill,
        }.items():
            if wrong:
                raise ValueError(message)

    @property
    def device_count(self) -> int:
        return self.devices or (1 if self.backend == "mujoco-c" else jax.device_count())

    @property
    def seeds(self) -> np.ndarray:
        return self.seed + np.arange(self.num_seeds, dtype=np.int32)

    def suffix(self, i: int) -> str:
        """What tells the files of the i-th seed apart."""
        return f"_s{self.seed + i}" if self.num_seeds > 1 else ""


def tuned_defaults(env_id: str, backend: str) -> dict:
    """The rows of TUNED that apply, merged."""
    rows = [row for (pattern, kind), row in TUNED.items() if fnmatch(env_id, pattern) and fnmatch(backend, kind)]
    return {key: value for row in rows for key, value in row.items()}


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The defaults, and so --help, are those of the task, back end or checkpoint given."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=words, default=Args(env_id="", backend="auto"))  # a first look: which task and file
    if given.distributed:
        jax.distributed.initialize()  # before anything asks for the devices
    saved = {}
    if given.resume:
        saved = args_of_run(given.resume)
    elif given.checkpoint:
        saved = with_tuples(load_file(given.checkpoint)["args"])
    env_id = given.env_id or saved.get("env_id", Args.env_id)
    backend = saved["backend"] if given.resume and given.backend == "auto" else given.backend
    if backend == "auto":
        backend = "mujoco-c" if jax.default_backend() == "cpu" else "mjx-jax"
    for key in ("evaluate", "checkpoint", "resume", "export_onnx", *["name", "seed", "num_seeds", "devices", "distill"]
                * bool(given.checkpoint)):  # of that run alone
        saved.pop(key, None)
    default = Args(**tuned_defaults(env_id, backend) | saved | dict(env_id=env_id, backend=backend))
    args = tyro.cli(Args, args=argv, default=default, description=__doc__.split("\n\n")[0])
    return replace(args, backend=backend)


# --- make_envs --------------------------------------------------------------------------------------------------------
def make_envs(args: Args) -> tuple:
    """-> (training environment or None, evaluation environment on MuJoCo's C library with a converged solver).

    Anything with the attributes and functions of envs/go1_mjx.py that are used below can stand here.
    """
    try:
        from envs.go1_mjx import TASKS, EnvConfig, make
    except ImportError as error:
        raise ValueError(error) from error
    told = {k: getattr(args, k) for k in ("action_latency", "noise_level", "no_linvel", "pushes", "push_wait",
                                          "push_speed", "asset_dir")}
    varied = {k: getattr(args, k) for k in ("domain_randomization", "kp_factor", "kd_factor", "iterations",
                                            "ls_iterations")}
    varied["warp_worlds"] = args.num_seeds * args.num_envs // args.device_count
    env = None if args.evaluate else make(args.env_id, EnvConfig(**told, **varied), args.backend, args.threads)
    # Playground's own tasks, for comparison, have no other back end than MJX
    in_c = args.env_id in TASKS
    return env, make(args.env_id, EnvConfig(**told), "mujoco-c" if in_c else args.backend, args.threads)


# --- Networks ---------------------------------------------------------------------------------------------------------
class MLP(nnx.Module):
    """Linear layers with swish between them; LeCun-uniform weights, in the last layer times `head_scale`; biases 0."""

    def __init__(self, widths: list[int], head_scale: float, rngs: nnx.Rngs):
        init, pairs = nnx.initializers.lecun_uniform(), zip(widths, widths[1:], strict=False)
        self.layers = nnx.List(nnx.Linear(i, o, kernel_init=init, rngs=rngs) for i, o in pairs)
        self.layers[-1].kernel[...] *= head_scale

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.swish(layer(x))
        return self.layers[-1](x)


class ActorCritic(nnx.Module):
    """Two MLPs: the actor sees what the robot measures, the critic what the simulator knows."""

    def __init__(self, shapes: dict, args: Args, rngs: nnx.Rngs):
        self.eyes, self.state_std = "privileged_state" if args.privileged_actor else "state", args.std == "state"
        heads = shapes["action"] * (2 if self.state_std else 1)
        self.actor = MLP([shapes[self.eyes], *args.hidden, heads], args.head_scale, rngs)
        self.critic = MLP([shapes["privileged_state"], *args.hidden, 1], args.head_scale, rngs)
        start = math.log(math.expm1(args.init_std - MIN_STD))  # softplus undone
        if self.state_std:
            bias = self.actor.layers[-1].bias
            bias[...] = bias[...].at[shapes["action"]:].set(start)
        else:
            self.scale = nnx.Param(jnp.full(heads, start))

    def policy(self, obs: dict):
        """Normalised obs -> mean and standard deviation (..., A) of the Gaussian before the tanh."""
        out = self.actor(obs[self.eyes])
        loc, scale = jnp.split(out, 2, -1) if self.state_std else (out, jnp.broadcast_to(self.scale[...], out.shape))
        return loc, nnx.softplus(scale) + MIN_STD

    def value(self, obs: dict):
        return self.critic(obs["privileged_state"])[..., 0]


class Stats(NamedTuple):
    """Count, mean and variance of what was observed so far, per entry."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array


class Learner(NamedTuple):
    """All that learning changes. In `train` every leaf has a leading axis: the seeds."""

    params: nnx.State
    opt_state: tuple
    stats: dict  # Stats for each of OBS
    learning_rate: jax.Array


def optimizer(args: Args) -> optax.GradientTransformation:
    """Adam after clipping the gradient of both networks by its joint norm; the step size is applied in `learn`."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam())


def structure(shapes: dict, args: Args) -> nnx.GraphDef:
    """The networks without their weights: static, so that merging it with them costs nothing inside jit."""
    return nnx.split(nnx.eval_shape(lambda: ActorCritic(shapes, args, nnx.Rngs(0))))[0]


def new_learner(seed, shapes: dict, args: Args) -> Learner:
    params = nnx.as_pure(nnx.split(ActorCritic(shapes, args, nnx.Rngs(jax.random.key(seed))))[1])
    stats = {k: Stats(jnp.zeros(()), jnp.zeros(shapes[k]), jnp.ones(shapes[k])) for k in OBS}
    return Learner(params, optimizer(args).init(params), stats, jnp.asarray(args.learning_rate, jnp.float32))


# --- Update functions -------------------------------------------------------------------------------------------------
def mean_over(x, axis: str | None):
    """Mean over the devices, where there are several."""
    return jax.lax.pmean(x, axis) if axis else x


def merge_stats(stats: Stats, x, axis: str | None = None) -> Stats:
    """Welford's update by a batch x (..., F), equally large on each device (Chan et al. 1979, eq. 2.1)."""
    x = x.reshape(-1, x.shape[-1])
    n = len(x) * (jax.lax.psum(1, axis) if axis else 1)
    mean = mean_over(x.mean(0), axis)
    var = mean_over(jnp.square(x - mean).mean(0), axis)
    total, delta = stats.count + n, mean - stats.mean
    share = n / total
    return Stats(total, stats.mean + share * delta,
                 stats.var + share * (var - stats.var) + share * (1 - share) * jnp.square(delta))


def normalize(stats: dict, obs: dict) -> dict:
    return {k: (obs[k] - s.mean) / jnp.maximum(jnp.sqrt(s.var), MIN_OBS_STD) for k, s in stats.items()}


def log_det(raw):
    """log |d tanh(x) / dx| of each entry, exact also where tanh is flat."""
    return 2 * (math.log(2.0) - raw - nnx.softplus(-2 * raw))


def log_prob(loc, std, raw):
    """Log-density (...) of the action tanh(raw) (..., A) of a squashed Gaussian."""
    return (-0.5 * jnp.square((raw - loc) / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi) - log_det(raw)).sum(-1)


def gaussian_kl(old_loc, old_std, loc, std):
    """KL(old || new) (...) of diagonal Gaussians; the tanh, the same for both, does not change it."""
    part = (jnp.square(old_std) + jnp.square(old_loc - loc)) / (2 * jnp.square(std))
    return (jnp.log(std / old_std) + part - 0.5).sum(-1)


def summed_back(deltas, decay):
    """x_t = delta_t + decay_t x_{t+1} (T, ...), from the end."""
    def back(x, step):
        x = step[0] + step[1] * x
        return x, x

    return jax.lax.scan(back, jnp.zeros_like(deltas[0]), (deltas, decay), reverse=True)[1]


def gae(rewards, terminations, truncations, values, next_values, gamma: float, gae_lambda: float):
    """Advantages and returns (T, ...) (Schulman et al. 2016, eq. 16). next_values: of the true next observation.

    A fall ends the future; at a time-out V(s_T) stands for it, and only the sum over later steps stops.
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    advantages = summed_back(deltas, gamma * gae_lambda * (1 - jnp.maximum(terminations, truncations)))
    return advantages, advantages + values


def gae_brax(rewards, terminations, truncations, values, next_values, gamma: float, gae_lambda: float):
    """As brax: steps that time out teach nothing, and the advantage takes the next step's return for its value."""
    live, future = 1 - truncations, gamma * (1 - terminations)
    deltas = live * (rewards + future * next_values - values)
    returns = summed_back(deltas, gae_lambda * future * live) + values
    next_returns = jnp.concatenate([returns[1:], next_values[-1:]])
    return live * (rewards + future * next_returns - values), returns


def ppo_loss(params: nnx.State, mb: dict, noise, model: nnx.GraphDef, args: Args, axis: str | None = None):
    """Loss and metrics of a minibatch of b pieces of trajectories: leaves (b, T, ...), noise (b, T, A).

    With a teacher (`--distill`) the first term is KL(teacher || policy) and there is no entropy bonus.
    """
    net = nnx.merge(model, params)
    loc, std = net.policy(mb["obs"])
    values = net.value(mb["obs"])  # (b, T)
    advantages, returns = mb["advantages"], mb["returns"]
    if args.gae == "brax":  # anew at every step, with the present critic
        still, last = jax.lax.stop_gradient((values, net.value(mb["last"])))
        step = (mb["rewards"], mb["terminations"], mb["truncations"], still, jnp.c_[still[:, 1:], last])
        advantages, returns = (x.T for x in gae_brax(*(x.T for x in step), args.gamma, args.gae_lambda))
    if args.norm_adv:
        centred = advantages - mean_over(advantages.mean(), axis)
        advantages = centred / (jnp.sqrt(mean_over(jnp.square(centred).mean(), axis)) + 1e-8)

    log_ratio = log_prob(loc, std, mb["raw"]) - mb["log_probs"]
    ratio = jnp.exp(log_ratio)
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()  # PPO, eq. 7
    error = jnp.square(values - returns)
    if args.clip_vloss:
        near = mb["values"] + jnp.clip(values - mb["values"], -args.clip_coef, args.clip_coef)
        error = jnp.maximum(error, jnp.square(near - returns))
    value_loss = 0.5 * error.mean()
    fresh = loc + std * noise  # one sample instead of the integral, which the tanh leaves without a closed form
    entropy = (jnp.log(std) + 0.5 * math.log(2 * math.pi * math.e) + log_det(fresh)).sum(-1).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss  # PPO, eq. 9
    kl = gaussian_kl(mb["loc"], mb["std"], loc, std)
    if args.symmetry:  # of the half that was drawn from the old policy: its mirror image was not, and never gets to 0
        kl = 2 * kl * (mb["id"] < args.num_envs)[:, None]
    metrics = {"loss/policy": policy_loss, "loss/value": value_loss, "train/entropy": entropy, "train/std": std.mean(),
               "train/kl": kl.mean(), "train/clip_fraction": (jnp.abs(ratio - 1) > args.clip_coef).mean()}
    if args.distill:
        metrics["loss/distill"] = gaussian_kl(mb["teacher_loc"], mb["teacher_std"], loc, std).mean()
        loss = metrics["loss/distill"] + args.vf_coef * value_loss
    return loss, {k: mean_over(v, axis) for k, v in metrics.items()}


def world_noise(key, ids, shape: tuple):
    """Standard normal noise (N, *shape), a function of the world's number alone: not of how many devices there are."""
    return jax.vmap(lambda i: jax.random.normal(jax.random.fold_in(key, i), shape))(ids)


def shuffled(batch: dict, key, num_minibatches: int) -> dict:
    """Leaves (N, ...) -> (M, N / M, ...): of every M neighbouring worlds, each minibatch gets one.  # differs (4)"""
    m = num_minibatches
    blocks = batch["id"].reshape(-1, m)
    lots = jax.vmap(lambda i: jax.random.uniform(jax.random.fold_in(key, i), (m,)))(blocks[:, 0])
    order = jnp.argsort(lots) + m * jnp.arange(len(blocks))[:, None]
    return jax.tree.map(lambda x: x[order.T], batch)


def mirrored(batch: dict, mirror: dict, offset: int) -> dict:
    """The same experience of a robot reflected at its sagittal plane; `mirror` holds an order and signs per entry.

    Rewards, values and log-probabilities stay: the mirrored policy would have met it like this.
    """
    def flip(x, kind):
        order, signs = mirror[kind]
        return x[..., order] * signs

    order = mirror["action"][0]
    moved = {k: flip(batch[k], "action") for k in ("raw", "loc", "teacher_loc") if k in batch}
    moved |= {k: batch[k][..., order] for k in ("std", "teacher_std") if k in batch}
    return batch | moved | {"obs": {k: flip(x, k) for k, x in batch["obs"].items()}, "id": batch["id"] + offset,
                            "last": {k: flip(x, k) for k, x in batch["last"].items()}}


def learn(learner: Learner, batch: dict, last: dict, key, ids, model: nnx.GraphDef, args: Args, mirror: dict,
          axis: str | None = None) -> tuple[Learner, dict]:
    """All updates of an iteration of one seed: batch (T, N, ...), last: final obs (N, F), ids (N,) of the worlds."""
    step = [batch[k] for k in ("rewards", "terminations", "truncations", "values", "next_values")]
    advantages, returns = gae(*step, args.gamma, args.gae_lambda)
    unexplained = mean_over(jnp.square(returns - batch["values"]).mean(), axis)
    spread = mean_over(jnp.square(returns - mean_over(returns.mean(), axis)).mean(), axis)
    raw_obs = batch["obs"]
    batch |= dict(advantages=advantages, returns=returns)
    batch = jax.tree.map(lambda x: x.swapaxes(0, 1), batch)  # (N, T, ...)
    batch |= dict(last=last, id=ids)
    if args.symmetry:
        twins = mirrored(batch, mirror, args.num_envs)
        batch = jax.tree.map(lambda *x: jnp.concatenate(x), batch, twins)
    batch |= {k: normalize(learner.stats, batch[k]) for k in ("obs", "last")}  # differs (2)

    def minibatch(learner, step):
        mb, number = step
        noise = world_noise(jax.random.fold_in(key, 2 * number), mb["id"], mb["raw"].shape[1:])
        gradient = jax.value_and_grad(ppo_loss, has_aux=True)
        (_, metrics), grads = gradient(learner.params, mb, noise, model, args, axis)
        rate, kl = learner.learning_rate, metrics["train/kl"]
        if args.target_kl:  # before the first step of an iteration there is no divergence to judge by
            factor = jnp.where(kl > 2 * args.target_kl, 1 / 1.5, jnp.where(kl < args.target_kl / 2, 1.5, 1.0))
            rate = jnp.clip(rate * jnp.where(number > 0, factor, 1.0), *RATES)
        updates, opt_state = optimizer(args).update(mean_over(grads, axis), learner.opt_state)
        params = jax.tree.map(lambda p, u: p - rate * u, learner.params, updates)
        return learner._replace(params=params, opt_state=opt_state, learning_rate=rate), metrics

    def epoch(learner, e):
        numbers = e * args.num_minibatches + jnp.arange(args.num_minibatches)
        shares = shuffled(batch, jax.random.fold_in(key, 2 * e + 1), args.num_minibatches)
        return jax.lax.scan(minibatch, learner, (shares, numbers))

    updated, metrics = jax.lax.scan(epoch, learner, jnp.arange(args.update_epochs))
    first = learner.stats["state"].count == 0  # differs (2)
    learner = jax.tree.map(lambda new, old: jnp.where(first, old, new), updated, learner)
    stats = {k: merge_stats(s, raw_obs[k], axis) for k, s in learner.stats.items()}
    metrics = {k: v.mean() for k, v in metrics.items()} | {
        "train/learning_rate": learner.learning_rate, "train/explained_variance": 1 - unexplained / (spread + 1e-8)}
    return learner._replace(stats=stats), metrics


def stream(seed, *numbers):
    """A key for one use of chance, from the seed and counters alone: nothing random needs to be saved."""
    key = jax.random.key(seed)
    for number in numbers:
        key = jax.random.fold_in(key, number)
    return key


def act(learner: Learner, obs: dict, key, ids, model: nnx.GraphDef, teacher=None) -> tuple[jax.Array, dict]:
    """obs (N, F) -> actions (N, A) and what the update needs to know of them."""
    net, seen = nnx.merge(model, learner.params), normalize(learner.stats, obs)
    loc, std = net.policy(seen)
    raw = loc + std * world_noise(key, ids, loc.shape[1:])
    choice = dict(obs=obs, raw=raw, loc=loc, std=std, log_probs=log_prob(loc, std, raw), values=net.value(seen))
    if teacher:
        choice["teacher_loc"], choice["teacher_std"] = teacher(obs)
    return jnp.tanh(raw), choice


def outcome(learner: Learner, choice: dict, after: dict, model: nnx.GraphDef) -> tuple[dict, dict]:
    """What came of the actions: the whole transition (N, ...), and sums over the worlds for the log."""
    next_values = nnx.merge(model, learner.params).value(normalize(learner.stats, after["final_obs"]))
    terminations, truncations = (after[k].astype(jnp.float32) for k in ("terminated", "truncated"))
    ended = jnp.maximum(terminations, truncations)
    sums = {k: v.sum() for k, v in after["metrics"].items()} | dict(
        steps=jnp.float32(len(ended)), episodes=ended.sum(), falls=terminations.sum(), rewards=after["reward"].sum(),
        returns=(ended * after["episode_return"]).sum(), lengths=(ended * after["episode_length"]).sum())
    return choice | dict(rewards=after["reward"], terminations=terminations, truncations=truncations,
                         next_values=next_values), sums


# --- evaluate ---------------------------------------------------------------------------------------------------------
def evaluate(policy: "Policy", env, args: Args) -> tuple[dict, list]:
    """Whole episodes, deterministic actions, fixed seeds, one world for each. -> metrics; of the first seconds of one
    world at every step: qpos, the command, the measured velocity (3,) and foot contacts (4,)"""
    n = args.eval_episodes
    state = env.reset_batch(jax.random.split(jax.random.key(EVAL_SEED), n))
    running, score, length, fallen, errors, trace = np.ones(n, bool), np.zeros(n), np.zeros(n), np.zeros(n), 0.0, []
    for _ in range(env.episode_length):
        if running[0] and len(trace) < VIDEO_SECONDS * env.control_hz:
            told = np.asarray(state.obs["privileged_state"][0])
            trace.append((np.asarray(state.qpos[0]), np.asarray(state.command[0]), told[list(MEASURED)],
                          np.asarray(state.contact[0])))
        state = env.step_batch(state, policy.act(state.obs))
        terminated, truncated = np.asarray(state.terminated), np.asarray(state.truncated)
        errors = errors + np.stack([state.metrics[k] for k in ("lin_vel_error", "yaw_vel_error")]) @ running
        ended = running & (terminated | truncated)  # each world counts once
        score, length, fallen = (np.where(ended, new, old) for new, old in (
            (state.episode_return, score), (state.episode_length, length), (terminated, fallen)))
        running = running & ~ended
        if not running.any():
            break
    deviation = float(score.std(ddof=1)) if n > 1 else 0.0
    half = 1.96 * deviation / math.sqrt(n)  # 95% confidence interval of the mean
    lin_error, yaw_error = (errors / length.sum()).tolist()
    return {"eval/return": float(score.mean()), "eval/return_std": deviation, "eval/ci_low": float(score.mean()) - half,
            "eval/ci_high": float(score.mean()) + half, "eval/lin_vel_error": lin_error,
            "eval/yaw_vel_error": yaw_error, "eval/fall_rate": float(fallen.mean()),
            "eval/length": float(length.mean())}, trace


def film(trace: list, env, args: Args, path: Path):
    """An mp4 at half the control rate; beside it, where velocities are commanded, the plot of `plot_walk`."""
    path.parent.mkdir(parents=True, exist_ok=True)
    qpos, *told = (np.stack(x) for x in zip(*trace, strict=True))
    imageio.mimwrite(path, env.render(qpos[::2]), fps=round(env.control_hz / 2), macro_block_size=1)
    if "Joystick" in args.env_id:
        plot_walk(*told, env.control_hz, path.with_suffix(".png"))


def plot_walk(command, measured, contact, hz: float, path: Path):
    """Commanded against measured velocity (T, 3), and when each foot (T, 4) stood on the floor."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    figure, seconds = Figure((10, 8), layout="tight"), np.arange(len(command)) / hz
    axes = figure.subplots(4, 1, sharex=True)
    for i, name in enumerate(("forward, m/s", "to the left, m/s", "turning left, rad/s")):
        axes[i].plot(seconds, measured[:, i], color="C1", linewidth=1, label="measured")
        axes[i].plot(seconds, command[:, i], color="C0", label="commanded")
        axes[i].set_ylabel(name)
    axes[0].legend(loc="upper right")
    for foot in range(4):
        axes[3].fill_between(seconds, foot - 0.4, foot + 0.4, where=contact[:, foot], step="post", color=f"C{foot}")
    axes[3].set(xlabel="seconds", yticks=range(4), yticklabels=["FR", "FL", "RR", "RL"], ylabel="feet on the floor")
    figure.savefig(path, dpi=100)


# --- save / load ------------------------------------------------------------------------------------------------------
def names(path) -> str:
    return jax.tree_util.keystr(path, simple=True, separator="/")


def snapshot(learner: Learner, i: int, meta: dict) -> dict:
    """What a weights file holds: `meta`, and the i-th seed's networks and statistics as NumPy arrays by name."""
    tree = dict(params=learner.params, stats={k: s._asdict() for k, s in learner.stats.items()})
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return meta | {"weights": {names(path): np.asarray(leaf[i]) for path, leaf in leaves}}


def save_weights(path: Path, content: dict):
    """One .npz, which NumPy alone can read. Written under a temporary name: an interrupted save leaves the old file."""
    meta = {k: v for k, v in content.items() if k != "weights"}
    with path.with_suffix(".tmp").open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **content["weights"])
    os.replace(path.with_suffix(".tmp"), path)


def load_file(path: str | Path) -> dict:
    """A weights file: its arrays by name, and what its meta holds (algo, args, shapes, spec, versions, now).

    Runs no code from the file. Raises FileNotFoundError, or ValueError if it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no file {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            content = {k: file[k] for k in file.files}
        meta = json.loads(str(content.pop("meta")))
    except Exception as error:  # NumPy names many kinds of damage; the reader needs one line
        raise ValueError(f"{path} cannot be read as weights (.npz): it is damaged or another kind of file") from error
    if meta.get("algo") != "ppo_mjx_go1":
        raise ValueError(f"{path} is not a file of ppo_mjx_go1")
    return meta | {"weights": content}


def fill(learner: Learner, file: dict) -> Learner:
    """`learner` of one seed with the file's weights and statistics. Raises ValueError naming what does not fit."""
    def take(prefix, tree):
        def leaf(path, old):
            new = file["weights"].get(f"{prefix}/{names(path)}")
            if new is None or new.shape != old.shape:
                has = "nothing" if new is None else new.shape
                name = f"{prefix}/{names(path)}"
                raise ValueError(f"the checkpoint differs in {name}: it has {has}, this run {old.shape}")
            return jnp.asarray(new)
        return jax.tree_util.tree_map_with_path(leaf, tree)

    stats = {k: Stats(**take(f"stats/{k}", s._asdict())) for k, s in learner.stats.items()}
    return learner._replace(params=take("params", learner.params), stats=stats)


def make_teacher(path: str, shapes: dict):
    """-> a function of obs: mean and deviation of the policy in the file, which may see more than the student."""
    file = load_file(path)
    theirs, args = file["shapes"], Args(**with_tuples(file["args"]))
    learner, model = fill(new_learner(0, theirs, args), file), structure(theirs, args)
    if theirs["privileged_state"] != shapes["privileged_state"] or theirs["action"] != shapes["action"]:
        raise ValueError(f"the teacher {path} comes from another robot: its shapes are {theirs}")

    def teacher(obs: dict):
        # privileged_state begins with the policy's observation, with the body's velocity
        state = obs["state"] if theirs["state"] == shapes["state"] else obs["privileged_state"][..., :theirs["state"]]
        return nnx.merge(model, learner.params).policy(normalize(learner.stats, obs | {"state": state}))

    return teacher


def with_tuples(saved: dict) -> dict:
    """Arguments from JSON, which has lists only."""
    return {k: tuple(v) if isinstance(v, list) else v for k, v in saved.items()}


def args_of_run(run: str) -> dict:
    """The arguments in a run's folder. Raises FileNotFoundError or ValueError where there are none."""
    path = Path(run) / "args.json"
    if not path.is_file():
        raise FileNotFoundError(f"there is no {path}: --resume wants the folder of a run")
    try:
        return with_tuples(json.loads(path.read_text()))
    except ValueError as error:
        raise ValueError(f"{path} is damaged: {error}") from error


class Checkpoints:
    """The whole state of a run in Orbax's format, sharded arrays and several hosts included; the newest one is kept."""

    def __init__(self, run: Path):
        options = ocp.CheckpointManagerOptions(max_to_keep=1, enable_async_checkpointing=False)
        self.manager = ocp.CheckpointManager((run / "checkpoints").resolve(), options=options)

    def save(self, learner: Learner, state, now: dict):
        tree, counters = ocp.args.StandardSave((learner, state)), ocp.args.JsonSave(now)
        self.manager.save(now["global_step"], args=ocp.args.Composite(tree=tree, now=counters))

    def load(self, learner: Learner, state) -> tuple:
        """-> learner, state of the worlds, counters; the arguments give shapes and devices. Raises ValueError."""
        step = self.manager.latest_step()
        if step is None:
            raise FileNotFoundError(f"there is no checkpoint in {self.manager.directory}")
        try:
            tree = ocp.args.StandardRestore((learner, state))
            found = self.manager.restore(step, args=ocp.args.Composite(tree=tree, now=ocp.args.JsonRestore()))
        except Exception as error:  # Orbax names many kinds of damage; the reader needs one line
            reason = str(error).strip().splitlines()[0]
            where = f"{self.manager.directory}/{step}"
            raise ValueError(f"{where} does not fit this run, or is damaged: {reason}") from error
        return *found["tree"], found["now"]


# --- Policy -----------------------------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out, from one weights file (or its content), in NumPy alone: no JAX, no simulator.

    `spec` describes the robot: joint order and limits, control rate, gains, action scale, layout of the observation.
    """

    def __init__(self, source: str | Path | dict):
        file = source if isinstance(source, dict) else load_file(source)
        self.args, self.spec, self.actions = file["args"], file["spec"], file["shapes"]["action"]
        self.eyes, w = "privileged_state" if self.args["privileged_actor"] else "state", file["weights"]
        self.mean = w[f"stats/{self.eyes}/mean"]
        self.scale = np.maximum(np.sqrt(w[f"stats/{self.eyes}/var"]), MIN_OBS_STD)
        depth = len(self.args["hidden"]) + 1
        self.layers = [[w[f"params/actor/layers/{i}/{part}"] for part in ("kernel", "bias")] for i in range(depth)]
        self.layers[-1] = [part[..., :self.actions] for part in self.layers[-1]]  # without the deviations

    def act(self, obs: dict) -> np.ndarray:
        """obs["state"] (..., F) -> actions (..., A) = tanh(mean)."""
        x = (np.asarray(obs[self.eyes], np.float32) - self.mean) / self.scale
        for kernel, bias in self.layers[:-1]:
            x = x @ kernel + bias
            x = x * (0.5 + 0.5 * np.tanh(0.5 * x))  # swish, without an exponential that overflows
        return np.tanh(x @ self.layers[-1][0] + self.layers[-1][1])

    def export_onnx(self, path: str | Path):
        """The same function as ONNX: input "obs" float32 (batch, F), output "actions" (batch, A)."""
        try:
            from onnx import TensorProto, checker, helper, numpy_helper
            from onnx import save as save_onnx
        except ImportError as error:
            raise ValueError('--export-onnx needs onnx: run `pip install -e ".[export]"`') from error
        constants, nodes = {"mean": self.mean, "scale": self.scale}, []

        def node(kind, *inputs):
            nodes.append(helper.make_node(kind, inputs, [f"x{len(nodes)}"]))
            return f"x{len(nodes) - 1}"

        x = node("Div", node("Sub", "obs", "mean"), "scale")
        for i, (kernel, bias) in enumerate(self.layers):
            constants |= {f"kernel{i}": kernel, f"bias{i}": bias}
            x = node("Gemm", x, f"kernel{i}", f"bias{i}")
            x = node("Mul", x, node("Sigmoid", x)) if i < len(self.layers) - 1 else node("Tanh", x)
        nodes[-1].output[0] = "actions"
        values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["batch", size])
                  for name, size in (("obs", len(self.mean)), ("actions", self.actions))]
        tensors = [numpy_helper.from_array(np.asarray(v, np.float32), k) for k, v in constants.items()]
        graph = helper.make_graph(nodes, "policy", values[:1], values[1:], tensors)
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=8,
                                  doc_string=json.dumps(self.spec))
        checker.check_model(model)
        save_onnx(model, str(path))


# --- train ------------------------------------------------------------------------------------------------------------
def make_parts(env, model: nnx.GraphDef, args: Args, teacher, axis: str | None) -> tuple:
    """Acting, its outcome and learning, of all seeds at once; the worlds of all seeds lie in one row (S N, ...)."""
    many_act = jax.vmap(partial(act, model=model, teacher=teacher), in_axes=(0, 0, 0, None))
    many_outcome = jax.vmap(partial(outcome, model=model))
    many_learn = jax.vmap(partial(learn, model=model, args=args, mirror=env.mirror, axis=axis),
                          in_axes=(0, 1, 0, 0, None))
    seeds = jnp.asarray(args.seeds)

    def by_seed(tree):
        return jax.tree.map(lambda x: x.reshape(args.num_seeds, -1, *x.shape[1:]), tree)

    def keys(*numbers):
        return jax.vmap(lambda seed: stream(seed, *numbers))(seeds)

    def begin(ids):
        starts = jax.vmap(lambda seed: jax.vmap(lambda i: stream(seed, RESET, i))(ids))(seeds).reshape(-1)
        return jax.vmap(env.reset)(starts, jnp.tile(ids * env.episode_length // args.num_envs, args.num_seeds))

    def choose(learner, obs, ids, iteration, t):
        actions, choice = many_act(learner, by_seed(obs), keys(ACT, iteration, t), ids)
        return actions.reshape(-1, env.action_dim), choice

    def conclude(learner, choice, after):
        return many_outcome(learner, choice, by_seed(after))

    def improve(learner, batch, last, ids, iteration):
        return many_learn(learner, batch, by_seed(last), keys(LEARN, iteration), ids)

    return begin, choose, conclude, improve


def after(state) -> dict:
    """The half of the worlds' state that a step reports."""
    return {k: getattr(state, k) for k in ("final_obs", "reward", "terminated", "truncated", "metrics",
                                           "episode_return", "episode_length")}


def make_mesh(args: Args) -> jax.sharding.Mesh:
    return jax.make_mesh((args.device_count,), (AXIS,), axis_types=(jax.sharding.AxisType.Auto,))


def fused(env, model: nnx.GraphDef, args: Args, teacher, iterations: int) -> tuple:
    """Simulation and learning as one program over all devices. -> begin() and run(learner, state, first iteration),
    which gives learner, state and what to log of each iteration (K, S)."""
    begin, choose, conclude, improve = make_parts(env, model, args, teacher, AXIS)
    mesh, local = make_mesh(args), args.num_envs // args.device_count

    def my_ids():
        return jax.lax.axis_index(AXIS) * local + jnp.arange(local)

    def chunk(learner, state, first):
        ids = my_ids()

        def iteration(carry, i):
            learner, state = carry

            def step(state, t):
                actions, choice = choose(learner, state.obs, ids, i, t)
                state = env.step_batch(state, actions)
                return state, conclude(learner, choice, after(state))

            state, (batch, sums) = jax.lax.scan(step, state, jnp.arange(args.unroll_length))
            learner, metrics = improve(learner, batch, state.final_obs, ids, i)
            return (learner, state), (metrics, {k: jax.lax.psum(v.sum(0), AXIS) for k, v in sums.items()})

        (learner, state), log = jax.lax.scan(iteration, (learner, state), first + jnp.arange(iterations))
        return learner, state, log

    def sharded(function, inputs, outputs):
        return jax.shard_map(function, mesh=mesh, in_specs=inputs, out_specs=outputs, check_vma=False)

    program = jax.jit(sharded(chunk, (P(), P(AXIS), P()), (P(), P(AXIS), P())), donate_argnums=(0, 1))
    return jax.jit(sharded(lambda: begin(my_ids()), (), P(AXIS))), program


def stepwise(env, model: nnx.GraphDef, args: Args, teacher, iterations: int) -> tuple:
    """The same where physics is C code: jitted functions around it, step by step. -> begin and run, as `fused`"""
    begin, choose, conclude, improve = make_parts(env, model, args, teacher, None)
    choose, conclude, ids = jax.jit(choose), jax.jit(conclude), jnp.arange(args.num_envs)

    @partial(jax.jit, donate_argnums=0)
    def learn_from(learner, steps, last, i):
        batch, sums = jax.tree.map(lambda *x: jnp.stack(x), *steps)
        learner, metrics = improve(learner, batch, last, ids, i)
        return learner, (metrics, {k: v.sum(0) for k, v in sums.items()})

    def run(learner, state, first):
        log = []
        for i in range(int(first), int(first) + iterations):
            begun, steps = time.perf_counter(), []
            for t in range(args.unroll_length):
                actions, choice = choose(learner, state.obs, ids, i, t)
                state = env.step_batch(state, actions)
                steps.append(conclude(learner, choice, after(state)))
            simulated = time.perf_counter()
            learner, (metrics, sums) = jax.block_until_ready(learn_from(learner, steps, state.final_obs, i))
            seconds = {"time/simulation": simulated - begun, "time/learning": time.perf_counter() - simulated}
            log.append((metrics | {k: np.full(args.num_seeds, v) for k, v in seconds.items()}, sums))
        return learner, state, jax.tree.map(lambda *x: np.stack(x), *log)

    return jax.jit(lambda: begin(ids)), run


def read_log(log: tuple, now: dict, speed: float, i: int) -> dict:
    """One row of metrics.csv for the i-th seed, from what the iterations of a call (K, S) gave. Counts NaN in `now`."""
    metrics = {k: float(v[:, i].mean()) for k, v in log[0].items()}
    sums = {k: float(v[:, i].sum()) for k, v in log[1].items()}
    steps, episodes = sums.pop("steps"), sums.pop("episodes")
    now["nan_resets"][i] += int(sums.pop("nan"))
    row = {f"train/{k[:-1]}": sums.pop(k) / max(episodes, 1.0) for k in ("returns", "lengths")}
    row |= {"train/episodes": episodes, "train/falls": sums.pop("falls"), "train/nan_resets": now["nan_resets"][i],
            "train/reward": sums.pop("rewards") / steps}
    return row | {f"train/{k}": v / steps for k, v in sums.items()} | metrics | {"time/sps": speed}


def check_finite(learner: Learner, row: dict, global_step: int, run: Path):
    """Raises FloatingPointError that names the first weight or metric that is not finite."""
    leaves = {names(path): np.isfinite(np.asarray(leaf)).all() for path, leaf in
              jax.tree_util.tree_leaves_with_path(dict(params=learner.params))}
    for name, finite in (leaves | {k: math.isfinite(v) for k, v in row.items()}).items():
        if not finite:
            saved = sorted((run / "checkpoints").glob("[0-9]*"))
            good = saved[-1] if saved else "none yet"
            raise FloatingPointError(f"{name} is not finite at step {global_step}; last good checkpoint: {good}")


def write_row(path: Path, row: dict, track: bool, video: Path | None = None):
    """Append to a CSV file, whose first row names the columns; with `track` it goes to Weights & Biases too."""
    rows = [row.values()] if path.exists() else [row.keys(), row.values()]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
    if track:
        import wandb
        tag = path.stem.partition("_")[2]
        row = {f"{tag}/{k}" if tag else k: v for k, v in row.items()}
        wandb.log(row | ({"eval/video": wandb.Video(str(video))} if video else {}))


# same in: squint_sac.py, drqv2.py, sac_pixels.py, sapo_rewarped.py, ppo_mjx_go1.py, resfit.py
def forget_after(path: Path, global_step: int):
    """Drop the rows of a CSV file that come after the checkpoint which is resumed."""
    if path.exists():
        rows = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(rows[:1] + [row for row in rows[1:] if int(row.partition(b",")[0]) <= global_step]))


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, and `run`, the folder.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at the first NaN.
    """
    args.check()
    if args.compile_cache:
        jax.config.update("jax_compilation_cache_dir", os.path.expanduser(args.compile_cache))
    name = args.name or time.strftime(f"{args.env_id}__ppo_mjx_go1__s{args.seed}__%Y%m%d-%H%M%S")
    run, writer, fast = Path(args.resume or Path("runs") / name), jax.process_index() == 0, args.backend != "mujoco-c"
    if not args.resume and (run / "args.json").exists():
        raise ValueError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    file = load_file(args.checkpoint) if args.checkpoint else None
    if args.export_onnx:
        Policy(file).export_onnx(args.export_onnx)
        print(f"wrote {args.export_onnx}")
        return {"run": str(run)}

    env, eval_env = make_envs(args)
    shapes = dict(state=eval_env.obs_dim, privileged_state=eval_env.privileged_dim, action=eval_env.action_dim)
    if file and file["shapes"] != shapes:
        raise ValueError(f"the checkpoint differs in shapes: it has {file['shapes']}, this run {shapes}")
    versions = {module.__name__: module.__version__ for module in (jax, optax, np)}
    meta = dict(algo="ppo_mjx_go1", shapes=shapes, spec=eval_env.spec, versions=versions)
    if args.evaluate:
        results, trace = evaluate(Policy(file), eval_env, args)
        if args.capture_video:
            film(trace, eval_env, args, run / "videos/evaluate.mp4")
        run.mkdir(parents=True, exist_ok=True)
        (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
        print(json.dumps(results))
        return results | {"run": str(run)}

    teacher = make_teacher(args.distill, shapes) if args.distill else None
    model, per_iteration = structure(shapes, args), args.num_envs * args.unroll_length
    iterations = max(1, args.log_freq // per_iteration)  # of one call
    begin, program = (fused if fast else stepwise)(env, model, args, teacher, iterations)
    learner = jax.jit(jax.vmap(lambda seed: new_learner(seed, shapes, args)))(args.seeds)
    if file:
        filled = fill(jax.tree.map(lambda x: x[0], learner), file)
        learner = jax.tree.map(lambda x: jnp.broadcast_to(x, (args.num_seeds, *x.shape)), filled)
    if fast:
        learner = jax.device_put(learner, jax.NamedSharding(make_mesh(args), P()))
    state = begin()
    now = dict(iteration=0, global_step=0, wall_time=0.0, train_time=0.0, best=[-math.inf] * args.num_seeds,
               nan_resets=[0] * args.num_seeds)
    checkpoints = Checkpoints(run)
    if args.resume:
        learner, state, now = checkpoints.load(learner, state)
    if writer:
        (run / "args.json").write_text(json.dumps(asdict(args), indent=1))  # of a resumed run: now that it fits
        for path in [*run.glob("metrics*.csv"), *run.glob("eval*.csv")]:
            forget_after(path, now["global_step"])
        tuned = tuned_defaults(args.env_id, args.backend) or "as published"
        print(f"{run}: {args.env_id}, {args.backend} on {args.device_count} x {jax.devices()[0].device_kind}; "
              f"{per_iteration} transitions and {args.update_epochs * args.num_minibatches} updates an iteration; "
              f"defaults: {tuned}")
    if args.track and writer:
        import wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), name=run.name, config=asdict(args))
    # compile before the clock of train_time starts
    if fast:
        program = program.lower(learner, state, np.int32(0)).compile()
    else:
        program(jax.tree.map(jnp.copy, learner), state, now["iteration"])
    pool, waiting, results = ThreadPoolExecutor(1), None, [{}] * args.num_seeds

    def conclude_evaluation(contents: list[dict], clock: dict, waiting: list) -> list[dict]:
        found = [job.result() for job in waiting]
        for i, (results, trace) in enumerate(found):
            video = run / f"videos/step_{clock['global_step']:09d}{args.suffix(i)}.mp4" if args.capture_video else None
            if video:
                film(trace, eval_env, args, video)
            write_row(run / f"eval{args.suffix(i)}.csv", clock | results, args.track, video)
            seed = f"seed {args.seeds[i]}, " if args.num_seeds > 1 else ""
            told = ", ".join(f"{k[5:]} {v:.3f}" for k, v in results.items())
            bar.write(f"{seed}{clock['global_step']} steps: {told}")
            if results["eval/return"] > now["best"][i]:
                now["best"][i] = results["eval/return"]
                save_weights(run / f"best{args.suffix(i)}.npz", contents[i])
        return [results for results, _ in found]

    started = dict(now)
    born, begun = START - now["wall_time"], time.perf_counter() - now["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=now["global_step"], unit="step", disable=not writer, mininterval=1)
    while now["global_step"] < args.total_timesteps:
        # act, step, store, update: many iterations in one call
        learner, state, log = program(learner, state, np.int32(now["iteration"]))
        log = jax.tree.map(np.asarray, log)  # waits for the device
        before = now["global_step"]
        now["iteration"] += iterations
        now["global_step"] = now["iteration"] * per_iteration
        now |= dict(wall_time=time.time() - born, train_time=time.perf_counter() - begun)
        pause = time.perf_counter()

        # log
        done, seconds = (now[k] - started[k] for k in ("global_step", "train_time"))
        clock, speed = {k: now[k] for k in CLOCK}, args.num_seeds * done / seconds
        rows = [read_log(log, now, speed, i) for i in range(args.num_seeds)]
        for i, row in enumerate(rows):
            check_finite(learner, row, now["global_step"], run)
            if writer:
                write_row(run / f"metrics{args.suffix(i)}.csv", clock | row, args.track)
        bar.update(now["global_step"] - before)
        bar.set_postfix_str(f"return {rows[0]['train/return']:.2f}, length {rows[0]['train/length']:.0f}")

        # evaluate
        last = now["global_step"] >= args.total_timesteps
        eval_due = last or before // args.eval_freq != now["global_step"] // args.eval_freq
        if waiting and (eval_due or all(job.done() for job in waiting[2])):
            results, waiting = conclude_evaluation(*waiting), None
        if eval_due and writer:
            contents = [snapshot(learner, i, meta | dict(args=asdict(args) | dict(seed=int(seed)), now=dict(clock)))
                        for i, seed in enumerate(args.seeds)]
            jobs = [pool.submit(evaluate, Policy(content), eval_env, args) for content in contents]
            waiting = contents, clock, jobs
            if last or not (fast and args.overlap_eval):
                results, waiting = conclude_evaluation(*waiting), None

        # save
        if eval_due:
            checkpoints.save(learner, state, now)
            for i, content in enumerate(contents if writer else []):
                save_weights(run / f"last{args.suffix(i)}.npz", content)
        begun += time.perf_counter() - pause
    bar.close()
    pool.shutdown()
    checkpoints.manager.close()
    return {f"{k}{args.suffix(i)}": v for i, found in enumerate(results) for k, v in found.items()} | {
        k: now[k] for k in CLOCK} | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
