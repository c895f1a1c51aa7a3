"""ResFiT: a behaviour-cloned policy in chunks of actions, frozen, and an off-policy residual that makes it reliable.

Paper: Ankile, Jiang, Duan, Shi, Abbeel and Nagabandi, "Residual Off-Policy RL for Finetuning Behavior Cloning
Policies", arXiv 2509.19301. Written from the paper's equations alone: the authors' code has a non-commercial licence,
and nobody who wrote this file has opened it. RLPD: Ball et al., arXiv 2302.02948. IBRL: Hu et al., arXiv 2311.02198.
ACT: Zhao et al., arXiv 2304.13705. Flow matching: Lipman et al., arXiv 2210.02747. ResiP: arXiv 2407.16677 (PPO).

    base      b_t = the next action of a chunk that the frozen policy predicted at the start of the chunk       (1)
    action    a_t = clip(b_t + clip(pi(o_t, b_t) + e, -l, l), -1, 1), stored as it was executed                 (2)
    target    y = sum of g^i r_(t+i), i < n, + g^n (1 - d) min over a random pair k of ten of Q'_k(o', a')      (3)
              a' = (2) with pi', b' = b_(t+n), the action really queued there, and e = clip(N(0, s^2), -c, c)
    critics   mean over the ten heads of E[(Q_k(o_t, a_t) - y)^2]; half of the batch from demonstrations        (4)
    actor     -E[mean_k Q_k(o_t, clip(b_t + pi(o_t, b_t)))] + w E[(pi / l)^2], once in --policy-frequency       (5)
    gate      (2) is executed where mean_k D_k - kappa std_k D_k > margin, D_k = Q'_k(o, a) - Q'_k(o, b); else b (6)

Differences from the paper:
 1. Never below the base: --recipe ours turns on guards, each a flag (GUARDS); --recipe published has none of them.
 2. The bound of (2) is hard: it holds for residual plus noise, per dimension, in warm-up too.
 3. The base action after an episode's last step comes from the old queue, so that time-outs can bootstrap.
 4. Heads are trained by their own errors. (The paper's sentence leaves open whether the errors are averaged first.)
 5. The encoder's tokens are compressed by one linear layer for each of actor and critics, at any picture size.
 6. Warm-up steps count. Any number of environments; the buffer holds each frame once, n-step sums are made at sampling.
 7. Observations may be vectors: the simulator's true state beside the joints (--obs state).

Commands, from the repository's root:
    demonstrations python -m envs.demos --env-id SO101ReachCube-v1 --episodes 100 --noise 0.3 --out reach.hdf5
    train          python algos/resfit.py --env-id SO101ReachCube-v1 --demos reach.hdf5
    smallest run   python algos/resfit.py --env-id SO101ReachCube-v1 --demos reach.hdf5 --device cpu
    evaluate       python algos/resfit.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/resfit.py --resume runs/NAME    (exactly, if the run was given --save-buffer)
    other modes    python algos/resfit.py --demos reach.hdf5 --base-from runs/NAME/base.pt --mode rlpd

Expected result, SO101ReachCube-v1 from the true state: a clone of 50 % success gets to 98 to 100 % in 44,800 steps (6
to 8 minutes on two CPU cores), three seeds, training never below 45 % (see its page). Not yet measured on a GPU.

Shapes: N environments, B batch, K actions of a chunk, H heads, A action dimensions, S state dimensions, C channels.
"""
# ruff: noqa: E402  (the lines down to the banner must run before the imports below it)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("envs") is None:
    # `make` installs the project in .venv; going on in there lets `python algos/resfit.py` work as typed.
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
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
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
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv
OFF_POLICY = ("resfit", "rlpd", "ibrl")  # the modes with Learner's updates
BASE_FIELDS = ("env_id", "obs", "image_size", "base", "chunk", "base_dim")  # in which a cloned base must fit a run
AGENT_FIELDS = ("mode", "hidden", "heads", "encoder_dim", "layer_norm", "see_phase")  # and all that learns after it
BOUND_FIELDS = ("num_envs", "device", "buffer_size")  # and, to continue a run, its random states and its buffer
ROLLING = 100  # episodes over which the success of training is averaged

# --- Args -------------------------------------------------------------------------------------------------------------
# What --recipe ours turns on; the page has what was measured.
GUARDS = dict(warmup_clean=0.5, ramp_steps=19_200, gate="agree", caution=1.5, trust=0.02, offline=0.25)
# (pattern of env ids, kind of device, mode, recipe) -> defaults other than the published ones below; later rows win
TUNED = {
    ("*", "*", "resfit", "ours"): GUARDS,
    # a CPU's sizes and rates, ours
    ("*", "cpu", "*", "*"): dict(
        num_envs=16, total_timesteps=44_800, eval_freq=3_200, log_freq=800, hidden=128, batch_size=128, encoder_dim=32,
        base_dim=64, base_dropout=0.0, bc_batch_size=64, bc_steps=3_000, bc_eval_freq=1_000, bc_lr=5e-4, chunk=10,
        execute=5, utd=0.3, lr=5e-4, tau=0.01, learning_starts=3_200, critic_warmup=1_500),
    ("*", "*", "rlpd", "*"): dict(actor_lr=1e-4, tau=0.01, noise=0.1, warmup_noise=1.0, critic_warmup=0),
    ("*", "*", "ibrl", "*"): dict(actor_lr=1e-4, tau=0.01, noise=0.1, gate="min", warmup_noise=0.0, critic_warmup=0),
    ("*", "*", "ppo-residual", "*"): dict(actor_lr=3e-4, offline=0.0),
    ("*", "cpu", "resfit", "*"): dict(actor_lr=1e-4, limit=(0.3,), noise=0.04),
    ("*", "cpu", "resfit", "ours"): dict(policy_frequency=2, anneal=0.2),
    ("SO101Reach*", "cpu", "*", "*"): dict(gamma=0.95, bc_steps=1_500, bc_eval_freq=500),
}


