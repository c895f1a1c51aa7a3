"""SAPO: maximum-entropy reinforcement learning with first-order gradients through a differentiable simulation.

Paper: Xing, Luk and Oh, "Stabilizing Reinforcement Learning in Differentiable Multiphysics Simulation", arXiv
2412.12089. The presets beside it: SHAC (Xu et al., arXiv 2204.07137), APG, trajectory optimisation.

    entropy   h = -log pi(a'|s), a' a fresh sample, scaled: h^ = (h + |H|) / (2 |H|), H = -A / 2
    reward    r~ = r + alpha h^
    actor     max 1/(N T) sum over segments of [sum_k g^k r~_k + g^L mean_k V_k(s_L)], back through the simulation
    critics   V_k -> G, G_t = r~_t + g [(1 - l) min_k V_k(s_(t+1)) + l G_(t+1)]; where an episode or the window ends
              G_t = r~_t + g min_k V_k(s_(t+1)), with V = 0 after a true end and V(final observation) after a time-out
    alpha     min alpha |H| (mean h - H)

Differences from the authors' code; `# differs (n)` marks the places:
 1. The value after step t is that of s_(t+1). Theirs takes s_t on the rigid tasks: `--parity` does so.
 2. The gradient's norm is clipped with the encoders' share; theirs leaves the encoders unclipped.
 3. The critics' minibatches are shuffled; theirs are runs of consecutive time steps: `--no-shuffle`.
 4. A gradient that is not finite is zeroed for that world and action, and counted; theirs ends the run.
 5. Evaluation takes the mean action; theirs samples.
 6. One way to keep running statistics (float64, one pseudo-observation) for all presets, updated once per window.
 7. TrajOpt plans for the episodes that the other presets are evaluated on, and keeps its actions within [-1, 1]. Where
    one ends early, what follows within the plan counts too. Its optimiser is the others'.

Commands, from the repository's root:
    train          python algos/sapo_rewarped.py --env-id RollingFlat
    another preset python algos/sapo_rewarped.py --env-id RollingFlat --algo shac
    smallest run   python algos/sapo_rewarped.py --env-id AntRun --device cpu
    evaluate       python algos/sapo_rewarped.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/sapo_rewarped.py --resume runs/NAME    (exactly)

Expected result, small sizes on two shared CPU cores, three seeds: AntRun 384 +- 99 after 131,072 transitions (4 min; a
random policy 50, SHAC 408 +- 88), RollingFlat 38.5 +- 3.0 after 5,120 (6 min; a random policy 29.8, SHAC 37.6 +- 1.2).
Curves and commands: docs/algos/sapo_rewarped.md. Not yet measured on a GPU.

Shapes: N environments, T steps of a window (`--horizon`), B batch, K critics, A action dimensions, S state dimensions,
P particles.
"""
# ruff: noqa: E402  (the lines down to the banner must run before the imports below it)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("envs") is None:
    # `make` installs the project in .venv; going on in there lets `python algos/sapo_rewarped.py` work as typed.
    if Path(sys.prefix).resolve() == VENV or not (VENV / "bin/python").exists():
        sys.exit(f"cleanrobot is not installed for {sys.executable}: run `make setup` (or `pip install -e .`) first")
    os.execv(VENV / "bin/python", [VENV / "bin/python", *sys.argv])

# --- Imports ----------------------------------------------------------------------------------------------------------
import copy
import csv
import json
import math
import pickle
import re
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from typing import Literal

import imageio.v2 as imageio
import matplotlib.pyplot as plt
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from torch.utils._pytree import tree_map
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv

# --- Args -------------------------------------------------------------------------------------------------------------
NO_ENTROPY = dict(entropy_in_return=False, entropy_in_value=False, autotune=False)
PLAIN = dict(state_std=False, activation="elu", optimizer="adam", max_grad_norm=1.0)  # SHAC's and APG's networks
# What separates the four algorithms: nothing below asks for `algo`, only for these switches. SAPO is Args as it stands.
PRESETS = {
    "sapo": {},
    "shac": NO_ENTROPY | PLAIN | dict(num_critics=1, target_decay=0.995),
    "apg": NO_ENTROPY | PLAIN | dict(num_critics=0),
    "trajopt": NO_ENTROPY | dict(num_critics=0, open_loop=True, horizon=0, gamma=1.0, actor_lr=1e-2, final_lr=None,
                                 optimizer="adam", max_grad_norm=0.0),
}
# (patterns of algos, of env ids and of sizes, separated by blanks) -> defaults other than those of Args and the preset
TUNED = {
    ("*", "AntRun", "*"): dict(num_envs=64, actor_units=(128, 64, 32), critic_units=(64, 64)),
    ("shac", "AntRun", "*"): dict(critic_lr=2e-3, target_decay=0.2),
    ("*", "HandReorient", "*"): dict(num_envs=64),
    ("*", "SoftJumper HandFlip", "*"): dict(total_timesteps=6_144_000),
    ("trajopt", "*", "*"): dict(total_timesteps=96_000, eval_freq=9_600),  # ten iterations
    ("trajopt", "AntRun", "*"): dict(total_timesteps=640_000),
    ("trajopt", "HandFlip", "*"): dict(total_timesteps=480_000, plan_start="zeros"),
    ("trajopt", "HandReorient", "*"): dict(total_timesteps=384_000, actor_lr=0.1),
    # What follows is ours. A run of a few hundred windows is short: alpha begins at a tenth of a step's reward or so,
    # and falls four times as fast, or it drowns the task; the critics take fewer and larger steps.
    ("*", "*", "small"): dict(num_envs=4, eval_episodes=8, actor_units=(64, 64), critic_units=(64, 64), critic_epochs=4,
                              critic_lr=2e-3, alpha=0.05, alpha_lr=0.02, total_timesteps=8_192, eval_freq=1_024,
                              capture_video=False, recompute=False),
    ("shac", "*", "small"): dict(target_decay=0.2),  # with 0.995 the target would stay what it is at first
    ("trajopt", "*", "small"): dict(recompute=True),  # its window is the episode
    ("*", "AntRun", "small"): dict(num_envs=16, eval_episodes=16, alpha=0.1, total_timesteps=131_072,
                                   eval_freq=16_384),
    ("*", "SoftJumper", "small"): dict(num_envs=8, total_timesteps=20_480, eval_freq=2_048),
    ("*", "RollingFlat", "small"): dict(num_envs=8, alpha=0.02, total_timesteps=5_120, eval_freq=640),
    ("sapo shac apg", "RollingFlat", "small"): dict(horizon=16, gamma=0.95, actor_lr=1e-2, stagger=True),
    ("*", "FluidMove HandFlip", "small"): dict(alpha=0.001),
}


