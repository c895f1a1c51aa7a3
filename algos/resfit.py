"""ResFiT: a frozen base policy, and a small off-policy residual that makes it reliable.

Paper: Ankile, Jiang, Duan, Shi, Abbeel and Nagabandi, "Residual Off-Policy RL for Finetuning
Behavior Cloning Policies", arXiv 2509.19301. Written from the paper's equations alone: the authors'
code has a non-commercial licence, and nobody who wrote this file has opened it. RLPD: Ball et al.,
arXiv 2302.02948. IBRL: Hu et al., arXiv 2311.02198.

    base     b_t = the next action of the base, which plans K actions and executes some of them (1)
    action   a_t = clip(b_t + clip(pi(o_t, b_t) + e, -l, l), -1, 1), stored as executed         (2)
    target   y = sum of g^i r_(t+i), i < n, + g^n (1 - d) min of a random pair of Q'_k(o', a')  (3)
             a' = (2) with pi', b' = b_(t+n) and e = clip(N(0, s^2), -c, c)
    critics  mean over the heads of E[(Q_k(o_t, a_t) - y)^2]; half of the batch demonstrations  (4)
    actor    -E[mean_k Q_k(o_t, clip(b_t + pi(o_t, b_t)))] + w E[(pi / l)^2]                    (5)
    gate     (2) is executed where mean_k D_k > kappa std_k D_k, elsewhere the base's action,   (6)
             with D_k = Q'_k(o, a) - Q'_k(o, b)

Differences from the paper:
 1. Never below the base: --recipe ours turns on guards, each a flag (GUARDS); --recipe published
    has none of them.
 2. The bound of (2) is hard: it holds for residual plus noise, per dimension, in warm-up too.
 3. Heads are trained by their own errors. (The paper leaves open whether they are averaged first.)
 4. The encoder's tokens are compressed by one linear layer each for actor and critics.
 5. Warm-up steps count. Any number of environments; n-step sums are made at sampling.
 6. Observations may be vectors: the simulator's true state beside the joints (--obs state).

The base is a black box: a program of torch.export (--base FILE.pt2), forward(state (N, S)) or
forward(state, rgb (N, H, W, C)) -> actions (N, K, A), which travels inside the checkpoints; or
--base module:callable, called with the environment, which returns an object with reset(mask (N,))
and act(obs) -> actions (N, A), and which has to be named again to resume or evaluate.

Commands, from the repository's root:
    record      python -m envs.demos --env-id SO101ReachCube-v1 --episodes 100 --noise 0.3 \
                    --out reach.hdf5
    base        python algos/bc_chunk.py --env-id SO101ReachCube-v1 --demos reach.hdf5 --name base
    train       python algos/resfit.py --env-id SO101ReachCube-v1 --demos reach.hdf5 \
                    --base runs/base/base.pt2
    evaluate    python algos/resfit.py --evaluate --checkpoint runs/NAME/best.pt
    resume      python algos/resfit.py --resume runs/NAME   (exactly, if run with --save-buffer)
    smallest    the first three, the last two of them with --device cpu

Expected result, SO101ReachCube-v1 from the true state: a base of 50 % success gets to 98 to 100 %
in 44,800 steps (6 to 8 minutes on two CPU cores), three seeds, training never below 45 % (see its
page). Not yet measured on a GPU.

Shapes: N environments, B batch, K actions of a chunk, H heads, A action dimensions, S state
dimensions, C channels (3 a camera), D width of a token, E features.
"""

# --- Imports --------------------------------------------------------------------------------------
import os

# Threads spin for a moment before they wait: much longer, and a run beside other work collapses.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import copy
import csv
import importlib
import io
import json
import math
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from pathlib import Path
from typing import Annotated, Literal

import imageio.v2 as imageio
import numpy as np
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
ROLLING = 100  # episodes over which the success of training is averaged
GRAD_CLIP = 1.0  # largest norm of a gradient
KAPPA = 1.0  # of equation 6

# --- Args -----------------------------------------------------------------------------------------
# What --recipe ours turns on; the page has what was measured.
GUARDS = dict(
    warmup_clean=0.5, ramp_steps=19_200, gate="agree", caution=1.5, trust=0.02, offline=0.25
)
# (env ids, device, mode, recipe) -> defaults other than the published ones below; later rows win
TUNED = {
    ("*", "*", "resfit", "ours"): GUARDS,
    # sizes and learning rates for a CPU, ours
    ("*", "cpu*", "*", "*"): dict(
        num_envs=16,
        total_timesteps=44_800,
        eval_freq=3_200,
        log_freq=800,
        hidden=128,
        batch_size=128,
        encoder_dim=32,
        utd=0.3,
        lr=5e-4,
        tau=0.01,
        learning_starts=3_200,
        critic_warmup=1_500,
    ),
    ("*", "*", "rlpd", "*"): dict(
        actor_lr=1e-4, tau=0.01, noise=0.1, warmup_noise=1.0, critic_warmup=0
    ),
    ("*", "*", "ibrl", "*"): dict(
        actor_lr=1e-4, tau=0.01, noise=0.1, gate="min", warmup_noise=0.0, critic_warmup=0
    ),
    ("*", "cpu*", "resfit", "*"): dict(actor_lr=1e-4, limit=(0.3,), noise=0.04),
    ("*", "cpu*", "resfit", "ours"): dict(policy_frequency=2, anneal=0.2),
    ("SO101Reach*", "cpu*", "*", "*"): dict(gamma=0.95),
}