@dataclass
class Args:
    # run
    env_id: str = "SO101ReachCube-v1"  # task: SO101... (envs/so101.py) or robosuite/... (envs/robosuite_tasks.py)
    mode: Literal["resfit", "rlpd", "ibrl", "filtered-bc", "ppo-residual"] = "resfit"  # what learns after the cloning
    recipe: Literal["ours", "published"] = "ours"  # whose defaults: with the guards against the first collapse, or not
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, mode, seed and time
    total_timesteps: int = 300_000  # environment transitions, warm-up included, over all environments
    eval_freq: int = 10_000  # transitions between evaluations; each also saves checkpoint.pt, and best.pt if it is
    eval_episodes: int = 64  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 64  # of them at once; divides eval_episodes
    log_freq: int = 500  # transitions between rows of metrics.csv
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to evaluate
    resume: str | None = None  # run folder to continue, with its arguments, except those given again
    save_buffer: bool = False  # put the replay buffer in checkpoint.pt: larger, but then --resume continues exactly
    capture_video: bool = True  # write an mp4 of evaluation episodes (with --obs state: in the first and the last)
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, entity, offline mode

    # environment
    num_envs: int = 1  # parallel environments
    obs: Literal["state", "pixels"] = "state"  # the simulator's true state and the joints, or pictures and the joints
    image_size: int = 84  # pixels a side
    cameras: tuple[str, ...] = ("wrist",)  # of the task
    demos: str = ""  # demonstrations, a file in robomimic's layout: `python -m envs.demos` writes one
    demo_limit: int = 0  # successful demonstrations used, the first ones; 0: all

    judge: str = ""  # module:callable, a person's word: called with each new observation, says None, True or False

    # base policy
    base: Literal["act", "flow"] = "act"  # transformer that regresses chunks, or that draws them by flow matching
    base_policy: str = ""  # module:callable instead; called with the environment, gives reset(mask) and act(obs)
    base_from: str = ""  # base.pt of an earlier run: no cloning
    chunk: int = 20  # K, actions of a chunk
    execute: int = 20  # of them executed before the next query: K is open loop, 1 receding horizon
    base_dim: int = 256  # width of the transformer
    base_dropout: float = 0.1  # in its layers
    bc_steps: int = 50_000  # updates of the cloning
    bc_lr: float = 1e-4  # AdamW step size of the cloning
    bc_batch_size: int = 256  # chunks an update
    bc_eval_freq: int = 5_000  # updates between evaluations of the cloning
    bc_only: bool = False  # stop after it

    # algorithm
    limit: tuple[float, ...] = (0.1,)  # l, largest residual, in units of actions; one number, or one a dimension
    freeze_gripper: bool = False  # no residual on the last action
    buffer_size: int = 200_000  # observations kept, over all environments
    batch_size: int = 256  # transitions per update
    offline: float = 0.5  # share of them from demonstrations
    utd: float = 4.0  # critic updates per transition
    policy_frequency: int = 4  # critic updates per update of actor and its target
    gamma: float = 0.99  # discount per step
    n_step: int = 3  # rewards summed before the bootstrap
    bootstrap_on_timeout: bool = False  # a time-out is no end; off: it is one, as published
    heads: int = 10  # H, critics; the target takes the smaller of a random pair
    layer_norm: bool = True  # in critics and actor
    see_phase: bool = False  # show actor and critics which share of the chunk is done
    lr: float = 1e-4  # AdamW step size of encoder and critics
    actor_lr: float = 1e-6  # AdamW step size of the actor
    anneal: float = 0.0  # last share of the run, in which both fall to 0
    grad_clip: float = 1.0  # largest norm of a gradient
    tau: float = 0.005  # share of critics and actor that moves into their targets
    noise: float = 0.05  # s, standard deviation of exploration and of target smoothing, in units of actions
    noise_clip: float = 0.3  # c, of the smoothing
    learning_starts: int = 10_000  # transitions of warm-up: base and uniform noise
    critic_warmup: int = 10_000  # critic-only updates after it
    hidden: int = 1024  # width of the two layers of actor and critics
    encoder_dim: int = 128  # width of the picture's tokens
    pad: int = 4  # largest random shift, pixels each way

    ppo_rollout: int = 2_048  # ppo-residual: transitions between its updates, each of 10 passes over them

    # guards against the collapse at the start
    warmup_noise: float = 0.2  # half width of the uniform noise of warm-up
    warmup_clean: float = 0.0  # (a) share of warm-up episodes without noise
    ramp_steps: int = 0  # (b) transitions after warm-up over which the residual grows from 0, in targets and losses too
    gate: Literal["none", "min", "agree"] = "none"  # (c) execute the proposal only where the critics prefer it: eq. 6
    margin: float = 0.0  # (c) by at least so much
    kappa: float = 1.0  # (c) standard deviations of the heads' advantages that "agree" subtracts
    caution: float = 0.0  # (b, c) so many more of them where the ramp begins, none where it ends
    trust: float = 0.0  # (d) w, weight of the squared residual in the actor's loss
    fallback: float = 0.0  # (e) rolling success below the base's by so much halves the residual; 0: never
    anchor: float = 0.0  # (f) share of the batch from warm-up

    # compute
    async_: Annotated[bool, tyro.conf.arg(name="async")] = False  # interaction in a process of its own
    async_queue: int = 64  # its steps that may wait for the learner
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks, environments and buffer

    def check(self):
        """Raises ValueError at the first choice that cannot work. (In __post_init__ the parser would reword it.)"""
        cuda, updates = self.device.startswith("cuda"), self.mode in OFF_POLICY
        may_be_0 = "seed demo_limit learning_starts critic_warmup ramp_steps pad".split()
        few = [name.replace("_", "-") for name, value in asdict(self).items()
               if type(value) is int and value < 1 and name not in may_be_0]
        for message, wrong in {
            "--resume continues a run, --checkpoint is for --evaluate: give only one": self.resume and self.checkpoint,
            "--evaluate needs --checkpoint FILE": self.evaluate and not self.checkpoint,
            f"--{', --'.join(few)} must be at least 1": few,
            "--eval-episodes must be a multiple of --eval-envs": self.eval_episodes % max(self.eval_envs, 1),
            "--execute must be from 1 to --chunk": not 1 <= self.execute <= self.chunk,
            "--heads must be at least 2": self.heads < 2,
            "--limit must be from 0 to 1": not all(0 <= limit <= 1 for limit in self.limit),
            "--offline and --anchor are shares of the batch: together they must leave some of it":
                min(self.offline, self.anchor) < 0 or self.offline + self.anchor >= 1,
            "--anchor needs a --buffer-size above --total-timesteps, so that warm-up is never overwritten":
                self.anchor and self.buffer_size < 2 * self.total_timesteps,
            "--learning-starts must be at least (--n-step + 2) x --num-envs":
                self.learning_starts < (self.n_step + 2) * self.num_envs,
            "--buffer-size must be at least --learning-starts and (--n-step + 4) x --num-envs":
                self.buffer_size < max((self.n_step + 4) * self.num_envs, self.learning_starts),
            "--judge needs --num-envs 1": self.judge and self.num_envs != 1,
            "--async needs a mode of its own learner: resfit, rlpd or ibrl": self.async_ and not updates,
            "--mode filtered-bc clones: it needs --demos, and a base of ours": self.mode == "filtered-bc" and (
                self.base_policy or not self.demos),
            "--track needs Weights & Biases: pip install -e '.[track]'":
                self.track and importlib.util.find_spec("wandb") is None,
            "--device must be cpu or cuda": self.device.split(":")[0] not in ("cpu", "cuda"),
            "there is no CUDA device here: use --device cpu": cuda and not torch.cuda.is_available(),
        }.items():
            if wrong:
                raise ValueError(message)


def tuned_defaults(env_id: str, device: str, mode: str, recipe: str) -> dict:
    """The rows of TUNED that apply, merged."""
    given = (env_id, device.partition(":")[0], mode, recipe)
    rows = [row for patterns, row in TUNED.items() if all(map(fnmatch, given, patterns))]
    return {key: value for row in rows for key, value in row.items()}


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The defaults, and so --help, are those of the task, device, mode and recipe given."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=words, default=Args())  # a first look
    source = Path(given.resume) / "checkpoint.pt" if given.resume else given.checkpoint
    saved = load_file(source)["args"] if source else {}
    choice = {key: saved.get(key, getattr(given, key)) for key in ("env_id", "mode", "recipe")}
    for key in ("device", "evaluate", "checkpoint", "resume", *["name"] * bool(given.checkpoint)):  # of that run alone
        saved.pop(key, None)
    defaults = dict(device=given.device) | choice | tuned_defaults(device=given.device, **choice) | saved
    return tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n\n")[0])


# --- make_envs --------------------------------------------------------------------------------------------------------
def make_envs(args: Args, device: torch.device) -> tuple:
    """-> training environment (None with --evaluate), evaluation environment.

    Anything with the contract in envs/__init__.py can stand here, if it knows success and ends an episode there.
    """
    pixels, robosuite = args.obs == "pixels", args.env_id.startswith("robosuite/")
    options = dict(pictures=pixels, asymmetric=not pixels, render_size=args.image_size, cameras=args.cameras,
                   stagger=False, end_on_success=True) | ({} if robosuite else {"samples_per_pixel": 1})  # as demos
    try:
        make = importlib.import_module("envs.robosuite_tasks" if robosuite else "envs.so101").make
        return (None if args.evaluate else make(args.env_id, args.num_envs, device, seed=args.seed, **options),
                make(args.env_id, args.eval_envs, device, seed=EVAL_SEED, **options))
    except (ImportError, RuntimeError) as error:  # the environment's own messages
        raise ValueError(error) from error


def observe(obs: dict) -> dict:
    """What the networks see: "state" (N, S), the true state in front of it if there is one, and "rgb" (N, H, W, C)."""
    state = torch.cat([obs[k].float() for k in ("privileged", "state") if k in obs], -1)
    return {"state": state} | ({"rgb": obs["rgb"]} if "rgb" in obs else {})


def read_demos(args: Args) -> tuple[list[dict], list[dict]] | None:
    """Successful demonstrations to train and to validate on, each up to its first success; None where none are needed.

    Raises ValueError and FileNotFoundError for what is wrong with the file, ImportError where its reader is missing.
    """
    if not args.demos and (args.offline or not (args.base_policy or args.base_from)):
        raise ValueError("give --demos FILE (`python -m envs.demos` writes one), or a --base-policy with --offline 0")
    if not args.demos:
        return None
    keys = ("state", "privileged" if args.obs == "state" else "rgb")
    demos, valid = importlib.import_module("envs.demos").read_successes(args.demos, keys)
    return demos[: args.demo_limit or None], valid


# --- Networks ---------------------------------------------------------------------------------------------------------
class Tokens(nn.Module):
    """uint8 (B, H, W, 3 x cameras) -> (B, T, D): two convolutions for each camera, 81 places of 84 x 84 pixels."""

    def __init__(self, cameras: int, dim: int, size: int):
        super().__init__()
        side = ((size - 8) // 4 - 2) // 2 + 1
        self.convs = nn.ModuleList(nn.Sequential(nn.Conv2d(3, dim, 8, 4), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2))
                                   for _ in range(cameras))
        self.place = nn.Parameter(0.02 * torch.randn(cameras * side**2, dim))

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float() / 255 - 0.5
        maps = [convs(part).flatten(2) for convs, part in zip(self.convs, x.split(3, 1), strict=True)]
        return torch.cat(maps, -1).transpose(1, 2) + self.place


def transformer_layer(kind: type, dim: int, dropout: float) -> nn.Module:
    return kind(dim, 4, 4 * dim, dropout, "gelu", batch_first=True, norm_first=True)


class Normalizer(nn.Module):
    """States in units of their deviation over the demonstrations, cut off at 10."""

    def __init__(self, dims: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dims)), self.register_buffer("std", torch.ones(dims))

    def fit(self, states: torch.Tensor):
        self.mean.copy_(states.mean(0)), self.std.copy_(states.std(0).clamp_min(0.01))

    def forward(self, state):
        return ((state - self.mean) / self.std).clamp(-10, 10)


