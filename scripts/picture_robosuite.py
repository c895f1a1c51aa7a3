"""Pictures for docs/envs/robosuite.md: the expert at work in each task, and one view drawn in each `look`.

.venv-robosuite/bin/python scripts/picture_robosuite.py            writes docs/images/robosuite/*.jpg
"""

import argparse
from pathlib import Path

import imageio.v3 as iio
import numpy as np
import torch

from envs import robosuite
from envs.robosuite.expert import PHASES, Expert

FRAMES, SIZE = 6, 144
LOOKS = ("plain", "full", "collision")


def strip(task: str, seed: int) -> np.ndarray:
    """Moments of the expert's episode until success, in a row: uint8 (SIZE, FRAMES * SIZE, 3)."""
    env = robosuite.make(f"robosuite/{task}", 1, seed=seed, images=False, stagger=False)
    expert, frames = Expert(env), []
    for _ in range(env.max_episode_steps - 1):
        frames.append(
            env.render(size=SIZE, camera="agentview")[0] if len(frames) % 4 == 0 else None
        )
        _, _, _, _, info = env.step(expert.act())
        if info["success"][0]:
            break
    frames = [f for f in frames if f is not None] + [env.render(size=SIZE, camera="agentview")[0]]
    env.close()
    chosen = np.linspace(0, len(frames) - 1, FRAMES).round().astype(int)
    return np.concatenate([frames[k] for k in chosen], 1)


def looks(task: str, seed: int, size: int = 84) -> np.ndarray:
    """What a policy sees at the start of an episode, both cameras, one row a look; twice as large as it sees it."""
    rows = []
    for look in LOOKS:
        env = robosuite.make(
            f"robosuite/{task}", 1, seed=seed, look=look, stagger=False, render_size=size
        )
        rgb = env.reset(seed)["rgb"][0]
        rows.append(torch.cat((rgb[..., :3], rgb[..., 3:]), 1).numpy())
        env.close()
    return np.concatenate(rows, 1).repeat(2, 0).repeat(2, 1)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--out", type=Path, default=Path(__file__).resolve().parents[1] / "docs/images/robosuite"
    )
    parser.add_argument("--seed", type=int, default=1)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    for task in PHASES:
        iio.imwrite(args.out / f"{task}.jpg", strip(task, args.seed), quality=85)
    iio.imwrite(args.out / "looks.jpg", looks("PickPlaceCan", args.seed), quality=90)


if __name__ == "__main__":
    main()