@dataclass
class Args:
    # run
    algo: Literal["sapo", "shac", "apg", "trajopt"] = "sapo"  # a name for the switches below: PRESETS
    env_id: str = "RollingFlat"  # task: AntRun, HandReorient, RollingFlat, SoftJumper, HandFlip or FluidMove
    seed: int = 1  # of weights, exploration, minibatches and episodes
    name: str = ""  # folder under runs/; empty: made from task, algo, seed and time
    total_timesteps: int = 4_096_000  # environment transitions, over all environments
    eval_freq: int = 102_400  # transitions between evaluations; each also saves checkpoint.pt, and best.pt if it is
    eval_episodes: int = 64  # episodes of an evaluation, all at once and with the same seeds every time
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to take weights from; counters and optimisers start afresh
    resume: str | None = None  # run folder to continue exactly, with its arguments, except those given again
    capture_video: bool = True  # write an mp4 of one evaluation episode at every evaluation
    plot_landscape: bool = False  # plot the loss along random directions, with and without entropy, at the end
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, entity, offline mode

    # environment
    num_envs: int = 32  # parallel environments
    size: Literal["full", "small"] | None = None  # of the simulation; None: full on a GPU, small on a CPU
    reward: Literal["default", "paper"] = "default"  # paper: as published, also where that has no usable gradient
    stagger: bool = False  # begin in the middle of episodes, in each world elsewhere, so that not all end at once
    recompute: bool = True  # keep the particles alone and rebuild the grid on the way back: slower, far less memory

    # algorithm
    horizon: int = 32  # T: steps of a window, through which the actor's gradient flows; 0 with --open-loop: the episode
    gamma: float = 0.99  # discount per step
    gae_lambda: float = 0.95  # of the critics' targets
    actor_lr: float = 2e-3  # step size of the actor, one step per window
    critic_lr: float = 5e-4  # step size of the critics
    alpha_lr: float = 5e-3  # step size of log alpha; not annealed
    final_lr: float | None = 1e-5  # to which both of these fall linearly; None: they stay
    optimizer: Literal["adamw", "adam"] = "adamw"  # with betas 0.7 and 0.95; adamw decays weights by 0.01
    max_grad_norm: float = 0.5  # of actor, critics and log alpha; 0: not clipped
    critic_epochs: int = 16  # passes over the window's data
    num_minibatches: int = 4  # critic steps per pass
    shuffle: bool = True  # draw minibatches at random, and not as runs of consecutive time steps
    num_critics: int = 2  # K; 0: no value, the return ends with the window
    target_decay: float = 0.0  # share that a target critic keeps at each window; 0: none, the critics are the target
    entropy_in_return: bool = True  # the actor's rewards are r~, not r
    entropy_in_value: bool = True  # the critics' rewards are r~, not r
    normalize_entropy: bool = True  # h^ in r~, not h
    autotune: bool = True  # learn alpha
    alpha: float = 1.0  # weight of the entropy: the first one with autotune, else the constant one
    target_entropy_scale: float = 0.5  # H = -scale x A
    state_std: bool = True  # the standard deviation depends on the state; else it is one vector, e^-1 at first
    parity: bool = False  # V(s_t) for V(s_(t+1)), as in the authors' code on tasks without particles
    open_loop: bool = False  # TrajOpt: optimise the actions of the evaluation's episodes themselves, without a policy
    plan_start: Literal["uniform", "zeros"] = "uniform"  # the first actions with --open-loop
    activation: Literal["silu", "elu"] = "silu"  # of all networks; their weights begin with gain 1, or sqrt 2 with elu
    actor_units: tuple[int, ...] = (512, 256)  # widths of the actor's layers
    critic_units: tuple[int, ...] = (256, 256)  # widths of each critic's layers

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and simulation

    def check(self):
        """Raises ValueError at the first choice that cannot work. (In __post_init__ the parser would reword it.)"""
        counts = "num_envs eval_episodes eval_freq total_timesteps critic_epochs num_minibatches".split()
        batches = self.num_envs * self.horizon / max(self.num_minibatches, 1)
        for message, wrong in {
            **{f"--{name.replace('_', '-')} must be at least 1": getattr(self, name) < 1 for name in counts},
            "--num-critics must not be negative, and --actor-units and --critic-units must name layers":
                self.num_critics < 0 or min(self.actor_units, default=0) < 1 or min(self.critic_units, default=0) < 1,
            "--resume continues a run, --checkpoint starts one: give only one": self.resume and self.checkpoint,
            "--evaluate needs --checkpoint FILE": self.evaluate and not self.checkpoint,
            "--horizon must be at least 1 (0, the episode, is TrajOpt's)": self.horizon < 1 - self.open_loop,
            "--num-minibatches must divide --num-envs x --horizon": self.num_critics and batches % 1,
            "--alpha and --target-entropy-scale must be above 0, --target-decay in [0, 1)":
                min(self.alpha, self.target_entropy_scale) <= 0 or not 0 <= self.target_decay < 1,
            "--track needs Weights & Biases: pip install -e '.[track]'":
                self.track and importlib.util.find_spec("wandb") is None,
            f"--device {self.device}: cpu, cuda or cuda:N": not re.fullmatch(r"cpu|cuda(:\d+)?", self.device),
            "there is no CUDA here: use --device cpu": self.device[:4] == "cuda" and not torch.cuda.is_available(),
        }.items():
            if wrong:
                raise ValueError(message)