@dataclass
class Args:
    # run
    env_id: str = "SO101ReachCube-v1"  # task: SO101... or robosuite/...
    mode: Literal["resfit", "rlpd", "ibrl"] = "resfit"  # residual, no base, or actor beside it
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
    base: str = ""  # FILE.pt2, or module:callable

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
    pad: int = 4  # largest random shift of images, pixels each way
    lr: float = 1e-4  # AdamW learning rate of encoder and critics
    actor_lr: float = 1e-6  # AdamW learning rate of the actor
    anneal: float = 0.0  # last share of the run, in which both fall to 0
    tau: float = 0.005  # share of critics and actor that moves into their targets
    noise: float = 0.05  # s, deviation of exploration and target smoothing, in units of actions
    noise_clip: float = 0.3  # c, of the smoothing
    learning_starts: int = 10_000  # transitions of warm-up: base and uniform noise
    critic_warmup: int = 10_000  # critic-only updates after it

    # guards against the collapse at the start
    warmup_noise: float = 0.2  # half width of the uniform noise of warm-up
    warmup_clean: float = 0.0  # (a) share of warm-up episodes without noise
    ramp_steps: int = 0  # (b) transitions over which the residual grows from 0, in losses too
    gate: Literal["none", "min", "agree"] = "none"  # (c) equation 6; "min" is IBRL's
    caution: float = 0.0  # (b, c) added to kappa where the ramp begins, nothing where it ends
    trust: float = 0.0  # (d) w, weight of the squared residual in the actor's loss

    # compute
    async_: Annotated[bool, tyro.conf.arg(name="async")] = False  # act in a process of its own
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks, data and envs


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def need(holds, message: str):
    """Raises ValueError with the message unless something holds."""
    if not holds:
        raise ValueError(message)


def check(args: Args):
    """Raises ValueError, one line, for a choice that would fail late, silently or unreadably."""
    need(args.checkpoint or not args.evaluate, "--evaluate needs --checkpoint FILE")
    whole_rounds = args.eval_envs > 0 and args.eval_episodes % args.eval_envs == 0
    need(whole_rounds, "--eval-episodes must be a multiple of --eval-envs")
    no_demos = args.evaluate or args.offline == 0
    need(args.demos or no_demos, "give --demos FILE, demonstrations, or --offline 0")
    need(args.heads >= 2, "--heads must be at least 2: targets take the smaller of a pair")
    fewest = (args.n_step + 2) * args.num_envs
    enough = args.buffer_size - args.num_envs >= args.learning_starts >= fewest
    need(enough, f"--learning-starts must be from {fewest} to --buffer-size minus --num-envs")
    available = torch.cuda.is_available() or args.device == "cpu"
    need(available, "there is no CUDA device here: use --device cpu")


def tuned(given: Args) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    choice = (given.env_id, given.device, given.mode, given.recipe)
    values = {}
    for patterns, row in TUNED.items():
        if all(map(fnmatch, choice, patterns)):
            values |= row
    return values


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. Defaults, and so --help, are those of the choice, run or checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        others = [word for word in argv if word not in ("--base", given.base)]
        return replace(resumed_args(given.resume, others), base=given.base)
    if given.checkpoint:
        saved = Args(**load(given.checkpoint)["args"])
        defaults = replace(saved, name="", resume=None, device=given.device)
    else:
        choice = dict(env_id=given.env_id, device=given.device)
        choice |= dict(mode=given.mode, recipe=given.recipe)
        defaults = Args(**choice, **tuned(given))
    return tyro.cli(Args, args=argv, default=defaults, description=__doc__.split("\n\n")[0])


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
def resumed_args(run: str, argv: list[str]) -> Args:
    """The arguments of a run. Only its length, tracking and a device of the same kind may change.

    Raises ValueError that names what differs, FileNotFoundError without a checkpoint.
    """
    saved = replace(Args(**load(Path(run) / "checkpoint.pt")["args"]), resume=run)
    args = tyro.cli(Args, args=argv, default=saved, description=__doc__.split("\n\n")[0])
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
    make = envs.make
    eval_env = make(args.env_id, args.eval_envs, args.device, seed=EVAL_SEED, **options)
    if args.evaluate:
        return None, eval_env
    return make(args.env_id, args.num_envs, args.device, seed=args.seed, **options), eval_env


def observe(obs: dict, pixels: bool) -> dict:
    """What all policies see: "state" (N, S), with the true state in front or "rgb" beside it."""
    if pixels:
        return {"state": obs["state"].float(), "rgb": obs["rgb"]}
    parts = [obs[key].float() for key in ("privileged", "state") if key in obs]
    return {"state": torch.cat(parts, -1)}


# --- Networks -------------------------------------------------------------------------------------
class Encoder(nn.Module):
    """obs -> (B, E): tokens of the images after one layer of attention, flattened; then the state.

    Two convolutions a camera make the tokens, 81 of an image of 84 x 84. States are in units of
    their deviation over the demonstrations, cut off at 10.
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
        side, dim = ((size - 8) // 4 - 2) // 2 + 1, args.encoder_dim
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

    def forward(self, obs):
        state = ((obs["state"] - self.mean) / self.std).clamp(-10, 10)
        if not self.image_dim:
            return state
        maps = []
        images = obs["rgb"].permute(0, 3, 1, 2).float() / 255 - 0.5
        for convs, image in zip(self.convs, images.split(3, 1), strict=True):
            maps.append(convs(image).flatten(2))  # (B, D, places)
        tokens = torch.cat(maps, -1).transpose(1, 2) + self.place  # (B, places, D)
        return torch.cat([self.norm(self.layer(tokens)).flatten(1), state], -1)


class Trunk(nn.Module):
    """(B, E) -> (B, width): the images' part compressed, by a layer of the actor's or critics'."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.image_dim, self.width = encoder.image_dim, encoder.state_dim
        if self.image_dim:  # differs (4)
            self.width += 128
            self.layers = nn.Sequential(
                nn.Linear(self.image_dim, 128), nn.LayerNorm(128), nn.ReLU()
            )

    def forward(self, x):
        if not self.image_dim:
            return x
        return torch.cat([self.layers(x[:, : self.image_dim]), x[:, self.image_dim :]], -1)


