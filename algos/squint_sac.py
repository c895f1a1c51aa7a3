"""Squint SAC: soft actor-critic from very small pictures, with a distributional critic and parallel simulation.

Paper: Almuzairee and Christensen, "Squint: Fast Visual Reinforcement Learning for Sim-to-Real Robotics",
arXiv 2602.21203. It builds on SAC (Haarnoja et al., arXiv 1812.05905) and C51 (Bellemare et al., arXiv 1707.06887).

    target   r + g (z_j - alpha log pi(a'|s')), clipped and projected on fixed atoms z (C51, eq. 7); g is gamma or 0
    critics  K independent heads, cross-entropy to their own target head: no minimum and no mean in the target
    actor    E[alpha log pi(a|s) - mean over the heads of E[Z(s, a)]]               (SAC, eq. 7)
    alpha    E[-alpha (log pi(a|s) + H)], H = -A, at every critic update            (SAC, eq. 18)

Differences from the authors' code; (1) to (4) change the numbers slightly:
 1. The area mean rounds to the nearest of 256 levels; theirs truncates, which darkens by half a level.
 2. Colour jitter is drawn for each sample and camera, in a fixed order, with hue as a rotation about the grey axis.
    Theirs draws once for the whole batch, in a random order, and shifts hue in HSV.
 3. Episode clocks are staggered at the start; theirs run in lockstep.
 4. The tanh's share of log pi is exact (theirs adds 1e-6), and projection always keeps the mass at 1 (theirs can lose
    or double that of an atom that falls exactly on another).
 5. The replay buffer holds each picture once and finds the next one by index; sampling is part of the update.
 6. Ours, not the paper's: `--squint linear | adaptive`, `--utd-mode turnover`, `--n-step`, `--frame-stack`,
    `--asymmetric`, `--overlap`, several GPUs. On a CPU the sizes are smaller: TUNED, below.

Commands, from the repository's root:
    train          python algos/squint_sac.py --env-id SO101LiftCube-v1
    smallest run   python algos/squint_sac.py --env-id SO101ReachCube-v1 --device cpu --total-timesteps 20000
    evaluate       python algos/squint_sac.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/squint_sac.py --resume runs/NAME    (exactly, if the run was given --save-buffer)
    several GPUs   torchrun --nproc-per-node 4 algos/squint_sac.py --env-id SO101LiftCube-v1

Expected result, two CPU cores, last evaluation of three seeds: SO101ReachCube-v1 99.5 +- 0.9 % after 80,000
transitions and 12.5 +- 3.2 minutes; SO101LiftCube-v1 84 +- 12 % after 180,000 transitions and 21 minutes. Curves and
commands: docs/algos/squint_sac.md. Not yet measured on a GPU.

Shapes: N environments, T rows of the buffer, B batch, K critic heads, Z atoms, A action dimensions, S state dimensions,
H x W picture, C channels (3 x cameras, x frame stack inside the networks), M cameras.
"""
# ruff: noqa: E402  (the lines down to the banner must run before the imports below it)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("envs") is None:
    # `make` installs the project in .venv; going on in there lets `python algos/squint_sac.py` work as typed.
    if Path(sys.prefix).resolve() == VENV or not (VENV / "bin/python").exists():
        sys.exit(f"cleanrobot is not installed for {sys.executable}: run `make setup` (or `pip install -e .`) first")
    os.execv(VENV / "bin/python", [VENV / "bin/python", *sys.argv])

# --- Imports ----------------------------------------------------------------------------------------------------------
import copy
import csv
import json
import math
import pickle
import time
from collections import defaultdict
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import torch
import torch.distributed as dist
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
EPISODE = ("return", "success_at_end", "success_once")  # what is logged of an episode that ended
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv
OPTIMIZERS = ("q_optimizer", "actor_optimizer", "alpha_optimizer")

# --- Args -------------------------------------------------------------------------------------------------------------
# (pattern of env ids, kind of device) -> defaults other than the published ones below; later rows win
TUNED = {
    ("*", "cpu"): dict(num_envs=8, eval_envs=8, num_updates=4, batch_size=128, buffer_size=100_000, critic_hidden=256,
                       policy_lr=1e-3, q_lr=1e-3, alpha_lr=1e-3, alpha=0.05, amp=False, compile=False, cudagraphs=False,
                       total_timesteps=300_000, learning_starts=2_000, eval_freq=20_000, log_freq=2_000),
    ("SO101*", "cpu"): dict(num_envs=64, eval_envs=64, num_updates=8, render_size=16, samples_per_pixel=4),
    ("SO101Reach*", "cpu"): dict(total_timesteps=80_000, eval_freq=10_000),
}


