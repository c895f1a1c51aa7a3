"""Soft actor-critic from pixels in its three patterns: who trains the convolutions is one argument.

Papers: Haarnoja et al., "Soft Actor-Critic Algorithms and Applications", arXiv 1812.05905 (SAC).
Yarats et al., "Improving Sample Efficiency in Model-Free Reinforcement Learning from Images", arXiv
1910.01741 (SAC+AE). Kostrikov, Yarats and Fergus, "Image Augmentation Is All You Need", arXiv
2004.13649 (DrQ). Laskin et al., "Reinforcement Learning with Augmented Data", arXiv 2004.14990
(RAD). The survey: docs/visual_rl.md.

    --encoder       who trains the convolutions                  used by              here
    separate        the actor's its own loss, the critic's too   SAC on robots        actor_loss
    critic          shared; the critic's loss alone              RAD, DrQ, DrQ-v2     critic_loss
    autoencoder     shared; the critic's and a reconstruction    SAC+AE             autoencoder_loss
      with --no-critic-gradient, the reconstruction alone        SLAC, Dreamer        critic_loss
    --augmentation  none                                         SAC, SAC+AE
                    shift, each of K and M copies anew           DrQ                  augment
                    crop, translate                              RAD                  augment

    target   y = mean over K copies of o' of r + G (min Q'(o', a') - alpha log pi(a'|o')),
             a' ~ pi                                                            (SAC 3, DrQ 1)
    critics  sum over M copies of o and both heads of the mean of (Q(o, a) - y)^2   (SAC 5, DrQ 3)
    actor    mean of alpha log pi(a|o) - min Q(o, a)                                (SAC 7)
    alpha    mean of -alpha (log pi(a|o) + H), H = -A                               (SAC 18)
    decoder  mean of (decoder(z) - o)^2 + lambda |z|^2 / 2, z the critic's features (SAC+AE)

Differences from the papers and the authors' code:
 1. The actor's loss uses the features that the critic's loss computed, from before that step;
    SAC+AE, RAD and DrQ compute them again after it. It saves a pass through the convolutions. The
    reconstruction's step comes before the actor's, not after it. DrQ's losses are added over M
    copies, as in its code; its paper averages them. The 1,000 updates that SAC+AE's code makes at
    once after its random actions are left out.
 2. The tanh's share of log pi is exact, as in DrQ's code; SAC+AE's and RAD's add 1e-6.
 3. Of RAD's ten augmentations there are the two that were best, crop and translate.
 4. Every frame is stored once as uint8 and augmentation is part of the update; theirs store whole
    stacks.
 5. The state of an environment that has one joins the features of the image.
 6. Ours: several environments, --no-critic-gradient, and every combination of --encoder and
    --augmentation. On a CPU the sizes are smaller: TUNED, below.

Commands, from the repository's root:
    train          python algos/sac_pixels.py --env-id cartpole_swingup --preset drq
    smallest run   python algos/sac_pixels.py --env-id dot_reach --device cpu
    evaluate       python algos/sac_pixels.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/sac_pixels.py --resume runs/NAME    (exact with --save-buffer)

Expected result: with a CPU's sizes, dot_reach from -22 (random; the best possible is -2) to -2.8
after 10,000 transitions, the mean of three seeds at -2.7, -3.0 and -2.8; cartpole_swingup 796 after
52,500 of its steps (420,000 frames, two hours of half a core), one seed. Curves and commands:
docs/algos/sac_pixels.md. Not yet measured on a GPU.

Shapes: N environments, B batch, K and M copies of next and present observation, A action
dimensions, S state dimensions, H x W image, C channels (3 x frame stack), F features of the
convolutions, Z features of the bottleneck.
"""

# --- Imports --------------------------------------------------------------------------------------
import os

# Threads spin for a moment before they wait: much longer, and a run beside other work collapses.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import copy
import csv
import json
import math
import re
import signal
import sys
import time
from dataclasses import asdict, dataclass, replace
from fnmatch import fnmatch
from functools import partial
from pathlib import Path
from typing import Literal

import imageio.v2 as imageio
import torch
import torch.nn as nn
import torch.nn.functional as F
import tyro
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
DECODER_PENALTY = 1e-6  # of the features' square, beside the reconstruction
DECODER_DECAY = 1e-7  # weight decay

