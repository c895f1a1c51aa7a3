"""DrQ-v2: control from pixels by DDPG with random shifts, n-step returns and scheduled exploration noise.

Paper: Yarats, Fergus, Lazaric and Pinto, "Mastering Visual Continuous Control: Improved Data-Augmented Reinforcement
Learning", arXiv 2107.09645. K and M: Kostrikov, Yarats and Fergus (DrQ), arXiv 2004.13649, eqs. 1 to 3.

    target   y = sum of g^i r_(t+i), i < n, + g^n min_k Q'_k(h(o_(t+n)), mu(h(o_(t+n))) + e), h with a shifted picture
    critic   sum over k = 1, 2 of E[(Q_k(h(o_t), a_t) - y)^2], through the encoder h too          (paper, eqs. 1, 2)
    actor    -E[min_k Q_k(h(o_t), mu(h(o_t)) + e)], nothing of it reaches h                       (paper, eq. 3)
    noise    e = clip(N(0, s^2), -c, c) while learning, N(0, s^2) while acting; s falls linearly  (paper, eq. 4)

Differences from the authors' code; with one environment (1) to (4) are all that changes the numbers:
 1. A true end of an episode stays one: its discount of 0 is kept (theirs turns it into 1).
 2. Steps within n of an episode's end are learnt from too, with the fewer rewards that are left.
 3. Transitions are drawn uniformly and as soon as they are complete; theirs by episode, from a quarter of the
    episodes at a time, and after an episode's end.
 4. Random shifts are integer crops by index. Theirs interpolates at whole pixels, which differs by 0.004 of 255.
 5. The buffer holds each frame once and stacks by index, on CPU or GPU; sampling and shifts are part of the update.
 6. Ours: several environments, K and M other than 1, a state beside the picture. On a CPU the sizes are smaller: TUNED.

Commands, from the repository's root:
    train          python algos/drqv2.py --env-id cartpole_swingup
    smallest run   python algos/drqv2.py --env-id dot_reach --device cpu
    evaluate       python algos/drqv2.py --evaluate --checkpoint runs/NAME/best.pt
    resume         python algos/drqv2.py --resume runs/NAME    (exactly, if the run was given --save-buffer)

Expected result: with a CPU's sizes, dot_reach from -22 (random; the best possible is -2) to -3.9 after 60,000
transitions, the mean of three seeds at -3.8, -4.4 and -3.4; cartpole_balance 952 after 100,000 of its steps (200,000
frames, two hours of half a core), one seed. Curves and commands: docs/algos/drqv2.md. Not yet measured on a GPU.

Shapes: N environments, F slots of the buffer, B batch, A action dimensions, S state dimensions (0 for most tasks),
H x W picture, C channels (3, x frame stack inside the networks), D features of the encoder, K and M shifted copies.
"""
# ruff: noqa: E402  (the lines down to the banner must run before the imports below it)

import importlib.util
import os
import sys
from pathlib import Path

VENV = Path(__file__).resolve().parent.parent / ".venv"
if __name__ == "__main__" and importlib.util.find_spec("envs") is None:
    # `make` installs the project in .venv; going on in there lets `python algos/drqv2.py` work as typed.
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
from torch.utils._pytree import tree_map
from tqdm import tqdm

START = time.time()  # `wall_time` counts from here
EVAL_SEED = 10_000
EPISODE = ("return", "success_at_end")  # what is logged of an episode that ended
CLOCK = ("global_step", "wall_time", "train_time")  # the first columns of metrics.csv and eval.csv
OPTIMIZERS = ("encoder_optimizer", "critic_optimizer", "actor_optimizer")

# --- Args -------------------------------------------------------------------------------------------------------------
MEDIUM = ("acrobot_swingup cartpole_swingup_sparse cheetah_run finger_turn_easy finger_turn_hard hopper_hop "
          "quadruped_run quadruped_walk reach_duplo reacher_easy reacher_hard walker_run")
# (patterns of env ids, kind of device) -> defaults other than those below, which are the published ones for an easy
# task; later rows win. A step is an agent step, as everywhere in this file: two frames, at an action repeat of 2.
TUNED = {
    (MEDIUM, ""): dict(total_timesteps=1_550_000, std_steps=500_000),  # 3.1 M frames
    ("humanoid_*", ""): dict(total_timesteps=15_050_000, std_steps=2_000_000, lr=8e-5, actor_lr=8e-5,  # 30.1 M
                             feature_dim=100),
    ("walker_*", ""): dict(n_step=1, batch_size=512),
    ("quadruped_run", ""): dict(buffer_size=100_000),
    # what follows is ours
    # a small critic learns slower at equal step size, and until it tells states apart the actor must not follow it
    ("*", "cpu"): dict(image_size=48, pad=2, encoder_channels=16, encoder_strides=(2, 1, 1), hidden=256, lr=1e-3,
                       batch_size=64, buffer_size=100_000, total_timesteps=100_000, std_steps=25_000,
                       eval_freq=10_000, eval_episodes=5, eval_envs=1, amp=False, compile=False, cudagraphs=False),
    ("dot_reach", ""): dict(num_envs=8, update_every=8, action_repeat=1, frame_stack=1, image_size=32, pad=2,
                            encoder_channels=16, encoder_strides=(2, 2, 1), hidden=256, batch_size=64, lr=1e-3,
                            actor_lr=1e-3, gamma=0.9, tau=0.02, std_steps=12_000, buffer_size=100_000,
                            total_timesteps=60_000, eval_freq=5_000, eval_episodes=64, eval_envs=64),
}


