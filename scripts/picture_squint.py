"""A film of trained SO-101 policies: docs/images/so101/learned.mp4, and learned.gif for the page.

    python scripts/picture_squint.py policies/SO101*.pt

One panel a policy, in the order given: the first two episodes of the training's own evaluation, on the
nominal scene, none chosen. In a corner the 16 x 16 pixels that the policy sees. At real speed: ten pictures a second.
"""

import math
import sys
from pathlib import Path

import imageio.v2 as imageio
import numpy as np
import tyro
from PIL import Image, ImageDraw, ImageFont

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "algos"))
import squint_sac  # noqa: E402  (algos/ is a folder of files to run; the line above lets this script import one)

PANEL, INSET, LABEL, GAP = 176, 48, 16, 4  # pixels
EPISODES = 2


def panel(view: np.ndarray, seen: np.ndarray, title: str) -> np.ndarray:
    """A view for people, what the policy sees enlarged in its corner, and a title below."""
    sheet = Image.new("RGB", (PANEL + GAP, PANEL + LABEL), "white")
    sheet.paste(Image.fromarray(view))
    small = Image.fromarray(seen).resize((INSET, INSET), Image.Resampling.NEAREST)
    sheet.paste(small, (PANEL - INSET, 0))
    draw = ImageDraw.Draw(sheet)
    draw.text((2, PANEL + 1), title, fill="black", font=ImageFont.load_default(11))
    return np.asarray(sheet)


def film(checkpoint: Path) -> list[np.ndarray]:
    """Every step of the episodes of one policy, as panels."""
    policy = squint_sac.Policy(checkpoint)
    args = squint_sac.Args(**vars(policy.args) | dict(evaluate=True, domain_randomization=False))
    args.eval_envs, args.device = 1, "cpu"
    env = squint_sac.make_envs(args)[1][""]
    title, frames = args.env_id.removeprefix("SO101").removesuffix("-v1"), []
    for seed in range(squint_sac.EVAL_SEED, squint_sac.EVAL_SEED + EPISODES):
        obs = env.reset(seed=seed)
        for _ in range(env.max_episode_steps):
            seen = squint_sac.squint(obs["rgb"], args.image_size)[0, ..., :3].numpy()
            frames.append(panel(env.render((0,), PANEL)[0], seen, title))
            obs = env.step(policy.act(obs))[0]
    env.close()
    return frames


def main(
    checkpoints: tyro.conf.Positional[tuple[Path, ...]], out: Path = ROOT / "docs/images/so101"
):
    """Film policies.

    checkpoints: files of squint_sac.py, one a task
    out: folder for the film
    """
    panels = [film(path) for path in checkpoints]
    columns = math.ceil(len(panels) ** 0.5)
    blank = [np.full_like(panels[0][0], 255)] * len(panels[0])
    panels += [blank] * (-len(panels) % columns)
    frames = []
    for shown in zip(*panels, strict=True):
        rows = [np.hstack(shown[i : i + columns]) for i in range(0, len(shown), columns)]
        frames.append(np.vstack(rows))
    imageio.mimwrite(out / "learned.mp4", frames, fps=10, macro_block_size=2)
    images = [Image.fromarray(frame).quantize(96, dither=Image.Dither.NONE) for frame in frames]
    images[0].save(
        out / "learned.gif", save_all=True, append_images=images[1:], duration=100, loop=0
    )
    for file in ("learned.mp4", "learned.gif"):
        print(out / file, f"{(out / file).stat().st_size / 1e6:.1f} MB")


if __name__ == "__main__":
    tyro.cli(main)