# --- Args -----------------------------------------------------------------------------------------
SAC_AE = dict(  # and RAD, which is built on its code
    target_augs=1,
    online_augs=1,
    alpha_lr=1e-4,
    alpha_beta=0.5,
    encoder_tau=0.05,
    batch_size=128,
    delta_orthogonal=True,
)
SMALL = dict(  # sizes for a CPU
    image_size=48,
    margin=2,
    encoder_strides=(2, 1, 1),
    encoder_channels=16,
    hidden=256,
    batch_size=64,
    target_augs=1,
    online_augs=1,
    buffer_size=100_000,
    eval_envs=1,
    eval_episodes=5,
    amp=False,
    compile=False,
)
DOT_REACH = dict(
    image_size=32,
    frame_stack=1,
    action_repeat=1,
    encoder_strides=(2, 2, 1),
    gamma=0.9,
    num_envs=8,
    total_timesteps=10_000,
    eval_freq=1_000,
    eval_episodes=64,
    eval_envs=64,
    log_freq=500,
)
# (env ids, kind of device, preset) -> defaults other than DrQ's, those of Args; later rows win
TUNED = {
    ("*", "*", "sac_ae"): SAC_AE
    | dict(encoder="autoencoder", augmentation="none", buffer_size=1_000_000),
    ("*", "*", "rad"): SAC_AE | dict(augmentation="crop", margin=16),
    ("*", "*", "rad_translate"): SAC_AE | dict(augmentation="translate", image_size=108, margin=8),
    ("cheetah_*", "*", "rad*"): dict(lr=2e-4),
    # PlaNet's action repeats: 500,000 frames are 62,500, 125,000 or else 250,000 steps
    ("cartpole_*", "*", "*"): dict(action_repeat=8, total_timesteps=62_500),
    ("reacher_*", "*", "*"): dict(action_repeat=4, total_timesteps=125_000),
    ("cheetah_*", "*", "*"): dict(action_repeat=4, total_timesteps=125_000),
    ("cup_*", "*", "*"): dict(action_repeat=4, total_timesteps=125_000),
    # what follows is ours
    ("SO101*", "*", "*"): dict(action_repeat=1),
    ("*", "cpu", "*"): SMALL,
    ("dot_reach", "*", "*"): SMALL | DOT_REACH,
}


@dataclass
class Args:
    # run
    env_id: str = "dot_reach"  # task: dot_reach, SO101... or a DeepMind Control id, domain_task
    preset: Literal["drq", "rad", "rad_translate", "sac_ae"] = "drq"  # whose values to use
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 250_000  # environment transitions; x action_repeat = frames
    eval_freq: int = 5_000  # transitions between evaluations; each also saves checkpoint.pt
    eval_episodes: int = 10  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 10  # of them at once; divides eval_episodes
    log_freq: int = 1_000  # transitions between rows of metrics.csv; only then the host waits
    evaluate: bool = False  # only evaluate --checkpoint
    checkpoint: str | None = None  # file to evaluate
    resume: str | None = None  # run folder to continue, with its arguments
    save_buffer: bool = False  # keep buffer and environments in checkpoint.pt: --resume is exact
    capture_video: bool = True  # write an mp4 of the first episode of every evaluation
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose the project

    # environment
    num_envs: int = 1  # parallel environments
    image_size: int = 84  # pixels a side that the networks see
    action_repeat: int = 2  # frames for which an action is held (not SO101)
    frame_stack: int = 3  # latest images shown together, so that motion is seen
    camera: int | None = None  # the task's camera (DeepMind Control); None: the published one
    fast_render: bool = False  # no shadows and no smoothing, drawn faster (DeepMind Control)

    # algorithm
    encoder: Literal["separate", "critic", "autoencoder"] = "critic"  # who trains the convolutions
    critic_gradient: bool = True  # off: the autoencoder alone trains the convolutions
    encoder_strides: tuple[int, ...] = (2, 1, 1, 1)  # of the 3 x 3 convolutions, one number a layer
    encoder_channels: int = 32  # filters of each convolution
    delta_orthogonal: bool = False  # first weights only in the middle of each filter (SAC+AE, RAD)
    feature_dim: int = 50  # Z: numbers that actor and critic each make of the convolutions' output
    hidden: int = 1024  # width of the two layers of actor and critics
    augmentation: Literal["none", "shift", "crop", "translate"] = "shift"  # of each sampled image
    margin: int = 4  # pixels of shift; by which an image to crop is larger, to translate smaller
    target_augs: int = 2  # K: augmented copies of the next observation; targets are averaged
    online_augs: int = 2  # M: augmented copies of the observation, each with a critic loss
    buffer_size: int = 100_000  # frames kept, over all environments
    batch_size: int = 512  # transitions per update
    update_every: int = 1  # transitions between critic updates, over all environments
    learning_starts: int = 1_000  # transitions of uniformly random actions before any update
    policy_frequency: int = 2  # critic updates per update of actor, temperature and target
    lr: float = 1e-3  # Adam's learning rate of actor, critic and autoencoder
    alpha_lr: float = 1e-3  # Adam's learning rate of log alpha
    alpha_beta: float = 0.9  # Adam's first decay rate of log alpha
    alpha: float = 0.1  # first weight of the entropy, then learned to hold the entropy at -A
    gamma: float = 0.99  # discount per step
    tau: float = 0.01  # share of the critic's heads that moves into their target
    encoder_tau: float = 0.01  # the same of its convolutions and bottleneck

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and replay buffer
    amp: bool = True  # losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the losses with torch.compile
    cudagraphs: bool = False  # replay updates as a CUDA graph (tensordict); not measured yet

    @property
    def render_size(self) -> int:
        """Pixels a side of the image that the environment draws and the buffer stores."""
        if self.augmentation == "crop":
            return self.image_size + self.margin
        if self.augmentation == "translate":
            return self.image_size - self.margin
        return self.image_size


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def need(holds, message: str):
    """Raises ValueError with the message unless something holds."""
    if not holds:
        raise ValueError(message)