class Actor(nn.Module):
    """features (B, E), base action (B, A) -> residual in [-l, l], zero at first.

    Without a base to add to, (B, A) in [-1, 1] is the action itself.
    """

    def __init__(self, encoder: Encoder, shapes: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(encoder)
        hidden, action_dim = args.hidden, shapes["action"]
        limit = torch.tensor(args.limit if args.mode == "resfit" else (1.0,))
        message = f"--limit takes one number, or one for each of {action_dim} actions"
        need(len(limit) in (1, action_dim), message)
        self.register_buffer("limit", limit.expand(action_dim).clone())
        self.policy = nn.Sequential(
            nn.Linear(self.trunk.width + action_dim, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, hidden),
            nn.LayerNorm(hidden),
            nn.ReLU(),
            nn.Linear(hidden, action_dim),
        )
        if args.mode == "resfit":
            nn.init.zeros_(self.policy[-1].weight)
            nn.init.zeros_(self.policy[-1].bias)

    def forward(self, x, base):
        return torch.tanh(self.policy(torch.cat([self.trunk(x), base], -1))) * self.limit


class Critics(nn.Module):
    """features (B, E), executed action (B, A) -> values (H, B): perceptrons as stacked weights."""

    def __init__(self, encoder: Encoder, shapes: dict, args: Args):
        super().__init__()
        self.trunk = Trunk(encoder)
        sizes = [self.trunk.width + shapes["action"], args.hidden, args.hidden, 1]
        self.weights, self.biases = nn.ParameterList(), nn.ParameterList()
        for inputs, outputs in zip(sizes, sizes[1:], strict=False):
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
    """All that learns: encoder, actor and critics, and the targets of both."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.encoder = Encoder(shapes, args)
        self.actor = Actor(self.encoder, shapes, args)
        self.critics = Critics(self.encoder, shapes, args)
        self.actor_target = copy.deepcopy(self.actor).requires_grad_(False)
        self.critics_target = copy.deepcopy(self.critics).requires_grad_(False)


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
        self.chunks, self.left = None, torch.zeros(0)  # (N, K, A), and (N,) actions left of each

    def reset(self, mask: torch.Tensor):
        """Episodes begin where the mask (N,) is True; all do if N is another than before."""
        if len(mask) != len(self.left):
            self.chunks, self.left = None, torch.zeros_like(mask, dtype=torch.int64)
        self.left = torch.where(mask, 0, self.left)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """What `observe` gives -> the actions (N, A) that are due, in [-1, 1]."""
        due = self.left == 0
        if due.any():
            new = self.program(*obs.values())[:, : self.execute].clamp(-1, 1)
            old = new if self.chunks is None else self.chunks
            self.chunks = torch.where(due[:, None, None], new, old)
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


class NoBase:
    """The base of those who have none: no motion."""

    def __init__(self, action_dim: int):
        self.action_dim = action_dim

    def reset(self, mask: torch.Tensor):
        pass

    def act(self, obs: dict) -> torch.Tensor:
        return obs["state"].new_zeros(len(obs["state"]), self.action_dim)


class Replay:
    """A ring of the last steps of N environments: a row (N, ...) of each entry is one step of all.

    Entries: the observation's, "base" (the base's action there), "actions", "rewards", "discounts"
    (0 in the last step of an episode, so that nothing beyond it counts).
    """

    def __init__(self, slots: int, num_envs: int, args: Args):
        self.slots, self.num_envs, self.device = slots, num_envs, args.device
        self.n_step, self.gamma = args.n_step, args.gamma
        self.data, self.head = {}, 0  # head: steps since the run began

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
        """B transitions, uniform over the steps that have n_step others after them."""
        oldest, newest = max(0, self.head - self.slots), self.head - self.n_step
        at = torch.randint(oldest, newest, (batch_size,), device=self.device)
        env = torch.randint(self.num_envs, (batch_size,), device=self.device)
        return self.transitions(at, env)

    def transitions(self, at, env) -> dict:
        """Those that begin with steps `at` (B,) of environments `env` (B,).

        -> obs, next_obs (dicts), actions (B, A), rewards (B,) = sum of gamma^i x discounts before x
        r_i and discounts (B,) = gamma^n x product of the n discounts.
        """
        rewards, discounts = 0.0, 1.0
        for i in range(self.n_step):
            row = (at + i) % self.slots
            rewards = rewards + discounts * self.data["rewards"][row, env]
            discounts = discounts * self.gamma * self.data["discounts"][row, env]
        batch = dict(rewards=rewards, discounts=discounts, obs={}, next_obs={})
        row, next_row = at % self.slots, (at + self.n_step) % self.slots
        batch["actions"] = self.data["actions"][row, env]
        for key in self.data.keys() & {"state", "rgb", "base"}:
            batch["obs"][key] = self.data[key][row, env]
            batch["next_obs"][key] = self.data[key][next_row, env]
        return batch

    def state_dict(self) -> dict:
        data = self.data
        if self.head < self.slots:  # a view would save the whole
            data = {key: rows[: self.head].clone() for key, rows in data.items()}
        return dict(head=self.head, data=data)

    def load_state_dict(self, state: dict):
        self.head = state["head"]
        for key, rows in state["data"].items():
            self.data[key] = rows.new_zeros(self.slots, *rows.shape[1:], device=self.device)
            self.data[key][: len(rows)] = rows


def store_demos(args: Args, base) -> Replay:
    """Demonstrations as a buffer of one environment, with the base's action at each step.

    All step through the base side by side, and it begins anew with each.
    """
    demos, _ = read_demos(args.demos, args.cameras if args.obs == "pixels" else ())
    data = {}
    for key in demos[0]:
        rows = np.concatenate([demo[key] for demo in demos])
        data[key] = torch.from_numpy(rows).to(args.device)  # (M, ...)
    lengths = torch.tensor([len(demo["actions"]) for demo in demos], device=args.device)
    ends = lengths.cumsum(0) - 1
    data["base"] = torch.zeros_like(data["actions"])
    base.reset(torch.ones_like(ends, dtype=torch.bool))
    for t in range(int(lengths.max())):
        at = torch.minimum(ends - lengths + 1 + t, ends)  # whoever is over waits at the end
        planned = base.act({key: data[key][at] for key in ("state", "rgb") if key in data})
        there = t < lengths
        data["base"][at[there]] = planned[there]
    data["rewards"] = torch.zeros(len(data["base"]), device=args.device)
    data["rewards"][ends] = 1.0
    data["discounts"] = 1.0 - data["rewards"]
    # Windows may look beyond the last step, where nothing counts.
    data = {key: torch.cat([rows, rows[: args.n_step]])[:, None] for key, rows in data.items()}
    replay = Replay(len(data["base"]), 1, args)
    replay.data, replay.head = data, replay.slots
    return replay


# --- Update functions -----------------------------------------------------------------------------
def bounded(residual, noise, limit):
    """Residual and noise, together within [-l, l]."""
    return torch.clamp(residual + noise, -limit, limit)  # differs (2)


def propose(base, residual, args: Args):
    """Eq. 2 (B, A): base and residual, or the actor's own action; [-1, 1] keeps the gradient."""
    actions = base + residual if args.mode == "resfit" else residual
    return actions + (actions.clamp(-1, 1) - actions).detach()