def tuned_defaults(algo: str, env_id: str, size: str) -> dict:
    """The preset, and over it the rows of TUNED that apply."""
    rows = [row for patterns, row in TUNED.items() if all(any(fnmatch(word, pattern) for pattern in column.split())
            for word, column in zip((algo, env_id, size), patterns, strict=True))]
    return PRESETS[algo] | {key: value for row in rows for key, value in row.items()}


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The defaults, and so --help, are those of the preset, task, size or checkpoint given."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=words, default=Args(env_id=""))  # a first look: which preset, task, size and file
    source = Path(given.resume) / "checkpoint.pt" if given.resume else given.checkpoint
    alone = {"device", "evaluate", "checkpoint", "resume", *["name"] * bool(given.checkpoint)}  # of that run alone
    saved = {k: v for k, v in load_file(source)["args"].items() if k not in alone} if source else {}
    env_id = given.env_id or saved.get("env_id", Args.env_id)
    size = given.size or saved.get("size") or ("full" if given.device.startswith("cuda") else "small")
    defaults = dict(algo=given.algo, env_id=env_id, size=size, device=given.device)
    defaults |= tuned_defaults(given.algo, env_id, size) | saved
    args = tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n\n")[0])
    if args.algo != defaults["algo"]:  # its switches would stay those of the checkpoint
        raise ValueError(f"the checkpoint differs in algo: it has {defaults['algo']}, this run {args.algo}")
    return args


# --- make_envs --------------------------------------------------------------------------------------------------------
def make_envs(args: Args, device: torch.device) -> tuple:
    """-> training environment, evaluation environment.

    Anything can stand here whose observations ("state" (N, S), perhaps "points" (N, P, 3)) and rewards are torch
    tensors, differentiable in all actions since its last detach(); otherwise the contract is that of envs/__init__.py.
    A world whose episode ends begins the next one in the same step, and the other worlds' gradients go on.
    """
    options = dict(reward=args.reward, size=args.size, checkpoint=args.recompute)
    try:
        make = importlib.import_module("envs.rewarped").make
        evaluation = make(args.env_id, args.eval_episodes, device, seed=EVAL_SEED, window=args.horizon or 1, **options)
        options["window"] = args.horizon or evaluation.max_episode_steps
        return make(args.env_id, args.num_envs, device, seed=args.seed, stagger=args.stagger, **options), evaluation
    except ImportError as error:
        raise ValueError(f"{args.env_id}: {error}") from error  # which names the line to install


# --- Networks ---------------------------------------------------------------------------------------------------------
class RunningNorm(nn.Module):
    """Mean and variance of all states so far, in float64; they begin as one observation of mean 0 and variance 1."""

    def __init__(self, size: int):
        super().__init__()
        for name, value in dict(mean=torch.zeros(size), var=torch.ones(size), count=torch.ones(())).items():
            self.register_buffer(name, value.double())

    def forward(self, obs: dict) -> dict:
        """Observations with a normalised state; particles stay in metres."""
        return obs | {"state": (obs["state"] - self.mean.float()) / (self.var.float() + 1e-5).sqrt()}

    @torch.no_grad()
    def update(self, states):
        """Pool with states (..., S), absurd ones apart; by the parallel formula of Chan, Golub, LeVeque (1979)."""
        states = states[(states.abs() < 1e6).all(-1)].double()  # (M, S)
        delta, share = states.mean(0) - self.mean, len(states) / (self.count + len(states))  # differs (6)
        self.var.lerp_(states.var(0, correction=0), share).add_(delta.square() * share * (1 - share))
        self.mean.add_(delta * share)
        self.count.add_(len(states))


