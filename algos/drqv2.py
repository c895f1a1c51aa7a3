"""DrQ-v2: control from pixels by DDPG with random shifts, n-step returns and scheduled exploration.

Paper: Yarats, Fergus, Lazaric and Pinto, "Mastering Visual Continuous Control: Improved
Data-Augmented Reinforcement Learning", arXiv 2107.09645.

    target   y = sum of g^i r_(t+i), i < n, + g^n min_k Q'_k(h(o_(t+n)), mu(h(o_(t+n))) + e), where
             h encodes a shifted image
    critic   sum over k = 1, 2 of E[(Q_k(h(o_t), a_t) - y)^2], also through h            (eqs. 1, 2)
    actor    -E[min_k Q_k(h(o_t), mu(h(o_t)) + e)], without a gradient into h             (eq. 3)
    noise    e = clip(N(0, s^2), -c, c) in the losses, N(0, s^2) while acting, s falling  (eq. 4)

Differences from the authors' code; with one environment only (1) to (4) change the numbers:
 1. A true end of an episode stays one: its discount of 0 is kept (theirs turns it into 1).
 2. Steps within n of an episode's end are trained on too, with the fewer rewards that are left.
 3. Transitions are drawn uniformly and as soon as they are complete; theirs by episode, from a
    quarter of the episodes at a time, and after an episode's end.
 4. Random shifts are integer crops by index. Theirs interpolate at whole pixels, which differs by
    0.004 of 255.
 5. The buffer holds each frame once and stacks by index, on the networks' device.
 6. Encoder and critic share one Adam, which changes nothing: they have the same learning rate.
 7. Ours: several environments, a state beside the image; --atoms for D4PG's distributional
    critics. On a CPU the sizes are smaller: TUNED.

Commands, from the repository's root:
    train          python algos/drqv2.py --env-id cartpole_swingup
    smallest run   python algos/drqv2.py --env-id dot_reach --device cpu
    evaluate       python algos/drqv2.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/drqv2.py --resume runs/NAME   (exact, if it ran with --save-buffer)

Expected result, three seeds, one CPU core each: cartpole_balance 823 +- 161 after 30,000 steps
(60,000 frames, 46 minutes, 48 pixels; the authors' ten: 963 to 995); dot_reach from -22 (random;
the best possible is -2) to -3.8, -4.0 and -3.4 after 60,000 transitions and 5 minutes, with 99 %
success. Curves and commands: docs/algos/drqv2.md. Not yet measured on a GPU.

Shapes: N environments, F slots of the buffer, B batch, A action dimensions, S state dimensions (0
for most tasks), H x W image, C channels (3, x frame stack inside the networks), D features of the
encoder.
"""

# --- Imports --------------------------------------------------------------------------------------
import os

# Threads spin for a moment before they wait: much longer, and a run beside other work collapses.
os.environ.setdefault("GOMP_SPINCOUNT", "100000")

import copy
import csv
import ctypes
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

import imageio.v2 as imageio
import torch
import torch.nn as nn
import tyro
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
EPISODE = ("return", "success_at_end")  # what is logged of an episode that ended

