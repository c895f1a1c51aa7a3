"""Squint SAC: soft actor-critic from very small images, with a distributional critic.

Paper: Almuzairee and Christensen, "Squint: Fast Visual Reinforcement Learning for Sim-to-Real
Robotics", arXiv 2602.21203. It builds on SAC (Haarnoja et al., arXiv 1812.05905) and C51 (Bellemare
et al., arXiv 1707.06887).

    target   r + gamma (z_j - alpha log pi(a'|s')), clipped, projected on atoms z   (C51, eq. 7)
    critics  K independent heads, cross-entropy to their own target head: no minimum, no mean
    actor    E[alpha log pi(a|s) - mean over the heads of E[Z(s, a)]]               (SAC, eq. 7)
    alpha    E[-alpha (log pi(a|s) + H)], H = -A, at every critic update            (SAC, eq. 18)

Differences from the authors' code:
 1. The area mean rounds to the nearest of 256 levels; theirs truncates, half a level darker.
 2. Colour jitter is drawn for each sample and camera, in a fixed order, with hue as a rotation
    about the grey axis. Theirs draws once a batch, in a random order, and shifts hue in HSV.
 3. Episode clocks are staggered at the start; theirs run in lockstep.
 4. The tanh's share of log pi is exact (theirs adds 1e-6), and projection keeps the mass at 1
    (theirs can lose or double that of an atom that falls exactly on another).
 5. The actor is updated after the last of four critic updates; theirs after the first.
 6. A block of updates sees what was stored before the last step, so that simulating and learning
    can take a core each.
 7. Ours, not the paper's: `--asymmetric`; `--ema`, an average of encoder and actor over time that
    is evaluated, saved and deployed while the raw weights explore; `--decay` of the learning rates.
    A CPU uses both, 0.99 and 0.5, and narrower networks: TUNED, below.

Commands, from the repository's root:
    train      python algos/squint_sac.py --env-id SO101LiftCube-v1
    smallest   python algos/squint_sac.py --device cpu --total-timesteps 20000   (SO101ReachCube-v1)
    evaluate   python algos/squint_sac.py --evaluate --checkpoint runs/NAME/best.pt
    resume     python algos/squint_sac.py --resume runs/NAME    (exact if it ran with --save-buffer)

Expected result on one CPU core, last evaluation of three seeds: SO101ReachCube-v1 100 % after
100,000 transitions and 4 minutes, SO101LiftCube-v1 95 +- 0 % after 300,000 and 12,
SO101PlaceCube-v1 93 +- 2 % after 600,000 and 29. Curves and commands: docs/algos/squint_sac.md.
Not yet run on a GPU.

Needs torch, numpy, tyro, tqdm and imageio[ffmpeg]; tensordict for --cudagraphs.

Shapes: N environments, T rows of the buffer, F critic updates a block, B batch, K critic heads,
Z atoms, A action dimensions, S state dimensions, E features of an image, H x W image, C channels
(3 a camera), M cameras.
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
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Literal

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
EPISODE = ("return", "success_at_end", "success_once")  # what is logged of an episode that ended

# --- Args -----------------------------------------------------------------------------------------
# (pattern of env ids, kind of device) -> defaults other than the published ones; later rows win
TUNED = {
    ("*", "cpu"): dict(
        num_envs=8,
        eval_envs=8,
        num_updates=4,
        batch_size=128,
        buffer_size=100_000,
        encoder_width=16,
        actor_hidden=128,
        critic_hidden=128,
        policy_lr=1e-3,
        q_lr=1e-3,
        alpha_lr=1e-3,
        alpha=0.05,
        ema=0.99,
        decay=0.5,
        amp=False,
        compile=False,
        cudagraphs=False,
        total_timesteps=300_000,
        learning_starts=2_000,
        eval_freq=20_000,
        log_freq=2_000,
    ),
    ("SO101*", "cpu"): dict(
        num_envs=64,
        eval_envs=64,
        num_updates=8,
        render_size=16,
        samples_per_pixel=4,
    ),
    ("SO101Reach*", "cpu"): dict(
        total_timesteps=100_000,
        eval_freq=10_000,
    ),
    ("SO101Place*", "cpu"): dict(total_timesteps=600_000, eval_freq=40_000),
    ("SO101Stack*", "cpu"): dict(total_timesteps=800_000, eval_freq=40_000),
}
# not taken over from the arguments in --checkpoint
NOT_INHERITED = ("name", "resume", "device", "amp", "compile", "cudagraphs")


@dataclass
class Args:
    # run
    env_id: str = "SO101ReachCube-v1"  # task: SO101... (docs/envs/so101.md) or ManiSkill's
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 1_500_000  # environment transitions, over all environments
    eval_freq: int = 100_000  # transitions between evaluations, which also save checkpoint.pt
    eval_episodes: int = 64  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 64  # of them at once; divides eval_episodes
    log_freq: int = 10_000  # transitions between rows of metrics.csv; each waits for the device
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to take weights and alpha from; all else starts afresh
    resume: str | None = None  # run folder to continue, with its arguments
    save_buffer: bool = False  # save the replay buffer too: large, but then --resume is exact
    capture_video: bool = True  # write an mp4 of four environments at every evaluation
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose where

    # environment
    num_envs: int = 1024  # parallel environments
    render_size: int = 128  # pixels a side of the rendered image
    samples_per_pixel: int = 1  # rays a rendered pixel (SO101): 4 at 16 stand in for the area mean
    cameras: tuple[str, ...] = ("wrist",)  # wrist, third (SO101); ManiSkill tasks bring their own
    asset_dir: str | None = None  # SO-ARM100's folder Simulation/SO101, for the arm's own meshes
    domain_randomization: bool = True  # vary light, camera, friction ... (SO101); off: no jitter
    jitter: bool = True  # vary brightness, contrast, saturation by 0.3, hue by 0.05, in training
    image_size: Literal[16, 32, 64] = 16  # pixels a side that the networks see
    asymmetric: bool = False  # give the critic, never the policy, the simulator's privileged state

    # algorithm
    buffer_size: int = 1_000_000  # transitions kept, each with both images: 1.7 kB at 16 pixels
    batch_size: int = 512  # transitions per update
    num_updates: int = 256  # critic updates per vector step: each transition is used 128 times
    learning_starts: int = 5_000  # transitions of uniformly random actions before the first update
    policy_lr: float = 3e-4  # Adam's learning rate for the actor
    q_lr: float = 3e-4  # Adam's learning rate for critic and encoder
    alpha_lr: float = 3e-4  # Adam's learning rate for log alpha
    decay: float = 0.0  # share of the run, its last, in which the learning rates fall to 0
    policy_frequency: int = 4  # critic updates per actor update; together they are one block
    alpha: float = 1.0  # weight of the entropy: the first one with autotune, else the constant one
    autotune: bool = True  # learn alpha so that the entropy is -A
    gamma: float = 0.9  # discount per step; raise v_max with it: rewards add up to 1 / (1 - gamma)
    tau: float = 0.01  # share of the critic that moves into its target
    ema: float = 0.0  # of encoder and actor for evaluation: what stays of the average per block
    num_q: int = 2  # critic heads
    num_atoms: int = 101  # atoms of the return distribution
    v_min: float = -20.0  # lowest return represented
    v_max: float = 20.0  # highest return represented
    encoder_width: int = 32  # channels of the first convolution; the others have twice as many
    actor_hidden: int = 256  # width of the actor's three layers
    critic_hidden: int = 512  # width of each critic head's three layers

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # networks, buffer and simulation
    amp: bool = True  # losses in bfloat16 where safe; 10-20 times slower on a CPU without bf16
    compile: bool = True  # compile the two losses with torch.compile
    cudagraphs: bool = True  # replay a block of updates as one CUDA graph; needs cuda, tensordict


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
    need(args.checkpoint or not args.evaluate, "--evaluate needs --checkpoint FILE")
    whole_batches = args.eval_episodes % args.eval_envs == 0
    need(whole_batches, "--eval-episodes must be a multiple of --eval-envs")
    whole_blocks = args.num_updates % args.policy_frequency == 0
    need(whole_blocks, "--num-updates must be a multiple of --policy-frequency")
    need(args.render_size >= args.image_size, "--render-size must not be below --image-size")
    need(args.v_min < args.v_max, "--v-min must be below --v-max")
    room = args.buffer_size // args.num_envs * args.num_envs
    need(room >= args.learning_starts, "--buffer-size must not be below --learning-starts")
    here = torch.cuda.is_available() or args.device == "cpu"
    need(here, "there is no CUDA device here: use --device cpu")


# same in: squint_sac, bc_chunk
def tuned(env_id: str, device: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for (pattern, kind), row in TUNED.items():
        if fnmatch(env_id, pattern) and device.startswith(kind):
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
    """Command line -> Args. Defaults, and so --help, follow task and device, or the file given."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    values = tuned(given.env_id, given.device)
    defaults = Args(env_id=given.env_id, device=given.device, **values)
    if given.checkpoint:
        saved = load(given.checkpoint)["args"]
        here = {name: getattr(defaults, name) for name in NOT_INHERITED}
        defaults = Args(**saved | here)
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
    """-> training environment (None with --evaluate), {suffix of metrics: evaluation environment}.

    The contract of all of them is envs/__init__.py's. One suffix must be "".
    """
    try:
        import envs
    except ModuleNotFoundError as error:
        raise ValueError(
            "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        ) from error
    so101 = args.env_id.startswith("SO101")
    options = dict(render_size=args.render_size, asymmetric=args.asymmetric)
    if so101:
        options |= dict(
            samples_per_pixel=args.samples_per_pixel,
            cameras=args.cameras,
            asset_dir=args.asset_dir,
            domain_randomization=args.domain_randomization,
        )
    make = partial(envs.make, args.env_id, device=args.device)
    fixed = options | dict(num_envs=args.eval_envs, seed=EVAL_SEED, stagger=False)
    eval_envs = {"": make(**fixed)}
    if so101:
        eval_envs["_nodr"] = make(**fixed | dict(domain_randomization=False))
    if args.evaluate:
        return None, eval_envs
    return make(num_envs=args.num_envs, seed=args.seed, stagger=True, **options), eval_envs


# --- Networks -------------------------------------------------------------------------------------
def squint(rgb: torch.Tensor, size: int) -> torch.Tensor:
    """Area mean, rounded: uint8 (N, H, W, C) -> uint8 (N, size, size, C).  # differs (1)"""
    if rgb.shape[1] == rgb.shape[2] == size:
        return rgb
    small = F.interpolate(rgb.permute(0, 3, 1, 2).float(), size=(size, size), mode="area")
    return small.round().to(torch.uint8).permute(0, 2, 3, 1).contiguous()


def color_jitter(rgb: torch.Tensor) -> torch.Tensor:
    """Random brightness, contrast, saturation and hue, each image its own: uint8 (N, H, W, C)."""
    x = rgb.unflatten(-1, (-1, 3)).float()  # (N, H, W, M, 3)
    draw = torch.rand((4, len(x), 1, 1, x.shape[3], 1), device=x.device) * 2 - 1  # differs (2)
    brightness, contrast, saturation = 1 + 0.3 * draw[:3]
    luma = torch.tensor([0.299, 0.587, 0.114], device=x.device)
    x = (x * brightness).clamp(0, 255)
    mean_luma = (x @ luma).mean((1, 2), keepdim=True)[..., None]
    x = mean_luma.lerp(x, contrast).clamp(0, 255)
    x = (x @ luma)[..., None].lerp(x, saturation).clamp(0, 255)
    # Rodrigues' rotation about (1, 1, 1) / sqrt 3, which leaves greys alone
    angle = 2 * math.pi * 0.05 * draw[3]
    across = (x.roll(1, -1) - x.roll(-1, -1)) / math.sqrt(3.0)  # that axis x colour
    along = x.mean(-1, keepdim=True) * (1 - angle.cos())
    x = x * angle.cos() + across * angle.sin() + along
    return x.clamp(0, 255).round().to(torch.uint8).flatten(-2)


def init_weights(layer: nn.Module):
    """Orthogonal weights, gain sqrt 2 for convolutions, 1 for linear layers; zero biases."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        nn.init.orthogonal_(layer.weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
        nn.init.zeros_(layer.bias)


def mlp(*widths: int) -> nn.Sequential:
    """Linear layers, each with LayerNorm and ReLU behind it."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """uint8 (B, H, W, C) -> (B, E), E = 32 width. Of actor and critic, trained by the critic."""

    CONVS = {  # image size -> kernel, stride of each layer; all end at 4 x 4 pixels
        16: ((4, 2), (4, 1)),
        32: ((4, 2), (4, 2), (3, 1)),
        64: ((8, 4), (4, 2), (3, 1)),
    }

    def __init__(self, channels: int, size: int, width: int):
        super().__init__()
        layers, outputs = [], width
        for kernel, stride in self.CONVS[size]:
            layers += [nn.Conv2d(channels, outputs, kernel, stride), nn.ReLU()]
            channels, outputs = outputs, 2 * width
        self.convs = nn.Sequential(*layers)

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float() / 255 - 0.5
        return self.convs(x).flatten(1)


class Projection(nn.Module):
    """features (B, E), state (B, S) -> (B, 306): 50 numbers for the image, 256 for the state."""

    def __init__(self, feature_dim: int, state_dim: int):
        super().__init__()
        self.rgb = nn.Sequential(nn.Linear(feature_dim, 50), nn.LayerNorm(50), nn.Tanh())
        self.state = mlp(state_dim, 256)

    def forward(self, features, state):
        return torch.cat([self.rgb(features), self.state(state)], -1)


class Actor(nn.Module):
    """features (B, E), state (B, S) -> mean, log std (B, A) of the Gaussian before the tanh."""

    def __init__(self, state_dim: int, action_dim: int, args: Args):
        super().__init__()
        hidden = args.actor_hidden
        self.projection = Projection(32 * args.encoder_width, state_dim)
        self.trunk = mlp(306, hidden, hidden, hidden)
        self.mean = nn.Linear(hidden, action_dim)
        self.log_std = nn.Linear(hidden, action_dim)

    def forward(self, features, state):
        x = self.trunk(self.projection(features, state))
        squashed = torch.tanh(self.log_std(x).float())
        return self.mean(x).float(), -5 + 3.5 * (squashed + 1)  # log std in [-5, 2]


class Critic(nn.Module):
    """features (B, E), state (B, S), actions (B, A) -> logits (K, B, Z) of K separate heads."""

    def __init__(self, state_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.projection = Projection(32 * args.encoder_width, state_dim)
        self.heads = nn.ModuleList()
        for _ in range(args.num_q):
            layers = mlp(306 + action_dim, *[args.critic_hidden] * 3)
            self.heads.append(layers.append(nn.Linear(args.critic_hidden, args.num_atoms)))

    def forward(self, features, state, actions):
        x = torch.cat([self.projection(features, state), actions], -1)
        return torch.stack([head(x) for head in self.heads]).float()


def shapes_of(env) -> dict:
    """What the networks' shapes follow from."""
    return dict(
        channels=env.image_shape[2],
        state=env.state_dim,
        privileged=env.privileged_dim,
        action=env.action_dim,
    )


class Agent(nn.Module):
    """All that learns: encoder, actor, critic, its target and log alpha, with their optimisers."""

    def __init__(self, args: Args, shapes: dict):
        super().__init__()
        self.shapes = shapes
        critic_state = shapes["state"] + shapes["privileged"]
        self.encoder = Encoder(shapes["channels"], args.image_size, args.encoder_width)
        self.actor = Actor(shapes["state"], shapes["action"], args)
        self.critic = Critic(critic_state, shapes["action"], args)
        self.apply(init_weights)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        acting = nn.ModuleDict(dict(encoder=self.encoder, actor=self.actor))
        self.averaged = copy.deepcopy(acting).requires_grad_(False)  # for Policy
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)), args.autotune)
        support = torch.linspace(args.v_min, args.v_max, args.num_atoms)
        self.register_buffer("support", support, persistent=False)
        self.to(args.device)
        self.encoder.to(memory_format=torch.channels_last)
        q_parameters = [*self.critic.parameters(), *self.encoder.parameters()]
        rate = partial(torch.tensor, device=args.device)
        q_group = dict(params=q_parameters, lr=rate(args.q_lr))
        alpha_group = dict(params=[self.log_alpha], lr=rate(args.alpha_lr))
        # rates and the capturable step count are on the device, where a CUDA graph sees them change
        adam = partial(torch.optim.Adam, fused=True, capturable=self.support.is_cuda)
        self.q_optimizer = adam([q_group, alpha_group])
        self.actor_optimizer = adam(self.actor.parameters(), rate(args.policy_lr))