class ChunkPolicy(nn.Module):
    """The base: obs -> the next K actions (B, K, A), by regression (ACT) or by the flow from noise to actions."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        dim, self.flow, self.shape = args.base_dim, args.base == "flow", (args.chunk, shapes["action"])
        self.normalize = Normalizer(shapes["state"])
        self.state = nn.Sequential(nn.Linear(shapes["state"], dim), nn.GELU(), nn.Linear(dim, dim))
        self.tokens = Tokens(shapes["cameras"], dim, args.image_size) if shapes["cameras"] else None
        self.encoder = nn.ModuleList(transformer_layer(nn.TransformerEncoderLayer, dim, args.base_dropout)
                                     for _ in range(2))
        self.decoder = transformer_layer(nn.TransformerDecoderLayer, dim, args.base_dropout)
        self.queries = nn.Parameter(0.02 * torch.randn(args.chunk, dim))
        self.noisy = nn.Linear(shapes["action"] + 1, dim) if self.flow else None
        self.norm, self.out = nn.LayerNorm(dim), nn.Linear(dim, shapes["action"])

    def memory(self, obs: dict) -> torch.Tensor:
        """What the decoder attends to, (B, T, D)."""
        x = self.state(self.normalize(obs["state"]))[:, None]
        if self.tokens:
            x = torch.cat([x, self.tokens(obs["rgb"])], 1)
        for layer in self.encoder:
            x = layer(x)
        return x

    def decode(self, memory, noisy=None, when=None) -> torch.Tensor:
        """Actions; or, of `noisy` (B, K, A) at times `when` (B,) from 0 to 1, the velocity of the flow."""
        x = self.queries.expand(len(memory), -1, -1)
        if self.flow:
            x = x + self.noisy(torch.cat([noisy, when[:, None, None].expand(*noisy.shape[:2], 1)], -1))
        return self.out(self.norm(self.decoder(x, memory)))

    @torch.no_grad()
    def predict_chunk(self, obs: dict, generator: torch.Generator, steps: int = 8) -> torch.Tensor:
        memory = self.memory(observe(obs))
        if not self.flow:
            return self.decode(memory)
        x = torch.randn((len(memory), *self.shape), generator=generator, device=memory.device)
        for i in range(steps):  # Euler
            x = x + self.decode(memory, x, torch.full((len(x),), i / steps, device=x.device)) / steps
        return x


class Encoder(nn.Module):
    """obs -> (B, E): tokens of the pictures after one layer of attention, flattened, then state and chunk's phase."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.normalize, self.tokens, dim = Normalizer(shapes["state"]), None, args.encoder_dim
        self.picture, self.vector, self.phase = 0, shapes["state"] + args.see_phase, args.see_phase
        if shapes["cameras"]:
            self.tokens = Tokens(shapes["cameras"], dim, args.image_size)
            self.layer, self.norm = transformer_layer(nn.TransformerEncoderLayer, dim, 0.0), nn.LayerNorm(dim)
            self.picture = self.tokens.place.numel()

    def forward(self, obs):
        parts = [self.norm(self.layer(self.tokens(obs["rgb"]))).flatten(1)] if self.tokens else []
        return torch.cat([*parts, self.normalize(obs["state"]), *[obs["phase"]] * self.phase], -1)


class Trunk(nn.Module):
    """(B, E) -> (B, 128 + vector): the pictures' part compressed, by a layer of the actor's or the critics' own."""

    def __init__(self, encoder: Encoder):
        super().__init__()
        self.picture, self.width = encoder.picture, encoder.vector + 128 * bool(encoder.picture)
        self.layers = nn.Sequential(nn.Linear(self.picture, 128), nn.LayerNorm(128), nn.ReLU()) if self.picture else 0

    def forward(self, x):
        return torch.cat([self.layers(x[:, : self.picture]), x[:, self.picture:]], -1) if self.picture else x


class Actor(nn.Module):
    """features (B, E), base action (B, A) -> residual in [-l, l]; zero at first."""

    def __init__(self, encoder: Encoder, shapes: dict, args: Args):
        super().__init__()
        self.trunk, h, a = Trunk(encoder), args.hidden, shapes["action"]
        limit = torch.tensor(args.limit if adds_to_base(args) else (1.0,))
        if len(limit) not in (1, a):
            raise ValueError(f"--limit has {len(limit)} numbers; give one, or one for each of {a} actions")
        self.register_buffer("limit", limit.expand(a).clone())
        norm = nn.LayerNorm if args.layer_norm else nn.Identity
        self.policy = nn.Sequential(nn.Linear(self.trunk.width + a, h), norm(h), nn.ReLU(),
                                    nn.Linear(h, h), norm(h), nn.ReLU(), nn.Linear(h, a))
        if adds_to_base(args):
            nn.init.zeros_(self.policy[-1].weight), nn.init.zeros_(self.policy[-1].bias)
            self.limit[-1] *= not args.freeze_gripper

    def forward(self, x, base):
        return torch.tanh(self.policy(torch.cat([self.trunk(x), base], -1))) * self.limit


class Critics(nn.Module):
    """features (B, E), executed action (B, A) -> values (H, B): one trunk and H perceptrons as stacked weights."""

    def __init__(self, encoder: Encoder, shapes: dict, args: Args):
        super().__init__()
        self.trunk, self.layer_norm = Trunk(encoder), args.layer_norm
        sizes = [self.trunk.width + shapes["action"], args.hidden, args.hidden, 1]
        heads, pairs = args.heads, list(zip(sizes, sizes[1:], strict=False))
        self.weights = nn.ParameterList(torch.stack([nn.init.orthogonal_(torch.empty(o, i)).T for _ in range(heads)])
                                        for i, o in pairs)
        self.biases = nn.ParameterList(torch.zeros(heads, 1, o) for _, o in pairs)
        self.gains = nn.ParameterList(torch.ones(heads, 1, args.hidden) for _ in range(2))
        self.shifts = nn.ParameterList(torch.zeros(heads, 1, args.hidden) for _ in range(2))

    def forward(self, x, actions, heads=slice(None)):
        """`heads`: which of them, an index tensor; the default is all."""
        x = torch.cat([self.trunk(x), actions], -1)
        x = x.expand(len(self.weights[0][heads]), *x.shape)
        for i in range(2):
            x = torch.baddbmm(self.biases[i][heads], x, self.weights[i][heads])
            if self.layer_norm:
                x = F.layer_norm(x, x.shape[-1:]) * self.gains[i][heads] + self.shifts[i][heads]
            x = F.relu(x)
        return torch.baddbmm(self.biases[2][heads], x, self.weights[2][heads]).squeeze(-1)


def adds_to_base(args: Args) -> bool:
    """Whether the actor's output is added to the base's action (or is an action by itself)."""
    return args.mode in ("resfit", "ppo-residual")


class Agent(nn.Module):
    """All that learns by reinforcement: encoder, actor, critics, the targets of both, and the optimisers."""

    def __init__(self, args: Args, shapes: dict, device: torch.device):
        super().__init__()
        self.encoder = Encoder(shapes, args)
        self.actor, self.critics = Actor(self.encoder, shapes, args), Critics(self.encoder, shapes, args)
        self.actor_target, self.critics_target = (copy.deepcopy(net).requires_grad_(False)
                                                  for net in (self.actor, self.critics))
        self.to(device)
        self.values = [*self.encoder.parameters(), *self.critics.parameters()]  # what the critics' loss trains
        self.optimizers = {"critics": torch.optim.AdamW(self.values, args.lr, fused=True),
                           "actor": torch.optim.AdamW(self.actor.parameters(), args.actor_lr, fused=True)}


# --- Storage ----------------------------------------------------------------------------------------------------------
class Queue:
    """Executes a policy of chunks in N environments: asks it again where `execute` actions of the last one are done.

    `policy` has `predict_chunk(obs, generator)` or, as a black box, `act(obs)`, and then perhaps `reset(mask)`. It is
    asked about all N observations when any is due, so that a row's answer does not depend on who else is due. None is
    the policy of those who have none: no motion.
    """

    def __init__(self, policy, num_envs: int, args: Args, action_dim: int, device):
        self.policy, self.own = policy, hasattr(policy, "predict_chunk")
        self.execute, self.device = args.execute if self.own else 1, torch.device(device)
        self.generator = torch.Generator(device).manual_seed(args.seed)
        self.chunks = torch.zeros((num_envs, self.execute, action_dim), device=device)
        self.age = torch.full((num_envs,), self.execute, device=device)  # actions of the chunk that are done
        self.reset()

    def reset(self, worlds: torch.Tensor | None = None):
        """Forget the rest of the chunk in `worlds`, a mask (N,) (None: in all): an episode begins."""
        worlds = torch.ones_like(self.age, dtype=torch.bool) if worlds is None else worlds
        self.age = torch.where(worlds, self.execute, self.age)
        if hasattr(self.policy, "reset"):
            self.policy.reset(worlds)

    def act(self, obs: dict) -> dict:
        """-> "base" (N, A), the action to be executed now, and "phase" (N, 1), the share of the chunk that is done."""
        due = self.age >= self.execute
        if due.any():
            new = torch.zeros_like(self.chunks)
            if self.policy is not None:
                new = self.policy.predict_chunk(obs, self.generator) if self.own else self.policy.act(obs)[:, None]
            new = new[:, : self.execute].clamp(-1, 1)
            self.chunks, self.age = torch.where(due[:, None, None], new, self.chunks), torch.where(due, 0, self.age)
        base = self.chunks[torch.arange(len(due), device=self.device), self.age]
        phase, self.age = self.age[:, None] / self.execute, self.age + 1
        return dict(base=base, phase=phase)

    def peek(self, obs: dict) -> dict:
        """What `act` would say, without taking anything from the queue."""
        other = copy.copy(self)  # `act` replaces tensors and never writes into them
        other.policy = self.policy if self.own else copy.deepcopy(self.policy)
        other.generator = self.generator.clone_state()
        return other.act(obs)

    def state_dict(self) -> dict:
        return dict(chunks=self.chunks, age=self.age, generator=self.generator.get_state())

    def load_state_dict(self, state: dict):
        self.chunks, self.age = state["chunks"].to(self.device), state["age"].to(self.device)
        self.generator.set_state(state["generator"])


