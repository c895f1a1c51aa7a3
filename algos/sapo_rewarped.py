"""SAPO: maximum-entropy reinforcement learning with first-order gradients through a simulation.

Paper: Xing, Luk and Oh, "Stabilizing Reinforcement Learning in Differentiable Multiphysics
Simulation", arXiv 2412.12089. Two relatives are presets: SHAC (Xu et al., arXiv 2204.07137) and
APG, which is SHAC without a critic. Both are rows of TUNED, and nothing else asks for `--algo`.

    entropy   h = -log pi(a'|s), a' a fresh sample, scaled: h^ = (h + |H|) / (2 |H|), H = -A / 2
    reward    r~ = r + alpha h^
    actor     max 1/(N T) sum over segments of [sum_k g^k r~_k + g^L mean_k V_k(s_L)], back through
              the simulation
    critics   V_k -> G, G_t = r~_t + g [(1 - l) min_k V_k(s_(t+1)) + l G_(t+1)]; where an episode or
              the window ends G_t = r~_t + g min_k V_k(s_(t+1)), with V = 0 after a termination and
              V(final observation) after a time limit
    alpha     min alpha |H| (mean h - H)

Differences from the authors' code; `# differs (n)` marks the places:
 1. The value after step t is that of s_(t+1). Theirs takes s_t on the rigid-body tasks.
 2. The gradient's norm is clipped with the encoders' share; theirs leaves the encoders unclipped.
 3. The critics' minibatches are shuffled; theirs are runs of consecutive time steps.
 4. A gradient that is not finite is zeroed for that environment and action; theirs ends the run.
 5. Evaluation takes the mean action; theirs samples.
 6. All presets share one kind of running statistics (float64, one pseudo-observation), updated
    once per window.

Commands, from the repository's root:
    train          python algos/sapo_rewarped.py --env-id RollingFlat
    SHAC           python algos/sapo_rewarped.py --env-id RollingFlat --algo shac
    smallest run   python algos/sapo_rewarped.py --env-id AntRun --device cpu
    evaluate       python algos/sapo_rewarped.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/sapo_rewarped.py --resume runs/NAME    (exactly)

Expected result on one CPU core, three seeds: AntRun at the published size 9,347 +- 3,641 after 4.1
million transitions and 31 minutes (--size full); at the small size 490 +- 47 after 131,072 and one
minute (SHAC 334 +- 4, a random policy 81). Curves, and why more than the paper's 4,536:
docs/algos/sapo_rewarped.md. Not yet measured on a GPU.

Shapes: N environments, T steps of a window (`--horizon`), B batch, K critics, A action dimensions,
S state dimensions, P particles.
"""

# --- Imports --------------------------------------------------------------------------------------
import os

# Threads spin for a moment before they wait: much longer, and a run beside other work collapses.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import copy
import csv
import inspect
import json
import math
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Literal

import imageio.v2 as imageio
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils.data import default_collate
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv

