"""PPO on the MJX Go1: thousands of quadrupeds learn to walk, in one compiled program.

Paper: Schulman et al., "Proximal Policy Optimization Algorithms", arXiv 1707.06347; generalised
advantages (arXiv 1506.02438), run massively parallel as in brax (arXiv 2106.13281). The task is
MuJoCo Playground's (arXiv 2502.08844).

    advantage  A_t = d_t + g l (1 - done) A_{t+1}
               d_t = r + g (1 - fall) V(s') - V(s), where s' is the state before any reset
    policy     -E[min(r A, clip(r, 1 - e, 1 + e) A)], r = pi(a|s) / pi_old(a|s)       (PPO, eq. 7)
    whole      policy loss + vf_coef (V - A - V_old)^2 / 2 - ent_coef entropy         (PPO, eq. 9)

Differences from brax's PPO, whose hyper-parameters these are:
 1. A time-out bootstraps V(s_T) from the observation before the reset, and teaches like every other
    step; advantages are computed once per iteration. brax leaves such steps out, or, if asked, adds
    V of the state before the step; it computes advantages anew for each minibatch.
 2. Observation statistics stand still within an iteration, so the first ratio is exactly 1; the
    very first rollout only fills them. brax changes them between acting and learning, except with
    an adaptive rate.
 3. No hard reset of all environments between evaluations (brax: an option; Playground sets it to
    ten for each); their clocks are staggered instead.
 4. An observation entry counts with a standard deviation of at least 0.01 (brax: 0.000001).
 5. By flag a deviation that is no function of the state, with the tanh (rsl_rl's, arXiv 2109.11978;
    brax has it for a Gaussian without). The KL-adaptive learning rate is in brax too.
    On a CPU the sizes are smaller: TUNED, below.
 6. Training commands a stand and a turn on the spot each a tenth of the time (published: 1.4 and
    2.0 %); --commands published. Evaluation has the published ones.
 7. best.npz is chosen by episodes with fixed seeds, and reported on others (final.csv). brax
    evaluates on new ones every time and keeps no best.
brax as of 0.14.2.

Commands, from the repository's root:
    train          python algos/ppo_mjx_go1.py --env-id Go1JoystickFlat
    on a CPU       python algos/ppo_mjx_go1.py --env-id Go1JoystickFlat --backend mujoco-c
    smallest run   python algos/ppo_mjx_go1.py --env-id Go1Stand --backend mjx-jax
    evaluate       python algos/ppo_mjx_go1.py --evaluate --checkpoint runs/NAME/best.npz
    resume         python algos/ppo_mjx_go1.py --resume runs/NAME    (exactly)
Compiled programs are kept in ~/.cache/jax (JAX_COMPILATION_CACHE_DIR) from run to run.

Expected result: on two CPU cores with mujoco-c a return of 28 of 40 and an error of 0.11 m/s
within ten minutes, 29.3 and 0.10 m/s after 10 million transitions, 16 minutes; 4 and 3 % falls,
means of three seeds. Not yet measured on a GPU. Curves and commands: docs/algos/ppo_mjx_go1.md. A
student without the velocity that no sensor measures: distill_go1.py.

Shapes: N environments, T steps of a rollout, E epochs, M minibatches, b = N / M environments of a
minibatch, A actions, F entries of an observation, K iterations in one call of the program.
"""

# --- Imports --------------------------------------------------------------------------------------
import csv
import inspect
import json
import math
import os
import signal
import sys
import time
import warnings
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, field, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

# compiled programs are kept from run to run, small ones too; must be set before JAX is imported
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", os.path.expanduser("~/.cache/jax"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0.05")

import imageio.v2 as imageio
import jax
import jax.numpy as jnp
import numpy as np
import optax
import tyro
from flax import nnx
from tqdm import tqdm

# jax warns of every process that is started; the only one here is ffmpeg, which shares no memory
warnings.filterwarnings("ignore", message="os.fork", category=RuntimeWarning)
ALGO = "ppo_mjx_go1"
START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000  # of the evaluations beside training, which choose best.npz
FINAL_SEED = 20_000  # of the one that is reported
MAX_OVERFLOW = 1e-3  # share of steps whose contacts or constraints may not have fitted
SHARES = 2  # of the environments outside XLA: one acts while the other's physics runs
VIDEO_SECONDS = 10
MIN_STD = 1e-3  # of the policy's Gaussian
MIN_OBS_STD = 1e-2  # of an observation's entry: differs (4)
RATES = (1e-5, 1e-2)  # bounds of the adaptive learning rate

# --- Args -----------------------------------------------------------------------------------------
CPU = dict(
    num_minibatches=4,
    update_epochs=5,
    learning_rate=1e-3,
    clip_coef=0.2,
    std="constant",
    head_scale=0.01,
    eval_episodes=32,
)
WALK = dict(
    num_envs=512,
    target_kl=0.02,
    init_std=0.8,
    hidden=(256, 128, 64),
    total_timesteps=10_000_000,
    eval_freq=1_000_000,
    log_freq=100_000,
)
STAND = dict(
    num_envs=128,
    target_kl=0.01,
    ent_coef=0.005,
    init_std=0.5,
    hidden=(128, 64),
    gamma=0.95,
    total_timesteps=150_000,
    eval_freq=30_000,
    log_freq=10_000,
)
# (pattern of env ids, back end) -> defaults other than the published ones below; later rows win
TUNED = {("*", "mujoco-c"): CPU | WALK, ("Go1Stand", "*"): CPU | STAND}