# --- Storage --------------------------------------------------------------------------------------
def observe(obs: dict, args: Args) -> dict:
    """What is stored of an observation: the jittered image, the state, the critic's state."""
    rgb = squint(obs["rgb"], args.image_size)
    if args.jitter and args.domain_randomization:
        rgb = color_jitter(rgb)
    critic_state = obs["state"]
    if args.asymmetric:
        critic_state = torch.cat([critic_state, obs["privileged"]], -1)
    return dict(rgb=rgb, state=obs["state"], critic_state=critic_state)


def transition(obs: dict, next_obs: dict, actions, rewards) -> dict:
    """One flat dict; the next observation's keys begin with next_."""
    following = {f"next_{key}": value for key, value in next_obs.items()}
    return obs | following | dict(actions=actions, rewards=rewards)


class Replay:
    """A ring of T rows, each with one transition of every environment."""

    def __init__(self, example: dict, rows: int):
        self.data = {key: value.new_zeros((rows, *value.shape)) for key, value in example.items()}
        self.rows, self.added = rows, 0

    def add(self, row: dict):
        for key, value in row.items():
            self.data[key][self.added % self.rows] = value
        self.added += 1

    def __len__(self) -> int:
        return min(self.added, self.rows) * self.data["rewards"].shape[1]

    def sample(self, *shape: int) -> dict:
        """Uniformly drawn transitions, each value with `shape` in front."""
        index = torch.randint(len(self), shape, device=self.data["rewards"].device)
        return {key: value.flatten(0, 1)[index] for key, value in self.data.items()}

    def state_dict(self) -> dict:
        return self.data | dict(added=self.added)

    def load_state_dict(self, state: dict):
        self.added = state["added"]
        for key, value in self.data.items():
            value.copy_(state[key])