def mlp(args: Args, *widths: int) -> nn.Sequential:
    """Linear, LayerNorm and activation for each layer."""
    act, pairs = {"silu": nn.SiLU, "elu": nn.ELU}[args.activation], zip(widths[:-1], widths[1:], strict=True)
    return nn.Sequential(*[layer for i, o in pairs for layer in (nn.Linear(i, o), nn.LayerNorm(o), act())])


class Net(nn.Module):
    """Observation (B, ...) -> (K, B, outputs): an encoder, and K MLPs behind it.

    Particles go through an MLP one by one, then their mean does; without them the encoder is the state itself.
    """

    def __init__(self, shapes: dict, args: Args, units: tuple[int, ...], outputs: int, heads: int = 1):
        super().__init__()
        self.has_points, width = shapes["points"] > 0, shapes["state"]
        if self.has_points:
            self.each, self.mean, self.low = mlp(args, 3, 64, 128, 256), mlp(args, 256, 64), mlp(args, width, 128)
            width = 64 + 128
        self.heads = nn.ModuleList(nn.Sequential(mlp(args, width, *units), nn.Linear(units[-1], outputs))
                                   for _ in range(heads))

    def forward(self, obs):
        z = obs["state"]
        if self.has_points:
            z = torch.cat([self.mean(self.each(obs["points"]).mean(-2)), self.low(z)], -1)
        return torch.stack([head(z) for head in self.heads])


class Actor(nn.Module):
    """Observation (B, ...) -> mean (B, A) and log standard deviation (B, A) of the action before its tanh."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.net = Net(shapes, args, args.actor_units, shapes["action"] * (1 + args.state_std))
        self.log_std = None if args.state_std else nn.Parameter(torch.full((shapes["action"],), -1.0))

    def forward(self, obs):
        x = self.net(obs)[0]
        mean, log_std = x.chunk(2, -1) if self.log_std is None else (x, self.log_std.expand_as(x))
        return mean, log_std.clamp(-5, 2)


class Plan(nn.Module):
    """TrajOpt's stand-in for an actor: the actions themselves, (T, N, A)."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        plan = torch.zeros(shapes["plan"], args.num_envs, shapes["action"])
        self.actions = nn.Parameter(plan.uniform_(-1, 1) if args.plan_start == "uniform" else plan)


def policy_networks(args: Args, shapes: dict) -> tuple[RunningNorm, Actor | Plan]:
    """All that acting needs. `shapes` has the sizes of state, points, action and, for TrajOpt, the plan's steps."""
    return RunningNorm(shapes["state"]), (Plan if args.open_loop else Actor)(shapes, args)


class Agent(nn.Module):
    """All that learns: statistics, actor, critics (perhaps with a target) and log alpha, with their optimisers."""

    def __init__(self, args: Args, shapes: dict, device: torch.device):
        super().__init__()
        self.norm, self.actor = policy_networks(args, shapes)
        self.critic = nn.Sequential(Net(shapes, args, args.critic_units, 1, args.num_critics),
                                    nn.Flatten(-2)) if args.num_critics else None  # (K, B, 1) -> (K, B)
        for layer in self.modules():
            if isinstance(layer, nn.Linear):  # last layers too
                nn.init.orthogonal_(layer.weight, {"silu": 1.0, "elu": math.sqrt(2)}[args.activation])
                nn.init.zeros_(layer.bias)
        self.target = copy.deepcopy(self.critic).requires_grad_(False) if args.target_decay and self.critic else None
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.entropy_scale = args.target_entropy_scale * shapes["action"]  # |H|
        self.to(device)
        make = {"adamw": torch.optim.AdamW, "adam": torch.optim.Adam}[args.optimizer]
        parts = dict(actor=(self.actor, args.actor_lr), alpha=(nn.ParameterList([self.log_alpha]), args.alpha_lr))
        parts |= dict(critic=(self.critic, args.critic_lr)) if self.critic else {}
        self.optimizers = {k: make(m.parameters(), lr, betas=(0.7, 0.95), fused=True) for k, (m, lr) in parts.items()}


# --- Storage ----------------------------------------------------------------------------------------------------------
class Probe:
    """Watches a window from outside: seconds in the simulation, forward and backward, and the actions' gradients.

    A simulator's backward pass runs between the moment at which the gradient of a step's rewards or observation is
    known and the one at which that of the step's actions is.
    """

    def __init__(self, device: torch.device):
        self.device, self.forward, self.backward, self.since, self.grads = device, 0.0, 0.0, None, []

    def now(self) -> float:
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        return time.perf_counter()

    def watch(self, actions, *outputs):
        """Hooks on a step's actions and on what came of them; the first output's gradient starts the clock."""
        def begin(_):
            self.since = self.since or self.now()

        def end(grad):
            now = self.now()
            self.backward, self.since = self.backward + now - (self.since or now), None
            self.grads.append(grad)
            return torch.where(grad.isfinite().all(-1, keepdim=True), grad, 0.0)  # differs (4)

        for tensor, hook in ((actions, end), *((output, begin) for output in outputs)):
            if tensor.requires_grad:
                tensor.register_hook(hook)

    def metrics(self) -> dict:
        """Norm (N,) over time and actions of each world's gradient of its own return over the window."""
        grads = torch.stack(self.grads)  # (T, N, A), the last step first
        finite = grads.isfinite().all(-1)
        norms = torch.where(finite[..., None], grads, 0.0).square().sum((0, 2)).sqrt() * finite.numel()  # undo 1/(N T)
        return {"train/grad_world_median": norms.median(), "train/grad_world_max": norms.max(),
                "train/grad_outliers": (norms > 10 * norms.median()).float().mean(),
                "train/grad_nan": (~finite).float().mean()}


