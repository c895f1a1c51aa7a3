"""Soft actor-critic from pixels in its three patterns: who trains the convolutions is one argument.

Papers: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905 (SAC). Yarats et al.,
"Improving Sample Efficiency in Model-Free Reinforcement Learning from Images", arXiv 1910.01741 (SAC+AE). Kostrikov,
Yarats and Fergus, "Image Augmentation Is All You Need", arXiv 2004.13649 (DrQ). Laskin et al., "Reinforcement Learning
with Augmented Data", arXiv 2004.14990 (RAD). The survey in full: docs/visual_rl.md.

    --encoder       who trains the convolutions                          used by                   in this file
    separate        the actor's its own loss, the critic's its own loss  SAC on robots             actor_loss
    critic          shared; the critic's loss alone                      D4PG, RAD, DrQ, DrQ-v2    critic_loss
    autoencoder     shared; the critic's and a reconstruction loss       SAC+AE                    autoencoder_loss
      with --no-critic-gradient, the reconstruction alone                SLAC, Dreamer (in part)   critic_loss
    --augmentation  none                                                 SAC, SAC+AE, D4PG
                    shift, each of K and M copies anew                   DrQ, DrQ-v2 (K = M = 1)   augment, views
                    crop, translate, cutout, color_jitter                RAD                       augment, views
    --encoder-type  dmc: 3 x 3 convolutions, strides 2 1 1 1             SAC+AE, RAD, DrQ, DrQ-v2  Encoder
                    impala: three residual stages                        RAD on Procgen (PPO)      Encoder, Residual

    target   y = mean over K copies of o' of r + G (min Q'(o', a') - alpha log pi(a'|o')), a' ~ pi   (SAC 3, DrQ 1)
    critics  sum over M copies of o and both heads of the mean of (Q(o, a) - y)^2                    (SAC 5, DrQ 3)
    actor    mean of alpha log pi(a|o) - min Q(o, a)                                                 (SAC 7)
    alpha    mean of -alpha (log pi(a|o) + H), H = -A                                                (SAC 18)
    decoder  mean of (decoder(z) - o)^2 + lambda |z|^2 / 2, z the critic's features                  (SAC+AE)

Differences from the papers and the authors' code:
 1. The actor's loss uses the features that the critic's loss computed, from before that step; SAC+AE, RAD and DrQ
    compute them again after it. It saves a pass through the convolutions. The reconstruction's step comes before the
    actor's, not after it. DrQ's losses are added over M copies, as in its code; its paper averages them. The 1,000
    updates that SAC+AE's code makes at once after its random actions are left out.
 2. The tanh's share of log pi is exact, as in DrQ's code; SAC+AE's and RAD's add 1e-6.
 3. A cut-out's place is uniform in the picture. In RAD's code the box is as far from the upper edge as it is high, and
    as far from the left one as it is wide. Hue is a rotation about the grey axis, not a shift in HSV.
 4. Every frame is stored once as uint8 and augmentation is part of the update; theirs store whole stacks.
 5. The state of an environment that has one is put beside the features of the picture.
 6. Ours: several environments, n-step returns, --no-critic-gradient, IMPALA's convolutions in front of SAC, and every
    combination of --encoder, --augmentation and --encoder-type. On a CPU the sizes are smaller: TUNED, below.

Commands, from the repository's root:
    train          python algos/sac_pixels.py --env-id cartpole_swingup --preset drq
    smallest run   python algos/sac_pixels.py --env-id dot_reach --device cpu
    evaluate       python algos/sac_pixels.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/sac_pixels.py --resume runs/NAME    (exactly, if the run was given --save-buffer)

Expected result: with a CPU's sizes, dot_reach from -22 (random; the best possible is -2) to -2.8 after 10,000
transitions, the mean of three seeds at -2.7, -3.0 and -2.8; cartpole_swingup 796 after 52,500 of its steps (420,000
frames, two hours of half a core), one seed. Curves and commands: docs/algos/sac_pixels.md. Not yet measured on a GPU.

Shapes: N environments, B batch, K and M copies of next and present observation, A action dimensions, S state
dimensions, H x W picture, C channels (3 x frame stack), F features of the convolutions.
"""
# ruff: noqa: E402  (the lines down to the banner must run before the imports below it)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("envs") is None:
    # `make` installs the project in .venv; going on in there lets `python algos/sac_pixels.py` work as typed.
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
from dataclasses import asdict, dataclass
from fnmatch import fnmatch
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
EPISODE = ("return", "success_at_end")  # what is logged of an episode that ended
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv
OFFSETS = {"shift": (-1, 1), "crop": (0, 1), "translate": (-1, 0)}  # x margin: where the window on a picture may begin
CUTOUT = (10 / 84, 30 / 84)  # sides of the box, as shares of the picture's
JITTER = (0.4, 0.4, 0.4, 0.5)  # brightness, contrast and saturation around 1, hue in turns around 0

# --- Args -------------------------------------------------------------------------------------------------------------
# (patterns of env ids, kind of device, preset) -> defaults other than DrQ's published ones below; later rows win
AE = dict(encoder="autoencoder", augmentation="none", alpha_lr=1e-4, alpha_beta=0.5, encoder_tau=0.05, batch_size=128,
          delta_orthogonal=True, buffer_size=1_000_000)
RAD = dict(augmentation="crop", margin=16, target_augs=1, online_augs=1, alpha_lr=1e-4, alpha_beta=0.5,
           encoder_tau=0.05, batch_size=128, delta_orthogonal=True)
SAC = dict(encoder="separate", augmentation="none", policy_lr=3e-4, q_lr=3e-4, alpha_lr=3e-4, alpha=1.0, tau=0.005,
           encoder_tau=0.005, batch_size=256, policy_frequency=1)
TUNED = {
    ("*", "*", "sac"): SAC,
    ("*", "*", "sac_ae"): AE,
    ("*", "*", "rad"): RAD,
    ("*", "*", "rad_translate"): RAD | dict(augmentation="translate", image_size=108, margin=8),
    # 500,000 frames are 62,500, 125,000 or (default) 250,000 steps: PlaNet's action repeats
    ("cartpole_*", "*", "*"): dict(action_repeat=8, total_timesteps=62_500),
    ("reacher_* cheetah_* cup_*", "*", "*"): dict(action_repeat=4, total_timesteps=125_000),
    ("cheetah_*", "*", "rad*"): dict(policy_lr=2e-4, q_lr=2e-4),
    # what follows is ours
    ("*", "cpu", "*"): dict(image_size=48, margin=2, encoder_strides=(2, 1, 1), encoder_channels=16, hidden=256,
                            batch_size=64, target_augs=1, online_augs=1, buffer_size=100_000, eval_envs=1,
                            eval_episodes=5, amp=False, compile=False, cudagraphs=False),
    ("dot_reach", "*", "*"): dict(image_size=32, margin=2, frame_stack=1, action_repeat=1, encoder_strides=(2, 2, 1),
                                  encoder_channels=16, hidden=256, batch_size=64, target_augs=1, online_augs=1,
                                  gamma=0.9, num_envs=8, buffer_size=100_000, total_timesteps=10_000, eval_freq=1_000,
                                  eval_episodes=64, eval_envs=64, log_freq=500),
}