@dataclass
class Args:
    # run
    env_id: str = "dot_reach"  # task: dot_reach, SO101... (envs/so101.py) or a DeepMind Control id, domain_task
    seed: int = 1  # of weights, exploration, sampling and episodes
    name: str = ""  # folder under runs/; empty: made from task, seed and time
    total_timesteps: int = 550_000  # environment transitions (agent steps), over all environments
    eval_freq: int = 5_000  # transitions between evaluations; each also saves checkpoint.pt, and best.pt if it is
    eval_episodes: int = 10  # episodes of an evaluation, with the same seeds every time
    eval_envs: int = 5  # of them at once; divides eval_episodes
    log_freq: int = 1_000  # transitions between rows of metrics.csv; only there does the host wait for the device
    evaluate: bool = False  # only evaluate the weights of --checkpoint
    checkpoint: str | None = None  # file to take weights from; counters, optimisers and buffer start afresh
    resume: str | None = None  # run folder to continue, with its arguments, except those given again
    save_buffer: bool = False  # put the replay buffer in checkpoint.pt: larger, but then --resume continues exactly
    capture_video: bool = True  # write an mp4 of what the policy saw in evaluation, at every evaluation
    track: bool = False  # log to Weights & Biases too; its WANDB_* variables choose project, entity, offline mode

    # environment
    num_envs: int = 1  # parallel environments; more of them make the data between two updates older
    image_size: int = 84  # pixels a side
    action_repeat: int = 2  # frames for which an action is held; its rewards are added up (not SO101)
    frame_stack: int = 3  # latest pictures shown together
    camera: int | None = None  # the task's camera (DeepMind Control); None: the published one
    renderer: Literal["auto", "egl", "osmesa", "warp"] = "auto"  # who draws (DeepMind Control)
    fast_render: bool = False  # no shadows and no smoothing: a simpler picture, drawn faster (DeepMind Control)
    workers: int | None = None  # processes that simulate (DeepMind Control); None: one for each of several envs
    overlap: bool = False  # update while the environments step, on the data from before it (DeepMind Control)

    # algorithm
    buffer_size: int = 1_000_000  # frames kept, one a transition and one more at an episode's end, over all envs
    batch_size: int = 256  # transitions per update
    update_every: int = 2  # transitions between updates, over all environments
    learning_starts: int = 2_000  # transitions before the first update
    random_steps: int = 2_000  # first transitions, with uniformly random actions
    gamma: float = 0.99  # discount per agent step
    n_step: int = 3  # rewards summed before the bootstrap
    lr: float = 1e-4  # Adam step size of encoder and critic
    actor_lr: float = 1e-4  # Adam step size of the actor
    tau: float = 0.01  # share of the critic that moves into its target at every update
    std_start: float = 1.0  # standard deviation of the exploration noise at first
    std_end: float = 0.1  # and in the end
    std_steps: int = 100_000  # transitions over which it falls
    std_clip: float = 0.3  # noise of larger size is cut off in the losses
    pad: int = 4  # largest random shift, pixels each way
    target_augs: int = 1  # K: shifted copies of the next observation whose target values are averaged (DrQ: 2)
    online_augs: int = 1  # M: shifted copies of the observation whose losses are added (DrQ: 2)
    encoder_channels: int = 32  # filters of each convolution, 3 x 3 without padding
    encoder_strides: tuple[int, ...] = (2, 1, 1, 1)  # one convolution for each
    feature_dim: int = 50  # numbers that actor and critic each make of the picture
    hidden: int = 1024  # width of the two layers of actor and critics

    # compute
    device: str = "cuda" if torch.cuda.is_available() else "cpu"  # of networks and observations
    buffer_device: Literal["", "cpu", "cuda"] = ""  # where the frames are kept; empty: on the networks' device
    amp: bool = True  # compute the losses in bfloat16 where that is safe; weights and Adam stay in float32
    compile: bool = True  # compile the two losses, random shifts included, with torch.compile
    cudagraphs: bool = True  # replay each update, sampling included, as one CUDA graph; needs cuda

    def check(self):
        """Raises ValueError at the first choice that cannot work. (In __post_init__ the parser would reword it.)"""
        cuda, least, n = self.device.startswith("cuda"), self.n_step + 1, self.num_envs
        few = [name.replace("_", "-") for name, value in asdict(self).items() if type(value) in (int, tuple)
               and np.min(value, initial=1) < 1 and name not in ("seed", "camera", "workers", "pad", "random_steps")]
        for message, wrong in {
            "--resume continues a run, --checkpoint starts one: give only one": self.resume and self.checkpoint,
            "--evaluate needs --checkpoint FILE": self.evaluate and not self.checkpoint,
            f"--{', --'.join(few)} must be at least 1": few,
            "--eval-episodes must be a multiple of --eval-envs": self.eval_episodes % max(self.eval_envs, 1),
            "--image-size is too small for --encoder-strides": self.map_size < 1,
            "--pad must not be negative": self.pad < 0,
            "--learning-starts must be at least (--n-step + 1) x --num-envs": self.learning_starts < least * n,
            "--buffer-size must be at least (--n-step + --frame-stack + 2) x --num-envs and --learning-starts":
                self.buffer_size < max((least + self.frame_stack + 1) * n, self.learning_starts),
            "--overlap is for DeepMind Control's tasks":
                self.overlap and (self.env_id == "dot_reach" or self.env_id.startswith("SO101")),
            "--track needs Weights & Biases: pip install -e '.[track]'":
                self.track and importlib.util.find_spec("wandb") is None,
            "--device must be cpu or cuda": self.device.split(":")[0] not in ("cpu", "cuda"),
            "--cudagraphs needs --device cuda": self.cudagraphs and not cuda,
            "there is no CUDA device here: use --device cpu, and no --buffer-device cuda":
                (cuda or self.buffer_device == "cuda") and not torch.cuda.is_available(),
        }.items():
            if wrong:
                raise ValueError(message)

    @property
    def map_size(self) -> int:
        """Pixels a side of the last convolution's output."""
        size = self.image_size
        for stride in self.encoder_strides:
            size = (size - 3) // max(stride, 1) + 1
        return size