class Replay:
    """A ring of F slots for each of N environments. A slot holds one observation, and every one is stored once.

    An episode of L steps takes L + 1 slots in a row. Slot i has the observation before step i, with the base's action
    and its phase there, and that step's executed action, reward and discount (0 where it terminates); the slot after
    the last step has the final observation alone and is marked `last`. `good` marks the steps of successful episodes.
    `head` (N,) numbers the slot of the present observation, counted from the start of the run.
    """

    def __init__(self, obs: dict, action_dim: int, slots: int, n_step: int, gamma: float, device):
        self.slots, self.n_step, self.gamma, self.device = slots, n_step, gamma, torch.device(device)
        zeros, self.keys = torch.zeros(len(obs["state"])), tuple(obs)
        slot = obs | dict(actions=torch.zeros(len(zeros), action_dim), rewards=zeros, discounts=zeros,
                          last=zeros.bool(), good=zeros.bool())
        self.data = {k: torch.zeros((slots, *v.shape), dtype=v.dtype, device=device) for k, v in slot.items()}
        self.worlds = torch.arange(len(zeros), device=device)
        self.head = torch.zeros_like(self.worlds)
        self.start = self.head.clone()  # slot of the present episode's first observation
        self._open(self.head, obs)

    def _open(self, slot, obs: dict, last: bool | torch.Tensor = False):
        """Write an observation of every environment into `slot` (N,)."""
        at = (slot % self.slots, self.worlds)
        self.data["last"][at] = last
        for k in self.keys:
            self.data[k][at] = obs[k].to(self.device)

    def add(self, actions, rewards, discounts, dones, success, final_obs: dict, next_obs: dict):
        """Store one step of every environment; all (N, ...).

        final_obs: the true next observation; next_obs: the one to act on, of another episode where `dones`.
        """
        dones, now = dones.to(self.device), (self.head % self.slots, self.worlds)
        for k, v in dict(actions=actions, rewards=rewards, discounts=discounts, good=torch.zeros_like(dones)).items():
            self.data[k][now] = v.to(self.device)
        for world in (dones & success.to(self.device)).nonzero()[:, 0].tolist():
            steps = torch.arange(int(self.start[world]), int(self.head[world]) + 1, device=self.device)
            self.data["good"][steps[-self.slots:] % self.slots, world] = True
        self._open(self.head + 1, final_obs, dones)
        self.head += 1 + dones
        self._open(self.head, next_obs)  # the same slot, but where an episode ended
        self.start = torch.where(dones, self.head, self.start)

    def cut(self, obs: dict):
        """Begin new episodes everywhere with `obs`: the present ones end here, as by time-outs."""
        self.data["last"][self.head % self.slots, self.worlds] = True
        self.head += 1
        self.start = self.head.clone()
        self._open(self.head, obs)

    def __len__(self) -> int:
        """Slots in use, those of final observations included."""
        return int((self.head + 1).clamp(max=self.slots).sum())

    def _observe(self, slot, world) -> dict:
        return {k: self.data[k][slot % self.slots, world] for k in self.keys}

    def _draw(self, batch_size: int, generator, newest) -> tuple:
        """Slots (B,) and environments (B,) of steps, uniform up to `newest` (N,); never a final observation."""
        draw = torch.rand((5, batch_size), dtype=torch.float64, generator=generator, device=self.device)
        world = (draw[0] * len(self.worlds)).long()
        newest = newest[world]
        span = (newest + 1).clamp(min=1, max=self.slots - self.n_step - 2)
        slot = newest - (draw[1] * span).long()
        for again in draw[2:]:  # no step starts at a final observation: draw anew, three times
            slot = torch.where(self.data["last"][slot % self.slots, world], newest - (again * span).long(), slot)
        return slot - self.data["last"][slot % self.slots, world].long(), world  # once in length^4: the step before

    def sample(self, batch_size: int, generator: torch.Generator, until: torch.Tensor | None = None) -> dict:
        """B transitions of n steps, uniform over environments and their stored steps, or those before `until` (N,).

        -> obs, next_obs (dicts), actions (B, A), rewards (B,) = sum of gamma^i x discounts before x r_i,
        discounts (B,) = gamma^n x product of the n discounts. At an episode's end the sum stops, with fewer steps, and
        next_obs is the final observation. Windows that the write head crosses are left out.
        """
        data, n = self.data, self.n_step
        slot, world = self._draw(batch_size, generator, (self.head if until is None else until.to(self.device)) - n)
        end, rewards = slot, torch.zeros(batch_size, device=self.device)
        discounts, running = torch.ones_like(rewards), torch.ones_like(world, dtype=torch.bool)
        for _ in range(n):
            at = (end % self.slots, world)
            rewards = rewards + running * discounts * data["rewards"][at]
            discounts = torch.where(running, discounts * self.gamma * data["discounts"][at], discounts)
            end = end + running
            running = running & ~data["last"][end % self.slots, world]
        return dict(obs=self._observe(slot, world), next_obs=self._observe(end, world), rewards=rewards,
                    discounts=discounts, actions=data["actions"][slot % self.slots, world])

    def sample_chunks(self, batch_size: int, chunk: int, generator: torch.Generator) -> dict:
        """For cloning: obs, the `chunk` actions from there on (B, K, A), weights (B, K): 0 beyond a good episode."""
        slot, world = self._draw(batch_size, generator, self.head - 1)
        at, world_of = slot[:, None] + torch.arange(chunk, device=self.device), world[:, None]
        inside, at = at < self.head[world_of], at % self.slots
        ended = (self.data["last"][at, world_of] | ~inside).long().cumsum(1) > 0
        weights = (~ended & self.data["good"][at, world_of]).float()
        return dict(obs=self._observe(slot, world), actions=self.data["actions"][at, world_of], weights=weights)

    def state_dict(self) -> dict:
        used = min(self.slots, int(self.head.max()) + 1)
        return {k: v if used == self.slots else v[:used].clone() for k, v in self.data.items()} | dict(
            head=self.head, start=self.start)

    def load_state_dict(self, state: dict):
        self.head.copy_(state["head"]), self.start.copy_(state["start"])
        for k, v in self.data.items():
            v[: len(state[k])] = state[k]


@torch.no_grad()
def store_demos(demos: list[dict], policy, args: Args, device) -> Replay:
    """Demonstrations as a buffer of one environment, relabelled: at each step the base's action, from a queue that

    begins anew with every demonstration. All demonstrations step through the base side by side.
    """
    lengths = torch.tensor([len(demo["actions"]) for demo in demos])
    begins, slots = (lengths + 1).cumsum(0) - lengths - 1, int(lengths.sum()) + len(demos)  # begins: first slots
    queue, replay = Queue(policy, len(demos), args, demos[0]["actions"].shape[1], device), None
    for t in range(int(lengths.max()) + 1):
        now = [{k: v[t] for k, v in demo["obs"].items()} if t < length else demo["final_obs"] or
               {k: v[-1] for k, v in demo["obs"].items()} for demo, length in zip(demos, lengths, strict=True)]
        now = {k: torch.from_numpy(np.stack([obs[k] for obs in now])).to(device) for k in now[0]}  # (D, ...)
        now, there = observe(now) | queue.act(now), t <= lengths
        replay = replay or Replay({k: v[:1] for k, v in now.items()}, demos[0]["actions"].shape[1],
                                  slots + args.n_step + 3, args.n_step, args.gamma, device)
        for k, v in now.items():
            replay.data[k][begins[there] + t, 0] = v[there]
    for demo, begin, end in zip(demos, begins, begins + lengths, strict=True):
        replay.data["actions"][begin:end, 0] = torch.from_numpy(demo["actions"]).to(device)
        replay.data["rewards"][end - 1], replay.data["discounts"][begin:end - 1] = 1.0, 1.0
        replay.data["good"][begin:end], replay.data["last"][end] = True, True
    replay.head += slots
    return replay