# --- Update functions -----------------------------------------------------------------------------
def sample_actions(actor: Actor, features, state, noise):
    """Tanh-Gaussian actions (B, A), their log-probabilities (B,), from normal noise. SAC, eq. 21"""
    mean, log_std = actor(features, state)
    raw = mean + log_std.exp() * noise
    log_normal = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_slope = 2 * (math.log(2.0) - raw - F.softplus(-2 * raw))  # log(1 - tanh^2): differs (4)
    return torch.tanh(raw), (log_normal - log_slope).sum(-1)


def project_distribution(probs, moved, support):
    """C51, eq. 7: probs (K, B, Z) of atoms `moved` (B, Z) -> probs (K, B, Z) of the support (Z,).

    Each atom is clipped to the support and shares its mass between its two neighbours.
    """
    low, high, atoms = support[0], support[-1], len(support)
    position = (moved.clamp(low, high) - low) * ((atoms - 1) / (high - low))
    # lower + 1 must exist, so that no mass is lost: differs (4). A NaN stays in the shares alone
    lower = position.floor().nan_to_num(0.0).clamp(0, atoms - 2)
    upper_share = (position - lower).expand_as(probs)
    lower = lower.long().expand_as(probs)
    projected = torch.zeros_like(probs).scatter_add_(-1, lower, probs * (1 - upper_share))
    return projected.scatter_add_(-1, lower + 1, probs * upper_share)