Backend = Literal["mjx-jax", "mjx-warp", "mujoco-c"]


# same in: ppo_mjx_go1, distill_go1
def default_backend() -> Backend:
    """The fastest here: on a CPU MuJoCo's C library, else MJX."""
    return "mujoco-c" if jax.default_backend() == "cpu" else "mjx-jax"


@dataclass
class Args:
    # run
    env_id: str = "Go1JoystickFlat"  # Go1JoystickFlat, Go1JoystickRough or Go1Stand
    seed: int = 1  # of weights, exploration, minibatches and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 200_000_000  # environment transitions
    eval_freq: int = 20_000_000  # transitions between evaluations, each of which saves a checkpoint
    eval_episodes: int = 128  # of an evaluation, with the same seeds every time, in C MuJoCo
    log_freq: int = 2_000_000  # transitions of one call of the program, after which a row is logged
    evaluate: bool = False  # only evaluate --checkpoint
    checkpoint: str | None = None  # file (.npz) whose networks and statistics to begin with
    resume: str | None = None  # run folder to continue, exactly, with all its arguments
    capture_video: bool = True  # of the first seconds of one episode, by the best policy at the end
    track: bool = False  # log to Weights & Biases too

    # environment
    backend: Backend = field(default_factory=default_backend)  # mjx-jax, mjx-warp, mujoco-c
    num_envs: int = 8192  # parallel environments
    domain_randomization: bool = True  # vary friction, masses, joint zeros ... as published
    commands: Literal["balanced", "published"] = "balanced"  # published: 1.4 % stands, 2 % turns
    kp_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's stiffness
    kd_factor: tuple[float, float] = (1.0, 1.0)  # range of a factor on each joint's damping
    action_latency: tuple[float, float] = (0.0, 0.0)  # s until a target acts, <= 0.02; per episode
    noise_level: float = 1.0  # factor on the noise of the policy's observation
    linvel: bool = True  # show the body's velocity, which no sensor of the robot measures
    pushes: bool = False  # push the trunk now and then
    sim_dt: float = 0.004  # s of a physics step in training; evaluation keeps to 0.004
    threads: int | None = None  # of MuJoCo's C library; None: all cores

    # algorithm
    unroll_length: int = 20  # T, steps of every environment in an iteration
    num_minibatches: int = 32  # M, of an epoch; each has all T steps of N / M environments
    update_epochs: int = 4  # E, passes over the data of an iteration
    learning_rate: float = 3e-4  # Adam's; with --target-kl only at first
    target_kl: float | None = None  # adapt the rate: / 1.5 where KL > 2 x this, x 1.5 below half
    gamma: float = 0.97  # discount per step of 0.02 s
    gae_lambda: float = 0.95  # weight of longer sums in the advantage
    clip_coef: float = 0.3  # epsilon of the clipped surrogate
    vf_coef: float = 0.5  # weight of the value loss
    ent_coef: float = 0.01  # weight of the entropy
    max_grad_norm: float = 1.0  # of both networks together
    std: Literal["state", "constant"] = "state"  # deviation: a function of the state, or A numbers
    init_std: float = 0.694  # it at first, before the tanh (brax: softplus(0) + 0.001)
    head_scale: float = 1.0  # factor on the first weights of both last layers; small: begin still
    hidden: tuple[int, ...] = (512, 256, 128)  # widths of the layers of actor and critic


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def need(holds, message: str):
    """Raises ValueError with the message unless something holds."""
    if not holds:
        raise ValueError(message)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def check_numbers(args: Args):
    """Raises ValueError for a number that means nothing: every count, rate and share has bounds."""
    may_be_0 = "seed camera atoms pad margin learning_starts random_steps std_steps"
    may_be_0 += " critic_warmup critic_epochs num_critics"
    shares = "gamma gae_lambda tau encoder_tau target_decay ema decay average dropout offline"
    for name, value in asdict(args).items():
        flag, usual = "--" + name.replace("_", "-"), type(getattr(Args, name, None))
        kinds = (usual, int) if usual is float else (usual,)
        fits = usual is type(None) or type(value) in kinds
        need(fits, f"{flag} must be of type {usual.__name__}, not {value!r}")
        if type(value) is int:
            need(value > 0 or name in may_be_0.split() and value == 0, f"{flag} must be at least 1")
        elif type(value) is float:
            low = -1e9 if name in ("v_min", "v_max") else 0
            high = 1 if name in shares.split() else 1e9
            need(low <= value <= high, f"{flag} must be from {low:g} to {high:g}, not {value}")


def check(args: Args):
    """Raises ValueError, one line, for a choice that would fail late, silently or unreadably."""
    check_numbers(args)
    whole = args.num_envs % args.num_minibatches == 0
    need(whole, "--num-envs must be a multiple of --num-minibatches")
    need(args.checkpoint or not args.evaluate, "--evaluate needs --checkpoint FILE")