# --- Update functions -------------------------------------------------------------------------------------------------
def clone_loss(base: ChunkPolicy, batch: dict, generator: torch.Generator):
    """Mean absolute error of the chunks (ACT), or mean squared error of the flow's velocity; weights (B, K) say where.

    Flow: at x = (1 - u) noise + u actions, with u uniform in [0, 1], the velocity is actions - noise.
    """
    actions, weights, memory = batch["actions"], batch["weights"], base.memory(batch["obs"])
    if base.flow:
        noise = torch.randn(actions.shape, generator=generator, device=actions.device)
        u = torch.rand(len(actions), generator=generator, device=actions.device)
        x = noise + u[:, None, None] * (actions - noise)
        error = (base.decode(memory, x, u) - (actions - noise)).square()
    else:
        error = (base.decode(memory) - actions).abs()
    return (error.mean(-1) * weights).sum() / weights.sum().clamp(min=1)


def propose(base, residual, args: Args):
    """Eq. 2 (B, A): base and residual, or the actor's own action, kept in [-1, 1] without losing the gradient."""
    actions = base + residual if adds_to_base(args) else residual
    return actions + (actions.clamp(-1, 1) - actions).detach()


def bounded(residual, noise, limit):
    """Residual and noise, together within [-l, l]."""
    return torch.clamp(residual + noise, -limit, limit)


@torch.no_grad()
def select(agent: Agent, x, base, proposal, scale: float, args: Args, heads=slice(None)):
    """Eq. 6: the proposal (B, A) where the target critics prefer it, elsewhere the base's action. -> actions, took (B,)

    "agree" asks all heads, whether their mean advantage exceeds kappa standard deviations, more of them while `scale`,
    the share of the residual that is let through, is below 1; "min" is IBRL's choice by the smaller value of `heads`.
    """
    if args.gate == "none" or args.mode == "rlpd":
        return proposal, torch.ones(len(base), dtype=torch.bool, device=base.device)
    heads = slice(None) if args.gate == "agree" else heads
    new, old = agent.critics_target(x.repeat(2, 1), torch.cat([proposal, base]), heads).chunk(2, 1)  # (H, B) each
    gain = new.amin(0) - old.amin(0)
    if args.gate == "agree":
        gain = (new - old).mean(0) - (args.kappa + args.caution * (1 - scale)) * (new - old).std(0)
    took = gain > args.margin
    return torch.where(took[:, None], proposal, base), took


def draw_chance(args: Args, batch_size: int, action_dim: int, generator: torch.Generator) -> dict:
    """All chance of one update but the batch: noise (B, A), two heads for the target, two shifts (B, 2)."""
    on = dict(generator=generator, device=generator.device)
    shifts = [torch.randint(0, 2 * args.pad + 1, (batch_size, 2), **on) for _ in range(2)]
    return dict(noise=torch.randn((batch_size, action_dim), **on), heads=torch.randperm(args.heads, **on)[:2],
                shift=shifts[0], next_shift=shifts[1])


def random_shift(obs: dict, offsets: torch.Tensor, pad: int) -> dict:
    """Its pictures moved by `offsets` (B, 2) - pad pixels, edges repeated; the rest as it is."""
    if "rgb" not in obs:
        return obs
    b, h, w, _ = obs["rgb"].shape
    y = (torch.arange(h, device=offsets.device) + offsets[:, :1] - pad).clamp(0, h - 1)  # (B, H)
    x = (torch.arange(w, device=offsets.device) + offsets[:, 1:] - pad).clamp(0, w - 1)
    picture = torch.arange(b, device=offsets.device)
    return obs | {"rgb": obs["rgb"][picture[:, None, None], y[:, :, None], x[:, None, :]]}


def critic_loss(agent: Agent, batch: dict, chance: dict, scale: float, args: Args):
    """Eqs. 3 and 4; `scale` is the share of the residual that is let through. -> loss, features, metrics"""
    with torch.no_grad():
        after = agent.encoder(random_shift(batch["next_obs"], chance["next_shift"], args.pad))
        base = batch["next_obs"]["base"]
        noise = (args.noise * chance["noise"]).clamp(-args.noise_clip, args.noise_clip)
        following = propose(base, bounded(scale * agent.actor_target(after, base), noise, agent.actor.limit), args)
        next_q = agent.critics_target(after, following, chance["heads"]).amin(0)
        if args.gate != "none":  # the better of proposal and base, by the same pair of heads
            next_q = torch.maximum(next_q, agent.critics_target(after, base, chance["heads"]).amin(0))
        targets = batch["rewards"] + batch["discounts"] * next_q
    x = agent.encoder(random_shift(batch["obs"], chance["shift"], args.pad))
    q = agent.critics(x, batch["actions"])
    loss = (q - targets).square().mean()  # differs (4)
    metrics = {"loss/qf": loss, "train/q": q.mean(), "train/q_spread": q.std(0).mean(), "train/target": targets.mean()}
    return loss, x.detach(), {name: v.detach() for name, v in metrics.items()}


def actor_loss(agent: Agent, batch: dict, x, scale: float, args: Args):
    """Eq. 5, on features (B, E) without their gradient. -> loss, metrics"""
    base = batch["obs"]["base"]
    residual = agent.actor(x, base)
    share = residual / agent.actor.limit.clamp(min=1e-6)
    q = agent.critics(x, propose(base, scale * residual, args)).mean(0)
    loss = -q.mean() + args.trust * share.square().mean()
    return loss, {"loss/actor": loss.detach(), "train/residual": share.detach().abs().mean()}


def descend(loss, optimizer, clip: float):
    """One step, the gradient's norm at most `clip`."""
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for group in optimizer.param_groups:
        nn.utils.clip_grad_norm_(group["params"], clip)
    optimizer.step()


@torch.no_grad()
def target_update(target: nn.Module, net: nn.Module, tau: float):
    """Polyak: target <- (1 - tau) target + tau net."""
    torch._foreach_lerp_(list(target.parameters()), list(net.parameters()), tau)


def update(agent: Agent, batch: dict, chance: dict, scale: float, with_actor: bool, args: Args) -> dict:
    """One step of encoder and critics, with `with_actor` one of the actor too, then their targets."""
    loss, x, metrics = critic_loss(agent, batch, chance, scale, args)
    descend(loss, agent.optimizers["critics"], args.grad_clip)
    if with_actor:
        agent.critics.requires_grad_(False)  # spares the critics' own gradients, which nobody would use
        loss, more = actor_loss(agent, batch, x, scale, args)
        agent.critics.requires_grad_(True)
        descend(loss, agent.optimizers["actor"], args.grad_clip)
        target_update(agent.actor_target, agent.actor, args.tau)
        metrics |= more
    target_update(agent.critics_target, agent.critics, args.tau)
    return metrics


@torch.no_grad()
def ppo_rows(agent: Agent, steps: list[dict], args: Args) -> dict:
    """Steps of N environments -> rows (B, ...) of obs, raw residuals, their log probability (but for a constant; the

    deviation stays --noise), returns and generalised advantages, lambda 0.95. A state's value is the mean of the
    critics at the base's action.
    """
    obs, after = join([step["log"]["obs"] for step in steps]), join([step["final_obs"] for step in steps])
    mean, raw = (torch.cat([step["log"][k] for step in steps]) for k in ("mean", "raw"))
    rewards, discounts, dones = (torch.stack([step[k] for step in steps]).float()
                                 for k in ("rewards", "discounts", "dones"))
    values, next_values = (agent.critics(agent.encoder(part), part["base"]).mean(0).view_as(rewards)
                           for part in (obs, after))
    advantages = rewards + args.gamma * discounts * next_values - values
    for t in range(len(advantages) - 2, -1, -1):
        advantages[t] += args.gamma * 0.95 * (1 - dones[t]) * advantages[t + 1]
    return obs | dict(raw=raw, log_prob=-((raw - mean) / args.noise).square().sum(-1) / 2,
                      returns=(advantages + values).flatten(), advantages=advantages.flatten())


def ppo_loss(agent: Agent, rows: dict, args: Args):
    """Clipped policy gradient and the critics' squared errors. -> loss, metrics"""
    x, a = agent.encoder(rows), rows["advantages"]
    move = (rows["raw"] - agent.actor(x.detach(), rows["base"])) / args.noise
    ratio = (-move.square().sum(-1) / 2 - rows["log_prob"]).exp()
    a = (a - a.mean()) / (a.std() + 1e-8)
    policy = -torch.minimum(ratio * a, ratio.clamp(0.8, 1.2) * a).mean()
    values = (agent.critics(x, rows["base"]) - rows["returns"]).square().mean()
    return policy + 0.5 * values, {"loss/actor": policy.detach(), "loss/qf": values.detach()}


def join(batches: list[dict]) -> dict:
    """Batches (dicts of tensors or of dicts) one after the other."""
    return {k: join([batch[k] for batch in batches]) if isinstance(v, dict) else torch.cat([b[k] for b in batches])
            for k, v in batches[0].items()}