def critic_loss(agent: Agent, batch: dict, noise, args: Args):
    """Loss of critic, encoder, temperature; noise (2B, A). -> loss, features (B, E), metrics"""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        features = agent.encoder(batch["rgb"])
        with torch.no_grad():
            alpha = agent.log_alpha.exp()
            next_features = agent.encoder(batch["next_rgb"])
            # one pass of the actor serves the target, at s', and the temperature, at s
            both = torch.cat([next_features, features])
            states = torch.cat([batch["next_state"], batch["state"]])
            actions, log_probs = sample_actions(agent.actor, both, states, noise)
            next_actions = actions.chunk(2)[0]
            next_log_probs, log_probs = log_probs.chunk(2)
            # always bootstrapped, as published: episodes end by a clock that no state shows
            soft_rewards = batch["rewards"] - args.gamma * alpha * next_log_probs
            moved = soft_rewards[:, None] + args.gamma * agent.support  # (B, Z)
            logits = agent.target(next_features, batch["next_critic_state"], next_actions)
            targets = project_distribution(logits.softmax(-1), moved, agent.support)
        logits = agent.critic(features, batch["critic_state"], batch["actions"])
        cross_entropy = -(targets * logits.log_softmax(-1)).sum(-1)  # (K, B)
        qf_loss = cross_entropy.mean(1).sum(0)
        entropy_error = log_probs - actions.shape[-1]
        alpha_loss = -(agent.log_alpha.exp() * entropy_error).mean()  # SAC, eq. 18
    q = (logits.detach().softmax(-1) * agent.support).sum(-1)
    metrics = {
        "loss/qf": qf_loss.detach(),
        "loss/alpha": alpha_loss.detach(),
        "train/q": q.mean(),
        "train/entropy": -log_probs.mean(),
        "train/alpha": alpha,
        "train/target_at_edge": (targets[..., 0] + targets[..., -1]).mean(),
    }
    return qf_loss + alpha_loss, features.detach(), metrics