@dataclass
class Args:
    # run
    env_id: str = "SO101ReachCube-v1"  # task; ids that begin with SO101 are in envs/so101.py, all others ManiSkill's
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 1_500_000  # environment transitions, over all environments and processes
    eval_freq: int = 100_000  # transitions between evaluations; each also saves checkpoint.pt, and best.pt if it is
    eval_episodes: int = 64  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 64  # of them at once; divides eval_episodes
    log_freq: int = 10_000  # transitions between rows of metrics.csv; only there does the host wait for the device
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to take weights from; counters, optimisers and buffer start afresh
    resume: str | None = None  # run folder to continue, with its arguments, except those given again
    save_buffer: bool = False  # put the replay buffer in checkpoint.pt: larger, but then --resume continues exactly
    capture_video: bool = True  # write an mp4 of four evaluation episodes at every evaluation
    plot_critic: bool = False  # plot the critic's return distribution at start, middle and end of an episode
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, entity, offline mode

    # environment
    num_envs: int = 1024  # parallel environments (of each process)
    render_size: int = 128  # pixels a side of the rendered picture
    samples_per_pixel: int = 1  # rays per rendered pixel (SO101); rendering at 16 with 4 stands in for the area mean
    cameras: tuple[str, ...] = ("wrist",)  # stacked on channels: wrist, third (SO101); ManiSkill tasks bring their own
    asset_dir: str | None = None  # SO-ARM100's folder Simulation/SO101, to draw the arm's own meshes (SO101)
    domain_randomization: bool = True  # vary light, colour, camera, friction, mass ... (SO101); off: no jitter either
    jitter: bool = True  # vary brightness, contrast, saturation by 0.3 and hue by 0.05, anew for each picture
    squint: Literal["fixed", "linear", "adaptive"] = "fixed"  # size seen: constant (the paper), or rising to the max
    image_size: int = 16  # pixels a side that the networks see: the area mean of the rendered picture
    image_size_max: int = 32  # reached by linear at the end, by adaptive whenever success stalls; the size stored
    frame_stack: int = 1  # latest pictures shown together, for tasks in which motion must be seen
    asymmetric: bool = False  # give the critic, never the policy, the simulator's privileged state

    # algorithm
    buffer_size: int = 1_000_000  # transitions kept (by each process)
    batch_size: int = 512  # transitions per update (of each process)
    num_updates: int = 256  # critic updates per vector step; 256 x 512 / 1024 samples each transition 128 times
    utd_mode: Literal["fixed", "turnover"] = "fixed"  # turnover: fewer while the buffer fills, equal use of all data
    learning_starts: int = 5_000  # transitions of uniformly random actions before the first update
    policy_lr: float = 3e-4  # Adam step size of the actor
    q_lr: float = 3e-4  # Adam step size of critic and encoder
    alpha_lr: float = 3e-4  # Adam step size of log alpha
    policy_frequency: int = 4  # critic updates per actor update; together they are one block
    target_network_frequency: int = 1  # critic updates per step of the target; divides policy_frequency
    alpha: float = 1.0  # weight of the entropy: the first one with autotune, else the constant one
    autotune: bool = True  # learn alpha so that the entropy is -A
    bootstrap_at_done: Literal["always", "never", "on_truncation"] = "always"  # success does not end an episode here
    gamma: float = 0.9  # discount per step; for long horizons raise v_max too: rewards of 1 add up to 1 / (1 - gamma)
    tau: float = 0.01  # share of the critic that moves into its target
    n_step: int = 1  # rewards summed before the bootstrap; above 1 the target ignores how old the actions are
    num_q: int = 2  # critic heads
    num_atoms: int = 101  # atoms of the return distribution
    v_min: float = -20.0  # lowest return represented
    v_max: float = 20.0  # highest return represented
    actor_hidden: int = 256  # width of the actor's three layers
    critic_hidden: int = 512  # width of each critic head's three layers

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks, buffer and simulation
    amp: bool = True  # compute the losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the two losses with torch.compile
    cudagraphs: bool = True  # replay each block of updates as one CUDA graph; needs cuda and a single process
    overlap: bool = False  # update while the simulation takes the next step; the data is one vector step older

    def check(self):
        """Raises ValueError at the first choice that cannot work. (In __post_init__ the parser would reword it.)"""
        cuda, least = self.device.startswith("cuda"), self.learning_starts // max(self.num_envs, 1)  # rows at the start
        few = [name.replace("_", "-") for name, value in asdict(self).items()
               if type(value) is int and value < 1 and name != "seed"]
        for message, wrong in {
            "--resume continues a run, --checkpoint starts one: give only one": self.resume and self.checkpoint,
            "--evaluate needs --checkpoint FILE": self.evaluate and not self.checkpoint,
            f"--{', --'.join(few)} must be at least 1": few,
            "--eval-episodes must be a multiple of --eval-envs": self.eval_episodes % max(self.eval_envs, 1),
            "--num-updates must be a multiple of --policy-frequency": self.num_updates % max(self.policy_frequency, 1),
            "--target-network-frequency must divide --policy-frequency":
                self.policy_frequency % max(self.target_network_frequency, 1),
            "--image-size-max must not be below --image-size": self.image_size > self.store_size,
            "--render-size must not be below the image size": self.store_size > self.render_size,
            "--image-size must be at least 10, the least that the convolutions take": self.image_size < 10,
            "--v-min must be below --v-max, with 2 atoms or more": self.v_min >= self.v_max or self.num_atoms < 2,
            "--learning-starts must cover --n-step + --frame-stack vector steps: raise it or lower --num-envs":
                least < self.n_step + self.frame_stack - 1,
            "--buffer-size must exceed --learning-starts: raise it": self.buffer_size < (least + 2) * self.num_envs,
            "--track needs Weights & Biases: pip install -e '.[track]'":
                self.track and importlib.util.find_spec("wandb") is None,
            "--device must be cpu or cuda": self.device.split(":")[0] not in ("cpu", "cuda"),
            "--cudagraphs needs --device cuda": self.cudagraphs and not cuda,
            "there is no CUDA device here: use --device cpu": cuda and not torch.cuda.is_available(),
        }.items():
            if wrong:
                raise ValueError(message)

    @property
    def store_size(self) -> int:
        """Pixels a side of the stored picture: the largest that the networks will see."""
        return self.image_size if self.squint == "fixed" else self.image_size_max


def tuned_defaults(env_id: str, device: str) -> dict:
    """The rows of TUNED that apply, merged."""
    rows = [row for (pattern, kind), row in TUNED.items() if fnmatch(env_id, pattern) and device.startswith(kind)]
    return {key: value for row in rows for key, value in row.items()}


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The defaults, and so --help, are those of the task, device or checkpoint given."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=words, default=Args(env_id=""))  # a first look: which task, device and file
    source = Path(given.resume) / "checkpoint.pt" if given.resume else given.checkpoint
    saved = load_file(source)["args"] if source else {}
    env_id = given.env_id or saved.get("env_id", Args.env_id)
    for key in ("device", "evaluate", "checkpoint", "resume", *["name"] * bool(given.checkpoint)):  # of that run alone
        saved.pop(key, None)
    defaults = dict(env_id=env_id, device=given.device) | tuned_defaults(env_id, given.device) | saved
    defaults["cudagraphs"] = defaults.get("cudagraphs", True) and given.device.startswith("cuda")  # not a GPU's file's
    return tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n\n")[0])


# --- make_envs --------------------------------------------------------------------------------------------------------
def make_envs(args: Args, device: torch.device, rank: int = 0) -> tuple:
    """-> (training environment, {metric suffix: evaluation environment}); rank 0 alone evaluates.

    Anything with reset, step, render, state_dict, load_state_dict and close as in envs/so101.py can stand here. It
    starts the next episode by itself and reports on the one that ended in info["final_obs"] and info["episode"].
    """
    module, options, variants = "maniskill", dict(render_size=args.render_size, asymmetric=args.asymmetric), {"": {}}
    if args.env_id.startswith("SO101"):
        module, options = "so101", options | dict(samples_per_pixel=args.samples_per_pixel, cameras=args.cameras,
                                                  asset_dir=args.asset_dir)
        variants = {"": dict(domain_randomization=args.domain_randomization), "_nodr": dict(domain_randomization=False)}
    try:
        make = importlib.import_module(f"envs.{module}").make
        env = None if args.evaluate else make(args.env_id, args.num_envs, device, seed=args.seed + 1000 * rank,
                                              stagger=True, **options, **variants[""])
        return env, {} if rank else {
            suffix: make(args.env_id, args.eval_envs, device, seed=EVAL_SEED, stagger=False, **options, **variant)
            for suffix, variant in variants.items()}
    except ModuleNotFoundError as error:
        raise ValueError(f'{args.env_id} needs {error.name}: run `pip install -e ".[{module}]"`') from error
    except (ImportError, RuntimeError) as error:  # the environments' own messages
        raise ValueError(error) from error