def check(args: Args):
    """Raises ValueError, one line, for a choice that would fail late, silently or unreadably."""
    cuda = torch.cuda.is_available()
    need(cuda or args.device == "cpu", "there is no CUDA device here: use --device cpu")
    need(args.evaluate == bool(args.checkpoint), "--evaluate and --checkpoint FILE go together")
    need(args.num_envs > 0 and args.eval_envs > 0, "--num-envs, --eval-envs must be at least 1")
    whole = (
        args.eval_envs > 0 and args.eval_episodes % args.eval_envs == 0 and args.eval_episodes > 1
    )
    need(whole, "--eval-episodes must be a multiple of --eval-envs, and at least 2")
    trained = args.critic_gradient or args.encoder == "autoencoder"
    need(trained, "--no-critic-gradient trains no convolutions without --encoder autoencoder")
    differ = args.augmentation != "none" or args.target_augs == args.online_augs == 1
    need(differ, "--augmentation none makes copies equal: add --target-augs 1 --online-augs 1")
    need(0 <= args.margin < args.image_size, "--margin must be at least 0, below --image-size")
    need(args.learning_starts >= args.num_envs, "--learning-starts must be at least --num-envs")
    frames = (args.frame_stack + 3) * args.num_envs
    need(args.buffer_size >= frames, f"--buffer-size must be at least {frames}")


def tuned(env_id: str, device: str, preset: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for (pattern, kind, name), row in TUNED.items():
        right_task = fnmatch(env_id, pattern)
        right_device = fnmatch(device.split(":")[0], kind)
        if right_task and right_device and fnmatch(preset, name):
            values |= row
    return values


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. Defaults, and so --help, are those of the task, device and preset, or
    of the run or checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    if given.checkpoint:
        saved = Args(**load(given.checkpoint)["args"])
        defaults = replace(saved, name="", resume=None, device=given.device)
    else:
        chosen = dict(env_id=given.env_id, device=given.device, preset=given.preset)
        defaults = Args(**chosen | tuned(**chosen))
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
    """-> training environment (None with --evaluate), evaluation environment: the contract is
    envs/__init__.py's."""
    try:
        import envs
    except ModuleNotFoundError as error:
        message = "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        raise ValueError(message) from error
    if args.env_id.startswith("SO101"):
        options = dict(render_size=args.render_size)
    else:
        options = dict(image_size=args.render_size, action_repeat=args.action_repeat)
        options |= dict(camera=args.camera, fast_render=args.fast_render or None)
    eval_env = envs.make(args.env_id, args.eval_envs, args.device, seed=EVAL_SEED, **options)
    if args.evaluate:
        return None, eval_env
    options |= dict(seed=args.seed, stagger=True)
    return envs.make(args.env_id, args.num_envs, args.device, **options), eval_env


# --- Networks -------------------------------------------------------------------------------------
def init_weights(module: nn.Module, delta: bool):
    """Orthogonal weights, gain sqrt 2 for convolutions and 1 for linear layers; zero biases.

    delta: a filter is zero but in its middle, where it is orthogonal (arXiv 1806.05393).
    """
    for layer in module.modules():
        if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
            nn.init.zeros_(layer.bias)
            weight = layer.weight.data
            gain = 1.0 if weight.ndim == 2 else math.sqrt(2)
            if delta and weight.ndim == 4:
                weight.zero_()
                weight = weight[:, :, 1, 1]
            nn.init.orthogonal_(weight, gain)


class Encoder(nn.Module):
    """3 x 3 convolutions without padding, ReLU after each: uint8 (B, H, W, C) -> (B, F)."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        layers = []
        self.sizes = [args.image_size]  # pixels a side before and after each convolution
        for stride in args.encoder_strides:
            layers += [nn.Conv2d(channels, args.encoder_channels, 3, stride), nn.ReLU()]
            channels = args.encoder_channels
            self.sizes.append((self.sizes[-1] - 3) // stride + 1)
        need(min(self.sizes) > 0, "--image-size is too small for --encoder-strides")
        self.convs = nn.Sequential(*layers)
        self.features = channels * self.sizes[-1] ** 2

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float().div_(255)  # channels last, as a view
        return self.convs(x).permute(0, 2, 3, 1).flatten(1)


class Decoder(nn.Module):
    """The encoder's mirror, with transposed convolutions: (B, Z) -> (B, H, W, C) around 0."""

    def __init__(self, encoder: Encoder, args: Args):
        super().__init__()
        self.size = encoder.sizes[-1]
        self.linear = nn.Linear(args.feature_dim, encoder.features)
        layers = []
        for conv, size in zip(encoder.convs[::2], encoder.sizes, strict=False):
            unseen = (size - 3) % conv.stride[0]  # pixels at the edge that the encoder skipped
            widths = (conv.out_channels, conv.in_channels)
            mirror = nn.ConvTranspose2d(*widths, 3, conv.stride, output_padding=unseen)
            layers = [nn.ReLU(), mirror, *layers]
        self.convs = nn.Sequential(*layers)

    def forward(self, z):
        x = self.linear(z).unflatten(1, (self.size, self.size, -1)).permute(0, 3, 1, 2)
        return self.convs(x).permute(0, 2, 3, 1)


class Heads(nn.Module):
    """A bottleneck and the networks on it: features (B, F), others (B, ...) -> (heads, B, outputs).

    The actor has one head, the critic two; each has a bottleneck of its own in every pattern.
    """

    def __init__(self, encoder: Encoder, others: int, heads: int, outputs: int, args: Args):
        super().__init__()
        z, hidden = args.feature_dim, args.hidden
        linear = nn.Linear(encoder.features, z)
        self.projection = nn.Sequential(linear, nn.LayerNorm(z), nn.Tanh())
        self.heads = nn.ModuleList()
        for _ in range(heads):
            first = nn.Linear(z + others, hidden)
            second = nn.Linear(hidden, hidden)
            last = nn.Linear(hidden, outputs)
            self.heads.append(nn.Sequential(first, nn.ReLU(), second, nn.ReLU(), last))

    def forward(self, features, *others):
        x = torch.cat([self.projection(features), *others], -1)
        return torch.stack([head(x).float() for head in self.heads])


class Agent(nn.Module):
    """All that learns. `encoder` is the critic's, and the actor's too unless it has its own."""

    def __init__(self, shapes: dict, args: Args):
        super().__init__()
        channels = shapes["channels"] * args.frame_stack
        state, actions = shapes["state"], shapes["action"]
        self.encoder = Encoder(channels, args)
        self.actor_encoder, self.decoder = None, None
        if args.encoder == "separate":
            self.actor_encoder = Encoder(channels, args)
        if args.encoder == "autoencoder":
            self.decoder = Decoder(self.encoder, args)
        self.actor = Heads(self.encoder, state, 1, 2 * actions, args)
        self.critic = Heads(self.encoder, state + actions, 2, 1, args)
        init_weights(self, args.delta_orthogonal)
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))

    def policy_features(self, rgb):
        encoder = self.actor_encoder or self.encoder
        return encoder(rgb)

    def gaussian(self, features, state):
        """Mean and log std (B, A) of actions before the tanh."""
        mean, log_std = self.actor(features, state)[0].chunk(2, -1)
        return mean, -10 + 6 * (torch.tanh(log_std) + 1)  # log std in [-10, 2]


