"""PPO and SAC of Stable-Baselines3 on the differentiable tasks, for the figures of docs/algos/sapo_rewarped.md.

    python scripts/baselines_rewarped.py --algo ppo --env-id AntRun --seed 1
    python scripts/baselines_rewarped.py --algo sac --env-id RollingFlat --seed 1
    python scripts/baselines_rewarped.py --algo random --env-id AntRun        uniform actions; or still: none

PPO and SAC step the same simulation without its gradient. Environments, budget and evaluation (episodes, seeds, the
mean action) are those of `algos/sapo_rewarped.py --algo sapo`; so are the networks' widths and the encoder of
particles, which PPO's actor and critic share. Learning rates, clipping and the like follow the baselines of the SAPO
paper as far as the library has them; minibatches are smaller, as the batches of fewer environments are.
Output: runs/<name>/eval.csv, with the columns that algos/ write; `random` and `still` do not learn, and write the
return of the evaluation's episodes as that of step 0 and of the last one.
"""

import importlib.util
import sys
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch
import tyro

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import sapo_rewarped as sr  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)

START = time.time()
INSTALL = 'stable-baselines3 is missing: run `pip install -e ".[baselines]"`'


@dataclass
class Args:
    algo: Literal["ppo", "sac", "random", "still"] = "ppo"
    """which of the library's algorithms, or actions that are drawn at random or all zero"""
    env_id: str = "AntRun"
    """task of envs/rewarped"""
    seed: int = 1
    """of weights, exploration, minibatches and episodes"""
    name: str = ""
    """folder under runs/; empty: made from task, algorithm, seed and time"""
    size: Literal["full", "small"] = "small"
    """of the simulation"""
    total_timesteps: int | None = None
    """environment transitions; None: as many as SAPO has by default"""
    device: str = "cpu"
    """of networks and simulation"""


def make_vec_env(env):
    """A differentiable environment as one of the library's vectorised ones: NumPy in and out, no gradient."""
    from gymnasium import spaces
    from stable_baselines3.common.vec_env import VecEnv

    class Simulation(VecEnv):
        def __init__(self):
            boxes = {
                name: spaces.Box(-np.inf, np.inf, shape) for name, shape in env.obs_dims.items()
            }
            super().__init__(
                env.num_envs, spaces.Dict(boxes), spaces.Box(-1.0, 1.0, (env.action_dim,))
            )

        def reset(self):
            return numpy(env.reset())

        def step_async(self, actions):
            self.actions = torch.as_tensor(actions, dtype=torch.float32, device=env.device)

        def step_wait(self):
            with torch.no_grad():
                env.detach()
                obs, rewards, terminations, truncations, info = env.step(self.actions)
            dones, last = (terminations | truncations).cpu().numpy(), numpy(info["final_obs"])
            infos = [{} for _ in dones]
            for i in dones.nonzero()[0]:
                final_obs = {name: value[i] for name, value in last.items()}
                infos[i] = {
                    "terminal_observation": final_obs,
                    "TimeLimit.truncated": bool(truncations[i]),
                }
            return numpy(obs), rewards.cpu().numpy(), dones, infos

        def close(self):
            env.close()

        def seed(self, seed=None):  # the environment has its own, from its making
            return [None] * self.num_envs

        def get_attr(self, attr_name, indices=None):
            return [None] * self.num_envs

        def set_attr(self, attr_name, value, indices=None):
            raise NotImplementedError("an environment has no attributes of its own")

        def env_method(self, method_name, *args, indices=None, **kwargs):
            raise NotImplementedError("an environment has no methods of its own")

        def env_is_wrapped(self, wrapper_class, indices=None):
            return [False] * self.num_envs

    def numpy(obs):
        return {name: value.detach().cpu().numpy() for name, value in obs.items()}

    return Simulation()


def make_encoder():
    """SAPO's encoder, before its MLPs: particles one by one, their mean, and the state beside it."""
    from stable_baselines3.common.torch_layers import BaseFeaturesExtractor

    class Encoder(BaseFeaturesExtractor):
        def __init__(self, space, args: sr.Args):
            width, points = space["state"].shape[0], "points" in space.spaces
            super().__init__(space, 64 + 128 if points else width)
            self.each = None
            if points:
                self.each = sr.mlp(args, 3, 64, 128, 256)
                self.mean = sr.mlp(args, 256, 64)
                self.low = sr.mlp(args, width, 128)

        def forward(self, obs):
            if self.each is None:
                return obs["state"]
            return torch.cat(
                [self.mean(self.each(obs["points"]).mean(-2)), self.low(obs["state"])], -1
            )

    return Encoder


