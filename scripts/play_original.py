"""Play an AntRun policy of sapo_rewarped.py in the original package, to see whether its ant is ours.

    python -m venv original
    original/bin/pip install rewarped==1.3.3 torch==2.13.0 gym==0.23.1 usd-core==24.5 hydra-core omegaconf \\
        tensorboard trimesh tyro tqdm imageio
    original/bin/python scripts/play_original.py --checkpoint policies/AntRun.pt

An environment of its own: the original needs warp-lang 1.3.3. Prints mean and deviation of the returns, and how long
the episodes were, of 1,000 steps at most. On a CPU the kernels take a minute to compile, the first time.
"""

import json
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro

sys.path.insert(0, str(Path(__file__).resolve().parent.parent / "algos"))
from sapo_rewarped import Policy


@dataclass
class Args:
    checkpoint: str
    """Weights of AntRun, .pt."""
    episodes: int = 32
    """Played at once."""
    seed: int = 0
    """Of the first states."""


def main(args: Args) -> dict:
    """-> the printed numbers. Raises ValueError without the original package."""
    try:
        from rewarped.envs.dflex.ant import Ant
    except ModuleNotFoundError as error:
        raise ValueError(
            "rewarped 1.3.3 is not installed here: the docstring has the lines"
        ) from error
    policy = Policy(args.checkpoint)
    torch.manual_seed(args.seed)
    options = dict(no_grad=True, no_env_offset=True, use_graph_capture=False, render=False)
    env = Ant(num_envs=args.episodes, device="cpu", **options)
    obs = env.reset()
    returns, lengths = torch.zeros(2, args.episodes)
    running = torch.ones(args.episodes, dtype=torch.bool)
    while running.any():
        obs, rewards, dones, _ = env.step(policy.act({"state": obs}))
        returns += running * rewards
        lengths += running
        running &= ~dones.bool()
    results = dict(
        episodes=args.episodes,
        mean_return=float(returns.mean()),
        return_std=float(returns.std()),
        mean_length=float(lengths.mean()),
    )
    print(json.dumps(results))
    return results


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except ValueError as error:
        sys.exit(f"error: {error}")