@dataclass
class Args:
    # run
    env_id: str = "dot_reach"  # task: dot_reach, SO101... (envs/so101.py) or a DeepMind Control id, domain_task
    preset: Literal["sac", "sac_ae", "rad", "rad_translate", "drq"] = "drq"  # whose published values are the defaults
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, preset, seed and time
    total_timesteps: int = 250_000  # environment transitions, over all environments; x action_repeat = frames
    eval_freq: int = 5_000  # transitions between evaluations; each also saves checkpoint.pt, and best.pt if it is
    eval_episodes: int = 10  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 10  # of them at once; divides eval_episodes
    log_freq: int = 1_000  # transitions between rows of metrics.csv; only there does the host wait for the device
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to take weights from; counters, optimisers and buffer start afresh
    resume: str | None = None  # run folder to continue, with its arguments, except those given again
    save_buffer: bool = False  # put the replay buffer in checkpoint.pt: larger, but then --resume continues exactly
    capture_video: bool = True  # write an mp4 of up to four evaluation episodes, as the policy sees them
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, entity, offline mode

    # environment
    num_envs: int = 1  # parallel environments; DeepMind Control's run in a process each
    image_size: int = 84  # pixels a side that the networks see
    action_repeat: int = 2  # frames for which an action is held
    frame_stack: int = 3  # latest pictures shown together, so that motion is seen
    camera: int | None = None  # the task's camera (DeepMind Control); None: the published one
    renderer: Literal["auto", "egl", "osmesa", "warp"] = "auto"  # who draws (DeepMind Control)
    fast_render: bool = False  # no shadows and no smoothing: a simpler picture, drawn faster (DeepMind Control)
    workers: int | None = None  # processes that simulate (DeepMind Control); None: one for each of several envs
    overlap: bool = False  # update while the environments step, on the data from before it (DeepMind Control)

    # algorithm
    encoder: Literal["separate", "critic", "autoencoder"] = "critic"  # who trains the convolutions: the table on top
    critic_gradient: bool = True  # with the autoencoder; off: reconstruction alone trains the convolutions
    encoder_type: Literal["dmc", "impala"] = "dmc"  # family of convolutions
    encoder_strides: tuple[int, ...] = (2, 1, 1, 1)  # of the 3 x 3 convolutions of dmc, one number a layer
    encoder_channels: int = 32  # filters of each layer; impala's first stage has half as many
    delta_orthogonal: bool = False  # SAC+AE's and RAD's first weights: only the middle of each filter; off: all of it
    feature_dim: int = 50  # numbers that actor and critic each make of the convolutions' output: linear, norm, tanh
    hidden: int = 1024  # width of the two layers of actor and critics
    augmentation: Literal["none", "crop", "shift", "cutout", "color_jitter", "translate"] = "shift"  # of each sample
    margin: int = 4  # pixels: shift by up to so many; crop from a picture larger by so many; translate: smaller by
    target_augs: int = 2  # K, augmented copies of the next observation whose targets are averaged; 1 without
    online_augs: int = 2  # M, augmented copies of the observation, each with a critic loss; 1 without
    buffer_size: int = 100_000  # frames kept, over all environments
    batch_size: int = 512  # transitions per update
    update_every: int = 1  # transitions between critic updates, over all environments
    learning_starts: int = 1_000  # transitions of uniformly random actions before the first update
    policy_lr: float = 1e-3  # Adam step size of the actor
    q_lr: float = 1e-3  # Adam step size of the critic, its convolutions, and the autoencoder
    alpha_lr: float = 1e-3  # Adam step size of log alpha
    alpha_beta: float = 0.9  # Adam's first decay rate of log alpha
    policy_frequency: int = 2  # critic updates per update of actor, temperature and target; together they are one block
    alpha: float = 0.1  # weight of the entropy: the first one with autotune, else the constant one
    autotune: bool = True  # learn alpha so that the entropy is -A
    gamma: float = 0.99  # discount per step
    n_step: int = 1  # rewards summed before the bootstrap
    tau: float = 0.01  # share of the critic's heads that moves into their target
    encoder_tau: float = 0.01  # the same of its convolutions and features
    decoder_lambda: float = 1e-6  # weight of the features' square beside the reconstruction
    decoder_decay: float = 1e-7  # weight decay of the decoder

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and of the stored frames
    amp: bool = True  # compute the losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the losses with torch.compile
    cudagraphs: bool = True  # replay each block of updates as one CUDA graph; needs cuda

    def check(self):
        """Raises ValueError at the first choice that cannot work. (In __post_init__ the parser would reword it.)"""
        cuda, least = self.device.startswith("cuda"), self.learning_starts // max(self.num_envs, 1)
        few = [name.replace("_", "-") for name, value in asdict(self).items() if type(value) in (int, tuple) and
               np.min(value, initial=1) < 1 and name not in ("seed", "camera", "workers", "margin", "learning_starts")]
        for message, wrong in {
            "--resume continues a run, --checkpoint starts one: give only one": self.resume and self.checkpoint,
            "--evaluate needs --checkpoint FILE": self.evaluate and not self.checkpoint,
            f"--{', --'.join(few)} must be at least 1": few,
            "--eval-episodes must be a multiple of --eval-envs": self.eval_episodes % max(self.eval_envs, 1),
            "--no-critic-gradient leaves the convolutions untrained: it needs --encoder autoencoder":
                not self.critic_gradient and self.encoder != "autoencoder",
            "--margin must be at least 1, and for translate below --image-size":
                self.augmentation in OFFSETS and not 1 <= self.margin < self.image_size,
            "--learning-starts must cover --n-step steps of all environments: raise it": least < self.n_step,
            "--buffer-size must exceed --learning-starts by some episodes: raise it":
                self.buffer_size // max(self.num_envs, 1) <= least + self.n_step + self.frame_stack + 1,
            "--overlap is for DeepMind Control's tasks":
                self.overlap and (self.env_id == "dot_reach" or self.env_id.startswith("SO101")),
            "--track needs Weights & Biases: pip install -e '.[track]'":
                self.track and importlib.util.find_spec("wandb") is None,
            "--device must be cpu or cuda": self.device.split(":")[0] not in ("cpu", "cuda"),
            "--cudagraphs needs --device cuda": self.cudagraphs and not cuda,
            "there is no CUDA device here: use --device cpu": cuda and not torch.cuda.is_available(),
        }.items():
            if wrong:
                raise ValueError(message)

    @property
    def render_size(self) -> int:
        """Pixels a side of the picture that the environment draws and the buffer stores."""
        return self.image_size + {"crop": self.margin, "translate": -self.margin}.get(self.augmentation, 0)

    @property
    def copies(self) -> tuple[int, int]:
        """K, M: without augmentation all copies would be equal."""
        return (1, 1) if self.augmentation == "none" else (self.target_augs, self.online_augs)