def actor_loss(agent: Agent, batch: dict, features, noise, args: Args):
    """SAC, eq. 7, with the mean of the heads; the gradient comes by the action. noise (B, A)"""
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        actions, log_probs = sample_actions(agent.actor, features, batch["state"], noise)
        probs = agent.critic(features, batch["critic_state"], actions).softmax(-1)
        q = (probs * agent.support).sum(-1).mean(0)
        loss = (agent.log_alpha.exp().detach() * log_probs - q).mean()
    return loss, {"loss/actor": loss.detach()}


def descend(loss, optimizer):
    """One step down the gradient."""
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def set_learning_rates(agent: Agent, args: Args, step: int):
    """Constant, then falling linearly to 0 over the last `decay` of the run.  # differs (7)"""
    share = min(1.0, (1 - step / args.total_timesteps) / max(args.decay, 1e-9))
    groups = agent.q_optimizer.param_groups + agent.actor_optimizer.param_groups
    for group, rate in zip(groups, (args.q_lr, args.alpha_lr, args.policy_lr), strict=True):
        group["lr"].fill_(share * rate)


@torch.no_grad()
def follow(average, network, share: float):
    """Polyak: average <- (1 - share) average + share network, two lists of parameters."""
    torch._foreach_lerp_(list(average), list(network), share)


