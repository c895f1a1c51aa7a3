"""Behaviour cloning in chunks: a network predicts the next K actions of a demonstrator.

From images it is a transformer, from a state alone a perceptron.

Trained by regression as in ACT (Zhao et al., arXiv 2304.13705), or by flow matching (Lipman et al.,
arXiv 2210.02747). With an observation o and the K actions a that were demonstrated from there on:

    act       mean |f(o) - a|                                                                  (1)
    flow      mean |v(o, x, u) - (a - z)|^2 at x = (1 - u) z + u a, z ~ N(0, 1), u ~ U(0, 1)   (2)
    policy    f(o), or z moved along v from u = 0 to 1 in eight steps; --execute of the K
              actions are executed, then the next chunk is predicted                           (3)
    ensemble  instead, a chunk at every step, and the mean of all that were planned for it,
              weighted by exp(-m i), i = 0 for the oldest; ACT's, with --ensemble m            (4)
    weights   those of the policy are w <- w + (1 - average) (net - w); the learning rate falls
              as half a cosine from --lr to 0                                                  (5)

Differences from the papers:
 1. ACT without its latent variable; (3) unless --ensemble says (4).
 2. Small networks: two convolutions a camera, no ResNet; two encoder layers and one decoder layer.
    Images are shifted by up to four pixels in training, a batch at a time.
 3. Demonstrations end at their first success; actions beyond it have no weight in (1) and (2).
 4. With --obs state the policy sees the simulator's true state in front of the joints.

A run leaves a checkpoint, best.pt, and the same policy as base.pt2, a program of torch.export that
runs without this file: forward(state (N, S)), with --obs pixels forward(state, rgb (N, H, W, C)),
-> actions float32 (N, K, A) in [-1, 1]. The flow draws its noise inside, from torch's global random
generator. base.json in it: env_id, obs, execute, image_size, cameras, state_dim, action_dim, algo.

Needs torch, numpy, tyro, tqdm, imageio with imageio-ffmpeg, h5py.
Commands, from the repository's root:
    demonstrations python -m envs.demos --env-id SO101ReachCube-v1 --episodes 100 --noise 0.3 \
                       --out reach.hdf5
    train          python algos/bc_chunk.py --env-id SO101ReachCube-v1 --demos reach.hdf5
    smallest run   python algos/bc_chunk.py --demos reach.hdf5 --device cpu
    evaluate       python algos/bc_chunk.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/bc_chunk.py --resume runs/NAME       (exactly; --steps may grow,
                       and then the learning rate rises again)

Expected result: SO101ReachCube-v1 from the true state, with the demonstrations above: 50 % of 64
episodes after 1,500 updates on a CPU (one seed). Not yet measured on a GPU.

Shapes: N environments, B batch, K actions of a chunk, A action dimensions, S state dimensions,
H, W, C of images (C is 3 a camera), D width, T tokens, M stored steps. global_step counts updates.
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
import numpy as np
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
FLOW_STEPS = 8  # Euler steps from noise to actions
GRAD_CLIP = 10.0  # largest norm of a gradient
PAD = 4  # largest random shift of images, pixels each way
HELD_OUT = 1024  # chunks for the validation loss

# --- Args -----------------------------------------------------------------------------------------
# (pattern of env ids, kind of device) -> defaults; later rows win
TUNED = {
    ("*", "cpu"): dict(
        dim=64,
        dropout=0.0,
        batch_size=64,
        steps=3_000,
        eval_freq=1_000,
        lr=5e-4,
        average=0.995,
        chunk=10,
        execute=5,
    ),
    ("SO101Reach*", "cpu"): dict(steps=1_500, eval_freq=500),
}


@dataclass
class Args:
    # run
    env_id: str = "SO101ReachCube-v1"  # task on which the policy is evaluated
    seed: int = 1  # of weights and minibatches
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    steps: int = 50_000  # updates
    eval_freq: int = 5_000  # updates between evaluations, each of which saves
    eval_episodes: int = 64  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 64  # of them at once; divides eval_episodes
    log_freq: int = 100  # updates between rows of metrics.csv
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to evaluate
    resume: str | None = None  # run folder to continue, with its arguments
    capture_video: bool = True  # write an mp4 of the last evaluation
    track: bool = False  # log to Weights & Biases too (project: WANDB_PROJECT)

    # environment and demonstrations
    demos: str = ""  # demonstrations, an HDF5 file in robomimic's layout
    obs: Literal["state", "pixels"] = "state"  # true state and joints, or images and joints
    image_size: int = 84  # pixels a side
    cameras: tuple[str, ...] = ("wrist",)  # of the task and the file

    # algorithm
    loss: Literal["act", "flow"] = "act"  # regression, or flow matching where experts disagree
    chunk: int = 20  # K, actions of a chunk
    execute: int = 20  # of them executed before the next query: K is open loop
    ensemble: float | None = None  # m of equation 4, 0.01 in ACT; None: equation 3
    dim: int = 256  # D, width of the transformer; the perceptron has 4 D
    dropout: float = 0.1  # in their layers
    lr: float = 1e-4  # AdamW learning rate at first
    average: float = 0.999  # share of its weights that the policy keeps at an update
    batch_size: int = 256  # chunks an update

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of everything


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
    need(args.demos or args.evaluate, "give --demos FILE, demonstrations in robomimic's layout")
    need(1 <= args.execute <= args.chunk, "--execute must be from 1 to --chunk")
    need(args.dim % 4 == 0, "--dim must be a multiple of 4: attention has four heads")
    whole_rounds = args.eval_episodes % args.eval_envs == 0
    need(whole_rounds, "--eval-episodes must be a multiple of --eval-envs")
    available = torch.cuda.is_available() or args.device == "cpu"
    need(available, "there is no CUDA device here: use --device cpu")


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
    """Command line -> Args. Defaults, and so --help, are those of the task, run or checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    defaults = Args(env_id=given.env_id, device=given.device, **tuned(given.env_id, given.device))
    if given.checkpoint:
        saved = Args(**load(given.checkpoint)["args"])
        defaults = replace(saved, name="", resume=None, device=given.device)
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
def make_envs(args: Args):
    """-> the evaluation environment, ending episodes at success; contract: envs/__init__.py."""
    try:
        import envs
        from envs.demos import fit
    except ModuleNotFoundError as error:
        message = "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        raise ValueError(message) from error
    pixels = args.obs == "pixels"
    robosuite = args.env_id.startswith("robosuite/")
    options = {}
    if args.demos:
        options = fit(args.demos, args.env_id, args.cameras if pixels else (), args.image_size)
    return envs.make(
        args.env_id,
        args.eval_envs,
        args.device,
        seed=EVAL_SEED,
        stagger=False,
        end_on_success=True,
        images=pixels,
        asymmetric=not pixels,
        render_size=args.image_size,
        cameras=args.cameras,
        samples_per_pixel=None if robosuite else 1,  # as demonstrations are recorded
        **options,
    )