def tuned_defaults(env_id: str, device: str) -> dict:
    """The rows of TUNED that apply, merged."""
    rows = [row for (patterns, kind), row in TUNED.items()
            if any(fnmatch(env_id, pattern) for pattern in patterns.split()) and device.startswith(kind)]
    return {key: value for row in rows for key, value in row.items()}


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args. The defaults, and so --help, are those of the task, device or checkpoint given."""
    words = [word for word in (sys.argv[1:] if argv is None else argv) if word not in ("-h", "--help")]
    given = tyro.cli(Args, args=words, default=Args(env_id=""))  # a first look: which task, device and file
    source = Path(given.resume) / "checkpoint.pt" if given.resume else given.checkpoint
    saved = load_file(source)["args"] if source else {}
    env_id = given.env_id or saved.get("env_id", Args.env_id)
    for key in ("device", "evaluate", "checkpoint", "resume", *["name"] * bool(given.checkpoint)):  # of that run alone
        saved.pop(key, None)
    defaults = dict(env_id=env_id, device=given.device) | tuned_defaults(env_id, given.device) | saved
    defaults["cudagraphs"] = defaults.get("cudagraphs", True) and given.device.startswith("cuda")  # not a GPU's file's
    return tyro.cli(Args, args=argv, default=Args(**defaults), description=__doc__.split("\n\n")[0])


# --- make_envs --------------------------------------------------------------------------------------------------------
def make_envs(args: Args, device: torch.device) -> tuple:
    """-> training environment (None with --evaluate), evaluation environment.

    Anything with the contract in envs/__init__.py can stand here. It starts the next episode by itself and reports on
    the one that ended in info["final_obs"] and info["episode"]; info["discount"] is 1 where it is not given.
    """
    module, options = "dmc", dict(image_size=args.image_size, action_repeat=args.action_repeat, camera=args.camera,
                                  renderer=args.renderer, fast_render=args.fast_render, workers=args.workers)
    if args.env_id.startswith("SO101"):
        module, options = "so101", dict(render_size=args.image_size, samples_per_pixel=4)
    elif args.env_id == "dot_reach":
        module, options = "dot_reach", dict(image_size=args.image_size, action_repeat=args.action_repeat)
    try:
        make = importlib.import_module(f"envs.{module}").make
        return (None if args.evaluate else make(args.env_id, args.num_envs, device, seed=args.seed, **options),
                make(args.env_id, args.eval_envs, device, seed=EVAL_SEED, **options))
    except ModuleNotFoundError as error:
        raise ValueError(f'{args.env_id} needs {error.name}: run `pip install -e ".[{module}]"`') from error
    except (ImportError, RuntimeError) as error:  # the environments' own messages
        raise ValueError(error) from error


# --- Networks ---------------------------------------------------------------------------------------------------------
def random_shift(rgb: torch.Tensor, offsets: torch.Tensor, pad: int) -> torch.Tensor:
    """Crops of pictures whose edges are repeated `pad` pixels outwards: uint8 (B, H, W, C) -> (k B, H, W, C)

    offsets (k B, 2): integers from 0 to 2 pad, down and right; `pad` in both is the picture itself.  # differs (4)
    """
    (b, h, w, _), device = rgb.shape, rgb.device
    picture = torch.arange(len(offsets), device=device) % b
    y = (torch.arange(h, device=device) + offsets[:, :1] - pad).clamp(0, h - 1)  # (k B, H)
    x = (torch.arange(w, device=device) + offsets[:, 1:] - pad).clamp(0, w - 1)
    return rgb[picture[:, None, None], y[:, :, None], x[:, None, :]]


def init_orthogonal(module: nn.Module):
    """Orthogonal weights, gain sqrt 2 for convolutions (ReLUs follow) and 1 for linear layers; zero biases."""
    for layer in module.modules():
        if isinstance(layer, nn.Conv2d | nn.Linear):
            nn.init.orthogonal_(layer.weight, math.sqrt(2) if isinstance(layer, nn.Conv2d) else 1.0)
            nn.init.zeros_(layer.bias)


class Encoder(nn.Module):
    """uint8 (B, H, W, C) -> (B, D). Shared by actor and critic, trained by the critic alone, without a target."""

    def __init__(self, channels: int, args: Args):
        super().__init__()
        layers, width = [], args.encoder_channels
        for stride in args.encoder_strides:
            layers += [nn.Conv2d(channels, width, 3, stride), nn.ReLU()]
            channels = width
        self.convs = nn.Sequential(*layers)
        init_orthogonal(self)

    def forward(self, rgb):
        x = rgb.permute(0, 3, 1, 2).float().div_(255).sub_(0.5)  # channels last, as a view
        return self.convs(x).permute(0, 2, 3, 1).flatten(1)  # again a view; the order of features is arbitrary


class Trunk(nn.Module):
    """features (B, D), state (B, S) -> (B, 50 + S). Actor, critic and target have one each."""

    def __init__(self, args: Args):
        super().__init__()
        inputs = args.map_size**2 * args.encoder_channels
        self.layers = nn.Sequential(nn.Linear(inputs, args.feature_dim), nn.LayerNorm(args.feature_dim), nn.Tanh())

    def forward(self, features, state):
        return torch.cat([self.layers(features), state], -1)


def mlp(inputs: int, hidden: int, outputs: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, hidden), nn.ReLU(inplace=True), nn.Linear(hidden, hidden),
                         nn.ReLU(inplace=True), nn.Linear(hidden, outputs))


class Actor(nn.Module):
    """features (B, D), state (B, S) -> mean action (B, A) in [-1, 1]; the noise around it follows a schedule."""

    def __init__(self, state_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.trunk, self.policy = Trunk(args), mlp(args.feature_dim + state_dim, args.hidden, action_dim)
        init_orthogonal(self)

    def forward(self, features, state):
        return torch.tanh(self.policy(self.trunk(features, state)).float())


class Critic(nn.Module):
    """features (B, D), state (B, S), actions (B, A) -> both values (2, B): one trunk, two heads."""

    def __init__(self, state_dim: int, action_dim: int, args: Args):
        super().__init__()
        self.trunk, inputs = Trunk(args), args.feature_dim + state_dim + action_dim
        self.q1, self.q2 = mlp(inputs, args.hidden, 1), mlp(inputs, args.hidden, 1)
        init_orthogonal(self)

    def forward(self, features, state, actions):
        x = torch.cat([self.trunk(features, state), actions], -1)
        return torch.stack([self.q1(x).squeeze(-1), self.q2(x).squeeze(-1)]).float()


def policy_networks(args: Args, shapes: dict) -> tuple[Encoder, Actor]:
    """All that acting needs. `shapes` has the environment's channels, state and action dimensions."""
    return Encoder(shapes["channels"] * args.frame_stack, args), Actor(shapes["state"], shapes["action"], args)