# --- Networks ---------------------------------------------------------------------------------------------------------
def squint(rgb: torch.Tensor, size: int) -> torch.Tensor:
    """Area mean, rounded: uint8 (N, H, W, C) -> uint8 (N, size, size, C).  # differs (1)"""
    if rgb.shape[1] == rgb.shape[2] == size:
        return rgb
    small = F.interpolate(rgb.permute(0, 3, 1, 2).float(), size=(size, size), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def color_jitter(rgb: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue for each sample and camera: uint8 (N, H, W, C) -> the same."""
    x = rgb.unflatten(-1, (-1, 3)).float()  # (N, H, W, M, 3)
    draw = torch.rand((4, len(x), 1, 1, x.shape[3], 1), generator=generator, device=x.device) * 2 - 1  # differs (2)
    brightness, contrast, saturation = 1 + 0.3 * draw[:3]
    luma = torch.tensor([0.299, 0.587, 0.114], device=x.device)
    x = (x * brightness).clamp(0, 255)
    x = ((x @ luma).mean((1, 2), keepdim=True)[..., None]).lerp(x, contrast).clamp(0, 255)
    x = (x @ luma)[..., None].lerp(x, saturation).clamp(0, 255)
    angle = 2 * math.pi * 0.05 * draw[3]  # Rodrigues' rotation about (1, 1, 1) / sqrt 3, which leaves greys alone
    across = (x.roll(1, -1) - x.roll(-1, -1)) / math.sqrt(3.0)  # that axis x colour
    x = x * angle.cos() + across * angle.sin() + x.mean(-1, keepdim=True) * (1 - angle.cos())
    return x.clamp(0, 255).round().to(torch.uint8).flatten(-2)


def init_orthogonal(module: nn.Module):
    """Orthogonal weights, gain sqrt 2 for convolutions (ReLUs follow) and 1 for linear layers; zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
            nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """uint8 (B, h, w, C) -> (B, 1024). Shared by actor and critic, trained by the critic alone, without a target."""

    def __init__(self, channels: int, size: int):
        super().__init__()
        convs = {32: ((32, 4, 2), (64, 4, 2), (64, 3, 1)), 64: ((32, 8, 4), (64, 4, 2), (64, 3, 1))}
        layers = []
        for width, kernel, stride in convs.get(size, ((32, 4, 2), (64, 4, 1))):
            layers += [nn.Conv2d(channels, width, kernel, stride), nn.ReLU()]
            channels = width
        self.convs = nn.Sequential(*layers)
        init_orthogonal(self)

    def forward(self, rgb):
        x = self.convs(rgb.permute(0, 3, 1, 2).float() / 255 - 0.5)
        # 16, 32 and 64 pixels come out as 4 x 4; pooling lets the same weights take the sizes between
        return (x if x.shape[-1] == 4 else F.adaptive_avg_pool2d(x, 4)).flatten(1)


class Projection(nn.Module):
    """features (B, 1024), state (B, S) -> (B, 306): 50 numbers for the picture and 256 for the state."""

    def __init__(self, state_dim: int):
        super().__init__()
        self.rgb = nn.Sequential(nn.Linear(1024, 50), nn.LayerNorm(50), nn.Tanh())
        self.state = nn.Sequential(nn.Linear(state_dim, 256), nn.LayerNorm(256), nn.ReLU())
        init_orthogonal(self)

    def forward(self, features, state):
        return torch.cat([self.rgb(features), self.state(state)], -1)


class Actor(nn.Module):
    """features (B, 1024) and obs["state"] (B, S) -> mean and log std (B, A) of the Gaussian before the tanh."""

    def __init__(self, state_dim: int, action_dim: int, hidden: int):
        super().__init__()
        self.projection, layers = Projection(state_dim), []
        for inputs in (306, hidden, hidden):
            layers += [nn.Linear(inputs, hidden), nn.LayerNorm(hidden), nn.ReLU()]
        self.trunk = nn.Sequential(*layers)
        self.mean, self.log_std = nn.Linear(hidden, action_dim), nn.Linear(hidden, action_dim)
        init_orthogonal(self)

    def forward(self, features, obs):
        x = self.trunk(self.projection(features, obs["state"]))
        return self.mean(x).float(), -5 + 3.5 * (torch.tanh(self.log_std(x).float()) + 1)  # log std in [-5, 2]


class Heads(nn.Module):
    """K separate MLPs as batched products, LayerNorm and ReLU between layers: (K, B, first) -> (K, B, last width)."""

    def __init__(self, heads: int, widths: list[int]):
        super().__init__()
        self.weights = nn.ParameterList(torch.empty(heads, i, o) for i, o in zip(widths, widths[1:], strict=False))
        self.biases = nn.ParameterList(torch.zeros(heads, 1, width) for width in widths[1:])
        self.norm_weights = nn.ParameterList(torch.ones(heads, 1, width) for width in widths[1:-1])
        self.norm_biases = nn.ParameterList(torch.zeros(heads, 1, width) for width in widths[1:-1])
        for head in (head for weight in self.weights for head in weight.data):
            nn.init.orthogonal_(head)

    def forward(self, x):
        for i in range(len(self.norm_weights)):
            x = torch.baddbmm(self.biases[i], x, self.weights[i])
            x = F.relu(F.layer_norm(x, x.shape[-1:]) * self.norm_weights[i] + self.norm_biases[i])
        return torch.baddbmm(self.biases[-1], x, self.weights[-1])


class Critic(nn.Module):
    """features, obs, actions (B, A) -> logits (K, B, Z): one projection, then K heads that share nothing."""

    def __init__(self, state_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.projection, self.num_q = Projection(state_dim), args.num_q
        self.heads = Heads(args.num_q, [306 + action_dim, *[args.critic_hidden] * 3, args.num_atoms])

    def forward(self, features, obs, actions):
        state = torch.cat([obs["state"], obs["privileged"]], -1) if "privileged" in obs else obs["state"]
        x = torch.cat([self.projection(features, state), actions], -1)
        return self.heads(x.expand(self.num_q, -1, -1)).float()


def policy_networks(args: Args, shapes: dict) -> tuple[Encoder, Actor]:
    """All that acting needs. `shapes` has the environment's channels, state, privileged and action dimensions."""
    encoder = Encoder(shapes["channels"] * args.frame_stack, args.image_size if args.squint == "fixed" else 16)
    return encoder, Actor(shapes["state"], shapes["action"], args.actor_hidden)


class Agent(nn.Module):
    """All that learns: encoder, actor, critic, its target and log alpha, with their optimisers."""

    def __init__(self, args: Args, shapes: dict, device: torch.device):
        super().__init__()
        self.encoder, self.actor = policy_networks(args, shapes)
        self.critic = Critic(shapes["state"] + shapes["privileged"], shapes["action"], args)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.register_buffer("support", torch.linspace(args.v_min, args.v_max, args.num_atoms))
        self.to(device)
        self.encoder.to(memory_format=torch.channels_last)
        adam = dict(fused=True, capturable=device.type == "cuda")  # capturable: the step count is on the device
        q_parameters = [*self.critic.parameters(), *self.encoder.parameters()]
        self.q_optimizer = torch.optim.Adam(q_parameters, args.q_lr, **adam)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.policy_lr, **adam)
        self.alpha_optimizer = torch.optim.Adam([self.log_alpha], args.alpha_lr, **adam)


# --- Storage ----------------------------------------------------------------------------------------------------------
class Replay:
    """A ring of T rows of N transitions, every picture stored once.

    Row t holds the observation at t, the action taken there, and the reward and end that followed. Its next observation
    is row t+1's, except where an episode ended: row t+1 then starts another one, and the final observation waits in
    `final`, a ring of slots per environment. `head` is the row of the present observation, which has no action yet.
    """

    def __init__(self, obs: dict, action_dim: int, episode_steps: int, args: Args):
        self.args, self.rows, n, device = args, args.buffer_size // args.num_envs, args.num_envs, obs["rgb"].device
        self.slots = self.rows // episode_steps + 4  # ends among T rows: T / length, both edges, the open slot, a spare
        zeros = torch.zeros(n, device=device)
        row = obs | dict(actions=torch.zeros((n, action_dim), device=device), rewards=zeros, dones=zeros.bool(),
                         terminations=zeros.bool(), age=zeros.long(), end=zeros.long())
        # age: stored steps of this episode so far; end: ended episodes of this world so far, which finds the final slot
        self.data = {k: v.new_zeros((self.rows, *v.shape)) for k, v in row.items()}
        self.final = {k: v.new_zeros((self.slots, *v.shape)) for k, v in obs.items()}
        self.ends, self.worlds = zeros.long(), torch.arange(n, device=device)
        self.head = self.size = 0  # size: rows that hold a whole transition
        self.cursor = torch.zeros(2, dtype=torch.int64, device=device)  # head and size again, for the device
        for k in obs:
            self.data[k][0] = obs[k]

    def add(self, actions, rewards, terminations, dones, final_obs: dict, next_obs: dict):
        """Complete the present row and open the next one; all (N, ...). Nothing waits for the device."""
        row, after = self.head, (self.head + 1) % self.rows
        known = dict(actions=actions, rewards=rewards, terminations=terminations, dones=dones, end=self.ends)
        for k, v in known.items():
            self.data[k][row] = v
        for k in self.final:  # every world writes its open slot; only an end closes it
            self.final[k][self.ends % self.slots, self.worlds] = final_obs[k]
            self.data[k][after] = next_obs[k]
        self.ends += dones
        self.data["age"][after] = torch.where(dones, 0, self.data["age"][row] + 1)
        self.head, self.size = after, min(self.size + 1, self.rows - 1)
        self.cursor[0].fill_(self.head)
        self.cursor[1].fill_(self.size)

    def _stacked(self, newest, row, age, world, size: int):
        """`newest` after the pictures of the rows before `row`, oldest first, squinted; the first one is repeated."""
        past = [(row - age.clamp(max=j)) % self.rows for j in range(self.args.frame_stack - 1, 0, -1)]
        return squint(torch.cat([*(self.data["rgb"][rows, world] for rows in past), newest], -1), size)

    def present(self, size: int) -> dict:
        """The observation to act on, (N, ...), pictures stacked and squinted."""
        obs = {k: self.data[k][self.head] for k in self.final}
        return obs | {"rgb": self._stacked(obs["rgb"], self.head, self.data["age"][self.head], self.worlds, size)}

    def sample(self, batch_size: int, size: int, generator: torch.Generator) -> dict:
        """B transitions, uniform over those whose n steps and stacked pictures are all stored.

        -> obs, next_obs (dicts), actions (B, A), rewards (B,) over n steps, discounts (B,) of the next value,
        live (B,): 0 where the final observation is overwritten, which takes many episodes that end early.
        """
        args, data, n = self.args, self.data, self.args.n_step
        draw = torch.rand((2, batch_size), generator=generator, device=self.cursor.device)
        span = self.cursor[1] - (n - 1) - (args.frame_stack - 1)
        row = (self.cursor[0] - n - (draw[0] * span).long()) % self.rows
        world = (draw[1] * len(self.worlds)).long()

        last, rewards, discounts = row, torch.zeros_like(draw[0]), torch.ones_like(draw[0])
        running = torch.ones_like(row, dtype=torch.bool)
        for j in range(n):  # stops at an episode's end
            last = torch.where(running, (row + j) % self.rows, last)
            rewards = rewards + running * discounts * data["rewards"][last, world]
            discounts = torch.where(running, discounts * args.gamma, discounts)
            running = running & ~data["dones"][last, world]
        ended, end, age = (data[k][last, world] for k in ("dones", "end", "age"))
        if args.bootstrap_at_done != "always":
            stop = ended if args.bootstrap_at_done == "never" else data["terminations"][last, world]
            discounts = discounts * ~stop

        obs, next_obs = {k: data[k][row, world] for k in self.final}, {}
        for k, final in self.final.items():
            choose = ended.view(-1, *[1] * (final.ndim - 2))
            next_obs[k] = torch.where(choose, final[end % self.slots, world], data[k][(last + 1) % self.rows, world])
        obs["rgb"] = self._stacked(obs["rgb"], row, data["age"][row, world], world, size)
        next_obs["rgb"] = self._stacked(next_obs["rgb"], last + 1, age + 1, world, size)
        return dict(obs=obs, next_obs=next_obs, actions=data["actions"][row, world], rewards=rewards,
                    discounts=discounts, live=(~ended | (self.ends[world] - end < self.slots)).float())

    def state_dict(self) -> dict:
        return self.data | {f"final_{k}": v for k, v in self.final.items()} | dict(ends=self.ends, cursor=self.cursor)

    def load_state_dict(self, state: dict):
        for k, tensor in self.state_dict().items():
            tensor.copy_(state[k])
        self.head, self.size = self.cursor.tolist()


# --- Update functions -------------------------------------------------------------------------------------------------
def sample_actions(actor: Actor, features, obs: dict, noise):
    """Tanh-Gaussian actions (B, A) and their log-probabilities (B,), from standard normal noise (B, A). SAC, eq. 21"""
    mean, log_std = actor(features, obs)
    raw = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2.0) - raw - F.softplus(-2 * raw))  # log(1 - tanh^2): differs (4)
    return torch.tanh(raw), log_prob.sum(-1)