def sample_actions(mean, log_std, noise):
    """tanh of a normal sample, and an estimate of the entropy from another one. noise (2, N, A) -> (N, A), (N,)"""
    plain, raw = mean + log_std.exp() * noise
    log_prob = -0.5 * noise[1].square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2) - raw - F.softplus(-2 * raw))  # log(1 - tanh^2), stable
    return torch.tanh(plain), -log_prob.sum(-1)


def broken(obs: dict):
    """Worlds (N,) whose observation is not finite, or absurd."""
    return torch.stack([~(v.detach().abs() < 1e6).flatten(1).all(-1) for v in obs.values()]).any(0)


def rollout(agent: Agent, env, obs: dict, args: Args, generator: torch.Generator, probe: Probe) -> tuple[dict, dict]:
    """One window of T steps, its graph kept. -> window, the observation after it, without its graph

    window (T, N, ...): state, raw; obs and next_obs (before a reset), normalised dicts with their graph; rewards,
    entropies, terminations (also of worlds that met NaN: no value follows), truncations, nan, returns at the ends.
    """
    env.detach()
    obs, steps = env.reset(seed=EVAL_SEED) if args.open_loop else {k: v.detach() for k, v in obs.items()}, []
    for t in range(args.horizon or env.max_episode_steps):
        state, x = obs["state"].detach(), agent.norm(obs)
        if args.open_loop:
            actions, entropies = agent.actor.actions[t] * 1.0, torch.zeros(env.num_envs, device=generator.device)
        else:
            noise = torch.randn((2, env.num_envs, env.action_dim), generator=generator, device=generator.device)
            actions, entropies = sample_actions(*agent.actor(x), noise)
        begin = probe.now()
        obs, rewards, terminations, truncations, info = env.step(actions)
        probe.forward += probe.now() - begin
        probe.watch(actions, rewards, *info["final_obs"].values())
        lost = info["nan"] | broken(info["final_obs"])
        after = agent.norm({k: torch.where(lost.view(-1, *[1] * (v.ndim - 1)), 0.0, v)
                            for k, v in info["final_obs"].items()})
        if args.parity:  # differs (1)
            after = {"state": torch.where(truncations[:, None], after["state"], x["state"])}
        steps.append(dict(state=state, obs=x, next_obs=after, rewards=torch.where(lost, 0.0, rewards), nan=info["nan"],
                          entropies=entropies, terminations=terminations | lost, truncations=truncations,
                          dones=terminations | truncations | lost, returns=info["episode"]["return"].detach().float()))
    window = tree_map(lambda *values: torch.stack(values), steps[0], *steps[1:])
    return window, {k: v.detach() for k, v in obs.items()}


# --- Update functions -------------------------------------------------------------------------------------------------
def bootstrap(critic: nn.Module | None, window: dict):
    """Mean value, with its gradient in the state, after time-outs and after the last step; elsewhere 0. (T, N)"""
    values, need = torch.zeros_like(window["rewards"]), window["truncations"].clone()
    need[-1] = True
    at = (need & ~window["terminations"]).nonzero(as_tuple=True)
    return values.index_put(at, critic({k: v[at] for k, v in window["next_obs"].items()}).mean(0)) if critic else values


def soft_rewards(agent: Agent, window: dict, args: Args):
    """r~ = r + alpha h^, or + alpha h without --normalize-entropy; (T, N)."""
    entropies, most = window["entropies"], agent.entropy_scale
    scaled = (entropies + most) / (2 * most) if args.normalize_entropy else entropies  # 0 at -|H|, 1 at |H|
    return window["rewards"] + agent.log_alpha.detach().exp() * scaled


def td_lambda(rewards, next_values, dones, gamma: float, lam: float):
    """G of the docstring, all (T, N). next_values: V(s_(t+1)), already 0 after a true end."""
    targets = [rewards[-1] + gamma * next_values[-1]]
    for t in reversed(range(len(rewards) - 1)):
        ahead = torch.where(dones[t], next_values[t], torch.lerp(next_values[t], targets[-1], lam))
        targets.append(rewards[t] + gamma * ahead)
    return torch.stack(targets[::-1])


def objective(rewards, values, dones, gamma: float):
    """J: discounted return and value of each segment of the window, from its first step on; summed, over N T."""
    returns = td_lambda(rewards, values, dones, gamma, 1.0)
    starts = torch.cat([torch.ones_like(dones[:1]), dones[:-1]])
    return (returns * starts).mean()


def descend(loss, optimizer, max_norm: float):
    """One step on the clipped gradient. -> the gradient's norm before. No other parameter receives a gradient."""
    parameters = [p for group in optimizer.param_groups for p in group["params"]]  # differs (2): encoders too
    optimizer.zero_grad(set_to_none=True)
    loss.backward(inputs=parameters)
    norm = nn.utils.clip_grad_norm_(parameters, max_norm or math.inf)
    optimizer.step()
    return norm