def tuned(env_id: str, backend: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for (pattern, kind), row in TUNED.items():
        if fnmatch(env_id, pattern) and fnmatch(backend, kind):
            values |= row
    return values


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def cli(argv: list[str], defaults: Args) -> Args:
    """The command line; with -h the arguments by group, with these defaults, and the end."""
    if "-h" not in argv and "--help" not in argv:
        return tyro.cli(Args, args=argv, default=defaults)
    print(f"{__doc__.splitlines()[0]}\nusage: python {sys.argv[0]} [--NAME VALUE or --[no-]SWITCH]")
    for line in inspect.getsource(Args).splitlines()[2:]:
        code, _, comment = line.strip().partition("# ")
        name, _, kind = code.partition(": ")
        if name in Args.__dataclass_fields__:
            choices = kind[7 : kind.index("]") + 1] if kind.startswith("Literal") else ""
            flag, value = "--" + name.replace("_", "-"), getattr(defaults, name)
            print(f"  {flag:24}{value!s:18} {comment} {choices}")
        elif comment:
            print(f"\n{comment}")
    sys.exit(0)


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. Defaults, and so --help, are those of the task, run or checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    values = tuned(given.env_id, given.backend)
    if given.checkpoint:
        saved = load(given.checkpoint)["args"]
        of_that_run = ("name", "seed", "evaluate", "checkpoint", "resume", "backend")
        known = Args.__dataclass_fields__.keys() - of_that_run
        values = {name: value for name, value in saved.items() if name in known}
    else:
        values["env_id"] = given.env_id
    defaults = Args(**values, backend=given.backend)
    return cli(argv, defaults)


# same in: ppo_mjx_go1, distill_go1
def resumed_args(run: str, argv: list[str]) -> Args:
    """The arguments of a run; only its length, tracking and threads may be given again.

    Raises ValueError that names the first argument that differs.
    """
    found = load(Path(run) / "checkpoint.npz")["args"]
    own = {name: value for name, value in found.items() if name in Args.__dataclass_fields__}
    saved = replace(Args(**own), resume=run)
    args = cli(argv, saved)
    for name, value in asdict(args).items():
        flag = "--" + name.replace("_", "-")
        free = name in ("total_timesteps", "track", "threads")
        same = value == getattr(saved, name)
        need(free or same, f"{flag} cannot change on --resume of {run}")
    return args


# --- make_envs ------------------------------------------------------------------------------------
def make_envs(args: Args) -> tuple:
    """-> training environment (None with --evaluate), evaluation environment in C MuJoCo.

    Whatever keeps the contract for JAX in envs/__init__.py can stand here.
    """
    try:
        from envs import go1
    except ImportError as error:
        raise ValueError(f"make_envs needs envs.go1: pip install -e .[go1]  ({error})") from error
    seen = dict(
        noise_level=args.noise_level,
        linvel=args.linvel,
        action_latency=args.action_latency,
        pushes=args.pushes,
    )
    eval_env = go1.make(args.env_id, "mujoco-c", args.threads, **seen)
    if args.evaluate:
        return None, eval_env
    varied = dict(
        domain_randomization=args.domain_randomization,
        commands=args.commands,
        kp_factor=args.kp_factor,
        kd_factor=args.kd_factor,
        sim_dt=args.sim_dt,
        warp_worlds=args.num_envs,
    )
    return go1.make(args.env_id, args.backend, args.threads, **seen, **varied), eval_env


# --- Networks -------------------------------------------------------------------------------------
class MLP(nnx.Module):
    """Linear layers, swish between them. LeCun-uniform weights, the last ones scaled; biases 0."""

    def __init__(self, widths: list[int], head_scale: float, rngs: nnx.Rngs):
        init = nnx.initializers.lecun_uniform()
        self.layers = nnx.List(
            nnx.Linear(size, next_size, kernel_init=init, rngs=rngs)
            for size, next_size in zip(widths, widths[1:], strict=False)
        )
        self.layers[-1].kernel[...] *= head_scale

    def __call__(self, x):
        for layer in self.layers[:-1]:
            x = nnx.swish(layer(x))
        return self.layers[-1](x)


class ActorCritic(nnx.Module):
    """Two MLPs: the actor sees what the robot measures, the critic what the simulator knows."""

    def __init__(self, shapes: dict, args: Args, rngs: nnx.Rngs):
        actions = shapes["action"]
        self.state_std = args.std == "state"
        outputs = 2 * actions if self.state_std else actions
        hidden = list(args.hidden)
        self.actor = MLP([shapes["state"], *hidden, outputs], args.head_scale, rngs)
        self.critic = MLP([shapes["privileged_state"], *hidden, 1], args.head_scale, rngs)
        start = math.log(math.expm1(args.init_std - MIN_STD))  # softplus undone
        if self.state_std:
            bias = self.actor.layers[-1].bias
            bias[...] = bias[...].at[actions:].set(start)
        else:
            # not of JAX's weak type, with which the first update would be compiled a second time
            self.scale = nnx.Param(jnp.full(actions, start, jnp.float32))

    def policy(self, obs: dict):
        """Normalised obs -> mean and deviation (..., A) of the Gaussian before the tanh."""
        out = self.actor(obs["state"])
        if self.state_std:
            loc, scale = jnp.split(out, 2, -1)
        else:
            loc, scale = out, jnp.broadcast_to(self.scale[...], out.shape)
        return loc, nnx.softplus(scale) + MIN_STD

    def value(self, obs: dict):
        """Normalised obs -> values (...)."""
        return self.critic(obs["privileged_state"])[..., 0]


class Stats(NamedTuple):
    """Count, mean and variance of what was observed so far, per entry."""

    count: jax.Array
    mean: jax.Array
    var: jax.Array


class Learner(NamedTuple):
    """All that learning changes."""

    params: nnx.State
    opt_state: tuple
    stats: dict  # Stats of "state" and of "privileged_state"
    learning_rate: jax.Array


# same in: ppo_mjx_go1, distill_go1
def optimizer(args: Args) -> optax.GradientTransformation:
    """Adam after clipping the joint gradient; the learning rate, which varies, is applied later."""
    return optax.chain(optax.clip_by_global_norm(args.max_grad_norm), optax.scale_by_adam())


def new_learner(shapes: dict, args: Args) -> tuple[nnx.GraphDef, Learner]:
    """-> the networks without their weights, which are static inside jit, and everything else."""

    def make() -> ActorCritic:
        return ActorCritic(shapes, args, nnx.Rngs(jax.random.key(args.seed)))

    @jax.jit  # one program instead of one for each weight
    def begin() -> Learner:
        params = nnx.as_pure(nnx.state(make()))
        stats = {}
        for name in ("state", "privileged_state"):
            zeros = jnp.zeros(shapes[name])
            stats[name] = Stats(jnp.zeros(()), zeros, zeros + 1)
        rate = jnp.float32(args.learning_rate)
        return Learner(params, optimizer(args).init(params), stats, rate)

    model, _ = nnx.split(nnx.eval_shape(make))
    return model, begin()


# --- Update functions -----------------------------------------------------------------------------
def merge_stats(stats: Stats, x) -> Stats:
    """Welford's update by a batch x (..., F) (Chan et al. 1979, eq. 2.1)."""
    x = x.reshape(-1, x.shape[-1])
    total = stats.count + len(x)
    share = len(x) / total
    delta = x.mean(0) - stats.mean
    spread = share * (x.var(0) - stats.var) + share * (1 - share) * jnp.square(delta)
    return Stats(total, stats.mean + share * delta, stats.var + spread)


def normalize(stats: dict, obs: dict) -> dict:
    """Each entry with mean 0 and deviation 1, as far as was observed."""
    scaled = {}
    for name, s in stats.items():
        scaled[name] = (obs[name] - s.mean) / jnp.maximum(jnp.sqrt(s.var), MIN_OBS_STD)
    return scaled


def log_det(raw):
    """log |d tanh(x) / dx| of each entry, exact also where tanh is flat."""
    return 2 * (math.log(2.0) - raw - nnx.softplus(-2 * raw))


def log_prob(loc, std, raw):
    """Log-density (...) of the action tanh(raw) (..., A) of a squashed Gaussian."""
    gauss = -0.5 * jnp.square((raw - loc) / std) - jnp.log(std) - 0.5 * math.log(2 * math.pi)
    return (gauss - log_det(raw)).sum(-1)


# same in: ppo_mjx_go1, distill_go1
def gaussian_kl(old_loc, old_std, loc, std):
    """KL(old || new) (...) of diagonal Gaussians; a tanh, the same for both, does not change it."""
    ratio = (jnp.square(old_std) + jnp.square(old_loc - loc)) / (2 * jnp.square(std))
    return (jnp.log(std / old_std) + ratio - 0.5).sum(-1)


def gae(rewards, terminations, truncations, values, next_values, gamma, gae_lambda):
    """Advantages, returns (T, N) (Schulman et al. 2016, eq. 16). next_values: of the true next obs.

    A fall ends the future; at a time-out V(s_T) stands for it, and only the sum over later steps
    stops.  # differs (1)
    """
    deltas = rewards + gamma * (1 - terminations) * next_values - values
    decays = gamma * gae_lambda * (1 - jnp.maximum(terminations, truncations))

    def back(later, step):
        delta, decay = step
        advantage = delta + decay * later
        return advantage, advantage

    _, advantages = jax.lax.scan(back, jnp.zeros_like(deltas[0]), (deltas, decays), reverse=True)
    return advantages, advantages + values


def ppo_loss(params: nnx.State, mb: dict, noise, model: nnx.GraphDef, args: Args):
    """Loss, metrics of a minibatch with leaves (b, T, ...); noise (b, T, A) is standard normal."""
    net = nnx.merge(model, params)
    loc, std = net.policy(mb["obs"])
    advantages = mb["advantages"] - mb["advantages"].mean()
    advantages = advantages / (advantages.std() + 1e-8)

    ratio = jnp.exp(log_prob(loc, std, mb["raw"]) - mb["log_probs"])
    clipped = jnp.clip(ratio, 1 - args.clip_coef, 1 + args.clip_coef)
    policy_loss = -jnp.minimum(ratio * advantages, clipped * advantages).mean()  # PPO, eq. 7
    value_loss = 0.5 * jnp.square(net.value(mb["obs"]) - mb["returns"]).mean()
    # one sample instead of the integral, for which the tanh leaves no closed form
    gauss = jnp.log(std) + 0.5 * math.log(2 * math.pi * math.e)
    entropy = (gauss + log_det(loc + std * noise)).sum(-1).mean()
    loss = policy_loss - args.ent_coef * entropy + args.vf_coef * value_loss  # PPO, eq. 9
    metrics = {
        "loss/policy": policy_loss,
        "loss/value": value_loss,
        "train/entropy": entropy,
        "train/std": std.mean(),
        "train/kl": gaussian_kl(mb["loc"], mb["std"], loc, std).mean(),
        "train/clip_fraction": (jnp.abs(ratio - 1) > args.clip_coef).mean(),
    }
    return loss, metrics


def adapted(rate, kl, target_kl: float):
    """The learning rate after a minibatch: unchanged if KL is between half and twice the target."""
    slower = jnp.where(kl > 2 * target_kl, rate / 1.5, rate)
    return jnp.clip(jnp.where(kl < target_kl / 2, rate * 1.5, slower), *RATES)


def update(learner: Learner, mb: dict, noise, first, model: nnx.GraphDef, args: Args):
    """One gradient step -> learner, metrics. first: no step of this iteration came before."""
    gradient = jax.grad(ppo_loss, has_aux=True)
    grads, metrics = gradient(learner.params, mb, noise, model, args)
    rate = learner.learning_rate
    # at the first step the policy is still the old one: no divergence to judge by
    if args.target_kl:
        rate = jnp.where(first, rate, adapted(rate, metrics["train/kl"], args.target_kl))
    steps, opt_state = optimizer(args).update(grads, learner.opt_state)
    params = jax.tree.map(lambda p, step: p - rate * step, learner.params, steps)
    return learner._replace(params=params, opt_state=opt_state, learning_rate=rate), metrics


def learn(learner: Learner, batch: dict, key, model: nnx.GraphDef, args: Args):
    """All updates of an iteration; a rollout with leaves (T, N, ...) -> learner, mean metrics."""
    ends = batch["terminations"], batch["truncations"]
    values = batch["values"], batch["next_values"]
    advantages, returns = gae(batch["rewards"], *ends, *values, args.gamma, args.gae_lambda)
    obs = normalize(learner.stats, batch["obs"])  # differs (2)
    data = batch | dict(obs=obs, advantages=advantages, returns=returns)
    data = jax.tree.map(lambda x: x.swapaxes(0, 1), data)  # (N, T, ...)

    def minibatch(learner, step):
        number, indices, noise_key = step
        mb = jax.tree.map(lambda x: x[indices], data)
        noise = jax.random.normal(noise_key, mb["raw"].shape)
        return update(learner, mb, noise, number == 0, model, args)

    num_envs, updates = len(data["raw"]), args.update_epochs * args.num_minibatches
    order_key, noise_key = jax.random.split(key)
    epochs = jax.random.split(order_key, args.update_epochs)
    orders = jax.vmap(lambda epoch: jax.random.permutation(epoch, num_envs))(epochs)  # (E, N)
    indices = orders.reshape(updates, -1)  # (E M, b)
    steps = jnp.arange(updates), indices, jax.random.split(noise_key, updates)
    updated, metrics = jax.lax.scan(minibatch, learner, steps)

    first_rollout = learner.stats["state"].count == 0  # differs (2)
    updated = jax.tree.map(lambda new, old: jnp.where(first_rollout, old, new), updated, learner)
    stats = {name: merge_stats(s, batch["obs"][name]) for name, s in learner.stats.items()}
    metrics = {name: value.mean() for name, value in metrics.items()}
    metrics["train/learning_rate"] = updated.learning_rate
    unexplained = jnp.square(advantages).mean() / (returns.var() + 1e-8)
    metrics["train/explained_variance"] = 1 - unexplained
    return updated._replace(stats=stats), metrics


def act(learner: Learner, obs: dict, key, model: nnx.GraphDef) -> tuple[jax.Array, dict]:
    """obs (N, F) -> actions (N, A), and what the update needs to know of them."""
    net = nnx.merge(model, learner.params)
    seen = normalize(learner.stats, obs)
    loc, std = net.policy(seen)
    raw = loc + std * jax.random.normal(key, loc.shape)
    values, log_probs = net.value(seen), log_prob(loc, std, raw)
    choice = dict(obs=obs, raw=raw, loc=loc, std=std, log_probs=log_probs, values=values)
    return jnp.tanh(raw), choice


def outcome(learner: Learner, state, model: nnx.GraphDef) -> dict:
    """What came of the actions (N,): the rest of the transition."""
    next_obs = normalize(learner.stats, state.final_obs)
    return dict(
        rewards=state.reward,
        terminations=state.terminated.astype(jnp.float32),
        truncations=state.truncated.astype(jnp.float32),
        next_values=nnx.merge(model, learner.params).value(next_obs),
    )


def step_log(state) -> tuple[dict, dict]:
    """Of one step of all environments: means of the metrics, sums over the episodes that ended."""
    means = {f"train/{name}": value.mean() for name, value in state.metrics.items()}
    means["train/reward"] = state.reward.mean()
    ended = state.terminated | state.truncated
    sums = {
        "train/episodes": ended.sum(),
        "train/falls": state.terminated.sum(),
        "train/return": (ended * state.episode_return).sum(),
        "train/length": (ended * state.episode_length).sum(),
    }
    return means, sums


def iterate(learner: Learner, state, first, env, model: nnx.GraphDef, args: Args, iterations: int):
    """Many iterations: rollout, then updates -> learner, state, what to log (K, ...).

    Random numbers follow from the seed and the iteration's number (`first`, ...): none are saved.
    """

    def iteration(carry, number):
        learner, state = carry
        key = jax.random.fold_in(jax.random.key(args.seed), number)
        act_key, learn_key = jax.random.split(key)

        def step(state, key):
            actions, choice = act(learner, state.obs, key, model)
            state = env.step_batch(state, actions)
            return state, (choice | outcome(learner, state, model), step_log(state))

        keys = jax.random.split(act_key, args.unroll_length)
        state, (batch, (means, sums)) = jax.lax.scan(step, state, keys)
        learner, metrics = learn(learner, batch, learn_key, model, args)
        return (learner, state), (metrics | means, sums)

    (learner, state), log = jax.lax.scan(
        iteration, (learner, state), first + jnp.arange(iterations)
    )
    return learner, state, log


def stacked(trees):
    """Trees with equal leaves' shapes as one, with a leading axis."""
    return jax.tree.map(lambda *leaves: np.stack(leaves), *trees)


def in_threads(env, model: nnx.GraphDef, args: Args, iterations: int):
    """-> `iterate` for physics outside XLA; its state is a tuple of SHARES of the environments.

    While one share is simulated another acts. No compiled part calls back, so JAX can cache all.
    """
    pool = ThreadPoolExecutor(SHARES)
    play = jax.jit(partial(act, model=model))
    teach = jax.jit(partial(learn, model=model, args=args))
    judge = jax.jit(lambda learner, state: (outcome(learner, state, model), step_log(state)))

    def rollout(learner, state, key):
        """T steps of a share -> its state, batch, log; the leaves of both are (T, ...)."""
        steps = []
        for step_key in jax.random.split(key, args.unroll_length):
            actions, choice = play(learner, state.obs, step_key)
            state = env.step_batch(state, actions)
            results, log = judge(learner, state)
            steps.append((choice | results, log))
        return state, *stacked(steps)

    def run(learner, shares, first):
        rows = []
        for number in range(first, first + iterations):
            key = jax.random.fold_in(jax.random.key(args.seed), number)
            *keys, learn_key = jax.random.split(key, SHARES + 1)
            both = pool.map if number else map  # the first time two threads would compile twice
            jobs = both(partial(rollout, learner), shares, keys)
            shares, batches, logs = zip(*jobs, strict=True)
            batch = jax.tree.map(lambda *parts: np.concatenate(parts, axis=1), *batches)
            learner, metrics = teach(learner, batch, learn_key)
            means, sums = stacked(logs)
            rows.append((metrics | means, sums))
        return learner, shares, stacked(rows)

    return run


# --- evaluate -------------------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def evaluate(act, env, episodes: int, seed: int = EVAL_SEED) -> tuple[dict, list]:
    """Whole episodes with fixed seeds, one environment for each; act: obs -> actions.

    -> metrics; qpos of the first environment's first seconds
    """
    state = env.reset_batch(jax.random.split(jax.random.PRNGKey(seed), episodes))
    running = np.ones(episodes, bool)
    returns, lengths, falls = np.zeros(episodes), np.zeros(episodes), np.zeros(episodes)
    sums, film = {}, []
    for _ in range(env.episode_length):
        if running[0] and len(film) < VIDEO_SECONDS * env.control_hz:
            film.append(np.asarray(state.qpos[0]))
        state = env.step_batch(state, act(state.obs))
        for name, value in state.metrics.items():
            sums[name] = sums.get(name, 0.0) + np.asarray(value)[running].sum()
        fallen = np.asarray(state.terminated)
        ended = running & (fallen | np.asarray(state.truncated))  # each environment counts once
        returns[ended] = np.asarray(state.episode_return)[ended]
        lengths[ended] = np.asarray(state.episode_length)[ended]
        falls[ended] = fallen[ended]
        running &= ~ended
        if not running.any():
            break
    mean, deviation = returns.mean(), returns.std(ddof=min(1, episodes - 1))
    half = 1.96 * deviation / math.sqrt(episodes)  # 95% confidence interval of the mean
    results = {
        "eval/return": mean,
        "eval/return_std": deviation,
        "eval/ci_low": mean - half,
        "eval/ci_high": mean + half,
        "eval/length": lengths.mean(),
        "eval/fall_rate": falls.mean(),
    }
    results |= {f"eval/{name}": value / lengths.sum() for name, value in sums.items()}
    return {name: float(value) for name, value in results.items()}, film


def evaluate_file(path: str | Path, env, args: Args) -> dict:
    """A checkpoint's policy, on episodes that did not choose it -> metrics `final/...`; a video.

    Four times as many as beside training: few falls are to be counted well.
    """
    policy, actions = Policy(path), []

    def act(obs):
        actions.append(policy.act(obs))
        return actions[-1]

    results, film = evaluate(act, env, 4 * args.eval_episodes, FINAL_SEED)
    results = {name.replace("eval/", "final/"): value for name, value in results.items()}
    jerk = np.abs(np.diff(actions, n=3, axis=0)).mean()
    if args.capture_video:  # at half the control rate
        video = Path(path).parent / "videos/evaluate.mp4"
        video.parent.mkdir(exist_ok=True)
        frames = env.render(np.stack(film[::2]))
        imageio.mimwrite(video, frames, fps=round(env.control_hz / 2), macro_block_size=1)
    return results | {"final/action_jerk": float(jerk) * env.control_hz**3}


# --- save / load ----------------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def named(**parts) -> dict[str, np.ndarray]:
    """Every array of some trees under a name that says where it stands."""
    arrays = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(parts):
        arrays[jax.tree_util.keystr(path, simple=True, separator="/")] = np.asarray(leaf)
    return arrays


# same in: ppo_mjx_go1, distill_go1
def save(path: Path, meta: dict, arrays: dict[str, np.ndarray]):
    """One .npz. Written under a temporary name: an interrupted save leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.savez(file, meta=np.array(json.dumps(meta)), **arrays)
    os.replace(temporary, path)


# same in: ppo_mjx_go1, distill_go1
def load(path: str | Path) -> dict:
    """A checkpoint: what its meta holds (algo, args, shapes, spec, ...), and "arrays" by name.

    Runs no code of the file. Raises FileNotFoundError, or ValueError if it is none.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        with np.load(path, allow_pickle=False) as file:
            arrays = {name: file[name] for name in file.files}
        meta = json.loads(str(arrays.pop("meta")))
    except Exception as error:  # NumPy names many kinds of damage; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    ours = meta.get("algo") in ("ppo_mjx_go1", "distill_go1")  # each can begin with the other's
    need(ours, f"{path} is neither ppo_mjx_go1's nor distill_go1's")
    weights = [array for name, array in arrays.items() if name.startswith("params/")]
    finite = all(np.isfinite(array).all() for array in weights)
    need(finite, f"{path} has weights that are not finite")
    for name, value in meta["args"].items():
        meta["args"][name] = tuple(value) if isinstance(value, list) else value
    return meta | {"arrays": arrays}


# same in: ppo_mjx_go1, distill_go1
def restored(tree, name: str, checkpoint: dict):
    """The part `name` of a checkpoint in the form of `tree`. Raises ValueError naming a misfit."""

    def leaf(path, old):
        full = f"{name}/{jax.tree_util.keystr(path, simple=True, separator='/')}".rstrip("/")
        new = checkpoint["arrays"].get(full)
        fits = new is not None and new.shape == old.shape
        need(fits, f"the checkpoint differs in {full}: this run has {old.shape}")
        return jnp.asarray(new)

    return jax.tree_util.tree_map_with_path(leaf, tree)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
class Interrupt:
    """Ctrl-C sets `asked`: the loop finishes its step and saves. A second one ends it at once."""

    def __init__(self):
        self.asked = False
        self.earlier = signal.signal(signal.SIGINT, self)

    def __call__(self, number, frame):
        self.asked = True
        self.restore()

    def restore(self):
        signal.signal(signal.SIGINT, self.earlier)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def write_row(path: Path, row: dict, track: bool):
    """Append to a CSV file, whose first row names the columns; `track`: to Weights & Biases too."""
    with path.open("a", newline="") as file:
        writer = csv.writer(file)
        if file.tell() == 0:
            writer.writerow(row.keys())
        writer.writerow(row.values())
    if track:
        import wandb

        wandb.log(row, step=row["global_step"])


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def csv_sizes(run: Path) -> dict[str, int]:
    """Bytes of each CSV file of the run: what a checkpoint has not seen is cut off on --resume."""
    return {path.name: path.stat().st_size for path in run.glob("*.csv")}


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def cut_back(run: Path, sizes: dict[str, int]):
    """Shorten each CSV file to its size at the checkpoint; a later one is emptied."""
    for path in run.glob("*.csv"):
        os.truncate(path, sizes.get(path.name, 0))


# --- Policy ---------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out, from one checkpoint file (or what `load` reads of it), in NumPy.

    `spec` describes the robot: joints and limits, control rate, gains, layout of the observation.
    """

    def __init__(self, source: str | Path | dict):
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args, self.spec = checkpoint["args"], checkpoint["spec"]
        arrays, actions = checkpoint["arrays"], checkpoint["shapes"]["action"]
        self.mean = arrays["stats/state/mean"]
        self.scale = np.maximum(np.sqrt(arrays["stats/state/var"]), MIN_OBS_STD)
        self.layers = []
        for i in range(len(self.args["hidden"]) + 1):
            layer = f"params/actor/layers/{i}"
            self.layers.append((arrays[f"{layer}/kernel"], arrays[f"{layer}/bias"]))
        kernel, bias = self.layers[-1]
        self.layers[-1] = (kernel[:, :actions], bias[:actions])  # without the deviations

    def act(self, obs: dict) -> np.ndarray:
        """obs["state"] (..., F) -> actions (..., A) = tanh(mean)."""
        x = (np.asarray(obs["state"], np.float32) - self.mean) / self.scale
        for kernel, bias in self.layers[:-1]:
            x = x @ kernel + bias
            x = x * (0.5 + 0.5 * np.tanh(0.5 * x))  # swish, without an exponential that overflows
        kernel, bias = self.layers[-1]
        return np.tanh(x @ kernel + bias)


# --- train ----------------------------------------------------------------------------------------
# same in: ppo_mjx_go1, distill_go1
def open_run(args: Args) -> Path:
    """The run's folder, made or found. Raises ValueError if another run has the name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    name = args.name or f"{args.env_id}__{Path(__file__).stem}__s{args.seed}__{stamp}"
    run = Path(args.resume or f"runs/{name}")
    taken = (run / "checkpoint.npz").exists() and not args.resume
    need(not taken, f"{run} exists: continue it with --resume {run}, or choose another --name")
    inside = args.resume or run.resolve().parent == Path("runs").resolve()
    need(inside, "--name must be the name of a folder in runs/, not a path")
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    if args.track:
        try:
            import wandb

            known = dict(id=run.name, name=run.name, resume="allow", config=asdict(args))
            wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), **known)
        except ModuleNotFoundError as error:
            raise ValueError("--track needs Weights & Biases: pip install wandb") from error
        except wandb.Error as error:
            raise ValueError(f"--track: {error}") from error
    return run


