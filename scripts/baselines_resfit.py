"""Four other ways to improve a cloned policy, or to learn beside it, to compare with algos/resfit.py.

    python scripts/baselines_resfit.py --algo filtered-bc --base runs/base/best.pt --demos reach.hdf5
    python scripts/baselines_resfit.py --algo ppo-residual --base runs/base/base.pt2
    python scripts/baselines_resfit.py --algo rlpd --demos reach.hdf5
    python scripts/baselines_resfit.py --algo ibrl --demos reach.hdf5 --base runs/base/base.pt2

filtered-bc goes on cloning a policy of algos/bc_chunk.py: half of each batch from the demonstrations, half from the
policy's own episodes that ended in success. ppo-residual freezes any base.pt2 and learns a correction of at most
--limit with Stable-Baselines3's PPO, which sees the observation and the base's next action; a time-out ends an episode
as a failure does, as in resfit. The reward is 1 at success. Evaluation is bc_chunk's: fixed seeds, no exploration.

rlpd (Ball et al., arXiv 2302.02948) is algos/resfit.py on a base that rests, with a residual of any size and no guard:
half of each batch is demonstrations. ibrl (Hu et al., arXiv 2311.02198) has an actor of its own beside the frozen base:
the better one by a pair of target critics acts, and is bootstrapped from; demonstrations lie in one buffer with the
rest. Both begin with an actor at 0 and take the arguments of algos/resfit.py, --resume and --evaluate with them.

Output: runs/<name>/eval.csv, with the columns that algos/ write; `global_step` counts environment transitions. All
run on a CPU.
"""

import argparse
import importlib.util
import json
import math
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from types import SimpleNamespace
from typing import Literal
from unittest.mock import patch

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import bc_chunk as bc  # noqa: E402  (a file to run, not a package: the line above lets this script import it)
import resfit as rf  # noqa: E402

START = time.time()
INSTALL = 'stable-baselines3 is missing: run `pip install -e ".[baselines]"`'
JOIN = 800  # filtered-bc: transitions after which new successes join the data
LIKE = "--recipe published --limit 1 --noise 0.1 --critic-warmup 0 --tau 0.01 --actor-lr 1e-4"
WARMUP_NOISE = {"rlpd": "1", "ibrl": "0"}  # before learning: random actions, the base


@dataclass
class Args:
    algo: Literal["filtered-bc", "ppo-residual"] = "filtered-bc"
    """which of the two; rlpd and ibrl have the arguments of algos/resfit.py"""
    base: str = ""
    """policy to begin with: best.pt of algos/bc_chunk.py for filtered-bc, any base.pt2 for ppo-residual"""
    demos: str = ""
    """filtered-bc: the demonstrations from which the base was cloned"""
    seed: int = 1
    """of weights, exploration, minibatches and episodes"""
    name: str = ""
    """folder under runs/; empty: made from task, algorithm, seed and time"""
    total_timesteps: int = 44_800
    """environment transitions"""
    num_envs: int = 16
    """parallel environments"""
    eval_freq: int = 3_200
    """transitions between evaluations"""
    eval_episodes: int = 64
    """episodes of an evaluation, with the same seeds every time"""
    eval_envs: int = 64
    """of them at once; divides eval_episodes"""
    utd: float = 0.3
    """filtered-bc: updates per transition"""
    limit: float = 0.3
    """ppo-residual: largest correction, in units of actions"""
    noise: float = 0.04
    """ppo-residual: standard deviation of exploration at first, in units of actions"""
    gamma: float = 0.99
    """ppo-residual: discount per step"""
    rollout: int = 2_048
    """ppo-residual: transitions between updates"""
    lr: float = 3e-4
    """ppo-residual: learning rate"""


