"""ResFiT: a frozen base policy, and a small off-policy residual that makes it reliable.

Paper: Ankile, Jiang, Duan, Shi, Abbeel and Nagabandi, "Residual Off-Policy RL for Finetuning
Behavior Cloning Policies", arXiv 2509.19301. Written from the paper's equations alone: the authors'
code has a non-commercial licence, and nobody who wrote this file has opened it.

    base     b_t = the next action of the base, which plans K actions and executes some of them (1)
    action   a_t = clip(b_t + clip(pi(o_t, b_t) + e, -l, l), -1, 1), stored as executed         (2)
    target   y = sum of g^i r_(t+i), i < n, + g^n (1 - d) min of a random pair of Q'_k(o', a')  (3)
             a' = (2) with pi', b' = b_(t+n) and e = clip(N(0, s^2), -c, c)
    critics  mean over the heads of E[(Q_k(o_t, a_t) - y)^2]; half of the batch demonstrations  (4)
    actor    -E[mean_k Q_k(o_t, clip(b_t + pi(o_t, b_t)))]                                       (5)
    guard    an episode earns delta; one that noise or residual plays costs p0+, the base's largest
             likely success, and brings back its own, X. It may begin while an account is not    (6)
             overdrawn: c <- min(c + delta, B), then c <- c - p0+ >= 0; at its end c <- c + X
    deploy   the base, unless p1- >= p0+ - delta by an evaluation of what would replace it       (7)

By (6) training loses at most delta in success on average, whatever the residual does: the proof is
on the page. p0+ and p1- are one-sided 95 % bounds of Clopper and Pearson.

Differences from the paper:
 1. Never far below the base: --recipe ours has (6) and (7), and learns from exposed episodes
    first; --recipe published has no guard.
 2. The bound of (2) is hard: it holds for residual plus noise, per dimension, in warm-up too.
 3. Heads are trained by their own errors. (The paper leaves open whether they are averaged first.)
 4. The encoder's tokens are compressed by one linear layer each for actor and critics.
 5. Warm-up steps count. Any number of environments; n-step sums are made at sampling.
 6. Observations may be vectors: the simulator's true state beside the joints (--obs state).

The base is a black box, named on the command line: FILE.pt2, a program of torch.export,
forward(state (N, S)) or forward(state, rgb (N, H, W, C)) -> actions (N, K, A); or module:callable,
called with the environment, which returns an object with reset(mask (N,)) and
act(obs) -> actions (N, A). A program is code, so load only those that you trust. No checkpoint
carries or chooses one: --resume, --evaluate and Policy need --base again, and compare its SHA-256.

Commands, from the repository's root:
    record      python -m envs.demos --env-id SO101ReachCube-v1 --episodes 100 --noise 0.3 \
                    --out reach.hdf5
    base        python algos/bc_chunk.py --env-id SO101ReachCube-v1 --demos reach.hdf5 --name base
    train       python algos/resfit.py --env-id SO101ReachCube-v1 --demos reach.hdf5 \
                    --base runs/base/base.pt2
    evaluate    python algos/resfit.py --evaluate --checkpoint runs/NAME/best.pt \
                    --base runs/base/base.pt2
    resume      python algos/resfit.py --resume runs/NAME --base runs/base/base.pt2
                    (exactly, if run with --save-buffer)
    smallest    the first three, the last two of them with --device cpu

Expected result, from the true state, three seeds, one thread of two shared CPU cores: on
SO101ReachCube-v1 a base of 88.7 % becomes 99.5 +- 0.9 % after 48,000 steps and 4 to 7 minutes, on
SO101PlaceCube-v1 one of 48.4 % becomes 92.7 +- 2.4 % after 400,000 and 20 to 26; never deployed
below the base (see its page). Not yet measured on a GPU.

Shapes: N environments, B batch, K actions of a chunk, H heads, A action dimensions, S state
dimensions, C channels (3 a camera), D width of a token, E features.
"""

# --- Imports --------------------------------------------------------------------------------------
import os

# Threads spin for a moment before they wait: much longer, and a run beside other work collapses.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import copy
import csv
import hashlib
import importlib
import inspect
import json
import math
import signal
import sys
import time
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
from torch.export.passes import move_to_device_pass
from tqdm import tqdm

ALGO = "resfit"  # what a checkpoint says it is of
START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
ROLLING = 100  # episodes over which the success of training is averaged
GRAD_CLIP = 1.0  # largest norm of a gradient
NOISE_CLIP = 0.3  # c of equation 3, in units of actions
PAD = 4  # largest random shift of images, pixels each way
ALPHA = 0.05  # chance that p0+ or p1- is wrong
CHOICE = 4  # transitions drawn for one that is learned from
MEASURE = 4  # evaluations' worth of episodes, in which the base is measured first

# --- Args -----------------------------------------------------------------------------------------
# (env ids, device, recipe) -> defaults other than the published ones below; later rows win
TUNED = {
    ("*", "*", "ours"): dict(allowance=0.05, offline=0.25),
    # sizes and learning rates for a CPU, ours
    ("*", "cpu*", "*"): dict(
        num_envs=16,
        total_timesteps=600_000,
        eval_freq=20_000,
        log_freq=4_000,
        heads=5,
        hidden=128,
        batch_size=128,
        encoder_dim=32,
        utd=0.25,
        gamma=0.97,
        lr=5e-4,
        actor_lr=1e-4,
        tau=0.01,
        noise=0.04,
        learning_starts=6_400,
        critic_warmup=3_000,
    ),
    ("SO101Reach*", "cpu*", "*"): dict(
        gamma=0.95, utd=0.5, total_timesteps=48_000, eval_freq=3_200, log_freq=800
    ),
}