# --- Args -----------------------------------------------------------------------------------------
SHAC = dict(
    entropy_in_return=False,
    entropy_in_value=False,
    autotune=False,
    num_critics=1,
    target_decay=0.995,
    state_std=False,
    activation="elu",
    weight_decay=0.0,
    max_grad_norm=1.0,
)
# (algorithm, task, size) -> defaults other than those of Args; later rows win.
TUNED = {
    # As published; SAPO is Args as it stands.
    ("shac", "*", "*"): SHAC,
    ("apg", "*", "*"): SHAC | dict(num_critics=0),
    ("*", "AntRun", "*"): dict(
        num_envs=64, actor_units=(128, 64, 32), critic_units=(64, 64), recompute=False
    ),
    ("shac", "AntRun", "*"): dict(critic_lr=2e-3, target_decay=0.2),
    ("*", "HandReorient", "*"): dict(num_envs=64),
    ("*", "SoftJumper", "*"): dict(total_timesteps=6_144_000),
    ("*", "HandFlip", "*"): dict(total_timesteps=6_144_000),
    # Ours, for runs of a few hundred windows: alpha begins at about a tenth of a step's reward and
    # falls four times as fast, or it drowns the task; the critics take fewer and larger steps.
    ("*", "*", "small"): dict(
        num_envs=4,
        eval_episodes=8,
        actor_units=(64, 64),
        critic_units=(64, 64),
        critic_epochs=4,
        critic_lr=2e-3,
        alpha=0.05,
        alpha_lr=0.02,
        total_timesteps=8_192,
        eval_freq=1_024,
        capture_video=False,
        recompute=False,
    ),
    ("shac", "*", "small"): dict(target_decay=0.2),  # 0.995 would leave the target where it began
    ("*", "AntRun", "small"): dict(
        num_envs=16,
        eval_episodes=16,
        alpha=0.1,
        total_timesteps=131_072,
        eval_freq=16_384,
    ),
    ("*", "SoftJumper", "small"): dict(num_envs=8, total_timesteps=20_480, eval_freq=2_048),
    ("*", "RollingFlat", "small"): dict(
        num_envs=8,
        stagger=True,
        horizon=16,
        gamma=0.95,
        actor_lr=1e-2,
        alpha=0.02,
        total_timesteps=5_120,
        eval_freq=640,
    ),
    ("*", "FluidMove", "small"): dict(alpha=0.001),
    ("*", "HandFlip", "small"): dict(alpha=0.001),
}


@dataclass
class Args:
    # run
    algo: Literal["sapo", "shac", "apg"] = "sapo"  # a name for switches below: TUNED
    env_id: str = "RollingFlat"  # or AntRun, HandReorient, SoftJumper, HandFlip, FluidMove
    seed: int = 1  # of weights, exploration, minibatches and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 4_096_000  # environment transitions, over all environments
    eval_freq: int = 102_400  # transitions between evaluations; each also saves checkpoint.pt
    eval_episodes: int = 64  # of an evaluation, all at once, the same every time
    evaluate: bool = False  # only evaluate --checkpoint
    checkpoint: str | None = None  # file to evaluate
    resume: str | None = None  # run folder to continue exactly, with its arguments
    capture_video: bool = True  # write an mp4 of one episode of every evaluation
    track: bool = False  # log to Weights & Biases too; WANDB_PROJECT names the project

    # environment
    num_envs: int = 32  # N: parallel environments
    size: Literal["full", "small"] | None = None  # None: full on a GPU, small on a CPU
    reward: Literal["default", "paper"] = "default"  # paper: even where it has no usable gradient
    stagger: bool = False  # begin in the middle of episodes, so that not all end at once
    recompute: bool = True  # run each step again on the way back: slower, far less memory

    # algorithm
    horizon: int = 32  # T: steps of a window, through which the actor's gradient flows
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # of the critics' targets
    actor_lr: float = 2e-3  # learning rate of the actor, one step per window
    critic_lr: float = 5e-4  # learning rate of the critics
    alpha_lr: float = 5e-3  # learning rate of log alpha; constant
    final_lr: float = 1e-5  # where actor_lr and critic_lr fall to, linearly
    weight_decay: float = 0.01  # AdamW's; 0: Adam
    max_grad_norm: float = 0.5  # of actor, critics and log alpha; 0: not clipped
    critic_epochs: int = 16  # passes over the window
    num_minibatches: int = 4  # critic steps per pass
    num_critics: int = 2  # K; 0: no value, the return ends with the window
    target_decay: float = 0.0  # share that a target critic keeps per window; 0: no target critic
    entropy_in_return: bool = True  # the actor's rewards are r~, not r
    entropy_in_value: bool = True  # the critics' rewards are r~, not r
    autotune: bool = True  # learn alpha
    alpha: float = 1.0  # weight of the entropy: the first with autotune, else the constant one
    target_entropy_scale: float = 0.5  # H = -scale x A
    state_std: bool = True  # the deviation depends on the state; else one vector, e^-1 at first
    activation: Literal["silu", "elu"] = "silu"  # weights begin with gain 1, with elu sqrt 2
    actor_units: tuple[int, ...] = (512, 256)  # widths of the actor's layers
    critic_units: tuple[int, ...] = (256, 256)  # widths of each critic's layers

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and simulation


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
    rest = args.num_envs * args.horizon % args.num_minibatches
    need(rest == 0, "--num-minibatches must divide --num-envs x --horizon")
    need(args.alpha > 0, "--alpha must be above 0: its logarithm is learned")
    need(args.evaluate == bool(args.checkpoint), "--evaluate and --checkpoint FILE go together")
    there = torch.cuda.is_available() or args.device == "cpu"
    need(there, "there is no CUDA device here: use --device cpu")