def project_distribution(probs, rewards, discounts, support):
    """Distribution of rewards + discounts * Z on the support: probs (K, B, Z), (B,) or (B, 1)s, (Z,) -> (K, B, Z)

    C51, eq. 7: each atom moves, is clipped to the support, and shares its mass between its two neighbours.
    """
    low, high, atoms = support[0], support[-1], len(support)
    moved = (rewards.view(-1, 1) + discounts.view(-1, 1) * support).clamp(low, high)  # (B, Z)
    position = (moved - low) * ((atoms - 1) / (high - low))
    lower = position.floor().clamp(0, atoms - 2)  # so that lower + 1 exists and no mass is lost: differs (4)
    upper_share, lower = (position - lower).expand_as(probs), lower.long().expand_as(probs)
    projected = torch.zeros_like(probs).scatter_add_(-1, lower, probs * (1 - upper_share))
    return projected.scatter_add_(-1, lower + 1, probs * upper_share)


def critic_loss(agent: Agent, batch: dict, noise, args: Args):
    """Losses of critic, encoder and temperature; noise (2B, A). -> loss, features (B, 1024) for the actor, metrics"""
    obs, next_obs = batch["obs"], batch["next_obs"]
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        features = agent.encoder(obs["rgb"])
        with torch.no_grad():
            next_features, alpha = agent.encoder(next_obs["rgb"]), agent.log_alpha.exp()
            # one pass of the actor serves the target, at s', and the temperature, at s
            states = {"state": torch.cat([next_obs["state"], obs["state"]])}
            actions, log_probs = sample_actions(agent.actor, torch.cat([next_features, features]), states, noise)
            next_actions, (next_log_probs, log_probs) = actions.chunk(2)[0], log_probs.chunk(2)
            probs = agent.target(next_features, next_obs, next_actions).softmax(-1)
            soft_rewards = batch["rewards"] - batch["discounts"] * alpha * next_log_probs
            targets = project_distribution(probs, soft_rewards, batch["discounts"], agent.support)
        logits = agent.critic(features, obs, batch["actions"])
        qf_loss = (-(targets * logits.log_softmax(-1)).sum(-1) * batch["live"]).mean(1).sum(0)  # over B, over K
        alpha_loss = -(agent.log_alpha.exp() * (log_probs - actions.shape[-1])).mean()  # SAC, eq. 18
    q = (logits.detach().softmax(-1) * agent.support).sum(-1)
    metrics = {"loss/qf": qf_loss, "loss/alpha": alpha_loss, "train/q": q.mean(), "train/q_max": q.max(),
               "train/entropy": -log_probs.mean(), "train/alpha": alpha,
               "train/target_at_edge": (targets[..., 0] + targets[..., -1]).mean()}
    return qf_loss + alpha_loss, features.detach(), {k: v.detach() for k, v in metrics.items()}