class Learner:
    """Runs the updates that are owed, and keeps their metrics."""

    def __init__(self, agent: Agent | None, base, replay: Replay | None, demos: Replay | None, args: Args, generator):
        self.agent, self.base, self.replay, self.demos = agent, base, replay, demos
        self.args, self.generator, self.optimizers = args, generator, agent.optimizers if agent else {}
        self.now, self.metrics = dict(owed=0.0, updates=0), {}
        self.until, self.steps = None, []  # head of the buffer at the end of warm-up; of OnPolicy: steps to learn from

    def add(self, step: dict):
        """Store a step of every environment, as `Collector.step` gives it."""
        self.replay.add(**{k: v for k, v in step.items() if k != "log"})

    def batch(self) -> dict:
        """Online steps, demonstrations and, with --anchor, steps of warm-up."""
        args, share = self.args, self.args.offline
        if args.mode == "ibrl":  # demonstrations lie in one buffer with the rest
            share = len(self.demos) / (len(self.demos) + len(self.replay)) if self.demos else 0.0
        offline = round(share * args.batch_size)
        anchor = round(args.anchor * args.batch_size) if self.until is not None else 0
        parts = ((self.demos, offline, None), (self.replay, anchor, self.until),
                 (self.replay, args.batch_size - offline - anchor, None))
        return join([buffer.sample(size, self.generator, until) for buffer, size, until in parts if size])

    def step(self, scale: float, with_actor: bool):
        """One update."""
        batch = self.batch()
        chance = draw_chance(self.args, *batch["actions"].shape, self.generator)
        self.note(update(self.agent, batch, chance, scale, with_actor, self.args))

    def run(self, transitions: int, scale: float, hold: bool, most: int):
        """The updates owed for `transitions` more of them, at most so many; with `hold` the actor rests."""
        self.now["owed"] += transitions * self.args.utd
        for _ in range(min(int(self.now["owed"]), most)):
            self.now["owed"] -= 1
            self.now["updates"] += 1
            self.step(scale, not hold and self.now["updates"] % self.args.policy_frequency == 0)

    def anneal(self, share: float):
        """Set all step sizes to this share of what they were at first."""
        for group in (group for optimizer in self.optimizers.values() for group in optimizer.param_groups):
            group["lr"] = share * group.setdefault("first_lr", group["lr"])

    def note(self, metrics: dict):
        for name, value in metrics.items():
            self.metrics.setdefault(name, []).append(float(value))

    def read(self) -> dict[str, float]:
        """Mean metrics since the last reading."""
        means = {name: sum(values) / len(values) for name, values in self.metrics.items()}
        self.metrics.clear()
        return means

    def state_dict(self) -> dict:
        return dict(now=self.now, until=self.until, steps=self.steps, optimizers={
            use: optimizer.state_dict() for use, optimizer in self.optimizers.items()},
            generator=self.generator.get_state(), rng=torch.get_rng_state())

    def load_state_dict(self, state: dict):
        self.now, self.until, self.steps = state["now"], state["until"], state["steps"]
        for use, optimizer in self.optimizers.items():
            optimizer.load_state_dict(state["optimizers"][use])
        self.generator.set_state(state["generator"]), torch.set_rng_state(state["rng"])


class Cloner(Learner):
    """Clones the base, from demonstrations alone or, with --mode filtered-bc, half from its own successes."""

    def __init__(self, *parts, **options):
        super().__init__(*parts)
        self.optimizers = {"base": torch.optim.AdamW(self.base.parameters(), self.args.bc_lr, **options)}

    def step(self, scale: float = 1.0, with_actor: bool = False):
        buffers = [self.demos, self.replay] if self.replay is not None else [self.demos]
        size = self.args.bc_batch_size // len(buffers)
        self.base.train()
        batch = join([buffer.sample_chunks(size, self.args.chunk, self.generator) for buffer in buffers])
        loss = clone_loss(self.base, batch, self.generator)
        descend(loss, self.optimizers["base"], 10.0)
        self.base.eval()
        self.note({"loss/clone": loss.detach()})


class OnPolicy(Learner):
    """--mode ppo-residual: instead of all above, clipped policy gradients on the steps since the last update."""

    def __init__(self, *parts):
        super().__init__(*parts)
        groups = ((self.agent.actor.parameters(), self.args.actor_lr), (self.agent.values, self.args.lr))
        self.optimizers = {"ppo": torch.optim.Adam([{"params": ps, "lr": lr} for ps, lr in groups], eps=1e-5)}

    def add(self, step: dict):
        self.steps.append(step)

    def run(self, transitions: int, scale: float, hold: bool, most: int):
        if len(self.steps) * transitions < self.args.ppo_rollout:
            return
        rows = ppo_rows(self.agent, self.steps, self.args)
        for _ in range(10):
            for at in torch.randperm(len(rows["raw"]), generator=self.generator, device=rows["raw"].device).split(256):
                loss, metrics = ppo_loss(self.agent, {k: v[at] for k, v in rows.items()}, self.args)
                descend(loss, self.optimizers["ppo"], 0.5)
                self.note(metrics | {"train/q": rows["returns"].mean()})
        self.steps.clear()


# --- evaluate ---------------------------------------------------------------------------------------------------------
@torch.no_grad()
def evaluate(policy, env, args: Args, video: Path | None = None) -> dict:
    """Whole episodes without noise, fixed seeds. -> metrics; ci_low and ci_high: Wilson's interval, 95 %"""
    n, frames, took, episodes = args.eval_episodes, [], [], []  # episodes: success and length of those that end
    for seed in range(EVAL_SEED, EVAL_SEED + n // env.num_envs):
        obs, running = env.reset(seed=seed), torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        policy.reset(env.num_envs)
        for _ in range(env.max_episode_steps):
            if video and seed == EVAL_SEED:
                frames.append(np.concatenate(list(env.render(range(min(4, env.num_envs)), size=160)), 1))
            actions = policy.act(obs)
            took.append(policy.took[running].float().mean())
            obs, _, terminations, truncations, info = env.step(actions)
            ends = terminations | truncations
            ended = [info["episode"][k][running & ends].float() for k in ("success_at_end", "length")]
            episodes.append(torch.stack(ended))
            running &= ~ends  # each world counts once
            if not running.any():
                break
            policy.queue.reset(ends)
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=max(1, round(env.control_hz)), macro_block_size=1)
    (rate, length), z = torch.cat(episodes, 1).mean(1).tolist(), 1.96
    middle, wide = (rate + z * z / (2 * n)) / (1 + z * z / n), z / (1 + z * z / n) * math.sqrt(
        rate * (1 - rate) / n + z * z / (4 * n * n))
    return {"eval/success_rate": rate, "eval/ci_low": middle - wide, "eval/ci_high": middle + wide,
            "eval/length": length, "eval/took": float(torch.stack(took).mean())}


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
    if not isinstance(checkpoint, dict) or checkpoint.get("algo") != "resfit":
        raise ValueError(f"{path} is not a checkpoint of resfit")
    return checkpoint


def check_fits(checkpoint: dict, args: Args, shapes: dict, fields: tuple[str, ...]):
    """Raises ValueError naming the first of `fields` or `shapes` in which the checkpoint differs from this run."""
    theirs, mine = checkpoint["args"] | checkpoint["shapes"], asdict(args) | shapes
    for field in (*fields, *shapes):
        if theirs[field] != mine[field]:
            raise ValueError(f"the checkpoint differs in {field}: it has {theirs[field]}, this run {mine[field]}")


def load_named(text: str):
    """What `module:name` stands for, modules of the working folder included."""
    module, _, name = text.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        return getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError, ValueError) as error:
        raise ValueError(f"{text} must be module:callable ({error})") from error


def load_base(args: Args, shapes: dict, env, device, weights: dict | None = None):
    """-> the base: None, the black box of --base-policy (called with `env`), or a ChunkPolicy with `weights`."""
    if args.mode == "rlpd":
        return None
    if args.base_policy:
        return load_named(args.base_policy)(env)
    base = ChunkPolicy(shapes, args).to(device)
    if weights:
        base.load_state_dict(weights)
    return base.eval()


# --- Policy -----------------------------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out: base, its queue, residual and gate, from one checkpoint (file or its content).

    A black-box base is called with `env`, None on a robot.
    """

    def __init__(self, source: str | Path | dict, device: str | torch.device = "cpu", env=None):
        checkpoint = source if isinstance(source, dict) else load_file(source)
        self.args, self.spec, self.shapes = Args(**checkpoint["args"]), checkpoint["spec"], checkpoint["shapes"]
        self.device, self.now = torch.device(device), checkpoint["now"]
        self.base = load_base(self.args, self.shapes, env, device, checkpoint["base"])
        self.agent = Agent(self.args, self.shapes, self.device) if checkpoint["agent"] else None
        if self.agent:
            self.agent.load_state_dict(checkpoint["agent"])
        self.reset(1)

    def reset(self, num_envs: int = 1):
        """Begin episodes in `num_envs` environments. (`queue.reset(worlds)` begins some of them.)"""
        self.queue = Queue(self.base, num_envs, self.args, self.shapes["action"], self.device)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs of the environment, (N, ...) -> actions (N, A). `took` (N,) tells where the residual was let through."""
        obs = {k: torch.as_tensor(v, device=self.device) for k, v in obs.items()}
        label, self.took = self.queue.act(obs), torch.zeros(len(obs["state"]), dtype=torch.bool, device=self.device)
        if self.agent is None or self.args.mode == "filtered-bc":
            return label["base"]
        x, base, scale = self.agent.encoder(observe(obs) | label), label["base"], self.now["scale"]
        proposal = propose(base, scale * self.agent.actor(x, base), self.args)
        actions, self.took = select(self.agent, x, base, proposal, scale, self.args)
        return actions