def tuned_defaults(env_id: str, device: str, preset: str) -> dict:
    """The rows of TUNED that apply, merged."""
    rows = [row for (tasks, kind, name), row in TUNED.items() if any(fnmatch(env_id, task) for task in tasks.split())
            and fnmatch(device.split(":")[0], kind) and fnmatch(preset, name)]
    return {key: value for row in rows for key, value in row.items()}


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The defaults, and so --help, are those of the task, device, preset or checkpoint given."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=words, default=Args(env_id=""))  # a first look: which task, device, preset and file
    source = Path(given.resume) / "checkpoint.pt" if given.resume else given.checkpoint
    saved = load_file(source)["args"] if source else {}
    env_id = given.env_id or saved.get("env_id", Args.env_id)
    for key in ("device", "evaluate", "checkpoint", "resume", *["name"] * bool(given.checkpoint)):  # of that run alone
        saved.pop(key, None)
    chosen = dict(env_id=env_id, device=given.device, preset=given.preset)
    defaults = chosen | tuned_defaults(**chosen) | saved
    defaults["cudagraphs"] = defaults.get("cudagraphs", True) and given.device.startswith("cuda")  # not a GPU's file's
    return tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n\n")[0])


# --- make_envs --------------------------------------------------------------------------------------------------------
def make_envs(args: Args, device: torch.device) -> tuple:
    """-> training environment (None with --evaluate), evaluation environment.

    Anything with reset, step, state_dict, load_state_dict and close as in envs/__init__.py can stand here. It starts
    the next episode by itself and reports on the one that ended in info["final_obs"] and info["episode"].
    """
    module, options = "dmc", dict(image_size=args.render_size, action_repeat=args.action_repeat, camera=args.camera,
                                  renderer=args.renderer, fast_render=args.fast_render, workers=args.workers)
    if args.env_id.startswith("SO101"):
        module, options = "so101", dict(render_size=args.render_size, samples_per_pixel=4)
    elif args.env_id == "dot_reach":
        module, options = "dot_reach", dict(image_size=args.render_size, action_repeat=args.action_repeat)
    try:
        make = importlib.import_module(f"envs.{module}").make
        env = None if args.evaluate else make(args.env_id, args.num_envs, device, seed=args.seed, stagger=True,
                                              **options)
        return env, make(args.env_id, args.eval_envs, device, seed=EVAL_SEED, stagger=False, **options)
    except ModuleNotFoundError as error:
        raise ValueError(f'{args.env_id} needs {error.name}: run `pip install -e ".[{module}]"`') from error
    except (ImportError, RuntimeError) as error:  # the environments' own messages
        raise ValueError(error) from error


# --- Networks ---------------------------------------------------------------------------------------------------------
def window(rgb: torch.Tensor, corner: torch.Tensor, size: int, edge: bool) -> torch.Tensor:
    """Squares whose upper left pixels are at `corner` (B, 2), rows and columns: (B, H, W, C) -> (B, size, size, C).

    A square may reach beyond its picture: there it repeats the nearest pixel (`edge`) or is black.
    """
    where = corner[:, :, None] + torch.arange(size, device=rgb.device)  # (B, 2, size)
    inside = where.clamp(0, rgb.shape[1] - 1)
    picked = rgb[torch.arange(len(rgb), device=rgb.device)[:, None, None], inside[:, 0, :, None], inside[:, 1, None]]
    if edge:
        return picked
    known = where == inside
    return picked * (known[:, 0, :, None] & known[:, 1, None])[..., None]


def augment(rgb: torch.Tensor, draw: torch.Tensor, args: Args) -> torch.Tensor:
    """uint8 (B, H, W, C) at the size drawn -> uint8 at the size seen. draw: uniform numbers in [0, 1), (B, 4)

    One draw serves all frames of a stack, so that motion stays what it was.
    """
    if args.augmentation in OFFSETS:
        low, high = (args.margin * share for share in OFFSETS[args.augmentation])
        corner = low + (draw[:, :2] * (high - low + 1)).long()
        return window(rgb, corner, args.image_size, edge=args.augmentation == "shift")
    if args.augmentation == "cutout":
        side = (CUTOUT[0] + draw[:, :2] * (CUTOUT[1] - CUTOUT[0])) * rgb.shape[1]
        low = (draw[:, 2:] * (rgb.shape[1] - side + 1)).long()  # differs (3)
        axis = torch.arange(rgb.shape[1], device=rgb.device)
        cut = (axis >= low[..., None]) & (axis < (low + side.long())[..., None])  # (B, 2, H)
        return rgb * ~(cut[:, 0, :, None] & cut[:, 1, None])[..., None]
    if args.augmentation == "color_jitter":
        luma, most = (torch.tensor(numbers, device=rgb.device) for numbers in ((0.299, 0.587, 0.114), JITTER))
        brightness, contrast, saturation, hue = ((draw * 2 - 1) * most).T.reshape(4, -1, 1, 1, 1, 1)
        x = rgb.unflatten(-1, (-1, 3)).float()  # (B, H, W, frames, 3)
        x = (x * (1 + brightness)).clamp(0, 255)
        x = (x @ luma).mean((1, 2, 3), keepdim=True)[..., None].lerp(x, 1 + contrast).clamp(0, 255)
        x = (x @ luma)[..., None].lerp(x, 1 + saturation).clamp(0, 255)
        angle = 2 * math.pi * hue  # Rodrigues' rotation about (1, 1, 1) / sqrt 3, which leaves greys alone
        across = (x.roll(1, -1) - x.roll(-1, -1)) / math.sqrt(3.0)  # that axis x colour
        x = x * angle.cos() + across * angle.sin() + x.mean(-1, keepdim=True) * (1 - angle.cos())
        return x.clamp(0, 255).round().to(torch.uint8).flatten(-2)
    return rgb


def center(rgb: torch.Tensor, args: Args) -> torch.Tensor:
    """What acting and evaluation see: the middle of what `augment` crops or translates to; else the picture itself."""
    middle = torch.full((len(rgb), 4), 0.5, device=rgb.device)
    return augment(rgb, middle, args) if args.augmentation in ("crop", "translate") else rgb