@torch.no_grad()
def choose(agent: Agent, obs, scale: float, args: Args, noise=0.0, heads=slice(None)):
    """Eqs. 2 and 6: the proposal where the target critics prefer it, elsewhere the base's action.

    "agree" asks all heads, and the more strictly the smaller `scale`, the share of the residual
    that is let through; "min" is IBRL's choice by the smaller value of `heads`.
    -> actions (N, A), took (N,): where it was the proposal
    """
    x, base = agent.encoder(obs), obs["base"]
    residual = bounded(scale * agent.actor(x, base), noise, agent.actor.limit)
    proposal = propose(base, residual, args)
    if args.gate == "none":
        return proposal, torch.ones(len(base), dtype=torch.bool, device=base.device)
    if args.gate == "agree":
        heads = slice(None)
    both = torch.cat([proposal, base])
    new, old = agent.critics_target(x.repeat(2, 1), both, heads).chunk(2, 1)  # (H, N) each
    if args.gate == "agree":
        gain = new - old
        strictness = KAPPA + args.caution * (1 - scale)
        took = gain.mean(0) > strictness * gain.std(0)
    else:
        took = new.amin(0) > old.amin(0)
    return torch.where(took[:, None], proposal, base), took


def draw(args: Args, batch_size: int, action_dim: int) -> dict:
    """The random numbers of an update: noise (B, A), a pair of heads, two shifts (B, 2)."""
    shifts = (2, batch_size, 2)
    return dict(
        noise=torch.randn(batch_size, action_dim, device=args.device),
        heads=torch.randperm(args.heads, device=args.device)[:2],
        shifts=torch.randint(0, 2 * args.pad + 1, shifts, device=args.device),
    )


def random_shift(obs: dict, offsets: torch.Tensor, pad: int) -> dict:
    """Its images moved by `offsets` (B, 2) - pad pixels, edges repeated; the rest as it is."""
    if "rgb" not in obs:
        return obs
    b, size = obs["rgb"].shape[:2]
    pixels = torch.arange(size, device=offsets.device) + offsets[:, :, None] - pad  # (B, 2, H)
    y, x = pixels.clamp(0, size - 1).unbind(1)
    image = torch.arange(b, device=offsets.device)[:, None, None]
    return obs | {"rgb": obs["rgb"][image, y[:, :, None], x[:, None, :]]}


def critic_loss(agent: Agent, batch: dict, draws: dict, scale: float, args: Args):
    """Eqs. 3 and 4; `scale` is the share of the residual that is let through.

    -> loss, features (B, E), metrics
    """
    with torch.no_grad():
        after = agent.encoder(random_shift(batch["next_obs"], draws["shifts"][1], args.pad))
        base, heads = batch["next_obs"]["base"], draws["heads"]
        noise = (args.noise * draws["noise"]).clamp(-args.noise_clip, args.noise_clip)
        residual = bounded(scale * agent.actor_target(after, base), noise, agent.actor.limit)
        next_actions = propose(base, residual, args)
        next_q = agent.critics_target(after, next_actions, heads).amin(0)
        if args.gate != "none":  # the better of proposal and base
            next_q = torch.maximum(next_q, agent.critics_target(after, base, heads).amin(0))
        targets = batch["rewards"] + batch["discounts"] * next_q
    x = agent.encoder(random_shift(batch["obs"], draws["shifts"][0], args.pad))
    q = agent.critics(x, batch["actions"])
    loss = (q - targets).square().mean()  # differs (3)
    metrics = {
        "loss/qf": loss.detach(),
        "train/q": q.detach().mean(),
        "train/q_spread": q.detach().std(0).mean(),
        "train/target": targets.mean(),
    }
    return loss, x.detach(), metrics


def actor_loss(agent: Agent, batch: dict, x, scale: float, args: Args):
    """Eq. 5, on features (B, E) without their gradient. -> loss, metrics"""
    base = batch["obs"]["base"]
    residual = agent.actor(x, base)
    share = residual / agent.actor.limit.clamp(min=1e-6)
    q = agent.critics(x, propose(base, scale * residual, args)).mean(0)
    loss = -q.mean() + args.trust * share.square().mean()
    return loss, {"loss/actor": loss.detach(), "train/residual": share.detach().abs().mean()}