# --- Args -----------------------------------------------------------------------------------------
MEDIUM = dict(total_timesteps=1_550_000, std_steps=500_000)  # 3.1 M frames
SMALL = dict(  # ours, for a CPU
    image_size=48,
    pad=2,
    encoder_channels=16,
    encoder_strides=(2, 1, 1),
    hidden=256,
    # A small critic learns more slowly at an equal learning rate, and until it tells states apart
    # the actor must not follow it.
    lr=1e-3,
    batch_size=64,
    buffer_size=100_000,
    total_timesteps=100_000,
    std_steps=25_000,
    eval_freq=10_000,
    eval_episodes=5,
    eval_envs=1,
    amp=False,
    compile=False,
    cudagraphs=False,
)
# "env_id device" -> defaults other than those below, which are the published ones for an easy task;
# later rows win. A step is an agent step, as everywhere in this file: two frames, at an action
# repeat of 2.
TUNED = {
    "acrobot_swingup *": MEDIUM,
    "cartpole_swingup_sparse *": MEDIUM,
    "cheetah_run *": MEDIUM,
    "finger_turn_*": MEDIUM,
    "hopper_hop *": MEDIUM,
    "quadruped_*": MEDIUM,
    "reach_duplo *": MEDIUM,
    "reacher_*": MEDIUM,
    "walker_run *": MEDIUM,
    "humanoid_*": dict(
        total_timesteps=15_050_000,  # 30.1 M frames
        std_steps=2_000_000,
        lr=8e-5,
        actor_lr=8e-5,
        feature_dim=100,
    ),
    "walker_*": dict(n_step=1, batch_size=512),
    "quadruped_run *": dict(buffer_size=100_000),
    "* cpu": SMALL,
    # batch and noise as published, which is what an hour of one core has time for
    "cartpole_* cpu": dict(
        batch_size=256,
        std_steps=100_000,
        total_timesteps=50_000,
        eval_freq=5_000,
        eval_episodes=10,
    ),
    "dot_reach *": SMALL
    | dict(
        num_envs=8,
        update_every=8,
        action_repeat=1,
        frame_stack=1,
        image_size=32,
        encoder_strides=(2, 2, 1),
        actor_lr=1e-3,
        gamma=0.9,
        tau=0.02,
        std_steps=12_000,
        total_timesteps=60_000,
        eval_freq=5_000,
        eval_episodes=64,
        eval_envs=64,
    ),
}


@dataclass
class Args:
    # run
    env_id: str = "dot_reach"  # task: dot_reach, SO101... or a DeepMind Control id, domain_task
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 550_000  # environment transitions (agent steps), over all environments
    eval_freq: int = 5_000  # transitions between evaluations, each of which saves a checkpoint
    eval_episodes: int = 10  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 5  # of them at once; divides eval_episodes
    log_freq: int = 1_000  # transitions between rows of metrics.csv; each waits for the device
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file with the weights to start from; all else starts afresh
    resume: str | None = None  # run folder to continue, with its arguments
    save_buffer: bool = False  # save the whole buffer too: large, but --resume continues exactly
    capture_video: bool = True  # film one episode of every evaluation
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, mode

    # environment
    num_envs: int = 1  # parallel environments; more make the data between two updates older
    image_size: int = 84  # pixels a side
    action_repeat: int = 2  # frames for which an action is held; rewards are added up (not SO101)
    frame_stack: int = 3  # latest images shown together
    camera: int | None = None  # the task's camera (DeepMind Control); None: the published one
    fast_render: bool = False  # no shadows, no smoothing: simpler and faster (DeepMind Control)

    # algorithm
    buffer_size: int = 1_000_000  # frames kept: one a transition, one more at an episode's end
    batch_size: int = 256  # transitions per update
    update_every: int = 2  # transitions between updates, over all environments
    learning_starts: int = 2_000  # transitions before the first update
    random_steps: int = 2_000  # first transitions, with uniformly random actions
    gamma: float = 0.99  # discount per agent step
    n_step: int = 3  # rewards summed before the bootstrap
    lr: float = 1e-4  # learning rate of encoder and critic
    actor_lr: float = 1e-4  # learning rate of the actor
    tau: float = 0.01  # share of the critic that moves into its target at every update
    std_start: float = 1.0  # standard deviation of the exploration noise at first
    std_end: float = 0.1  # and in the end
    std_steps: int = 100_000  # transitions over which it falls
    std_clip: float = 0.3  # noise of larger size is cut off in the losses
    pad: int = 4  # largest random shift, pixels each way
    encoder_channels: int = 32  # filters of each convolution, 3 x 3 without padding
    encoder_strides: tuple[int, ...] = (2, 1, 1, 1)  # one convolution for each
    feature_dim: int = 50  # numbers that actor and critic each make of the image
    hidden: int = 1024  # width of the two layers of actor and critics
    atoms: int = 0  # D4PG's critics: distributions over so many returns, 51 there; 0: DrQ-v2's
    v_min: float = 0.0  # smallest of these returns
    v_max: float = 200.0  # and largest: a suite task's, 2 a step / (1 - gamma)

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and buffer
    amp: bool = True  # losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the two losses, random shifts included, with torch.compile
    cudagraphs: bool = True  # replay an update as one CUDA graph; needs cuda, tensordict


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
    whole = args.eval_episodes % args.eval_envs == 0
    need(whole, "--eval-episodes must be a multiple of --eval-envs")
    complete = args.learning_starts >= (args.n_step + 1) * args.num_envs
    need(complete, "--learning-starts must be at least (--n-step + 1) x --num-envs")
    room = args.buffer_size >= (args.n_step + args.frame_stack + 2) * args.num_envs
    need(room, "--buffer-size must be at least (--n-step + --frame-stack + 2) x --num-envs")
    scale = args.atoms == 0 or args.atoms > 1 and args.v_max > args.v_min
    need(scale, "--atoms must be 0 or at least 2, and then --v-max above --v-min")
    need(args.checkpoint or not args.evaluate, "--evaluate needs --checkpoint FILE")
    here = torch.cuda.is_available() or args.device == "cpu"
    need(here, "there is no CUDA device here: use --device cpu")


