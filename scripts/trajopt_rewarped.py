"""Trajectory optimisation on the differentiable tasks: gradient ascent on the actions of whole episodes, no policy.

    python scripts/trajopt_rewarped.py --env-id AntRun
    python scripts/trajopt_rewarped.py --env-id HandFlip --size full --device cuda

One plan (T, N, A) for the N episodes that SAPO is evaluated on, from the same first states in every iteration, so that
returns compare. Each iteration plays the plan, sends the undiscounted sum of rewards back through the whole episode
and takes a step of Adam; actions stay in [-1, 1]. Where an episode ends early, what follows within the plan counts
too. Learning rates, first plans and the number of iterations are those of SAPO's authors.
Output: runs/<name>/eval.csv, one row for each plan, and plan.pt, the last one.
"""

import sys
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
import tyro
from tqdm import trange

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import sapo_rewarped as sr  # noqa: E402  (algos/ is a folder of files to run, not a package)

START = time.time()
# task -> settings other than those of most tasks
TUNED = {
    "HandFlip": dict(iterations=50, first="zeros"),
    "HandReorient": dict(lr=0.1),
}


@dataclass
class Args:
    env_id: str = "AntRun"
    """task of envs/rewarped"""
    seed: int = 1
    """of the first plan"""
    name: str = ""
    """folder under runs/; empty: made from task, seed and time"""
    size: Literal["full", "small"] = "small"
    """of the simulation"""
    num_envs: int | None = None
    """N: episodes that are planned at once; None: as many as SAPO trains on"""
    iterations: int = 10
    """steps of Adam"""
    lr: float = 1e-2
    """learning rate"""
    first: Literal["uniform", "zeros"] = "uniform"
    """the first plan"""
    device: str = "cuda" if torch.cuda.is_available() else "cpu"
    """of the simulation"""


def parse_args(argv: list[str] | None = None) -> Args:
    """Command line -> Args, with the task's defaults."""
    argv = sys.argv[1:] if argv is None else argv
    given = tyro.cli(Args, args=[word for word in argv if word not in ("-h", "--help")])
    defaults = Args(env_id=given.env_id, **TUNED.get(given.env_id, {}))
    return tyro.cli(Args, args=argv, default=defaults, description=__doc__.split("\n\n")[0])


def play(env, plan) -> tuple[torch.Tensor, torch.Tensor]:
    """The plan (T, N, A) from the evaluation's first states. -> mean reward, returns (N,) of the first episodes."""
    env.detach()
    env.reset(seed=sr.EVAL_SEED)
    total = 0.0
    returns = torch.full((env.num_envs,), torch.nan, device=env.device)
    for actions in plan:
        _, rewards, terminations, truncations, info = env.step(actions)
        lost = info["nan"] | sr.absurd(info["final_obs"])
        total = total + torch.where(lost, 0.0, rewards).sum()
        first_end = (terminations | truncations) & returns.isnan()
        returns = torch.where(first_end, info["episode"]["return"].detach().float(), returns)
    return total / (len(plan) * env.num_envs), returns


def train(args: Args) -> dict:
    """-> the last plan's metrics, and `run`, the folder. Raises ValueError if the folder is taken."""
    run = Path("runs") / (
        args.name or time.strftime(f"{args.env_id}__trajopt__s{args.seed}__%Y%m%d-%H%M%S")
    )
    sr.need(not run.exists(), f"{run} exists: choose another --name")
    tuned = sr.tuned("sapo", args.env_id, args.size)
    like = sr.Args(**tuned | dict(env_id=args.env_id, size=args.size, device=args.device))
    like.eval_episodes = args.num_envs or like.num_envs
    like.evaluate = like.recompute = (
        True  # one environment, and memory for a window as long as the episode
    )
    env = sr.make_envs(like)[1]
    run.mkdir(parents=True)

    torch.manual_seed(args.seed)
    plan = torch.zeros(env.max_episode_steps, env.num_envs, env.action_dim, device=args.device)
    if args.first == "uniform":
        plan.uniform_(-1, 1)
    plan.requires_grad_()
    optimizer = torch.optim.Adam([plan], args.lr, betas=(0.7, 0.95))
    begin = time.perf_counter()
    for iteration in trange(args.iterations + 1):
        last = iteration == args.iterations
        with torch.set_grad_enabled(not last):
            objective, returns = play(env, plan)
        if not last:
            optimizer.zero_grad()
            (-objective).backward()
            plan.grad = sr.zero_broken(plan.grad)
            optimizer.step()
            plan.data.clamp_(-1, 1)
        results = {
            "global_step": iteration * plan[..., 0].numel(),
            "wall_time": time.time() - START,
            "train_time": time.perf_counter() - begin,
            "eval/return": float(returns.mean()),
            "eval/return_std": float(returns.std()),
        }
        sr.write_row(run / "eval.csv", results, track=False)
    env.close()
    sr.save(run / "plan.pt", dict(plan=plan.detach(), env_id=args.env_id, size=args.size))
    print(f"{run}: return {results['eval/return']:.3f}")
    return results | {"run": str(run)}


if __name__ == "__main__":
    try:
        train(parse_args())
    except (ValueError, FileNotFoundError) as error:
        sys.exit(f"error: {error}")