def update_block(agent: Agent, batches: dict, args: Args, q_loss=critic_loss, pi_loss=actor_loss):
    """F updates of critic, encoder and temperature, each on its own batch, then one of the actor.

    batches: transitions, (F, B) in front. -> metrics of the last critic update and of the actor's
    """
    for i in range(args.policy_frequency):
        batch = {key: value[i] for key, value in batches.items()}
        noise = torch.randn_like(batch["actions"].repeat(2, 1))
        loss, features, metrics = q_loss(agent, batch, noise, args)
        descend(loss, agent.q_optimizer)
        follow(agent.target.parameters(), agent.critic.parameters(), args.tau)
    noise = torch.randn_like(batch["actions"])
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, actor_metrics = pi_loss(agent, batch, features, noise, args)  # differs (5)
    agent.critic.requires_grad_(True)
    descend(loss, agent.actor_optimizer)
    acting = [*agent.encoder.parameters(), *agent.actor.parameters()]
    follow(agent.averaged.parameters(), acting, 1 - args.ema)  # differs (7)
    return metrics | actor_metrics


def make_update(agent: Agent, args: Args):
    """`update_block` of `batches` alone, with compiled losses, as one CUDA graph.

    On a CPU in one thread: another core simulates. A second one here would gain a tenth, and stall
    beside other work, because the two wait for each other in every operation.
    """
    torch.set_float32_matmul_precision("high")
    if args.device == "cpu":
        torch.set_num_threads(1)
    update = partial(update_block, agent, args=args)
    if args.compile:
        q_loss, pi_loss = torch.compile(critic_loss), torch.compile(actor_loss)
        update = partial(update, q_loss=q_loss, pi_loss=pi_loss)
    if args.cudagraphs:
        from tensordict.nn import CudaGraphModule

        update = CudaGraphModule(update, warmup=3)
    return update


# --- evaluate -------------------------------------------------------------------------------------
def wilson(rate: float, n: int) -> tuple[float, float]:
    """95 % confidence interval of a success rate measured over n episodes (Wilson 1927, eq. 1)."""
    z = 1.96
    middle = rate + z * z / (2 * n)
    half = z * math.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return (middle - half) / (1 + z * z / n), (middle + half) / (1 + z * z / n)


def episode_sums(info: dict, ended):
    """(4,): how many episodes ended, and sums of EPISODE over them."""
    values = torch.stack([ended, *(info["episode"][key] for key in EPISODE)])
    return torch.where(ended, values, 0.0).sum(-1)


def evaluate(policy, env, episodes: int, video: Path | None = None) -> dict:
    """Whole episodes, deterministic actions, fixed seeds, no jitter. -> metrics; `video` is an mp4.

    success_rate is success at the episode's end, with its interval; success_once is at any time.
    """
    frames = []
    sums = torch.zeros(4, device=policy.device)
    shown = tuple(range(min(4, env.num_envs)))
    for seed in range(EVAL_SEED, EVAL_SEED + episodes // env.num_envs):
        obs = env.reset(seed=seed)
        running = torch.ones(env.num_envs, dtype=torch.bool, device=policy.device)
        for _ in range(env.max_episode_steps):
            if video and seed == EVAL_SEED:
                frames.append(np.hstack(env.render(shown, 160)))
            obs, _, terminations, truncations, info = env.step(policy.act(obs))
            ended = (terminations | truncations) & running  # each environment counts once
            sums += episode_sums(info, ended)
            running &= ~ended
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=round(env.control_hz), macro_block_size=1)
    score, success, once = (sums[1:] / episodes).tolist()
    low, high = wilson(success, episodes)
    return {
        "eval/success_rate": success,
        "eval/ci_low": low,
        "eval/ci_high": high,
        "eval/success_once": once,
        "eval/return": score,
    }