def actor_loss(agent: Agent, obs: dict, features, noise, args: Args):
    """SAC, eq. 7, with the mean of the heads; the gradient reaches the actor through the action alone. noise (B, A)"""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        actions, log_probs = sample_actions(agent.actor, features, obs, noise)
        q = (agent.critic(features, obs, actions).softmax(-1) * agent.support).sum(-1).mean(0)
        loss = (agent.log_alpha.exp().detach() * log_probs - q).mean()
    return loss, {"loss/actor": loss.detach()}


def descend(loss, *optimizers):
    """One step of each optimiser. With several processes their gradients are averaged first, in one message."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    if dist.is_initialized():
        grads = [p.grad for optimizer in optimizers for p in optimizer.param_groups[0]["params"]]
        flat = torch.cat([grad.flatten() for grad in grads])
        dist.all_reduce(flat)
        for grad, mean in zip(grads, (flat / dist.get_world_size()).split([g.numel() for g in grads]), strict=True):
            grad.copy_(mean.view_as(grad))
    for optimizer in optimizers:
        optimizer.step()


def critic_update(agent: Agent, batch: dict, noise, args: Args, loss_function=critic_loss):
    """One step of critic, encoder and temperature. -> features (B, 1024) from before the step, metrics"""
    loss, features, metrics = loss_function(agent, batch, noise, args)
    descend(loss, agent.q_optimizer, *[agent.alpha_optimizer] * args.autotune)
    return features, metrics


def actor_update(agent: Agent, obs: dict, features, noise, args: Args, loss_function=actor_loss):
    """One step of the actor. -> metrics"""
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, metrics = loss_function(agent, obs, features, noise, args)
    agent.critic.requires_grad_(True)
    descend(loss, agent.actor_optimizer)
    return metrics


@torch.no_grad()
def target_update(agent: Agent, tau: float):
    """Polyak: target <- (1 - tau) target + tau critic, the critic's projection included; the encoder has no target."""
    torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), tau)