def update_actor(agent: Agent, window: dict, args: Args) -> dict:
    """One step up J, back through the simulation. The critics lead, they do not learn here."""
    rewards = soft_rewards(agent, window, args) if args.entropy_in_return else window["rewards"]
    loss = -objective(rewards, bootstrap(agent.target or agent.critic, window), window["dones"], args.gamma)
    norm = descend(loss, agent.optimizers["actor"], args.max_grad_norm)
    if args.open_loop:
        agent.actor.actions.data.clamp_(-1, 1)  # differs (7)
    return {"loss/actor": loss.detach(), "train/actor_grad": norm}


def update_alpha(agent: Agent, entropies, args: Args) -> dict:
    """Raise alpha where the mean entropy is below its target -|H|, lower it above."""
    gap = entropies.detach().mean() + agent.entropy_scale
    if args.autotune:
        descend(agent.log_alpha.exp() * agent.entropy_scale * gap, agent.optimizers["alpha"], args.max_grad_norm)
    return {"train/entropy": entropies.detach().mean(), "train/alpha": agent.log_alpha.detach().exp()}


@torch.no_grad()
def critic_targets(agent: Agent, window: dict, args: Args):
    """G (T, N), with the smallest of the values, and of the temperature as it is now."""
    rewards = soft_rewards(agent, window, args) if args.entropy_in_value else window["rewards"]
    values = (agent.target or agent.critic)(window["next_obs"]).amin(0) * ~window["terminations"]
    return td_lambda(rewards, values, window["dones"], args.gamma, args.gae_lambda)


def critic_loss(critic: nn.Module, obs: dict, targets):
    """Mean over the critics of their squared errors; all of them learn the same target."""
    return (critic(obs) - targets).square().mean()


def update_critic(agent: Agent, window: dict, targets, args: Args, generator: torch.Generator) -> dict:
    """Several passes over the window in minibatches, and then one step of the target critic, if there is one."""
    obs = {k: v.detach().flatten(0, 1) for k, v in window["obs"].items()}  # (T N, ...)
    targets, logs = targets.flatten(), []
    for _ in range(args.critic_epochs):
        order = torch.randperm(len(targets), generator=generator, device=targets.device)
        order = order if args.shuffle else order.sort().values  # differs (3)
        for mb in order.view(args.num_minibatches, -1):
            loss = critic_loss(agent.critic, {k: v[mb] for k, v in obs.items()}, targets[mb])
            logs.append(torch.stack([loss.detach(), descend(loss, agent.optimizers["critic"], args.max_grad_norm)]))
    if agent.target:
        torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), 1 - args.target_decay)
    loss, norm = torch.stack(logs).mean(0)
    return {"loss/vf": loss, "train/critic_grad": norm, "train/target": targets.mean(),
            "train/explained": 1 - loss / targets.var(correction=0)}


def learn(agent: Agent, window: dict, args: Args, generator: torch.Generator) -> dict:
    """All updates of one window, in the published order: actor, temperature, critics on soft targets, statistics."""
    metrics = update_actor(agent, window, args) | update_alpha(agent, window["entropies"], args)
    if agent.critic:
        metrics |= update_critic(agent, window, critic_targets(agent, window, args), args, generator)
    agent.norm.update(window["state"])
    return metrics


def set_learning_rates(agent: Agent, args: Args, share: float):
    """Of actor and critics, after this share of the run: a line from the first step size to --final-lr."""
    for part, first in dict(actor=args.actor_lr, critic=args.critic_lr).items():
        for group in agent.optimizers[part].param_groups if part in agent.optimizers else ():
            group["lr"] = first if args.final_lr is None else first + (args.final_lr - first) * min(share, 1.0)


# --- evaluate ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(policy, env, args: Args, video: Path) -> dict:
    """Whole episodes, fixed seeds. -> metrics; ci_low and ci_high: mean +- 1.96 standard errors. Video: world 0"""
    obs, score, frames = env.reset(seed=EVAL_SEED), torch.full((env.num_envs,), torch.nan, device=env.device), []
    policy.reset()
    for _ in range(env.max_episode_steps):
        if args.capture_video and score[0].isnan():
            frames.append(env.render(0, 256))
        env.detach()
        obs, _, terminations, truncations, info = env.step(policy.act(obs))
        ended = (terminations | truncations) & score.isnan()  # each world counts once
        score = torch.where(ended, info["episode"]["return"].float(), score)
    if frames:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=min(60, round(env.control_hz)), macro_block_size=1)
    mean, std = float(score.mean()), float(score.std(correction=int(env.num_envs > 1)))
    half = 1.96 * std / math.sqrt(env.num_envs)
    return {"eval/return": mean, "eval/return_std": std, "eval/ci_low": mean - half, "eval/ci_high": mean + half}