def evaluate_all(policy, eval_envs: dict, args: Args, video: Path, last: bool) -> dict:
    """`evaluate` in every environment, whose suffix its metrics get; the video is of suffix "".

    Only the last evaluation spends time on the others: before it their metrics are NaN.
    """
    film = video if args.capture_video else None
    metrics = evaluate(policy, eval_envs[""], args.eval_episodes, film)
    results = dict(metrics)
    for suffix in eval_envs.keys() - {""}:
        if last:
            metrics = evaluate(policy, eval_envs[suffix], args.eval_episodes)
        results |= {k + suffix: v if last else math.nan for k, v in metrics.items()}
    return results


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
    except Exception as error:  # of many kinds for a damaged file; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == "squint_sac"
    need(ours, f"{path} is not squint_sac's")
    unknown = checkpoint.get("args", {}).keys() - Args.__dataclass_fields__.keys()
    whole = not unknown and {"args", "agent"} <= checkpoint.keys()
    need(whole, f"{path} is another version's, or was edited: {', '.join(unknown)}")
    finite = all(x.isfinite().all() for x in checkpoint["agent"].values() if torch.is_tensor(x))
    need(finite, f"{path} has weights that are not finite")
    return checkpoint


def weights(agent: Agent, args: Args, spec: dict, progress: dict) -> dict:
    """What Policy and --checkpoint need. Its tensors and `progress` follow the run."""
    content = dict(algo="squint_sac", args=asdict(args), shapes=agent.shapes, spec=spec)
    return content | dict(progress=progress, agent=agent.state_dict())