def descend(loss, optimizer):
    """One step, the gradient's norm at most GRAD_CLIP."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], GRAD_CLIP)
    optimizer.step()


@torch.no_grad()
def target_update(target: nn.Module, net: nn.Module, tau: float):
    """Polyak: target <- (1 - tau) target + tau net."""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), tau)


def update(agent, optimizers, batch, draws, scale: float, with_actor: bool, args: Args) -> dict:
    """One step of encoder and critics, `with_actor` one of the actor too, then their targets."""
    critic_optimizer, actor_optimizer = optimizers
    loss, x, metrics = critic_loss(agent, batch, draws, scale, args)
    descend(loss, critic_optimizer)
    if with_actor:
        agent.critics.requires_grad_(False)  # spares gradients that nobody would use
        loss, more = actor_loss(agent, batch, x, scale, args)
        agent.critics.requires_grad_(True)
        descend(loss, actor_optimizer)
        target_update(agent.actor_target, agent.actor, args.tau)
        metrics |= more
    target_update(agent.critics_target, agent.critics, args.tau)
    return metrics


def draw_batch(replay: Replay, demos: Replay | None, args: Args) -> dict:
    """Demonstrations and online steps; with IBRL the former lie in one buffer with the rest."""
    share = args.offline
    if args.mode == "ibrl" and demos:
        share = len(demos) / (len(demos) + len(replay))
    offline = round(share * args.batch_size)
    online = replay.sample(args.batch_size - offline)
    if not offline:
        return online
    return join(demos.sample(offline), online)


def join(first: dict, second: dict) -> dict:
    """Two batches, one after the other."""
    both = {}
    for key, value in first.items():
        if isinstance(value, dict):
            both[key] = join(value, second[key])
        else:
            both[key] = torch.cat([value, second[key]])
    return both


class Learner:
    """Agent, optimizers and buffers, and the updates that are owed."""

    def __init__(self, agent: Agent, base, args: Args):
        self.agent, self.args, self.metrics = agent, args, {}  # metrics: the latest
        self.replay = Replay(args.buffer_size // args.num_envs, args.num_envs, args)
        self.demos = None
        if args.demos:
            self.demos = store_demos(args, base)
            agent.encoder.fit(self.demos.data["state"][:, 0])
        values = [*agent.encoder.parameters(), *agent.critics.parameters()]
        self.critic_optimizer = torch.optim.AdamW(values, args.lr, fused=True)
        self.actor_optimizer = torch.optim.AdamW(
            agent.actor.parameters(), args.actor_lr, fused=True
        )

    def parts(self) -> dict:
        """What a checkpoint holds of it."""
        return dict(
            agent=self.agent,
            replay=self.replay,
            critic_optimizer=self.critic_optimizer,
            actor_optimizer=self.actor_optimizer,
        )

    def step(self, scale: float, with_actor: bool):
        """One update."""
        batch = draw_batch(self.replay, self.demos, self.args)
        draws = draw(self.args, *batch["actions"].shape)
        optimizers = self.critic_optimizer, self.actor_optimizer
        self.metrics |= update(self.agent, optimizers, batch, draws, scale, with_actor, self.args)

    def catch_up(self, progress: dict, transitions: int):
        """The updates owed for `transitions` more, in what is left of the run."""
        args = self.args
        if not progress["updates"]:
            for _ in tqdm(range(args.critic_warmup), "critic warm-up", leave=False):
                self.step(0.0, False)
        if args.anneal:
            left = 1 - (progress["global_step"] - transitions) / args.total_timesteps
            share = min(1.0, left / args.anneal)
            self.critic_optimizer.param_groups[0]["lr"] = share * args.lr
            self.actor_optimizer.param_groups[0]["lr"] = share * args.actor_lr
        progress["owed"] += transitions * args.utd
        while progress["owed"] >= 1:
            progress["owed"] -= 1
            progress["updates"] += 1
            self.step(progress["scale"], progress["updates"] % args.policy_frequency == 0)

    def read(self, step: int, checkpoint: Path) -> dict[str, float]:
        """The latest metrics. Raises FloatingPointError that names the first that is not finite."""
        metrics = {name: float(value) for name, value in self.metrics.items()}
        for name, value in metrics.items():
            message = f"{name} is not finite at step {step}; last good checkpoint: {checkpoint}"
            if not math.isfinite(value):
                raise FloatingPointError(message)
        return metrics


# --- evaluate -------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(policy, env, args: Args, video: Path | None = None) -> dict:
    """Whole episodes without noise from fixed seeds -> metrics. Training's random state is kept."""
    random = GlobalRandom()
    before = random.state_dict()
    torch.manual_seed(EVAL_SEED)  # of bases that draw
    frames, took, successes, lengths = [], [], [], []
    for seed in range(EVAL_SEED, EVAL_SEED + args.eval_episodes // env.num_envs):
        obs = env.reset(seed=seed)
        running = torch.ones(env.num_envs, dtype=torch.bool, device=args.device)
        policy.reset(running)
        while running.any():
            if video and seed == EVAL_SEED:
                images = env.render(range(min(4, env.num_envs)), size=160)
                frames.append(np.hstack(list(images)))
            actions = policy.act(obs)
            took.append(policy.took[running].float().mean())
            obs, _, terminations, truncations, info = env.step(actions)
            ends = terminations | truncations
            policy.reset(ends)
            ended = running & ends  # each environment counts once
            successes.append(info["episode"]["success_at_end"][ended])
            lengths.append(info["episode"]["length"][ended])
            running = running & ~ended
    random.load_state_dict(before)
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=max(1, round(env.control_hz)), macro_block_size=1)
    return {
        "eval/success_rate": float(torch.cat(successes).float().mean()),
        "eval/length": float(torch.cat(lengths).float().mean()),
        "eval/took": float(torch.stack(took).mean()),
    }