def tuned(algo: str, env_id: str, size: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for (algos, tasks, sizes), row in TUNED.items():
        if fnmatch(algo, algos) and fnmatch(env_id, tasks) and fnmatch(size, sizes):
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
    """Command line -> Args. Defaults are the task's and size's, or those of the run or file."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    if given.checkpoint:
        saved = Args(**load(given.checkpoint)["args"])
        defaults = replace(saved, name="", resume=None, device=given.device)
    else:
        size = given.size or ("full" if given.device.startswith("cuda") else "small")
        values = tuned(given.algo, given.env_id, size)
        defaults = replace(given, size=size, **values)
    return cli(argv, defaults)


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
def resumed_args(run: str, argv: list[str]) -> Args:
    """The arguments of a run. Only its length, tracking and a device of the same kind may change.

    Raises ValueError that names what differs, FileNotFoundError without a checkpoint.
    """
    saved = replace(Args(**load(Path(run) / "checkpoint.pt")["args"]), resume=run)
    args = cli(argv, saved)
    for name, value in asdict(args).items():
        free = name in ("total_timesteps", "steps", "track", "device")
        flag = "--" + name.replace("_", "-")
        need(free or value == getattr(saved, name), f"{flag} cannot change on --resume of {run}")
    kind = saved.device.split(":")[0]
    need(args.device.startswith(kind), f"--device must stay {kind}: its random numbers are others")
    return args


# --- make_envs ------------------------------------------------------------------------------------
def make_envs(args: Args) -> tuple:
    """-> training environment (None with --evaluate), evaluation environment.

    Any differentiable environment that keeps the contract of envs/__init__.py can stand here.
    """
    try:
        import envs
    except ModuleNotFoundError as error:
        raise ValueError("make_envs needs envs: pip install -e . in the repository") from error
    options = dict(
        reward=args.reward,
        size=args.size,
        checkpoint=args.recompute,
        window=args.horizon,
    )
    eval_env = envs.make(args.env_id, args.eval_episodes, args.device, seed=EVAL_SEED, **options)
    if args.evaluate:
        return None, eval_env
    options |= dict(seed=args.seed, stagger=args.stagger)
    return envs.make(args.env_id, args.num_envs, args.device, **options), eval_env


# --- Networks -------------------------------------------------------------------------------------
class RunningNorm(nn.Module):
    """Normalises states by mean and variance of all so far, and of one made up with 0 and 1."""

    def __init__(self, size: int):
        super().__init__()  # differs (6)
        self.register_buffer("count", torch.ones(()).double())
        self.register_buffer("total", torch.zeros(size).double())
        self.register_buffer("squares", torch.ones(size).double())

    def forward(self, obs: dict) -> dict:
        """Observations with a normalised state; particles stay in metres."""
        mean = self.total / self.count
        var = self.squares / self.count - mean.square()
        state = (obs["state"] - mean.float()) / (var.float() + 1e-5).sqrt()
        return obs | {"state": state}

    @torch.no_grad()
    def update(self, states):
        """Add states (..., S), except absurd ones."""
        states = states[(states.abs() < 1e6).all(-1)].double()  # (M, S)
        self.count += len(states)
        self.total += states.sum(0)
        self.squares += states.square().sum(0)


def mlp(args: Args, *widths: int) -> nn.Sequential:
    """Linear, LayerNorm and activation for each layer."""
    activation = {"silu": nn.SiLU, "elu": nn.ELU}[args.activation]
    layers = []
    for inputs, outputs in zip(widths[:-1], widths[1:], strict=True):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), activation()]
    return nn.Sequential(*layers)


class Net(nn.Module):
    """Observation (B, ...) -> (K, B, outputs): an encoder, and K MLPs behind it.

    Particles go through an MLP one by one, then their mean does; without them the encoder is the
    state itself.
    """

    def __init__(self, shapes: dict, args: Args, units: tuple, outputs: int, heads: int = 1):
        super().__init__()
        width = shapes["state"][0]
        self.has_points = "points" in shapes
        if self.has_points:
            self.each = mlp(args, 3, 64, 128, 256)
            self.mean = mlp(args, 256, 64)
            self.low = mlp(args, width, 128)
            width = 64 + 128
        self.heads = nn.ModuleList()
        for _ in range(heads):
            last = nn.Linear(units[-1], outputs)
            self.heads.append(nn.Sequential(mlp(args, width, *units), last))

    def forward(self, obs):
        features = obs["state"]
        if self.has_points:
            cloud = self.mean(self.each(obs["points"]).mean(-2))
            features = torch.cat([cloud, self.low(obs["state"])], -1)
        return torch.stack([head(features) for head in self.heads])


class Actor(nn.Module):
    """Observation (B, ...) -> mean (B, A) and log deviation (B, A) of the action before tanh."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        outputs = 2 * shapes["action"] if args.state_std else shapes["action"]
        self.net = Net(shapes, args, args.actor_units, outputs)
        self.log_std = None
        if not args.state_std:
            self.log_std = nn.Parameter(torch.full((shapes["action"],), -1.0))

    def forward(self, obs):
        x = self.net(obs)[0]
        if self.log_std is None:
            mean, log_std = x.chunk(2, -1)
        else:
            mean, log_std = x, self.log_std.expand_as(x)
        return mean, log_std.clamp(-5, 2)


class Agent(nn.Module):
    """All that learns: statistics, actor, critics, perhaps with a target, and log alpha."""

    def __init__(self, args: Args, shapes: dict):
        super().__init__()
        self.norm = RunningNorm(shapes["state"][0])
        self.actor = Actor(shapes, args)
        self.critic = self.target = None
        if args.num_critics:
            self.critic = Net(shapes, args, args.critic_units, 1, args.num_critics)
        gain = {"silu": 1.0, "elu": math.sqrt(2)}[args.activation]
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # last layers too
                nn.init.orthogonal_(layer.weight, gain)
                nn.init.zeros_(layer.bias)
        if self.critic and args.target_decay:
            self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.entropy_scale = args.target_entropy_scale * shapes["action"]  # |H|

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "state" (N, S), perhaps "points" (N, P, 3) -> mean actions (N, A)."""
        device = self.log_alpha.device
        obs = {k: torch.as_tensor(v, dtype=torch.float32, device=device) for k, v in obs.items()}
        mean, _ = self.actor(self.norm(obs))
        return torch.tanh(mean)  # differs (5)


def make_optimizers(agent: Agent, args: Args) -> dict:
    """Of actor, alpha and, where there are some, critics."""
    options = dict(betas=(0.7, 0.95), weight_decay=args.weight_decay, fused=True)
    adamw = torch.optim.AdamW
    optimizers = dict(
        actor_optimizer=adamw(agent.actor.parameters(), args.actor_lr, **options),
        alpha_optimizer=adamw([agent.log_alpha], args.alpha_lr, **options),
    )
    if agent.critic:
        optimizers["critic_optimizer"] = adamw(agent.critic.parameters(), args.critic_lr, **options)
    return optimizers


# --- Storage --------------------------------------------------------------------------------------
def sample_actions(mean, log_std, noise):
    """noise (2, N, A) -> tanh of a normal sample (N, A), entropy estimated from another (N,)."""
    acted, other = mean + log_std.exp() * noise
    log_prob = -0.5 * noise[1].square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - other - F.softplus(-2 * other))  # log(1 - tanh^2)
    return torch.tanh(acted), -log_prob.sum(-1)


def zero_broken(grad):
    """Gradient (N, A) of actions, zeroed in environments where it is not finite."""
    return torch.where(grad.isfinite().all(-1, keepdim=True), grad, 0.0)


def absurd(obs: dict):
    """Environments (N,) whose observation is not finite or beyond 1e6 somewhere."""
    fine = [(value.detach().abs() < 1e6).flatten(1).all(-1) for value in obs.values()]
    return ~torch.stack(fine).all(0)


def rollout(agent: Agent, env, obs: dict, args: Args) -> tuple[dict, dict]:
    """One window of T steps, its graph kept. -> window, the observation after it, without graph

    window (T, N, ...): state, raw; obs and next_obs (before a reset), normalised dicts with their
    graph; rewards, entropies, terminations (also of environments that met NaN: no value follows),
    truncations, dones, returns of the episodes that ended.
    """
    env.detach()
    obs = {name: value.detach() for name, value in obs.items()}
    steps = []
    for _ in range(args.horizon):
        step = dict(state=obs["state"].detach(), obs=agent.norm(obs))
        noise = torch.randn((2, env.num_envs, env.action_dim), device=step["state"].device)
        actions, step["entropies"] = sample_actions(*agent.actor(step["obs"]), noise)
        if actions.requires_grad:
            actions.register_hook(zero_broken)  # differs (4)
        obs, rewards, terminations, truncations, info = env.step(actions)
        lost = info["nan"] | absurd(info["final_obs"])
        step["next_obs"] = agent.norm(info["final_obs"])  # differs (1)
        step["rewards"] = torch.where(lost, 0.0, rewards)
        step["terminations"] = terminations | lost
        step["truncations"] = truncations
        step["dones"] = terminations | truncations | lost
        step["returns"] = info["episode"]["return"].detach().float()
        steps.append(step)
    return default_collate(steps), {name: value.detach() for name, value in obs.items()}


# --- Update functions -----------------------------------------------------------------------------
def state_values(critic: Net, obs: dict):
    """V_k of observations (B, ...): (K, B)."""
    return critic(obs).squeeze(-1)


def bootstrap(critic: Net | None, window: dict):
    """Mean value, with its gradient, after time limits and the last step; elsewhere 0. (T, N)"""
    values = torch.zeros_like(window["rewards"])
    if critic is None:
        return values
    needed = window["truncations"].clone()
    needed[-1] = True
    index = (needed & ~window["terminations"]).nonzero(as_tuple=True)
    obs = {name: value[index] for name, value in window["next_obs"].items()}
    return values.index_put(index, state_values(critic, obs).mean(0))


def soft_rewards(agent: Agent, window: dict):
    """r~ = r + alpha h^ (T, N)."""
    scaled = (window["entropies"] + agent.entropy_scale) / (2 * agent.entropy_scale)
    return window["rewards"] + agent.log_alpha.detach().exp() * scaled


def td_lambda(rewards, next_values, dones, gamma: float, lam: float):
    """G of the docstring, all (T, N). next_values: V(s_(t+1)), already 0 after a termination."""
    targets = [rewards[-1] + gamma * next_values[-1]]
    for t in reversed(range(len(rewards) - 1)):
        ahead = torch.lerp(next_values[t], targets[-1], lam)
        ahead = torch.where(dones[t], next_values[t], ahead)
        targets.append(rewards[t] + gamma * ahead)
    return torch.stack(targets[::-1])


def objective(rewards, values, dones, gamma: float):
    """J: discounted return and value of each segment from its first step, summed, over N T."""
    returns = td_lambda(rewards, values, dones, gamma, 1.0)
    starts = torch.cat([torch.ones_like(dones[:1]), dones[:-1]])
    return (returns * starts).mean()


def descend(loss, optimizer, max_norm: float):
    """One step on the clipped gradient. -> its norm before. No other parameter gets a gradient."""
    parameters = optimizer.param_groups[0]["params"]  # differs (2): encoders too
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    optimizer.step()
    return norm


def update_actor(agent: Agent, optimizer, window: dict, args: Args) -> dict:
    """One step up J, back through the simulation. The critics lead and do not learn here."""
    rewards = soft_rewards(agent, window) if args.entropy_in_return else window["rewards"]
    values = bootstrap(agent.target or agent.critic, window)
    loss = -objective(rewards, values, window["dones"], args.gamma)
    norm = descend(loss, optimizer, args.max_grad_norm)
    return {"loss/actor": loss.detach(), "train/actor_grad": norm}


def update_alpha(agent: Agent, optimizer, entropies, args: Args) -> dict:
    """Raise alpha where the mean entropy is below its target -|H|, lower it above."""
    entropy = entropies.detach().mean()
    loss = agent.log_alpha.exp() * agent.entropy_scale * (entropy + agent.entropy_scale)
    if args.autotune:
        descend(loss, optimizer, args.max_grad_norm)
    alpha = agent.log_alpha.detach().exp()
    return {"loss/alpha": loss.detach(), "train/entropy": entropy, "train/alpha": alpha}


@torch.no_grad()
def critic_targets(agent: Agent, window: dict, args: Args):
    """G (T, N), with the smallest of the values and the temperature as it is now."""
    rewards = soft_rewards(agent, window) if args.entropy_in_value else window["rewards"]
    values = state_values(agent.target or agent.critic, window["next_obs"]).amin(0)
    values = torch.where(window["terminations"], 0.0, values)
    return td_lambda(rewards, values, window["dones"], args.gamma, args.gae_lambda)


def critic_loss(critic: Net, obs, targets):
    """Mean over the critics of their squared errors; all of them learn the same target."""
    return (state_values(critic, obs) - targets).square().mean()


def update_critic(agent: Agent, optimizer, window: dict, targets, args: Args) -> dict:
    """Several passes over the window in minibatches, then one step of the target critic, if any."""
    obs = {name: value.detach().flatten(0, 1) for name, value in window["obs"].items()}
    targets = targets.flatten()  # (T N,)
    losses, norms = [], []
    for _ in range(args.critic_epochs):
        order = torch.randperm(len(targets), device=targets.device)  # differs (3)
        for mb in order.view(args.num_minibatches, -1):
            mb_obs = {name: value[mb] for name, value in obs.items()}
            loss = critic_loss(agent.critic, mb_obs, targets[mb])
            norms.append(descend(loss, optimizer, args.max_grad_norm))
            losses.append(loss.detach())
    if agent.target:
        for slow, fast in zip(agent.target.parameters(), agent.critic.parameters(), strict=True):
            slow.lerp_(fast.detach(), 1 - args.target_decay)
    loss = torch.stack(losses).mean()
    return {
        "loss/vf": loss,
        "train/critic_grad": torch.stack(norms).mean(),
        "train/target": targets.mean(),
        "train/explained": 1 - loss / targets.var(correction=0),
    }


def learn(agent: Agent, optimizers: dict, window: dict, args: Args) -> dict:
    """All updates of one window in the published order: actor, alpha, critics, statistics."""
    metrics = update_actor(agent, optimizers["actor_optimizer"], window, args)
    metrics |= update_alpha(agent, optimizers["alpha_optimizer"], window["entropies"], args)
    if agent.critic:
        targets = critic_targets(agent, window, args)
        metrics |= update_critic(agent, optimizers["critic_optimizer"], window, targets, args)
    agent.norm.update(window["state"])
    return metrics


def set_learning_rates(optimizers: dict, args: Args, share: float):
    """Of actor and critics, after this share of the run: a line from the first to --final-lr."""
    for name, first in (("actor_optimizer", args.actor_lr), ("critic_optimizer", args.critic_lr)):
        if name in optimizers:
            rate = first + (args.final_lr - first) * share
            optimizers[name].param_groups[0]["lr"] = rate


# --- evaluate -------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(policy, env, args: Args, video: Path) -> dict:
    """One whole episode of each environment, the same every time; environment 0 is filmed.

    -> return, its deviation between episodes, and mean -+ 1.96 standard errors.
    """
    obs = env.reset(seed=EVAL_SEED)
    returns = torch.full((env.num_envs,), torch.nan, device=obs["state"].device)
    frames = []
    for _ in range(env.max_episode_steps):
        if args.capture_video and returns[0].isnan():
            frames.append(env.render(0, 256))
        env.detach()
        obs, _, terminations, truncations, info = env.step(policy.act(obs))
        first_end = (terminations | truncations) & returns.isnan()
        returns = torch.where(first_end, info["episode"]["return"].float(), returns)
    if frames:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=min(60, round(env.control_hz)), macro_block_size=1)
    mean, std = float(returns.mean()), float(returns.std())
    half = 1.96 * std / math.sqrt(env.num_envs)
    return {
        "eval/return": mean,
        "eval/return_std": std,
        "eval/ci_low": mean - half,
        "eval/ci_high": mean + half,
    }


# --- save / load ----------------------------------------------------------------------------------
# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
def save(path: Path, content: dict):
    """Write under a temporary name, then rename: an interrupted save leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    try:
        torch.save(content, temporary)
    except RuntimeError as error:  # so torch says that the disk is full
        raise OSError(f"{path} could not be written: is the disk full?") from error
    os.replace(temporary, path)


def load(path: str | Path) -> dict:
    """A checkpoint on the CPU, its tensors mapped from the file. No code of the file runs.

    Raises FileNotFoundError, or ValueError if it is damaged or another algorithm's.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    own = isinstance(checkpoint, dict) and checkpoint.get("algo") == "sapo_rewarped"
    need(own, f"{path} is not sapo_rewarped's")
    unknown = checkpoint.get("args", {}).keys() - Args.__dataclass_fields__.keys()
    whole = not unknown and {"args", "agent"} <= checkpoint.keys()
    need(whole, f"{path} is another version's, or was edited: {', '.join(unknown)}")
    finite = all(x.isfinite().all() for x in checkpoint["agent"].values() if torch.is_tensor(x))
    need(finite, f"{path} has weights that are not finite")
    return checkpoint


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
class GlobalRandom:
    """torch's global generators, as a part of a checkpoint."""

    def state_dict(self) -> dict:
        return dict(cpu=torch.get_rng_state(), cuda=torch.cuda.get_rng_state_all())

    def load_state_dict(self, state: dict):
        torch.set_rng_state(state["cpu"])
        torch.cuda.set_rng_state_all(state["cuda"])


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


def content(args: Args, shapes: dict, progress: dict, **parts) -> dict:
    """What a checkpoint holds: `agent` among the parts is all that Policy needs."""
    header = dict(
        algo="sapo_rewarped", args=asdict(args), shapes=shapes, spec={}, progress=progress
    )
    return header | {name: part.state_dict() for name, part in parts.items()}


# --- Policy ---------------------------------------------------------------------------------------
class Policy(Agent):
    """An agent from one checkpoint file and no simulator: `act` takes observations to actions."""

    def __init__(self, path: str | Path, device: str = "cpu"):
        checkpoint = load(path)
        with torch.device("meta"):  # shapes only: no random number is drawn
            super().__init__(Args(**checkpoint["args"]), checkpoint["shapes"])
        self.load_state_dict(checkpoint["agent"], assign=True)
        self.to(device)


# --- train ----------------------------------------------------------------------------------------
# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
def open_run(args: Args) -> Path:
    """The run's folder, made or found. Raises ValueError if another run has the name."""
    stamp = time.strftime("%Y%m%d-%H%M%S")
    task = args.env_id.replace("/", "-")
    name = args.name or f"{task}__{Path(__file__).stem}__s{args.seed}__{stamp}"
    run = Path(args.resume or f"runs/{name}")
    taken = (run / "checkpoint.pt").exists() and not args.resume
    need(not taken, f"{run} exists: continue it with --resume {run}, or choose another --name")
    inside = args.resume or run.resolve().parent == Path("runs").resolve()
    need(inside, "--name must be the name of a folder in runs/, not a path")
    run.mkdir(parents=True, exist_ok=True)
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


def check_finite(agent: Agent, metrics: dict, global_step: int, run: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    for name, value in (agent.state_dict() | metrics).items():
        if not value.isfinite().all():
            where = f"{name} is not finite at step {global_step}"
            raise FloatingPointError(f"{where}; last good checkpoint: {run / 'checkpoint.pt'}")


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, clock, run.

    Raises ValueError or FileNotFoundError for wrong arguments, FloatingPointError at NaN.
    """
    check(args)
    torch.manual_seed(args.seed)
    env, eval_env = make_envs(args)
    if args.evaluate:
        video = Path(args.checkpoint).parent / "videos/evaluate.mp4"
        results = evaluate(Policy(args.checkpoint, args.device), eval_env, args, video)
        eval_env.close()
        print(json.dumps(results))
        return results

    shapes = env.obs_dims | dict(action=env.action_dim)
    agent = Agent(args, shapes).to(args.device)
    optimizers = make_optimizers(agent, args)
    parts = dict(agent=agent, env=env, random=GlobalRandom(), **optimizers)
    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf, last_return=0.0)
    obs = env.reset(seed=args.seed)
    run = open_run(args)

    def save_all():
        states = content(args, shapes, progress, **parts)
        save(run / "checkpoint.pt", states | dict(obs=obs, csv_sizes=csv_sizes(run)))

    if args.resume:
        checkpoint = load(run / "checkpoint.pt")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        progress = checkpoint["progress"]
        obs = {name: value.to(args.device) for name, value in checkpoint["obs"].items()}
        cut_back(run, checkpoint["csv_sizes"])
        del checkpoint
    else:
        save_all()
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    born = START - progress["wall_time"]
    results, interrupt = {}, Interrupt()
    bar = tqdm(total=args.total_timesteps, initial=progress["global_step"], unit="step")

    while progress["global_step"] < args.total_timesteps and not interrupt.asked:
        # act, step, store: one window
        begin, before = time.perf_counter(), progress["global_step"]
        set_learning_rates(optimizers, args, before / args.total_timesteps)
        window, obs = rollout(agent, env, obs, args)
        step = before + window["rewards"].numel()

        # update
        metrics = learn(agent, optimizers, window, args)
        check_finite(agent, metrics, step, run)

        # log
        elapsed = time.perf_counter() - begin
        progress["global_step"] = step
        progress["train_time"] += elapsed
        progress["wall_time"] = time.time() - born
        clock = {name: progress[name] for name in CLOCK}
        ended = window["returns"][window["dones"]]
        if len(ended):
            progress["last_return"] = float(ended.mean())
        metrics |= {
            "train/return": progress["last_return"],
            "train/reward": window["rewards"].detach().mean(),
            "train/nan_resets": env.nan_resets,
            "time/sps": (step - before) / elapsed,
        }
        row = clock | {name: float(value) for name, value in metrics.items()}
        write_row(run / "metrics.csv", row, args.track)
        bar.update(step - before)
        bar.set_postfix_str(f"return {progress['last_return']:.2f}")

        # evaluate, save
        crossed = before // args.eval_freq != step // args.eval_freq
        due = crossed or step >= args.total_timesteps
        if due:
            video = run / f"videos/step_{step:09d}.mp4"
            results = evaluate(agent, eval_env, args, video)
            write_row(run / "eval.csv", clock | results, args.track)
            bar.write(f"{step} steps: return {results['eval/return']:.3f}")
            if results["eval/return"] > progress["best"]:
                progress["best"] = results["eval/return"]
                save(run / "best.pt", content(args, shapes, progress, agent=agent))
        if due or interrupt.asked:
            save_all()

    interrupt.restore()
    for part in (bar, env, eval_env):
        part.close()
    if interrupt.asked:
        sys.exit(f"interrupted at step {progress['global_step']}: continue with --resume {run}")
    return results | {name: progress[name] for name in CLOCK} | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        sys.exit(f"error: the checkpoint does not fit: {str(error).splitlines()[-1].strip()}")