def save_run(run: Path, content: dict, parts: dict, obs: dict):
    """checkpoint.pt: all that it takes to continue."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save(run / "checkpoint.pt", content | states | dict(obs=obs, csv_sizes=csv_sizes(run)))


def load_run(run: Path, parts: dict) -> dict:
    """Put every part and the CSV files back to the checkpoint. -> the checkpoint"""
    checkpoint = load(run / "checkpoint.pt")
    for name, part in parts.items():
        state = checkpoint[name]
        if name != "replay":  # which copies; what an optimizer keeps would keep the file in memory
            state = copy.deepcopy(state)
        part.load_state_dict(state)
    cut_back(run, checkpoint["csv_sizes"])
    if "replay" not in parts:
        print("no replay buffer was saved (--save-buffer): it starts empty")
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


# --- Policy ---------------------------------------------------------------------------------------
class Policy(nn.Module):
    """Observation in, action out, from one checkpoint (file or its content) and no simulator.

    `spec` describes the robot: joint order and limits, control rate, action scale, cameras, state.
    """

    def __init__(self, source: str | Path | dict, device: str = "cpu"):
        super().__init__()
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args, self.spec = Args(**checkpoint["args"]), checkpoint["spec"]
        self.device = torch.device(device)
        shapes = checkpoint["shapes"]
        with torch.device("meta"):  # shapes only: no random number is drawn
            width = self.args.encoder_width
            self.encoder = Encoder(shapes["channels"], self.args.image_size, width)
            self.actor = Actor(shapes["state"], shapes["action"], self.args)
        own = {}
        for name, value in checkpoint["agent"].items():
            if name.startswith("averaged."):
                own[name.removeprefix("averaged.")] = value.clone()
        self.load_state_dict(own, assign=True)
        self.to(self.device)

    def preprocess(self, frame: np.ndarray) -> torch.Tensor:
        """A camera's frame, uint8 (H, W, 3) -> its middle square, squinted: uint8 (1, h, h, 3)."""
        side = min(frame.shape[:2])
        top, left = (np.array(frame.shape[:2]) - side) // 2
        square = torch.tensor(frame[None, top : top + side, left : left + side], device=self.device)
        return squint(square, self.args.image_size)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "rgb" uint8 (N, H, W, C), any size, "state" (N, S) -> actions (N, A) = tanh(mean)."""
        rgb = squint(torch.as_tensor(obs["rgb"], device=self.device), self.args.image_size)
        state = torch.as_tensor(obs["state"], dtype=torch.float32, device=self.device)
        mean, _ = self.actor(self.encoder(rgb), state)
        return torch.tanh(mean)


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


def check_finite(agent: Agent, metrics: dict, step: int, run: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    for name, value in (metrics | agent.state_dict()).items():
        if not torch.as_tensor(value).isfinite().all():
            place = f"step {step}; last good checkpoint: {run}/checkpoint.pt"
            raise FloatingPointError(f"{name} is not finite at {place}")


def training_metrics(env, episodes: torch.Tensor, losses: list[dict]) -> dict[str, float]:
    """Means over the episodes that ended, and over the blocks of updates, since the last row."""
    count, *sums = episodes.tolist()
    metrics = {"train/episodes": count, "train/nan_resets": int(env.nan_resets)}
    for key, value in zip(EPISODE, sums, strict=True):
        metrics[f"train/{key}"] = value / max(count, 1.0)
    for key in losses[0] if losses else ():
        metrics[key] = torch.stack([row[key] for row in losses]).mean().item()
    return metrics


@torch.no_grad()
def explore(agent: Agent, obs: dict, like: torch.Tensor) -> torch.Tensor:
    """Sampled actions (N, A) for observations as they are stored."""
    features, noise = agent.encoder(obs["rgb"]), torch.randn_like(like)
    return sample_actions(agent.actor, features, obs["state"], noise)[0]


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at NaN.
    """
    check(args)
    torch.manual_seed(args.seed)
    env, eval_envs = make_envs(args)
    if args.evaluate:
        video = Path(args.checkpoint).with_suffix(".mp4")
        policy = Policy(args.checkpoint, args.device)
        results = evaluate_all(policy, eval_envs, args, video, last=True)
        print(json.dumps(results))
        return results
    run = open_run(args)
    agent = Agent(args, shapes_of(env))
    update = make_update(agent, args)
    still = torch.zeros((args.num_envs, env.action_dim), device=args.device)
    obs = observe(env.step(still)[0], args)  # not reset(), which would undo the staggering
    replay = Replay(transition(obs, obs, still, still[:, 0]), args.buffer_size // args.num_envs)

    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    content = weights(agent, args, env.spec, progress)
    parts = dict(agent=agent, env=env, random=GlobalRandom())
    parts |= dict(q_optimizer=agent.q_optimizer, actor_optimizer=agent.actor_optimizer)
    if args.save_buffer:
        parts["replay"] = replay
    if args.resume:
        saved = load_run(run, parts)
        progress.update(saved["progress"])
        obs = {key: value.to(args.device) for key, value in saved["obs"].items()}
        del saved  # its mapped tensors are released
    else:
        if args.checkpoint:
            agent.load_state_dict(load(args.checkpoint)["agent"])
        save_run(run, content, parts, obs)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    results, losses, compiled = {}, [], False
    episodes = torch.zeros(4, device=args.device)  # since the last row, as in episode_sums
    step, born = progress["global_step"], START - progress["wall_time"]
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")
    interrupt, pool = Interrupt(), ThreadPoolExecutor(1)
    stop = step >= args.total_timesteps

    while not stop:
        # act
        begin = time.perf_counter()
        uniform = step < args.learning_starts and not args.checkpoint
        actions = torch.rand_like(still) * 2 - 1 if uniform else explore(agent, obs, still)

        # step, on a CPU while the networks learn from what was stored before  # differs (6)
        stepping = pool.submit(env.step, actions)
        if args.device != "cpu":
            stepping.result()

        # update
        if len(replay) >= args.learning_starts:
            set_learning_rates(agent, args, step)
            for _ in range(args.num_updates // args.policy_frequency):
                losses.append(update(replay.sample(args.policy_frequency, args.batch_size)))
            if not compiled:  # the first updates compile, and train_time is without that
                compiled, begin = True, time.perf_counter()

        # store
        next_obs, rewards, terminations, truncations, info = stepping.result()
        final_obs = observe(info["final_obs"], args)
        replay.add(transition(obs, final_obs, actions, rewards))
        obs = observe(next_obs, args)
        episodes += episode_sums(info, terminations | truncations)

        # log
        step += args.num_envs
        bar.update(args.num_envs)
        last = step >= args.total_timesteps
        stop = last or interrupt.asked
        eval_due = last or step % args.eval_freq < args.num_envs
        log_due = stop or eval_due or step % args.log_freq < args.num_envs
        metrics = training_metrics(env, episodes, losses) if log_due else {}
        train_time = progress["train_time"] + time.perf_counter() - begin
        clock = dict(global_step=step, wall_time=time.time() - born, train_time=train_time)
        progress |= clock
        if log_due:
            metrics["time/sps"] = step / train_time
            check_finite(agent, metrics, step, run)
            if losses:  # the first row names the columns, so it waits for an update
                write_row(run / "metrics.csv", clock | metrics, args.track)
            bar.set_postfix_str(f"return {metrics['train/return']:.2f}")
            episodes.zero_()
            losses.clear()

        # evaluate
        if eval_due:
            video = run / f"videos/step_{step:09d}.mp4"
            results = evaluate_all(Policy(content, args.device), eval_envs, args, video, last)
            write_row(run / "eval.csv", clock | results, args.track)
            bar.write(f"{step} steps: success {results['eval/success_rate']:.1%}")
            if results["eval/success_rate"] >= progress["best"]:
                progress["best"] = results["eval/success_rate"]
                save(run / "best.pt", content)

        # save
        if eval_due or stop:
            save_run(run, content, parts, obs)

    interrupt.restore()
    for part in (bar, env, *eval_envs.values()):
        part.close()
    if interrupt.asked:
        sys.exit(f"interrupted at step {step}: continue with --resume {run}")
    return results | progress | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        sys.exit(f"error: the checkpoint does not fit: {str(error).splitlines()[-1].strip()}")