def tuned(env_id: str, device: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for pattern, row in TUNED.items():
        if fnmatch(f"{env_id} {device}", pattern):
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
    """Command line -> Args. Defaults, and so --help, are those of the task and device or file."""
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    if given.resume:
        return resumed_args(given.resume, argv)
    if given.checkpoint:
        values = load(given.checkpoint)["args"] | dict(name="", resume=None, device=given.device)
    else:
        values = dict(env_id=given.env_id, device=given.device)
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
    """-> training environment (None with --evaluate), evaluation environment.

    The contract is envs/__init__.py's.
    """
    try:
        import envs
    except ModuleNotFoundError as error:
        message = "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        raise ValueError(message) from error
    options = dict(
        image_size=args.image_size,
        action_repeat=args.action_repeat,
        camera=args.camera,
        fast_render=args.fast_render or None,
    )
    if args.env_id.startswith("SO101"):
        options = dict(render_size=args.image_size)
    make = partial(envs.make, args.env_id, device=args.device, **options)
    eval_env = make(num_envs=args.eval_envs, seed=EVAL_SEED)
    if args.evaluate:
        return None, eval_env
    return make(num_envs=args.num_envs, seed=args.seed), eval_env


# --- Networks -------------------------------------------------------------------------------------
def random_shift(rgb, pad: int):
    """Square images (B, H, H, C), edges repeated `pad` pixels outwards, cropped at random."""
    count, size, _, channels = rgb.shape
    down, right = torch.randint(2 * pad + 1, (count, 2, 1), device=rgb.device).unbind(1)  # (B, 1)
    left_edge = rgb[:, :, :1].expand(-1, -1, pad, -1)
    right_edge = rgb[:, :, -1:].expand(-1, -1, pad, -1)
    wide = torch.cat([left_edge, rgb, right_edge], 2)  # (B, H, H + 2 pad, C)
    # all rows of H pixels, wherever they begin, as one view: rows are copied by index, not pixels
    pixels = count * size * (size + 2 * pad)
    crops = wide.as_strided((pixels - size + 1, size * channels), (channels, 1))
    image = torch.arange(count, device=rgb.device)[:, None]
    row = torch.arange(size, device=rgb.device) + down - pad  # (B, H)
    begin = (image * size + row.clamp(0, size - 1)) * (size + 2 * pad) + right
    return crops.index_select(0, begin.flatten()).view_as(rgb)  # differs (4)


def init_orthogonal(layer: nn.Module):
    """Orthogonal weights, gain sqrt 2 for convolutions (ReLUs follow), else 1; zero biases."""
    if isinstance(layer, nn.Conv2d | nn.Linear):
        gain = math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0
        nn.init.orthogonal_(layer.weight, gain)
        nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """uint8 (B, H, W, C) -> (B, D). Shared, but trained by the critic alone; it has no target."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        layers, size = [], args.image_size
        for stride in args.encoder_strides:
            layers += [nn.Conv2d(channels, args.encoder_channels, 3, stride), nn.ReLU()]
            channels = args.encoder_channels
            size = (size - 3) // stride + 1
        need(size > 0, "--image-size is too small for --encoder-strides")
        self.convs = nn.Sequential(*layers)
        self.features = size * size * channels

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float().div_(255).sub_(0.5)  # channels last, as a view
        return self.convs(x).permute(0, 2, 3, 1).flatten(1)  # a view again


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
    """All that learns. `shapes`: the environment's channels, state and action dimensions."""

    def __init__(self, args: Args, shapes: dict):
        super().__init__()
        state, action = shapes["state"], shapes["action"]
        self.encoder = Encoder(shapes["channels"] * args.frame_stack, args)
        self.actor = Heads(self.encoder.features, state, 1, action, args)
        outputs = max(args.atoms, 1)
        self.critic = Heads(self.encoder.features, state + action, 2, outputs, args)
        self.apply(init_orthogonal)
        self.encoder.to(memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)

    def mean(self, features, state):
        """Mean actions (B, A) in [-1, 1]; the noise has a schedule."""
        return torch.tanh(self.actor(features, state)[0])


def make_optimizers(agent: Agent, args: Args):
    adam = partial(torch.optim.Adam, fused=True, capturable=args.device != "cpu")
    critic_side = [*agent.encoder.parameters(), *agent.critic.parameters()]  # differs (6)
    return dict(
        critic_optimizer=adam(critic_side, args.lr),
        actor_optimizer=adam(agent.actor.parameters(), args.actor_lr),
    )


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
def noise_std(args: Args, global_step: int):
    """Standard deviation () of the exploration noise: it falls linearly with agent steps. Eq. 4"""
    share = min(global_step / args.std_steps, 1.0)
    std = args.std_start + (args.std_end - args.std_start) * share
    return torch.tensor(std, device=args.device)


def noisy_actions(mean, std, clip: float = math.inf):
    """mean (B, A) + noise cut off at +-clip, the sum at +-1 without losing its gradient."""
    actions = mean + (std * torch.randn_like(mean)).clamp(-clip, clip)
    return actions + (actions.clamp(-1 + 1e-6, 1 - 1e-6) - actions).detach()


def values(outputs, args: Args):
    """What critics say, (2, B, atoms or 1) -> Q (2, B)."""
    if args.atoms == 0:
        return outputs.squeeze(-1)
    returns = torch.linspace(args.v_min, args.v_max, args.atoms, device=outputs.device)
    return (outputs.softmax(-1) * returns).sum(-1)


def project(probabilities, rewards, discounts, args: Args):
    """Distribution (B, atoms) of rewards + discounts x return, on the atoms of the return.

    Each moved atom is shared between its two neighbours (C51, eq. 7).
    """
    atom = torch.arange(args.atoms, device=rewards.device)
    width = (args.v_max - args.v_min) / (args.atoms - 1)
    moved = rewards[:, None] + discounts[:, None] * (args.v_min + atom * width)
    place = (moved.clamp(args.v_min, args.v_max) - args.v_min) / width  # (B, atoms), in atoms
    shares = (1 - (place[:, None] - atom[:, None]).abs()).clamp(min=0)  # (B, to, from)
    return (shares * probabilities[:, None]).sum(-1)


def critic_loss(agent: Agent, batch: dict, std, args: Args):
    """Loss of critic and encoder, eqs. 1 and 2. -> loss, features (B, D), metrics"""
    obs, next_obs = batch["obs"], batch["next_obs"]
    with torch.no_grad():
        next_features = agent.encoder(random_shift(next_obs["rgb"], args.pad))
        mean = agent.mean(next_features, next_obs["state"])
        next_actions = noisy_actions(mean, std, args.std_clip)
        next_outputs = agent.target(next_features, next_obs["state"], next_actions)
        next_q = values(next_outputs, args)
        rewards, discounts = batch["rewards"], batch["discounts"]
        targets = rewards + discounts * next_q.amin(0)
    features = agent.encoder(random_shift(obs["rgb"], args.pad))
    outputs = agent.critic(features, obs["state"], batch["actions"])
    q = values(outputs, args)  # (2, B)
    errors = (q - targets).square()
    if args.atoms:
        lower = (next_q[0] < next_q[1])[:, None]  # the distribution with the smaller mean
        probabilities = torch.where(lower, *next_outputs).softmax(-1)
        labels = project(probabilities, rewards, discounts, args)
        errors = -(labels * outputs.log_softmax(-1)).sum(-1)
    loss = errors.mean(-1).sum()
    metrics = {
        "loss/qf": loss.detach(),
        "train/q": q.detach().mean(),
        "train/target": targets.mean(),
    }
    return loss, features.detach(), metrics


def actor_loss(agent: Agent, batch: dict, features, std, args: Args):
    """Eq. 3, on features (B, D) without their gradient. -> loss, metrics"""
    state = batch["obs"]["state"]
    mean = agent.mean(features, state)
    actions = noisy_actions(mean, std, args.std_clip)
    loss = -values(agent.critic(features, state, actions), args).amin(0).mean()
    return loss, {"loss/actor": loss.detach(), "train/saturation": mean.detach().abs().mean()}


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update(agent: Agent, optimizers: dict, losses: tuple, args: Args, batch: dict, std):
    """One step of everything: critic and encoder, actor on the features from before it, target."""
    q_loss, pi_loss = losses
    loss, features, metrics = q_loss(agent, batch, std, args)
    descend(loss, optimizers["critic_optimizer"])
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, more = pi_loss(agent, batch, features, std, args)
    agent.critic.requires_grad_(True)
    descend(loss, optimizers["actor_optimizer"])
    with torch.no_grad():  # the encoder has no target
        torch._foreach_lerp_(
            list(agent.target.parameters()), list(agent.critic.parameters()), args.tau
        )
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
    """-> `update` as a function of (batch, std): plain, with compiled losses, as one CUDA graph."""
    if args.amp:
        warn_of_slow_amp(args.device)
    kind = torch.device(args.device).type
    mixed = torch.autocast(kind, torch.bfloat16, enabled=args.amp, cache_enabled=False)
    losses = mixed(critic_loss), mixed(actor_loss)
    if args.compile:
        losses = tuple(map(torch.compile, losses))
    one_update = partial(update, agent, optimizers, losses, args)
    if args.cudagraphs:
        from tensordict.nn import CudaGraphModule

        one_update = CudaGraphModule(one_update, warmup=5)
    return one_update


# --- evaluate -------------------------------------------------------------------------------------
# same in: drqv2, sac_pixels
def episode_sums(info: dict, ended):
    """(3,): how many episodes ended, and sums of EPISODE over them."""
    values = torch.stack([ended, *(info["episode"][key] for key in EPISODE)])
    return torch.where(ended, values, 0.0).sum(-1)


def evaluate(checkpoint, env, args: Args, video: Path) -> dict:
    """Whole episodes, mean actions, fixed seeds. -> metrics. The video shows the first episode."""
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
    ours = isinstance(checkpoint, dict) and checkpoint.get("algo") == "drqv2"
    need(ours, f"{path} is not drqv2's")
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
    """Observation in, action out, from one checkpoint (file or its content) and no simulator.

    `spec` describes the robot: what the environment says of its actions, cameras, rates and state.
    """

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
        """obs: "rgb" uint8 (N, H, W, 3), the newest image alone, and "state" (N, S), tensors on the
        device -> mean actions (N, A)."""
        past = self.stack[1:] or [obs["rgb"]] * (self.args.frame_stack - 1)
        self.stack = [*past, obs["rgb"]]
        features = self.agent.encoder(torch.cat(self.stack, -1))
        return self.agent.mean(features, obs["state"])


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


def keep_memory():
    """What an update frees stays here for the next one. glibc would return large blocks to the
    system, and at 84 pixels a CPU spent a third of an update on having them back."""
    libc = ctypes.CDLL(None)
    if hasattr(libc, "mallopt"):
        libc.mallopt(-4, 0)  # M_MMAP_MAX
        libc.mallopt(-1, 2**31 - 1)  # M_TRIM_THRESHOLD


@torch.no_grad()
def explore(agent: Agent, replay: Replay, std) -> torch.Tensor:
    """Actions (N, A) for the newest observations, with noise."""
    seen = replay.observe(replay.head)
    return noisy_actions(agent.mean(agent.encoder(seen["rgb"]), seen["state"]), std)


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, progress, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at the
    first NaN, SystemExit after Ctrl-C.
    """
    check(args)
    keep_memory()
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    env, eval_env = make_envs(args)
    if args.evaluate:
        video = Path(args.checkpoint).with_suffix(".mp4")
        results = evaluate(args.checkpoint, eval_env, args, video)
        print(json.dumps(results))
        return results

    shapes = dict(channels=env.image_shape[2], state=env.state_dim, action=env.action_dim)
    agent = Agent(args, shapes).to(args.device)
    optimizers = make_optimizers(agent, args)
    one_update = make_update(agent, optimizers, args)
    still = torch.zeros((args.num_envs, env.action_dim), device=args.device)
    replay = Replay(env.reset(seed=args.seed), still, args, args.n_step)
    parts = dict(agent=agent, random=GlobalRandom(), **optimizers)
    if args.save_buffer:
        parts |= dict(env=env, replay=replay)
    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    content = dict(algo="drqv2", args=asdict(args), shapes=shapes, spec=env.spec)
    content |= dict(progress=progress, agent=agent.state_dict())  # which both follow the run

    run = open_run(args)
    if args.resume:
        progress.update(load_run(run, parts))
    else:
        if args.checkpoint:
            agent.load_state_dict(load(args.checkpoint)["agent"])
        save_run(run, content, parts)
    step, born = progress["global_step"], START - progress["wall_time"]
    first = 0 if args.save_buffer else step  # transition in the buffer
    results, losses, compiled = {}, [], False
    episodes = torch.zeros(3, device=args.device)  # since the last row, as in episode_sums
    bar = tqdm(total=args.total_timesteps, initial=step, unit="step")
    interrupt = Interrupt()
    stop = step >= args.total_timesteps

    while not stop:
        # act
        begin = time.perf_counter()
        std = noise_std(args, step)
        uniform = step < args.random_steps
        actions = torch.rand_like(still) * 2 - 1 if uniform else explore(agent, replay, std)

        # step, in two halves where the environment has them: it may draw while the networks learn
        halves = hasattr(env, "step_begin")
        if halves:
            env.step_begin(actions)

        # update
        due = (step + args.num_envs) // args.update_every - step // args.update_every
        if step - first >= args.learning_starts:
            for _ in range(due):
                losses.append(one_update(replay.sample(args.batch_size), std))
            if losses and not compiled:  # the first ones compile, and train_time is without that
                compiled, begin = True, time.perf_counter()
        outcome = env.step_end() if halves else env.step(actions)
        step += args.num_envs
        bar.update(args.num_envs)

        # store
        obs, rewards, terminations, truncations, info = outcome
        dones = terminations | truncations
        discounts = info.get("discount", 1.0) * ~terminations  # differs (1)
        replay.add(actions, rewards, discounts, dones, info["final_obs"], obs)
        episodes += episode_sums(info, dones)

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
            metrics |= {"train/std": std.item(), "time/sps": step / train_time}
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
