"""Draw the images of the differentiable tasks that the docs show: start, middle and end of an episode of each.

    python scripts/picture_rewarped.py                               all tasks, at the size `full`
    python scripts/picture_rewarped.py --tasks RollingFlat --size small --steps 60
    python scripts/picture_rewarped.py --tasks HandReorient --video videos       and an mp4 of all steps

The actions are scripted, not learned: the pin presses and rolls to and fro, the box goes to its
target, fingers curl, the table's two halves swell by turns, the ant paddles, the hand kneads the cube.
Output: docs/images/rewarped/<task>.png, at most 120 kB each; <video>/<task>.mp4. At full size a task takes minutes on a
CPU.
"""

import sys
from dataclasses import dataclass
from pathlib import Path

import imageio
import numpy as np
import torch
import tyro
from PIL import Image

from envs import rewarped

ROOT = Path(__file__).resolve().parent.parent
SIDE, LIMIT = 300, 120_000  # pixels of an image's side; bytes of a file
FILM, FPS = (
    320,
    30,
)  # pixels of a film's side, which codecs want in sixteens; images a second, one a step


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(rewarped.tasks())
    """which tasks"""
    size: str = "full"
    """full or small"""
    steps: int = 120
    """control steps between the first image and the last"""
    out: Path = ROOT / "docs/images/rewarped"
    """folder for the images"""
    video: Path | None = None
    """folder for an mp4 of each task; None: no films"""
    seed: int = 3
    """seed of the episode"""


def act(env, step: int) -> torch.Tensor:
    """Scripted actions (1, A)."""
    actions = torch.zeros(1, env.action_dim)
    if env.env_id == "RollingFlat":
        actions[0, 1] = -1.0 if step < 12 else -0.06
        actions[0, 0] = 0.0 if step < 12 else (1.0 if (step // 20) % 2 else -1.0)
    elif env.env_id == "FluidMove":
        actions[0] = ((env.state["target"] - env.state["joints"]) / 0.05)[0].clamp(-0.5, 0.5)
    elif env.env_id == "SoftJumper":
        left = (
            env.rest[env.tets].mean(1)[:, 0] < 0
        )  # of the table: its muscles swell when those on the right shrink
        actions[0] = torch.where(left[::2], 1.0, -1.0) * (1.0 if (step // 8) % 2 else -1.0)
    elif env.env_id == "AntRun":
        legs, beat = torch.arange(4), 1.0 if (step // 10) % 2 else -1.0
        actions[0, 0::2] = beat * (1.0 - 2.0 * (legs % 2)) * 0.5
        actions[0, 1::2] = torch.tensor((-1.0, 1.0, 1.0, -1.0))  # push down
    elif env.env_id == "HandReorient":
        wave = torch.arange(16) // 4 * 0.5 * np.pi  # one finger after the other
        actions[0] = torch.sin(2 * np.pi * step / 80 + wave)
    else:
        curl = torch.tensor([joint.high > 1.5 for joint in env.robot.joints])
        actions[0, curl] = 1.0 if step < 60 else 0.0
    return actions


def main(args: Args) -> int:
    unknown = sorted(set(args.tasks) - set(rewarped.tasks()))
    if unknown or args.steps < 2 or args.size not in ("full", "small"):
        print(
            f"--tasks: known are {', '.join(rewarped.tasks())}; --steps at least 2; --size full or small",
            file=sys.stderr,
        )
        return 2
    args.out.mkdir(parents=True, exist_ok=True)
    for task in args.tasks:
        env, images, film = (
            rewarped.make(task, 1, size=args.size, seed=args.seed, graph=False),
            [],
            [],
        )
        with torch.no_grad():
            for step in range(args.steps + 1):
                if step in (0, args.steps // 2, args.steps):
                    images.append(env.render(0, SIDE))
                if args.video:
                    film.append(env.render(0, FILM))
                env.step(act(env, step))
        if args.video:
            args.video.mkdir(parents=True, exist_ok=True)
            imageio.mimsave(args.video / f"{task}.mp4", film, fps=FPS)
            print(args.video / f"{task}.mp4")
        path = args.out / f"{task}.png"
        Image.fromarray(np.concatenate(images, 1)).quantize(128).save(path, optimize=True)
        print(
            f"{path}  {path.stat().st_size} bytes, size {args.size}, steps 0, {args.steps // 2}, {args.steps}"
        )
        if path.stat().st_size > LIMIT:
            print(f"{path} has more than {LIMIT} bytes", file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(tyro.cli(Args)))