class Queue:
    """Executes chunks in environments whose episodes end at different times; as a policy, it has no correction.

    `predict`: obs of the environment -> actions (N, K, A), of which `execute` are executed. It is asked about all
    environments when any needs a chunk.
    """

    def __init__(self, predict: Callable, execute: int):
        self.predict, self.execute = predict, execute
        self.reset()

    def reset(self, ended: torch.Tensor | None = None):
        """Episodes begin in a mask (N,), or everywhere: the rest of their chunks is forgotten."""
        if ended is None:
            self.chunks = None
        else:
            self.age = torch.where(ended, self.execute, self.age)

    @torch.no_grad()
    def act(self, obs: dict) -> torch.Tensor:
        """-> the next action of every environment's chunk, (N, A)."""
        if self.chunks is None:
            self.chunks = self.predict(obs)
            self.age = torch.zeros(len(self.chunks), dtype=torch.int64)
        due = self.age >= self.execute
        if due.any():
            self.chunks = torch.where(due[:, None, None], self.predict(obs), self.chunks)
            self.age = torch.where(due, 0, self.age)
        self.age = self.age + 1
        return self.chunks[torch.arange(len(due)), self.age - 1]


# --- filtered BC ----------------------------------------------------------------------------------
class Successes:
    """Steps of all environments, of which the episodes that end in success are kept as demonstrations."""

    def __init__(self, num_envs: int):
        self.running = [[] for _ in range(num_envs)]
        self.episodes = []

    def add(
        self,
        seen: dict,
        actions: torch.Tensor,
        final: dict,
        success: torch.Tensor,
        ended: torch.Tensor,
    ):
        """One step of every environment; `final`: the true next observation."""
        for i, steps in enumerate(self.running):
            steps.append(
                {key: x[i].numpy() for key, x in seen.items()} | {"actions": actions[i].numpy()}
            )
            if not ended[i]:
                continue
            if success[i]:
                episode = {key: np.stack([step[key] for step in steps]) for key in steps[0]}
                for key, x in final.items():
                    episode[key] = np.concatenate([episode[key], x[i : i + 1].numpy()])
                self.episodes.append(episode)
            steps.clear()