def init_weights(module: nn.Module, delta: bool = False):
    """Orthogonal weights, gain sqrt 2 for convolutions and 1 for linear layers; zero biases.

    delta: a filter is zero but in its middle, where it is orthogonal (Xiao et al., arXiv 1806.05393).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d | nn.Linear):
            weight, gain = layer.weight.data, 1.0 if isinstance(layer, nn.Linear) else math.sqrt(2)
            if delta and weight.ndim == 4:
                middle, weight = weight[..., weight.shape[2] // 2, weight.shape[3] // 2], weight.zero_()
                middle.copy_(nn.init.orthogonal_(torch.empty_like(middle), gain))
            else:
                nn.init.orthogonal_(weight, gain)
            nn.init.zeros_(layer.bias)


class Residual(nn.Module):
    """IMPALA's block: two 3 x 3 convolutions beside the identity."""

    def __init__(self, width: int):
        super().__init__()
        self.convs = nn.Sequential(nn.ReLU(), nn.Conv2d(width, width, 3, padding=1),
                                   nn.ReLU(), nn.Conv2d(width, width, 3, padding=1))

    def forward(self, x):
        return x + self.convs(x)


class Encoder(nn.Module):
    """Convolutions: uint8 (B, H, W, C) -> (B, F).

    dmc: 3 x 3 filters, no padding, ReLU after each. impala: three stages of convolution, max pooling by 2 and two
    residual blocks. `steps` has of each step in size: channels in and out, kernel, stride, padding and pixels in.
    """

    def __init__(self, channels: int, args: Args):
        super().__init__()
        layers, self.steps, size = [], [], args.image_size
        n, padding = args.encoder_channels, int(args.encoder_type == "impala")
        for width, stride in [(n // 2 or 1, 2), (n, 2), (n, 2)] if padding else [(n, s) for s in args.encoder_strides]:
            if padding:
                layers += [nn.Conv2d(channels, width, 3, padding=1), nn.MaxPool2d(3, 2, 1), Residual(width),
                           Residual(width)]
            else:
                layers += [nn.Conv2d(channels, width, 3, stride), nn.ReLU()]
            self.steps.append((channels, width, 3, stride, padding, size))
            channels, size = width, (size + 2 * padding - 3) // stride + 1
        if size < 1:
            raise ValueError(f"--image-size {args.image_size} is too small for these --encoder-strides")
        self.convs = nn.Sequential(*layers, *[nn.ReLU()] * padding)
        self.shape, self.features = (size, size, channels), channels * size * size

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float().div_(255)  # channels last, as a view
        return self.convs(x).permute(0, 2, 3, 1).flatten(1)


class Decoder(nn.Module):
    """The encoder's mirror, with transposed convolutions: features (B, feature_dim) -> (B, H, W, C) around 0."""

    def __init__(self, encoder: Encoder, args: Args):
        super().__init__()
        self.linear, self.shape, layers = nn.Linear(args.feature_dim, encoder.features), encoder.shape, []
        for inputs, outputs, kernel, stride, padding, size in reversed(encoder.steps):
            missing = (size + 2 * padding - kernel) % stride  # pixels that the division in the encoder dropped
            layers += [nn.ReLU(), nn.ConvTranspose2d(outputs, inputs, kernel, stride, padding, missing)]
        self.convs = nn.Sequential(*layers)

    def forward(self, z):
        return self.convs(self.linear(z).unflatten(1, self.shape).permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden),
                         nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


def projection(inputs: int, outputs: int) -> nn.Sequential:
    """The bottleneck, of which actor and critic have one each: (B, F) -> (B, feature_dim)."""
    return nn.Sequential(nn.Linear(inputs, outputs), nn.LayerNorm(outputs), nn.Tanh())


class Actor(nn.Module):
    """features (B, F) and state (B, S) -> mean and log std (B, A) of the Gaussian before the tanh.

    `encoder` is its own with --encoder separate, else None and the features are those of the critic's.
    """

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        encoder = Encoder(shapes["channels"] * args.frame_stack, args)
        self.encoder = encoder if args.encoder == "separate" else None
        self.projection = projection(encoder.features, args.feature_dim)
        self.head = mlp(args.feature_dim + shapes["state"], args.hidden, 2 * shapes["action"])

    def forward(self, features, state):
        mean, log_std = self.head(torch.cat([self.projection(features), state], -1)).float().chunk(2, -1)
        return mean, -10 + 6 * (torch.tanh(log_std) + 1)  # log std in [-10, 2]


class Critic(nn.Module):
    """features (B, F), state (B, S), actions (B, A) -> (2, B): convolutions, a bottleneck and two heads."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        self.encoder = Encoder(shapes["channels"] * args.frame_stack, args)
        self.projection = projection(self.encoder.features, args.feature_dim)
        inputs = args.feature_dim + shapes["state"] + shapes["action"]
        self.heads = nn.ModuleList(mlp(inputs, args.hidden, 1) for _ in range(2))

    def forward(self, features, state, actions):
        x = torch.cat([self.projection(features), state, actions], -1)
        return torch.stack([head(x)[:, 0].float() for head in self.heads])


class Agent(nn.Module):
    """All that learns: actor, critic with the convolutions, its target, log alpha and decoder, and the optimisers."""

    def __init__(self, args: Args, shapes: dict, device: torch.device):
        super().__init__()
        self.actor, self.critic = Actor(shapes, args), Critic(shapes, args)
        self.decoder = Decoder(self.critic.encoder, args) if args.encoder == "autoencoder" else None
        init_weights(self, args.delta_orthogonal)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))
        self.to(device, memory_format=torch.channels_last)
        adam = dict(fused=True, capturable=device.type == "cuda")  # capturable: the step count is on the device
        self.optimizers = {
            "q": torch.optim.Adam(self.critic.parameters(), args.q_lr, **adam),
            "actor": torch.optim.Adam(self.actor.parameters(), args.policy_lr, **adam),
            "alpha": torch.optim.Adam([self.log_alpha], args.alpha_lr, (args.alpha_beta, 0.999), **adam)}
        if self.decoder:  # a second Adam on the convolutions and the critic's bottleneck, as SAC+AE has it
            seen = [*self.critic.encoder.parameters(), *self.critic.projection.parameters()]
            self.optimizers["autoencoder"] = torch.optim.Adam([
                {"params": seen}, {"params": [*self.decoder.parameters()], "weight_decay": args.decoder_decay}],
                args.q_lr, **adam)

    def policy_features(self, rgb):
        """Features (B, F) for the actor, from its own convolutions or the critic's."""
        return (self.actor.encoder or self.critic.encoder)(rgb)


# --- Storage ----------------------------------------------------------------------------------------------------------
# same in: drqv2.py, sac_pixels.py
class Replay:
    """A ring of F slots for each of N environments. A slot holds one frame, and every frame is stored once.

    An episode of L steps takes L + 1 slots in a row. Slot i has the frame and state before step i, and that step's
    action, reward and discount (0 where it terminates); the slot after the last step has the final observation alone
    and is marked `last`. `age` counts from the episode's first slot, which limits the stack. `head` (N,) numbers the
    slot of the present observation, counted from the start of the run; its place in the ring is head modulo F.
    """

    def __init__(self, obs: dict, action_dim: int, slots: int, stack: int, n_step: int, gamma: float, device):
        self.slots, self.stack, self.n_step, self.gamma = slots, stack, n_step, gamma
        n, self.device = len(obs["rgb"]), torch.device(device)
        zeros = torch.zeros(n)
        slot = dict(rgb=obs["rgb"], state=obs["state"], actions=torch.zeros((n, action_dim)), rewards=zeros,
                    discounts=zeros, age=zeros.int(), last=zeros.bool())
        need = slots * sum(v.numel() * v.element_size() for v in slot.values())
        there = torch.cuda.mem_get_info(self.device)[0] if self.device.type == "cuda" else (
            os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"))
        if need > there:  # all of it is claimed now, so that a run fails at its start and not after hours
            raise ValueError(f"the replay buffer needs {need / 2**30:.1f} GiB, {self.device} has {there / 2**30:.1f}: "
                             "lower --buffer-size or --image-size, or keep it on a device with more")
        self.data = {k: torch.zeros((slots, *v.shape), dtype=v.dtype, device=device) for k, v in slot.items()}
        self.head, self.worlds = torch.zeros(n, dtype=torch.int64, device=device), torch.arange(n, device=device)
        for k in ("rgb", "state"):
            self.data[k][0] = obs[k]

    def add(self, actions, rewards, discounts, dones, final_obs: dict, next_obs: dict):
        """Store one step of every environment; all (N, ...). Nothing waits for the device.

        final_obs: the true next observation; next_obs: the one to act on, of another episode where `dones`.
        """
        data, dones = self.data, dones.to(self.device)
        now, after = (self.head % self.slots, self.worlds), ((self.head + 1) % self.slots, self.worlds)
        start = ((self.head + 1 + dones) % self.slots, self.worlds)  # of the next episode; without an end, = after
        for k, v in dict(actions=actions, rewards=rewards, discounts=discounts).items():
            data[k][now] = v.to(self.device)
        age = data["age"][now] + 1
        data["age"][after], data["last"][after] = age, dones
        data["age"][start], data["last"][start] = torch.where(dones, 0, age), torch.zeros_like(dones)
        for k in ("rgb", "state"):
            data[k][after] = final_obs[k].to(self.device)
            data[k][start] = next_obs[k].to(self.device)
        self.head += 1 + dones

    def _observe(self, slot, world) -> dict:
        """Observations at slots (B,) of environments (B,): "rgb" (B, H, W, stack x C), oldest frame first.

        Frames before the episode's first one are that one again.
        """
        age, rgb, n = self.data["age"][slot % self.slots, world], self.data["rgb"].flatten(0, 1), len(self.worlds)
        past = [(slot - age.clamp(max=j)) % self.slots * n + world for j in range(self.stack - 1, -1, -1)]
        return {"rgb": torch.cat([rgb.index_select(0, i) for i in past], -1),
                "state": self.data["state"][slot % self.slots, world]}

    def present(self) -> dict:
        """The observations to act on, (N, ...)."""
        return self._observe(self.head, self.worlds)

    def sample(self, batch_size: int, generator: torch.Generator) -> dict:
        """B transitions of n steps, uniform over environments and their stored steps. All shapes are static.

        -> obs, next_obs (dicts), actions (B, A), rewards (B,) = sum of gamma^i x discounts before x r_i,
        discounts (B,) = gamma^n x product of the n discounts. At an episode's end the sum stops, with fewer steps, and
        next_obs is the final observation. Windows that the write head crosses are left out.
        """
        data, n = self.data, self.n_step
        draw = torch.rand((5, batch_size), dtype=torch.float64, generator=generator, device=self.device)
        world = (draw[0] * len(self.worlds)).long()
        newest = self.head[world] - n  # the latest start whose n steps are stored
        # and the oldest one whose frames are, with one slot to spare for the step back below
        span = (newest + 1).clamp(max=self.slots - n - self.stack)
        slot = newest - (draw[1] * span).long()
        for again in draw[2:]:  # no step starts at a final observation: draw anew, three times
            slot = torch.where(data["last"][slot % self.slots, world], newest - (again * span).long(), slot)
        slot = slot - data["last"][slot % self.slots, world].long()  # once in length^4: the step before it

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

    def state_dict(self) -> dict:
        used = min(self.slots, int(self.head.max()) + 1)
        return {k: v if used == self.slots else v[:used].clone() for k, v in self.data.items()} | dict(head=self.head)

    def load_state_dict(self, state: dict):
        self.head.copy_(state["head"])
        for k, v in self.data.items():
            v[: len(state[k])] = state[k]


# --- Update functions -------------------------------------------------------------------------------------------------
def views(batch: dict, args: Args, generator: torch.Generator) -> dict:
    """The batch with augmented pictures: obs rgb (M B, ...), copy by copy, next_obs rgb (K B, ...); the rest as it is.

    All copies are independent, but a translation is the same for o and o' (RAD).
    """
    (k, m), b = args.copies, len(batch["actions"])
    draw = torch.rand((2, max(k, m) * b, 4), generator=generator, device=generator.device)
    rgb = [augment(batch[which]["rgb"].repeat(n, 1, 1, 1), draw[i, : n * b], args)
           for which, n, i in (("obs", m, 0), ("next_obs", k, int(args.augmentation != "translate")))]
    return batch | {"obs": batch["obs"] | {"rgb": rgb[0]}, "next_obs": batch["next_obs"] | {"rgb": rgb[1]}}


def sample_actions(actor: Actor, features, state, noise):
    """Tanh-Gaussian actions (B, A) and their log-probabilities (B,), from standard normal noise (B, A). SAC, eq. 21"""
    mean, log_std = actor(features, state)
    raw = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_prob = log_prob - 2 * (math.log(2.0) - raw - F.softplus(-2 * raw))  # log(1 - tanh^2): differs (2)
    return torch.tanh(raw), log_prob.sum(-1)


def critic_loss(agent: Agent, batch: dict, noise, args: Args):
    """SAC, eq. 5, over M copies of o and K of o'; noise (K B, A). -> loss, features (B, F), metrics"""
    (k, m), b, alpha = args.copies, len(batch["actions"]), agent.log_alpha.detach().exp()
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        with torch.no_grad():
            rgb, state = batch["next_obs"]["rgb"], batch["next_obs"]["state"].repeat(k, 1)
            next_actions, log_probs = sample_actions(agent.actor, agent.policy_features(rgb), state, noise)
            next_q = agent.target(agent.target.encoder(rgb), state, next_actions).amin(0) - alpha * log_probs
            targets = batch["rewards"] + batch["discounts"] * next_q.view(k, b).mean(0)  # DrQ, eq. 1; SAC, eq. 3
        features = agent.critic.encoder(batch["obs"]["rgb"])
        features = features if args.critic_gradient else features.detach()
        q = agent.critic(features, batch["obs"]["state"].repeat(m, 1), batch["actions"].repeat(m, 1))
        loss = (q.view(2, m, b) - targets).square().mean(-1).sum()
    metrics = {"loss/qf": loss, "train/q": q.mean(), "train/target": targets.mean()}
    return loss, features[:b].detach(), {key: value.detach() for key, value in metrics.items()}


def actor_loss(agent: Agent, batch: dict, features, noise, args: Args):
    """SAC, eqs. 7 and 18; features (B, F) are the critic's, without gradient: differs (1). noise (B, A)"""
    b, state = len(noise), batch["obs"]["state"]
    with torch.autocast(noise.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        own = agent.actor.encoder(batch["obs"]["rgb"][:b]) if args.encoder == "separate" else features
        actions, log_probs = sample_actions(agent.actor, own, state, noise)
        q = agent.critic(features, state, actions).amin(0)
    loss, alpha = (agent.log_alpha.detach().exp() * log_probs - q).mean(), agent.log_alpha.exp()
    alpha_loss = -(alpha * (log_probs.detach() - actions.shape[-1])).mean()
    metrics = {"loss/actor": loss, "loss/alpha": alpha_loss, "train/entropy": -log_probs.mean(), "train/alpha": alpha}
    return loss + alpha_loss, {key: value.detach() for key, value in metrics.items()}


def autoencoder_loss(agent: Agent, rgb, dither, args: Args):
    """SAC+AE's regularised autoencoder; rgb uint8 (B, H, W, C), dither of its shape, uniform in [0, 1).

    The picture to be drawn has 32 levels and noise of a level's width (Kingma and Dhariwal, arXiv 1807.03039).
    """
    with torch.autocast(rgb.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        z = agent.critic.projection(agent.critic.encoder(rgb))
        drawn = agent.decoder(z).float()
    goal = ((rgb // 8).float() + dither) / 32 - 0.5
    error, penalty = (drawn - goal).square().mean(), 0.5 * z.float().square().sum(-1).mean()
    metrics = {"loss/reconstruction": error.detach(), "train/features_square": penalty.detach()}
    return error + args.decoder_lambda * penalty, metrics


def descend(loss, *optimizers):
    """One step of each optimiser."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def target_update(agent: Agent, args: Args):
    """Polyak: target <- (1 - tau) target + tau critic, with encoder_tau for convolutions and bottleneck."""
    for part, tau in (("encoder", args.encoder_tau), ("projection", args.encoder_tau), ("heads", args.tau)):
        target, source = getattr(agent.target, part).parameters(), getattr(agent.critic, part).parameters()
        torch._foreach_lerp_(list(target), list(source), tau)


def update_block(agent: Agent, replay, args: Args, generator, losses=(critic_loss, actor_loss, autoencoder_loss)):
    """`policy_frequency` critic updates, then one of actor, temperature and target. -> mean metrics"""
    chance, means = dict(generator=generator, device=generator.device), {}
    for _ in range(args.policy_frequency):
        batch = views(replay.sample(args.batch_size, generator), args, generator)
        b, a = batch["actions"].shape
        loss, features, metrics = losses[0](agent, batch, torch.randn((args.copies[0] * b, a), **chance), args)
        descend(loss, agent.optimizers["q"])
        if agent.decoder:
            rgb = batch["obs"]["rgb"][:b]
            loss, more = losses[2](agent, rgb, torch.rand(rgb.shape, **chance), args)
            descend(loss, agent.optimizers["autoencoder"])
            metrics |= more
        means = {k: means.get(k, 0) + v / args.policy_frequency for k, v in metrics.items()}
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, metrics = losses[1](agent, batch, features, torch.randn((b, a), **chance), args)
    agent.critic.requires_grad_(True)
    descend(loss, agent.optimizers["actor"], *[agent.optimizers["alpha"]] * args.autotune)
    target_update(agent, args)
    return means | metrics


class Learner:
    """Runs blocks of updates by one of three routes to the same numbers: plain, compiled losses, one CUDA graph."""

    def __init__(self, agent: Agent, replay: Replay, args: Args, generator: torch.Generator, owed: float = 0.0):
        losses = [torch.compile(f) if args.compile else f for f in (critic_loss, actor_loss, autoencoder_loss)]
        self.parts, self.args, self.generator = (agent, replay, args, generator, losses), args, generator
        self.owed, self.count = owed, 0  # blocks to do, blocks done since `read`
        self.totals = defaultdict(lambda: torch.zeros((), device=generator.device))  # sums of metrics since `read`
        self.step, self.setup_seconds = None, 0.0

    def block(self):
        """One block of updates; adds its metrics to `totals`."""
        for k, v in update_block(*self.parts).items():
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

    def run(self):
        """The updates owed for one step of all environments. Once set up, nothing waits for the device."""
        self.owed += self.args.num_envs / self.args.update_every / self.args.policy_frequency
        blocks = int(self.owed)
        self.owed, self.count = self.owed - blocks, self.count + blocks
        if blocks and self.step is None:  # the first blocks are ordinary updates all the same
            begin, warm_up, self.step = time.perf_counter(), 1, self.block
            if self.args.cudagraphs:
                warm_up = min(blocks, 3)
                self.step = self.capture(warm_up).replay
            else:
                self.block()
            blocks, self.setup_seconds = blocks - warm_up, time.perf_counter() - begin
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
def evaluate(policy, env, args: Args, video: Path | None) -> tuple[dict, torch.Tensor]:
    """Whole episodes, deterministic actions, fixed seeds. -> metrics; pictures (8, H, W, C) seen in the first episode

    ci_low and ci_high: 95 % interval of the mean return, 1.96 standard errors to each side.
    """
    seen, ends, n = [], [], args.eval_episodes
    for seed in range(EVAL_SEED, EVAL_SEED + n // env.num_envs):
        obs, running = env.reset(seed=seed), torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        policy.reset()
        for _ in range(env.max_episode_steps):
            actions = policy.act(obs)
            seen += [policy.view[:4].clone()] if seed == EVAL_SEED else []
            obs, _, terminations, truncations, info = env.step(actions)
            ended = (terminations | truncations) & running  # each world counts once
            ends.append(torch.stack([info["episode"][k].double() for k in EPISODE])[:, ended])
            running &= ~ended
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, [side_by_side([frame[..., -3:]]) for frame in seen], macro_block_size=1,
                         fps=max(1, round(env.control_hz)))
    returns, successes = torch.cat(ends, 1).cpu()
    mean, std = float(returns.mean()), float(returns.std()) if n > 1 else 0.0
    half = 1.96 * std / math.sqrt(n)
    results = {"eval/return": mean, "eval/return_std": std, "eval/ci_low": mean - half, "eval/ci_high": mean + half}
    results |= {"eval/success_rate": float(successes.mean())} if getattr(env, "has_success", True) else {}
    return results, torch.stack([seen[i][0] for i in np.linspace(0, len(seen) - 1, 8).astype(int)])


def side_by_side(rows: list[torch.Tensor], side: int = 160) -> np.ndarray:
    """Rows of pictures uint8 (n, H, W, 3), enlarged -> one picture."""
    large = [F.interpolate(row.permute(0, 3, 1, 2).float(), (side, side)).byte().permute(0, 2, 3, 1) for row in rows]
    return torch.cat([torch.cat(list(row), 1) for row in large]).cpu().numpy()


@torch.no_grad()
def reconstructions(agent: Agent, rgb: torch.Tensor) -> np.ndarray:
    """Newest frames of the pictures uint8 (n, H, W, C) above, what the decoder makes of them below."""
    drawn = agent.decoder(agent.critic.projection(agent.critic.encoder(rgb))) + 0.5
    return side_by_side([rgb[..., -3:], (drawn[..., -3:] * 255).clamp(0, 255).byte()])


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
    if not isinstance(checkpoint, dict) or checkpoint.get("algo") != "sac_pixels":
        raise ValueError(f"{path} is not a checkpoint of sac_pixels")
    return checkpoint


def check_fits(checkpoint: dict, args: Args, shapes: dict):
    """Raises ValueError naming the first field in which the checkpoint differs from this run."""
    theirs, mine = checkpoint["args"] | checkpoint["shapes"], asdict(args) | shapes
    # to continue a run, what its environments, random states and buffer are bound to
    bound = ["num_envs", "device", *["buffer_size"] * bool(checkpoint.get("replay"))]
    for field in ("env_id", "preset", "encoder", "encoder_type", "encoder_strides", "encoder_channels", "feature_dim",
                  "hidden", "image_size", "frame_stack", "action_repeat", *shapes, *bound * bool(args.resume)):
        if theirs[field] != mine[field]:
            raise ValueError(f"the checkpoint differs in {field}: it has {theirs[field]}, this run {mine[field]}")


# --- Policy -----------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """Observation in, action out, from one checkpoint (file or its content) and no simulator."""

    def __init__(self, source: str | Path | dict, device: str | torch.device = "cpu"):
        super().__init__()
        checkpoint = source if isinstance(source, dict) else load_file(source)
        self.args, self.spec = Args(**checkpoint["args"]), checkpoint["spec"]
        own = self.args.encoder == "separate"
        with torch.device("meta"):  # shapes only: no random number is drawn
            self.actor = Actor(checkpoint["shapes"], self.args)
            self.encoder = None if own else Encoder(checkpoint["shapes"]["channels"] * self.args.frame_stack, self.args)
        weights = {k.removeprefix("critic."): v for k, v in checkpoint["agent"].items()
                   if k.startswith("actor.") or (k.startswith("critic.encoder.") and not own)}
        self.load_state_dict(weights, assign=True)
        self.device, self.stack = torch.device(device), None
        self.to(self.device)

    def reset(self):
        """Forget the earlier pictures; call at the start of every episode."""
        self.stack = None

    def preprocess(self, frame: np.ndarray) -> torch.Tensor:
        """A camera's picture, uint8 (H, W, 3) of any size -> its middle square, area mean: uint8 (1, h, h, 3)."""
        side, size = min(frame.shape[:2]), (self.args.render_size,) * 2
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        square = torch.from_numpy(frame[None, top:top + side, left:left + side].copy()).to(self.device)
        small = F.interpolate(square.permute(0, 3, 1, 2).float(), size=size, mode="area")
        return small.round().to(torch.uint8).permute(0, 2, 3, 1)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "rgb" uint8 (N, render_size, render_size, 3) and "state" (N, S) -> actions (N, A) = tanh(mean)."""
        rgb = torch.as_tensor(obs["rgb"], device=self.device).clone()
        past = self.stack[1:] if self.stack else [rgb] * (self.args.frame_stack - 1)
        self.stack = [*past, rgb]
        self.view = center(torch.cat(self.stack, -1), self.args)
        state = torch.as_tensor(obs["state"], dtype=torch.float32, device=self.device)
        return torch.tanh(self.actor((self.actor.encoder or self.encoder)(self.view), state)[0])


# --- train ------------------------------------------------------------------------------------------------------------
def check_finite(agent: Agent, metrics: dict, global_step: int, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    values = agent.state_dict() | {k: torch.tensor(v) for k, v in metrics.items()}
    finite = torch.stack([value.isfinite().all().cpu() for value in values.values()]).tolist()
    if not all(finite):
        good = checkpoint if checkpoint.exists() else "none yet"
        name = list(values)[finite.index(False)]
        raise FloatingPointError(f"{name} is not finite at step {global_step}; last good checkpoint: {good}")


def write_row(path: Path, row: dict, track: bool, **media):
    """Append to a CSV file, whose first row names the columns; with `track` it goes to Weights & Biases too."""
    rows = [row.values()] if path.exists() else [row.keys(), row.values()]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
    if track:
        import wandb
        kinds = {"video": wandb.Video, "reconstruction": wandb.Image}
        shown = {f"eval/{k}": kinds[k](str(path)) for k, path in media.items() if path}
        wandb.log(row | shown, step=row["global_step"])


# same in: squint_sac.py, drqv2.py, sac_pixels.py, sapo_rewarped.py, ppo_mjx_go1.py, resfit.py
def forget_after(path: Path, global_step: int):
    """Drop the rows of a CSV file that come after the checkpoint which is resumed."""
    if path.exists():
        rows = path.read_bytes().splitlines(keepends=True)
        path.write_bytes(b"".join(rows[:1] + [row for row in rows[1:] if int(row.partition(b",")[0]) <= global_step]))


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, and `run`, the folder.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at the first NaN,
    ChildProcessError where a process of the environments has died.
    """
    args.check()
    device = torch.device(args.device)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    name = args.name or time.strftime(f"{args.env_id}__sac_pixels-{args.preset}__s{args.seed}__%Y%m%d-%H%M%S")
    run = Path(args.resume or Path("runs") / name)
    if not args.resume and (run / "args.json").exists():
        raise ValueError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    source = run / "checkpoint.pt" if args.resume else args.checkpoint
    checkpoint = load_file(source) if source else None

    env, eval_env = make_envs(args, device)
    shapes = dict(channels=eval_env.image_shape[2], state=eval_env.state_dim, action=eval_env.action_dim)
    agent = Agent(args, shapes, device)
    now = dict(global_step=0, best=-math.inf, wall_time=0.0, train_time=0.0, owed=0.0)
    if checkpoint:
        check_fits(checkpoint, args, shapes)
        agent.load_state_dict(checkpoint["agent"])
        now |= checkpoint["now"] if args.resume else {}
    for use, optimizer in agent.optimizers.items() if args.resume else ():
        optimizer.load_state_dict(checkpoint["optimizers"][use])
    print(f"{run}: {args.env_id}, {args.preset} on {device.type}; "
          f"defaults changed by TUNED: {tuned_defaults(args.env_id, args.device, args.preset) or 'none'}")

    def weights() -> dict:  # all that Policy and --checkpoint need
        # the renderer by its name: elsewhere "auto" might be another one, which draws other pictures
        return dict(algo="sac_pixels", args=asdict(args) | dict(renderer=eval_env.spec.get("renderer", args.renderer)),
                    shapes=shapes, spec=json.loads(json.dumps(eval_env.spec)), agent=agent.state_dict(),
                    versions=dict(torch=str(torch.__version__), numpy=np.__version__), now=dict(now))

    def evaluate_now(label: str) -> tuple[dict, dict]:  # -> metrics, pictures written
        files = dict(video=run / f"videos/{label}.mp4" if args.capture_video else None)
        results, seen = evaluate(Policy(weights(), device), eval_env, args, files["video"])
        if agent.decoder:
            files["reconstruction"] = run / f"reconstructions/{label}.png"
            files["reconstruction"].parent.mkdir(parents=True, exist_ok=True)
            imageio.imwrite(files["reconstruction"], reconstructions(agent, seen))
        return results, files

    if args.evaluate:
        results, _ = evaluate_now("evaluate")
        print(json.dumps(results))
        eval_env.close()
        return results | {"run": str(run)}

    # every use of chance has a generator of its own, so that an evaluation does not disturb the others
    random = {use: torch.Generator(device).manual_seed(1_000_003 * args.seed + i + now["global_step"])
              for i, use in enumerate(("act", "learn"))}
    still = torch.zeros((args.num_envs, shapes["action"]), device=device)
    obs = env.step(still)[0]  # not reset(), which would undo the staggering
    if args.resume:
        env.load_state_dict(pickle.loads(checkpoint["env"]))
        obs = {k: v.to(device) for k, v in checkpoint["obs"].items()}
        for use, generator in random.items():
            generator.set_state(checkpoint["random"][use])
    slots = args.buffer_size // args.num_envs
    replay = Replay(obs, shapes["action"], slots, args.frame_stack, args.n_step, args.gamma, device)
    empty_until = now["global_step"]  # from there on --learning-starts counts
    if args.resume and checkpoint["replay"]:
        replay.load_state_dict(checkpoint["replay"])
        empty_until = 0
    elif args.resume:
        print("no replay buffer was saved (--save-buffer), it starts empty")
    learner = Learner(agent, replay, args, random["learn"], now["owed"])
    if args.track:
        import wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), name=run.name, config=asdict(args))
    run.mkdir(parents=True, exist_ok=True)  # not before all fits: a refused command changes nothing on the disk
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    for name in ("metrics.csv", "eval.csv") if args.resume else ():
        forget_after(run / name, now["global_step"])
    episodes, results = torch.zeros(1 + len(EPISODE), device=device), {}  # since the last log: ended, sums of EPISODE
    random_until = 0 if args.checkpoint else args.learning_starts
    first, born, begin = dict(now), START - now["wall_time"], time.perf_counter() - now["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=now["global_step"], unit="step", mininterval=1)

    while now["global_step"] < args.total_timesteps:
        # act
        noise = torch.randn(still.shape, generator=random["act"], device=device)
        if now["global_step"] < random_until:
            actions = torch.rand(still.shape, generator=random["act"], device=device) * 2 - 1
        else:
            present = replay.present()
            with torch.no_grad():
                features = agent.policy_features(center(present["rgb"], args))
                actions, _ = sample_actions(agent.actor, features, present["state"], noise)

        # step, with --overlap update meanwhile, and store
        meanwhile = args.overlap and now["global_step"] - empty_until >= args.learning_starts
        if meanwhile:
            env.step_begin(actions)
            learner.run()
        obs, rewards, terminations, truncations, info = env.step_end() if meanwhile else env.step(actions)
        dones = terminations | truncations
        discounts = info.get("discount", torch.ones_like(rewards)) * ~terminations
        replay.add(actions, rewards, discounts, dones, info["final_obs"], obs)
        episodes += torch.where(dones, torch.stack([dones, *(info["episode"][k] for k in EPISODE)]), 0.0).sum(-1)

        # update
        before, now["global_step"] = now["global_step"], now["global_step"] + args.num_envs
        if now["global_step"] - empty_until >= args.learning_starts and not meanwhile:
            learner.run()
        bar.update(args.num_envs)

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
        frames = now["global_step"] * getattr(env, "action_repeat", 1)
        metrics |= {"train/episodes": count, "train/nan_resets": int(env.nan_resets), "time/frames": frames,
                    "time/sps": speed}
        clock = {k: now[k] for k in CLOCK}
        if count:
            bar.set_postfix_str(f"return {metrics['train/return']:.2f}")
        if "loss/qf" in metrics:  # the first row names the columns, so it waits for an update
            write_row(run / "metrics.csv", clock | metrics, args.track)
        if not eval_due:
            continue

        # evaluate
        pause = time.perf_counter()
        results, files = evaluate_now(f"step_{now['global_step']:09d}")
        write_row(run / "eval.csv", clock | results, args.track, **files)
        bar.write(f"{now['global_step']} steps: " + ", ".join(f"{k[5:]} {v:.3f}" for k, v in results.items()))
        now["best"] = max(now["best"], results["eval/return"])
        if results["eval/return"] == now["best"]:
            save(run / "best.pt", weights())

        # save
        save(run / "checkpoint.pt", weights() | dict(
            optimizers={use: optimizer.state_dict() for use, optimizer in agent.optimizers.items()},
            env=pickle.dumps(env.state_dict()),  # as bytes: the file itself can be read without running code
            obs=obs, random={use: generator.get_state() for use, generator in random.items()},
            replay=replay.state_dict() if args.save_buffer else None))
        begin += time.perf_counter() - pause
    for part in (bar, env, eval_env):
        part.close()
    return results | {k: now[k] for k in CLOCK} | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError, ChildProcessError) as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
