"""Draw the images of the SO-101 tasks that the docs show, from scripted episodes without randomisation.

    python scripts/picture_tasks.py                                  all tasks, the overview, the randomisation
    python scripts/picture_tasks.py --tasks SO101LiftCube-v1         that task's image alone

Output, PNGs of at most 60 kB under docs/images/so101:
    <task>.png           start, middle and end of an episode that a scripted controller solves: a view for people, what
                         the wrist camera gives the policy at 128 pixels, and the 16 x 16 area mean that it learns from
    tasks.png            every task's end, with the 16 x 16 image in a corner
    randomization.png    wrist images of twelve environments of two tasks at the start, randomised, at 64 pixels
"""

from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import tyro
from PIL import Image, ImageDraw, ImageFont

from envs import so101
from envs.so101.expert import Expert

ROOT = Path(__file__).resolve().parent.parent
WORLDS = 12  # episodes tried at once; one that is solved is shown
WRIST, SMALL = 128, 16  # pixels a side: what is rendered, what is learned from
WIDE, HIGH = (
    256,
    216,
)  # the view for people, cut out of a square of VIEW pixels around arm and spawn region
VIEW, LEFT, TOP = 290, 20, 34
GAP, LABEL = 6, 18
MOMENTS = {0: "start", 25: "middle", so101.HORIZON - 1: "end"}  # control steps taken -> name
LIMIT = 60_000  # bytes


@dataclass
class Args:
    tasks: tuple[str, ...] = tuple(so101.TASKS)
    """which tasks to draw; the overview and the randomisation are drawn when all are"""
    out: Path = ROOT / "docs/images/so101"
    """folder for the pictures"""
    seed: int = 3
    """seed of the episodes"""


def area_mean(rgb: np.ndarray) -> np.ndarray:
    """uint8 (128, 128, 3) -> uint8 (16, 16, 3), each pixel the rounded mean of an 8 x 8 block."""
    k = WRIST // SMALL
    return rgb.reshape(SMALL, k, SMALL, k, 3).mean((1, 3)).round().astype(np.uint8)