# --- train ------------------------------------------------------------------------------------------------------------
class Collector:
    """Steps the training environments by (2) and (6) and says what the buffer is to store."""

    def __init__(self, args: Args, env, base, agent: Agent, device, state: dict | None = None):
        self.args, self.env, self.agent = args, env, agent
        self.queue = Queue(base, env.num_envs, args, env.action_dim, device)
        self.generator = torch.Generator(device).manual_seed(1_000_003 * args.seed)
        self.judge = load_named(args.judge) if args.judge else None
        self.left, self.noisy = [], torch.zeros(env.num_envs, dtype=torch.bool, device=device)  # left: to be stored
        self.begin(env.reset(seed=args.seed), torch.ones_like(self.noisy))
        if state:  # go on from there
            env.load_state_dict(pickle.loads(state["env"])), self.queue.load_state_dict(state["queue"])
            self.now, self.noisy = {k: v.to(device) for k, v in state["now"].items()}, state["noisy"].to(device)
            self.generator.set_state(state["generator"])

    def begin(self, obs: dict, worlds: torch.Tensor):
        """Act on `obs` next; episodes begin in `worlds`, a mask (N,), with or without noise in warm-up."""
        self.queue.reset(worlds)
        self.now = observe(obs) | self.queue.act(obs)
        draw = torch.rand(len(worlds), generator=self.generator, device=self.generator.device)
        self.noisy = torch.where(worlds, draw >= self.args.warmup_clean, self.noisy)

    def collect(self, wait: bool, **order):
        """Take a step now. (Its stand-in under --async finds those that were taken; at least one with `wait`.)"""
        self.left.append(self.step(**order))

    @torch.no_grad()
    def step(self, warm: bool = True, scale: float = 1.0, weights: dict | None = None) -> dict:
        """One step of every environment -> arguments for `Replay.add`, and under "log" what else to count.

        `weights`: the agent's from now on, under --async.
        """
        if weights:
            self.agent.load_state_dict(weights)
        args, limit, base, log = self.args, self.agent.actor.limit, self.now["base"], {}
        on = dict(generator=self.generator, device=base.device)
        actions, took = base, torch.zeros(len(base), dtype=torch.bool, device=base.device)
        if warm:
            noise = (torch.rand(base.shape, **on) * 2 - 1) * torch.clamp(limit, max=args.warmup_noise)
            actions = (base + noise * self.noisy[:, None]).clamp(-1, 1)
        elif args.mode != "filtered-bc":
            x, noise = self.agent.encoder(self.now), args.noise * torch.randn(base.shape, **on)
            mean, heads = scale * self.agent.actor(x, base), torch.randperm(args.heads, **on)[:2]
            proposal = propose(base, bounded(mean, noise, limit), args)
            actions, took = select(self.agent, x, base, proposal, scale, args, heads)
            if args.mode == "ppo-residual":
                log = dict(obs=self.now, mean=mean, raw=mean + noise)
        obs, _, terminations, truncations, info = self.env.step(actions)
        verdict = self.judge(info["final_obs"]) if self.judge else None
        if verdict is not None:  # a person ends the episode
            terminations = torch.ones_like(terminations)
            info["success"], obs = terminations & verdict, self.env.reset()
        dones, final = terminations | truncations, observe(info["final_obs"])
        label = self.queue.peek(info["final_obs"]) if dones.any() else None  # from the old queue; differs (3)
        self.begin(obs, dones)
        ended, success = terminations if args.bootstrap_on_timeout else dones, info["success"] & dones
        log |= dict(took=float(took.float().mean()), moved=float((actions - base).abs().mean()))
        return dict(actions=actions, rewards=info["success"].float(), discounts=(~ended).float(), dones=dones, log=log,
                    success=success, final_obs=final | (label or {k: self.now[k] for k in ("base", "phase")}),
                    next_obs=self.now)

    def state_dict(self) -> dict:
        return dict(env=pickle.dumps(self.env.state_dict()), queue=self.queue.state_dict(), now=self.now,
                    noisy=self.noisy, generator=self.generator.get_state())


def open_apart(make, args: Args, content: dict, state: dict | None) -> Collector:
    """The collector of --async, in the process that envs/apart.py starts for it."""
    torch.set_num_threads(1)
    env, eval_env = make(args, torch.device(args.device))
    eval_env.close()
    policy = Policy(content, args.device, env)
    return Collector(args, env, policy.base, policy.agent, args.device, state)


def check_finite(modules: dict, metrics: dict, when: str, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    values = {f"{name}.{k}": v for name, module in modules.items() for k, v in module.state_dict().items()}
    for name, value in (values | {k: torch.tensor(v) for k, v in metrics.items()}).items():
        if not value.isfinite().all():
            good = checkpoint if checkpoint.exists() else "none yet"
            raise FloatingPointError(f"{name} is not finite at {when}; last good checkpoint: {good}")


def write_row(path: Path, row: dict, track: bool, video: Path | None = None):
    """Append to a CSV file, whose first row names the columns; with `track` it goes to Weights & Biases too."""
    rows = [row.values()] if path.exists() else [row.keys(), row.values()]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
    if track:
        import wandb
        wandb.log(row | ({"eval/video": wandb.Video(str(video))} if video else {}))


# same in: squint_sac.py, drqv2.py, sac_pixels.py, sapo_rewarped.py, ppo_mjx_go1.py, resfit.py
def forget_after(path: Path, global_step: int):
    """Drop the rows of a CSV file that come after the checkpoint which is resumed."""
    if path.exists():
        rows = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(rows[:1] + [row for row in rows[1:] if int(row.partition(b",")[0]) <= global_step]))


def clone(learner: Cloner, valid: Replay | None, run: Path, evaluate_now, content):
    """Phase 1: trains the base in place; `valid`: demonstrations kept apart, `content()`: the rest of a checkpoint."""
    args, base, now = learner.args, learner.base, learner.now
    for done in tqdm(range(now["updates"] + 1, args.bc_steps + 1), "cloning", args.bc_steps, initial=now["updates"],
                     unit="update", mininterval=1):
        learner.step()
        now["updates"] = done
        if done % args.bc_eval_freq and done < args.bc_steps:
            continue
        row = {"bc_step": done, "wall_time": time.time() - START} | learner.read()
        if valid is not None:
            test = torch.Generator(learner.generator.device).manual_seed(0)
            with torch.no_grad():
                row["loss/valid"] = float(clone_loss(base, valid.sample_chunks(1024, args.chunk, test), test))
        check_finite({"base": base}, row, f"update {done} of cloning", run / "checkpoint.pt")
        row["eval/success_rate"] = evaluate_now()["eval/success_rate"]
        write_row(run / "clone.csv", row, args.track)
        print(f"cloning, {done} updates: success {row['eval/success_rate']:.3f}")
        save(run / "checkpoint.pt", content() | dict(phase="clone", learner=learner.state_dict()))


