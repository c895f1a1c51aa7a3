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
    reconstruction  shared; the reconstruction alone             SLAC, Dreamer        critic_loss
    --augmentation  none                                         SAC, SAC+AE
                    shift, each of K copies anew                 DrQ                  augment
                    crop, translate                              RAD                  augment

    target   y = mean over K copies of o' of r + G (min Q'(o', a') - alpha log pi(a'|o')),
             a' ~ pi                                                            (SAC 3, DrQ 1)
    critics  sum over K copies of o and both heads of the mean of (Q(o, a) - y)^2   (SAC 5, DrQ 3)
    actor    mean of alpha log pi(a|o) - min Q(o, a)                                (SAC 7)
    alpha    mean of -alpha (log pi(a|o) + H), H = -A                               (SAC 18)
    decoder  mean of (decoder(z) - o)^2 + lambda |z|^2 / 2, z the critic's features (SAC+AE)

Losses, gradients, optimizers' steps, actions and augmented images of all four presets agree with
the authors' own code on the same inputs (tests/test_pixels_originals.py). Differences from it:
 1. Order. Two critic updates, then actor, temperature and target; theirs come after the first of
    the two. The actor's loss uses the features that the critic's loss computed, from before that
    step, which saves a pass through the convolutions; theirs are computed again after it. The
    reconstruction's step comes before the actor's and the target's, not after them. SAC+AE's 1,000
    updates at once after its random actions are left out.
 2. The tanh's share of log pi is exact, as in DrQ's code; SAC+AE's and RAD's add 1e-6.
 3. Of RAD's ten augmentations there are the two that were best, crop and translate.
 4. Every frame is stored once as uint8, an episode's last one too, and augmentation is part of the
    update; theirs stores whole stacks and counts transitions.
 5. The state of an environment that has one joins the features of the image.
 6. Ours: several environments, --encoder reconstruction, and every combination of --encoder and
    --augmentation. On a CPU the sizes are smaller: TUNED, below.
 7. DrQ's shifts are whole pixels; its code leaves them to kornia, whose version 0.3.1 of that time
    reads up to 0.07 pixels beside. DrQ's losses are added over the copies, as in its code; its
    paper averages them, and tells K copies of o' from M of o.
 8. Evaluation has environments and seeds of its own; theirs is in the training environment. A
    quadruped is seen by DrQ's camera under every preset.

Commands, from the repository's root:
    train          python algos/sac_pixels.py --env-id cartpole_swingup --preset drq
    smallest run   python algos/sac_pixels.py --env-id dot_reach --device cpu
    evaluate       python algos/sac_pixels.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/sac_pixels.py --resume runs/NAME    (exact with --save-buffer)

Expected result: with a CPU's sizes, dot_reach from -22 (random; the best possible is -2) to -2.9
after 10,000 transitions and 5 minutes, the mean of three seeds at -2.7, -3.2 and -2.7, with 100 %
success; cartpole_swingup 796 after 52,500 of its steps (420,000 frames, two hours of half a core),
one seed. Curves and commands: docs/algos/sac_pixels.md. Not yet measured on a GPU.

Shapes: N environments, B batch, K copies of each observation, A action dimensions, S state
dimensions, H x W image, C channels (3 x frame stack), D features of the convolutions, Z features of
a trunk.
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
EPISODE = ("return", "success_at_end")  # what is logged of an episode that ended
DECODER_PENALTY = 1e-6  # of the features' square, beside the reconstruction

# --- Args -----------------------------------------------------------------------------------------
SAC_AE = dict(
    copies=1,
    alpha_lr=1e-4,
    alpha_beta=0.5,
    encoder_tau=0.05,
    batch_size=128,
    delta_orthogonal=True,
)
SMALL = dict(  # sizes for a CPU: differs (6)
    image_size=48,
    margin=2,
    encoder_strides=(2, 1, 1),
    encoder_channels=16,
    hidden=256,
    batch_size=64,
    copies=1,
    buffer_size=100_000,
    eval_envs=1,
    eval_episodes=5,
    amp=False,
    compile=False,
)
SLOW = dict(action_repeat=4, total_timesteps=125_000)
# "env_id device preset" -> defaults other than DrQ's, those of Args; later rows win
TUNED = {
    "* sac_ae": SAC_AE | dict(encoder="autoencoder", augmentation="none", buffer_size=1_000_000),
    # RAD is built on SAC+AE's code; both its networks end their trunk without a tanh
    "* rad*": SAC_AE | dict(trunk_tanh=False, augmentation="crop", margin=16),  # of 100 pixels
    "* rad_translate": dict(augmentation="translate", image_size=108, margin=8),
    "cheetah_* rad*": dict(lr=2e-4),
    "cheetah_* rad_translate": dict(feature_dim=64, learning_starts=10_000),
    # PlaNet's action repeats: 500,000 frames are 62,500, 125,000 or else 250,000 steps
    "cartpole_*": dict(action_repeat=8, total_timesteps=62_500),
    "reacher_*": SLOW,
    "cheetah_*": SLOW,
    "cup_*": SLOW,
    # what follows is ours
    "* cpu *": SMALL,
    "* cpu rad": dict(margin=9),  # the published share: 9 of 57 pixels
    "* cpu rad_translate": dict(margin=4),
    "dot_reach *": SMALL
    | dict(
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
    ),
    "dot_reach * rad": dict(margin=6),
    "dot_reach * rad_translate": dict(margin=2),
}