class Agent(nn.Module):
    """All that learns: encoder, actor, critic and its target, with three optimisers."""

    def __init__(self, args: Args, shapes: dict, device: torch.device):
        super().__init__()
        self.encoder, self.actor = policy_networks(args, shapes)
        self.critic = Critic(shapes["state"], shapes["action"], args)
        self.target = copy.deepcopy(self.critic).requires_grad_(False)
        self.to(device)
        self.encoder.to(memory_format=torch.channels_last)
        adam = dict(fused=True, capturable=device.type == "cuda")  # capturable: the step count is on the device
        self.encoder_optimizer = torch.optim.Adam(self.encoder.parameters(), args.lr, **adam)
        self.critic_optimizer = torch.optim.Adam(self.critic.parameters(), args.lr, **adam)
        self.actor_optimizer = torch.optim.Adam(self.actor.parameters(), args.actor_lr, **adam)


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
def noise_std(args: Args, global_step: int) -> float:
    """Standard deviation of the exploration noise, falling linearly with the agent's steps. Paper, eq. 4"""
    share = min(global_step / args.std_steps, 1.0)
    return args.std_start + (args.std_end - args.std_start) * share


def draw_noise(args: Args, batch_size: int, action_dim: int, generator: torch.Generator) -> dict:
    """All chance of one update but the batch: offsets of shifts (M B, 2), (K B, 2), and noise (K B, A), (B, A)."""
    on, k, m = dict(generator=generator, device=generator.device), args.target_augs, args.online_augs
    return dict(shift=torch.randint(0, 2 * args.pad + 1, (m * batch_size, 2), **on),
                next_shift=torch.randint(0, 2 * args.pad + 1, (k * batch_size, 2), **on),
                next_action=torch.randn((k * batch_size, action_dim), **on),
                action=torch.randn((batch_size, action_dim), **on))