def make_model(args: Args, like: sr.Args, envs):
    """The library's algorithm with the settings of this comparison."""
    import stable_baselines3 as sb3

    policy = dict(
        activation_fn=torch.nn.SiLU,
        optimizer_class=torch.optim.AdamW,
        features_extractor_class=make_encoder(),
        features_extractor_kwargs=dict(args=like),
    )
    options = dict(learning_rate=5e-4, gamma=like.gamma, seed=args.seed, device=args.device)
    batch = like.num_envs * like.horizon
    if args.algo == "ppo":
        units = dict(pi=list(like.actor_units), vf=list(like.critic_units))
        return sb3.PPO(
            "MultiInputPolicy",
            envs,
            n_steps=like.horizon,
            batch_size=batch // 4,
            n_epochs=5,
            gae_lambda=like.gae_lambda,
            clip_range=0.2,
            max_grad_norm=0.5,
            target_kl=0.03,
            policy_kwargs=policy | dict(net_arch=units),
            **options,
        )
    units = dict(pi=list(like.actor_units), qf=list(like.critic_units))
    return sb3.SAC(
        "MultiInputPolicy",
        envs,
        buffer_size=min(1_000_000, 2 * like.total_timesteps),
        batch_size=16 * like.num_envs,
        learning_starts=batch,
        train_freq=4,
        gradient_steps=4,
        tau=0.005,
        ent_coef="auto_1.0",
        target_entropy=-envs.action_space.shape[0] / 2,
        policy_kwargs=policy | dict(net_arch=units),
        **options,
    )


class Acting:
    """The trained policy with the interface of sapo_rewarped.Policy: the mean action."""

    def __init__(self, model, norm, device):
        self.model, self.norm, self.device = model, norm, device

    def act(self, obs):
        obs = self.norm.normalize_obs({name: value.cpu().numpy() for name, value in obs.items()})
        return torch.as_tensor(self.model.predict(obs, deterministic=True)[0], device=self.device)


class Untaught:
    """Uniform actions, or none at all."""

    def __init__(self, env, random: bool, seed: int):
        self.env, self.random, self.generator = env, random, torch.Generator().manual_seed(seed)

    def act(self, obs):
        draw = (
            torch.rand((self.env.num_envs, self.env.action_dim), generator=self.generator) * 2 - 1
        )
        return (draw * self.random).to(self.env.device)


def train(args: Args) -> dict:
    """Train, evaluate as often as SAPO does. -> metrics of the last evaluation and `run`, the folder."""
    learns = args.algo in ("ppo", "sac")
    if learns and importlib.util.find_spec("stable_baselines3") is None:
        raise ValueError(INSTALL)
    own = dict(env_id=args.env_id, size=args.size, device=args.device, seed=args.seed)
    like = sr.Args(**sr.tuned("sapo", args.env_id, args.size) | own | dict(capture_video=False))
    like = replace(like, total_timesteps=args.total_timesteps or like.total_timesteps)
    sr.check(like)
    run = Path("runs") / (
        args.name or time.strftime(f"{args.env_id}__{args.algo}__s{args.seed}__%Y%m%d-%H%M%S")
    )
    if (run / "eval.csv").exists():
        raise ValueError(f"{run} exists: choose another --name")
    env, eval_env = sr.make_envs(like)
    run.mkdir(parents=True, exist_ok=True)
    begin, paused, results = time.perf_counter(), 0.0, {}

    def evaluate(policy, step: int):
        nonlocal paused
        pause = time.perf_counter()
        results.update(sr.evaluate(policy, eval_env, like, run / "unused.mp4"))
        clock = dict(
            global_step=step, wall_time=time.time() - START, train_time=pause - begin - paused
        )
        sr.write_row(run / "eval.csv", clock | results, track=False)
        print(f"{step} steps: return {results['eval/return']:.3f}", flush=True)
        paused += time.perf_counter() - pause

    if learns:
        learn(args, like, env, evaluate)
    else:
        for step in (0, like.total_timesteps):
            evaluate(Untaught(eval_env, args.algo == "random", args.seed), step)
    for part in (env, eval_env):
        part.close()
    return results | {"run": str(run)}


def learn(args: Args, like: sr.Args, env, evaluate):
    """The library's training loop; calls evaluate(policy, step) as often as SAPO does, and at the end."""
    from stable_baselines3.common.callbacks import BaseCallback
    from stable_baselines3.common.vec_env import VecNormalize

    norm = VecNormalize(make_vec_env(env), norm_obs_keys=["state"], gamma=like.gamma)
    model = make_model(args, like, norm)

    class Evaluate(BaseCallback):
        seen = 0

        def _on_step(self):
            step = self.num_timesteps
            if (
                step // like.eval_freq != self.seen // like.eval_freq
                or step >= like.total_timesteps > self.seen
            ):
                evaluate(Acting(model, norm, env.device), step)
            self.seen = step
            return True

    model.learn(like.total_timesteps, callback=Evaluate())


if __name__ == "__main__":
    try:
        train(tyro.cli(Args, description=__doc__.split("\n\n")[0]))
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