@dataclass
class Args:
    # run
    env_id: str = "dot_reach"  # task: dot_reach, SO101... or a DeepMind Control id, domain_task
    preset: Literal["drq", "rad", "rad_translate", "sac_ae"] = "drq"  # its values are the defaults
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
    save_buffer: bool = False  # save the whole buffer too: large, but --resume continues exactly
    capture_video: bool = True  # write an mp4 of the first episode of every evaluation
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose the project

    # environment
    num_envs: int = 1  # parallel environments
    image_size: int = 84  # pixels a side that the networks see
    action_repeat: int = 2  # frames for which an action is held (not SO101)
    frame_stack: int = 3  # latest images shown together, so that motion is seen
    fast_render: bool = False  # no shadows and no smoothing, drawn faster (DeepMind Control)

    # algorithm
    encoder: Literal["separate", "critic", "autoencoder", "reconstruction"] = "critic"  # trained by
    encoder_strides: tuple[int, ...] = (2, 1, 1, 1)  # of the 3 x 3 convolutions, one number a layer
    encoder_channels: int = 32  # filters of each convolution
    delta_orthogonal: bool = False  # first weights only in the middle of a filter (SAC+AE, RAD)
    feature_dim: int = 50  # Z: numbers that actor and critic each make of the convolutions' output
    trunk_tanh: bool = True  # a tanh on them; RAD has none
    hidden: int = 1024  # width of the two layers of actor and critics
    augmentation: Literal["none", "shift", "crop", "translate"] = "shift"  # of samples: differs (3)
    margin: int = 4  # pixels of shift; that a crop leaves out; that are black in a translation
    copies: int = 2  # K: of each image, augmented anew; targets are averaged, losses added
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
    encoder_tau: float = 0.01  # the same of its convolutions and trunk

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and replay buffer
    amp: bool = True  # losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the losses with torch.compile
    cudagraphs: bool = False  # replay updates as a CUDA graph (tensordict); not measured yet

    @property
    def render_size(self) -> int:
        """Pixels a side of the image that the environment draws and the buffer stores."""
        return self.image_size + self.margin * (self.augmentation == "crop")


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
    cuda = torch.cuda.is_available()
    need(cuda or args.device == "cpu", "there is no CUDA device here: use --device cpu")
    need(args.evaluate == bool(args.checkpoint), "--evaluate and --checkpoint FILE go together")
    whole = args.eval_episodes % args.eval_envs == 0
    need(whole, "--eval-episodes must be a multiple of --eval-envs")
    need(0 <= args.margin < args.image_size, "--margin must be at least 0, below --image-size")
    need(args.learning_starts >= args.num_envs, "--learning-starts must be at least --num-envs")
    room = args.buffer_size >= (args.frame_stack + 3) * args.num_envs
    need(room, "--buffer-size must be at least (--frame-stack + 3) x --num-envs")