@torch.no_grad()
def plot_landscape(agent: Agent, env, args: Args, path: Path, points: int = 41):
    """The actor's loss on one window, -J without and with entropy, along three random directions.

    The window starts at the evaluation's first states and has the same noise everywhere. Each tensor of a direction
    has the norm of the tensor that it moves, so that a reach of 1 is a step as long as the weights (Li et al. 2018).
    """
    draw, center = torch.Generator().manual_seed(args.seed), copy.deepcopy(agent.actor.state_dict())
    figure, axes = plt.subplots(1, 2, figsize=(9, 3.5), constrained_layout=True)
    for _ in range(3):
        noise = {k: torch.randn(v.shape, generator=draw).to(v) for k, v in center.items()}
        losses, reach = [], np.linspace(-1, 1, points).tolist()
        for r in reach:
            agent.actor.load_state_dict({k: v + r * v.norm() / noise[k].norm() * noise[k] for k, v in center.items()})
            window, _ = rollout(agent, env, env.reset(seed=EVAL_SEED), args,
                                torch.Generator(env.device).manual_seed(EVAL_SEED), Probe(env.device))
            values, both = bootstrap(agent.critic, window), (window["rewards"], soft_rewards(agent, window, args))
            losses.append([-float(objective(rewards, values, window["dones"], args.gamma)) for rewards in both])
        for axis, line, title in zip(axes, zip(*losses, strict=True), ("rewards alone", "with entropy"), strict=True):
            axis.plot(reach, line)
            axis.set(title=f"loss, {title}", xlabel="reach along a random direction, in norms of the weights")
    agent.actor.load_state_dict(center)
    figure.savefig(path, dpi=120)
    plt.close(figure)


# --- save / load ------------------------------------------------------------------------------------------------------
def save(path: Path, content: dict):
    """Write under a temporary name, then rename: an interrupted save leaves the old file whole."""
    torch.save(content, path.with_suffix(".tmp"))
    os.replace(path.with_suffix(".tmp"), path)


def load_file(path: str | Path) -> dict:
    """A checkpoint, on the CPU; runs no code from the file. Raises FileNotFoundError, or ValueError if it is none."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no checkpoint {path}")
    try:
        checkpoint = torch.load(path, map_location="cpu", weights_only=True)
        assert checkpoint["algo"] == "sapo_rewarped"
    except Exception as error:  # torch names many kinds of damage; the reader needs one line
        raise ValueError(f"{path} is no checkpoint of sapo_rewarped, or it is damaged") from error
    return checkpoint


def check_fits(checkpoint: dict, args: Args, shapes: dict):
    """Raises ValueError naming the first field in which the checkpoint differs from this run."""
    theirs, mine = checkpoint["args"] | checkpoint["shapes"], asdict(args) | shapes
    fields = "env_id num_critics target_decay state_std activation actor_units critic_units".split() + [*shapes]
    for field in fields + ["size", "num_envs", "horizon", "optimizer"] * (args.open_loop or bool(args.resume)):
        if theirs[field] != mine[field]:
            raise ValueError(f"the checkpoint differs in {field}: it has {theirs[field]}, this run {mine[field]}")


# --- Policy -----------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """Observation in, action out, from one checkpoint (file or its content) and no simulator."""

    def __init__(self, source: str | Path | dict, device: str | torch.device = "cpu"):
        super().__init__()
        checkpoint = source if isinstance(source, dict) else load_file(source)
        self.args, self.device, self.t = Args(**checkpoint["args"]), torch.device(device), 0
        with torch.device("meta"):  # shapes only: no random number is drawn
            self.norm, self.actor = policy_networks(self.args, checkpoint["shapes"])
        self.load_state_dict({k: v for k, v in checkpoint["agent"].items() if k[:5] in ("norm.", "actor")}, assign=True)
        self.to(device)

    def reset(self):
        """Call at the start of every episode; only a plan (TrajOpt) counts its steps."""
        self.t = 0

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "state" (N, S), perhaps "points" (N, P, 3) -> actions (N, A), of the mean."""
        if self.args.open_loop:
            self.t += 1
            return self.actor.actions[self.t - 1]
        obs = {k: torch.as_tensor(v, dtype=torch.float32, device=self.device) for k, v in obs.items()}
        return torch.tanh(self.actor(self.norm(obs))[0])  # differs (5)