# --- save / load ----------------------------------------------------------------------------------
# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
def save(path: Path, content: dict):
    """Write under a temporary name, then rename: an interrupted save leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
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
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == "resfit"
    need(ours, f"{path} is not resfit's")
    checkpoint["args"]["base"] = ""  # a callable is named by a person, never by a file
    return checkpoint


# torch.export.load would run pickles and Python text of a .pt2 file. So its members, and all text
# in them by the key that it stands under, must be what a program of plain tensor operators has.
MEMBERS = (
    r"data/(weights/(weight_\d+|model_weights_config\.json)|sample_inputs/model\.pt"
    r"|constants/(tensor_\d+|model_constants_config\.json))|models/model\.json|extra/base\.json"
    r"|archive_(format|version)|byteorder|\.data/\w+"
)
TEXT = {
    "target": r"torch\.ops\.aten\.(?!from_file|__)\w+\.\w+"
    r"|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    r"|_operator\.(add|sub|mul|floordiv|getitem)",
    "path_name": r"(weight|tensor)_\d+",
    "as_string": r".*",
    "expr_str": r"(Symbol|Integer|Add|Mul|Pow|Min|Max|Mod|FloorDiv|positive|integer|True"
    r"|'[su]\d+'|[\d\s(),=*+-])*",
    "guards_code": r"(L\['\w+'\]\.size\(\)\[\d\]|[\d\s=<>])*",
    "in_spec": r'(builtins\.(tuple|list|dict)|type|context|children_spec|null|[\d\s\[\]{}":,\\])*',
    "out_spec": r'(type|context|children_spec|null|[\d\s\[\]{}":,\\])*',
}
NAME = r"[\w.+-]*"  # all other text


def check_program(part, key: str = ""):
    """Raises ValueError for a part of a program that could be more than operators on tensors."""
    if isinstance(part, dict):
        texts = all(isinstance(value, str) for value in part.values())
        if key == "metadata" and texts:
            return  # says where a node came from, and is not run
        for name, value in part.items():
            check_program(name)
            check_program(value, name)
    elif isinstance(part, list):
        for value in part:
            check_program(value, key)
    elif isinstance(part, str):
        plain = re.fullmatch(TEXT.get(key, NAME), part)
        need(plain, f"{key} {part[:80]!r} is no plain tensor operator or name")
    else:
        need(key != "use_pickle" or not part, "it has pickled tensors")


def load_program(content: bytes, device: str):
    """A .pt2 file -> its program on `device`, and its base.json ({} without one).

    Raises ValueError for a file that is none, or that could do more than compute.
    """
    from torch.export.passes import move_to_device_pass
    from torch.export.pt2_archive import PT2ArchiveReader
    from torch.export.pt2_archive._package import load_pt2  # this format only, no older ones

    try:
        archive = PT2ArchiveReader(io.BytesIO(content))
        for name in archive.get_file_names():
            need(re.fullmatch(MEMBERS, name), f"it has a file {name}")
            if name.endswith("config.json") or name == "models/model.json":
                check_program(json.loads(archive.read_bytes(name)))
        inputs = archive.read_bytes("data/sample_inputs/model.pt")
        torch.load(io.BytesIO(inputs), weights_only=True)
        found = load_pt2(io.BytesIO(content))
        program = move_to_device_pass(found.exported_programs["model"], device)
    except Exception as error:  # torch raises many kinds for a damaged file
        raise ValueError(f"the base is no plain program of torch.export: {error}") from error
    about = json.loads(found.extra_files.get("base.json", "{}"))
    return program.module(check_guards=False), about


def open_base(args: Args, program: torch.Tensor | None, action_dim: int, env=None):
    """The base: an object with reset(mask) and act(obs); a callable is called with `env`.

    `program`: a .pt2 file as uint8. Raises ValueError if it is another task's, or could do more
    than compute.
    """
    if args.mode == "rlpd":
        return NoBase(action_dim)
    if program is None:
        module, _, name = args.base.partition(":")
        need(name, "name the base: --base FILE.pt2, or --base module:callable")
        sys.path.insert(0, os.getcwd())
        return getattr(importlib.import_module(module), name)(env)
    compute, about = load_program(program.numpy().tobytes(), args.device)
    for key in ("env_id", "obs"):
        wanted = getattr(args, key)
        need(about.get(key, wanted) == wanted, f"the base is for {about.get(key)}, not {wanted}")
    return ChunkQueue(compute, about.get("execute"))


def saved_program(checkpoint: dict, args: Args) -> torch.Tensor | None:
    """The program in a checkpoint; None if its base is a callable, which --base then names."""
    given_twice = checkpoint["base"] is not None and args.base
    need(not given_twice, "the base is in the checkpoint: --base cannot be given")
    return checkpoint["base"]


def read_program(path: str) -> torch.Tensor | None:
    """A .pt2 file as uint8; None for a base that is none."""
    if not path.endswith(".pt2"):
        return None
    return torch.frombuffer(bytearray(Path(path).read_bytes()), dtype=torch.uint8)


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
    run.mkdir(parents=True, exist_ok=True)
    if args.track:
        try:
            import wandb
        except ModuleNotFoundError as error:
            raise ValueError("--track needs Weights & Biases: pip install wandb") from error
        project = os.environ.get("WANDB_PROJECT", "cleanrobot")
        wandb.init(project=project, id=run.name, name=run.name, resume="allow", config=asdict(args))
    return run


# --- Policy ---------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out: base, residual and gate, from one checkpoint (file or content).

    A base that is no program is in no checkpoint: give the object.
    """

    def __init__(self, source: str | Path | dict, device="cpu", base=None):
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args = replace(Args(**checkpoint["args"]), device=str(device))
        self.shapes, self.spec = checkpoint["shapes"], checkpoint["spec"]
        self.scale = checkpoint["progress"]["scale"]  # share of the residual that is let through
        action_dim = self.shapes["action"]
        self.base = base or open_base(self.args, checkpoint["base"], action_dim)
        self.agent = Agent(self.shapes, self.args).to(device)
        self.agent.load_state_dict(checkpoint["agent"])
        self.reset(torch.ones(1, dtype=torch.bool))

    def reset(self, begins: torch.Tensor):
        """Episodes begin where the mask (N,) is True, everywhere if N is another than before."""
        self.base.reset(begins.to(self.args.device))

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs of the environment, (N, ...) -> actions (N, A).

        `took` (N,) tells where the residual was let through.
        """
        device = self.args.device
        tensors = {key: torch.as_tensor(value, device=device) for key, value in obs.items()}
        seen = observe(tensors, self.args.obs == "pixels")
        seen["base"] = self.base.act(seen)
        actions, self.took = choose(self.agent, seen, self.scale, self.args)
        return actions


# --- train ----------------------------------------------------------------------------------------
class Collector:
    """Steps the training environments, by (2) and (6) or as warm-up, for the buffer."""

    def __init__(self, args: Args, env, base, agent: Agent):
        self.args, self.env, self.base, self.agent = args, env, base, agent
        self.noisy = torch.zeros(env.num_envs, dtype=torch.bool, device=args.device)
        self.begin(env.reset(seed=args.seed), torch.ones_like(self.noisy))

    def begin(self, obs: dict, mask: torch.Tensor):
        """Act on `obs` next; episodes begin where the mask (N,) is True."""
        self.base.reset(mask)
        seen = observe(obs, self.args.obs == "pixels")
        self.obs = seen | {"base": self.base.act(seen)}
        noisy = torch.rand(len(mask), device=mask.device) >= self.args.warmup_clean
        self.noisy = torch.where(mask, noisy, self.noisy)

    @torch.no_grad()
    def step(self, warm: bool, scale: float) -> dict:
        """One step of every environment -> what the buffer stores of it."""
        args, obs, base = self.args, self.obs, self.obs["base"]
        if warm:
            half_width = self.agent.actor.limit.clamp(max=args.warmup_noise)
            noise = (2 * torch.rand_like(base) - 1) * half_width
            actions = (base + noise * self.noisy[:, None]).clamp(-1, 1)
            took = torch.zeros_like(self.noisy)
        else:
            noise = args.noise * torch.randn_like(base)
            pair = torch.randperm(args.heads, device=base.device)[:2]
            actions, took = choose(self.agent, obs, scale, args, noise, pair)
        next_obs, _, terminations, truncations, info = self.env.step(actions)
        dones = terminations | truncations
        self.begin(next_obs, dones)
        return obs | dict(
            actions=actions,
            rewards=info["success"].float(),
            discounts=(~dones).float(),  # a time-out is an end, as published
            took=took,
        )

    def parts(self) -> dict:
        """What a checkpoint holds of it; of a base of your own what its `state_dict` says."""
        parts = dict(env=self.env, collector=self)
        if hasattr(self.base, "state_dict"):
            parts["queue"] = self.base
        return parts

    def state_dict(self) -> dict:
        return dict(obs=self.obs, noisy=self.noisy)

    def load_state_dict(self, state: dict):
        device = self.noisy.device
        self.obs = {key: value.to(device) for key, value in state["obs"].items()}
        self.noisy = state["noisy"].to(device)


class Apart:
    """A collector in a process of its own, so that a robot does not wait for the learner.

    It acts by the learner's weights, which lie in shared memory, and runs ahead as far as its steps
    fit in a pipe.
    """

    def __init__(self, args: Args, program: torch.Tensor | None, agent: Agent):
        context = torch.multiprocessing.get_context("spawn")
        self.device = args.device
        self.order = torch.zeros(2).share_memory_()  # warm-up, scale
        self.pipe, sender = context.Pipe(duplex=False)
        inputs = (make_envs, args, program, agent.share_memory(), self.order, sender)
        self.process = context.Process(target=collect_apart, args=inputs, daemon=True)
        self.process.start()
        sender.close()  # so that the pipe ends with the process

    def step(self, warm: bool, scale: float) -> dict | None:
        """The next step; None if the process has ended."""
        self.order.copy_(torch.tensor([warm, scale]))
        try:
            arrays = self.pipe.recv()
        except EOFError:
            print("the actor's process has ended; its error is above", file=sys.stderr)
            signal.raise_signal(signal.SIGINT)  # ends the run as Ctrl-C does
            return None
        return {key: torch.from_numpy(value).to(self.device) for key, value in arrays.items()}

    def close(self):
        self.process.terminate()


def collect_apart(make, args: Args, program, agent: Agent, order: torch.Tensor, sender):
    """The process of --async: steps without end."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the learner's
    torch.set_num_threads(1)
    env, eval_env = make(args)
    eval_env.close()
    collector = Collector(args, env, open_base(args, program, env.action_dim, env), agent)
    while True:
        warm, scale = order.tolist()
        step = collector.step(bool(warm), scale)
        sender.send({key: value.cpu().numpy() for key, value in step.items()})