def tuned(env_id: str, device: str, preset: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for pattern, row in TUNED.items():
        if fnmatch(f"{env_id} {device} {preset}", pattern):
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
    """Command line -> Args. Defaults, and so --help, are those of the task, device and preset, or
    of the run or checkpoint."""
    argv = sys.argv[1:] if argv is None else argv
    first_look = [word for word in argv if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=first_look)
    if given.resume:
        return resumed_args(given.resume, argv)
    if given.checkpoint:
        values = load(given.checkpoint)["args"] | dict(name="", resume=None, device=given.device)
    else:
        values = dict(env_id=given.env_id, device=given.device, preset=given.preset)
        values |= tuned(**values)
    return cli(argv, Args(**values))


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
    """-> training environment (None with --evaluate), evaluation environment: the contract is
    envs/__init__.py's."""
    try:
        import envs
    except ModuleNotFoundError as error:
        message = "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        raise ValueError(message) from error
    options = dict(
        image_size=args.render_size,
        action_repeat=args.action_repeat,
        fast_render=args.fast_render or None,
    )
    if args.env_id.startswith("SO101"):
        options = dict(render_size=args.render_size)
    make = partial(envs.make, args.env_id, device=args.device, **options)
    eval_env = make(num_envs=args.eval_envs, seed=EVAL_SEED)
    if args.evaluate:
        return None, eval_env
    return make(num_envs=args.num_envs, seed=args.seed, stagger=True), eval_env


# --- Networks -------------------------------------------------------------------------------------
def init_orthogonal(layer: nn.Module, delta: bool):
    """Orthogonal weights, gain sqrt 2 for convolutions (ReLUs follow), else 1; zero biases.

    delta: a filter is zero but in its middle, where it is orthogonal (arXiv 1806.05393).
    """
    if isinstance(layer, nn.Linear | nn.Conv2d | nn.ConvTranspose2d):
        weight = layer.weight.data
        gain = 1.0 if isinstance(layer, nn.Linear) else math.sqrt(2)
        if delta and weight.ndim == 4:
            weight.zero_()
            weight = weight[:, :, 1, 1]
        nn.init.orthogonal_(weight, gain)
        nn.init.zeros_(layer.bias)


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
            mirror = nn.ConvTranspose2d(
                conv.out_channels, conv.in_channels, 3, conv.stride, output_padding=unseen
            )
            layers = [nn.ReLU(), mirror, *layers]
        self.convs = nn.Sequential(*layers)

    def forward(self, z):
        x = self.linear(z).unflatten(1, (self.size, self.size, -1)).permute(0, 3, 1, 2)
        return self.convs(x).permute(0, 2, 3, 1)


# same in: drqv2, sac_pixels
class Heads(nn.Module):
    """A trunk and MLPs on it: features (B, D), others (B, ...) -> (heads, B, outputs).

    The actor has one head, the critic two; each of them has a trunk of its own.
    """

    def __init__(self, features: int, others: int, heads: int, outputs: int, args: Args):
        super().__init__()
        size, hidden = args.feature_dim, args.hidden
        self.trunk = nn.Sequential(nn.Linear(features, size), nn.LayerNorm(size), nn.Tanh())
        self.heads = nn.ModuleList()
        for _ in range(heads):
            head = nn.Sequential(
                nn.Linear(size + others, hidden),
                nn.ReLU(),
                nn.Linear(hidden, hidden),
                nn.ReLU(),
                nn.Linear(hidden, outputs),
            )
            self.heads.append(head)

    def forward(self, features, *others):
        x = torch.cat([self.trunk(features), *others], -1)
        outputs = []
        for head in self.heads:
            last = head[:-1](x).float()
            with torch.autocast(x.device.type, enabled=False):  # bfloat16 has Q = 80 or 80.5
                outputs.append(head[-1](last))
        return torch.stack(outputs)


class Agent(nn.Module):
    """All that learns. `encoder` is the critic's, and the actor's too unless it has its own."""

    def __init__(self, args: Args, shapes: dict):
        super().__init__()
        channels = shapes["channels"] * args.frame_stack
        state, action = shapes["state"], shapes["action"]  # differs (5)
        self.encoder = Encoder(channels, args)
        self.actor_encoder = Encoder(channels, args) if args.encoder == "separate" else None
        self.decoder = None
        if args.encoder in ("autoencoder", "reconstruction"):
            self.decoder = Decoder(self.encoder, args)
        self.actor = Heads(self.encoder.features, state, 1, 2 * action, args)
        self.critic = Heads(self.encoder.features, state + action, 2, 1, args)
        if not args.trunk_tanh:
            self.actor.trunk.pop(-1)
            self.critic.trunk.pop(-1)
        self.apply(partial(init_orthogonal, delta=args.delta_orthogonal))
        self.target_encoder = copy.deepcopy(self.encoder).requires_grad_(False)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.log_alpha = nn.Parameter(torch.tensor(math.log(args.alpha)))

    def policy_features(self, rgb):
        return (self.actor_encoder or self.encoder)(rgb)

    def gaussian(self, features, state):
        """Mean and log std (B, A) of actions before the tanh."""
        mean, log_std = self.actor(features, state)[0].chunk(2, -1)
        return mean, -10 + 6 * (torch.tanh(log_std) + 1)  # log std in [-10, 2]


def make_optimizers(agent: Agent, args: Args):
    """Adam for the critic's loss, for the actor's and alpha's, and for the autoencoder's."""
    adam = partial(torch.optim.Adam, lr=args.lr, fused=True, capturable=args.device != "cpu")
    actor = [x for name, x in agent.named_parameters() if name.startswith("actor")]
    alpha = dict(params=[agent.log_alpha], lr=args.alpha_lr, betas=(args.alpha_beta, 0.999))
    optimizers = dict(
        q_optimizer=adam([*agent.encoder.parameters(), *agent.critic.parameters()]),
        actor_optimizer=adam([dict(params=actor), alpha]),
    )
    if agent.decoder:  # a second Adam on the critic's convolutions and trunk, as in SAC+AE
        encoded = dict(params=[*agent.encoder.parameters(), *agent.critic.trunk.parameters()])
        decoded = dict(params=agent.decoder.parameters(), weight_decay=1e-7)
        optimizers["autoencoder_optimizer"] = adam([encoded, decoded])
    return optimizers


# --- Storage --------------------------------------------------------------------------------------
# same in: drqv2, sac_pixels
def free_memory(device: torch.device, root: str = "/") -> float:
    """Bytes that can still be had: of the GPU, or of this machine and its container's limit."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    machine = Path(root, "proc/meminfo")
    if not machine.exists():
        return math.inf
    free = 1024 * int(re.search(r"MemAvailable: *(\d+)", machine.read_text())[1])
    groups = Path(root, "proc/self/cgroup").read_text()
    for version, group in re.findall(r":(|memory):/(.*)", groups):
        limit = "memory.limit_in_bytes" if version else "memory.max"  # version 1 or 2
        for folder in Path(root, "sys/fs/cgroup", version, group, limit).parents:
            if (folder / limit).exists():  # a container sees its own limit at the top
                most = float((folder / limit).read_text().replace("max", "inf"))
                stat = (folder / "memory.stat").read_text()
                held = re.findall(r"(?m)^(?:anon|shmem|total_rss|total_shmem) (\d+)", stat)
                free = min(free, most - sum(map(int, held)))
    return free


# same in: drqv2, sac_pixels
class Replay:
    """A ring of slots for each of N environments, where `obs` is. Every frame is stored once.

    An episode of L steps takes L + 1 slots in a row: each has an observation, with the action
    that followed, its reward and its discount (0 where it terminates); the `final` observation
    stands alone in the last one. `age` counts from the episode's first slot. A place numbers the
    slots of all environments since the run began, in turn, so an environment's next slot is N
    places on; modulo the rows of `data` it is where to look. `head` (N,): the present places.
    """

    def __init__(self, obs: dict, actions, args: Args, n_step: int = 1):
        """The first observations, and actions of 0, of every environment."""
        self.num_envs, self.stack, self.n_step = len(actions), args.frame_stack, n_step
        self.gamma = args.gamma
        self.rows = args.buffer_size // self.num_envs * self.num_envs
        self.head = torch.arange(self.num_envs, device=actions.device)
        zeros = actions[:, 0]
        first = obs | dict(
            actions=actions,
            rewards=zeros,
            discounts=zeros,
            age=zeros.int(),
            final=zeros.bool(),
        )
        size = self.rows * sum(value[0].nbytes for value in first.values()) / 2**30
        free = free_memory(actions.device) / 2**30
        message = f"the replay buffer needs {size:.1f} GiB of {free:.1f}: lower --buffer-size"
        need(size < free, message)  # now, and not when it fills up after hours
        self.data = {key: x.new_zeros((self.rows, *x.shape[1:])) for key, x in first.items()}
        self.put(self.head, first)

    def get(self, name: str, place):
        return self.data[name].index_select(0, place % self.rows)

    def put(self, place, values: dict):
        for name, value in values.items():
            self.data[name][place % self.rows] = value

    def add(self, actions, rewards, discounts, dones, final_obs: dict, next_obs: dict):
        """Store a step of every environment, all (N, ...), without waiting for the device.

        final_obs: the true next observation; next_obs: the one to act on, of another
        episode where `dones`.
        """
        self.put(self.head, dict(actions=actions, rewards=rewards, discounts=discounts))
        age = self.get("age", self.head) + 1
        self.put(self.head + self.num_envs, final_obs | dict(age=age, final=dones))
        self.head += self.num_envs * (1 + dones)
        self.put(self.head, next_obs | dict(age=age * ~dones, final=False))

    def observe(self, place) -> dict:
        """-> "rgb" (B, H, W, stack x C), oldest frame first, and "state" (B, S).

        An episode's first frame stands for those before it.
        """
        age, frames = self.get("age", place), []
        for back in reversed(range(self.stack)):
            frames.append(self.get("rgb", place - self.num_envs * age.clamp(max=back)))
        return dict(rgb=torch.cat(frames, -1), state=self.get("state", place))

    def sample(self, batch_size: int) -> dict:
        """B transitions, uniform over environments and steps, without waiting for the device.

        Of n steps, or of as many as the episode still has: obs, next_obs (dicts), actions (B, A),
        rewards (B,) = sum of gamma^i x discounts before x r_i, discounts (B,) = gamma^n x product
        of the n discounts.
        """
        n = self.num_envs
        draws = torch.rand((5, batch_size), dtype=torch.float64, device=self.head.device)
        newest = self.head[(draws[0] * n).long()] - n * self.n_step  # start with all its steps
        # the oldest start has its stack and leaves a slot for the step back below
        count = (newest // n + 1).clamp(max=self.rows // n - self.n_step - self.stack)
        starts = newest - n * (draws[1:] * count).long()  # (4, B)
        start = starts[0]
        for again in starts[1:]:  # no step starts at a final observation
            start = torch.where(self.get("final", start), again, start)
        start = start - n * self.get("final", start)  # once in length^4: the step before it

        end, rewards, discounts = start, 0.0, 1.0
        for _ in range(self.n_step):
            running = ~self.get("final", end)
            rewards = rewards + running * discounts * self.get("rewards", end)
            further = discounts * self.gamma * self.get("discounts", end)
            discounts = torch.where(running, further, discounts)
            end = end + n * running
        return dict(
            obs=self.observe(start),
            actions=self.get("actions", start),
            rewards=rewards,
            discounts=discounts,
            next_obs=self.observe(end),
        )

    def state_dict(self) -> dict:
        return self.data | dict(head=self.head)

    def load_state_dict(self, state: dict):
        for name, value in self.state_dict().items():
            value.copy_(state[name])


# --- Update functions -----------------------------------------------------------------------------
def augment(rgb, args: Args, draw=None):
    """uint8 (B, H, W, C) as drawn -> uint8 as networks see it. draw: (B, 2), uniform in [0, 1)

    One draw serves all frames of a stack, so that motion stays what it was. Without draws it is
    the middle window.
    """
    if args.augmentation == "none":
        return rgb
    if draw is None:
        draw = torch.full((1, 2), 0.5, device=rgb.device)
    margin = args.margin
    corner = (draw * (margin + 1)).long()  # of a window on the image
    if args.augmentation == "shift":
        corner = (draw * (2 * margin + 1)).long() - margin  # differs (7)
    if args.augmentation == "translate":  # is a window on the image's middle in a black frame
        middle = slice(margin // 2, margin // 2 + args.image_size - margin)
        rgb = F.pad(rgb[:, middle, middle], (0, 0, *[margin] * 4))
    where = corner[:, :, None] + torch.arange(args.image_size, device=rgb.device)
    rows, columns = where.clamp(0, rgb.shape[1] - 1).unbind(1)  # edges are repeated
    image = torch.arange(len(rgb), device=rgb.device)
    return rgb[image[:, None, None], rows[:, :, None], columns[:, None, :]]


def views(batch: dict, args: Args) -> dict:
    """The batch with K augmented copies of both observations, one after the other: (K B, ...).

    All copies are independent, but a translation is the same for o and o' (RAD).
    """
    count = args.copies * len(batch["rewards"])
    draws = torch.rand((2, count, 2), device=batch["rewards"].device)
    if args.augmentation == "translate":
        draws[1] = draws[0]
    seen = dict(batch)
    for name, draw in zip(("obs", "next_obs"), draws, strict=True):
        obs = {key: torch.cat([value] * args.copies) for key, value in batch[name].items()}
        seen[name] = obs | dict(rgb=augment(obs["rgb"], args, draw))
    return seen


def sample_actions(agent: Agent, features, state):
    """Tanh-Gaussian actions (B, A) and log-probabilities (B,). SAC, eq. 21"""
    mean, log_std = agent.gaussian(features, state)
    noise = torch.randn_like(mean)
    raw = mean + log_std.exp() * noise
    log_prob = -0.5 * noise.square() - log_std - 0.5 * math.log(2 * math.pi)
    log_derivative = 2 * (math.log(2.0) - raw - F.softplus(-2 * raw))  # of tanh: differs (2)
    return torch.tanh(raw), (log_prob - log_derivative).sum(-1)


def critic_loss(agent: Agent, batch: dict, args: Args):
    """SAC, eq. 5, over K copies. -> loss, features (B, D) of the first copy, metrics"""
    obs, next_obs = batch["obs"], batch["next_obs"]
    with torch.no_grad():
        features = agent.policy_features(next_obs["rgb"])
        actions, log_probs = sample_actions(agent, features, next_obs["state"])
        q = agent.target(agent.target_encoder(next_obs["rgb"]), next_obs["state"], actions)
        value = (q.amin(0).squeeze(-1) - agent.log_alpha.exp() * log_probs).view(args.copies, -1)
        targets = batch["rewards"] + batch["discounts"] * value.mean(0)  # DrQ 1, SAC 3
    features = agent.encoder(obs["rgb"])
    if args.encoder == "reconstruction":
        features = features.detach()
    q = agent.critic(features, obs["state"], batch["actions"].repeat(args.copies, 1))
    loss = (q.view(2, args.copies, -1) - targets).square().mean(-1).sum()
    metrics = {
        "loss/qf": loss.detach(),
        "train/q": q.detach().mean(),
        "train/target": targets.mean(),
    }
    return loss, features[: len(targets)].detach(), metrics


def actor_loss(agent: Agent, batch: dict, features):
    """SAC, eqs. 7 and 18. -> loss, metrics

    features (B, D): the critic's of the first copy, without gradient: differs (1)
    """
    own, state = features, batch["obs"]["state"][: len(features)]
    if agent.actor_encoder:
        own = agent.actor_encoder(batch["obs"]["rgb"][: len(features)])
    actions, log_probs = sample_actions(agent, own, state)
    q = agent.critic(features, state, actions).squeeze(-1).amin(0)
    alpha = agent.log_alpha.exp()
    loss = (alpha.detach() * log_probs - q).mean()
    entropy = -log_probs.detach().mean()
    alpha_loss = alpha * (entropy + actions.shape[-1])  # holds the entropy at -A
    return loss + alpha_loss, {
        "loss/actor": loss.detach(),
        "loss/alpha": alpha_loss.detach(),
        "train/entropy": entropy,
        "train/alpha": alpha.detach(),
    }


def autoencoder_loss(agent: Agent, rgb):
    """SAC+AE's regularised autoencoder, on uint8 (B, H, W, C). -> loss, metrics

    The image to be drawn has 32 levels and noise of a level's width (arXiv 1807.03039).
    """
    z = agent.critic.trunk(agent.encoder(rgb)).float()
    goal = ((rgb // 8).float() + torch.rand_like(rgb, dtype=torch.float32)) / 32 - 0.5
    error = (agent.decoder(z).float() - goal).square().mean()
    penalty = 0.5 * z.square().sum(-1).mean()
    return error + DECODER_PENALTY * penalty, {"loss/reconstruction": error.detach()}


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


@torch.no_grad()
def target_update(agent: Agent, args: Args):
    """Polyak: target <- (1 - tau) target + tau critic, with encoder_tau below the heads."""
    for target, source, tau in (
        (agent.target_encoder, agent.encoder, args.encoder_tau),
        (agent.target.trunk, agent.critic.trunk, args.encoder_tau),
        (agent.target.heads, agent.critic.heads, args.tau),
    ):
        torch._foreach_lerp_(list(target.parameters()), list(source.parameters()), tau)


def update(agent: Agent, optimizers: dict, losses: list, args: Args, batches: list):
    """The critic learns from each batch, then actor, temperature and target once: differs (1).

    -> metrics
    """
    q_loss, pi_loss, autoencoder = losses
    for batch in batches:
        batch = views(batch, args)
        loss, features, metrics = q_loss(agent, batch, args)
        descend(loss, optimizers["q_optimizer"])
        if agent.decoder:
            loss, drawn = autoencoder(agent, batch["obs"]["rgb"][: len(features)])
            descend(loss, optimizers["autoencoder_optimizer"])
            metrics |= drawn
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, more = pi_loss(agent, batch, features)
    agent.critic.requires_grad_(True)
    descend(loss, optimizers["actor_optimizer"])
    target_update(agent, args)
    return metrics | more


# same in: drqv2, sac_pixels
def warn_of_slow_amp(device: str):
    """Without bfloat16 units it takes 1.8 (AVX-512) to 6.7 times (AVX2) as long as float32."""
    processor = Path("/proc/cpuinfo")
    units = not processor.exists() or "bf16" in processor.read_text()
    if device != "cpu":
        units = torch.cuda.is_bf16_supported(including_emulation=False)
    if not units:
        print("--amp is slow on this device: use --no-amp", file=sys.stderr)


def make_update(agent: Agent, optimizers: dict, args: Args):
    """-> `update` as a function of batches: plain, with compiled losses, as one CUDA graph."""
    if args.amp:
        warn_of_slow_amp(args.device)
    kind = torch.device(args.device).type
    mixed = torch.autocast(kind, torch.bfloat16, enabled=args.amp, cache_enabled=False)
    losses = [mixed(loss) for loss in (critic_loss, actor_loss, autoencoder_loss)]
    if args.compile:
        losses = [torch.compile(loss) for loss in losses]
    learn = partial(update, agent, optimizers, losses, args)
    if args.cudagraphs:
        from tensordict.nn import CudaGraphModule

        learn = CudaGraphModule(learn, warmup=3)
    return learn


# --- evaluate -------------------------------------------------------------------------------------
# same in: drqv2, sac_pixels
def episode_sums(info: dict, ended):
    """(3,): how many episodes ended, and sums of EPISODE over them."""
    values = torch.stack([ended, *(info["episode"][key] for key in EPISODE)])
    return torch.where(ended, values, 0.0).sum(-1)


def evaluate(checkpoint, env, args: Args, video: Path) -> dict:
    """Whole episodes, mean actions, fixed seeds: differs (8). -> metrics

    The video shows the first episode.
    """
    policy = Policy(checkpoint, args.device)
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
            values = torch.stack([info["episode"][key] for key in EPISODE])
            scores.append(values[:, ended])
    if frames:
        video.parent.mkdir(exist_ok=True)
        imageio.mimwrite(video, frames, fps=env.control_hz)
    returns, successes = torch.cat(scores, 1).double()
    results = {
        "eval/return": returns.mean().item(),
        "eval/return_std": returns.std(correction=0).item(),
    }
    if getattr(env, "has_success", True):
        results["eval/success_rate"] = successes.mean().item()
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
    except Exception as error:  # torch raises many kinds; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == "sac_pixels"
    need(ours, f"{path} is not sac_pixels'")
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


# same in: drqv2, sac_pixels
def save_run(run: Path, content: dict, parts: dict):
    """checkpoint.pt: all that it takes to continue."""
    (run / "args.json").write_text(json.dumps(content["args"], indent=1))
    states = {name: part.state_dict() for name, part in parts.items()}
    save(run / "checkpoint.pt", content | states | dict(csv_sizes=csv_sizes(run)))


# same in: drqv2, sac_pixels
def load_run(run: Path, parts: dict) -> dict:
    """Put every part and the CSV files back to the checkpoint. -> progress"""
    checkpoint = load(run / "checkpoint.pt")
    for name, part in parts.items():
        state = checkpoint[name]
        if name != "replay":  # which copies; what an optimizer keeps would keep the file in memory
            state = copy.deepcopy(state)
        part.load_state_dict(state)
    cut_back(run, checkpoint["csv_sizes"])
    return checkpoint["progress"]


# --- Policy ---------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out, from one checkpoint (file or its content) and no simulator."""

    def __init__(self, source: str | Path | dict, device: str = "cpu"):
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args, self.spec = Args(**checkpoint["args"]), checkpoint["spec"]
        with torch.device("meta"):  # shapes only: no random number is drawn
            self.agent = Agent(self.args, checkpoint["shapes"])
        self.agent.load_state_dict(checkpoint["agent"], assign=True)
        self.agent.to(device)
        self.reset()

    def reset(self):
        """Forget the earlier images; call at the start of every episode."""
        self.stack = []

    @torch.no_grad()
    def act(self, obs: dict):
        """obs "rgb" uint8 (N, render_size, render_size, 3), the newest image alone, and "state"
        (N, S), tensors on the device -> actions (N, A) = tanh(mean)."""
        past = self.stack[1:] or [obs["rgb"]] * (self.args.frame_stack - 1)
        self.stack = [*past, obs["rgb"]]
        seen = augment(torch.cat(self.stack, -1), self.args)
        mean, _ = self.agent.gaussian(self.agent.policy_features(seen), obs["state"])
        return torch.tanh(mean)


# --- train ----------------------------------------------------------------------------------------
# same in: drqv2, sac_pixels
def check_finite(agent: Agent, metrics: dict, step: int, run: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    for name, value in (agent.state_dict() | metrics).items():
        if not torch.as_tensor(value).isfinite().all():
            place = f"step {step}; last good checkpoint: {run}/checkpoint.pt"
            raise FloatingPointError(f"{name} is not finite at {place}")


# same in: drqv2, sac_pixels
def training_metrics(env, episodes: torch.Tensor, losses: list[dict]) -> dict:
    """Means over the episodes that ended, and over the updates, since the last row."""
    count, *sums = episodes.tolist()
    metrics = {"train/episodes": count, "train/nan_resets": int(env.nan_resets)}
    for key, value in zip(EPISODE, sums, strict=True):
        metrics[f"train/{key}"] = value / max(count, 1.0)
    for key in losses[0] if losses else ():
        metrics[key] = torch.stack([row[key] for row in losses]).mean().item()
    return metrics


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


@torch.no_grad()
def explore(agent: Agent, replay: Replay, args: Args) -> torch.Tensor:
    """Actions (N, A) for the newest observations, sampled."""
    seen = replay.observe(replay.head)
    if args.augmentation == "crop":  # a translation acts on the whole image, as in RAD's code
        seen["rgb"] = augment(seen["rgb"], args)
    return sample_actions(agent, agent.policy_features(seen["rgb"]), seen["state"])[0]


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
        video = Path(args.checkpoint).with_suffix(".mp4")
        results = evaluate(args.checkpoint, eval_env, args, video)
        print(json.dumps(results))
        return results

    shapes = dict(channels=env.image_shape[2], state=env.state_dim, action=env.action_dim)
    agent = Agent(args, shapes).to(args.device, memory_format=torch.channels_last)
    optimizers = make_optimizers(agent, args)
    learn = make_update(agent, optimizers, args)
    still = torch.zeros((args.num_envs, env.action_dim), device=args.device)
    obs = env.step(still)[0]  # reset() would undo the staggering
    replay = Replay(obs, still, args)  # differs (4)
    parts = dict(agent=agent, random=GlobalRandom(), **optimizers)
    if args.save_buffer:
        parts |= dict(env=env, replay=replay)
    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    content = dict(algo="sac_pixels", args=asdict(args), shapes=shapes, spec=env.spec)
    content |= dict(progress=progress, agent=agent.state_dict())  # which both follow the run

    run = open_run(args)
    if args.resume:
        progress.update(load_run(run, parts))
    else:
        save_run(run, content, parts)
    step, born = progress["global_step"], START - progress["wall_time"]
    first = 0 if args.save_buffer else step  # transition in the buffer
    results, losses, compiled = {}, [], False
    every = args.update_every * args.policy_frequency
    episodes = torch.zeros(3, device=args.device)  # since the last row, as in episode_sums
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")
    interrupt = Interrupt()
    stop = step >= args.total_timesteps

    while not stop:
        # act
        begin = time.perf_counter()
        uniform = step < args.learning_starts
        actions = torch.rand_like(still) * 2 - 1 if uniform else explore(agent, replay, args)

        # step
        obs, rewards, terminations, truncations, info = env.step(actions)

        # store
        dones = terminations | truncations
        discounts = info.get("discount", 1.0) * ~terminations
        replay.add(actions, rewards, discounts, dones, info["final_obs"], obs)
        episodes += episode_sums(info, dones)

        # update
        due = (step + args.num_envs) // every - step // every
        step += args.num_envs
        bar.update(args.num_envs)
        if step - first >= args.learning_starts:
            for _ in range(due):
                batches = [replay.sample(args.batch_size) for _ in range(args.policy_frequency)]
                losses.append(learn(batches))
            if losses and not compiled:  # the first ones compile, and train_time is without that
                compiled, begin = True, time.perf_counter()

        # log
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
            episodes.zero_()
            losses.clear()

        # evaluate
        if eval_due:
            video = run / f"videos/step_{step:09d}.mp4"
            results = evaluate(content, eval_env, args, video)
            write_row(run / "eval.csv", clock | results, args.track)
            bar.set_postfix_str(f"return {results['eval/return']:.2f}")
            if results["eval/return"] > progress["best"]:
                progress["best"] = results["eval/return"]
                save(run / "best.pt", content)

        # save
        if eval_due or stop:
            save_run(run, content, parts)

    interrupt.restore()
    for part in (bar, env, eval_env):
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