class Learner:
    """Runs blocks of updates by one of three routes to the same numbers: plain, compiled losses, one CUDA graph."""

    def __init__(self, agent: Agent, replay: Replay, args: Args, generator: torch.Generator, owed: float = 0.0):
        self.agent, self.replay, self.args, self.generator = agent, replay, args, generator
        self.losses = [torch.compile(f) if args.compile else f for f in (critic_loss, actor_loss)]
        self.owed, self.count = owed, 0  # blocks to do, blocks done since `read`
        self.totals = defaultdict(lambda: torch.zeros((), device=generator.device))  # sums of metrics since `read`
        self.size, self.setup_seconds = 0, 0.0

    def block(self):
        """`policy_frequency` critic updates, then one of the actor, sampling included. Adds its metrics to `totals`."""
        args, agent, generator, means = self.args, self.agent, self.generator, {}
        for i in range(args.policy_frequency):
            batch = self.replay.sample(args.batch_size, self.size, generator)
            b, a = batch["actions"].shape
            noise = torch.randn((2 * b, a), generator=generator, device=generator.device)
            features, metrics = critic_update(agent, batch, noise, args, self.losses[0])
            if (i + 1) % args.target_network_frequency == 0:
                target_update(agent, args.tau)
            means = {k: means.get(k, 0) + v / args.policy_frequency for k, v in metrics.items()}
        noise = torch.randn((b, a), generator=generator, device=generator.device)
        means |= actor_update(agent, batch["obs"], features, noise, args, self.losses[1])
        for k, v in means.items():
            self.totals[k] += v

    def capture(self, warm_up: int) -> torch.cuda.CUDAGraph:
        """`warm_up` ordinary blocks, then one recorded as a CUDA graph; every replay draws new numbers."""
        stream, graph = torch.cuda.Stream(), torch.cuda.CUDAGraph()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):  # a warm-up must not run on the stream that others wait for
            for _ in range(warm_up):
                self.block()
        torch.cuda.current_stream().wait_stream(stream)
        graph.register_generator_state(self.generator)
        with torch.cuda.graph(graph):
            self.block()
        return graph

    def run(self, size: int):
        """The updates owed for one vector step, on pictures of `size`. Once set up, nothing waits for the device."""
        fill = self.replay.size / (self.replay.rows - 1) if self.args.utd_mode == "turnover" else 1.0
        self.owed += self.args.num_updates * fill / self.args.policy_frequency
        blocks = int(self.owed)
        self.owed, self.count = self.owed - blocks, self.count + blocks
        if blocks and size != self.size:  # set up for this size; the first blocks are ordinary updates all the same
            begin, warm_up, self.size, self.step = time.perf_counter(), 1, size, self.block
            if self.args.cudagraphs:
                warm_up = min(blocks, 3)
                self.step = self.capture(warm_up).replay
            else:
                self.block()
            blocks, self.setup_seconds = blocks - warm_up, self.setup_seconds + time.perf_counter() - begin
        for _ in range(blocks):
            self.step()

    def read(self) -> dict[str, float]:
        """Mean metrics since the last reading; waits for the device. Empty before the first update."""
        if not self.count:
            return {}
        values = (torch.stack(list(self.totals.values())) / self.count).tolist()
        self.count = 0
        torch._foreach_zero_(list(self.totals.values()))
        return dict(zip(self.totals, values, strict=True))


# --- evaluate ---------------------------------------------------------------------------------------------------------
def observe(obs: dict, args: Args, generator: torch.Generator | None) -> dict:
    """What is stored of an observation: pictures at the stored size, with jitter where there is a generator."""
    rgb = squint(obs["rgb"], args.store_size)
    return obs | {"rgb": color_jitter(rgb, generator) if generator else rgb}


def evaluate(policy, env, args: Args, jitter: bool, video: Path | None) -> tuple[dict, list]:
    """Whole episodes, deterministic actions, fixed seeds. -> metrics; (obs, actions) of one world at every step

    success_rate is success at the episode's end, ci_low and ci_high its interval; success_once is at any time.
    """
    generator = torch.Generator(env.device).manual_seed(EVAL_SEED) if jitter else None
    frames, moments, sums, n = [], [], torch.zeros(3, device=env.device), args.eval_episodes
    for seed in range(EVAL_SEED, EVAL_SEED + n // env.num_envs):
        obs, running = env.reset(seed=seed), torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        policy.reset()
        for _ in range(env.max_episode_steps):
            actions = policy.act(observe(obs, args, generator))
            if seed == EVAL_SEED:
                moments.append(({k: v[:1].clone() for k, v in (obs | {"rgb": policy.view}).items()}, actions[:1]))
                frames += [picture(env, policy.view)] if video else []
            obs, _, terminations, truncations, info = env.step(actions)
            ended = (terminations | truncations) & running  # each world counts once
            sums += torch.where(ended, torch.stack([info["episode"][k] for k in EPISODE]), 0.0).sum(-1)
            running &= ~ended
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=round(env.control_hz), macro_block_size=1)
    score, success, once = (sums / n).tolist()
    z = 1.96  # 95% confidence interval (Wilson 1927, eq. 1)
    middle, half = success + z * z / (2 * n), z * math.sqrt(success * (1 - success) / n + z * z / (4 * n * n))
    low, high = (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)
    return {"eval/success_rate": success, "eval/ci_low": low, "eval/ci_high": high, "eval/success_once": once,
            "eval/return": score}, moments