def train(args: Args) -> dict:
    """Clone, then train the residual; or with --evaluate only evaluate.

    -> metrics of the last evaluation, counters, and `run`, the folder. Raises ValueError, FileNotFoundError or
    ImportError for arguments that do not fit, FloatingPointError at the first NaN, ChildProcessError where an actor
    apart fails.
    """
    args.check()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    name = args.name or time.strftime(f"{args.env_id}__resfit-{args.mode}__s{args.seed}__%Y%m%d-%H%M%S")
    run = Path(args.resume or Path("runs") / name)
    if not args.resume and (run / "args.json").exists():
        raise ValueError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    source = run / "checkpoint.pt" if args.resume else args.checkpoint or args.base_from
    given = load_file(source) if source else {}
    saved = given if args.resume or args.checkpoint else {}  # else it is given for its base alone

    env, eval_env = make_envs(args, device)
    parts = None if args.evaluate else read_demos(args)
    shapes = dict(cameras=eval_env.image_shape[2] // 3 * (args.obs == "pixels"), action=eval_env.action_dim,
                  state=eval_env.state_dim + eval_env.privileged_dim)
    if given:
        check_fits(given, args, shapes, BASE_FIELDS + AGENT_FIELDS * bool(saved) + BOUND_FIELDS * bool(args.resume))
    if args.resume and saved["phase"] == "residual" and not saved["replay"]:
        raise ValueError("no replay buffer was saved (--save-buffer), so this run cannot go on")
    if args.resume and not {"now", "until", "steps"} <= saved["learner"].keys():
        raise ValueError(f"{run} was written by an older resfit.py: --evaluate still takes it, --resume does not")
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    print(f"{run}: {args.env_id}, {args.mode}, recipe {args.recipe}; defaults changed by TUNED: "
          f"{tuned_defaults(args.env_id, args.device, args.mode, args.recipe)}")
    now = dict(global_step=0, best=-1.0, wall_time=0.0, train_time=0.0, scale=1.0, fallback=1.0, base_success=0.0,
               lowest=1.0, episodes=0, judged=0, outcomes=[]) | saved.get("now", {})
    base, agent = load_base(args, shapes, env, device, given.get("base")), None
    cloned, off_policy = isinstance(base, ChunkPolicy), args.mode in OFF_POLICY

    def content() -> dict:  # all that Policy needs
        return dict(algo="resfit", args=asdict(args), shapes=shapes, spec=json.loads(json.dumps(eval_env.spec)),
                    versions=dict(torch=str(torch.__version__), numpy=np.__version__), now=dict(now),
                    base=base.state_dict() if cloned else None, agent=agent.state_dict() if agent else None)

    def evaluate_now(video: Path | None = None, whole: dict | None = None) -> dict:
        return evaluate(Policy(whole or content(), device, eval_env), eval_env, args, video)

    if args.evaluate:
        results = evaluate_now(run / "videos/evaluate.mp4" if args.capture_video else None, saved)
        print(json.dumps(results))
        eval_env.close()
        return results | {"run": str(run)}
    if args.track:
        import wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), name=run.name, config=asdict(args))

    # phase 1: cloning
    generator = torch.Generator(device).manual_seed(1_000_003 * args.seed + 1)
    if cloned and (saved["phase"] == "clone" if saved else not given):
        stored, valid = (store_demos(part, None, args, device) if part else None for part in parts)
        cloner = Cloner(None, base, None, stored, args, generator, weight_decay=1e-4, fused=True)
        if saved:
            cloner.load_state_dict(saved["learner"])
            forget_after(run / "clone.csv", cloner.now["updates"])
        else:
            base.normalize.fit(stored.data["state"][: int(stored.head), 0])
        clone(cloner, valid, run, evaluate_now, content)
        saved = {}
    if cloned:
        base.eval().requires_grad_(args.mode == "filtered-bc")
        save(run / "base.pt", content())
    if args.bc_only:
        return {"run": str(run)}

    # phase 2: the residual
    demos = store_demos(parts[0], base, args, device) if parts else None
    if not saved:
        now["base_success"] = evaluate_now()["eval/success_rate"]
    torch.manual_seed(args.seed + 1)  # so that the first weights do not depend on the cloning
    agent = Agent(args, shapes, device)
    if demos:
        agent.encoder.normalize.fit(demos.data["state"][: int(demos.head), 0])
    elif cloned:
        agent.encoder.normalize.load_state_dict(base.normalize.state_dict())
    if args.async_:
        env.close()
        collector = importlib.import_module("envs.apart").Apart(
            open_apart, (make_envs, args, content(), saved.get("collector")), run / "journal.pkl", args.save_buffer,
            args.async_queue, lambda: {"weights": {k: v.cpu() for k, v in agent.state_dict().items()}})
    else:
        collector = Collector(args, env, base, agent, device, saved.get("collector"))
    replay = Replay(collector.now, shapes["action"], args.buffer_size // args.num_envs, args.n_step, args.gamma, device)
    kind = {"filtered-bc": Cloner, "ppo-residual": OnPolicy}.get(args.mode, Learner)
    learner = kind(agent, base, replay, demos, args, generator)
    if saved:
        for part, key in ((agent, "agent"), (learner, "learner"), (replay, "replay")):
            part.load_state_dict(saved[key])
        for file in ("metrics.csv", "eval.csv"):
            forget_after(run / file, now["global_step"])
    first, born, begin, results = dict(now), START - now["wall_time"], time.perf_counter() - now["train_time"], {}
    bar = tqdm(total=args.total_timesteps, initial=now["global_step"], unit="step", mininterval=1)

    def take_all() -> int:
        """Store the steps that wait in the collector. -> transitions"""
        before = now["global_step"]
        while collector.left:
            step = collector.left.pop(0)
            learner.add(step)
            learner.note({f"train/{k}": step["log"][k] for k in ("took", "moved")})
            outcomes = step["success"][step["dones"]].tolist()
            now["outcomes"], now["episodes"] = [*now["outcomes"], *outcomes][-ROLLING:], now["episodes"] + len(outcomes)
            now["global_step"] += args.num_envs
            if len(now["outcomes"]) == ROLLING:
                now["lowest"] = min(now["lowest"], sum(now["outcomes"]) / ROLLING)
        return now["global_step"] - before

    def rolling(otherwise: float) -> float:
        return sum(now["outcomes"]) / len(now["outcomes"]) if now["outcomes"] else otherwise

    def save_all(state: dict | None):
        save(run / "checkpoint.pt", content() | dict(
            phase="residual", learner=learner.state_dict(), collector=state,
            replay=replay.state_dict() if args.save_buffer else None))
        if args.async_:
            collector.forget()

    def evaluate_and_save(last: bool) -> dict:
        nonlocal begin
        pause = time.perf_counter()
        state = collector.state_dict()
        take_all()  # what an actor apart did before it told its state
        now.update(wall_time=time.time() - born, train_time=pause - begin)
        shown = args.capture_video and (last or not now["global_step"] or args.obs == "pixels")
        video = run / f"videos/step_{now['global_step']:09d}.mp4" if shown else None
        results = evaluate_now(video)
        success, training = results["eval/success_rate"], rolling(now["base_success"])
        write_row(run / "eval.csv", {k: now[k] for k in CLOCK} | results | {
            "train/rolling_success": training, "train/lowest": now["lowest"],
            "train/base_success": now["base_success"]}, args.track, video)
        bar.write(f"{now['global_step']} steps: success {success:.3f}, training {training:.3f}")
        if success >= now["best"]:
            now["best"] = success
            save(run / "best.pt", content())
        save_all(state)
        begin += time.perf_counter() - pause
        return results

    try:
        if not saved:
            results = evaluate_and_save(last=False)
        elif take_all() or not saved["collector"]:  # of a journal, or without the actor's state: new episodes
            replay.cut(collector.now)
        while now["global_step"] < args.total_timesteps:
            # act, step and store
            before, warm = now["global_step"], now["global_step"] < args.learning_starts and off_policy
            ramp = (before - args.learning_starts) / args.ramp_steps if args.ramp_steps else 1.0
            now["scale"] = min(max(ramp, 0.0), 1.0) * now["fallback"]
            if learner.now["owed"] <= args.async_queue * args.num_envs * max(args.utd, 1):  # an actor far ahead waits
                collector.collect(learner.now["owed"] < 1, warm=warm, scale=now["scale"])
            transitions = take_all()
            bar.update(transitions)
            if args.fallback and now["episodes"] - now["judged"] >= ROLLING // 2 and not warm:  # guard (e)
                worse = sum(now["outcomes"][-ROLLING // 2:]) / (ROLLING // 2) < now["base_success"] - args.fallback
                now["fallback"] = now["fallback"] / 2 if worse else min(1.0, now["fallback"] * 2)
                now["judged"] = now["episodes"]

            # update
            if not warm:
                if learner.until is None:
                    learner.until = replay.head.clone()
                    for _ in tqdm(range(args.critic_warmup * off_policy), "critic warm-up", mininterval=1, leave=False):
                        learner.step(0.0, False)
                if args.anneal:
                    learner.anneal(min(1.0, (1 - before / args.total_timesteps) / args.anneal))
                learner.run(transitions, now["scale"], now["fallback"] < 1, 1 if args.async_ else 10**9)

            # log
            last = now["global_step"] >= args.total_timesteps
            eval_due = last or before // args.eval_freq != now["global_step"] // args.eval_freq
            if eval_due or before // args.log_freq != now["global_step"] // args.log_freq:
                metrics = learner.read()
                check_finite({"agent": agent}, metrics, f"step {now['global_step']}", run / "checkpoint.pt")
                now.update(wall_time=time.time() - born, train_time=time.perf_counter() - begin)
                speed = (now["global_step"] - first["global_step"]) / (now["train_time"] - first["train_time"])
                metrics = {"train/rolling_success": rolling(0.0), "train/episodes": now["episodes"],
                           "train/scale": now["scale"], "train/took": 0.0, "train/moved": 0.0,
                           "train/nan_resets": int(env.nan_resets), "time/sps": speed} | metrics
                bar.set_postfix_str(f"success {rolling(0.0):.2f}")
                if "loss/actor" in metrics or "loss/clone" in metrics:  # the first row names the columns
                    write_row(run / "metrics.csv", {k: now[k] for k in CLOCK} | metrics, args.track)
            if eval_due:
                results = evaluate_and_save(last)
    except (ChildProcessError, KeyboardInterrupt):
        if args.async_:
            collector.drain()
            take_all()
            save_all(None)
            print(f"stopped; what was recorded is in {run}/checkpoint.pt: --resume {run}", file=sys.stderr)
        raise
    finally:
        for part in (bar, eval_env, collector if args.async_ else env):
            part.close()
    return results | {k: now[k] for k in (*CLOCK, "lowest", "base_success")} | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, ImportError, ChildProcessError, FloatingPointError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
