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
 7. Ours: several environments, a state beside the image. On a CPU the sizes are smaller: TUNED.

Commands, from the repository's root:
    train          python algos/drqv2.py --env-id cartpole_swingup
    smallest run   python algos/drqv2.py --env-id dot_reach --device cpu
    evaluate       python algos/drqv2.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/drqv2.py --resume runs/NAME   (exact, if it ran with --save-buffer)

Expected result: with a CPU's sizes, dot_reach from -22 (random; the best possible is -2) to -3.9
after 60,000 transitions, the mean of three seeds at -3.8, -4.4 and -3.4; cartpole_balance 952 after
100,000 of its steps (200,000 frames, two hours of half a core), one seed. Curves and commands:
docs/algos/drqv2.md. Not yet measured on a GPU.

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
CLOCK = ("global_step", "wall_time", "train_time")  # first columns of the CSV files

# --- Args -----------------------------------------------------------------------------------------
MEDIUM = (
    "acrobot_swingup cartpole_swingup_sparse cheetah_run finger_turn_* hopper_hop "
    "quadruped_* reach_duplo reacher_* walker_run"
)
# (patterns of env ids, kind of device) -> defaults other than those below, which are the published
# ones for an easy task; later rows win. A step is an agent step, as everywhere in this file: two
# frames, at an action repeat of 2.
TUNED = {
    (MEDIUM, ""): dict(total_timesteps=1_550_000, std_steps=500_000),  # 3.1 M frames
    ("humanoid_*", ""): dict(
        total_timesteps=15_050_000,  # 30.1 M frames
        std_steps=2_000_000,
        lr=8e-5,
        actor_lr=8e-5,
        feature_dim=100,
    ),
    ("walker_*", ""): dict(n_step=1, batch_size=512),
    ("quadruped_run", ""): dict(buffer_size=100_000),
    # What follows is ours. A small critic learns more slowly at an equal learning rate, and until
    # it tells states apart the actor must not follow it.
    ("*", "cpu"): dict(
        image_size=48,
        pad=2,
        encoder_channels=16,
        encoder_strides=(2, 1, 1),
        hidden=256,
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
    ),
    ("dot_reach", ""): dict(
        num_envs=8,
        update_every=8,
        action_repeat=1,
        frame_stack=1,
        image_size=32,
        pad=2,
        encoder_channels=16,
        encoder_strides=(2, 2, 1),
        hidden=256,
        batch_size=64,
        lr=1e-3,
        actor_lr=1e-3,
        gamma=0.9,
        tau=0.02,
        std_steps=12_000,
        buffer_size=100_000,
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
    log_freq: int = (
        1_000  # transitions between rows of metrics.csv, for which the GPU is waited for
    )
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file with the weights to start from; all else starts afresh
    resume: str | None = None  # run folder to continue, with its arguments
    save_buffer: bool = False  # save the replay buffer too: larger, but --resume continues exactly
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

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and buffer
    amp: bool = True  # losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the two losses, random shifts included, with torch.compile
    cudagraphs: bool = True  # on a GPU: replay each update as one CUDA graph, without its sampling


# same in: squint_sac, drqv2, sac_pixels, sapo_rewarped, ppo_mjx_go1, distill_go1, resfit, bc_chunk
def need(holds, message: str):
    """Raises ValueError with the message unless something holds."""
    if not holds:
        raise ValueError(message)


def check(args: Args):
    """Raises ValueError, one line, for a choice that would fail late, silently or unreadably."""
    need(args.num_envs > 0, "--num-envs must be at least 1")
    need(min(args.n_step, args.frame_stack) > 0, "--n-step and --frame-stack must be at least 1")
    need(
        args.eval_envs > 0 and args.eval_episodes % args.eval_envs == 0,
        "--eval-episodes must be a multiple of --eval-envs",
    )
    need(
        args.learning_starts >= (args.n_step + 1) * args.num_envs,
        "--learning-starts must be at least (--n-step + 1) x --num-envs",
    )
    need(
        args.buffer_size >= (args.n_step + args.frame_stack + 2) * args.num_envs,
        "--buffer-size must be at least (--n-step + --frame-stack + 2) x --num-envs",
    )
    need(args.checkpoint or not args.evaluate, "--evaluate needs --checkpoint FILE")
    need(
        torch.cuda.is_available() or args.device == "cpu",
        "there is no CUDA device here: use --device cpu",
    )


def tuned(env_id: str, device: str) -> dict:
    """The rows of TUNED that apply, merged; later rows win."""
    values = {}
    for (patterns, kind), row in TUNED.items():
        of_task = any(fnmatch(env_id, pattern) for pattern in patterns.split())
        if of_task and device.startswith(kind):
            values |= row
    return values


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
        values |= tuned(given.env_id, given.device)
    about = __doc__.split("\n\n")[0]
    return tyro.cli(Args, args=argv, default=Args(**values), description=about)


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

    The contract is envs/__init__.py's.
    """
    try:
        import envs
    except ModuleNotFoundError as error:
        message = "make_envs needs cleanrobot's envs: pip install -e . in the repository"
        raise ValueError(message) from error
    if args.env_id.startswith("SO101"):
        options = dict(render_size=args.image_size)
    else:
        options = dict(image_size=args.image_size, action_repeat=args.action_repeat)
        options |= dict(camera=args.camera, fast_render=args.fast_render or None)
    eval_env = envs.make(args.env_id, args.eval_envs, args.device, seed=EVAL_SEED, **options)
    if args.evaluate:
        return None, eval_env
    env = envs.make(args.env_id, args.num_envs, args.device, seed=args.seed, **options)
    return env, eval_env


# --- Networks -------------------------------------------------------------------------------------
def random_shift(rgb, pad: int):
    """Square images (B, H, H, C), edges repeated `pad` pixels outwards, cropped at random."""
    count, size = rgb.shape[:2]
    offsets = torch.randint(2 * pad + 1, (count, 2, 1), device=rgb.device) - pad  # down, right
    pixels = (torch.arange(size, device=rgb.device) + offsets).clamp(0, size - 1)  # (B, 2, H)
    image = torch.arange(count, device=rgb.device)[:, None, None]
    return rgb[image, pixels[:, 0, :, None], pixels[:, 1, None, :]]  # differs (4)


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
        return (
            self.convs(x).permute(0, 2, 3, 1).flatten(1)
        )  # a view again: any order of features do


def make_trunk(features: int, size: int) -> nn.Sequential:
    """features (B, D) -> (B, size). Actor, critic and target have one each."""
    return nn.Sequential(nn.Linear(features, size), nn.LayerNorm(size), nn.Tanh())


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(
        nn.Linear(inputs, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, hidden),
        nn.ReLU(inplace=True),
        nn.Linear(hidden, outputs),
    )


class Actor(nn.Module):
    """features (B, D), state (B, S) -> mean action (B, A) in [-1, 1]; the noise has a schedule."""

    def __init__(self, features: int, shapes: dict, args: Args):
        super().__init__()
        self.trunk = make_trunk(features, args.feature_dim)
        self.policy = mlp(args.feature_dim + shapes["state"], args.hidden, shapes["action"])

    def forward(self, features, state):
        x = torch.cat([self.trunk(features), state], -1)
        return torch.tanh(self.policy(x).float())


class Critic(nn.Module):
    """features (B, D), state (B, S), actions (B, A) -> both values (2, B): one trunk, two heads."""

    def __init__(self, features: int, shapes: dict, args: Args):
        super().__init__()
        self.trunk = make_trunk(features, args.feature_dim)
        inputs = args.feature_dim + shapes["state"] + shapes["action"]
        self.q1 = mlp(inputs, args.hidden, 1)
        self.q2 = mlp(inputs, args.hidden, 1)

    def forward(self, features, state, actions):
        x = torch.cat([self.trunk(features), state, actions], -1)
        return torch.stack([self.q1(x), self.q2(x)]).squeeze(-1).float()


class Agent(nn.Module):
    """All that learns. `shapes`: the environment's channels, state and action dimensions."""

    def __init__(self, args: Args, shapes: dict):
        super().__init__()
        self.encoder = Encoder(shapes["channels"] * args.frame_stack, args)
        self.actor = Actor(self.encoder.features, shapes, args)
        self.critic = Critic(self.encoder.features, shapes, args)
        self.apply(init_orthogonal)
        self.encoder.to(memory_format=torch.channels_last)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)


def make_optimizers(agent: Agent, args: Args) -> dict:
    options = dict(fused=True, capturable=args.device.startswith("cuda"))
    critic_side = [*agent.encoder.parameters(), *agent.critic.parameters()]  # differs (6)
    return dict(
        critic_optimizer=torch.optim.Adam(critic_side, args.lr, **options),
        actor_optimizer=torch.optim.Adam(agent.actor.parameters(), args.actor_lr, **options),
    )


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
def noise_std(args: Args, global_step: int):
    """Standard deviation () of the exploration noise: it falls linearly with agent steps. Eq. 4"""
    share = min(global_step / args.std_steps, 1.0)
    std = args.std_start + (args.std_end - args.std_start) * share
    return torch.full((), std, device=args.device)


def noisy_actions(mean, std, clip: float = math.inf):
    """mean (B, A) + noise cut off at +-clip, the sum at +-1 without losing its gradient."""
    actions = mean + (std * torch.randn_like(mean)).clamp(-clip, clip)
    return actions + (actions.clamp(-1 + 1e-6, 1 - 1e-6) - actions).detach()


@torch.no_grad()
def explore(agent: Agent, obs: dict, std):
    """Noisy actions (N, A) for stacked observations."""
    return noisy_actions(agent.actor(agent.encoder(obs["rgb"]), obs["state"]), std)


def critic_loss(agent: Agent, batch: dict, std, args: Args):
    """Loss of critic and encoder, eqs. 1 and 2. -> loss, features (B, D), metrics"""
    obs, next_obs = batch["obs"], batch["next_obs"]
    with torch.autocast(std.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        with torch.no_grad():
            next_features = agent.encoder(random_shift(next_obs["rgb"], args.pad))
            mean = agent.actor(next_features, next_obs["state"])
            next_actions = noisy_actions(mean, std, args.std_clip)
            next_q = agent.target(next_features, next_obs["state"], next_actions).amin(0)
            targets = batch["rewards"] + batch["discounts"] * next_q
        features = agent.encoder(random_shift(obs["rgb"], args.pad))
        q = agent.critic(features, obs["state"], batch["actions"])  # (2, B)
        loss = (q - targets).square().mean(-1).sum()
    metrics = {
        "loss/qf": loss.detach(),
        "train/q": q.detach().mean(),
        "train/target": targets.mean(),
        "train/batch_reward": batch["rewards"].mean(),
    }
    return loss, features.detach(), metrics


def actor_loss(agent: Agent, batch: dict, features, std, args: Args):
    """Eq. 3, on features (B, D) without their gradient. -> loss, metrics"""
    state = batch["obs"]["state"]
    with torch.autocast(std.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        mean = agent.actor(features, state)
        actions = noisy_actions(mean, std, args.std_clip)
        loss = -agent.critic(features, state, actions).amin(0).mean()
    return loss, {"loss/actor": loss.detach(), "train/saturation": mean.detach().abs().mean()}


def descend(loss, optimizer):
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()


def update(agent: Agent, optimizers: dict, losses: tuple, args: Args, batch: dict, std) -> dict:
    """One step of everything: critic and encoder, actor on the features from before it, target."""
    loss, features, metrics = losses[0](agent, batch, std, args)
    descend(loss, optimizers["critic_optimizer"])
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, more = losses[1](agent, batch, features, std, args)
    agent.critic.requires_grad_(True)
    descend(loss, optimizers["actor_optimizer"])
    with torch.no_grad():  # the encoder has no target
        targets, sources = list(agent.target.parameters()), list(agent.critic.parameters())
        torch._foreach_lerp_(targets, sources, args.tau)
    return metrics | more


def make_update(agent: Agent, optimizers: dict, args: Args):
    """-> `update` as a function of (batch, std), by the fastest way that `args` allows."""
    losses = critic_loss, actor_loss
    if args.compile:
        losses = torch.compile(critic_loss), torch.compile(actor_loss)
    one_update = partial(update, agent, optimizers, losses, args)
    if args.cudagraphs and args.device.startswith("cuda"):
        from tensordict.nn import CudaGraphModule

        one_update = CudaGraphModule(one_update, warmup=5)
    return one_update


# --- evaluate -------------------------------------------------------------------------------------
def evaluate(policy, env, args: Args, video: Path) -> dict:
    """Whole episodes, mean actions, fixed seeds -> metrics. The video shows the first episode."""
    returns, successes, frames = [], [], []
    for batch in range(args.eval_episodes // env.num_envs):
        obs = env.reset(seed=EVAL_SEED + batch)
        policy.reset()
        running = torch.ones(env.num_envs, dtype=torch.bool, device=args.device)
        for _ in range(env.max_episode_steps):
            if args.capture_video and batch == 0:
                frames.append(env.render()[0])
            obs, _, terminations, truncations, info = env.step(policy.act(obs))
            ended = (terminations | truncations) & running  # each environment counts once
            returns.append(info["episode"]["return"][ended])
            successes.append(info["episode"]["success_at_end"][ended])
            running &= ~ended
    if args.capture_video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=env.control_hz)
    returns = torch.cat(returns).double()
    results = {
        "eval/return": float(returns.mean()),
        "eval/return_std": float(returns.std(correction=0)),
    }
    if getattr(env, "has_success", True):
        results["eval/success_rate"] = float(torch.cat(successes).double().mean())
    return results


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
    except Exception as error:  # torch raises many kinds; a reader needs one line
        raise ValueError(f"{path} is no checkpoint: damaged, or another kind of file") from error
    need(
        isinstance(checkpoint, dict) and checkpoint.get("algo") == "drqv2", f"{path} is not drqv2's"
    )
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


def save_run(run: Path, facts: dict, progress: dict, parts: dict):
    """checkpoint.pt, all that --resume needs. `facts` is what stays the same during a run."""
    (run / "args.json").write_text(json.dumps(facts["args"], indent=1))
    content = facts | dict(progress=progress, csv_sizes=csv_sizes(run))
    for name, part in parts.items():
        content[name] = part.state_dict()
    save(run / "checkpoint.pt", content)


# --- Policy ---------------------------------------------------------------------------------------
class Policy:
    """Observation in, action out, from one checkpoint (file or its content) and no simulator.

    `spec` describes the robot: what the environment says of its actions, cameras, rates and state.
    """

    def __init__(self, source: str | Path | dict, device: str = "cpu"):
        checkpoint = source if isinstance(source, dict) else load(source)
        self.args, self.spec = Args(**checkpoint["args"]), checkpoint["spec"]
        with torch.device("meta"):  # shapes only: no random number is drawn
            agent = Agent(self.args, checkpoint["shapes"])
        agent.load_state_dict(checkpoint["agent"], assign=True)
        self.agent, self.stack = agent.to(device), []

    def reset(self):
        """Forget the earlier images; call at the start of every episode."""
        self.stack = []

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs: "rgb" uint8 (N, H, W, 3), the newest image alone, and "state" (N, S), tensors on the
        device -> mean actions (N, A)."""
        past = self.stack[1:] or [obs["rgb"]] * (self.args.frame_stack - 1)
        self.stack = [*past, obs["rgb"]]
        features = self.agent.encoder(torch.cat(self.stack, -1))
        return self.agent.actor(features, obs["state"])


# --- train ----------------------------------------------------------------------------------------
def check_finite(agent: Agent, metrics: dict, global_step: int, run: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    for name, value in (agent.state_dict() | metrics).items():
        if not torch.as_tensor(value).isfinite().all():
            good = f"last good checkpoint: {run / 'checkpoint.pt'}"
            raise FloatingPointError(f"{name} is not finite at step {global_step}; {good}")


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


def mean_metrics(history: list[dict]) -> dict[str, float]:
    """Means over the updates since the last row; waits for the device."""
    means = {}
    for name in history[0] if history else ():
        means[name] = float(torch.stack([metrics[name] for metrics in history]).mean())
    return means


def ended(dones, episode: dict):
    """(3,): how many episodes ended, the sums of their returns and successes."""
    values = torch.stack([dones, episode["return"], episode["success_at_end"]])
    return torch.where(dones, values, 0.0).sum(-1)


def log_row(run: Path, progress: dict, metrics: dict, episodes, env, args: Args):
    """A row of metrics.csv; episodes: the sum of `ended` since the last one."""
    count, returns, successes = episodes.tolist()
    row = {name: progress[name] for name in CLOCK} | metrics
    row["train/return"] = returns / max(count, 1)
    row["train/success_at_end"] = successes / max(count, 1)
    row["train/episodes"] = count
    row["train/std"] = float(noise_std(args, progress["global_step"]))
    row["train/nan_resets"] = int(env.nan_resets)
    row["time/sps"] = progress["global_step"] / progress["train_time"]
    write_row(run / "metrics.csv", row, args.track)


def evaluate_now(run: Path, facts: dict, progress: dict, agent: Agent, env, args: Args) -> dict:
    """A row of eval.csv, a video, and best.pt if it is the best so far. -> metrics"""
    snapshot = facts | dict(progress=progress, agent=agent.state_dict())
    video = run / f"videos/step_{progress['global_step']:09d}.mp4"
    results = evaluate(Policy(snapshot, args.device), env, args, video)
    clock = {name: progress[name] for name in CLOCK}
    write_row(run / "eval.csv", clock | results, args.track)
    if results["eval/return"] > progress["best"]:
        progress["best"] = results["eval/return"]
        save(run / "best.pt", snapshot)
    return results


def evaluate_checkpoint(args: Args, env) -> dict:
    video = Path(args.checkpoint).parent / "videos/evaluate.mp4"
    results = evaluate(Policy(args.checkpoint, args.device), env, args, video)
    print(json.dumps(results))
    env.close()
    return results


def train(args: Args) -> dict:
    """Train, or with --evaluate only evaluate. -> metrics of the last evaluation, progress, `run`.

    Raises ValueError or FileNotFoundError for arguments that do not fit, FloatingPointError at the
    first NaN, SystemExit after Ctrl-C.
    """
    check(args)
    torch.set_float32_matmul_precision("high")
    torch.manual_seed(args.seed)
    env, eval_env = make_envs(args)
    if args.evaluate:
        return evaluate_checkpoint(args, eval_env)

    progress = dict(global_step=0, wall_time=0.0, train_time=0.0, best=-math.inf)
    if args.resume:
        checkpoint = load(Path(args.resume) / "checkpoint.pt")
        progress = checkpoint["progress"]
    # without a saved buffer a resumed run begins with other episodes than at first
    obs = env.reset(seed=args.seed + progress["global_step"])
    shapes = dict(channels=env.image_shape[2], state=env.state_dim, action=env.action_dim)
    facts = dict(algo="drqv2", args=asdict(args), shapes=shapes, spec=env.spec)
    agent = Agent(args, shapes).to(args.device)
    optimizers = make_optimizers(agent, args)
    one_update = make_update(agent, optimizers, args)
    slots = args.buffer_size // args.num_envs
    replay = Replay(obs, env.action_dim, slots, args.frame_stack, args.n_step, args.gamma)
    parts = dict(agent=agent, random=GlobalRandom(), **optimizers)
    filled_since = progress["global_step"]
    if args.save_buffer:
        parts |= dict(env=env, replay=replay)
        filled_since = 0

    run = open_run(args)
    if args.resume:
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        cut_back(run, checkpoint["csv_sizes"])
        del checkpoint  # its mapped tensors are released
    elif args.checkpoint:
        agent.load_state_dict(load(args.checkpoint)["agent"])
    save_run(run, facts, progress, parts)  # from now on it can be resumed

    born = START - progress["wall_time"]
    begin = time.perf_counter() - progress["train_time"]  # moved on by what is no training
    episodes = torch.zeros(3, device=args.device)  # sums of `ended` since the last row
    updates, history, results = 0, [], {}  # history: metrics of each update since the last row
    first, last = progress["global_step"], args.total_timesteps
    bar = tqdm(total=last, initial=first, unit="step", mininterval=1)
    interrupt = Interrupt()
    stop = first >= last
    while not stop:
        # act
        before = progress["global_step"]
        std = noise_std(args, before)
        if before < args.random_steps:
            actions = torch.rand((args.num_envs, env.action_dim), device=args.device) * 2 - 1
        else:
            actions = explore(agent, replay.present(), std)

        # step
        obs, rewards, terminations, truncations, info = env.step(actions)
        now = before + args.num_envs
        progress["global_step"] = now
        bar.update(args.num_envs)

        # store
        dones = terminations | truncations
        discounts = info.get("discount", torch.ones_like(rewards)) * ~terminations  # differs (1)
        replay.add(actions, rewards, discounts, dones, info["final_obs"], obs)
        episodes += ended(dones, info["episode"])

        # update
        due = now // args.update_every - before // args.update_every
        if now - filled_since < args.learning_starts:
            due = 0
        for _ in range(due):
            pause = time.perf_counter()
            history.append(one_update(replay.sample(args.batch_size), std))
            updates += 1
            if updates == 1:  # it compiles
                begin += time.perf_counter() - pause

        # log
        stop = interrupt.asked or now >= last
        eval_due = now >= last or now % args.eval_freq < args.num_envs
        if not (stop or eval_due or now % args.log_freq < args.num_envs):
            continue
        metrics = mean_metrics(history)
        check_finite(agent, metrics, now, run)
        pause = time.perf_counter()
        progress |= dict(wall_time=time.time() - born, train_time=pause - begin)
        if history:  # the first row names the columns, so it waits for an update
            log_row(run, progress, metrics, episodes, env, args)
        history.clear()
        episodes.zero_()

        # evaluate
        if eval_due:
            results = evaluate_now(run, facts, progress, agent, eval_env, args)
            bar.set_postfix_str(f"return {results['eval/return']:.2f}")

        # save
        if eval_due or stop:
            save_run(run, facts, progress, parts)
        begin += time.perf_counter() - pause

    interrupt.restore()
    for part in (bar, env, eval_env):
        part.close()
    if interrupt.asked:
        sys.exit(f"interrupted at step {progress['global_step']}: continue with --resume {run}")
    return results | progress | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