def noisy_actions(mean, std, noise, clip: float | None = None):
    """mean + std x noise, the noise cut off at +-clip, the sum at +-1 without losing its gradient; (B, A)."""
    noise = std * noise
    actions = mean + (noise if clip is None else noise.clamp(-clip, clip))
    return actions + (actions.clamp(-1 + 1e-6, 1 - 1e-6) - actions).detach()


def critic_loss(agent: Agent, batch: dict, noise: dict, std, args: Args):
    """Loss of critic and encoder, eqs. 1 and 2. -> loss, features (B, D) of the first shifted copy, metrics"""
    obs, next_obs, k, m = batch["obs"], batch["next_obs"], args.target_augs, args.online_augs
    with torch.autocast(std.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        with torch.no_grad():
            next_features = agent.encoder(random_shift(next_obs["rgb"], noise["next_shift"], args.pad))
            next_state = next_obs["state"].repeat(k, 1)
            mean = agent.actor(next_features, next_state)
            next_actions = noisy_actions(mean, std, noise["next_action"], args.std_clip)
            next_q = agent.target(next_features, next_state, next_actions).amin(0)  # (K B,)
            targets = batch["rewards"] + batch["discounts"] * next_q.view(k, -1).mean(0)  # DrQ, eq. 1
        features = agent.encoder(random_shift(obs["rgb"], noise["shift"], args.pad))
        q = agent.critic(features, obs["state"].repeat(m, 1), batch["actions"].repeat(m, 1)).view(2, m, -1)
        loss = (q - targets).square().mean(-1).sum()  # mean over B, sum over heads and copies
    metrics = {"loss/qf": loss, "train/q": q.mean(), "train/target": targets.mean(),
               "train/batch_reward": batch["rewards"].mean()}
    return loss, features[: len(targets)].detach(), {name: v.detach() for name, v in metrics.items()}


def actor_loss(agent: Agent, batch: dict, features, noise: dict, std, args: Args):
    """Eq. 3, on features (B, D) without their gradient. -> loss, metrics"""
    state = batch["obs"]["state"]
    with torch.autocast(std.device.type, torch.bfloat16, enabled=args.amp, cache_enabled=False):
        mean = agent.actor(features, state)
        actions = noisy_actions(mean, std, noise["action"], args.std_clip)
        loss = -agent.critic(features, state, actions).amin(0).mean()
    return loss, {"loss/actor": loss.detach(), "train/saturation": mean.detach().abs().mean()}


def descend(loss, *optimizers):
    """One step of each optimiser."""
    for optimizer in optimizers:
        optimizer.zero_grad(set_to_none=True)
    loss.backward()
    for optimizer in optimizers:
        optimizer.step()


@torch.no_grad()
def target_update(agent: Agent, tau: float):
    """Polyak: target <- (1 - tau) target + tau critic, its trunk included; the encoder has no target."""
    torch._foreach_lerp_(list(agent.target.parameters()), list(agent.critic.parameters()), tau)


def update(agent: Agent, batch: dict, noise: dict, std, args: Args, losses=(critic_loss, actor_loss)) -> dict:
    """One step of everything: critic and encoder, then the actor on the features from before it, then the target."""
    loss, features, metrics = losses[0](agent, batch, noise, std, args)
    descend(loss, agent.encoder_optimizer, agent.critic_optimizer)
    agent.critic.requires_grad_(False)  # spares the critic's own gradients, which nobody would use
    loss, more = losses[1](agent, batch, features, noise, std, args)
    agent.critic.requires_grad_(True)
    descend(loss, agent.actor_optimizer)
    target_update(agent, args.tau)
    return metrics | more


class Learner:
    """Runs updates by one of three routes to the same numbers: plain, compiled losses, one CUDA graph.

    `generator` draws noise and shifts, `sampler`, on the buffer's device, the batches. A buffer on the other device
    hands its batches over through `inbox`, tensors that stay in place for the graph.
    """

    def __init__(self, agent: Agent, replay: Replay, args: Args, generator: torch.Generator, sampler: torch.Generator):
        self.agent, self.replay, self.args, self.generator, self.sampler = agent, replay, args, generator, sampler
        self.losses = [torch.compile(f) if args.compile else f for f in (critic_loss, actor_loss)]
        self.std = torch.zeros((), device=generator.device)
        self.owed, self.count, self.done = 0, 0, 0  # transitions without update; updates since `read`, in all
        self.totals = defaultdict(lambda: torch.zeros((), device=generator.device))  # sums of metrics since `read`
        self.graph, self.inbox, self.setup_seconds = None, None, 0.0
        self.remote = sampler.device != generator.device

    def sample(self) -> dict:
        """A batch on the networks' device; from a buffer elsewhere it comes through `inbox`."""
        batch = self.replay.sample(self.args.batch_size, self.sampler)
        if not self.remote:
            return batch
        self.inbox = self.inbox or tree_map(lambda v: v.to(self.generator.device), batch)
        tree_map(lambda there, v: there.copy_(v.pin_memory(), non_blocking=True), self.inbox, batch)
        return self.inbox

    def step(self):
        """One update, with its sampling unless the buffer is elsewhere. Adds its metrics to `totals`."""
        batch = self.inbox if self.remote else self.sample()
        noise = draw_noise(self.args, *batch["actions"].shape, self.generator)
        for name, value in update(self.agent, batch, noise, self.std, self.args, self.losses).items():
            self.totals[name] += value

    def capture(self) -> torch.cuda.CUDAGraph:
        """Record one update as a CUDA graph, without running it; every replay draws new numbers."""
        graph = torch.cuda.CUDAGraph()
        for generator in [self.generator, *[self.sampler] * (not self.remote)]:
            graph.register_generator_state(generator)
        with torch.cuda.graph(graph):
            self.step()
        return graph

    def run(self, transitions: int, std: float):
        """The updates owed for `transitions` more of them. Once set up, nothing waits for the device."""
        self.owed += transitions
        self.std.fill_(std)
        while self.owed >= self.args.update_every:
            self.owed -= self.args.update_every
            self.count, self.done = self.count + 1, self.done + 1
            begin = time.perf_counter()
            if self.remote:
                self.sample()
            if not self.args.cudagraphs:
                self.step()
            elif self.done <= 3:  # a warm-up must not run on the stream that others wait for
                stream = torch.cuda.Stream()
                stream.wait_stream(torch.cuda.current_stream())
                with torch.cuda.stream(stream):
                    self.step()
                torch.cuda.current_stream().wait_stream(stream)
            else:
                self.graph = self.graph or self.capture()
                self.graph.replay()
            if self.done == 1 or self.args.cudagraphs and self.done <= 4:  # compiling and capturing
                self.setup_seconds += time.perf_counter() - begin

    def read(self) -> dict[str, float]:
        """Mean metrics since the last reading; waits for the device. Empty before the first update."""
        if not self.count:
            return {}
        values = (torch.stack(list(self.totals.values())) / self.count).tolist()
        self.count = 0
        torch._foreach_zero_(list(self.totals.values()))
        return dict(zip(self.totals, values, strict=True))


# --- evaluate ---------------------------------------------------------------------------------------------------------
def evaluate(policy, env, args: Args, video: Path | None = None) -> dict:
    """Whole episodes, mean actions, fixed seeds. -> metrics; ci_low and ci_high: mean +- 1.96 standard errors

    The video shows up to four worlds side by side as the policy sees them, enlarged.
    """
    frames, scores, n = [], [], args.eval_episodes
    for seed in range(EVAL_SEED, EVAL_SEED + n // env.num_envs):
        obs, running = env.reset(seed=seed), torch.ones(env.num_envs, dtype=torch.bool, device=env.device)
        policy.reset()
        score = torch.zeros((len(EPISODE), env.num_envs), device=env.device)
        for _ in range(env.max_episode_steps):
            if video and seed == EVAL_SEED:
                seen = torch.cat(list(obs["rgb"][:4, ..., :3]), 1).cpu().numpy()
                frames.append(seen.repeat(scale := -(-168 // len(seen)), 0).repeat(scale, 1))
            obs, _, terminations, truncations, info = env.step(policy.act(obs))
            ended = (terminations | truncations) & running  # each world counts once
            score = torch.where(ended, torch.stack([info["episode"][k].float() for k in EPISODE]), score)
            running &= ~ended
        scores.append(score)
    if video:
        video.parent.mkdir(parents=True, exist_ok=True)
        imageio.mimwrite(video, frames, fps=max(1, round(env.control_hz)), macro_block_size=1)
    returns, success = torch.cat(scores, -1).cpu().double()
    mean, std = float(returns.mean()), float(returns.std()) if n > 1 else 0.0
    half = 1.96 * std / math.sqrt(n)
    results = {"eval/return": mean, "eval/return_std": std, "eval/ci_low": mean - half, "eval/ci_high": mean + half}
    return results | ({"eval/success_rate": float(success.mean())} if getattr(env, "has_success", True) else {})


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
    if not isinstance(checkpoint, dict) or checkpoint.get("algo") != "drqv2":
        raise ValueError(f"{path} is not a checkpoint of drqv2")
    return checkpoint


def check_fits(checkpoint: dict, args: Args, shapes: dict):
    """Raises ValueError naming the first field in which the checkpoint differs from this run."""
    theirs, mine = checkpoint["args"] | checkpoint["shapes"], asdict(args) | shapes
    # to continue a run, what its environments, random states and buffer are bound to
    bound = ["num_envs", "device", "buffer_device", *["buffer_size"] * bool(checkpoint.get("replay"))]
    for field in ("env_id", "image_size", "frame_stack", "action_repeat", "encoder_channels", "encoder_strides",
                  "feature_dim", "hidden", *shapes, *bound * bool(args.resume)):
        if theirs[field] != mine[field]:
            raise ValueError(f"the checkpoint differs in {field}: it has {theirs[field]}, this run {mine[field]}")


# --- Policy -----------------------------------------------------------------------------------------------------------
class Policy(nn.Module):
    """Observation in, action out, from one checkpoint (file or its content) and no simulator.

    `spec` describes the robot: what the environment says of its actions, cameras, rates and state.
    """

    def __init__(self, source: str | Path | dict, device: str | torch.device = "cpu"):
        super().__init__()
        checkpoint = source if isinstance(source, dict) else load_file(source)
        self.args, self.spec = Args(**checkpoint["args"]), checkpoint["spec"]
        with torch.device("meta"):  # shapes only: no random number is drawn
            self.encoder, self.actor = policy_networks(self.args, checkpoint["shapes"])
        weights = {k: v for k, v in checkpoint["agent"].items() if k.startswith(("encoder.", "actor."))}
        self.load_state_dict(weights, assign=True)
        self.device, self.stack = torch.device(device), None
        self.to(self.device)

    def reset(self):
        """Forget the earlier pictures; call at the start of every episode."""
        self.stack = None

    def preprocess(self, frame: np.ndarray) -> torch.Tensor:
        """A camera's picture, uint8 (H, W, 3) of any size -> its middle square, area mean: uint8 (1, h, h, 3)."""
        side, size = min(frame.shape[:2]), (self.args.image_size,) * 2
        top, left = (frame.shape[0] - side) // 2, (frame.shape[1] - side) // 2
        square = torch.from_numpy(frame[None, top:top + side, left:left + side].copy()).to(self.device)
        small = F.interpolate(square.permute(0, 3, 1, 2).float(), size=size, mode="area")
        return small.round().to(torch.uint8).permute(0, 2, 3, 1)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """obs "rgb" uint8 (N, H, W, C), the newest frame alone, and "state" (N, S) -> mean actions (N, A)."""
        rgb = torch.as_tensor(obs["rgb"], device=self.device).clone()
        past = self.stack[1:] if self.stack else [rgb] * (self.args.frame_stack - 1)
        self.stack = [*past, rgb]
        state = torch.as_tensor(obs["state"], dtype=torch.float32, device=self.device)
        return self.actor(self.encoder(torch.cat(self.stack, -1)), state)


# --- train ------------------------------------------------------------------------------------------------------------
def check_finite(agent: Agent, metrics: dict, global_step: int, checkpoint: Path):
    """Raises FloatingPointError that names the first tensor or metric that is not finite."""
    values = agent.state_dict() | {k: torch.tensor(v) for k, v in metrics.items()}
    finite = torch.stack([value.isfinite().all().cpu() for value in values.values()]).tolist()
    if not all(finite):
        good = checkpoint if checkpoint.exists() else "none yet"
        name = list(values)[finite.index(False)]
        raise FloatingPointError(f"{name} is not finite at step {global_step}; last good checkpoint: {good}")


def write_row(path: Path, row: dict, track: bool, video: Path | None = None):
    """Append to a CSV file, whose first row names the columns; with `track` it goes to Weights & Biases too."""
    rows = [row.values()] if path.exists() else [row.keys(), row.values()]
    with path.open("a", newline="") as file:
        csv.writer(file).writerows(rows)
    if track:
        import wandb
        wandb.log(row | ({"eval/video": wandb.Video(str(video))} if video else {}), step=row["global_step"])


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
    name = args.name or time.strftime(f"{args.env_id}__drqv2__s{args.seed}__%Y%m%d-%H%M%S")
    run = Path(args.resume or Path("runs") / name)
    if not args.resume and (run / "args.json").exists():
        raise ValueError(f"{run} exists: continue it with --resume {run}, or choose another --name")
    source = run / "checkpoint.pt" if args.resume else args.checkpoint
    checkpoint = load_file(source) if source else None

    env, eval_env = make_envs(args, device)
    shapes = dict(channels=eval_env.image_shape[2], state=eval_env.state_dim, action=eval_env.action_dim)
    agent = Agent(args, shapes, device)
    now = dict(global_step=0, best=-math.inf, wall_time=0.0, train_time=0.0, owed=0)
    if checkpoint:
        check_fits(checkpoint, args, shapes)
        agent.load_state_dict(checkpoint["agent"])
        now |= checkpoint["now"] if args.resume else {}
    for use in OPTIMIZERS if args.resume else ():
        getattr(agent, use).load_state_dict(checkpoint[use])
    tuned = tuned_defaults(args.env_id, device.type) or "as published for easy tasks"
    print(f"{run}: {args.env_id}; defaults for {device.type}: {tuned}")

    def weights() -> dict:  # all that Policy and --checkpoint need
        # the renderer by its name: elsewhere "auto" might be another one, which draws other pictures
        return dict(algo="drqv2", args=asdict(args) | dict(renderer=eval_env.spec.get("renderer", args.renderer)),
                    shapes=shapes, spec=json.loads(json.dumps(eval_env.spec)), agent=agent.state_dict(),
                    versions=dict(torch=str(torch.__version__), numpy=np.__version__), now=dict(now))

    def evaluate_now(label: str) -> dict:
        return evaluate(Policy(weights(), device), eval_env, args,
                        run / f"videos/{label}.mp4" if args.capture_video else None)

    if args.evaluate:
        results = evaluate_now("evaluate")
        print(json.dumps(results))
        eval_env.close()
        return results | {"run": str(run)}

    buffer_device = torch.device(args.buffer_device or device)
    # every use of chance has a generator of its own: an evaluation does not disturb the others
    random = {use: torch.Generator(buffer_device if use == "sample" else device).manual_seed(1_000_003 * args.seed + i)
              for i, use in enumerate(("act", "learn", "sample"))}
    obs = env.reset(seed=args.seed)
    if args.resume:
        env.load_state_dict(pickle.loads(checkpoint["env"]))
        obs = {k: v.to(device) for k, v in checkpoint["obs"].items()}
        for use, generator in random.items():
            generator.set_state(checkpoint["random"][use])
    replay = Replay(obs, shapes["action"], args.buffer_size // args.num_envs, args.frame_stack, args.n_step,
                    args.gamma, buffer_device)
    if args.resume and checkpoint["replay"]:
        replay.load_state_dict(checkpoint["replay"])
    elif args.resume:
        print("no replay buffer was saved (--save-buffer), it starts empty")
    learner = Learner(agent, replay, args, random["learn"], random["sample"])
    learner.owed = now["owed"]
    if args.track:
        import wandb
        wandb.init(project=os.environ.get("WANDB_PROJECT", "cleanrobot"), name=run.name, config=asdict(args))
    run.mkdir(parents=True, exist_ok=True)  # not before all fits: a refused command changes nothing on the disk
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    for name in ("metrics.csv", "eval.csv") if args.resume else ():
        forget_after(run / name, now["global_step"])
    episodes, results = torch.zeros(1 + len(EPISODE), device=device), {}  # since the last log: ended, sums of EPISODE
    filled = now["global_step"] if args.resume and checkpoint["replay"] else 0  # transitions in the buffer
    random_until = 0 if args.checkpoint else args.random_steps
    first, born, begin = dict(now), START - now["wall_time"], time.perf_counter() - now["train_time"]
    bar = tqdm(total=args.total_timesteps, initial=now["global_step"], unit="step", mininterval=1)

    while now["global_step"] < args.total_timesteps:
        # act
        std, shape = noise_std(args, now["global_step"]), (args.num_envs, shapes["action"])
        if now["global_step"] < random_until:
            actions = torch.rand(shape, generator=random["act"], device=device) * 2 - 1
        else:
            with torch.no_grad():
                present = {k: v.to(device) for k, v in replay.present().items()}
                mean = agent.actor(agent.encoder(present["rgb"]), present["state"])
                actions = noisy_actions(mean, std, torch.randn(shape, generator=random["act"], device=device))

        # step, and with --overlap update meanwhile
        meanwhile = args.overlap and filled >= args.learning_starts
        if meanwhile:
            env.step_begin(actions)
            learner.run(args.num_envs, std)
        obs, rewards, terminations, truncations, info = env.step_end() if meanwhile else env.step(actions)

        # store
        dones = terminations | truncations
        discounts = info.get("discount", torch.ones_like(rewards)) * ~terminations  # differs (1)
        replay.add(actions, rewards, discounts, dones, info["final_obs"], obs)
        episodes += torch.where(dones, torch.stack([dones, *(info["episode"][k] for k in EPISODE)]), 0.0).sum(-1)
        before, now["global_step"] = now["global_step"], now["global_step"] + args.num_envs
        filled += args.num_envs
        bar.update(args.num_envs)

        # update
        if filled >= args.learning_starts and not meanwhile:
            learner.run(args.num_envs, std)

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
        metrics |= {"train/episodes": count, "train/std": std, "train/nan_resets": int(env.nan_resets),
                    "time/frames": frames, "time/sps": speed}
        clock = {k: now[k] for k in CLOCK}
        if count:
            bar.set_postfix_str(f"return {metrics['train/return']:.2f}")
        if "loss/qf" in metrics:  # the first row names the columns, so it waits for an update
            write_row(run / "metrics.csv", clock | metrics, args.track)

        if not eval_due:
            continue

        # evaluate
        pause, label = time.perf_counter(), f"step_{now['global_step']:09d}"
        results = evaluate_now(label)
        write_row(run / "eval.csv", clock | results, args.track, args.capture_video and run / f"videos/{label}.mp4")
        bar.write(f"{now['global_step']} steps: " + ", ".join(f"{k[5:]} {v:.3f}" for k, v in results.items()))
        now["best"] = max(now["best"], results["eval/return"])
        if results["eval/return"] == now["best"]:
            save(run / "best.pt", weights())

        # save
        save(run / "checkpoint.pt", weights() | {use: getattr(agent, use).state_dict() for use in OPTIMIZERS} | dict(
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