def rolling(outcomes: list) -> float:
    """Success of the last episodes of training; NaN before the first ends."""
    return sum(outcomes) / len(outcomes) if outcomes else math.nan


def count(progress: dict, step: dict) -> dict:
    """Take a step of every environment into the counters. -> its metrics"""
    ended = step["discounts"] == 0
    successes = step["rewards"][ended].tolist()
    progress["outcomes"] = [*progress["outcomes"], *successes][-ROLLING:]
    progress["global_step"] += len(ended)
    if len(progress["outcomes"]) == ROLLING:
        progress["lowest"] = min(progress["lowest"], rolling(progress["outcomes"]))
    return {"train/took": step["took"].float().mean()}


def shapes_of(env, args: Args) -> dict:
    """What the networks see and give: "action" A, "state" [S] and, from pixels, "rgb" [H, W, C]."""
    shapes = {"action": env.action_dim}
    for key, value in observe(env.reset(), args.obs == "pixels").items():
        shapes[key] = list(value.shape[1:])
    return shapes


def ramp(global_step: int, args: Args) -> float:
    """Guard (b): the share of the residual that is let through."""
    if not args.ramp_steps:
        return 1.0
    return min(max((global_step - args.learning_starts) / args.ramp_steps, 0.0), 1.0)


def evaluate_checkpoint(args: Args) -> dict:
    """What --evaluate does. -> metrics"""
    checkpoint = load(args.checkpoint)
    _, env = make_envs(args)
    base = open_base(args, saved_program(checkpoint, args), env.action_dim, env)
    policy = Policy(checkpoint, args.device, base)
    video = Path(args.checkpoint).parent / "videos/evaluate.mp4" if args.capture_video else None
    results = evaluate(policy, env, args, video)
    print(json.dumps(results))
    env.close()
    return results