def filtered_bc(args: Args, policy: bc.Policy, env, demos: list[dict], evaluate: Callable):
    """Clone from demonstrations and own successes, `--utd` updates per transition."""
    net, like, pixels = policy.net, policy.args, policy.args.obs == "pixels"
    optimizer = torch.optim.AdamW(net.parameters(), like.lr)
    sources, successes, owed = [bc.Chunks(demos, like)], Successes(env.num_envs), 0.0
    queue = Queue(lambda obs: net(**bc.observe(obs, pixels)), like.execute)
    obs = env.reset(seed=args.seed)
    evaluate(policy, 0)
    for step in range(env.num_envs, args.total_timesteps + env.num_envs, env.num_envs):
        # act, step and store
        actions = queue.act(obs)
        following, _, terminations, truncations, info = env.step(actions)
        ended = terminations | truncations
        final = bc.observe(info["final_obs"], pixels)
        successes.add(bc.observe(obs, pixels), actions, final, info["success"], ended)
        queue.reset(ended)
        obs = following
        if successes.episodes and step % JOIN < env.num_envs:
            sources = [sources[0], bc.Chunks(successes.episodes, like)]

        # update
        owed += args.utd * env.num_envs
        while owed >= 1:
            owed -= 1
            parts = [source.sample(like.batch_size // len(sources)) for source in sources]
            bc.update(
                net, optimizer, {key: torch.cat([part[key] for part in parts]) for key in parts[0]}
            )
        net.eval()
        if step % args.eval_freq < env.num_envs or step >= args.total_timesteps:
            evaluate(policy, step)


# --- PPO on a residual ----------------------------------------------------------------------------
def read_base(path: str) -> tuple[Callable, dict]:
    """A base.pt2 -> obs of the environment to actions (N, K, A); what base.json in it says."""
    if not Path(path).is_file():
        raise FileNotFoundError(f"there is no base {path}")
    files = {"base.json": ""}
    program = torch.export.load(path, extra_files=files).module()
    about = json.loads(files["base.json"])

    def predict(obs: dict) -> torch.Tensor:
        return program(*bc.observe(obs, about["obs"] == "pixels").values())

    return predict, about


def make_residual(env, queue: Queue, pixels: bool, limit: float, seed: int):
    """The environment as one of the library's vectorised ones, whose action is a share of `limit` on the base's."""
    from gymnasium import spaces
    from stable_baselines3.common.vec_env import VecEnv

    def box(x) -> spaces.Box:
        if x.dtype == torch.uint8:
            return spaces.Box(0, 255, x.shape[1:], np.uint8)
        return spaces.Box(-np.inf, np.inf, x.shape[1:])

    class Residual(VecEnv):
        def __init__(self):
            first = view(env.reset(seed=seed), queue, pixels)
            boxes = {key: box(x) for key, x in first.items()}
            super().__init__(
                env.num_envs, spaces.Dict(boxes), spaces.Box(-1.0, 1.0, (env.action_dim,))
            )

        def reset(self):
            queue.reset()
            return self.see(env.reset(seed=seed))

        def see(self, obs):
            seen = view(obs, queue, pixels)
            self.base = seen["base"]
            return {key: x.numpy() for key, x in seen.items()}

        def step_async(self, actions):
            self.actions = corrected(self.base, actions, limit)

        def step_wait(self):
            obs, _, terminations, truncations, info = env.step(self.actions)
            ended = terminations | truncations
            queue.reset(ended)
            infos = [{} for _ in range(env.num_envs)]  # nothing says "time-out": all ends are ends
            return self.see(obs), info["success"].float().numpy(), ended.numpy(), infos

        def close(self):
            env.close()

        def seed(self, seed=None):  # the environment is reset with one
            return [None] * self.num_envs

        def get_attr(self, attr_name, indices=None):
            return [None] * self.num_envs

        def set_attr(self, attr_name, value, indices=None):
            raise NotImplementedError("one of these environments has no attributes of its own")

        def env_method(self, method_name, *args, indices=None, **kwargs):
            raise NotImplementedError("one of these environments has no methods of its own")

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

    return Residual()


def view(obs: dict, queue: Queue, pixels: bool) -> dict:
    """What PPO sees: the policy's observation, and the base's next action, which leaves the queue."""
    return bc.observe(obs, pixels) | {"base": queue.act(obs)}


def corrected(base: torch.Tensor, residual: np.ndarray, limit: float) -> torch.Tensor:
    """Base action (N, A) and a residual in [-1, 1] -> the executed action."""
    return (base + limit * torch.as_tensor(residual).clamp(-1, 1)).clamp(-1, 1)


class Acting:
    """Base and mean residual, as a policy."""

    def __init__(self, model, norm, queue: Queue, pixels: bool, limit: float):
        self.model, self.norm, self.queue = model, norm, queue
        self.pixels, self.limit = pixels, limit

    def reset(self):
        self.queue.reset()

    def act(self, obs: dict) -> torch.Tensor:
        seen = view(obs, self.queue, self.pixels)
        normal = self.norm.normalize_obs({key: x.numpy() for key, x in seen.items()})
        residual, _ = self.model.predict(normal, deterministic=True)
        return corrected(seen["base"], residual, self.limit)


def ppo_residual(args: Args, env, predict: Callable, about: dict, evaluate: Callable):
    """The library's PPO; calls evaluate(policy, step) at first, every --eval-freq transitions and at the end."""
    import stable_baselines3 as sb3
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecNormalize

    pixels = about["obs"] == "pixels"
    worker = make_residual(env, Queue(predict, about["execute"]), pixels, args.limit, args.seed)
    norm = VecNormalize(worker, norm_obs_keys=["state"], norm_reward=False)
    model = sb3.PPO(
        "MultiInputPolicy",
        norm,
        learning_rate=args.lr,
        n_steps=args.rollout // args.num_envs,
        batch_size=min(256, args.rollout),
        n_epochs=10,
        gamma=args.gamma,
        policy_kwargs=dict(log_std_init=math.log(args.noise / args.limit), net_arch=[128, 128]),
        seed=args.seed,
        device="cpu",
    )
    torch.nn.init.zeros_(model.policy.action_net.weight)  # the first policy is the base
    acting = Acting(model, norm, Queue(predict, about["execute"]), pixels, args.limit)

    class Evaluate(BaseCallback):
        def _on_step(self):
            step = self.num_timesteps
            last = step >= args.total_timesteps > step - env.num_envs
            if last or step % args.eval_freq < env.num_envs:
                evaluate(acting, step)
            return True

    evaluate(acting, 0)
    model.learn(args.total_timesteps, callback=Evaluate())


# --- RLPD and IBRL --------------------------------------------------------------------------------
class Still:
    """RLPD's base: no motion."""

    def __init__(self, env):
        bc.need(env, "this base needs the environment, which knows the number of actions")
        self.action_dim = env.action_dim

    def reset(self, mask: torch.Tensor):
        pass

    def act(self, obs: dict) -> torch.Tensor:
        return obs["state"].new_zeros(len(obs["state"]), self.action_dim)


def own_action(base, residual, noise, limit) -> torch.Tensor:
    """IBRL's `propose`: what the actor says is the action (B, A) itself."""
    return torch.clamp(residual + noise, -limit, limit)


def better(agent: rf.Agent, obs: dict, noise, heads) -> torch.Tensor:
    """The actor's action, or the base's where its smallest value of `heads` is as high, (N, A)."""
    base = obs["base"]
    x = agent.encoder(obs["state"], obs.get("rgb"))
    own = own_action(base, agent.actor(x, base), noise, agent.actor.limit)
    values = agent.critics_target(x.repeat(2, 1), torch.cat([own, base]), heads).amin(0)
    new, old = values.chunk(2)
    return torch.where((new > old)[:, None], own, base)


@torch.no_grad()
def choose_better(agent: rf.Agent, obs: dict, noise=0.0) -> torch.Tensor:
    """IBRL's `choose`: by a pair of heads while it explores, by all of them without noise."""
    if not torch.is_tensor(noise):
        return better(agent, obs, noise, slice(None))
    if not agent.critic_optimizer.state:  # warm-up
        return obs["base"]
    heads = torch.randperm(len(agent.critics.weights[0]), device=noise.device)[:2]
    return better(agent, obs, noise, heads)


class Larger:
    """In place of the target's critics: the larger of an action's value and the base's, (1, B)."""

    def __init__(self, critics, base: torch.Tensor):
        self.critics, self.base = critics, base

    def __call__(self, x, actions, heads) -> torch.Tensor:
        own = self.critics(x, actions, heads).amin(0)
        return torch.maximum(own, self.critics(x, self.base, heads).amin(0))[None]


def larger_loss(agent: rf.Agent, batch: dict, args: rf.Args, loss=rf.critic_loss):
    """IBRL's `critic_loss`."""
    names = ("encoder", "actor", "actor_target", "critics")
    parts = {name: getattr(agent, name) for name in names}
    target = Larger(agent.critics_target, batch["next_base"])
    return loss(SimpleNamespace(**parts, critics_target=target), batch, args)


def draw_from_both(replay, demos, args: rf.Args, draw=rf.draw_batch) -> dict:
    """IBRL's `draw_batch`: demonstrations in proportion to their number."""
    share = len(demos) / (len(demos) + len(replay))
    return draw(replay, demos, replace(args, offline=share))


IBRL = dict(
    ALGO="ibrl",
    propose=own_action,
    choose=choose_better,
    critic_loss=larger_loss,
    draw_batch=draw_from_both,
)


def like_resfit(algo: str, argv: list[str]) -> dict:
    """RLPD and IBRL, with the arguments of algos/resfit.py. -> what its `train` returns"""
    begun = any(word.startswith(("--resume", "--checkpoint")) for word in argv)
    if not begun:  # else the run has its arguments
        argv = [*LIKE.split(), "--warmup-noise", WARMUP_NOISE[algo], *argv]
    if algo == "rlpd":
        argv = ["--base", "baselines_resfit:Still", *argv]
    with patch.multiple(rf, **(IBRL if algo == "ibrl" else dict(ALGO="rlpd"))):
        args = rf.parse_args(argv)
        if not args.resume:
            args.name = args.name or run_name(args.env_id, algo, args.seed)
        return rf.train(args)


# --- train ----------------------------------------------------------------------------------------
def run_name(env_id: str, algo: str, seed: int) -> str:
    """Of a run that was given none."""
    return f"{env_id.replace('/', '-')}__{algo}__s{seed}__{time.strftime('%Y%m%d-%H%M%S')}"


def train(args: Args) -> dict:
    """Train and evaluate -> metrics of the last evaluation, and `run`, the folder.

    Raises ValueError or FileNotFoundError for arguments that do not fit.
    """
    filtered = args.algo == "filtered-bc"
    if not filtered and importlib.util.find_spec("stable_baselines3") is None:
        raise ValueError(INSTALL)
    bc.need(args.base, "give --base FILE: best.pt for filtered-bc, base.pt2 for ppo-residual")
    bc.need(args.demos or not filtered, "filtered-bc needs --demos FILE")
    bc.need(0 < args.limit <= 1, "--limit must be above 0 and at most 1")
    torch.manual_seed(args.seed)
    if filtered:
        policy = bc.Policy(args.base)
        like = replace(policy.args, demos=args.demos)
    else:
        predict, about = read_base(args.base)
        names = ("env_id", "obs", "image_size", "cameras")
        like = bc.Args(**{name: about[name] for name in names})
    like = replace(like, device="cpu", eval_episodes=args.eval_episodes, eval_envs=args.eval_envs)
    run = Path("runs") / (args.name or run_name(like.env_id, args.algo, args.seed))
    bc.need(not (run / "eval.csv").exists(), f"{run} exists: choose another --name")
    env, eval_env = bc.make_envs(replace(like, eval_envs=args.num_envs)), bc.make_envs(like)
    if filtered:
        demos, _ = bc.load_demos(like, eval_env)
    run.mkdir(parents=True, exist_ok=True)
    (run / "args.json").write_text(json.dumps(asdict(args), indent=1))
    begin, paused, results = time.perf_counter(), 0.0, {}

    def evaluate(policy, step: int):
        nonlocal paused
        pause = time.perf_counter()
        results.update(bc.evaluate(policy, eval_env, like))
        train_time = pause - begin - paused
        clock = dict(global_step=step, wall_time=time.time() - START, train_time=train_time)
        bc.write_row(run / "eval.csv", clock | results, track=False)
        print(f"{step} steps: success {results['eval/success_rate']:.3f}", flush=True)
        paused += time.perf_counter() - pause

    if filtered:
        filtered_bc(args, policy, env, demos, evaluate)
    else:
        ppo_residual(args, env, predict, about, evaluate)
    env.close()
    eval_env.close()
    return results | {"run": str(run)}


def main(argv: list[str]) -> dict:
    """A command line, run."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument("--algo")
    first_look, rest = parser.parse_known_args(argv)
    if first_look.algo in WARMUP_NOISE:
        return like_resfit(first_look.algo, rest)
    return train(tyro.cli(Args, args=argv, description=__doc__.split("\n\n")[0]))


if __name__ == "__main__":
    try:
        main(sys.argv[1:])
    except (ValueError, FileNotFoundError, FloatingPointError) as error:
        sys.exit(f"error: {error}")