def make_optimizers(agent: Agent, args: Args) -> dict[str, torch.optim.Adam]:
    """Adam for the critic's loss, for the actor's and alpha's, and for the autoencoder's."""
    on_gpu = args.device != "cpu"
    adam = partial(torch.optim.Adam, lr=args.lr, fused=True, capturable=on_gpu)
    encoder = [*agent.encoder.parameters()]
    actor = [*agent.actor.parameters()]
    if agent.actor_encoder:
        actor += agent.actor_encoder.parameters()
    alpha = dict(params=[agent.log_alpha], lr=args.alpha_lr, betas=(args.alpha_beta, 0.999))
    optimizers = dict(
        q_optimizer=adam([*encoder, *agent.critic.parameters()]),
        actor_optimizer=adam([dict(params=actor), alpha]),
    )
    if agent.decoder:  # a second Adam on the critic's convolutions and bottleneck, as in SAC+AE
        seen = dict(params=[*encoder, *agent.critic.projection.parameters()])
        drawn = dict(params=agent.decoder.parameters(), weight_decay=DECODER_DECAY)
        optimizers["autoencoder_optimizer"] = adam([seen, drawn])
    return optimizers


# --- Storage --------------------------------------------------------------------------------------
# same in: drqv2, sac_pixels
def free_memory(device: torch.device) -> float:
    """Bytes that can still be had: of the GPU, or of this machine and the container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine, limit = Path("/proc/meminfo"), Path("/sys/fs/cgroup/memory.max")
    free = math.inf
    if machine.exists():
        free = 1024 * int(re.search(r"MemAvailable: *(\d+)", machine.read_text())[1])
    if limit.exists() and limit.read_text().strip() != "max":
        free = min(free, int(limit.read_text()))
    return free


# same in: drqv2, sac_pixels
class Replay:
    """A ring of F slots for each of N environments, where `obs` is. Every frame is stored once.

    An episode of L steps takes L + 1 slots in a row: each has an observation, with the action
    that followed, its reward and its discount (0 where it terminates); the final observation
    stands alone in the last one. `age` counts from the episode's first slot, so a slot is final
    if the next one's age is 0. `head` (N,) numbers the slots of the present observations since
    the run began; modulo F it is their place in the ring.
    """

    def __init__(
        self, obs: dict, action_dim: int, slots: int, stack: int, n_step: int, gamma: float
    ):
        self.slots, self.stack, self.n_step, self.gamma = slots, stack, n_step, gamma
        num_envs, device = len(obs["rgb"]), obs["rgb"].device
        self.envs = torch.arange(num_envs, device=device)
        self.head = torch.zeros_like(self.envs)
        zeros = torch.zeros(num_envs, device=device)
        first = dict(
            rgb=obs["rgb"],
            state=obs["state"],
            actions=torch.zeros((num_envs, action_dim), device=device),
            rewards=zeros,
            discounts=zeros,
            age=zeros.int(),
        )
        size = slots * sum(value.nbytes for value in first.values()) / 2**30
        free = free_memory(device) / 2**30
        message = f"the replay buffer needs {size:.1f} GiB of {free:.1f}: lower --buffer-size"
        need(size < free, message)  # now, and not when it fills up after hours
        self.data = {}
        for name, value in first.items():
            self.data[name] = value.new_zeros((slots * num_envs, *value.shape[1:]))
            self.data[name][:num_envs] = value

    def row(self, slot, env):
        """Where `data` has the slots (B,) of environments (B,)."""
        return slot % self.slots * len(self.envs) + env

    def add(self, actions, rewards, discounts, dones, final_obs: dict, next_obs: dict):
        """Store a step of every environment, all (N, ...), without waiting for the device.

        final_obs: the true next observation; next_obs: the one to act on, of another
        episode where `dones`.
        """
        data = self.data
        now = self.row(self.head, self.envs)
        after = self.row(self.head + 1, self.envs)
        self.head += 1 + dones
        begin = self.row(self.head, self.envs)  # of a new episode where `dones`, else = after
        data["actions"][now] = actions
        data["rewards"][now] = rewards
        data["discounts"][now] = discounts
        age = data["age"][now] + 1
        data["age"][after] = age
        data["age"][begin] = torch.where(dones, 0, age)
        for name in ("rgb", "state"):
            data[name][after] = final_obs[name]
            data[name][begin] = next_obs[name]

    def is_final(self, slot, env):
        return self.data["age"][self.row(slot + 1, env)] == 0

    def observe(self, slot, env) -> dict:
        """-> "rgb" (B, H, W, stack x C), oldest frame first, and "state" (B, S).

        An episode's first frame stands for those before it.
        """
        age = self.data["age"][self.row(slot, env)]
        frames = []
        for back in reversed(range(self.stack)):
            row = self.row(slot - age.clamp(max=back), env)
            frames.append(self.data["rgb"].index_select(0, row))
        return {"rgb": torch.cat(frames, -1), "state": self.data["state"][self.row(slot, env)]}

    def present(self) -> dict:
        """The observations to act on, (N, ...)."""
        return self.observe(self.head, self.envs)

    def transitions(self, slot, env) -> dict:
        """Of n steps from slots (B,) on, or of as many as the episode still has.

        -> obs, next_obs (dicts), actions (B, A), rewards (B,) = sum of gamma^i x discounts before
        x r_i, discounts (B,) = gamma^n x product of the n discounts.
        """
        data, end = self.data, slot
        rewards = torch.zeros(len(slot), device=slot.device)
        discounts = torch.ones_like(rewards)
        for _ in range(self.n_step):
            row = self.row(end, env)
            running = ~self.is_final(end, env)
            rewards = rewards + running * discounts * data["rewards"][row]
            further = discounts * self.gamma * data["discounts"][row]
            discounts = torch.where(running, further, discounts)
            end = end + running
        return dict(
            obs=self.observe(slot, env),
            actions=data["actions"][self.row(slot, env)],
            rewards=rewards,
            discounts=discounts,
            next_obs=self.observe(end, env),
        )

    def sample(self, batch_size: int) -> dict:
        """B transitions, uniform over environments and steps, without waiting for the device."""
        draws = torch.rand((5, batch_size), dtype=torch.float64, device=self.head.device)
        env = (draws[0] * len(self.envs)).long()
        newest = self.head[env] - self.n_step  # the latest start whose n steps are stored
        # the oldest start has its stack and leaves a slot for the step back below
        count = (newest + 1).clamp(max=self.slots - self.n_step - self.stack)
        slot = newest - (draws[1] * count).long()
        for draw in draws[2:]:  # no step starts at a final observation: draw again
            again = newest - (draw * count).long()
            slot = torch.where(self.is_final(slot, env), again, slot)
        slot = slot - self.is_final(slot, env).long()  # once in length^4: the step before it
        return self.transitions(slot, env)

    def state_dict(self) -> dict:
        state = dict(self.data, head=self.head)
        used = int(self.head.max()) + 1
        if used < self.slots:  # torch.save would write the rows that are not used yet, too
            for name, value in self.data.items():
                state[name] = value[: used * len(self.envs)].clone()
        return state

    def load_state_dict(self, state: dict):
        self.head.copy_(state["head"])
        for name, value in self.data.items():
            value[: len(state[name])] = state[name]


# --- Update functions -----------------------------------------------------------------------------
def augment(rgb: torch.Tensor, draw: torch.Tensor, args: Args) -> torch.Tensor:
    """uint8 (B, H, W, C) as drawn -> uint8 as the networks see it. draw: (B, 2), uniform in [0, 1)

    One draw serves all frames of a stack, so that motion stays what it was.
    """
    if args.augmentation == "none":
        return rgb
    corner = (draw * (args.margin + 1)).long()  # of a window on the image
    if args.augmentation == "shift":
        corner = (draw * (2 * args.margin + 1)).long() - args.margin
    if args.augmentation == "translate":  # is a window on the image with a black frame
        m = args.margin
        rgb = F.pad(rgb, (0, 0, m, m, m, m))
    where = corner[:, :, None] + torch.arange(args.image_size, device=rgb.device)
    rows, columns = where.clamp(0, rgb.shape[1] - 1).unbind(1)  # edges are repeated
    image = torch.arange(len(rgb), device=rgb.device)
    return rgb[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def center(rgb: torch.Tensor, args: Args) -> torch.Tensor:
    """What acting and evaluation see: the middle one of the windows that `augment` draws from."""
    return augment(rgb, torch.full((len(rgb), 2), 0.5, device=rgb.device), args)


def copies(obs: dict, count: int, draw: torch.Tensor, args: Args) -> dict:
    """Observations whose "rgb" is `count` augmented copies, one after the other: (count B, ...)."""
    rgb = obs["rgb"].repeat(count, 1, 1, 1)
    return obs | dict(rgb=augment(rgb, draw[: len(rgb)], args))


def views(batch: dict, args: Args) -> dict:
    """The batch with M augmented copies of obs and K of next_obs.

    All copies are independent, but a translation is the same for o and o' (RAD).
    """
    most = max(args.target_augs, args.online_augs) * len(batch["actions"])
    draw, next_draw = torch.rand((2, most, 2), device=batch["actions"].device)
    if args.augmentation == "translate":
        next_draw = draw
    obs = copies(batch["obs"], args.online_augs, draw, args)
    next_obs = copies(batch["next_obs"], args.target_augs, next_draw, args)
    return batch | dict(obs=obs, next_obs=next_obs)


def sample_actions(agent: Agent, features, state, noise):
    """Tanh-Gaussian actions (B, A) and log-probabilities (B,), from normal noise. SAC, eq. 21"""
    mean, log_std = agent.gaussian(features, state)
    raw = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2.0) - raw - F.softplus(-2 * raw))  # of tanh: differs (2)
    return torch.tanh(raw), (log_prob - log_derivative).sum(-1)


def critic_loss(agent: Agent, batch: dict, noise, args: Args):
    """SAC, eq. 5, over M copies of o and K of o'; noise (K B, A).

    -> loss, features (B, F) of the first copy, metrics
    """
    k, m = args.target_augs, args.online_augs
    b = len(batch["actions"])
    obs, next_obs = batch["obs"], batch["next_obs"]
    with torch.no_grad():
        state = next_obs["state"].repeat(k, 1)
        features = agent.policy_features(next_obs["rgb"])
        actions, log_probs = sample_actions(agent, features, state, noise)
        q = agent.target(agent.target_encoder(next_obs["rgb"]), state, actions).squeeze(-1)
        value = q.amin(0) - agent.log_alpha.exp() * log_probs
        targets = batch["rewards"] + batch["discounts"] * value.view(k, b).mean(0)  # DrQ 1, SAC 3
    features = agent.encoder(obs["rgb"])
    if not args.critic_gradient:
        features = features.detach()
    q = agent.critic(features, obs["state"].repeat(m, 1), batch["actions"].repeat(m, 1))
    loss = (q.view(2, m, b) - targets).square().mean(-1).sum()
    metrics = {
        "loss/qf": loss.detach(),
        "train/q": q.detach().mean(),
        "train/target": targets.mean(),
    }
    return loss, features[:b].detach(), metrics


def actor_loss(agent: Agent, batch: dict, features, noise, args: Args):
    """SAC, eqs. 7 and 18; noise (B, A). -> loss, metrics

    features (B, F): the critic's of the first copy, without gradient: differs (1)
    """
    obs, own = batch["obs"], features
    if agent.actor_encoder:
        own = agent.actor_encoder(obs["rgb"][: len(noise)])
    actions, log_probs = sample_actions(agent, own, obs["state"], noise)
    q = agent.critic(features, obs["state"], actions).squeeze(-1).amin(0)
    alpha = agent.log_alpha.exp()
    loss = (alpha.detach() * log_probs - q).mean()
    entropy = -log_probs.detach().mean()
    alpha_loss = alpha * (entropy + actions.shape[-1])  # holds the entropy at -A
    metrics = {
        "loss/actor": loss.detach(),
        "loss/alpha": alpha_loss.detach(),
        "train/entropy": entropy,
        "train/alpha": alpha.detach(),
    }
    return loss + alpha_loss, metrics


def autoencoder_loss(agent: Agent, rgb, dither, args: Args):
    """SAC+AE's regularised autoencoder; rgb uint8 (B, H, W, C), dither like it, uniform in [0, 1).

    The image to be drawn has 32 levels and noise of a level's width (arXiv 1807.03039).
    """
    z = agent.critic.projection(agent.encoder(rgb)).float()
    drawn = agent.decoder(z).float()
    goal = ((rgb // 8).float() + dither) / 32 - 0.5
    error = (drawn - goal).square().mean()
    penalty = 0.5 * z.square().sum(-1).mean()
    metrics = {"loss/reconstruction": error.detach(), "train/features_square": penalty.detach()}
    return error + DECODER_PENALTY * penalty, metrics


def descend(loss, *optimizers):
    """One step of each optimiser."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def target_update(agent: Agent, args: Args):
    """Polyak: target <- (1 - tau) target + tau critic, with encoder_tau below the heads."""
    for target, source, tau in (
        (agent.target_encoder, agent.encoder, args.encoder_tau),
        (agent.target.projection, agent.critic.projection, args.encoder_tau),
        (agent.target.heads, agent.critic.heads, args.tau),
    ):
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