@dataclass
class Args:
    # run
    env_id: str = "SO101ReachCube-v1"  # task: SO101... or robosuite/...
    recipe: Literal["ours", "published"] = "ours"  # defaults with the guards, or without
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 300_000  # transitions, warm-up included, over all environments
    eval_freq: int = 10_000  # transitions between evaluations; each saves checkpoint.pt
    eval_episodes: int = 64  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 64  # of them at once; divides eval_episodes
    log_freq: int = 500  # transitions between rows of metrics.csv
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to evaluate
    resume: str | None = None  # run folder to continue, with its arguments
    save_buffer: bool = False  # put the replay buffer in checkpoint.pt: --resume is then exact
    capture_video: bool = True  # write an mp4 of the last evaluation
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose the project

    # environment
    num_envs: int = 1  # N, parallel environments
    obs: Literal["state", "pixels"] = "state"  # true state and joints, or images and joints
    image_size: int = 84  # pixels a side
    cameras: tuple[str, ...] = ("wrist",)  # of the task and the demonstrations
    demos: str = ""  # demonstrations, an HDF5 file in robomimic's layout
    base: str = ""  # FILE.pt2, or module:callable; no file names it, so give it every time

    # algorithm
    limit: tuple[float, ...] = (0.1,)  # l, largest residual; one number, or one a dimension
    buffer_size: int = 200_000  # transitions kept, over all environments
    batch_size: int = 256  # B, transitions per update
    offline: float = 0.5  # share of them from demonstrations
    utd: float = 4.0  # critic updates per transition
    policy_frequency: int = 4  # critic updates per update of actor and its target
    gamma: float = 0.99  # g, discount per step
    n_step: int = 3  # rewards summed before the bootstrap
    heads: int = 10  # H, critics; the target takes the smaller of a random pair
    hidden: int = 1024  # width of the two layers of actor and critics
    encoder_dim: int = 128  # D, width of the image's tokens
    lr: float = 1e-4  # AdamW learning rate of encoder and critics
    actor_lr: float = 1e-6  # AdamW learning rate of the actor
    tau: float = 0.005  # share of critics and actor that moves into their targets
    noise: float = 0.05  # s, deviation of exploration and target smoothing, in units of actions
    learning_starts: int = 10_000  # transitions of warm-up: base and uniform noise
    warmup_noise: float = 0.2  # half width of that noise
    critic_warmup: int = 10_000  # critic-only updates after it

    # guard
    allowance: float = 1.0  # delta, success that may be lost on average while learning; 1: no guard
    credit: float = 10.0  # B, most that good episodes save up for bad ones, in episodes

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks, data and envs


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
    whole_rounds = args.eval_episodes % args.eval_envs == 0
    need(whole_rounds, "--eval-episodes must be a multiple of --eval-envs")
    sound = 0 < args.allowance <= 1 <= args.credit
    need(sound, "--allowance must be above 0 and at most 1, --credit at least 1")
    need(args.demos or args.evaluate, "give --demos FILE, demonstrations in robomimic's layout")
    room = args.buffer_size - args.num_envs
    enough = room >= args.learning_starts > (args.n_step + 1) * args.num_envs
    message = "--learning-starts must be below --buffer-size, and above --n-step rounds of steps"
    need(enough, message)
    available = torch.cuda.is_available() or args.device == "cpu"
    need(available, "there is no CUDA device here: use --device cpu")