def observe(obs: dict, pixels: bool) -> dict:
    """What the policy sees: "state" and "rgb", or "state" with the true state in front of it."""
    if pixels:
        return {"state": obs["state"], "rgb": obs["rgb"]}
    if "privileged" in obs:
        return {"state": torch.cat([obs["privileged"], obs["state"]], -1)}
    return {"state": obs["state"]}


# --- Networks -------------------------------------------------------------------------------------
class Tokens(nn.Module):
    """uint8 (N, H, W, C) -> (N, T, D): two convolutions a camera, 81 places of 84 x 84 pixels."""

    def __init__(self, cameras: int, dim: int, image_size: int):
        super().__init__()
        side = ((image_size - 8) // 4 - 2) // 2 + 1
        self.convs = nn.ModuleList()
        for _ in range(cameras):
            convs = nn.Sequential(nn.Conv2d(3, dim, 8, 4), nn.ReLU(), nn.Conv2d(dim, dim, 3, 2))
            self.convs.append(convs)
        self.place = nn.Parameter(0.02 * torch.randn(cameras * side**2, dim))

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float() / 255 - 0.5
        maps = []
        for convs, image in zip(self.convs, x.split(3, 1), strict=True):
            maps.append(convs(image).flatten(2))  # (B, D, places)
        return torch.cat(maps, -1).transpose(1, 2) + self.place


class Normalizer(nn.Module):
    """Rows in units of their deviation over the demonstrations."""

    def __init__(self, dims: int):
        super().__init__()
        self.register_buffer("mean", torch.zeros(dims))
        self.register_buffer("std", torch.ones(dims))

    def fit(self, rows: torch.Tensor, floor: float):
        """Take mean and deviation, at least `floor`, from rows (M, dims)."""
        self.mean.copy_(rows.mean(0))
        self.std.copy_(rows.std(0).clamp_min(floor))

    def forward(self, rows):
        return (rows - self.mean) / self.std

    def inverse(self, rows):
        return rows * self.std + self.mean


class Transformer(nn.Module):
    """state (N, S), rgb (N, H, W, C) -> memory (N, T, D) -> chunk (N, K, A)."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        dim, action_dim = args.dim, shapes["action"]
        options = dict(dropout=args.dropout, activation="gelu", batch_first=True, norm_first=True)
        self.state = nn.Sequential(nn.Linear(shapes["state"], dim), nn.GELU(), nn.Linear(dim, dim))
        self.tokens = Tokens(shapes["cameras"], dim, args.image_size)
        self.encoder = nn.ModuleList()
        for _ in range(2):
            self.encoder.append(nn.TransformerEncoderLayer(dim, 4, 4 * dim, **options))
        self.decoder = nn.TransformerDecoderLayer(dim, 4, 4 * dim, **options)
        self.queries = nn.Parameter(0.02 * torch.randn(args.chunk, dim))
        if args.loss == "flow":
            self.noisy = nn.Linear(action_dim + 1, dim)
        self.norm = nn.LayerNorm(dim)
        self.out = nn.Linear(dim, action_dim)

    def encode(self, state, rgb):
        """What the decoder attends to."""
        x = torch.cat([self.state(state)[:, None], self.tokens(rgb)], 1)
        for layer in self.encoder:
            x = layer(x)
        return x

    def decode(self, memory, noisy=None, u=None):
        x = self.queries.expand(memory.shape[0], -1, -1)
        if noisy is not None:
            times = u[:, None, None].expand(-1, noisy.shape[1], 1)
            x = x + self.noisy(torch.cat([noisy, times], -1))
        return self.out(self.norm(self.decoder(x, memory)))


class Perceptron(nn.Module):
    """state (N, S) -> memory, itself -> chunk (N, K, A): two hidden layers."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.shape = (args.chunk, shapes["action"])
        size, width = args.chunk * shapes["action"], 4 * args.dim
        inputs = shapes["state"]
        if args.loss == "flow":
            inputs += size + 1
        self.layers = nn.Sequential(
            nn.Linear(inputs, width),
            nn.GELU(),
            nn.Dropout(args.dropout),
            nn.Linear(width, width),
            nn.GELU(),
            nn.Dropout(args.dropout),
            nn.Linear(width, size),
        )

    def encode(self, state, rgb=None):
        return state

    def decode(self, memory, noisy=None, u=None):
        if noisy is not None:
            memory = torch.cat([memory, noisy.flatten(1), u[:, None]], -1)
        return self.layers(memory).unflatten(1, self.shape)


class ChunkPolicy(nn.Module):
    """state (N, S), rgb (N, H, W, C) -> the next K actions (N, K, A)."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.flow = args.loss == "flow"
        self.shape = (args.chunk, shapes["action"])
        self.normalize = Normalizer(shapes["state"])
        self.scale = Normalizer(shapes["action"])  # the network knows actions in these units
        kind = Transformer if shapes["cameras"] else Perceptron
        self.net = kind(shapes, args)

    def encode(self, state, rgb=None):
        """What chunks are decoded from; states are cut off at 10 deviations."""
        return self.net.encode(self.normalize(state).clamp(-10, 10), rgb)

    def forward(self, state, rgb=None):
        """The next K actions, in [-1, 1]."""
        memory = self.encode(state, rgb)
        if not self.flow:
            return self.scale.inverse(self.net.decode(memory)).clamp(-1, 1)
        n = memory.shape[0]  # not len(memory), which would fix N in the exported program
        x = torch.randn(n, *self.shape, device=memory.device)
        for i in range(FLOW_STEPS):
            u = torch.full((n,), i / FLOW_STEPS, device=memory.device)
            x = x + self.net.decode(memory, x, u) / FLOW_STEPS
        return self.scale.inverse(x).clamp(-1, 1)


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


class Chunks:
    """Steps of all demonstrations, one after the other; a sample is K actions from one on."""

    def __init__(self, demos: list[dict], args: Args):
        self.ahead = torch.arange(args.chunk, device=args.device)
        self.rows = {}
        for key in demos[0]:
            steps = [demo[key] for demo in demos]
            self.rows[key] = torch.from_numpy(np.concatenate(steps)).to(args.device)  # (M, ...)
        lengths = torch.tensor([len(demo["actions"]) for demo in demos], device=args.device)
        self.ends = lengths.cumsum(0).repeat_interleave(
            lengths
        )  # (M,): where its demonstration ends

    def sample(self, batch_size: int) -> dict:
        """Observations (B, ...), actions (B, K, A), weights (B, K): 0 beyond the end, else 1."""
        start = torch.randint(len(self.ends), (batch_size,), device=self.ends.device)
        batch = {key: rows[start] for key, rows in self.rows.items()}
        steps = start[:, None] + self.ahead  # (B, K)
        batch["weights"] = (steps < self.ends[start, None]).float()  # differs (3)
        batch["actions"] = self.rows["actions"][steps.clamp(max=len(self.ends) - 1)]
        return batch


# --- Update functions -----------------------------------------------------------------------------
def clone_loss(net: ChunkPolicy, batch: dict) -> torch.Tensor:
    """Equation 1 or 2 of normalised actions, the mean over the steps that have a weight."""
    actions, weights = net.scale(batch["actions"]), batch["weights"]
    memory = net.encode(batch["state"], batch.get("rgb"))
    if net.flow:
        noise = torch.randn_like(actions)
        u = torch.rand(len(actions), device=actions.device)
        x = noise + u[:, None, None] * (actions - noise)
        error = (net.net.decode(memory, x, u) - (actions - noise)).square()
    else:
        error = (net.net.decode(memory) - actions).abs()
    return (error.mean(-1) * weights).sum() / weights.sum()


def shift_images(rgb: torch.Tensor) -> torch.Tensor:
    """Images (B, H, H, C), all moved by the same few pixels, edges repeated."""
    pixels = torch.arange(rgb.shape[1], device=rgb.device)
    for axis in (1, 2):
        offset = torch.randint(-PAD, PAD + 1, (1,), device=rgb.device)
        rgb = rgb.index_select(axis, (pixels + offset).clamp(0, len(pixels) - 1))
    return rgb


def update(net: ChunkPolicy, optimizer: torch.optim.Optimizer, batch: dict) -> dict:
    """One step of AdamW on a batch, its images shifted -> metrics, detached."""
    net.train()
    if "rgb" in batch:
        batch = batch | {"rgb": shift_images(batch["rgb"])}
    loss = clone_loss(net, batch)
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(net.parameters(), GRAD_CLIP)
    optimizer.step()
    return {"loss/clone": loss.detach()}


@torch.no_grad()
def average_weights(average: nn.Module, net: nn.Module, step: int, keep: float):
    """Equation 5, and faster at first: after step 1 a tenth of where it began is left."""
    share = max(1 - keep, 9 / (step + 9))
    torch._foreach_lerp_(list(average.parameters()), list(net.parameters()), share)


# --- evaluate -------------------------------------------------------------------------------------
@torch.no_grad()
@torch.random.fork_rng()
def evaluate(
    policy, env, args: Args, video: Path | None = None, held_out: dict | None = None
) -> dict:
    """Whole episodes from fixed seeds, the random state of training untouched -> metrics.

    held_out: a batch to validate on.
    """
    torch.manual_seed(EVAL_SEED)  # of the flow's noise
    frames, successes, lengths = [], [], []
    for seed in range(EVAL_SEED, EVAL_SEED + args.eval_episodes // env.num_envs):
        obs = env.reset(seed=seed)
        policy.reset()
        running = torch.ones(env.num_envs, dtype=torch.bool, device=args.device)
        while running.any():
            if video and seed == EVAL_SEED:
                images = env.render(range(min(4, env.num_envs)), size=160)
                frames.append(np.hstack(list(images)))
            obs, _, terminations, truncations, info = env.step(policy.act(obs))
            ended = running & (terminations | truncations)  # each environment counts once
            successes.append(info["episode"]["success_at_end"][ended])
            lengths.append(info["episode"]["length"][ended])
            running &= ~ended
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=max(1, round(env.control_hz)), macro_block_size=1)
    results = {
        "eval/success_rate": float(torch.cat(successes).float().mean()),
        "eval/length": float(torch.cat(lengths).float().mean()),
    }
    if held_out:
        results["loss/valid"] = float(clone_loss(policy.net, held_out))
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
    except (
        Exception
    ) as error:  # torch raises many kinds for a damaged file; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == "bc_chunk"
    need(ours, f"{path} is not bc_chunk's")
    unknown = checkpoint.get("args", {}).keys() - Args.__dataclass_fields__.keys()
    whole = not unknown and {"args", "agent"} <= checkpoint.keys()
    need(whole, f"{path} is another version's, or was edited: {', '.join(unknown)}")
    finite = all(x.isfinite().all() for x in checkpoint["agent"].values() if torch.is_tensor(x))
    need(finite, f"{path} has weights that are not finite")
    return checkpoint


def export(checkpoint: str | Path, path: Path):
    """Write the policy of a checkpoint as a program for any number of observations, on the CPU.

    torch.export.load(path, extra_files={"base.json": ""}).module() reads it;
    torch.export.passes.move_to_device_pass moves it.
    """
    policy = Policy(checkpoint)
    args, shapes = policy.args, policy.shapes
    example = [torch.zeros(2, shapes["state"])]
    if shapes["cameras"]:
        image_shape = (args.image_size, args.image_size, 3 * shapes["cameras"])
        example.append(torch.zeros((2, *image_shape), dtype=torch.uint8))
    any_number = tuple({0: torch.export.Dim("n", min=1)} for _ in example)
    with torch.no_grad():
        program = torch.export.export(policy.net, tuple(example), dynamic_shapes=any_number)
    about = dict(algo="bc_chunk", state_dim=shapes["state"], action_dim=shapes["action"])
    for name in ("env_id", "obs", "execute", "image_size", "cameras"):
        about[name] = getattr(args, name)
    torch.export.save(program, path, extra_files={"base.json": json.dumps(about)})


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


def check_finite(tensors: dict, step: int, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor that is not finite."""
    for name, tensor in tensors.items():
        if not tensor.isfinite().all():
            message = f"{name} is not finite at update {step}; last good checkpoint: {checkpoint}"
            raise FloatingPointError(message)


# --- Policy ---------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out, from one checkpoint: a file, or its content."""

    def __init__(self, source: str | Path | dict, device: str | torch.device = "cpu"):
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args = Args(**checkpoint["args"])
        self.shapes, self.spec = checkpoint["shapes"], checkpoint["spec"]
        self.net = ChunkPolicy(self.shapes, self.args).to(device).eval()
        self.net.load_state_dict(checkpoint["agent"])
        self.device = device
        self.reset()

    def reset(self):
        """Episodes begin in all environments: the rest of their chunks is forgotten."""
        self.age = self.args.execute
        self.past = []  # chunks, the newest first

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs of the environment, (N, ...) -> actions (N, A), the next ones of the chunks."""
        if self.args.ensemble is not None:
            return self.mean_action(self.plan(obs))
        if self.age == self.args.execute:
            self.chunks = self.plan(obs)
            self.age = 0
        self.age += 1
        return self.chunks[:, self.age - 1]

    def plan(self, obs: dict) -> torch.Tensor:
        """-> the next K actions (N, K, A)."""
        obs = {key: torch.as_tensor(x, device=self.device) for key, x in obs.items()}
        return self.net(**observe(obs, self.args.obs == "pixels"))

    def mean_action(self, chunk: torch.Tensor) -> torch.Tensor:
        """Equation 4, with the chunk that was planned now."""
        self.past = [chunk, *self.past][: self.args.chunk]
        planned = torch.stack([chunk[:, age] for age, chunk in enumerate(self.past)])
        ages = torch.arange(len(planned), device=self.device)
        weights = torch.softmax(self.args.ensemble * ages, 0)
        return torch.einsum("i,ina->na", weights, planned)


# --- train ----------------------------------------------------------------------------------------
def load_demos(args: Args, env) -> tuple[list[dict], list[dict]]:
    """Demonstrations to train and to validate on. ValueError if they do not fit the environment."""
    pixels = args.obs == "pixels"
    demos, valid = read_demos(args.demos, args.cameras if pixels else ())
    seen = observe(env.reset(), pixels) | {"actions": torch.zeros(1, env.action_dim)}
    has = {key: list(rows.shape[1:]) for key, rows in demos[0].items()}
    wants = {key: list(rows.shape[1:]) for key, rows in seen.items()}
    need(has == wants, f"{args.demos} has {has}, the environment {wants}")
    return demos, valid


def keep_best(results: dict, progress: dict, content, run: Path):
    """best.pt by success, the later one of equals; valid.pt by the validation loss."""
    success, loss = results["eval/success_rate"], results.get("loss/valid", math.inf)
    tqdm.write(f"{progress['global_step']} updates: success {success:.3f}")
    if success >= progress["best"]:
        progress["best"] = success
        save(run / "best.pt", content())
    if loss < progress["lowest"]:
        progress["lowest"] = loss
        save(run / "valid.pt", content())


def train(args: Args) -> dict:
    """Clone, or only evaluate -> metrics of the last evaluation, and `run`, the folder.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at NaN.
    """
    check(args)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    env = make_envs(args)
    if args.evaluate:
        video = Path(args.checkpoint).parent / "videos/evaluate.mp4" if args.capture_video else None
        policy = Policy(args.checkpoint, args.device)
        policy.args = replace(policy.args, execute=args.execute, ensemble=args.ensemble)
        results = evaluate(policy, env, args, video)
        print(json.dumps(results))
        env.close()
        return results

    run = open_run(args)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    demos, valid = load_demos(args, env)
    chunks = Chunks(demos, args)
    cameras = len(args.cameras) if args.obs == "pixels" else 0
    state_dim = chunks.rows["state"].shape[1]
    shapes = dict(cameras=cameras, state=state_dim, action=env.action_dim)
    net = ChunkPolicy(shapes, args).to(args.device)
    net.normalize.fit(chunks.rows["state"], 0.01)
    net.scale.fit(chunks.rows["actions"], 0.1)
    average = copy.deepcopy(net).requires_grad_(False)  # what acts
    held_out = Chunks(valid, args).sample(HELD_OUT) if valid else None
    del demos, valid  # held once, in chunks
    optimizer = torch.optim.AdamW(net.parameters(), args.lr, weight_decay=1e-4, fused=True)
    parts = dict(agent=average, net=net, optimizer=optimizer, random=GlobalRandom())
    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-1.0, lowest=math.inf)

    def content() -> dict:
        about = dict(algo="bc_chunk", args=asdict(args), shapes=shapes, spec=env.spec)
        states = {name: part.state_dict() for name, part in parts.items()}
        return about | states | dict(progress=dict(progress), csv_sizes=csv_sizes(run))

    policy = Policy(content(), args.device)
    policy.net = average.eval()
    if args.resume:
        checkpoint = load(run / "checkpoint.pt")
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        progress = checkpoint["progress"]
        cut_back(run, checkpoint["csv_sizes"])
        del checkpoint  # its mapped tensors are released
    else:
        save(run / "checkpoint.pt", content())

    born = START - progress["wall_time"]
    begin = time.perf_counter() - progress["train_time"]
    losses, results = [], {}
    interrupt = Interrupt()
    steps = range(progress["global_step"] + 1, args.steps + 1)
    for step in tqdm(steps, unit="update", mininterval=1):
        # update
        turn = math.pi * (step - 1) / args.steps
        optimizer.param_groups[0]["lr"] = args.lr * (1 + math.cos(turn)) / 2
        metrics = update(net, optimizer, chunks.sample(args.batch_size))
        average_weights(average, net, step, args.average)
        losses.append(metrics["loss/clone"])
        train_time = time.perf_counter() - begin
        clock = dict(global_step=step, wall_time=time.time() - born, train_time=train_time)
        progress |= clock

        # log
        eval_due = step % args.eval_freq == 0 or step == args.steps
        if eval_due or step % args.log_freq == 0:
            loss = torch.stack(losses).mean()
            check_finite({"loss/clone": loss, **net.state_dict()}, step, run / "checkpoint.pt")
            row = {"loss/clone": float(loss), "time/ups": step / train_time}
            write_row(run / "metrics.csv", clock | row, args.track)
            losses.clear()

        # evaluate and save
        if eval_due:
            last = step == args.steps
            video = run / f"videos/update_{step}.mp4" if args.capture_video and last else None
            results = evaluate(policy, env, args, video, held_out)
            write_row(run / "eval.csv", clock | results, args.track)
            keep_best(results, progress, content, run)
            begin = time.perf_counter() - train_time
        if eval_due or interrupt.asked:
            save(run / "checkpoint.pt", content())
        if interrupt.asked:
            sys.exit(f"interrupted at update {step}: continue with --resume {run}")
    interrupt.restore()
    env.close()
    export(run / "best.pt", run / "base.pt2")
    return results | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, OSError, FloatingPointError, ImportError) as error:
        sys.exit(f"error: {error}")
    except RuntimeError as error:
        if "loading state_dict" not in str(error):
            raise
        sys.exit(f"error: the checkpoint does not fit: {str(error).splitlines()[-1].strip()}")