LOSSES = dict(critic=critic_loss, actor=actor_loss, autoencoder=autoencoder_loss)


def update(batches: list, agent: Agent, optimizers: dict, args: Args, losses=LOSSES) -> dict:
    """The critic learns from each batch, then actor, temperature and target once. -> metrics"""
    for batch in batches:
        seen = views(batch, args)
        b, a = batch["actions"].shape
        noise = torch.randn((args.target_augs * b, a), device=batch["actions"].device)
        loss, features, metrics = losses["critic"](agent, seen, noise, args)
        descend(loss, optimizers["q_optimizer"])
        if agent.decoder:
            rgb = seen["obs"]["rgb"][:b]
            dither = torch.rand(rgb.shape, device=rgb.device)
            loss, drawn = losses["autoencoder"](agent, rgb, dither, args)
            descend(loss, optimizers["autoencoder_optimizer"])
            metrics |= drawn
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    noise = torch.randn_like(batch["actions"])
    loss, more = losses["actor"](agent, seen, features, noise, args)
    agent.critic.requires_grad_(True)
    descend(loss, optimizers["actor_optimizer"])
    target_update(agent, args)
    return metrics | more


def make_update(agent: Agent, optimizers: dict, args: Args):
    """`update` of one argument, the batches: plain, with compiled losses, or as one CUDA graph."""
    kind = args.device.split(":")[0]
    mixed = torch.autocast(kind, torch.bfloat16, enabled=args.amp, cache_enabled=False)
    losses = {name: mixed(loss) for name, loss in LOSSES.items()}
    if args.compile:
        losses = {name: torch.compile(loss) for name, loss in losses.items()}
    step = partial(update, agent=agent, optimizers=optimizers, args=args, losses=losses)
    if args.cudagraphs:
        from tensordict.nn import CudaGraphModule

        step = CudaGraphModule(step, warmup=3)
    return step