def enlarged(rgb: np.ndarray, size: int) -> np.ndarray:
    """Repeats pixels: (s, s, 3) -> (size, size, 3); size is a multiple of s."""
    return rgb.repeat(size // len(rgb), 0).repeat(size // len(rgb), 1)


def episode(env_id: str, seed: int) -> list[tuple[np.ndarray, np.ndarray]]:
    """One (view for people, wrist image) for each of MOMENTS, of an environment whose episode ends in success:
    the one whose objects start nearest to the middle of the spawn region, where every view shows them.

    Raises RuntimeError when the scripted controller solves none of the environments.
    """
    env = so101.make(
        env_id, WORLDS, "cpu", seed=seed, render_size=WRIST, samples_per_pixel=1, domain_randomization=False,
        stagger=False, images=False,  # `draw` below draws what step() would have returned, at three moments only
    )  # fmt: skip
    expert, shown, centre = Expert(env), [], torch.tensor(so101.SPAWN_CENTRE)
    objects = ("item", "support") if so101.TASKS[env_id].support else ("item",)
    off_centre = sum((env.pose(name)[0][:, :2] - centre).norm(dim=1) for name in objects)
    for taken in range(
        so101.HORIZON
    ):  # the last step would begin the next episode: it is not taken
        if taken in MOMENTS:
            view = env.render(range(WORLDS), size=VIEW)[:, TOP : TOP + HIGH, LEFT : LEFT + WIDE]
            shown.append((view, env.scene.draw().numpy().copy()))
        if taken < so101.HORIZON - 1:
            env.step(expert.act())
    solved = env.reward()[1]
    env.close()
    if not solved.any():
        raise RuntimeError(
            f"{env_id}: no scripted episode of seed {seed} ends in success; try another --seed"
        )
    world = int(torch.where(solved, off_centre, torch.inf).argmin())
    return [(view[world], wrist[world]) for view, wrist in shown]


def write(picture: Image.Image, path: Path) -> None:
    """Writes a PNG of at most 192 colours. Raises RuntimeError where it is above LIMIT."""
    path.parent.mkdir(parents=True, exist_ok=True)
    picture.quantize(192, dither=Image.Dither.NONE).save(path, optimize=True)
    if path.stat().st_size > LIMIT:
        raise RuntimeError(
            f"{path} has {path.stat().st_size} bytes, above {LIMIT}: show less or shrink it"
        )
    print(f"{path.name}: {path.stat().st_size / 1000:.0f} kB")


def canvas(width: int, height: int) -> tuple[Image.Image, ImageDraw.ImageDraw]:
    """An empty white image and what draws on it."""
    picture = Image.new("RGB", (width, height), "white")
    return picture, ImageDraw.Draw(picture)


def label(draw: ImageDraw.ImageDraw, x: int, y: int, text: str) -> None:
    draw.text((x, y), text, fill="black", font=ImageFont.load_default(13))


def of_task(moments: list[tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """Three columns (start, middle, end): the view for people above, the wrist's 128 and 16 pixels below."""
    half = WIDE // 2
    picture, draw = canvas(3 * WIDE + 2 * GAP, LABEL + HIGH + half + LABEL)
    for column, (name, (view, wrist)) in enumerate(zip(MOMENTS.values(), moments, strict=True)):
        x = column * (WIDE + GAP)
        label(draw, x + 2, 1, name)
        picture.paste(Image.fromarray(view), (x, LABEL))
        picture.paste(Image.fromarray(wrist), (x, LABEL + HIGH))
        picture.paste(Image.fromarray(enlarged(area_mean(wrist), half)), (x + half, LABEL + HIGH))
        label(draw, x + 2, LABEL + HIGH + half + 1, f"wrist, {WRIST} px")
        label(draw, x + half + 2, LABEL + HIGH + half + 1, f"learned from, {SMALL} px")
    return picture


def of_all(ends: dict[str, tuple[np.ndarray, np.ndarray]]) -> Image.Image:
    """A grid of four columns: each task's last moment, the 16-pixel image in its upper right corner."""
    wide, high, inset, columns = 208, 176, 64, 4
    rows = -(-len(ends) // columns)
    picture, draw = canvas(columns * (wide + GAP) - GAP, rows * (high + LABEL + GAP) - GAP)
    for k, (env_id, (view, wrist)) in enumerate(ends.items()):
        x, y = k % columns * (wide + GAP), k // columns * (high + LABEL + GAP)
        label(draw, x + 2, y + 1, env_id)
        picture.paste(
            Image.fromarray(view).resize((wide, high), Image.Resampling.BOX), (x, y + LABEL)
        )
        corner = (x + wide - inset, y + LABEL)
        draw.rectangle(
            (corner[0] - 2, corner[1], corner[0] + inset, corner[1] + inset + 1), fill="white"
        )
        picture.paste(Image.fromarray(enlarged(area_mean(wrist), inset)), corner)
    return picture


def of_randomization(seed: int) -> Image.Image:
    """Twelve environments of two tasks at their start, wrist camera at 64 pixels, all randomisation on."""
    size, columns = 64, 12
    names = ("SO101StackCube-v1", "SO101PlaceCan-v1")
    picture, _ = canvas(columns * (size + 2) - 2, len(names) * (size + 2) - 2)
    for row, env_id in enumerate(names):
        env = so101.make(env_id, columns, "cpu", seed=seed, render_size=size, stagger=False)
        for column, rgb in enumerate(env.obs["rgb"].numpy()):
            picture.paste(Image.fromarray(rgb), (column * (size + 2), row * (size + 2)))
        env.close()
    return picture


def main(args: Args) -> None:
    """Draws what `args` names. Raises RuntimeError where an image cannot be shown as intended."""
    ends = {}
    for env_id in args.tasks:
        moments = episode(env_id, args.seed)
        write(of_task(moments), args.out / f"{env_id}.png")
        ends[env_id] = moments[-1]
    if set(args.tasks) == set(so101.TASKS):
        write(of_all(ends), args.out / "tasks.png")
        write(of_randomization(args.seed), args.out / "randomization.png")


if __name__ == "__main__":
    main(tyro.cli(Args, description=__doc__))