def tuned(env_id: str, device: str, recipe: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for patterns, row in TUNED.items():
        if all(map(fnmatch, (env_id, device, recipe), patterns)):
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
    """Command line -> Args. Defaults, and so --help, are those of the choice, run or checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return replace(resumed_args(given.resume, argv), base=given.base)
    if given.checkpoint:
        saved = Args(**load(given.checkpoint)["args"])
        defaults = replace(saved, name="", resume=None, base="", device=given.device)
    else:
        chosen = {name: getattr(given, name) for name in ("env_id", "device", "recipe")}
        defaults = Args(**chosen, **tuned(**chosen))
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

    The contract is envs/__init__.py's; episodes end at success.
    """
    try:
        import envs
        from envs.demos import fit
    except ModuleNotFoundError as error:
        message = "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        raise ValueError(message) from error
    pixels, robosuite = args.obs == "pixels", args.env_id.startswith("robosuite/")
    options = dict(
        images=pixels,
        asymmetric=not pixels,
        render_size=args.image_size,
        cameras=args.cameras,
        samples_per_pixel=None if robosuite else 1,  # as demonstrations are recorded
        stagger=False,
        end_on_success=True,
    )
    if args.demos:
        options |= fit(args.demos, args.env_id, args.cameras if pixels else (), args.image_size)
    make = partial(envs.make, args.env_id, device=args.device, **options)
    eval_env = make(num_envs=args.eval_envs, seed=EVAL_SEED)
    if args.evaluate:
        return None, eval_env
    return make(num_envs=args.num_envs, seed=args.seed), eval_env


def observe(obs: dict, args: Args) -> dict:
    """What all policies see: "state" (N, S), with the true state in front or "rgb" beside it."""
    device, pixels = args.device, args.obs == "pixels"
    names = ("state",) if pixels else ("privileged", "state")
    parts = [torch.as_tensor(obs[name], device=device).float() for name in names if name in obs]
    seen = {"state": torch.cat(parts, -1)}
    if pixels:
        seen["rgb"] = torch.as_tensor(obs["rgb"], device=device)
    return seen


# --- Networks -------------------------------------------------------------------------------------
def mlp(*widths: int) -> nn.Sequential:
    """Linear layers, each with LayerNorm and ReLU behind it."""
    layers = []
    for inputs, outputs in pairwise(widths):
        layers += [nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.ReLU()]
    return nn.Sequential(*layers)


class Encoder(nn.Module):
    """state (B, S), rgb (B, H, W, C) -> (B, E): tokens of the images, flattened, then the state.

    Two convolutions a camera make the tokens, 81 of an image of 84 x 84, and one layer of attention
    follows. States are in units of their deviation over the demonstrations, cut off at 10.
    """

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        (self.state_dim,) = shapes["state"]
        self.image_dim = 0  # E is their sum
        self.register_buffer("mean", torch.zeros(self.state_dim))
        self.register_buffer("std", torch.ones(self.state_dim))
        if "rgb" not in shapes:
            return
        size, _, channels = shapes["rgb"]
        side = ((size - 8) // 4 - 2) // 2 + 1
        dim = args.encoder_dim
        self.convs = nn.ModuleList()
        for _ in range(channels // 3):
            convs = nn.Sequential(nn.Conv2d(3, dim, 8, 4), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2))
            self.convs.append(convs)
        self.place = nn.Parameter(0.02 * torch.randn(channels // 3 * side**2, dim))
        layer = dict(dropout=0.0, activation="gelu", batch_first=True, norm_first=True)
        self.layer = nn.TransformerEncoderLayer(dim, 4, 4 * dim, **layer)
        self.norm = nn.LayerNorm(dim)
        self.image_dim = self.place.numel()

    def fit(self, states: torch.Tensor):
        """Take mean and deviation from states (M, S)."""
        self.mean.copy_(states.mean(0))
        self.std.copy_(states.std(0).clamp_min(0.01))

    def forward(self, state, rgb=None):
        state = ((state - self.mean) / self.std).clamp(-10, 10)
        if not self.image_dim:
            return state
        maps = []
        images = rgb.permute(0, 3, 1, 2).float() / 255 - 0.5
        for convs, image in zip(self.convs, images.split(3, 1), strict=True):
            maps.append(convs(image).flatten(2))  # (B, D, places)
        tokens = torch.cat(maps, -1).transpose(1, 2) + self.place  # (B, places, D)
        return torch.cat([self.norm(self.layer(tokens)).flatten(1), state], -1)


class Trunk(nn.Module):
    """(B, E) -> (B, width): the images' part compressed, by a layer of the actor's or critics'."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.sizes = [encoder.image_dim, encoder.state_dim]
        self.width = encoder.state_dim
        self.layers = nn.Identity()
        if encoder.image_dim:  # differs (4)
            self.width += 128
            self.layers = mlp(encoder.image_dim, 128)

    def forward(self, x):
        image, state = x.split(self.sizes, -1)
        return torch.cat([self.layers(image), state], -1)


class Actor(nn.Module):
    """features (B, E), base action (B, A) -> residual (B, A) in [-l, l], zero at first."""

    def __init__(self, encoder: Encoder, shapes: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(encoder)
        (action_dim,) = shapes["actions"]
        limit = torch.tensor(args.limit).expand(action_dim)
        self.register_buffer("limit", limit.clone())
        self.policy = mlp(self.trunk.width + action_dim, args.hidden, args.hidden)
        self.policy.append(nn.Linear(args.hidden, action_dim))
        nn.init.zeros_(self.policy[-1].weight)
        nn.init.zeros_(self.policy[-1].bias)

    def forward(self, x, base):
        return torch.tanh(self.policy(torch.cat([self.trunk(x), base], -1))) * self.limit


class Critics(nn.Module):
    """features (B, E), executed action (B, A) -> values (H, B): perceptrons as stacked weights."""

    def __init__(self, encoder: Encoder, shapes: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(encoder)
        sizes = [self.trunk.width + shapes["actions"][0], args.hidden, args.hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in pairwise(sizes):
            heads = [nn.init.orthogonal_(torch.empty(outputs, inputs)).T for _ in range(args.heads)]
            self.weights.append(torch.stack(heads))
            self.biases.append(torch.zeros(args.heads, 1, outputs))
        shape = (args.heads, 1, args.hidden)  # of layer norm
        self.gains = nn.ParameterList(torch.ones(shape) for _ in range(2))
        self.shifts = nn.ParameterList(torch.zeros(shape) for _ in range(2))

    def forward(self, x, actions, heads=slice(None)):
        """`heads`: which of them, an index tensor; the default is all."""
        x = torch.cat([self.trunk(x), actions], -1)
        x = x.expand(len(self.weights[0][heads]), *x.shape)  # (H, B, inputs)
        for i in range(2):
            x = torch.baddbmm(self.biases[i][heads], x, self.weights[i][heads])
            x = F.layer_norm(x, x.shape[-1:]) * self.gains[i][heads] + self.shifts[i][heads]
            x = F.relu(x)
        return torch.baddbmm(self.biases[2][heads], x, self.weights[2][heads]).squeeze(-1)


class Agent(nn.Module):
    """All that learns: encoder, actor and critics, the targets of both, and the optimizers."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.encoder = Encoder(shapes, args)
        self.actor = Actor(self.encoder, shapes, args)
        self.critics = Critics(self.encoder, shapes, args)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critics_target = copy.deepcopy(self.critics).requires_grad_(False)
        self.to(args.device)
        values = [*self.encoder.parameters(), *self.critics.parameters()]
        self.critic_optimizer = torch.optim.AdamW(values, args.lr, fused=True)
        values = self.actor.parameters()
        self.actor_optimizer = torch.optim.AdamW(values, args.actor_lr, fused=True)


# --- Storage --------------------------------------------------------------------------------------
# same in: resfit, bc_chunk
def read_demo(group, cameras: tuple[str, ...]) -> dict | None:
    """One demonstration up to its first success, as `read_demos` gives it; None without one."""
    if "success" in group:
        success = group["success"][()] > 0
    else:
        success = group["rewards"][()] >= 1 - 1e-6
    if not success.any():
        return None
    length = int(success.argmax()) + 1
    obs = group["obs"]
    state, true_state = ["state"], ["privileged"]
    if "state" not in obs:  # robomimic's own names
        parts = ("_eef_pos", "_eef_quat", "_gripper_qpos")
        state = sorted(name for name in obs if name.endswith(parts))
        true_state = [*state, "object"]
    names = state if cameras else [*true_state, *state]
    columns = [obs[name][:length].reshape(length, -1) for name in names if name in obs]
    demo = {"state": np.concatenate(columns, 1).astype(np.float32)}
    if cameras:
        images = [obs[f"{camera}_image"][:length] for camera in cameras]
        demo["rgb"] = np.concatenate(images, -1)
    return demo | {"actions": group["actions"][:length].astype(np.float32)}


# same in: resfit, bc_chunk
def read_demos(path: str, cameras: tuple[str, ...]) -> tuple[list[dict], list[dict]]:
    """Successful demonstrations of a file in robomimic's layout: to train on, and to validate on.

    Each is a dict of its T steps up to the first success: "actions" float32 (T, A), "state" float32
    (T, S) and "rgb" uint8 (T, H, W, C) of the cameras; without cameras "state" begins with the
    simulator's true state. Raises ValueError.
    """
    import h5py

    train, valid = [], []
    try:
        with h5py.File(path) as file:
            names = sorted(file["data"], key=len)  # demo_2 before demo_10
            held_out = names[9::10]
            if "mask/valid" in file:
                held_out = [name.decode() for name in file["mask/valid"][()]]
            for name in names:
                demo = read_demo(file["data"][name], cameras)
                if demo is not None:
                    part = valid if name in held_out else train
                    part.append(demo)
    except (OSError, KeyError) as error:
        message = f"{path} holds no demonstrations in robomimic's layout: {error}"
        raise ValueError(message) from error
    need(train, f"{path} has no successful demonstration to train on: record more")
    return train, valid


class ChunkQueue:
    """A base from a program that plans K actions: executes `execute` of them, then asks it again.

    It is asked about all N observations when any is due, so that an answer does not depend on who
    else is due.
    """

    def __init__(self, program, execute: int | None):
        self.program, self.execute = program, execute
        self.chunks = self.left = torch.zeros(0)  # (N, K, A), and (N,) actions left of each

    def reset(self, mask: torch.Tensor):
        """Episodes begin where the mask (N,) is True; all do if N is another than before."""
        if len(mask) != len(self.left):
            self.left = torch.zeros_like(mask, dtype=torch.int64)
        self.left = torch.where(mask, 0, self.left)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """What `observe` gives -> the actions (N, A) that are due, in [-1, 1]."""
        due = self.left == 0
        if due.any():
            new = self.program(*obs.values())[:, : self.execute].clamp(-1, 1)
            if not due.all():
                new = torch.where(due[:, None, None], new, self.chunks)
            self.chunks = new
            self.left = torch.where(due, new.shape[1], self.left)
        rows = torch.arange(len(due), device=due.device)
        actions = self.chunks[rows, -self.left]
        self.left = self.left - 1
        return actions

    def state_dict(self) -> dict:
        return dict(chunks=self.chunks, left=self.left)

    def load_state_dict(self, state: dict):
        device = self.left.device
        self.chunks, self.left = state["chunks"].to(device), state["left"].to(device)


class Replay:
    """A ring of the last steps of N environments: a row (N, ...) of each entry is one step of all.

    Entries: the observation's, "base" (the base's action there), "actions", "rewards", "discounts"
    (0 in the last step of an episode, so that nothing beyond it counts).
    """

    def __init__(self, slots: int, num_envs: int, args: Args):
        self.slots, self.num_envs = slots, num_envs
        self.args = args
        self.data = {}
        self.head = 0  # steps since the run began

    def __len__(self) -> int:
        """Transitions in it."""
        return min(self.head, self.slots) * self.num_envs

    def add(self, step: dict):
        """Store one step of every environment, (N, ...) each."""
        for key, value in step.items():
            if key not in self.data:
                self.data[key] = value.new_zeros(self.slots, *value.shape)
            self.data[key][self.head % self.slots] = value
        self.head += 1

    def sample(self, batch_size: int) -> dict:
        """B of the steps that have n_step others after them: CHOICE times as many are drawn,
        uniformly, and those of exposed episodes come first.
        """
        oldest = max(0, self.head - self.slots)
        newest = self.head - self.args.n_step
        drawn = CHOICE * batch_size
        at = torch.randint(oldest, newest, (drawn,), device=self.args.device)
        env = torch.randint(self.num_envs, (drawn,), device=self.args.device)
        if "exposed" in self.data:  # not in demonstrations
            exposed = self.data["exposed"][at % self.slots, env]
            order = exposed.int().argsort(descending=True, stable=True)
            at, env = at[order], env[order]
        return self.transitions(at[:batch_size], env[:batch_size])

    def transitions(self, at, env) -> dict:
        """Those that begin with steps `at` (B,) of environments `env` (B,).

        -> entries of the observation, there and, as next_..., n steps later; actions (B, A);
        rewards (B,) = sum of gamma^i x discounts before x r_i; discounts (B,) = gamma^n x their
        product.
        """
        rewards, discounts = 0.0, 1.0
        for i in range(self.args.n_step):
            row = (at + i) % self.slots
            rewards = rewards + discounts * self.data["rewards"][row, env]
            discounts = discounts * self.args.gamma * self.data["discounts"][row, env]
        row = at % self.slots
        next_row = (at + self.args.n_step) % self.slots
        actions = self.data["actions"][row, env]
        batch = dict(rewards=rewards, discounts=discounts, actions=actions)
        for key in self.data.keys() & {"state", "rgb", "base"}:
            batch[key] = self.data[key][row, env]
            batch["next_" + key] = self.data[key][next_row, env]
        return batch

    def state_dict(self) -> dict:
        return dict(head=self.head, data=self.data)

    def load_state_dict(self, state: dict):
        self.head = state["head"]
        for key, rows in state["data"].items():
            self.data[key] = rows.to(self.args.device)


def store_demos(args: Args, base, shapes: dict) -> Replay:
    """Demonstrations as a buffer of one environment, with the base's action at each step.

    All step through the base side by side, and it begins anew with each.
    """
    demos, _ = read_demos(args.demos, args.cameras if args.obs == "pixels" else ())
    has = {key: list(rows.shape[1:]) for key, rows in demos[0].items()}
    need(has == shapes, f"{args.demos} has {has}, the environment {shapes}")
    lengths = torch.tensor([len(demo["actions"]) for demo in demos], device=args.device)
    data = {}
    for key in shapes:
        steps = [demo.pop(key) for demo in demos]  # a copy of one entry at a time
        steps.append(steps[0][: args.n_step])  # windows may look beyond the end: nothing counts
        data[key] = torch.from_numpy(np.concatenate(steps)).to(args.device)[:, None]
    ends = lengths.cumsum(0) - 1
    begins = ends - lengths + 1
    data["base"] = torch.zeros_like(data["actions"])
    base.reset(lengths > 0)
    for t in range(int(lengths.max())):
        at = torch.minimum(begins + t, ends)  # whoever is over waits at the end
        planned = base.act({key: data[key][at, 0] for key in ("state", "rgb") if key in data})
        there = t < lengths
        data["base"][at[there], 0] = planned[there]
    data["rewards"] = torch.zeros_like(data["base"][..., 0])
    data["rewards"][ends] = 1.0
    data["discounts"] = 1.0 - data["rewards"]
    replay = Replay(len(data["base"]), 1, args)
    replay.data = data
    replay.head = replay.slots
    return replay


# --- Update functions -----------------------------------------------------------------------------
def propose(base, residual, noise, limit):
    """Eq. 2 (B, A): base and residual, in [-1, 1]; the gradient passes that bound."""
    residual = torch.clamp(residual + noise, -limit, limit)  # differs (2)
    actions = base + residual
    return actions + (actions.clamp(-1, 1) - actions).detach()


@torch.no_grad()
def choose(agent: Agent, obs: dict, noise=0.0) -> torch.Tensor:
    """What `observe` gives, with "base" (N, A) -> eq. 2 (N, A)."""
    x = agent.encoder(obs["state"], obs.get("rgb"))
    return propose(obs["base"], agent.actor(x, obs["base"]), noise, agent.actor.limit)


def random_shift(rgb: torch.Tensor, offsets: torch.Tensor) -> torch.Tensor:
    """Images (B, H, H, C), moved by `offsets` (B, 2) - PAD pixels, edges repeated."""
    size = rgb.shape[1]
    pixels = torch.arange(size, device=rgb.device) + offsets[:, :, None] - PAD  # (B, 2, H)
    y, x = pixels.clamp(0, size - 1).unbind(1)
    image = torch.arange(len(rgb), device=rgb.device)[:, None, None]
    return rgb[image, y[:, :, None], x[:, None, :]]


def critic_loss(agent: Agent, batch: dict, args: Args):
    """Eqs. 3 and 4. -> loss, features (B, E), metrics"""
    with torch.no_grad():
        after = agent.encoder(batch["next_state"], batch.get("next_rgb"))
        base = batch["next_base"]
        noise = (args.noise * batch["noise"]).clamp(-NOISE_CLIP, NOISE_CLIP)
        residual = agent.actor_target(after, base)
        next_actions = propose(base, residual, noise, agent.actor.limit)
        next_q = agent.critics_target(after, next_actions, batch["heads"]).amin(0)
        targets = batch["rewards"] + batch["discounts"] * next_q
    x = agent.encoder(batch["state"], batch.get("rgb"))
    q = agent.critics(x, batch["actions"])
    loss = (q - targets).square().mean()  # differs (3)
    metrics = {
        "loss/qf": loss.detach(),
        "train/q": q.detach().mean(),
        "train/target": targets.mean(),
    }
    return loss, x.detach(), metrics


def actor_loss(agent: Agent, batch: dict, x):
    """Eq. 5, on features (B, E) without their gradient. -> loss, metrics"""
    base = batch["base"]
    limit = agent.actor.limit
    residual = agent.actor(x, base)
    q = agent.critics(x, propose(base, residual, 0.0, limit)).mean(0)
    loss = -q.mean()
    share = residual.detach() / limit.clamp(min=1e-6)
    return loss, {"loss/actor": loss.detach(), "train/residual": share.abs().mean()}


def descend(loss, optimizer):
    """One step, the gradient's norm at most GRAD_CLIP."""
    parameters = optimizer.param_groups[0]["params"]
    optimizer.zero_grad()
    loss.backward(inputs=parameters)
    nn.utils.clip_grad_norm_(parameters, GRAD_CLIP)
    optimizer.step()


@torch.no_grad()
def target_update(target: nn.Module, net: nn.Module, tau: float):
    """Polyak: target <- (1 - tau) target + tau net."""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), tau)


def update(agent: Agent, batch: dict, with_actor: bool, args: Args) -> dict:
    """One step of encoder and critics, `with_actor` one of the actor too, then their targets."""
    loss, x, metrics = critic_loss(agent, batch, args)
    descend(loss, agent.critic_optimizer)
    if with_actor:
        loss, more = actor_loss(agent, batch, x)
        descend(loss, agent.actor_optimizer)
        target_update(agent.actor_target, agent.actor, args.tau)
        metrics |= more
    target_update(agent.critics_target, agent.critics, args.tau)
    return metrics


def draw_batch(replay: Replay, demos: Replay, args: Args) -> dict:
    """Transitions of an update, demonstrations first, their images shifted at random.

    With them "noise" (B, A) and "heads", the pair (2,) of the target.
    """
    offline = round(args.offline * args.batch_size)
    batch = replay.sample(args.batch_size - offline)
    for key, value in demos.sample(offline).items():
        batch[key] = torch.cat([value, batch[key]])
    batch["noise"] = torch.randn_like(batch["actions"])
    batch["heads"] = torch.randperm(args.heads, device=args.device)[:2]
    if args.obs == "pixels":
        for key in ("rgb", "next_rgb"):
            shifts = torch.randint(0, 2 * PAD + 1, (args.batch_size, 2), device=args.device)
            batch[key] = random_shift(batch[key], shifts)
    return batch


def catch_up(agent: Agent, replay: Replay, demos: Replay, progress: dict, args: Args) -> dict:
    """The updates that are owed for one more step of every environment. -> the latest metrics"""
    metrics = {}
    if progress["owed"] + progress["updates"] == 0:
        for _ in tqdm(range(args.critic_warmup), "critic warm-up", leave=False):
            metrics |= update(agent, draw_batch(replay, demos, args), False, args)
    progress["owed"] += args.num_envs * args.utd
    while progress["owed"] >= 1:
        progress["owed"] -= 1
        progress["updates"] += 1
        with_actor = progress["updates"] % args.policy_frequency == 0
        batch = draw_batch(replay, demos, args)
        metrics |= update(agent, batch, with_actor, args)
    return metrics


# --- evaluate -------------------------------------------------------------------------------------
@torch.no_grad()
@torch.random.fork_rng()
def evaluate(policy, env, episodes: int, video: Path | None = None) -> dict:
    """Whole episodes without noise from fixed seeds -> metrics. Training's random state is kept."""
    torch.manual_seed(EVAL_SEED)  # of bases that draw
    frames, ended = [], []
    shown = tuple(range(min(4, env.num_envs)))
    for seed in range(EVAL_SEED, EVAL_SEED + episodes // env.num_envs):
        obs = env.reset(seed=seed)
        running = torch.ones(env.num_envs, dtype=torch.bool, device=policy.args.device)
        policy.reset(running)
        while running.any():
            if video and seed == EVAL_SEED:
                frames.append(np.hstack(env.render(shown, 160)))
            obs, _, terminations, truncations, info = env.step(policy.act(obs))
            ends = terminations | truncations
            policy.reset(ends)
            success, length = info["episode"]["success_at_end"], info["episode"]["length"]
            ended.append(torch.stack([success.float(), length])[:, running & ends])
            running = running & ~ends  # each environment counts once
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=round(env.control_hz), macro_block_size=1)
    success, length = torch.cat(ended, 1).mean(1).tolist()
    return {"eval/success_rate": success, "eval/length": length}


def upper_bound(rate: float, trials: int) -> float:
    """Of the chance of success (Clopper and Pearson): where so few successes have chance ALPHA."""
    few = torch.arange(round(rate * trials) + 1.0, dtype=torch.float64)
    low, high = torch.tensor([rate, 1.0], dtype=torch.float64)
    for _ in range(40):
        p = (low + high) / 2
        likely = torch.distributions.Binomial(trials, p).log_prob(few).exp().sum() > ALPHA
        if likely:
            low = p
        else:
            high = p
    return high.item()


def judge(policy, env, progress: dict, args: Args, video: Path | None) -> dict:
    """Measure the base first, later what would replace it. -> metrics of what (7) deploys"""
    policy.deploys = progress["evaluated"] >= 0
    episodes = args.eval_episodes
    if not policy.deploys:
        episodes *= MEASURE
    results = evaluate(policy, env, episodes, video)
    rate = results["eval/success_rate"]
    if not policy.deploys:
        progress |= {"bar": upper_bound(rate, episodes), "base": results}
    lowest = 1 - upper_bound(1 - rate, episodes)
    progress["deploys"] = policy.deploys and lowest >= progress["bar"] - args.allowance
    if not progress["deploys"]:
        results = progress["base"]
    return results | {"eval/residual": rate, "eval/deploys": int(progress["deploys"])}


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
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == ALGO
    need(ours, f"{path} is not {ALGO}'s")
    unknown = checkpoint.get("args", {}).keys() - Args.__dataclass_fields__.keys()
    whole = not unknown and {"args", "agent"} <= checkpoint.keys()
    need(whole, f"{path} is another version's, or was edited: {', '.join(unknown)}")
    finite = all(x.isfinite().all() for x in checkpoint["agent"].values() if torch.is_tensor(x))
    need(finite, f"{path} has weights that are not finite")
    return checkpoint


def save_run(run: Path, content: dict, parts: dict):
    """checkpoint.pt: all that it takes to continue."""
    states = {name: part.state_dict() for name, part in parts.items()}
    save(run / "checkpoint.pt", content | states | dict(csv_sizes=csv_sizes(run)))


def load_run(run: Path, checkpoint: dict, parts: dict):
    """Put every part and the CSV files back to the checkpoint."""
    ours = checkpoint.keys() >= parts.keys()
    need(ours, f"{run} was not made by this script alone: resume it with the one that made it")
    for name, part in parts.items():  # copies: what a part keeps would keep the file in memory
        part.load_state_dict(copy.deepcopy(checkpoint[name]))
    cut_back(run, checkpoint["csv_sizes"])
    if "replay" not in parts:
        print("no replay buffer was saved (--save-buffer): it starts empty")


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


def identity(base: str) -> str:
    """SHA-256 of a program, the name of a callable: what a checkpoint keeps of its base."""
    if not base.endswith(".pt2"):
        return base
    return hashlib.sha256(Path(base).read_bytes()).hexdigest()


def open_base(args: Args, env=None):
    """The base that --base names: an object with reset(mask) and act(obs).

    It is code, like a script: never take the name from a file. A program's base.json may say
    `env_id` and `execute`. Raises ValueError if the base is another task's.
    """
    if args.base.endswith(".pt2"):
        files = {"base.json": ""}
        program = torch.export.load(args.base, extra_files=files)
        about = json.loads(files["base.json"] or "{}")
        task = about.get("env_id", args.env_id)
        need(task == args.env_id, f"the base is for {task}, not {args.env_id}")
        program = move_to_device_pass(program, args.device)
        return ChunkQueue(program.module(check_guards=False), about.get("execute"))
    module, _, name = args.base.partition(":")
    need(name, "name the base: --base FILE.pt2, or --base module:callable")
    return getattr(importlib.import_module(module), name)(env)


# --- Policy ---------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out: the base, with the residual where (7) lets it be deployed.

    From one checkpoint (file or content) and from the base, which no checkpoint has: name the run's
    FILE.pt2 or module:callable. Raises ValueError for another one.
    """

    def __init__(self, source: str | Path | dict, device="cpu", base: str = "", env=None):
        checkpoint = source if isinstance(source, dict) else load(source)
        same = checkpoint["base"] == identity(base)
        need(same, f"give --base again, the one of the run: {checkpoint['args']['base']}")
        self.args = replace(Args(**checkpoint["args"]), device=str(device), base=base)
        self.spec = checkpoint["spec"]
        self.deploys = checkpoint["progress"]["deploys"]  # the residual, or the base alone
        self.base = open_base(self.args, env)
        self.agent = Agent(checkpoint["shapes"], self.args)
        self.agent.load_state_dict(checkpoint["agent"])

    def reset(self, begins: torch.Tensor):
        """Call it first. Episodes begin where the mask (N,) is True, all if N is a new one."""
        self.base.reset(begins.to(self.args.device))

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs of the environment, (N, ...) -> actions (N, A)."""
        seen = observe(obs, self.args)
        seen["base"] = self.base.act(seen)
        return choose(self.agent, seen) if self.deploys else seen["base"]


# --- train ----------------------------------------------------------------------------------------
class Collector:
    """Steps the training environments for the buffer, and guards them by (6)."""

    def __init__(self, args: Args, env, base, agent: Agent, progress: dict):
        self.args, self.env = args, env
        self.base, self.agent = base, agent
        self.progress = progress  # with p0+, "bar", and c, "credit"
        self.exposed = torch.zeros(env.num_envs, dtype=torch.bool, device=args.device)
        self.begin(env.reset(seed=args.seed), torch.ones_like(self.exposed))

    def begin(self, obs: dict, mask: torch.Tensor):
        """Act on `obs` next; episodes begin where the mask (N,) is True."""
        self.base.reset(mask)
        seen = observe(obs, self.args)
        self.obs = seen | {"base": self.base.act(seen)}
        for i in mask.nonzero():
            self.exposed[i] = self.expose()

    def expose(self) -> bool:
        """Whether an episode that begins may be played with noise and residual."""
        credit = min(self.progress["credit"] + self.args.allowance, self.args.credit)
        exposed = credit >= self.progress["bar"]
        self.progress["credit"] = credit - exposed * self.progress["bar"]
        return exposed

    @torch.no_grad()
    def step(self) -> dict:
        """One step of every environment -> what the buffer stores of it."""
        args, obs, base = self.args, self.obs, self.obs["base"]
        if self.progress["global_step"] < args.learning_starts:  # where the residual is still 0
            half_width = self.agent.actor.limit.clamp(max=args.warmup_noise)
            noise = (2 * torch.rand_like(base) - 1) * half_width
        else:
            noise = args.noise * torch.randn_like(base)
        exposed = self.exposed.clone()
        actions = torch.where(exposed[:, None], choose(self.agent, obs, noise), base)
        next_obs, _, terminations, truncations, info = self.env.step(actions)
        dones = terminations | truncations
        rewards = info["success"].float()
        self.progress["credit"] += rewards[dones & exposed].sum().item()
        self.begin(next_obs, dones)
        return obs | dict(
            actions=actions,
            rewards=rewards,
            discounts=(~dones).float(),  # a time-out is an end, as published
            exposed=exposed,
        )

    def state_dict(self) -> dict:
        return dict(obs=self.obs, exposed=self.exposed)

    def load_state_dict(self, state: dict):
        device = self.exposed.device
        self.obs = {key: value.to(device) for key, value in state["obs"].items()}
        self.exposed = state["exposed"].to(device)


def count(progress: dict, taken: dict):
    """Take a step of every environment into the counters."""
    ended = taken["discounts"] == 0
    both = torch.stack([taken["rewards"], taken["exposed"].float()], 1)[ended]
    outcomes = [*progress["outcomes"], *both.tolist()][-ROLLING:]
    progress["global_step"] += len(ended)
    progress["outcomes"] = outcomes
    if outcomes:
        progress["rolling"], progress["exposed"] = np.mean(outcomes, 0).tolist()
    if len(outcomes) == ROLLING:
        progress["lowest"] = min(progress["lowest"], progress["rolling"])


def fresh_progress() -> dict:
    """Counters of a run, and its guard: c, p0+ (at first what is safe) and what is deployed."""
    return dict(
        global_step=0,
        wall_time=0.0,
        train_time=0.0,
        updates=0,
        owed=0.0,  # updates
        outcomes=[],  # of the last episodes: success, and whether they were exposed
        rolling=math.nan,  # their means
        exposed=math.nan,
        lowest=1.0,
        evaluated=-1,
        best=-1.0,
        credit=0.0,
        bar=1.0,
        deploys=True,
    )


def clock(progress: dict) -> dict:
    """The first columns of each row."""
    return {name: progress[name] for name in ("global_step", "wall_time", "train_time")}


def training_row(metrics: dict, progress: dict, run: Path) -> dict:
    """A row of metrics.csv. Raises FloatingPointError that names what is not finite."""
    row = clock(progress)
    for name, value in metrics.items():
        row[name] = float(value)
        if not math.isfinite(value):
            place = f"step {row['global_step']}; last good checkpoint: {run}/checkpoint.pt"
            raise FloatingPointError(f"{name} is not finite at {place}")
    row["train/rolling_success"] = progress["rolling"]
    row["train/exposed"] = progress["exposed"]
    row["time/sps"] = row["global_step"] / max(row["train_time"], 1e-9)
    return row


def evaluate_checkpoint(args: Args) -> dict:
    """What --evaluate does. -> metrics"""
    _, env = make_envs(args)
    policy = Policy(args.checkpoint, args.device, args.base, env)
    video = Path(args.checkpoint).with_suffix(".mp4") if args.capture_video else None
    results = evaluate(policy, env, args.eval_episodes, video)
    print(json.dumps(results))
    env.close()
    return results


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at NaN.
    """
    check(args)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if args.evaluate:
        return evaluate_checkpoint(args)
    env, eval_env = make_envs(args)
    run = open_run(args)
    shapes = {"actions": [env.action_dim]}  # and "state" [S], from pixels "rgb" [H, W, C]
    for key, value in observe(eval_env.reset(), args).items():
        shapes[key] = list(value.shape[1:])
    base = open_base(args, env)
    agent = Agent(shapes, args)
    replay = Replay(args.buffer_size // args.num_envs, args.num_envs, args)
    demos = store_demos(args, base, shapes)
    agent.encoder.fit(demos.data["state"][:, 0])

    progress = fresh_progress()
    collector = Collector(args, env, base, agent, progress)
    content = dict(algo=ALGO, args=asdict(args), shapes=shapes, spec=eval_env.spec)
    content |= dict(base=identity(args.base), progress=progress, agent=agent.state_dict())
    parts = dict(
        agent=agent,
        critic_optimizer=agent.critic_optimizer,
        actor_optimizer=agent.actor_optimizer,
        random=GlobalRandom(),
        env=env,
        collector=collector,
    )
    if args.save_buffer:
        parts["replay"] = replay
    if hasattr(base, "state_dict"):
        parts["queue"] = base
    saved = load(run / "checkpoint.pt") if args.resume else None
    policy = Policy(saved or content, args.device, args.base, eval_env)
    policy.agent = agent
    if saved:
        load_run(run, saved, parts)
        progress.update(saved["progress"])
        saved = None  # its mapped tensors are released
    else:
        (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
        save_run(run, content, parts)
    metrics, results = {}, {}
    born = START - progress["wall_time"]
    bar = tqdm(total=args.total_timesteps, initial=progress["global_step"], unit="step")
    interrupt = Interrupt()

    while True:
        # log
        step = progress["global_step"]
        last = step >= args.total_timesteps
        stop = last or interrupt.asked
        progress["wall_time"] = time.time() - born
        due = last or step % args.eval_freq < args.num_envs
        eval_due = due and step > progress["evaluated"]
        if due or stop or step % args.log_freq < args.num_envs:
            row = training_row(metrics, progress, run)
            row["train/nan_resets"] = int(env.nan_resets)
            if "loss/actor" in row:  # the first row names the columns
                write_row(run / "metrics.csv", row, args.track)

        # evaluate; at first the base alone
        if eval_due:
            video = run / f"videos/step_{step:09d}.mp4" if last and args.capture_video else None
            results = judge(policy, eval_env, progress, args, video)
            success, rolling = results["eval/success_rate"], progress["rolling"]
            outcome = {"train/rolling_success": rolling, "train/lowest": progress["lowest"]}
            write_row(run / "eval.csv", clock(progress) | results | outcome, args.track)
            bar.write(f"{step} steps: success {success:.3f}, in training {rolling:.3f}")
            progress["evaluated"] = step
            if success >= progress["best"]:
                progress["best"] = success
                save(run / "best.pt", content)

        # save
        if eval_due or stop:
            save_run(run, content, parts)
        if stop:
            break

        # act, step and store
        begin = time.perf_counter()
        taken = collector.step()
        count(progress, taken)
        replay.add(taken)
        bar.update(args.num_envs)

        # update
        if step >= args.learning_starts and len(replay) >= args.learning_starts:
            metrics |= catch_up(agent, replay, demos, progress, args)
        progress["train_time"] += time.perf_counter() - begin
    interrupt.restore()
    for part in (bar, env, eval_env):
        part.close()
    if not last:
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