# --- evaluate -------------------------------------------------------------------------------------
def evaluate(policy, env, args: Args, video: Path) -> dict:
    """Whole episodes, deterministic actions, fixed seeds. -> metrics

    ci_low and ci_high: 95 % interval of the mean return, 1.96 standard errors to each side.
    """
    scores, frames = [], []
    for seed in range(EVAL_SEED, EVAL_SEED + args.eval_episodes // args.eval_envs):
        obs = env.reset(seed=seed)
        policy.reset()
        running = torch.ones(args.eval_envs, dtype=torch.bool, device=args.device)
        for _ in range(env.max_episode_steps):
            if args.capture_video and seed == EVAL_SEED:
                frames.append(env.render()[0])
            obs, _, terminations, truncations, info = env.step(policy.act(obs))
            ended = (terminations | truncations) & running  # each environment counts once
            running &= ~ended
            episode = info["episode"]
            scores.append(torch.stack([episode["return"], episode["success_at_end"]])[:, ended])
    if frames:
        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=env.control_hz)
    returns, successes = torch.cat(scores, 1).double()
    mean = returns.mean().item()
    std = returns.std().item()
    half = 1.96 * std / math.sqrt(len(returns))
    return {
        "eval/return": mean,
        "eval/return_std": std,
        "eval/ci_low": mean - half,
        "eval/ci_high": mean + half,
        "eval/success_rate": successes.mean().item(),
    }