# --- train ------------------------------------------------------------------------------------------------------------
def check_finite(agent: Agent, metrics: dict, global_step: int, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    for name, value in (agent.state_dict() | metrics).items():
        if not torch.as_tensor(value).isfinite().all():
            good = checkpoint if checkpoint.exists() else "none yet"
            raise FloatingPointError(f"{name} is not finite at step {global_step}; last good checkpoint: {good}")


def write_row(path: Path, row: dict, track: bool, video: Path | None = None):
    """Append to a CSV file, whose first row names the columns; with `track` it goes to Weights & Biases too."""
    rows = [row.values()] if path.exists() else [row.keys(), row.values()]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
    if track:
        import wandb
        wandb.log(row | ({"eval/video": wandb.Video(str(video))} if video else {}), step=row["global_step"])


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
    if args.open_loop:  # the plan is for the evaluation's episodes
        args = replace(args, eval_episodes=args.num_envs)
    args.check()
    device = torch.device(args.device)
    torch.manual_seed(args.seed)
    name = args.name or time.strftime(f"{args.env_id}__sapo_rewarped-{args.algo}__s{args.seed}__%Y%m%d-%H%M%S")
    run = Path(args.resume or Path("runs") / name)
    if not args.resume and (run / "args.json").exists():
        raise ValueError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    source = run / "checkpoint.pt" if args.resume else args.checkpoint
    checkpoint = load_file(source) if source else None

    env, eval_env = make_envs(args, device)
    shapes = dict(state=eval_env.obs_dims["state"][0], points=eval_env.obs_dims.get("points", (0,))[0],
                  action=eval_env.action_dim, plan=eval_env.max_episode_steps if args.open_loop else 0)
    if args.parity and shapes["points"]:
        raise ValueError("--parity is for tasks without particles: on the others the authors' code is right")
    agent = Agent(args, shapes, device)
    now = dict(global_step=0, best=-math.inf, wall_time=0.0, train_time=0.0, nan_resets=0, last=0.0)
    if checkpoint:
        check_fits(checkpoint, args, shapes)
        agent.load_state_dict(checkpoint["agent"])
        now |= checkpoint["now"] if args.resume else {}
    for part, optimizer in agent.optimizers.items() if args.resume else ():
        optimizer.load_state_dict(checkpoint["optimizers"][part])

    def weights() -> dict:  # all that Policy and --checkpoint need
        return dict(algo="sapo_rewarped", args=asdict(args), shapes=shapes, agent=agent.state_dict(), now=dict(now),
                    versions=dict(torch=str(torch.__version__), numpy=np.__version__))

    def evaluate_now(label: str) -> dict:
        return evaluate(Policy(weights(), device), eval_env, args, run / f"videos/{label}.mp4")

    random = torch.Generator(device).manual_seed(args.seed)  # of all chance in training: evaluation does not disturb it
    obs = env.reset(seed=args.seed)
    if args.resume:
        env.load_state_dict(pickle.loads(checkpoint["env"]))
        obs = {k: v.to(device) for k, v in checkpoint["obs"].items()}
        random.set_state(checkpoint["random"])
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    for name in ("metrics.csv", "eval.csv") if args.resume else ():
        forget_after(run / name, now["global_step"])
    print(f"{run}: {args.env_id}, {args.size}; defaults: {tuned_defaults(args.algo, args.env_id, str(args.size))}")
    if args.track and not args.evaluate:
        import wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), name=run.name, config=asdict(args))
    results, start, born, begin = {}, dict(now), START - now["wall_time"], time.perf_counter() - now["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=now["global_step"], unit="step", disable=args.evaluate)

    while now["global_step"] < args.total_timesteps and not args.evaluate:
        # act, step, store: one window
        set_learning_rates(agent, args, now["global_step"] / args.total_timesteps)
        probe, before = Probe(device), now["global_step"]
        window, obs = rollout(agent, env, obs, args, random, probe)
        now["global_step"] += window["rewards"].numel()
        bar.update(window["rewards"].numel())

        # update
        metrics = learn(agent, window, args, random) | probe.metrics()
        check_finite(agent, metrics, now["global_step"], run / "checkpoint.pt")
        ended = window["returns"][window["dones"]]
        now |= dict(nan_resets=now["nan_resets"] + int(window["nan"].sum()), wall_time=time.time() - born,
                    train_time=time.perf_counter() - begin, last=float(ended.mean() if len(ended) else now["last"]))

        # log
        metrics |= {
            "train/return": now["last"], "train/reward": window["rewards"].detach().mean(),
            "train/actor_lr": agent.optimizers["actor"].param_groups[0]["lr"], "train/nan_resets": now["nan_resets"],
            "time/sim_forward": probe.forward, "time/sim_backward": probe.backward,
            "time/sps": (now["global_step"] - start["global_step"]) / (now["train_time"] - start["train_time"])}
        clock = {k: now[k] for k in CLOCK}
        bar.set_postfix_str(f"return {now['last']:.2f}, reward {float(metrics['train/reward']):.3f}")
        write_row(run / "metrics.csv", clock | {k: float(v) for k, v in metrics.items()}, args.track)

        # evaluate, save
        pause, last = time.perf_counter(), now["global_step"] >= args.total_timesteps
        if last or before // args.eval_freq != now["global_step"] // args.eval_freq:
            label = f"step_{now['global_step']:09d}"
            results = evaluate_now(label)
            write_row(run / "eval.csv", clock | results, args.track, args.capture_video and run / f"videos/{label}.mp4")
            bar.write(f"{now['global_step']} steps: " + ", ".join(f"{k[5:]} {v:.3f}" for k, v in results.items()))
            now["best"] = max(now["best"], results["eval/return"])
            if results["eval/return"] == now["best"]:
                save(run / "best.pt", weights())
            save(run / "checkpoint.pt", weights() | dict(
                optimizers={part: optimizer.state_dict() for part, optimizer in agent.optimizers.items()},
                env=pickle.dumps(env.state_dict()),  # as bytes: the file itself can be read without running code
                obs=obs, random=random.get_state()))
        begin += time.perf_counter() - pause
    if args.evaluate:
        results = evaluate_now("evaluate")
        print(json.dumps(results))
    if args.plot_landscape:
        plot_landscape(agent, eval_env, args, run / "landscape.png")
    for part in (bar, env, eval_env):
        part.close()
    return results | {k: now[k] for k in CLOCK} | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
