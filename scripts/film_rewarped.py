"""A film of a trained policy of sapo_rewarped.py for its page: docs/images/rewarped/<task>.gif.

    python scripts/film_rewarped.py --checkpoint policies/AntRun.pt

One episode from the evaluation's seed, not chosen. Each step is a picture, and 33 pictures are a second: an ant, which
has 60 steps a second, is slowed down to half.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import tyro
from PIL import Image

from envs import rewarped

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import sapo_rewarped  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)

DURATION = 30  # ms of a picture


@dataclass
class Args:
    checkpoint: Path
    """weights of the policy"""
    steps: int = 180
    """length of the film; it ends with the episode"""
    size: int = 320
    """pixels of a side"""
    out: Path = ROOT / "docs/images/rewarped"
    """folder for the film"""


@torch.no_grad()
def film(args: Args) -> list[Image.Image]:
    """The pictures, one a step."""
    trained = sapo_rewarped.Args(**sapo_rewarped.load(args.checkpoint)["args"])
    policy = sapo_rewarped.Policy(args.checkpoint)
    options = dict(size=trained.size, reward=trained.reward, graph=False)
    env = rewarped.make(trained.env_id, 1, seed=sapo_rewarped.EVAL_SEED, **options)
    obs, pictures = env.reset(seed=sapo_rewarped.EVAL_SEED), []
    for _ in range(args.steps):
        picture = Image.fromarray(env.render(0, args.size))
        pictures.append(picture.quantize(64, dither=Image.Dither.NONE))
        obs, _, terminations, truncations, _ = env.step(policy.act(obs))
        if (terminations | truncations).any():
            break
    return pictures


def main(args: Args) -> Path:
    pictures = film(args)
    trained = sapo_rewarped.load(args.checkpoint)["args"]
    path = args.out / f"{trained['env_id']}.gif"
    path.parent.mkdir(parents=True, exist_ok=True)
    rest = dict(append_images=pictures[1:], duration=DURATION, loop=0)
    pictures[0].save(path, save_all=True, **rest)
    print(f"{path}  {len(pictures)} pictures, {path.stat().st_size / 1e6:.1f} MB")
    return path


if __name__ == "__main__":
    try:
        main(tyro.cli(Args, description=__doc__))
    except (ValueError, OSError) as error:
        sys.exit(f"error: {error}")