def restore(parts: dict, checkpoint: dict, run: Path) -> dict:
    """Parts and CSV files go on from a checkpoint. -> its counters"""
    for name, part in parts.items():
        if name in checkpoint:
            part.load_state_dict(checkpoint[name])
    replay = parts["replay"]
    if not replay.head:
        print(f"{run} was run without --save-buffer: its replay buffer starts empty")
    elif "collector" not in parts:  # the actor's process begins new episodes: the old ones end
        replay.data["discounts"][(replay.head - 1) % replay.slots] = 0
    cut_back(run, checkpoint["csv_sizes"])
    return checkpoint["progress"]


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at a
    NaN.
    """
    check(args)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    if args.evaluate:
        return evaluate_checkpoint(args)
    env, eval_env = make_envs(replace(args, evaluate=args.async_))
    run = open_run(args)
    checkpoint = load(run / "checkpoint.pt") if args.resume else None
    program = saved_program(checkpoint, args) if checkpoint else read_program(args.base)
    shapes = shapes_of(eval_env, args)
    base = open_base(args, program, shapes["action"], env or eval_env)
    eval_base = copy.copy(base)  # the same program, with a queue of its own
    if program is None:
        eval_base = open_base(args, program, shapes["action"], eval_env)
    agent = Agent(shapes, args).to(args.device)
    learner = Learner(agent, base, args)
    parts = learner.parts() | dict(random=GlobalRandom())
    if args.async_:
        collector = Apart(args, program, agent)
    else:
        collector = Collector(args, env, base, agent)
        parts |= collector.parts()
    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-1.0, scale=0.0)
    progress |= dict(owed=0.0, updates=0, lowest=1.0, outcomes=[])

    def content() -> dict:
        """All that Policy needs."""
        facts = dict(algo="resfit", args=asdict(args) | {"base": ""}, spec=eval_env.spec)
        facts |= dict(shapes=shapes, base=program, progress=dict(progress))
        return facts | dict(agent=agent.state_dict())

    def save_run():
        states = dict(csv_sizes=csv_sizes(run))
        for name, part in parts.items():
            if name != "replay" or args.save_buffer:
                states[name] = part.state_dict()
        save(run / "checkpoint.pt", content() | states)

    policy = Policy(content(), args.device, eval_base)
    policy.agent = agent
    if checkpoint:
        progress = restore(parts, checkpoint, run)
        checkpoint = None  # its mapped tensors are released
    else:
        (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
        save_run()
    results, before = {}, progress["global_step"]
    born = START - progress["wall_time"]
    begin = time.perf_counter() - progress["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=before, unit="step", mininterval=1)
    interrupt = Interrupt()
    while True:
        step, training = progress["global_step"], rolling(progress["outcomes"])
        last = step >= args.total_timesteps
        progress["wall_time"] = time.time() - born
        progress["train_time"] = time.perf_counter() - begin
        clock = {name: progress[name] for name in ("global_step", "wall_time", "train_time")}
        eval_due = step // args.eval_freq > before // args.eval_freq or (last and step > before)

        # log
        log_due = eval_due or step // args.log_freq > before // args.log_freq
        if log_due and "loss/actor" in learner.metrics:  # the first row names the columns
            row = clock | learner.read(step, run / "checkpoint.pt")
            row |= {"train/rolling_success": training, "train/scale": progress["scale"]}
            row["train/nan_resets"] = int(env.nan_resets) if env else 0
            row["time/sps"] = step / progress["train_time"]
            write_row(run / "metrics.csv", row, args.track)

        # evaluate and save; at first the base alone
        if eval_due or progress["best"] < 0:
            pause = time.perf_counter()
            policy.scale = progress["scale"]
            video = run / f"videos/step_{step:09d}.mp4" if last and args.capture_video else None
            results = evaluate(policy, eval_env, args, video)
            row = {"train/rolling_success": training, "train/lowest": progress["lowest"]}
            write_row(run / "eval.csv", clock | results | row, args.track)
            success = results["eval/success_rate"]
            bar.write(f"{step} steps: success {success:.3f}, in training {training:.3f}")
            if success >= progress["best"]:
                progress["best"] = success
                save(run / "best.pt", content())
            save_run()
            begin += time.perf_counter() - pause
        if last or interrupt.asked:
            break

        # act, step and store
        before, warm = step, step < args.learning_starts
        progress["scale"] = ramp(step, args)
        taken = collector.step(warm, progress["scale"])
        if taken:
            learner.metrics |= count(progress, taken)
            learner.replay.add(taken)
        transitions = progress["global_step"] - step
        bar.update(transitions)

        # update
        if not warm and len(learner.replay) >= args.learning_starts:
            learner.catch_up(progress, transitions)
    interrupt.restore()
    for part in (bar, eval_env, collector if args.async_ else env):
        part.close()
    if not last:
        learner.read(step, run / "checkpoint.pt")  # raises at a NaN, which is not to be saved
        save_run()
        sys.exit(f"interrupted at step {step}: continue with --resume {run}")
    return results | clock | {"lowest": progress["lowest"], "run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