def log_row(log: tuple[dict, dict]) -> dict:
    """What the iterations of a call gave, as one row of metrics.csv."""
    means, sums = log
    row = {name: float(values.mean()) for name, values in means.items()}
    sums = {name: float(values.sum()) for name, values in sums.items()}
    for name in ("train/return", "train/length"):
        sums[name] /= max(sums["train/episodes"], 1.0)
    return sums | row


# same in: ppo_mjx_go1, distill_go1
def check_finite(params, row: dict, global_step: int, run: Path):
    """Raises FloatingPointError that names the first weight or metric that is not finite."""
    for name, value in (named(params=params) | row).items():
        if not np.isfinite(value).all():
            said = f"{name} is not finite at step {global_step}"
            raise FloatingPointError(f"{said}; last good checkpoint: {run}/checkpoint.npz")


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at NaN.
    """
    check(args)
    env, eval_env = make_envs(args)
    if args.evaluate:
        results = evaluate_file(args.checkpoint, eval_env, args)
        print(json.dumps(results))
        return results

    shapes = dict(state=env.obs_dim, privileged_state=env.privileged_dim, action=env.action_dim)
    model, learner = new_learner(shapes, args)
    keys = jax.random.split(jax.random.PRNGKey(args.seed), args.num_envs)
    if args.backend == "mujoco-c":
        shares = np.array_split(keys, SHARES)
        state = tuple(env.reset_batch(share, stagger=True) for share in shares)
    else:
        state = env.reset_batch(keys, stagger=True)  # differs (3)
    progress = dict(iteration=0, global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    source = Path(args.resume) / "checkpoint.npz" if args.resume else args.checkpoint
    if source:
        checkpoint = load(source)
        for name in learner._fields if args.resume else ("params", "stats"):
            part = restored(getattr(learner, name), name, checkpoint)
            learner = learner._replace(**{name: part})
    if args.resume:
        state = restored(state, "env", checkpoint)
        progress = checkpoint["progress"]
        cut_back(Path(args.resume), checkpoint["csv_sizes"])

    run = open_run(args)
    versions = {module.__name__: module.__version__ for module in (jax, optax, np)}
    meta = dict(algo=ALGO, args=asdict(args), shapes=shapes, spec=env.spec, versions=versions)

    def save_as(name: str, **parts):
        now = dict(progress=progress, csv_sizes=csv_sizes(run))
        save(run / name, meta | now, named(**parts))

    if not args.resume:
        save_as("checkpoint.npz", **learner._asdict(), env=state)
    per_iteration = args.num_envs * args.unroll_length
    iterations = max(1, args.log_freq // per_iteration)
    per_call = iterations * per_iteration
    if args.backend == "mujoco-c":
        program = in_threads(env, model, args, iterations)
    else:
        program = partial(iterate, env=env, model=model, args=args, iterations=iterations)
        program = jax.jit(program).lower(learner, state, np.int32(0)).compile()

    results = {}
    born = START - progress["wall_time"]
    step = progress["global_step"]
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=1)
    interrupt = Interrupt()
    while progress["global_step"] < args.total_timesteps and not interrupt.asked:
        # act, step, store, update: many iterations in one call
        begun = time.perf_counter()
        learner, state, log = program(learner, state, np.int32(progress["iteration"]))
        log = jax.tree.map(np.asarray, log)  # waits for the device
        seconds = time.perf_counter() - begun
        step = progress["global_step"] + per_call
        progress["iteration"] += iterations
        progress["global_step"] = step
        progress["train_time"] += seconds
        progress["wall_time"] = time.time() - born

        # log
        clock = {name: progress[name] for name in ("global_step", "wall_time", "train_time")}
        row = log_row(log) | {"time/sps": per_call / seconds}
        check_finite(learner.params, row, step, run)
        write_row(run / "metrics.csv", clock | row, args.track)
        lost = row.get("train/overflow", 0.0)
        need(lost <= MAX_OVERFLOW, f"step {step}: contacts lost in {lost:.2%} of steps: allow more")
        bar.update(per_call)
        bar.set_postfix_str(f"return {row['train/return']:.2f}, length {row['train/length']:.0f}")

        # evaluate
        due = step % args.eval_freq < per_call or step >= args.total_timesteps
        if due:
            weights = dict(params=learner.params, stats=learner.stats)
            policy = Policy(meta | dict(arrays=named(**weights)))
            results, _ = evaluate(policy.act, eval_env, args.eval_episodes)
            write_row(run / "eval.csv", clock | results, args.track)
            bar.write(f"{step} steps: return {results['eval/return']:.2f}")
            if results["eval/return"] > progress["best"]:
                progress["best"] = results["eval/return"]
                save_as("best.npz", **weights)

        # save
        if due or interrupt.asked:
            save_as("checkpoint.npz", **learner._asdict(), env=state)
    bar.close()
    interrupt.restore()
    if interrupt.asked:
        sys.exit(f"interrupted at step {step}: continue with --resume {run}")
    final = evaluate_file(run / "best.npz", eval_env, args)
    write_row(run / "final.csv", {"global_step": step} | final, args.track)
    return results | final | progress | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