def picture(env, view: torch.Tensor) -> np.ndarray:
    """Four worlds, one below the other: seen from the side, then by each camera as the policy sees it."""
    worlds, side, channels = tuple(range(min(4, env.num_envs))), 160, env.image_shape[2]
    seen = view[: len(worlds), ..., -channels:].unflatten(-1, (-1, 3)).permute(0, 4, 1, 3, 2).flatten(3)
    seen = F.interpolate(seen.float(), (side, side * channels // 3)).byte().permute(0, 2, 3, 1).cpu().numpy()
    return np.concatenate([env.render(worlds, side, "third"), seen], 2).reshape(len(worlds) * side, -1, 3)


@torch.no_grad()
def plot_critic(agent: Agent, moments: list, path: Path):
    """Each head's distribution of the return, with its mean, at the start, the middle and the end of an episode."""
    from matplotlib.figure import Figure  # without pyplot: no window, no global state
    figure, atoms = Figure((12, 3), layout="tight"), agent.support.cpu()
    for axis, at, name in zip(figure.subplots(1, 3), (0, 0.5, 1), ("start", "middle", "end"), strict=True):
        obs, actions = moments[int(at * (len(moments) - 1))]
        for head, probs in enumerate(agent.critic(agent.encoder(obs["rgb"]), obs, actions).softmax(-1)[:, 0].cpu()):
            mean = float(probs @ atoms)
            axis.plot(atoms, probs, color=f"C{head}", label=f"head {head}, mean {mean:.2f}")
            axis.axvline(mean, color=f"C{head}", linestyle="--", linewidth=1)
        axis.set(title=f"{name} of the episode", xlabel="return", ylabel="probability")
        axis.legend()
    figure.savefig(path, dpi=120)


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
    except Exception as error:  # torch names many kinds of damage; the reader needs one line
        raise ValueError(f"{path} cannot be read as a checkpoint: it is damaged or another kind of file") from error
    if not isinstance(checkpoint, dict) or checkpoint.get("algo") != "squint_sac":
        raise ValueError(f"{path} is not a checkpoint of squint_sac")
    return checkpoint


def check_fits(checkpoint: dict, args: Args, shapes: dict):
    """Raises ValueError naming the first field in which the checkpoint differs from this run."""
    theirs, mine = checkpoint["args"] | checkpoint["shapes"], asdict(args) | shapes
    # to continue a run, what its environments, random states and buffer are bound to
    bound = ["num_envs", "device", *["buffer_size"] * bool(checkpoint.get("replay"))]
    for field in ("env_id", "squint", "image_size", "frame_stack", "num_q", "num_atoms", "v_min", "v_max",
                  "actor_hidden", "critic_hidden", "cameras", "asymmetric", *shapes, *bound * bool(args.resume)):
        if theirs[field] != mine[field]:
            raise ValueError(f"the checkpoint differs in {field}: it has {theirs[field]}, this run {mine[field]}")


# --- Policy -----------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """Observation in, action out, from one checkpoint (file or its content) and no simulator.

    `spec` describes the robot: joint order and limits, control rate, action scale, cameras, layout of the state.
    """

    def __init__(self, source: str | Path | dict, device: str | torch.device = "cpu"):
        super().__init__()
        checkpoint = source if isinstance(source, dict) else load_file(source)
        self.args, self.spec = Args(**checkpoint["args"]), checkpoint["spec"]
        self.store_size, self.size = checkpoint["store_size"], checkpoint["now"]["size"]  # of frame and network input
        with torch.device("meta"):  # shapes only: no random number is drawn
            self.encoder, self.actor = policy_networks(self.args, checkpoint["shapes"])
        weights = {k: v for k, v in checkpoint["agent"].items() if k.startswith(("encoder.", "actor."))}
        self.load_state_dict(weights, assign=True)
        self.device, self.stack = torch.device(device), None
        self.to(self.device)

    def reset(self):
        """Forget the earlier pictures; call at the start of every episode."""
        self.stack = None

    def preprocess(self, frame: np.ndarray) -> torch.Tensor:
        """A camera's picture, uint8 (H, W, 3) of any size -> its middle square, area mean: uint8 (1, h, h, 3)."""
        side = min(frame.shape[:2])
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        square = torch.from_numpy(frame[None, top:top + side, left:left + side].copy())
        return squint(square.to(self.device), self.store_size)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "rgb" uint8 (N, H, W, C), cameras on channels, and "state" (N, S) -> actions (N, A) = tanh(mean)."""
        rgb = squint(torch.as_tensor(obs["rgb"], device=self.device), self.store_size).clone()
        past = self.stack[1:] if self.stack else [rgb] * (self.args.frame_stack - 1)
        self.stack = [*past, rgb]
        self.view = squint(torch.cat(self.stack, -1), self.size)
        state = torch.as_tensor(obs["state"], dtype=torch.float32, device=self.device)
        return torch.tanh(self.actor(self.encoder(self.view), {"state": state})[0])


# --- train ------------------------------------------------------------------------------------------------------------
def start_processes(args: Args) -> tuple[torch.device, int, int]:
    """Join the other processes if torchrun started several. -> this one's device, its rank, the number of processes"""
    rank, world = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    device = torch.device(args.device)
    if world > 1 and device.type == "cuda":
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    if world > 1 and args.cudagraphs:
        print("--cudagraphs is off: several processes average their gradients in the middle of a block")
        args.cudagraphs = False
    if world > 1 and not dist.is_initialized():
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
    return device, rank, world


def next_size(args: Args, size: int, global_step: int, history: list[float]) -> int:
    """The picture size to train at from here on. history: success rates evaluated since the size last changed."""
    if args.squint == "linear":
        share = min(global_step / args.total_timesteps, 1.0)
        return args.image_size + int((args.image_size_max - args.image_size) * share) // 4 * 4
    stalled = len(history) > 3 and max(history[-3:]) < max(history[:-3]) + 0.02
    return min(size + 4, args.image_size_max) if args.squint == "adaptive" and stalled else size


def start_step(env, actions, overlap: bool, pool: ThreadPoolExecutor, stream):
    """Begin env.step. -> a function that returns its result; with overlap, the caller may compute in between."""
    if not overlap:
        return lambda: env.step(actions)
    if stream is None:  # on a CPU: physics lets go of Python's lock while it computes
        return pool.submit(env.step, actions).result
    learner_stream = torch.cuda.current_stream()
    stream.wait_stream(learner_stream)
    with torch.cuda.stream(stream):
        result = env.step(actions)
    return lambda: (learner_stream.wait_stream(stream), result)[1]


def check_finite(agent: Agent, metrics: dict, global_step: int, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    values = agent.state_dict() | {k: torch.tensor(v, device=agent.support.device) for k, v in metrics.items()}
    finite = torch.stack([value.isfinite().all() for value in values.values()]).tolist()
    if not all(finite):
        good = checkpoint if checkpoint.exists() else "none yet"
        name = list(values)[finite.index(False)]
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
    args.check()
    device, rank, world = start_processes(args)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    name = args.name or time.strftime(f"{args.env_id}__squint_sac__s{args.seed}__%Y%m%d-%H%M%S")
    run = Path(args.resume or Path("runs") / name)
    if not args.resume and (run / "args.json").exists():
        raise ValueError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    source = run / "checkpoint.pt" if args.resume else args.checkpoint
    checkpoint = load_file(source) if source else None

    env, eval_envs = make_envs(args, device, rank)
    like = env or eval_envs[""]
    shapes = dict(channels=like.image_shape[2], state=like.state_dim, privileged=like.privileged_dim,
                  action=like.action_dim)
    agent = Agent(args, shapes, device)
    now = dict(global_step=0, size=args.image_size, history=[], best=-1.0, wall_time=0.0, train_time=0.0, owed=0.0)
    if checkpoint:
        check_fits(checkpoint, args, shapes)
        agent.load_state_dict(checkpoint["agent"])
        now |= checkpoint["now"] if args.resume else {"size": checkpoint["now"]["size"]}
    for use in OPTIMIZERS if args.resume else ():
        getattr(agent, use).load_state_dict(checkpoint[use])
    for tensor in agent.state_dict().values() if world > 1 else ():
        dist.broadcast(tensor, 0)
    if rank == 0:
        run.mkdir(parents=True, exist_ok=True)
        (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
        for name in ("metrics.csv", "eval.csv") if args.resume else ():
            forget_after(run / name, now["global_step"])
        tuned = tuned_defaults(args.env_id, device.type) or "as published"
        print(f"{run}: {args.env_id}; defaults for {device.type}: {tuned}")
    jitter = args.jitter and args.domain_randomization

    def weights() -> dict:  # all that Policy and --checkpoint need
        return dict(algo="squint_sac", args=asdict(args), shapes=shapes, spec=json.loads(json.dumps(like.spec)),
                    store_size=args.store_size, versions=dict(torch=str(torch.__version__), numpy=np.__version__),
                    agent=agent.state_dict(), now=dict(now))

    def evaluate_all(label: str, plot: bool) -> dict:
        policy, results = Policy(weights(), device), {}
        for suffix, eval_env in eval_envs.items():
            video = run / f"videos/{label}.mp4" if args.capture_video and not suffix else None
            metrics, moments = evaluate(policy, eval_env, args, jitter and not suffix, video)
            results |= {k + suffix: v for k, v in metrics.items() if not suffix or k == "eval/success_rate"}
            if plot and not suffix:
                plot_critic(agent, moments, run / f"critic_{label}.png")
        return results

    if args.evaluate:
        results = evaluate_all("evaluate", args.plot_critic)
        print(json.dumps(results))
        for eval_env in eval_envs.values():
            eval_env.close()
        return results | {"run": str(run)}

    # every use of chance has a generator of its own: neither --overlap nor an evaluation disturbs the others
    random = {use: torch.Generator(device).manual_seed(1_000_003 * args.seed + 10 * rank + i + now["global_step"])
              for i, use in enumerate(("act", "jitter", "learn"))}
    draw = random["jitter"] if jitter else None
    still = torch.zeros((args.num_envs, shapes["action"]), device=device)
    obs = observe(env.step(still)[0], args, draw)  # not reset(), which would undo the staggering
    if args.resume and rank == 0:  # the other processes begin new episodes
        env.load_state_dict(pickle.loads(checkpoint["env"]))
        obs = {k: v.to(device) for k, v in checkpoint["obs"].items()}
        for use, generator in random.items():
            generator.set_state(checkpoint["random"][use])
    replay = Replay(obs, shapes["action"], env.max_episode_steps, args)
    if args.resume and rank == 0 and checkpoint["replay"]:
        replay.load_state_dict(checkpoint["replay"])
    elif args.resume:
        print(f"process {rank}: no replay buffer was saved (--save-buffer), it starts empty")
    learner = Learner(agent, replay, args, random["learn"], now["owed"])
    pool, stream = ThreadPoolExecutor(1), torch.cuda.Stream() if device.type == "cuda" else None
    if args.track and rank == 0:
        import wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), name=run.name, config=asdict(args))
    episodes, results = torch.zeros(4, device=device), {}  # since the last log: ended, and the sums of EPISODE
    random_until = 0 if args.checkpoint else args.learning_starts
    first, born, begin = dict(now), START - now["wall_time"], time.perf_counter() - now["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=now["global_step"], unit="step", disable=rank > 0, mininterval=1)

    while now["global_step"] < args.total_timesteps:
        # act
        now["size"] = next_size(args, now["size"], now["global_step"], [])
        noise = torch.randn(still.shape, generator=random["act"], device=device)
        if now["global_step"] < random_until:
            actions = torch.rand(still.shape, generator=random["act"], device=device) * 2 - 1
        else:
            present = replay.present(now["size"])
            with torch.no_grad():
                actions, _ = sample_actions(agent.actor, agent.encoder(present["rgb"]), present, noise)

        # step, and with --overlap update meanwhile on what is stored
        finish = start_step(env, actions, args.overlap, pool, stream)
        if args.overlap and replay.size * args.num_envs * world >= args.learning_starts:
            learner.run(now["size"])
        next_obs, rewards, terminations, truncations, info = finish()

        # store
        dones = terminations | truncations
        final_obs, obs = observe(info["final_obs"], args, draw), observe(next_obs, args, draw)
        replay.add(actions, rewards, terminations, dones, final_obs, obs)
        ended = torch.stack([dones, *(info["episode"][k] for k in EPISODE)])
        episodes += torch.where(dones, ended, 0.0).sum(-1)

        # update
        if not args.overlap and replay.size * args.num_envs * world >= args.learning_starts:
            learner.run(now["size"])
        before, now["global_step"] = now["global_step"], now["global_step"] + args.num_envs * world
        bar.update(args.num_envs * world)

        # log
        last = now["global_step"] >= args.total_timesteps
        eval_due = last or before // args.eval_freq != now["global_step"] // args.eval_freq
        if not eval_due and before // args.log_freq == now["global_step"] // args.log_freq:
            continue
        count, *sums = episodes.tolist()
        episodes.zero_()
        metrics = {f"train/{k}": v / max(count, 1.0) for k, v in zip(EPISODE, sums, strict=True)} | learner.read()
        check_finite(agent, metrics, now["global_step"], run / "checkpoint.pt")
        now |= dict(owed=learner.owed, wall_time=time.time() - born,
                    train_time=time.perf_counter() - begin - learner.setup_seconds)
        speed = (now["global_step"] - first["global_step"]) / (now["train_time"] - first["train_time"])
        metrics |= {"train/episodes": count, "train/nan_resets": int(env.nan_resets), "train/size": now["size"],
                    "time/sps": speed}
        clock = {k: now[k] for k in CLOCK}
        bar.set_postfix_str(f"return {metrics['train/return']:.2f}, success {metrics['train/success_at_end']:.0%}")
        if rank == 0 and "loss/qf" in metrics:  # the first row names the columns, so it waits for an update
            write_row(run / "metrics.csv", clock | metrics, args.track)

        # evaluate
        pause = time.perf_counter()
        if eval_due and rank == 0:
            label = f"step_{now['global_step']:09d}"
            results = evaluate_all(label, args.plot_critic and last)
            write_row(run / "eval.csv", clock | results, args.track, args.capture_video and run / f"videos/{label}.mp4")
            bar.write(f"{now['global_step']} steps: " + ", ".join(f"{k[5:]} {v:.3f}" for k, v in results.items()))
            now["history"].append(results["eval/success_rate"])
            now["best"] = max(now["best"], results["eval/success_rate"])
            if results["eval/success_rate"] == now["best"]:
                save(run / "best.pt", weights())
        if eval_due and args.squint == "adaptive":
            size = torch.tensor(next_size(args, now["size"], 0, now["history"]), device=device)
            if world > 1:  # only rank 0 has evaluated
                dist.broadcast(size, 0)
            if int(size) != now["size"]:
                now["size"], now["history"] = int(size), []

        # save
        if eval_due and rank == 0:
            optimizers = {use: getattr(agent, use).state_dict() for use in OPTIMIZERS}
            save(run / "checkpoint.pt", weights() | optimizers | dict(
                env=pickle.dumps(env.state_dict()),  # as bytes: the file itself can be read without running code
                obs=obs, random={use: generator.get_state() for use, generator in random.items()},
                replay=replay.state_dict() if args.save_buffer else None))
        begin += time.perf_counter() - pause
    for part in (bar, env, *eval_envs.values()):
        part.close()
    pool.shutdown()
    return results | {k: now[k] for k in CLOCK} | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