def evaluate_only(env, args: Args) -> dict:
    """What --evaluate does; the video is evaluate.mp4 beside the checkpoint."""
    video = Path(args.checkpoint).with_name("evaluate.mp4")
    results = evaluate(Policy(args.checkpoint, args.device), env, args, video)
    env.close()
    print(json.dumps(results))
    return results


# --- save / load ----------------------------------------------------------------------------------
# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, resfit, bc_chunk
def save(path: Path, content: dict):
    """Write under a temporary name, then rename: an interrupted save leaves the old file whole."""
    temporary = path.with_suffix(".tmp")
    torch.save(content, temporary)
    os.replace(temporary, path)


def snapshot(facts: dict, progress: dict, parts: dict) -> dict:
    """A checkpoint: what the run is, how far it is, and the states of its parts."""
    states = {name: part.state_dict() for name, part in parts.items()}
    return facts | dict(progress=dict(progress)) | states


def save_run(run: Path, facts: dict, progress: dict, parts: dict):
    """Write checkpoint.pt, from which --resume continues."""
    sizes = csv_sizes(run)
    save(run / "checkpoint.pt", snapshot(facts, progress, parts) | dict(csv_sizes=sizes))


def restore_run(run: Path, parts: dict) -> dict:
    """Put the parts where they were when checkpoint.pt was written. -> progress"""
    checkpoint = load(run / "checkpoint.pt")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    cut_back(run, checkpoint["csv_sizes"])
    return checkpoint["progress"]


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
        message = f"{path} is no checkpoint: damaged, or another kind of file"
        raise ValueError(message) from error
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == "sac_pixels"
    need(ours, f"{path} is not sac_pixels'")
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
class Policy:
    """Observation in, action out, from one checkpoint (file or its content) and no simulator."""

    def __init__(self, source: str | Path | dict, device: str = "cpu"):
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args = Args(**checkpoint["args"])
        self.spec = checkpoint["spec"]
        with torch.device("meta"):  # shapes only: no random number is drawn
            self.agent = Agent(checkpoint["shapes"], self.args)
        self.agent.load_state_dict(checkpoint["agent"], assign=True)
        self.agent.to(device)
        self.reset()

    def reset(self):
        """Forget the earlier images; call at the start of every episode."""
        self.stack = []

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "rgb" uint8 (N, render_size, render_size, 3), the newest image alone, and "state"
        (N, S), tensors on the device -> actions (N, A) = tanh(mean)."""
        past = self.stack[1:] or [obs["rgb"]] * (self.args.frame_stack - 1)
        self.stack = [*past, obs["rgb"]]
        seen = center(torch.cat(self.stack, -1), self.args)
        mean, _ = self.agent.gaussian(self.agent.policy_features(seen), obs["state"])
        return torch.tanh(mean)


# --- train ----------------------------------------------------------------------------------------
@torch.no_grad()
def explore(agent: Agent, obs: dict, noise: torch.Tensor, args: Args) -> torch.Tensor:
    """Actions (N, A) drawn from the policy."""
    features = agent.policy_features(center(obs["rgb"], args))
    return sample_actions(agent, features, obs["state"], noise)[0]


def summary(episodes: torch.Tensor, losses: list[dict]) -> dict[str, float]:
    """Means over the episodes that ended and the updates made since the last row."""
    count, returns, successes = episodes.tolist()
    episodes.zero_()
    metrics = {
        "train/return": returns / max(count, 1.0),
        "train/success_at_end": successes / max(count, 1.0),
        "train/episodes": count,
    }
    for name in losses[0] if losses else ():
        metrics[name] = torch.stack([row[name] for row in losses]).mean().item()
    return metrics


def check_finite(agent: Agent, metrics: dict, global_step: int, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    for name, value in (agent.state_dict() | metrics).items():
        if not torch.as_tensor(value).isfinite().all():
            message = f"{name} is not finite at step {global_step}"
            raise FloatingPointError(f"{message}; last good checkpoint: {checkpoint}")


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


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, counters, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at the
    first NaN, ChildProcessError where a process of the environments has died, SystemExit after
    Ctrl-C.
    """
    check(args)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    env, eval_env = make_envs(args)
    if args.evaluate:
        return evaluate_only(eval_env, args)

    run = open_run(args)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    shapes = dict(channels=env.image_shape[2], state=env.state_dim, action=env.action_dim)
    facts = dict(algo="sac_pixels", args=asdict(args), shapes=shapes, spec=env.spec)
    agent = Agent(shapes, args).to(args.device, memory_format=torch.channels_last)
    optimizers = make_optimizers(agent, args)
    learn = make_update(agent, optimizers, args)
    still = torch.zeros((args.num_envs, env.action_dim), device=args.device)
    obs = env.step(still)[0]  # reset() would undo the staggering
    slots = args.buffer_size // args.num_envs
    replay = Replay(obs, env.action_dim, slots, args.frame_stack, n_step=1, gamma=args.gamma)
    parts = dict(agent=agent, random=GlobalRandom(), **optimizers)
    if args.save_buffer:
        parts |= dict(env=env, replay=replay)
    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    if args.resume:
        progress = restore_run(run, parts)
    else:
        save_run(run, facts, progress, parts)
    first_update = args.learning_starts
    if not args.save_buffer:  # a resumed run fills its buffer anew
        first_update += progress["global_step"]

    step, stop = progress["global_step"], False
    losses, results = [], {}  # metrics of each update since the last row; of the last evaluation
    episodes = torch.zeros(3, device=args.device)  # their number, sums of returns and successes
    began = START - progress["wall_time"]
    trained = time.time() - progress["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step", mininterval=1)
    interrupt = Interrupt()
    while step < args.total_timesteps and not stop:
        # act
        if step < args.learning_starts:
            actions = torch.rand_like(still) * 2 - 1
        else:
            actions = explore(agent, replay.present(), torch.randn_like(still), args)

        # step
        obs, rewards, terminations, truncations, info = env.step(actions)
        step += args.num_envs
        bar.update(args.num_envs)

        # store
        dones = terminations | truncations
        discounts = info.get("discount", 1.0) * ~terminations
        replay.add(actions, rewards, discounts, dones, info["final_obs"], obs)
        episode = [dones, info["episode"]["return"], info["episode"]["success_at_end"]]
        episodes += torch.where(dones, torch.stack(episode), 0.0).sum(-1)

        # update
        if step >= first_update:
            every = args.update_every * args.policy_frequency
            for _ in range(step // every - (step - args.num_envs) // every):
                batches = [replay.sample(args.batch_size) for _ in range(args.policy_frequency)]
                losses.append(learn(batches))

        # log
        stop = interrupt.asked
        eval_due = step >= args.total_timesteps or step % args.eval_freq < args.num_envs
        if not (eval_due or stop or step % args.log_freq < args.num_envs):
            continue
        pause = time.time()
        clock = dict(global_step=step, wall_time=pause - began, train_time=pause - trained)
        progress |= clock
        metrics = summary(episodes, losses)
        metrics["train/nan_resets"] = int(env.nan_resets)
        metrics["time/frames"] = step * args.action_repeat
        metrics["time/sps"] = step / clock["train_time"]
        check_finite(agent, metrics, step, run / "checkpoint.pt")
        if losses:  # the first row names the columns
            write_row(run / "metrics.csv", clock | metrics, args.track)
        bar.set_postfix_str(f"return {metrics['train/return']:.2f}")
        losses.clear()

        # evaluate
        if eval_due:
            now = snapshot(facts, progress, dict(agent=agent))
            video = run / f"videos/step_{step:09d}.mp4"
            results = evaluate(Policy(now, args.device), eval_env, args, video)
            write_row(run / "eval.csv", clock | results, args.track)
            bar.write(f"{step} steps: return {results['eval/return']:.3f}")
            if results["eval/return"] > progress["best"]:
                progress["best"] = results["eval/return"]
                save(run / "best.pt", now)

        # save
        if eval_due or stop:
            save_run(run, facts, progress, parts)
        trained += time.time() - pause

    interrupt.restore()
    for part in (bar, env, eval_env):
        part.close()
    if step < args.total_timesteps:
        sys.exit(f"interrupted at step {step}: continue with --resume {run}")
    return results | progress | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError, ChildProcessError) as error:
        sys.exit(f"error: {error}")
